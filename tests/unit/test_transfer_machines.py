"""The two state machines and their two ends, one situation a test (helpers.handoff_world)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import pytest
from helpers.handoff_world import CONFIG, TOKEN, World

from tidepool.common import wire
from tidepool.common.clock import FakeClock
from tidepool.common.errors import InvariantError, ProtocolError
from tidepool.transfer import inbound, outbound
from tidepool.transfer.events import ExportRequest, Key
from tidepool.transfer.inbound import Inbound, InboundState
from tidepool.transfer.outbound import Outbound, OutboundState
from tidepool.transfer.pages import LayerSpan
from tidepool.transfer.transport import TicketStatus

REQUEST = ExportRequest("r", 0, 2, wire.Sampling(max_tokens=1), "f", "d", "tcp://d")
ALL = (LayerSpan(0, 2),)
GRANT = wire.Grant("r", 0, 9, (wire.PageRun(0, 2),), ())


def make_outbound() -> Outbound:
    return Outbound(REQUEST, CONFIG, FakeClock())


def make_inbound() -> Inbound:
    return Inbound(GRANT, 2, 2, True, CONFIG, FakeClock())


def blank(event: type) -> Any:
    """An event without content: what is refused must be refused by its kind alone."""
    if issubclass(event, wire.Message):
        return event(*[None] * len(event.__struct_fields__))
    return event.__new__(event)


def missing(states: Iterable[Any], module: Any) -> list[tuple[Any, type]]:
    """The pairs of state and event that are not in the module's table."""
    events = get_args(module.Event)
    assert {event for _, event in module._TRANSITIONS} == set(events)
    return [
        (state, event)
        for state in states
        for event in events
        if (state, event) not in module._TRANSITIONS
    ]


@pytest.mark.parametrize("state, event", missing(OutboundState, outbound), ids=str)
def test_what_prefills_table_lacks_is_refused_and_changes_nothing(
    state: OutboundState, event: type
) -> None:
    machine = make_outbound()
    machine.state = state
    expected = ProtocolError if issubclass(event, wire.Message) else InvariantError
    with pytest.raises(expected, match=state.value):
        machine.advance(blank(event))
    assert machine.state is state


@pytest.mark.parametrize("state, event", missing(InboundState, inbound), ids=str)
def test_what_decodes_table_lacks_is_refused_and_changes_nothing(
    state: InboundState, event: type
) -> None:
    machine = make_inbound()
    machine.state = state
    expected = ProtocolError if issubclass(event, wire.Message) else InvariantError
    with pytest.raises(expected, match=state.value):
        machine.advance(blank(event))
    assert machine.state is state


def test_no_timer_of_decode_ends_a_lease() -> None:
    for state in InboundState:
        handle = inbound._TRANSITIONS.get((state, inbound.LeaseTick))
        assert handle in (None, Inbound._on_tick)
    machine = make_inbound()
    machine.advance(inbound.WriterDown("gone"))
    for _ in range(100):
        machine.clock.advance(1000)  # type: ignore[attr-defined]
        machine.advance(inbound.LeaseTick())
    assert machine.state is InboundState.FAILED


@pytest.mark.parametrize(
    "retry_after_s, wait_s",
    [(0.05, 0.05), (7.0, 7.0), (-1.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1e9, 1.0)],
)
def test_a_deferred_offer_is_made_again_after_the_time_named_if_it_makes_sense(
    retry_after_s: float, wait_s: float
) -> None:
    machine = make_outbound()
    machine.advance(outbound.PeerUp())
    machine.advance(wire.Defer("r", 0, retry_after_s))
    machine.clock.advance(wait_s - 0.01)  # type: ignore[attr-defined]
    assert not machine.advance(outbound.Tick())
    machine.clock.advance(0.02)  # type: ignore[attr-defined]
    assert [type(each) for each in machine.advance(outbound.Tick())] == [outbound.Send]


def test_pages_out_of_order_are_our_own_fault() -> None:
    machine = make_outbound()
    machine.advance(outbound.PagesReady(0, (1,), ALL))
    with pytest.raises(InvariantError, match="after 1 pages"):
        machine.advance(outbound.PagesReady(0, (1,), ALL))


