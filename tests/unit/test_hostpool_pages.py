"""PageAllocator and SeatPool: ownership, contiguity and counts, as state machines and by example."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tidepool.common.errors import InvariantError
from tidepool.common.wire import PageRun
from tidepool.hostpool.pages import OwnerKind, PageAllocator, PageLease
from tidepool.hostpool.seats import SeatPool

KINDS = st.sampled_from(list(OwnerKind))
NUM_PAGES = 24


class PageOwnership(RuleBasedStateMachine):
    """The allocator against a model that keeps, for each lease, its pages and its holds."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.freed: list[int] = []
        self.allocator = PageAllocator(NUM_PAGES, on_free=self.freed.extend)
        self.pages: dict[int, list[int]] = {}
        self.holds: dict[int, list[OwnerKind]] = {}
        self.quarantined: set[int] = set()
        self.kept: list[PageLease] = []

    def num_free(self) -> int:
        return NUM_PAGES - sum(len(pages) for pages in self.pages.values())

    @rule(target=leases, n=st.integers(0, 12), kind=KINDS)
    def acquire(self, n: int, kind: OwnerKind) -> PageLease | None:
        lease = self.allocator.try_acquire(n, kind)
        assert (lease is None) == (n > self.num_free())
        if lease is not None:
            assert len(lease.pages) == n
            self.pages[id(lease)] = list(lease.pages)
            self.holds[id(lease)] = [kind]
            self.kept.append(lease)
        return lease

    @rule(lease=leases, n=st.integers(0, 6))
    def extend(self, lease: PageLease | None, n: int) -> None:
        if lease is None:
            return
        if id(lease) not in self.pages:
            with pytest.raises(InvariantError):
                self.allocator.try_extend(lease, n)
            return
        before, free = self.pages[id(lease)], self.num_free()
        assert self.allocator.try_extend(lease, n) == (n <= free)
        if n <= free:
            assert lease.pages[: len(before)] == before
            assert len(lease.pages) == len(before) + n
            self.pages[id(lease)] = list(lease.pages)
        else:
            assert lease.pages == before

    @rule(lease=leases, kind=KINDS)
    def hold(self, lease: PageLease | None, kind: OwnerKind) -> None:
        if lease is None:
            return
        holds = self.holds.get(id(lease))
        if holds is None or (kind is OwnerKind.REQUEST and kind in holds):
            with pytest.raises(InvariantError):
                lease.hold(kind)
            return
        lease.hold(kind)
        holds.append(kind)

    @rule(lease=leases, kind=KINDS)
    def release(self, lease: PageLease | None, kind: OwnerKind) -> None:
        if lease is None:
            return
        holds = self.holds.get(id(lease), [])
        if kind not in holds:
            with pytest.raises(InvariantError):
                lease.release(kind)
            return
        self.freed.clear()
        lease.release(kind)
        holds.remove(kind)
        if OwnerKind.REMOTE_WRITER not in holds:
            self.quarantined.discard(id(lease))
        if not holds:
            assert self.freed == self.pages.pop(id(lease))
            del self.holds[id(lease)]
        else:
            assert self.freed == []

    @rule(lease=consumes(leases))
    def release_everything_once_and_not_twice(self, lease: PageLease | None) -> None:
        if lease is None:
            return
        for kind in self.holds.pop(id(lease), []):
            lease.release(kind)
        self.pages.pop(id(lease), None)
        self.quarantined.discard(id(lease))
        for kind in OwnerKind:
            with pytest.raises(InvariantError):
                lease.release(kind)

    @rule(lease=leases)
    def quarantine(self, lease: PageLease | None) -> None:
        if lease is None:
            return
        if OwnerKind.REMOTE_WRITER not in self.holds.get(id(lease), []):
            with pytest.raises(InvariantError):
                lease.quarantine()
            return
        lease.quarantine()
        self.quarantined.add(id(lease))

    @invariant()
    def counts_agree_with_the_model(self) -> None:
        self.allocator.check_invariants()
        owned = [page for pages in self.pages.values() for page in pages]
        assert len(owned) == len(set(owned))
        assert self.allocator.num_free == self.num_free()
        assert self.allocator.num_held == len(owned)
        assert self.allocator.num_free + self.allocator.num_held == self.allocator.num_total
        assert self.allocator.num_quarantined == sum(
            len(self.pages[key]) for key in self.quarantined
        )
        for kind, count in self.allocator.held_by_kind.items():
            assert count == sum(
                len(pages) for key, pages in self.pages.items() if kind in self.holds[key]
            )

    @invariant()
    def runs_are_the_pages_in_order_and_merged(self) -> None:
        for lease in self.kept:
            if lease.is_released:
                continue
            assert lease.pages == [
                page for run in lease.runs for page in range(run.first, run.first + run.count)
            ]
            for left, right in zip(lease.runs, lease.runs[1:], strict=False):
                assert left.first + left.count != right.first


TestPageOwnership = PageOwnership.TestCase
TestPageOwnership.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def with_free_runs(*runs: PageRun, num_pages: int = 64) -> PageAllocator:
    """An allocator in which exactly `runs` are free."""
    allocator = PageAllocator(num_pages)
    singles = [allocator.try_acquire(1, OwnerKind.REQUEST) for _ in range(num_pages)]
    for lease in singles:
        assert lease is not None
        if any(run.first <= lease.pages[0] < run.first + run.count for run in runs):
            lease.release(OwnerKind.REQUEST)
    allocator.check_invariants()
    return allocator


