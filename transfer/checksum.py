"""xxh3_64 over memory at raw addresses. Runs on the mover's thread; host memory only."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import xxhash

Segment = tuple[int, int]
"""(address, bytes)."""


def checksum(segments: Iterable[Segment]) -> int:
    """Hash of the segments' bytes, one behind the other: unsigned, 64 bits.

    The memory must stay mapped; bytes that change meanwhile give some other value, nothing worse.
    """
    state = xxhash.xxh3_64()
    for address, num_bytes in segments:
        state.update((ctypes.c_char * num_bytes).from_address(address))
    return int(state.intdigest())


def num_bytes_of(segments: Iterable[Segment]) -> int:
    return sum(num_bytes for _, num_bytes in segments)