def test_pages_after_the_commit_are_our_own_fault() -> None:
    machine = make_outbound()
    machine.advance(outbound.PagesReady(0, (1,), ALL))
    machine.advance(outbound.CommitReady(TOKEN, ()))
    with pytest.raises(InvariantError, match="the commit"):
        machine.advance(outbound.PagesReady(1, (2,), ALL))


def test_a_commit_without_pages_is_our_own_fault() -> None:
    with pytest.raises(InvariantError, match="without pages"):
        make_outbound().advance(outbound.CommitReady(TOKEN, ()))


def chunk(**changes: Any) -> wire.Chunk:
    plain: dict[str, Any] = {
        "lease_id": 9,
        "sequence": 0,
        "tries": 1,
        "first_page": 0,
        "num_pages": 2,
        "first_layer": 0,
        "num_layers": 2,
        "checksums": (1, 2),
    }
    return wire.Chunk(**{**plain, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"first_page": -1},
        {"first_page": 1},
        {"num_pages": 0},
        {"num_pages": 3},
        {"sequence": -1},
        {"sequence": 4},
        {"first_layer": -1},
        {"first_layer": 1},
        {"num_layers": 0},
        {"num_layers": 3},
        {"num_layers": 1},
        {"tries": 0},
        {"checksums": ()},
        {"checksums": (1,)},
        {"checksums": (1, 2, 3)},
        {"first_page": 2**63},
    ],
)
def test_a_chunk_that_cannot_belong_to_the_lease_is_refused(changes: dict[str, Any]) -> None:
    machine = make_inbound()
    with pytest.raises(ProtocolError):
        machine.advance(chunk(**changes))
    assert not machine.arrivals


def test_chunks_that_leave_a_page_out_never_make_a_request_ready() -> None:
    machine = make_inbound()
    machine.advance(chunk(num_pages=1))
    machine.advance(inbound.Verified(0, 1, True))
    actions = machine.advance(wire.Commit(9, 1, TOKEN, ()))
    assert machine.state is InboundState.FAILED
    assert any(isinstance(each, inbound.Reply) for each in actions)


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 2, 0, 1)],
        [(0, 2, 1, 1), (0, 2, 0, 1)],
        [(0, 2, 0, 1), (0, 1, 1, 1), (1, 1, 1, 1)],
        [(0, 2, 0, 1), (0, 2, 0, 2)],
        [(0, 1, 0, 2), (1, 1, 0, 1)],
    ],
)
def test_layers_that_are_left_out_or_disagree_never_make_a_request_ready(
    pieces: list[tuple[int, int, int, int]],
) -> None:
    machine = make_inbound()
    for sequence, (first_page, num_pages, first_layer, num_layers) in enumerate(pieces):
        machine.advance(
            chunk(
                sequence=sequence,
                first_page=first_page,
                num_pages=num_pages,
                first_layer=first_layer,
                num_layers=num_layers,
                checksums=(1,) * num_layers,
            )
        )
        machine.advance(inbound.Verified(sequence, 1, True))
    machine.advance(wire.Commit(9, len(pieces), TOKEN, ()))
    assert machine.state is InboundState.FAILED


def test_pages_that_arrive_layer_by_layer_make_a_request_ready() -> None:
    machine = make_inbound()
    pieces = [(0, 1, 0, 2), (1, 1, 0, 1), (1, 1, 1, 1)]
    for sequence, (first_page, num_pages, first_layer, num_layers) in enumerate(pieces):
        machine.advance(
            chunk(
                sequence=sequence,
                first_page=first_page,
                num_pages=num_pages,
                first_layer=first_layer,
                num_layers=num_layers,
                checksums=(1,) * num_layers,
            )
        )
        machine.advance(inbound.Verified(sequence, 1, True))
    machine.advance(wire.Commit(9, len(pieces), TOKEN, ()))
    assert machine.state is InboundState.READY