def test_the_smallest_run_that_fits_is_taken() -> None:
    allocator = with_free_runs(PageRun(0, 10), PageRun(20, 4), PageRun(40, 5))
    lease = allocator.try_acquire(4, OwnerKind.REQUEST)
    assert lease is not None
    assert lease.runs == (PageRun(20, 4),)


def test_the_lowest_of_equal_runs_is_taken() -> None:
    allocator = with_free_runs(PageRun(30, 4), PageRun(3, 4))
    lease = allocator.try_acquire(3, OwnerKind.REQUEST)
    assert lease is not None
    assert lease.runs == (PageRun(3, 3),)


def test_without_a_run_that_fits_the_fewest_runs_are_taken() -> None:
    allocator = with_free_runs(PageRun(0, 3), PageRun(10, 8), PageRun(30, 2), PageRun(50, 6))
    lease = allocator.try_acquire(10, OwnerKind.REQUEST)
    assert lease is not None
    assert lease.runs == (PageRun(10, 8), PageRun(30, 2))


def test_growth_takes_the_pages_right_behind_first() -> None:
    allocator = PageAllocator(32)
    lease = allocator.try_acquire(4, OwnerKind.REQUEST)
    assert lease is not None
    assert allocator.try_extend(lease, 3)
    assert lease.runs == (PageRun(0, 7),)
    wall = allocator.try_acquire(2, OwnerKind.REQUEST)
    assert wall is not None
    assert allocator.try_extend(lease, 2)
    assert lease.runs == (PageRun(0, 7), PageRun(9, 2))


def test_a_full_pool_answers_none_and_changes_nothing() -> None:
    allocator = PageAllocator(4)
    lease = allocator.try_acquire(3, OwnerKind.REQUEST)
    assert lease is not None
    assert allocator.try_acquire(2, OwnerKind.BACKUP) is None
    assert not allocator.try_extend(lease, 2)
    assert lease.pages == [0, 1, 2]
    assert allocator.num_free == 1
    allocator.check_invariants()


def test_pages_stay_until_the_last_owner_is_gone() -> None:
    freed: list[int] = []
    allocator = PageAllocator(4, on_free=freed.extend)
    lease = allocator.try_acquire(2, OwnerKind.REQUEST)
    assert lease is not None
    lease.hold(OwnerKind.REMOTE_WRITER)
    lease.release(OwnerKind.REQUEST)
    lease.quarantine()
    assert (allocator.num_free, allocator.num_quarantined, freed) == (2, 2, [])
    lease.release(OwnerKind.REMOTE_WRITER)
    assert (allocator.num_free, allocator.num_quarantined, freed) == (4, 0, [0, 1])


def test_a_lease_of_another_pool_cannot_grow_here() -> None:
    lease = PageAllocator(4).try_acquire(1, OwnerKind.REQUEST)
    assert lease is not None
    with pytest.raises(InvariantError):
        PageAllocator(4).try_extend(lease, 1)


def test_negative_counts_are_our_own_fault() -> None:
    allocator = PageAllocator(4)
    lease = allocator.try_acquire(0, OwnerKind.REQUEST)
    assert lease is not None
    with pytest.raises(InvariantError):
        allocator.try_acquire(-1, OwnerKind.REQUEST)
    with pytest.raises(InvariantError):
        allocator.try_extend(lease, -1)
    with pytest.raises(InvariantError):
        PageAllocator(-1)


@pytest.mark.parametrize("num_pages", [1, 100_000])
def test_everything_can_be_taken_and_given_back_in_any_order(num_pages: int) -> None:
    allocator = PageAllocator(num_pages)
    leases = []
    while (
        lease := allocator.try_acquire(min(7, allocator.num_free or 1), OwnerKind.REQUEST)
    ) is not None:
        leases.append(lease)
    assert allocator.num_free == 0
    for lease in leases[::2] + leases[1::2]:
        lease.release(OwnerKind.REQUEST)
    allocator.check_invariants()
    whole = allocator.try_acquire(num_pages, OwnerKind.REQUEST)
    assert whole is not None
    assert whole.runs == (PageRun(0, num_pages),)


class SeatOwnership(RuleBasedStateMachine):
    """SeatPool against a set."""

    def __init__(self) -> None:
        super().__init__()
        self.seats = SeatPool(3)
        self.taken: set[int] = set()

    @rule()
    def acquire(self) -> None:
        seat = self.seats.try_acquire()
        assert (seat is None) == (len(self.taken) == 3)
        if seat is not None:
            assert seat not in self.taken
            self.taken.add(seat)

    @rule(seat=st.integers(-1, 3))
    def release(self, seat: int) -> None:
        if seat in self.taken:
            self.seats.release(seat)
            self.taken.remove(seat)
        else:
            with pytest.raises(InvariantError):
                self.seats.release(seat)

    @invariant()
    def counts_agree(self) -> None:
        self.seats.check_invariants()
        assert (self.seats.num_free, self.seats.num_taken) == (3 - len(self.taken), len(self.taken))


TestSeatOwnership = SeatOwnership.TestCase
TestSeatOwnership.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
