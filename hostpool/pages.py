"""Who owns which page. One allocator a pool; a page is free or belongs to exactly one lease.

A lease is a list of pages with one or more *holds*, counted by kind:

| kind          | at most | taken by                                             | ends                        |
|---------------|---------|------------------------------------------------------|-----------------------------|
| REQUEST       | one     | admission, for the life of the request on this node  | release_req                 |
| REMOTE_WRITER | any     | the transfer: a peer may write (or a NIC may read)   | Drained, or the epoch fence |
| BACKUP        | any     | a copy in flight on a stream                         | its event                   |
| PREFIX_CACHE  | any     | a cache that wants to serve the pages again          | eviction                    |

The pages go back when the last hold ends, never by a timer. A hold covers all pages of its lease,
those it grows by later included. A node's step thread owns the allocator; nothing here locks.
Always true: free + held == total, and no page is in two leases. Full is not an error: None or
False, and nothing has changed.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Sequence

from ..common.errors import InvariantError
from ..common.wire import PageRun
from .free_runs import FreeRuns


class OwnerKind(enum.Enum):
    """Why a page is not free."""

    REQUEST = "request"
    REMOTE_WRITER = "remote_writer"
    BACKUP = "backup"
    PREFIX_CACHE = "prefix_cache"


class PageLease:
    """Pages in the order of the sequence they hold, and the holds that keep them.

    Made by PageAllocator only. Attributes (read only for others):
        runs: the pages as contiguous runs, in order, neighbours merged.
        is_quarantined: the remote writer's hold is one that may still write though nobody wants it.
    """

    __slots__ = ("_allocator", "_holds", "_pages", "is_quarantined", "runs")

    def __init__(
        self, allocator: PageAllocator, runs: tuple[PageRun, ...], kind: OwnerKind
    ) -> None:
        self._allocator = allocator
        self._holds: Counter[OwnerKind] = Counter({kind: 1})
        self._pages: list[int] | None = None
        self.runs = runs
        self.is_quarantined = False

    @property
    def pages(self) -> list[int]:
        """Page ids in order. The list is cached: read it, do not change it."""
        if self._pages is None:
            self._pages = [
                page for run in self.runs for page in range(run.first, run.first + run.count)
            ]
        return self._pages

    @property
    def num_pages(self) -> int:
        return sum(run.count for run in self.runs)

    @property
    def is_released(self) -> bool:
        """No hold is left: the pages belong to somebody else, or to nobody."""
        return not self._holds

    @property
    def kinds(self) -> frozenset[OwnerKind]:
        return frozenset(self._holds)

    def num_holds(self, kind: OwnerKind) -> int:
        return self._holds[kind]

    def hold(self, kind: OwnerKind) -> None:
        """Adds an owner. InvariantError if the lease has ended, or for a second REQUEST."""
        if self.is_released:
            raise InvariantError(f"hold({kind.value}) on a lease that has ended")
        if kind is OwnerKind.REQUEST and self._holds[kind]:
            raise InvariantError("pages of a lease cannot belong to two requests")
        self._holds[kind] += 1
        if self._holds[kind] == 1:
            self._allocator._count_held(kind, self.num_pages)

    def release(self, kind: OwnerKind) -> None:
        """Ends one hold of `kind`; with the last hold the pages are free. InvariantError if none."""
        if not self._holds[kind]:
            raise InvariantError(f"release({kind.value}) without a hold of that kind")
        self._holds[kind] -= 1
        if self._holds[kind]:
            return
        del self._holds[kind]
        self._allocator._count_held(kind, -self.num_pages)
        if kind is OwnerKind.REMOTE_WRITER and self.is_quarantined:
            self.is_quarantined = False
            self._allocator._count_quarantined(-self.num_pages)
        if self.is_released:
            self._allocator._free(self)

    def quarantine(self) -> None:
        """Marks the remote writer's hold: bytes may still land. Ends with that hold's release."""
        if not self._holds[OwnerKind.REMOTE_WRITER]:
            raise InvariantError("quarantine() on a lease without a remote writer")
        if not self.is_quarantined:
            self.is_quarantined = True
            self._allocator._count_quarantined(self.num_pages)


class PageAllocator:
    """Pages [0, num_pages). `on_free(pages)` runs when pages become free (tests poison there)."""

    def __init__(self, num_pages: int, on_free: Callable[[list[int]], None] | None = None) -> None:
        if num_pages < 0:
            raise InvariantError(f"a pool cannot have {num_pages} pages")
        self._free_runs = FreeRuns(num_pages)
        self._leases: dict[int, PageLease] = {}
        self._held: Counter[OwnerKind] = Counter()
        self.num_total = num_pages
        self.num_held = 0
        self.num_quarantined = 0
        self.on_free = on_free

    @property
    def num_free(self) -> int:
        return self._free_runs.num_free

    @property
    def held_by_kind(self) -> dict[OwnerKind, int]:
        """Pages held by each kind; a page with owners of two kinds counts in both."""
        return {kind: self._held[kind] for kind in OwnerKind}

    def try_acquire(self, num_pages: int, kind: OwnerKind) -> PageLease | None:
        """A lease of `num_pages` pages with one hold of `kind`; None if so many are not free."""
        if num_pages < 0:
            raise InvariantError(f"cannot acquire {num_pages} pages")
        if num_pages > self.num_free:
            return None
        return self._lease(self._free_runs.take(num_pages), kind)

    def try_acquire_exactly(self, runs: Sequence[PageRun], kind: OwnerKind) -> PageLease | None:
        """A lease of just these pages, in this order; None unless each is free, and named once.

        For pages whose bytes outlived the process that had them leased.
        """
        taken: list[PageRun] = []
        for run in runs:
            if not self._free_runs.take_exactly(run):
                for each in taken:
                    self._free_runs.put(each)
                return None
            taken.append(run)
        return self._lease(taken, kind)

    def try_extend(self, lease: PageLease, num_pages: int) -> bool:
        """Grows a live lease: first by the pages right behind its last one, then as try_acquire."""
        if self._leases.get(id(lease)) is not lease:
            raise InvariantError("try_extend of a lease that has ended or is another pool's")
        if num_pages < 0:
            raise InvariantError(f"cannot extend by {num_pages} pages")
        if num_pages > self.num_free:
            return False
        added: list[PageRun] = []
        if lease.runs:
            last = lease.runs[-1]
            added = self._free_runs.take_at(last.first + last.count, num_pages)
        added += self._free_runs.take(num_pages - sum(run.count for run in added))
        lease.runs = _merged(list(lease.runs), added)
        lease._pages = None
        self.num_held += num_pages
        for kind in lease.kinds:
            self._held[kind] += num_pages
        if lease.is_quarantined:
            self.num_quarantined += num_pages
        return True

    def check_invariants(self) -> None:
        """Raises InvariantError unless every page is free or in one lease and all counts agree."""
        self._free_runs.check_invariants()
        owned: set[int] = set()
        held: Counter[OwnerKind] = Counter()
        num_quarantined = 0
        for lease in self._leases.values():
            if lease.is_released or lease.num_pages != len(lease.pages):
                raise InvariantError("a lease without holds, or with other pages than its runs")
            if not owned.isdisjoint(lease.pages):
                raise InvariantError("a page is in two leases")
            owned.update(lease.pages)
            for kind in lease.kinds:
                held[kind] += lease.num_pages
            num_quarantined += lease.num_pages if lease.is_quarantined else 0
        if any(self._free_runs.is_free(page) for page in owned):
            raise InvariantError("a page is free and in a lease")
        if len(owned) != self.num_held or self.num_free + self.num_held != self.num_total:
            raise InvariantError(
                f"{self.num_free} free + {self.num_held} held ({len(owned)} in leases) "
                f"are not {self.num_total} pages"
            )
        if +held != +self._held or num_quarantined != self.num_quarantined:
            raise InvariantError(f"counts by kind {dict(self._held)} are not {dict(held)}")

    def _lease(self, runs: list[PageRun], kind: OwnerKind) -> PageLease:
        lease = PageLease(self, _merged([], runs), kind)
        self._leases[id(lease)] = lease
        self.num_held += lease.num_pages
        self._held[kind] += lease.num_pages
        return lease

    def _free(self, lease: PageLease) -> None:
        if self._leases.pop(id(lease), None) is not lease:
            raise InvariantError("a lease was freed twice")
        self.num_held -= lease.num_pages
        if self.on_free is not None:
            self.on_free(lease.pages)
        for run in lease.runs:
            self._free_runs.put(run)

    def _count_held(self, kind: OwnerKind, num_pages: int) -> None:
        self._held[kind] += num_pages

    def _count_quarantined(self, num_pages: int) -> None:
        self.num_quarantined += num_pages


def _merged(runs: list[PageRun], added: list[PageRun]) -> tuple[PageRun, ...]:
    """`runs` followed by `added`, with neighbours that continue each other made one."""
    for run in added:
        if runs and runs[-1].first + runs[-1].count == run.first:
            runs[-1] = PageRun(runs[-1].first, runs[-1].count + run.count)
        else:
            runs.append(run)
    return tuple(runs)