def test_a_chunk_twice_under_two_numbers_never_makes_a_request_ready() -> None:
    machine = make_inbound()
    for sequence in (0, 1):
        machine.advance(chunk(sequence=sequence))
        machine.advance(inbound.Verified(sequence, 1, True))
    machine.advance(wire.Commit(9, 2, TOKEN, ()))
    assert machine.state is InboundState.FAILED


def test_two_different_commits_are_refused() -> None:
    machine = make_inbound()
    machine.advance(wire.Commit(9, 1, TOKEN, ()))
    with pytest.raises(ProtocolError, match="two different commits"):
        machine.advance(wire.Commit(9, 1, wire.OutputToken(1), ()))


# ---- both ends ----


def pump(world: World, num_rounds: int = 3) -> None:
    """Delivers and verifies everything, and answers offers; writes are left to the test."""
    for _ in range(num_rounds):
        while world.undecided:
            world.decide(0, "grant")
        while world.wire:
            world.deliver(0)
        while world.d.mover.verifies:
            world.verify(0)


def granted(num_pages: int = 4) -> tuple[World, Key]:
    world = World()
    world.session_up("p")
    key = world.offer(num_pages)
    assert key is not None
    pump(world)
    return world, key


def log_of(world: World, key: Key) -> list[str]:
    log: list[str] = world.jobs[key]["log"]
    return log


def test_chunks_are_written_while_the_next_one_computes() -> None:
    world, key = granted()
    world.give_pages(key, 2)
    assert len(world.p.mover.writes) == 1
    world.end_write(0, TicketStatus.DONE)
    assert [type(message) for _, _, message in world.wire] == [wire.Chunk]
    world.give_pages(key, 2)
    world.commit(key)
    assert not any(isinstance(message, wire.Commit) for _, _, message in world.wire)
    world.end_write(0, TicketStatus.DONE)
    kinds = [type(message) for _, _, message in world.wire]
    assert kinds == [wire.Chunk, wire.Chunk, wire.Commit], "Commit follows right behind"
    pump(world)
    assert log_of(world, key) == ["ExportGranted", "ExportDone", "ExportReleased"]
    assert world.d.handler.num_leases == world.p.handler.num_transfers == 0


def test_pages_ready_before_the_grant_are_written_after_it() -> None:
    world = World()
    world.session_up("p")
    key = world.offer(3)
    assert key is not None
    world.give_pages(key, 3)
    world.commit(key)
    assert not world.p.mover.writes
    pump(world)
    world.end_write(0, TicketStatus.DONE)
    pump(world)
    assert log_of(world, key)[-2:] == ["ExportDone", "ExportReleased"]


STAGES = ["offered", "granted", "writing", "sent", "committed"]


def reach(stage: str) -> tuple[World, Key]:
    world = World()
    world.session_up("p")
    key = world.offer(4)
    assert key is not None
    if stage == "offered":
        return world, key
    pump(world)
    if stage in ("writing", "sent", "committed"):
        world.give_pages(key, 4)
    if stage in ("sent", "committed"):
        world.end_write(0, TicketStatus.DONE)
    if stage == "committed":
        world.commit(key)
    return world, key


@pytest.mark.parametrize("lose", [False, True], ids=["delivered", "all messages lost"])
@pytest.mark.parametrize("who", ["prefill", "decode", "session"])
@pytest.mark.parametrize("stage", STAGES)
def test_giving_up_in_any_state_frees_both_sides(stage: str, who: str, lose: bool) -> None:
    world, key = reach(stage)
    if who == "prefill":
        world.cancel_export(key)
    elif who == "decode":
        world.cancel_import(key)
    else:
        world.session_down("d")
    if lose:
        world.wire.clear()
    world.settle()
    assert log_of(world, key).count("ExportReleased") == 1
    assert world.d.handler.num_leases == world.p.handler.num_transfers == 0


def test_a_lease_whose_grant_and_cancel_were_lost_is_drained_by_asking() -> None:
    world = World()
    world.session_up("p")
    key = world.offer(4)
    assert key is not None
    world.deliver(0)
    world.decide(0, "grant")
    world.cancel_export(key)
    world.wire.clear()
    assert world.d.handler.num_leases == 1
    assert world.p.handler.num_transfers == 0
    world.settle(rounds=3)
    assert world.d.handler.num_leases == 0


