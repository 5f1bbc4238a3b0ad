"""Both ends of the hand-off under a bad network, bad memory and restarts (Hypothesis).

Properties, asserted by helpers.handoff_world: no write lands in a page after its lease ended; a
request that is ready holds its own bytes; every request ends once on each side; source pages are
released once; when all is quiet nothing is held but what a write of unknown outcome holds, and
fencing its writer frees that too.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from helpers.handoff_world import NUM_SOURCE_PAGES, NUM_TARGET_PAGES, World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tidepool.transfer.transport import TicketStatus

PICK = st.integers(0, 1000)
RARELY = st.sampled_from([False] * 5 + [True])
SIDE = st.sampled_from(["p", "d"])


def finish(world: World) -> None:
    """The network heals, everything ends; then prefill is fenced, and nothing is held any more."""
    world.settle()
    ends = [job["log"] for job in world.jobs.values()]
    assert all(log.count("ExportReleased") == 1 for log in ends), ends
    if not world.num_unknown:
        assert len(world.free_source) == NUM_SOURCE_PAGES
        assert len(world.free_target) == NUM_TARGET_PAGES, world.leases
        assert world.p.handler.num_transfers == 0
    while world.late_writes:
        world.land_late(0)
    world.fence("p", world.epochs["p"])
    assert len(world.free_target) == NUM_TARGET_PAGES, world.leases
    assert world.d.handler.num_leases == 0
    assert all(lease.outcome for lease in world.leases.values())


class Handoffs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(num_layers=2)
        self.world.session_up("p")

    @rule(num_pages=st.integers(1, 6))
    def offer(self, num_pages: int) -> None:
        self.world.offer(num_pages)

    @precondition(lambda self: self.world.undecided)
    @rule(pick=PICK, answer=st.sampled_from(["grant", "grant", "grant", "defer", "refuse"]))
    def decide(self, pick: int, answer: str) -> None:
        self.world.decide(pick % len(self.world.undecided), answer)

    @precondition(lambda self: self.world.jobs)
    @rule(pick=PICK, count=st.integers(1, 4))
    def give_pages(self, pick: int, count: int) -> None:
        self.world.give_pages(self.pick_job(pick), count)

    @precondition(lambda self: self.world.jobs)
    @rule(pick=PICK)
    def give_rest_and_commit(self, pick: int) -> None:
        key = self.pick_job(pick)
        self.world.give_pages(key, 99)
        self.world.commit(key)

    @precondition(lambda self: self.world.jobs)
    @rule(pick=PICK, now=RARELY)
    def cancel_export(self, pick: int, now: bool) -> None:
        if now:
            self.world.cancel_export(self.pick_job(pick))

    @precondition(lambda self: self.world.leases)
    @rule(pick=PICK, now=RARELY)
    def cancel_import(self, pick: int, now: bool) -> None:
        leases = list(self.world.leases.values())
        if now:
            self.world.cancel_import(leases[pick % len(leases)].key)

    @precondition(lambda self: self.world.wire)
    @rule(pick=PICK, keep=st.booleans())
    def deliver(self, pick: int, keep: bool) -> None:
        self.world.deliver(pick % len(self.world.wire), keep=keep)

    @precondition(lambda self: self.world.wire)
    @rule()
    def deliver_all(self) -> None:
        for _ in range(min(20, len(self.world.wire))):
            self.world.deliver(0)

    @precondition(lambda self: self.world.wire)
    @rule(pick=PICK)
    def lose(self, pick: int) -> None:
        del self.world.wire[pick % len(self.world.wire)]

    @precondition(lambda self: self.world.p.mover.writes)
    @rule(
        pick=PICK,
        status=st.sampled_from(
            [TicketStatus.DONE] * 4 + [TicketStatus.FAILED_DRAINED, TicketStatus.FAILED_UNKNOWN]
        ),
        is_bad=st.sampled_from([False, False, False, True]),
    )
    def end_write(self, pick: int, status: TicketStatus, is_bad: bool) -> None:
        self.world.end_write(pick % len(self.world.p.mover.writes), status, is_bad=is_bad)

    @precondition(lambda self: self.world.late_writes)
    @rule(pick=PICK)
    def land_late(self, pick: int) -> None:
        self.world.land_late(pick % len(self.world.late_writes))

    @precondition(lambda self: self.world.d.mover.verifies)
    @rule(pick=PICK)
    def verify(self, pick: int) -> None:
        self.world.verify(pick % len(self.world.d.mover.verifies))

    @rule(seconds=st.sampled_from([0.3, 1.0, 1.0, 5.0]))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(now=RARELY)
    def pass_the_deadline(self, now: bool) -> None:
        if now:
            self.world.tick(70.0)

    @rule(num_writes=st.integers(0, 3))
    def go_on(self, num_writes: int) -> None:
        """A stretch without faults, so that transfers get far enough for faults to matter."""
        world = self.world
        while world.undecided:
            world.decide(0, "grant")
        for _ in range(min(num_writes, len(world.p.mover.writes))):
            world.end_write(0, TicketStatus.DONE)
        for _ in range(min(30, len(world.wire))):
            world.deliver(0)
        while world.d.mover.verifies:
            world.verify(0)

    @rule(first=SIDE, now=RARELY)
    def session_down(self, first: str, now: bool) -> None:
        if now:
            self.world.session_down(first)

    @precondition(lambda self: not (self.world.p.is_up and self.world.d.is_up))
    @rule(first=SIDE)
    def session_up(self, first: str) -> None:
        self.world.session_up(first)

    @rule(name=SIDE, first=SIDE, now=RARELY)
    def restart(self, name: str, first: str, now: bool) -> None:
        if now:
            self.world.restart(name)
            self.world.session_up(first)

    @rule(now=RARELY, is_noticed=st.booleans())
    def fence_data(self, now: bool, is_noticed: bool) -> None:
        if now:
            self.world.fence_data(is_noticed=is_noticed)

    @invariant()
    def ledgers_hold(self) -> None:
        self.world.check()

    def pick_job(self, pick: int) -> tuple[str, int]:
        keys = list(self.world.jobs)
        return keys[pick % len(keys)]

    def teardown(self) -> None:
        finish(self.world)


Handoffs.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestHandoffsUnderFaults = Handoffs.TestCase


WEIGHTS = {
    "offer": 6,
    "decide": 10,
    "give": 12,
    "finish_prompt": 6,
    "deliver": 40,
    "deliver_any": 12,
    "duplicate": 8,
    "lose": 3,
    "write_done": 16,
    "write_bad": 3,
    "write_drained": 0.4,
    "write_unknown": 0.6,
    "land_late": 2,
    "verify": 14,
    "tick": 10,
    "deadline": 0.05,
    "cancel_export": 0.5,
    "cancel_import": 0.5,
    "down": 0.4,
    "up": 3,
    "restart": 0.1,
    "fence_data": 0.3,
}


def walk_once(world: World, rng: random.Random, what: str) -> None:  # noqa: PLR0912
    """One random step; steps that make no sense now do nothing."""
    writes, pages = world.p.mover.writes, rng.randint(1, 4)
    keys = list(world.jobs)[-6:]
    key = rng.choice(keys) if keys else None
    side = rng.choice("pd")
    if what == "offer":
        world.offer(pages)
    elif what == "decide" and world.undecided:
        answers = ["grant"] * 8 + ["defer", "refuse"]
        world.decide(rng.randrange(len(world.undecided)), rng.choice(answers))
    elif what == "give" and key:
        world.give_pages(key, pages)
    elif what == "finish_prompt" and key:
        world.give_pages(key, 99)
        world.commit(key)
    elif what == "deliver" and world.wire:
        world.deliver(0)
    elif what in ("deliver_any", "duplicate") and world.wire:
        world.deliver(rng.randrange(len(world.wire)), keep=what == "duplicate")
    elif what == "lose" and world.wire:
        del world.wire[rng.randrange(len(world.wire))]
    elif what.startswith("write_") and writes:
        ends = {
            "write_drained": TicketStatus.FAILED_DRAINED,
            "write_unknown": TicketStatus.FAILED_UNKNOWN,
        }
        status = ends.get(what, TicketStatus.DONE)
        world.end_write(rng.randrange(len(writes)), status, is_bad=what == "write_bad")
    elif what == "land_late" and world.late_writes:
        world.land_late(rng.randrange(len(world.late_writes)))
    elif what == "verify" and world.d.mover.verifies:
        world.verify(rng.randrange(len(world.d.mover.verifies)))
    elif what in ("tick", "deadline"):
        world.tick(70.0 if what == "deadline" else rng.choice([0.3, 1.1]))
    elif what == "cancel_export" and key:
        world.cancel_export(key)
    elif what == "cancel_import" and key:
        world.cancel_import(key)
    elif what == "down":
        world.session_down(side)
    elif what == "up":
        world.session_up(side)
    elif what == "fence_data":
        world.fence_data(is_noticed=rng.random() < 0.5)
    elif what == "restart":
        world.restart(side)
        world.session_up(side)


def walk(seed: int, num_steps: int) -> Counter[str]:
    """A weighted random walk; returns how often each end was reached."""
    rng = random.Random(seed)
    world = World(num_layers=1 + seed % 2)
    world.session_up("p")
    tally: Counter[str] = Counter()
    for what in rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=num_steps):
        walk_once(world, rng, what)
        world.check()
    finish(world)
    tally.update(lease.outcome for lease in world.leases.values())
    tally.update(kind for job in world.jobs.values() for kind in job["log"])
    tally["unknown"] += world.num_unknown
    return tally


@pytest.mark.parametrize("block", range(8))
def test_long_random_walks_keep_every_property(block: int) -> None:
    tally: Counter[str] = Counter()
    for seed in range(60):
        tally += walk(block * 1000 + seed, 600)
    # The walks are worth something only if they get everywhere.
    assert min(tally[end] for end in ("ready", "failed", "ExportDone", "ExportFailed")) > 20, tally
    assert tally["unknown"] > 0
