"""Plain memory with an address, for tests of transports: and parts of segments."""

from __future__ import annotations

import ctypes
import random
from typing import Any

from tidepool.common.wire import Region


class Memory:
    """`num_bytes` at `address`, zero at first."""

    def __init__(self, num_bytes: int) -> None:
        self.buffer = ctypes.create_string_buffer(num_bytes)
        self.address = ctypes.addressof(self.buffer)
        self.num_bytes = num_bytes

    def fill(self, seed: int) -> bytes:
        data = random.Random(seed).randbytes(self.num_bytes)
        ctypes.memmove(self.address, data, self.num_bytes)
        return data

    def set(self, start: int, num_bytes: int, byte: int) -> None:
        assert 0 <= start <= start + num_bytes <= self.num_bytes
        ctypes.memset(self.address + start, byte, num_bytes)

    def read(self, start: int = 0, num_bytes: int | None = None) -> bytes:
        return ctypes.string_at(self.address + start, num_bytes or self.num_bytes - start)


def make_region(
    memory: Memory, name: str, num_layers: int, num_pages: int, page_bytes: int
) -> Region:
    assert memory.num_bytes >= num_layers * num_pages * page_bytes
    return Region(name, memory.address, num_layers, num_pages, page_bytes)  # type: ignore[arg-type]


class SegmentMemory(Memory):
    """A part of a SharedSegment."""

    def __init__(self, segment: Any, name: str) -> None:
        self.data = segment.part(name)
        self.address = self.data.data_ptr()
        self.num_bytes = self.data.numel()
