"""xxh3_64 over memory at raw addresses; host memory only.

Asked for by the mover's thread. Where the machine has cores to spare, several parts are hashed at a
time, on threads that hold the GIL only between segments.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

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


def next_parts(
    parts: Sequence[Sequence[Segment]], first: int, max_bytes: int
) -> Sequence[Sequence[Segment]]:
    """Parts from `first` on: one for each thread, and as many as it takes to reach `max_bytes`."""
    end, num_bytes = first, 0
    while end < len(parts) and (num_bytes < max_bytes or end < first + NUM_THREADS):
        num_bytes += sum(size for _, size in parts[end])
        end += 1
    return parts[first:end]


def checksums(parts: Sequence[Sequence[Segment]]) -> list[int]:
    """The checksum of each part."""
    if len(parts) < 2 or NUM_THREADS < 2:
        return [checksum(part) for part in parts]
    return list(_pool().map(checksum, parts))


NUM_THREADS = max(1, min(4, len(os.sched_getaffinity(0)) // 4))
"""Leaves most cores to the model and to the engine that moves the bytes."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="checksum")
