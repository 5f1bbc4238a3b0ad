"""Strangers at the control port: they get a closed connection and are counted, nothing else."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from helpers.secret_file import SECRET, secret_file

from tidepool.common import wire
from tidepool.common.config import ClusterSection, TransferSection
from tidepool.common.errors import ConfigError
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.curve import ClusterKeys, cluster_keys, derive_keys
from tidepool.transfer.session import Peer, identity_of

QUICK = TransferSection(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.4, resend_interval_s=0.1)
KEYS = derive_keys(SECRET.encode())
OTHER_KEYS = derive_keys(b"the secret of another cluster, as long as it takes")


class Sessions:
    """A handler that keeps who is up and counts messages."""

    def __init__(self) -> None:
        self.up: set[str] = set()
        self.num_messages = 0

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        self.num_messages += not isinstance(message, wire.Ping)
        return True

    def on_peer_up(self, peer: Peer) -> None:
        self.up.add(peer.node_id)

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        self.up.discard(peer.node_id)

    def on_tick(self, now_s: float) -> None: ...


Start = Callable[[str, ClusterKeys | None], tuple[ControlLoop, Sessions]]


@pytest.fixture
def start() -> Iterator[Start]:
    before = threading.active_count()
    loops: list[ControlLoop] = []

    def start(node_id: str, keys: ClusterKeys | None) -> tuple[ControlLoop, Sessions]:
        loop = ControlLoop(node_id, "decode", 1, config=QUICK, keys=keys)
        loops.append(loop)
        sessions = Sessions()
        loop.start(sessions)
        return loop, sessions

    yield start
    for loop in loops:
        loop.stop()
    assert threading.active_count() <= before


def wait_for(condition: Callable[[], object], timeout_s: float = 8.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.005)


def port_of(loop: ControlLoop) -> int:
    return int(loop.address.rsplit(":", 1)[1])


def hello_frame(node_id: str) -> bytes:
    hello = wire.Hello(wire.PROTOCOL_VERSION, node_id, "front", 1, "", "", "", ())
    return wire.encode(wire.Envelope(node_id, 1, 0, hello))


def test_nodes_with_the_secret_meet(start: Start) -> None:
    (d, at_d), (p, at_p) = start("d", KEYS), start("p", KEYS)
    p.connect("d", d.address)
    wait_for(lambda: at_p.up == {"d"} and at_d.up == {"p"})
    for number in range(500):
        p.send("d", wire.Cancel(str(number), 0, "test"))
    wait_for(lambda: at_d.num_messages == 500)
    assert d.stats.num_unauthenticated == 0


@pytest.mark.parametrize("keys", [OTHER_KEYS, None], ids=["another secret", "no secret"])
def test_a_node_without_the_secret_is_refused_and_counted(
    start: Start, keys: ClusterKeys | None
) -> None:
    (d, at_d), (p, at_p) = start("d", KEYS), start("p", keys)
    p.connect("d", d.address)
    wait_for(lambda: d.stats.num_unauthenticated >= 2)
    assert not at_d.up
    assert not at_p.up
    assert d.stats.num_received == d.stats.num_malformed == 0


def test_a_node_with_the_secret_does_not_talk_to_one_without(start: Start) -> None:
    (d, at_d), (p, at_p) = start("d", None), start("p", KEYS)
    p.connect("d", d.address)
    time.sleep(1.0)
    assert not at_p.up
    assert not at_d.up
    assert p.stats.num_received == 0


def test_knowing_the_public_key_alone_is_not_enough(start: Start) -> None:
    """CURVE itself would let any client key in; only the cluster's own is on the list."""
    d, at_d = start("d", KEYS)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        public, secret = zmq.curve_keypair()
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.CURVE_SERVERKEY, KEYS.server_public)
        dealer.set(zmq.CURVE_PUBLICKEY, public)
        dealer.set(zmq.CURVE_SECRETKEY, secret)
        dealer.set(zmq.IDENTITY, identity_of("x", 1))
        dealer.connect(d.address)
        dealer.send(hello_frame("x"))
        wait_for(lambda: d.stats.num_unauthenticated >= 1)
        assert not at_d.up
        assert d.stats.num_received == 0
    finally:
        dealer.close()
        context.term()


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        os.urandom(4096),
        b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL" + bytes(48) + b"\x04\x26" + bytes(200),
        b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE" + bytes(47) + b"\x04\xc8" + bytes(200),
        b"",
    ],
    ids=["http", "random", "zmtp without a secret", "curve with a made-up hello", "nothing"],
)
def test_bytes_of_a_stranger_get_a_closed_connection(start: Start, data: bytes) -> None:
    d, at_d = start("d", KEYS)
    with socket.create_connection(("127.0.0.1", port_of(d)), timeout=8.0) as stranger:
        stranger.sendall(data)
        received = b""
        try:
            while piece := stranger.recv(4096):
                received += piece
        except ConnectionResetError:
            pass
    assert len(received) <= 64  # ZMTP's own greeting, which says what it speaks
    wait_for(lambda: d.stats.num_unauthenticated >= 1)
    assert not at_d.up


def test_a_crowd_of_strangers_does_not_slow_the_cluster(start: Start) -> None:
    (d, at_d), (p, at_p) = start("d", KEYS), start("p", KEYS)
    p.connect("d", d.address)
    wait_for(lambda: at_p.up == {"d"} and at_d.up == {"p"})
    is_over = threading.Event()

    def crowd() -> None:
        while not is_over.is_set():
            with socket.create_connection(("127.0.0.1", port_of(d))) as stranger:
                stranger.sendall(os.urandom(256))

    threads = [threading.Thread(target=crowd) for _ in range(4)]
    idle = [socket.create_connection(("127.0.0.1", port_of(d))) for _ in range(100)]
    try:
        for thread in threads:
            thread.start()
        slowest_s = 0.0
        for number in range(1, 101):
            sent_s = time.monotonic()
            p.send("d", wire.Cancel(str(number), 0, "test"))
            wait_for(lambda number=number: at_d.num_messages == number)
            slowest_s = max(slowest_s, time.monotonic() - sent_s)
            time.sleep(0.01)
    finally:
        is_over.set()
        for thread in threads:
            thread.join(5.0)
        for each in idle:
            each.close()
    assert slowest_s < 2.0
    assert at_d.up == {"p"}
    assert at_p.up == {"d"}
    assert d.stats.num_unauthenticated > 100


def test_the_socket_listens_on_its_interface_only(start: Start) -> None:
    d, _ = start("d", KEYS)
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port_of(d)), timeout=2.0):
        pass


def test_keys_come_from_the_secret_alone_and_are_not_shown() -> None:
    assert derive_keys(SECRET.encode()) == KEYS
    assert OTHER_KEYS.server_public != KEYS.server_public
    assert KEYS.server_public != KEYS.client_public
    for secret in (KEYS.server_secret, KEYS.client_secret, SECRET.encode()):
        assert secret.decode() not in repr(KEYS)


def test_a_configuration_without_a_secret_is_an_error_unless_it_says_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        cluster_keys(ClusterSection())
    assert cluster_keys(ClusterSection(authentication="off")) is None
    assert cluster_keys(ClusterSection(secret_file=secret_file(tmp_path))) == KEYS
