"""Free pages as maximal contiguous runs, found by size and by position.

Owned by one PageAllocator, used on its thread. Always true: runs do not touch or overlap (two
neighbours are merged at once), and a page marked free is in exactly one run.

Costs, with R free runs: taking or returning a run is one bisect in a list of R entries plus a
memset of the pages' marks; no operation walks all pages.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from ..common.errors import InvariantError
from ..common.wire import PageRun


class FreeRuns:
    """The free part of [0, num_pages)."""

    def __init__(self, num_pages: int) -> None:
        self._is_free = bytearray(num_pages)
        self._count_at: dict[int, int] = {}
        """First page of a run -> its length."""
        self._first_before: dict[int, int] = {}
        """First page behind a run -> the run's first page."""
        self._by_size: list[tuple[int, int]] = []
        """(length, first page), ascending."""
        self.num_free = 0
        if num_pages:
            self.put(PageRun(0, num_pages))

    def take(self, num_pages: int) -> list[PageRun]:
        """Takes `num_pages` pages, of which the caller knows that they are free.

        The smallest single run that is long enough (lowest page on ties); if there is none, the
        fewest runs: longest first, and the last piece again from the smallest run that fits.
        """
        taken: list[PageRun] = []
        while num_pages:
            at = bisect_left(self._by_size, (num_pages, -1))
            if at == len(self._by_size):
                at = bisect_left(self._by_size, (self._by_size[-1][0], -1))
            length, first = self._by_size[at]
            count = min(length, num_pages)
            taken.append(self._cut(first, count))
            num_pages -= count
        return taken

    def take_at(self, first: int, max_pages: int) -> list[PageRun]:
        """Takes up to `max_pages` pages that start exactly at `first`; [] if that page is held.

        Only the front of a run can be taken: the page behind a held page is always a front.
        """
        count = min(self._count_at.get(first, 0), max_pages)
        return [self._cut(first, count)] if count > 0 else []

    def take_exactly(self, run: PageRun) -> bool:
        """Takes just these pages; False, with nothing changed, unless all are free.

        Walks the free runs: for a node's start.
        """
        end = run.first + run.count
        for first, count in self._count_at.items():
            if first <= run.first and end <= first + count and run.count > 0:
                break
        else:
            return False
        self._remove(first)
        if first < run.first:
            self._insert(first, run.first - first)
        if end < first + count:
            self._insert(end, first + count - end)
        self._is_free[run.first : end] = bytes(run.count)
        self.num_free -= run.count
        return True

    def put(self, run: PageRun) -> None:
        """Gives a run back and merges it with its neighbours."""
        end = run.first + run.count
        if run.first < 0 or end > len(self._is_free):
            raise InvariantError(f"pages [{run.first}, {end}) are not in [0, {len(self._is_free)})")
        if self._is_free.find(1, run.first, end) >= 0:
            raise InvariantError(f"pages [{run.first}, {end}) hold a page that is free already")
        self._is_free[run.first : end] = b"\x01" * run.count
        self.num_free += run.count
        first = run.first
        if first in self._first_before:
            first = self._first_before[first]
            self._remove(first)
        if end in self._count_at:
            end += self._remove(end)
        self._insert(first, end - first)

    def is_free(self, page: int) -> bool:
        return self._is_free[page] == 1

    def check_invariants(self) -> None:
        """Raises InvariantError unless runs, sizes and marks describe the same set of pages."""
        marks = bytearray(len(self._is_free))
        previous_end = -1
        for first, count in sorted(self._count_at.items()):
            if first <= previous_end or count < 1:
                raise InvariantError(f"free run {first}+{count} touches or overlaps the one before")
            previous_end = first + count
            marks[first:previous_end] = b"\x01" * count
            if self._first_before.get(previous_end) != first:
                raise InvariantError(f"free run {first}+{count} is not found by its end")
        if marks != self._is_free or self.num_free != marks.count(1):
            raise InvariantError("free runs and free marks differ")
        sizes = sorted((count, first) for first, count in self._count_at.items())
        if sizes != self._by_size or len(self._first_before) != len(self._count_at):
            raise InvariantError("free runs and their size index differ")

    def _cut(self, first: int, count: int) -> PageRun:
        length = self._remove(first)
        if count < length:
            self._insert(first + count, length - count)
        self._is_free[first : first + count] = bytes(count)
        self.num_free -= count
        return PageRun(first, count)

    def _insert(self, first: int, count: int) -> None:
        self._count_at[first] = count
        self._first_before[first + count] = first
        insort(self._by_size, (count, first))

    def _remove(self, first: int) -> int:
        count = self._count_at.pop(first)
        del self._first_before[first + count]
        del self._by_size[bisect_left(self._by_size, (count, first))]
        return count
