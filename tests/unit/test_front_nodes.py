"""The directory of nodes, the router, and the dispatcher between requests and nodes."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.front import (
    MODEL,
    PAIR,
    TWO_PAIRS,
    FakeControl,
    FakePeer,
    Step,
    bring_up,
    finish_of,
    letters,
    make_config,
    node,
    output,
    tokens_of,
)

from tidepool.common import wire
from tidepool.common.clock import FakeClock
from tidepool.common.errors import PeerError, RequestError
from tidepool.deploy.front.attempt import Bounds
from tidepool.deploy.front.dispatch import Dispatcher
from tidepool.deploy.front.metrics import FrontMetrics
from tidepool.deploy.front.nodes import NodeDirectory
from tidepool.deploy.front.request import FrontRequest
from tidepool.deploy.front.router import missing_roles, pick
from tidepool.transfer.session import Broken


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def lost() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def directory(control: FakeControl, lost: list[tuple[str, int]]) -> NodeDirectory:
    note = lambda node_id, epoch, reason: lost.append((node_id, epoch))  # noqa: E731
    directory = NodeDirectory(
        control,
        on_lost=note,
        on_cut=note,
        on_replaced=lambda old_epoch, info: lost.append((info.node_id, old_epoch)),
    )
    control.handler = None
    return directory


def all_up(directory: NodeDirectory, infos) -> None:
    directory.update(infos)
    for info in infos:
        directory.peer_up(info.node_id, info.epoch)


def test_new_nodes_are_connected_and_used_once_they_answer(directory, control):
    directory.update(PAIR)
    assert control.connected == {info.node_id: info.address for info in PAIR}
    assert pick(directory, 1, 2, ()) is None
    assert missing_roles(directory) == ["prefill", "decode"]
    all_up(directory, PAIR)
    route = pick(directory, 1, 2, ())
    assert route is not None and not route.is_unified
    assert missing_roles(directory) == []


def test_the_least_loaded_node_is_chosen_and_equals_take_turns(directory):
    all_up(directory, TWO_PAIRS)
    chosen = []
    for _ in range(4):
        route = pick(directory, 1, 2, ())
        directory.acquire(route.decode.node_id)
        chosen.append(route.decode.node_id)
    assert sorted(chosen) == ["decode-0", "decode-0", "decode-1", "decode-1"]
    directory.ping("decode-0", 1, wire.Load(num_running=9))
    assert pick(directory, 1, 2, ()).decode.node_id == "decode-1"


def test_draining_unlisted_silent_and_small_nodes_are_not_chosen(directory):
    all_up(directory, TWO_PAIRS)
    directory.ping("decode-0", 1, wire.Load(is_draining=True))
    assert pick(directory, 1, 2, ()).decode.node_id == "decode-1"
    assert pick(directory, 1, 513, ()) is None
    directory.peer_down("decode-1", 1, "silent")
    assert pick(directory, 1, 2, ()) is None
    assert missing_roles(directory) == ["decode"]


def test_a_node_that_failed_the_request_is_the_last_choice(directory):
    all_up(directory, TWO_PAIRS)
    assert pick(directory, 1, 2, {"decode-0"}).decode.node_id == "decode-1"
    assert pick(directory, 1, 2, {"decode-0", "decode-1"}) is not None


def test_a_unified_node_serves_alone(directory):
    all_up(directory, [node("u", "unified")])
    route = pick(directory, 1, 2, ())
    assert route.is_unified and missing_roles(directory) == []


def test_a_newer_epoch_loses_the_old_one_and_fences_it_once_its_death_is_proven(
    directory, control, lost
):
    all_up(directory, TWO_PAIRS)
    restarted = dataclasses.replace(TWO_PAIRS[2], epoch=2, address="tcp://fake/new")
    directory.update([*PAIR, restarted, TWO_PAIRS[3]])
    assert lost == [("prefill-1", 1)]
    assert control.connected["prefill-1"] == "tcp://fake/new"
    assert control.fenced == [("prefill-1", 1)]
    assert control.messages(wire.Fence) == []
    proven = dataclasses.replace(restarted, dead_epochs=(1,))
    for _ in range(2):
        directory.update([*PAIR, proven, TWO_PAIRS[3]])
    others = ["decode-0", "decode-1", "prefill-0"]
    assert sorted(target for target, _ in control.messages(wire.Fence)) == others
    directory.peer_up("decode-0", 1)
    assert len(control.messages(wire.Fence)) == 4
    assert not directory.get("prefill-1").is_up
    directory.peer_up("prefill-1", 1)
    assert not directory.get("prefill-1").is_up
    directory.peer_up("prefill-1", 2)
    assert directory.get("prefill-1").is_up


def test_a_successor_at_the_same_address_is_connected_anew(directory, control):
    """Fencing the one before ends its link, and with it the tries at that address."""
    all_up(directory, PAIR)
    directory.peer_down("decode-0", 1, "killed")
    control.connected.clear()
    directory.update([PAIR[0], dataclasses.replace(PAIR[1], epoch=2)])
    assert control.fenced == [("decode-0", 1)]
    assert control.connected == {"decode-0": PAIR[1].address}


def test_a_session_of_a_newer_epoch_counts_before_the_poller_knows(directory, control, lost):
    all_up(directory, PAIR)
    directory.peer_up("decode-0", 3)
    assert lost == [("decode-0", 1)]
    assert control.fenced == [("decode-0", 1)]
    directory.update(PAIR)
    assert directory.get("decode-0").info.epoch == 3
    assert directory.get("decode-0").is_up


def test_an_unlisted_node_keeps_its_session_while_it_is_used(directory, control, lost):
    all_up(directory, PAIR)
    directory.acquire("decode-0")
    directory.update(PAIR[:1])
    assert pick(directory, 1, 2, ()) is None
    assert "decode-0" in control.connected
    directory.release("decode-0")
    assert "decode-0" not in control.connected
    assert directory.get("decode-0") is None
    assert lost == []
    all_up(directory, PAIR)
    assert pick(directory, 1, 2, ()) is not None


def test_requests_of_a_node_that_is_silent_and_not_restarted_are_lost(directory, lost):
    all_up(directory, PAIR)
    directory.acquire("decode-0")
    directory.peer_down("decode-0", 1, "broken")
    lost.clear()
    directory.update(PAIR[:1])
    assert lost == [("decode-0", 1)]


def test_a_session_that_ends_late_changes_nothing(directory, lost):
    all_up(directory, PAIR)
    directory.peer_up("decode-0", 2)
    lost.clear()
    directory.peer_down("decode-0", 1, "late")
    assert lost == []
    assert directory.get("decode-0").is_up


class Bench:
    """A dispatcher over a fake control plane, without threads."""

    def __init__(self, script=output) -> None:
        self.clock = FakeClock()
        self.control = FakeControl(script)
        self.metrics = FrontMetrics()
        self.dispatcher = Dispatcher(self.control, self.clock, self.metrics)
        self.control.handler = self.dispatcher
        self.dispatcher.update_nodes(TWO_PAIRS)
        bring_up(self.control, TWO_PAIRS)

    def submit(
        self, request_id: str = "r", max_tokens: int = 6, *, reattach: bool = True
    ) -> FrontRequest:
        request = FrontRequest(
            request_id,
            (1, 2, 3),
            wire.Sampling(max_tokens=max_tokens, seed=2),
            front_id="front-0",
            model=MODEL,
            bounds=Bounds.of(make_config(decode={"reattach": reattach})),
            now_s=self.clock.now(),
            notify=lambda: None,
        )
        self.dispatcher.submit(request)
        return request

    def run_out(self) -> None:
        """Ticks until nothing happens any more."""
        for _ in range(80):
            self.control.play()
            self.clock.advance(0.1)
            self.dispatcher.tick()

    def assert_idle(self) -> None:
        assert all(n.in_flight == 0 for n in self.dispatcher.nodes)


def ids(request: FrontRequest) -> list[int]:
    return [token.token_id for token in request.tokens]


TRUTH = letters(2, 3, 6)


def test_a_request_runs_to_its_end():
    bench = Bench()
    request = bench.submit()
    bench.control.play()
    assert (ids(request), request.finish_reason) == (TRUTH, "length")
    bench.dispatcher.release(request, RequestError("x"))
    assert bench.dispatcher.num_live == 0
    assert bench.control.messages(wire.Cancel) == []
    bench.assert_idle()


@pytest.mark.parametrize("num_steps", range(7))
@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_whichever_node_dies_whenever_the_tokens_are_the_same(victim, num_steps):
    bench = Bench()
    request = bench.submit()
    bench.control.play(num_steps)
    (_, submit) = bench.control.messages(wire.Submit)[0]
    dead = submit.decode_id if victim == "decode" else submit.decode_id.replace("decode", "prefill")
    bench.control.down(dead)
    bench.run_out()
    assert (ids(request), request.finish_reason) == (TRUTH, "length")
    again = bench.control.messages(wire.Submit)[1:]
    assert all(dead not in (node_id, message.decode_id) for node_id, message in again)
    bench.assert_idle()


def test_a_retry_waits_for_a_node_and_takes_the_first_that_comes():
    bench = Bench()
    request = bench.submit()
    bench.control.play(2)
    for name in ("decode-0", "decode-1"):
        bench.control.down(name)
    bench.clock.advance(1.0)
    bench.dispatcher.tick()
    assert bench.dispatcher.num_waiting == 1
    bench.clock.advance(0.3)
    bench.control.up("decode-1")
    bench.run_out()
    assert ids(request) == TRUTH


def test_a_session_that_comes_back_at_once_costs_no_second_attempt():
    bench = Bench()
    request = bench.submit()
    bench.control.play(3)
    (_, submit) = bench.control.messages(wire.Submit)[0]
    bench.control.down(submit.decode_id)
    bench.clock.advance(0.3)
    bench.dispatcher.tick()
    bench.control.up(submit.decode_id)
    (node_id, resume) = bench.control.messages(wire.Resume)[-1]
    assert (node_id, resume.next_index) == (submit.decode_id, len(request.tokens))
    bench.run_out()
    assert (ids(request), request.attempts) == (TRUTH, 1)


def test_no_node_in_time_is_a_503():
    bench = Bench()
    for name in ("decode-0", "decode-1"):
        bench.control.down(name)
    request = bench.submit()
    bench.run_out()
    assert request.error is not None and request.error.status == 503


def restart(bench: Bench, submit: wire.Submit, seen_by: str) -> None:
    """Decode comes back as epoch 2; first the poller sees it, or the session."""
    infos = [
        dataclasses.replace(info, epoch=2) if info.node_id == submit.decode_id else info
        for info in TWO_PAIRS
    ]
    bench.control.live.pop(submit.decode_id, None)
    if seen_by == "poller":
        bench.dispatcher.update_nodes(infos)
    bench.control.up(submit.decode_id, epoch=2)
    bench.dispatcher.update_nodes(infos)


def begun(bench: Bench, num_steps: int, **kwargs) -> tuple[FrontRequest, wire.Submit]:
    """A request with so many tokens; what its node would have sent is lost with it."""
    request = bench.submit(**kwargs)
    bench.control.play(num_steps)
    bench.control.steps.clear()
    (_, submit) = bench.control.messages(wire.Submit)[0]
    return request, submit


@pytest.mark.parametrize("seen_by", ["poller", "session"])
@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_restarted_decode_that_has_the_request_goes_on_with_it(seen_by, is_noticed):
    bench = Bench()
    request, submit = begun(bench, 3)
    if is_noticed:
        bench.control.down(submit.decode_id, Broken("closed"))
        bench.clock.advance(0.5)
        bench.dispatcher.tick()
    restart(bench, submit, seen_by)
    (node_id, resume) = bench.control.messages(wire.Resume)[-1]
    assert (node_id, resume.attempt, resume.next_index) == (submit.decode_id, 1, 3)
    bench.control.say(node_id, tokens_of(submit, 2, TRUTH[2:5]))
    bench.control.say(node_id, tokens_of(submit, 5, TRUTH[5:]))
    bench.control.say(node_id, finish_of(submit, 6))
    assert (ids(request), request.attempts, request.finish_reason) == (TRUTH, 1, "length")
    bench.run_out()
    assert len(bench.control.messages(wire.Submit)) == 1
    bench.assert_idle()


@pytest.mark.parametrize("seen_by", ["poller", "session"])
def test_a_restarted_decode_that_does_not_have_it_gets_it_again_at_once(seen_by):
    bench = Bench()
    request, submit = begun(bench, 3)
    restart(bench, submit, seen_by)
    unknown = finish_of(submit, 0, "error", status=503, code=wire.UNKNOWN_ATTEMPT, can_retry=True)
    bench.control.say(submit.decode_id, unknown)
    assert len(bench.control.messages(wire.Submit)) == 2
    assert request.avoid == set()
    bench.run_out()
    assert (ids(request), request.attempts) == (TRUTH, 2)
    bench.assert_idle()


@pytest.mark.parametrize(
    ("reason", "reattach_s", "waits_s"),
    [("silent", 3.0, 0.75), (Broken("closed"), 3.0, 3.0), (Broken("closed"), 0.0, 0.75)],
)
def test_a_decode_that_does_not_come_back_is_waited_for_so_long(reason, reattach_s, waits_s):
    bench = Bench()
    request, submit = begun(bench, 3)
    request._bounds = dataclasses.replace(request._bounds, reattach_s=reattach_s)
    bench.control.down(submit.decode_id, reason)
    bench.clock.advance(waits_s - 0.01)
    bench.dispatcher.tick()
    assert len(bench.control.messages(wire.Submit)) == 1
    bench.clock.advance(0.02)
    bench.dispatcher.tick()
    bench.dispatcher.tick()
    assert len(bench.control.messages(wire.Submit)) == 2
    bench.run_out()
    assert (ids(request), request.attempts) == (TRUTH, 2)


def test_without_reattaching_a_restarted_decode_gets_its_requests_again():
    bench = Bench()
    request, submit = begun(bench, 3, reattach=False)
    restart(bench, submit, "poller")
    assert bench.control.messages(wire.Resume) == []
    bench.run_out()
    assert (ids(request), request.attempts) == (TRUTH, 2)


def test_a_request_without_a_token_is_submitted_again_when_decode_is_restarted():
    bench = Bench()
    request, submit = begun(bench, 0)
    restart(bench, submit, "poller")
    bench.run_out()
    assert (ids(request), request.attempts) == (TRUTH, 2)


def test_tokens_nobody_waits_for_are_answered_with_cancel():
    bench = Bench()
    stray = wire.Tokens("unknown", 4, 0, (wire.OutputToken(1),))
    bench.dispatcher.on_message(FakePeer("decode-0", 1), stray)
    assert bench.control.messages(wire.Cancel) == [
        ("decode-0", wire.Cancel("unknown", 4, "the front no longer waits for it"))
    ]
    bench.dispatcher.on_message(FakePeer("decode-0", 1), finish_of(stray_submit(), 3))
    assert len(bench.control.messages(wire.Cancel)) == 1


def stray_submit() -> wire.Submit:
    return wire.Submit("unknown", 4, (1,), wire.Sampling(1), "front-0")


def test_messages_of_another_incarnation_are_not_believed():
    bench = Bench(lambda submit, decode_id: [])
    request = bench.submit()
    (_, submit) = bench.control.messages(wire.Submit)[0]
    bench.dispatcher.on_message(FakePeer(submit.decode_id, 9), tokens_of(submit, 0, [1]))
    assert request.tokens == []


def test_releasing_a_running_request_cancels_it_on_both_nodes():
    bench = Bench()
    request = bench.submit()
    bench.control.play(2)
    bench.dispatcher.release(request, RequestError("gone", status=499))
    bench.dispatcher.release(request, RequestError("gone", status=499))
    assert sorted(n for n, _ in bench.control.messages(wire.Cancel)) == ["decode-0", "prefill-0"]
    bench.assert_idle()


def test_a_request_that_waits_for_a_node_can_be_cancelled():
    bench = Bench()
    for name in ("decode-0", "decode-1"):
        bench.control.down(name)
    request = bench.submit()
    assert bench.dispatcher.num_waiting == 1
    bench.dispatcher.release(request, RequestError("gone", status=499))
    bench.control.up("decode-0")
    bench.run_out()
    assert (bench.dispatcher.num_live, bench.control.messages(wire.Submit)) == (0, [])
    bench.assert_idle()


def test_a_full_node_is_left_for_another_one():
    def script(submit, decode_id):
        if decode_id == "decode-0":
            full = finish_of(submit, 0, "error", status=429, code="full", can_retry=True)
            return [Step(decode_id, full)]
        return output(submit, decode_id)

    bench = Bench(script)
    request = bench.submit()
    bench.run_out()
    assert ids(request) == TRUTH
    losses = bench.metrics.losses.labels("node_error")
    assert losses._value.get() <= 1


def test_a_fault_in_one_request_leaves_the_others_alone(caplog):
    bench = Bench()
    broken, fine = bench.submit("broken"), bench.submit("fine")
    broken.on_tokens = None  # type: ignore[assignment,method-assign]
    bench.control.play()
    assert broken.error is not None and broken.error.status == 500
    assert ids(fine) == TRUTH
    assert "failed at the front" in caplog.text


def test_a_submit_that_cannot_be_sent_is_tried_again_and_then_fails(monkeypatch):
    bench = Bench()

    def refuse(node_id, message):
        raise PeerError("the queue is full")

    monkeypatch.setattr(bench.control, "send", refuse)
    request = bench.submit()
    bench.run_out()
    assert request.error is not None and request.error.status == 503
    assert request.losses == ["node_lost"] * 3
    bench.assert_idle()


def test_the_metrics_name_every_node():
    bench = Bench()
    bench.metrics.watch_nodes(lambda: bench.dispatcher.nodes)
    bench.dispatcher.nodes.ping(
        "decode-0", 1, wire.Load(free_pages=3, total_pages=10, quarantined_pages=2)
    )
    text = bench.metrics.render().decode()
    assert 'tidepool_node_pages_used{node="decode-0",role="decode"} 7.0' in text
    assert 'tidepool_node_pages_quarantined{node="decode-0",role="decode"} 2.0' in text
    assert 'tidepool_node_hot_hits_total{node="decode-0",role="decode"} 3.0' in text
    assert 'tidepool_node_up{node="prefill-1",role="prefill"} 1.0' in text
