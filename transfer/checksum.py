"""xxh3_64 over memory at raw addresses, on threads of its own; host memory only.

The mover owns one Hasher and asks it from its thread; nobody waits for it. Its threads hold the GIL
only between segments.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import xxhash

Segment = tuple[int, int]
"""(address, bytes)."""

NUM_THREADS = max(1, min(4, len(os.sched_getaffinity(0)) // 4))
"""Leaves most cores to the model and to the engine that moves the bytes."""
_MIN_GROUP_BYTES = 256 * 1024
"""Less is not worth another thread."""


def checksum(segments: Iterable[Segment]) -> int:
    """Hash of the segments' bytes, one behind the other: unsigned, 64 bits.

    The memory must stay mapped; bytes that change meanwhile give some other value, nothing worse.
    """
    state = xxhash.xxh3_64()
    for address, num_bytes in segments:
        state.update((ctypes.c_char * num_bytes).from_address(address))
    return int(state.intdigest())


class Hashing:
    """Checksums under way. Made by Hasher."""

    def __init__(self, groups: Sequence[Future[list[int]]]) -> None:
        self._groups = groups

    @property
    def is_done(self) -> bool:
        return all(group.done() for group in self._groups)

    def values(self) -> list[int]:
        """One a part, in order; raises what hashing raised. Only once it is done."""
        return [value for group in self._groups for value in group.result()]


class Hasher:
    """See the module. Threads are started when they are first needed."""

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="checksum")

    def start(self, parts: Sequence[Sequence[Segment]], on_end: Callable[[], None]) -> Hashing:
        """Begins to hash `parts`, spread over the threads by bytes.

        `on_end`: called at the end, once or more often, on some thread. What was started before is
        hashed before.
        """
        groups = [
            self._threads.submit(_checksums, group) for group in _groups(parts, self._num_threads)
        ]
        hashing = Hashing(groups)
        for group in groups:
            group.add_done_callback(lambda _: on_end() if hashing.is_done else None)
        return hashing

    def stop(self) -> None:
        """Waits for what is being hashed; the rest never is."""
        self._threads.shutdown(wait=True, cancel_futures=True)


def _checksums(parts: Sequence[Sequence[Segment]]) -> list[int]:
    return [checksum(part) for part in parts]


def _groups(
    parts: Sequence[Sequence[Segment]], max_groups: int
) -> list[Sequence[Sequence[Segment]]]:
    """Neighbouring parts together, in at most `max_groups` groups of about equally many bytes."""
    sizes = [sum(num_bytes for _, num_bytes in part) for part in parts]
    aim = max(_MIN_GROUP_BYTES, -(-sum(sizes) // max_groups))
    groups: list[Sequence[Sequence[Segment]]] = []
    first, num_bytes = 0, 0
    for end, size in enumerate(sizes, start=1):
        num_bytes += size
        is_last = len(groups) == max_groups - 1
        if num_bytes >= aim and not is_last:
            groups.append(parts[first:end])
            first, num_bytes = end, 0
    if first < len(parts):
        groups.append(parts[first:])
    return groups
