"""Control loops over real sockets on 127.0.0.1."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from tidepool.common import wire
from tidepool.common.config import TransferSection
from tidepool.common.errors import InvariantError, PeerError, ProtocolError
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.session import CompositeHandler, Peer

QUICK = TransferSection(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.4, resend_interval_s=0.1)


class Recorder:
    """A handler that writes down what it hears."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, object]] = []
        self.failure: Exception | None = None

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        if isinstance(message, wire.Ping):
            self.log.append(("ping", peer.node_id, message.load))
            return True
        self.log.append(("message", peer.node_id, message))
        if self.failure is not None:
            raise self.failure
        return True

    def on_peer_up(self, peer: Peer) -> None:
        self.log.append(("up", peer.node_id, peer.epoch))

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        self.log.append(("down", peer.node_id, reason))

    def on_tick(self, now_s: float) -> None:
        pass

    def of(self, kind: str) -> list[object]:
        return [what for each, _, what in list(self.log) if each == kind]


def wait_for(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.005)


class Nodes:
    """Starts control loops and stops them all at the end of a test."""

    def __init__(self) -> None:
        self.loops: list[ControlLoop] = []

    def start(
        self,
        node_id: str,
        role: wire.Role = "decode",
        epoch: int = 1,
        layout: str = "same",
        config: TransferSection = QUICK,
        on_fatal: Callable[[BaseException], None] | None = None,
    ) -> tuple[ControlLoop, Recorder]:
        loop = ControlLoop(
            node_id,
            role,
            epoch,
            layout_hash=layout,
            layout_text=f"the layout {layout}",
            config=config,
            on_fatal=on_fatal,
        )
        recorder = Recorder()
        loop.start(recorder)
        self.loops.append(loop)
        return loop, recorder


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    before = threading.active_count()
    nodes = Nodes()
    yield nodes
    for loop in nodes.loops:
        loop.stop()
    assert threading.active_count() <= before