def test_prefill_waits_for_writes_in_flight_before_it_says_drained() -> None:
    world, key = granted()
    world.give_pages(key, 4)
    world.cancel_export(key)
    pump(world)
    assert "ExportReleased" not in log_of(world, key)
    assert world.d.handler.num_leases == 1
    world.end_write(0, TicketStatus.DONE)
    pump(world)
    assert log_of(world, key)[-1] == "ExportReleased"
    assert world.d.handler.num_leases == 0


def test_an_unknown_write_is_never_followed_by_drained() -> None:
    world, key = granted()
    world.give_pages(key, 4)
    world.end_write(0, TicketStatus.FAILED_UNKNOWN)
    for _ in range(50):
        assert not any(isinstance(message, wire.Drained) for _, _, message in world.wire)
        pump(world, 1)
        world.tick(1.0)
    world.session_down("p")
    world.session_up("d")
    pump(world)
    assert world.quarantined_source
    assert world.d.handler.num_leases == 1
    world.land_late(0)
    world.fence("p", 1)
    assert world.d.handler.num_leases == 0


def test_a_transfer_that_takes_longer_than_the_deadline_fails() -> None:
    world, key = granted()
    world.tick(CONFIG.deadline_s + 1)
    pump(world)
    assert log_of(world, key) == ["ExportGranted", "ExportFailed", "ExportReleased"]
    assert world.d.handler.num_leases == 0


def test_a_peer_that_refuses_the_session_fails_the_offer_at_once() -> None:
    world = World()
    key = world.offer(2)
    assert key is not None
    world.p.control.refusals["d"] = "another layout"
    world.tick(0.1)
    assert log_of(world, key) == ["ExportFailed", "ExportReleased"]


def test_an_offer_is_asked_of_the_node_once_however_often_it_is_sent() -> None:
    world = World()
    world.session_up("p")
    world.offer(2)
    for _ in range(5):
        world.tick(1.0)
    while world.wire:
        world.deliver(0)
    assert len(world.undecided) == 1


def test_a_grant_of_pages_that_decode_does_not_have_fails_the_transfer_and_drains() -> None:
    world = World()
    world.session_up("p")
    key = world.offer(2)
    bad = wire.Grant("r1", 0, 77, (wire.PageRun(1000, 2),), ())
    world.wire.clear()
    world.wire.append((world.d, world.p, bad))
    world.deliver(0)
    assert key is not None
    assert log_of(world, key) == ["ExportFailed", "ExportReleased"]
    assert wire.Drained(77, "r1", 0) in [message for _, _, message in world.wire]
    assert "outside" in world.protocol_errors[0]


def test_a_lease_is_not_touched_by_another_peer() -> None:
    world, _key = granted()
    importer = world.d.handler
    stranger = type(world.p.peer)("q", 1, "prefill", world.p.peer.hello)
    (lease_id,) = world.leases
    with pytest.raises(ProtocolError, match="speaks of lease"):
        importer.on_message(stranger, wire.Drained(lease_id, "r1", 0))
    assert importer.num_leases == 1


def test_a_ready_request_survives_its_prefill_and_its_lease_stays_open() -> None:
    world, key = reach("committed")
    while world.wire:
        world.deliver(0)
    while world.d.mover.verifies:
        world.verify(0)
    (lease,) = world.leases.values()
    assert lease.outcome == "ready"
    world.session_down("d")
    assert lease.is_open
    world.restart("p")
    world.session_up("p")
    assert not lease.is_open
    assert lease.outcome == "ready"
    assert key is not None


def test_a_commit_whose_answer_was_lost_with_the_session_is_settled_on_the_next_one() -> None:
    world, key = reach("committed")
    while world.wire:
        world.deliver(0)
    while world.d.mover.verifies:
        world.verify(0)
    world.session_down("p")
    assert log_of(world, key) == ["ExportGranted"], "in doubt: neither done nor failed"
    world.session_up("p")
    pump(world)
    assert log_of(world, key) == ["ExportGranted", "ExportDone", "ExportReleased"]
