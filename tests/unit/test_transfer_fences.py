"""The forced fence between the two ends of a hand-off, one situation a test (helpers.handoff_world)."""

from __future__ import annotations

import pytest
from helpers.handoff_world import World

from tidepool.transfer.events import Key
from tidepool.transfer.transport import TicketStatus


def granted(num_pages: int = 4) -> tuple[World, Key]:
    world = World()
    world.session_up("p")
    key = world.offer(num_pages)
    assert key is not None
    settle_messages(world)
    return world, key


def settle_messages(world: World) -> None:
    for _ in range(4):
        while world.undecided:
            world.decide(0, "grant")
        while world.wire:
            world.deliver(0)
        while world.d.mover.verifies:
            world.verify(0)


def committed() -> tuple[World, Key]:
    world, key = granted()
    world.give_pages(key, 4)
    world.end_write(0, TicketStatus.DONE)
    world.commit(key)
    return world, key


def test_a_fence_frees_both_sides_of_a_write_of_unknown_outcome() -> None:
    world, key = granted()
    world.give_pages(key, 4)
    world.end_write(0, TicketStatus.FAILED_UNKNOWN)
    settle_messages(world)
    assert world.quarantined_source
    assert world.d.handler.num_leases == 1
    world.fence_data()
    settle_messages(world)
    assert not world.quarantined_source
    assert world.d.handler.num_leases == world.p.handler.num_transfers == 0
    world.land_late(0)
    assert world.jobs[key]["log"] == ["ExportGranted", "ExportFailed", "ExportReleased"]


def test_a_write_that_ends_unknown_after_the_fence_is_no_reason_for_quarantine() -> None:
    world, key = granted()
    world.give_pages(key, 4)
    world.session_down("p")
    world.fence_data(is_noticed=False)
    assert world.p.mover.writes
    while world.p.mover.writes:
        world.end_write(0, TicketStatus.FAILED_UNKNOWN)
    settle_messages(world)
    assert not world.quarantined_source
    assert world.p.handler.num_transfers == 0
    assert world.jobs[key]["log"][-1] == "ExportReleased"


def test_a_request_that_was_ready_when_its_lease_was_fenced_is_handed_over() -> None:
    world, key = committed()
    while world.wire:
        world.deliver(0)
    while world.d.mover.verifies:
        world.verify(0)
    world.fence_data()  # its CommitAck is lost with the session
    (lease,) = world.leases.values()
    assert (lease.outcome, lease.is_open) == ("ready", False)
    settle_messages(world)
    assert world.jobs[key]["log"] == ["ExportGranted", "ExportDone", "ExportReleased"]
    assert world.p.handler.num_transfers == 0


def test_a_request_that_was_not_ready_hears_so_at_once() -> None:
    world, key = committed()
    world.wire.clear()
    world.fence_data()
    settle_messages(world)
    assert world.jobs[key]["log"] == ["ExportGranted", "ExportFailed", "ExportReleased"]
    assert world.p.handler.num_transfers == 0


@pytest.mark.parametrize("is_proven", [False, True])
def test_a_replaced_writers_leases_are_fenced_unless_its_death_is_proven_in_time(
    is_proven: bool,
) -> None:
    world, _ = granted()
    asked: list[str] = []
    world.d.handler._end_reach = asked.append
    old = world.p
    world.session_down("d")
    world.start("p")
    world.p.handler.cancel(("r1", 0), "the new process knows nothing")
    world.session_up("d")
    world.tick(1.0)
    assert not asked
    (lease,) = world.leases.values()
    assert lease.is_open
    if is_proven:
        world.fence("p", old.peer.epoch)
        assert not lease.is_open
    world.tick(1.0)
    world.tick(1.0)
    assert bool(asked) is not is_proven
    world.fence_data()
    assert not lease.is_open
    world.tick(1.0)
    assert len(asked) <= 2


def test_the_address_of_a_peer_that_is_replaced_moved_or_fenced_is_abandoned_once() -> None:
    world = World()
    abandoned = world.p.mover.abandoned
    world.session_up("p")
    first = world.d.peer.hello.data_address
    world.session_down("d")
    world.session_up("p")
    assert abandoned == [], "the same incarnation at the same address is alive"
    world.fence_data()
    second = world.d.peer.hello.data_address
    assert abandoned == [first]
    world.restart("d")
    world.session_up("p")
    third = world.d.peer.hello.data_address
    assert abandoned == [first, second]
    epoch = world.d.peer.epoch
    for _ in range(2):
        world.p.handler.fence("d", epoch)
        world.flush(world.p)
    world.p.control.run()
    assert abandoned == [first, second, third]