@pytest.fixture
def stranger() -> Iterator[Callable[[str, bytes], zmq.Socket[bytes]]]:
    """Makes raw DEALER sockets, to say what no ControlLoop says."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def make(address: str, identity: bytes) -> zmq.Socket[bytes]:
        dealer = context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.RCVTIMEO, 3000)
        dealer.set(zmq.IDENTITY, identity)
        dealer.connect(address)
        sockets.append(dealer)
        return dealer

    yield make
    for each in sockets:
        each.close()
    context.term()


def cancel(request_id: str = "r") -> wire.Cancel:
    return wire.Cancel(request_id=request_id, attempt=0, reason="test")


def hello(node_id: str = "x", epoch: int = 1, **changes: object) -> wire.Hello:
    plain = wire.Hello(
        protocol_version=wire.PROTOCOL_VERSION,
        node_id=node_id,
        role="front",
        epoch=epoch,
        layout_hash="",
        layout_text="",
        data_address="",
        regions=(),
    )
    return msgspec.structs.replace(plain, **changes)


def frame(body: wire.AnyMessage, sender: str = "x", epoch: int = 1, receiver: int = 0) -> bytes:
    return wire.encode(wire.Envelope(sender, epoch, receiver, body))


def answer(dealer: zmq.Socket[bytes]) -> wire.AnyMessage:
    """The next message that is no Ping."""
    while True:
        body = wire.decode(dealer.recv()).body
        if not isinstance(body, wire.Ping):
            return body


def meet(nodes: Nodes) -> tuple[ControlLoop, Recorder, ControlLoop, Recorder]:
    """A prefill p connected to a decode d."""
    d, d_log = nodes.start("d")
    p, p_log = nodes.start("p", "prefill", epoch=7)
    p.connect("d", d.address)
    wait_for(lambda: p_log.of("up") and d_log.of("up"))
    return p, p_log, d, d_log


def test_messages_pass_both_ways_in_order_after_a_hello(nodes: Nodes) -> None:
    p, p_log, d, d_log = meet(nodes)
    for number in range(500):
        p.send("d", cancel(f"from p {number}"))
        d.send("p", cancel(f"from d {number}"))
    wait_for(lambda: len(d_log.of("message")) == 500 and len(p_log.of("message")) == 500)
    assert d_log.of("message") == [cancel(f"from p {number}") for number in range(500)]
    assert p_log.of("message") == [cancel(f"from d {number}") for number in range(500)]
    assert p_log.of("up") == [1]
    assert d_log.of("up") == [7]


def test_pings_carry_the_load_both_ways(nodes: Nodes) -> None:
    p, p_log, d, d_log = meet(nodes)
    p.set_load(wire.Load(num_queued=3))
    d.set_load(wire.Load(num_running=5))
    wait_for(lambda: wire.Load(num_queued=3) in d_log.of("ping"))
    wait_for(lambda: wire.Load(num_running=5) in p_log.of("ping"))


def test_a_send_without_a_session_is_dropped_and_counted(nodes: Nodes) -> None:
    p, _ = nodes.start("p", "prefill")
    p.send("nobody", cancel())
    wait_for(lambda: p.stats.num_no_session == 1)


def test_another_layout_is_refused_with_a_sentence_that_names_both(nodes: Nodes) -> None:
    d, d_log = nodes.start("d", layout="aaaa")
    p, p_log = nodes.start("p", "prefill", layout="bbbb")
    p.connect("d", d.address)
    wait_for(lambda: p.refusal("d"))
    assert "aaaa" in str(p.refusal("d"))
    assert "bbbb" in str(p.refusal("d"))
    assert not p_log.of("up")
    assert not d_log.of("up")


def test_a_front_meets_a_node_of_any_layout(nodes: Nodes) -> None:
    d, d_log = nodes.start("d", layout="aaaa")
    f, _ = nodes.start("f", "front", layout="")
    f.connect("d", d.address)
    wait_for(lambda: d_log.of("up"))


def test_another_protocol_version_is_refused_with_both_numbers(
    nodes: Nodes, stranger: Callable[[str, bytes], zmq.Socket[bytes]]
) -> None:
    d, _ = nodes.start("d")
    dealer = stranger(d.address, b"x|1")
    dealer.send(frame(hello(protocol_version=99)))
    body = answer(dealer)
    assert isinstance(body, wire.Goodbye)
    assert "99" in body.reason
    assert f"version {wire.PROTOCOL_VERSION}" in body.reason


def test_a_message_before_hello_is_answered_with_goodbye(
    nodes: Nodes, stranger: Callable[[str, bytes], zmq.Socket[bytes]]
) -> None:
    d, d_log = nodes.start("d")
    dealer = stranger(d.address, b"x|1")
    dealer.send(frame(cancel()))
    assert answer(dealer) == wire.Goodbye("hello first")
    assert not d_log.of("message")


def test_a_hello_must_come_over_its_own_connection(
    nodes: Nodes, stranger: Callable[[str, bytes], zmq.Socket[bytes]]
) -> None:
    d, d_log = nodes.start("d")
    dealer = stranger(d.address, b"someone else")
    dealer.send(frame(hello()))
    assert isinstance(answer(dealer), wire.Goodbye)
    assert not d_log.of("up")


def test_malformed_frames_are_counted_and_hurt_no_one(
    nodes: Nodes, stranger: Callable[[str, bytes], zmq.Socket[bytes]]
) -> None:
    p, _, d, d_log = meet(nodes)
    dealer = stranger(d.address, b"x|1")
    for garbage in (b"", b"\xc1", b"\x93" * 5000, b"garbage", frame(cancel())[:-3]):
        dealer.send(garbage)
    dealer.send_multipart([b"a", b"b"])
    wait_for(lambda: d.stats.num_malformed == 6)
    assert isinstance(answer(dealer), wire.Goodbye)
    p.send("d", cancel("fine"))
    wait_for(lambda: cancel("fine") in d_log.of("message"))
    assert not d_log.of("down")


def test_messages_of_or_for_another_epoch_are_dropped_and_counted(
    nodes: Nodes, stranger: Callable[[str, bytes], zmq.Socket[bytes]]
) -> None:
    d, d_log = nodes.start("d", epoch=5)
    dealer = stranger(d.address, b"x|1")
    dealer.send(frame(hello()))
    assert isinstance(answer(dealer), wire.Hello)
    dealer.send(frame(cancel("for epoch 4"), receiver=4))
    dealer.send(frame(cancel("of epoch 2"), epoch=2, receiver=5))
    dealer.send(frame(cancel("of y"), sender="y", receiver=5))
    dealer.send(frame(cancel("right"), receiver=5))
    wait_for(lambda: d_log.of("message"))
    assert d_log.of("message") == [cancel("right")]
    assert d.stats.num_wrong_epoch == 3


def test_a_silent_peer_goes_down_once_and_comes_up_again_with_the_same_epoch(
    nodes: Nodes, stranger: Callable[[str, bytes], zmq.Socket[bytes]]
) -> None:
    d, d_log = nodes.start("d")
    dealer = stranger(d.address, b"x|1")
    dealer.send(frame(hello()))
    wait_for(lambda: d_log.of("down"))
    assert "silent" in str(d_log.of("down")[0])
    time.sleep(0.5)
    dealer.send(frame(hello()))
    wait_for(lambda: len(d_log.of("up")) == 2)
    assert d_log.of("up") == [1, 1]
    assert len(d_log.of("down")) == 1


def test_a_hello_in_a_live_session_is_a_new_session(
    nodes: Nodes, stranger: Callable[[str, bytes], zmq.Socket[bytes]]
) -> None:
    d, d_log = nodes.start("d")
    dealer = stranger(d.address, b"x|1")
    dealer.send(frame(hello()))
    dealer.send(frame(hello()))
    wait_for(lambda: len(d_log.of("up")) == 2)
    assert [kind for kind, _, _ in d_log.log if kind in ("up", "down")] == ["up", "down", "up"]


def test_a_lost_session_is_found_by_both_ends_and_made_again(nodes: Nodes) -> None:
    p, p_log, d, d_log = meet(nodes)
    d.post(lambda: d._end(d._sessions["p"], "cut by the test"))
    wait_for(lambda: len(p_log.of("up")) == 2 and len(d_log.of("up")) == 2)
    p.send("d", cancel("after"))
    wait_for(lambda: cancel("after") in d_log.of("message"))


def test_a_restarted_peer_with_a_newer_epoch_replaces_the_old_one(
    nodes: Nodes, stranger: Callable[[str, bytes], zmq.Socket[bytes]]
) -> None:
    d, d_log = nodes.start("d")
    old = stranger(d.address, b"x|1")
    old.send(frame(hello()))
    wait_for(lambda: d_log.of("up"))
    new = stranger(d.address, b"x|2")
    new.send(frame(hello(epoch=2), epoch=2))
    wait_for(lambda: d_log.of("up") == [1, 2])
    assert len(d_log.of("down")) == 1
    old.send(frame(hello()))
    body = answer(old)
    while isinstance(body, wire.Hello) or "dead" not in getattr(body, "reason", ""):
        body = answer(old)
    assert d_log.of("up") == [1, 2]


def test_a_fence_ends_the_session_and_keeps_that_epoch_out(
    nodes: Nodes, stranger: Callable[[str, bytes], zmq.Socket[bytes]]
) -> None:
    d, d_log = nodes.start("d")
    f, _ = nodes.start("f", "front")
    f.connect("d", d.address)
    dealer = stranger(d.address, b"x|3")
    dealer.send(frame(hello(epoch=3, role="prefill", layout_hash="same"), epoch=3))
    wait_for(lambda: len(d_log.of("up")) == 2)
    f.send("d", wire.Fence(node_id="x", epoch=3))
    wait_for(lambda: d_log.of("message") == [wire.Fence(node_id="x", epoch=3)])
    assert any("fenced" in str(reason) for reason in d_log.of("down"))
    dealer.send(frame(hello(epoch=3), epoch=3))
    body = answer(dealer)
    while not (isinstance(body, wire.Goodbye) and "dead" in body.reason):
        body = answer(dealer)


def test_a_fenced_node_is_tried_no_more_until_connect_names_it_again(nodes: Nodes) -> None:
    p, p_log, d, _ = meet(nodes)
    p.fence("d", 1)
    wait_for(lambda: p_log.of("down"))
    wait_for(lambda: "d" not in p._links)
    d.stop()
    again, _ = nodes.start("d", epoch=2)
    p.connect("d", again.address)
    wait_for(lambda: p_log.of("up") == [1, 2])


def test_only_a_front_may_fence(nodes: Nodes) -> None:
    p, _, d, d_log = meet(nodes)
    p.send("d", wire.Fence(node_id="p", epoch=7))
    wait_for(lambda: d.stats.num_malformed == 1)
    assert not d_log.of("down")


def test_a_handler_that_raises_a_protocol_error_does_not_stop_the_loop(nodes: Nodes) -> None:
    p, _, d, d_log = meet(nodes)
    d_log.failure = ProtocolError("test")
    p.send("d", cancel("one"))
    p.send("d", cancel("two"))
    wait_for(lambda: len(d_log.of("message")) == 2)
    assert d.stats.num_handler_errors == 2
    assert d.is_running


@pytest.mark.parametrize("failure", [InvariantError("test"), KeyError("test")])
def test_our_own_fault_in_a_handler_stops_the_loop_and_is_reported(
    nodes: Nodes, failure: Exception
) -> None:
    fatal: list[BaseException] = []
    d, d_log = nodes.start("d", on_fatal=fatal.append)
    p, p_log = nodes.start("p", "prefill")
    p.connect("d", d.address)
    wait_for(lambda: p_log.of("up"))
    d_log.failure = failure
    p.send("d", cancel())
    wait_for(lambda: fatal)
    assert fatal == [failure]
    wait_for(lambda: not d.is_running)
    wait_for(lambda: p_log.of("down"))


def test_a_stopping_loop_tells_its_peers_at_once(nodes: Nodes) -> None:
    _, p_log, d, _ = meet(nodes)
    d.stop()
    wait_for(lambda: p_log.of("down"), timeout_s=0.3)


def test_disconnect_ends_the_session_for_good(nodes: Nodes) -> None:
    p, p_log, _, d_log = meet(nodes)
    p.disconnect("d")
    wait_for(lambda: p_log.of("down") and d_log.of("down"))
    time.sleep(0.3)
    assert len(p_log.of("up")) == 1


def test_connect_to_a_new_address_moves_the_session(nodes: Nodes) -> None:
    p, p_log, d, _ = meet(nodes)
    d.stop()
    d2, d2_log = nodes.start("d", epoch=2)
    p.connect("d", d2.address)
    wait_for(lambda: d2_log.of("up"))
    wait_for(lambda: p_log.of("up") == [1, 2])


def test_a_node_that_answers_under_another_name_is_refused(nodes: Nodes) -> None:
    d, _ = nodes.start("d")
    p, p_log = nodes.start("p", "prefill")
    p.connect("e", d.address)
    wait_for(lambda: p.refusal("e"))
    assert "d answers at the address of e" in str(p.refusal("e"))
    assert not p_log.of("up")


def test_connect_before_the_peer_listens_succeeds_later(nodes: Nodes) -> None:
    first, _ = nodes.start("d")
    address = first.address
    first.stop()
    p, p_log = nodes.start("p", "prefill")
    p.connect("d", address)
    time.sleep(0.2)
    late = ControlLoop("d", "decode", 2, layout_hash="same", config=QUICK)
    late._router.unbind(late.address)
    late._router.bind(address)
    nodes.loops.append(late)
    late.start(Recorder())
    wait_for(lambda: p_log.of("up") == [2])


def test_posted_calls_run_on_the_io_thread_in_order(nodes: Nodes) -> None:
    d, _ = nodes.start("d")
    seen: list[tuple[int, str]] = []
    for number in range(1000):
        d.post(lambda n=number: seen.append((n, threading.current_thread().name)))  # type: ignore[misc]
    wait_for(lambda: len(seen) == 1000)
    assert seen == [(number, "control-d") for number in range(1000)]


def test_a_full_command_queue_is_a_typed_error(nodes: Nodes) -> None:
    config = TransferSection(max_queued_messages=4)
    d, _ = nodes.start("d", config=config)
    gate = threading.Event()
    d.post(lambda: bool(gate.wait(10)) and None)  # type: ignore[func-returns-value]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tidepool.transfer.control._POST_WAIT_S", 0.05)
        with pytest.raises(PeerError, match="does not keep up"):
            for _ in range(6):
                d.send("nobody", cancel())
    gate.set()


def test_a_message_that_cannot_be_encoded_is_counted_and_dropped(nodes: Nodes) -> None:
    p, _, _, d_log = meet(nodes)
    p.send("d", wire.ChunkAck(lease_id=2**70, sequence=0, tries=1, ok=True))
    p.send("d", cancel("\ud800"))
    p.send("d", cancel("fine"))
    wait_for(lambda: d_log.of("message"))
    assert d_log.of("message") == [cancel("fine")]
    assert p.stats.num_unsendable == 2


def test_an_address_nobody_can_bind_is_a_typed_error() -> None:
    with pytest.raises(PeerError, match="cannot listen"):
        ControlLoop("n", "decode", 1, bind_host="203.0.113.77")


def test_a_loop_that_never_started_can_be_stopped() -> None:
    ControlLoop("n", "decode", 1).stop()


def test_every_handler_of_a_composite_hears_everything(nodes: Nodes) -> None:
    one, two = Recorder(), Recorder()
    d = ControlLoop("d", "decode", 1, layout_hash="same", config=QUICK)
    nodes.loops.append(d)
    d.start(CompositeHandler([one, two]))
    p, p_log = nodes.start("p", "prefill")
    p.connect("d", d.address)
    wait_for(lambda: p_log.of("up"))
    p.send("d", cancel())
    wait_for(lambda: two.of("message"))
    assert one.of("message") == two.of("message") == [cancel()]
    assert one.of("up") == two.of("up") == [1]
