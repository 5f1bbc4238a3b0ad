"""A process that takes the port of the one before is found by its peers without being told of."""

from __future__ import annotations

import socket
import time

from tidepool.common import wire
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.session import Broken, Peer

HOST = "127.0.0.1"


class Listener:
    """Notes who comes and goes."""

    def __init__(self) -> None:
        self.up: list[int] = []
        self.down: list[str] = []

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        return True

    def on_peer_up(self, peer: Peer) -> None:
        self.up.append(peer.epoch)

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        self.down.append(reason)

    def on_tick(self, now_s: float) -> None:
        return


def wait_for(condition: object, timeout_s: float = 20.0) -> None:
    assert callable(condition)
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def port_of(loop: ControlLoop) -> int:
    return int(loop.address.rpartition(":")[2])


def test_the_next_process_at_the_same_port_is_met_again() -> None:
    heard = Listener()
    front = ControlLoop("front-0", "front", 1, bind_host=HOST)
    front.start(heard)
    node = ControlLoop("decode-0", "decode", 1, bind_host=HOST)
    node.start(Listener())
    try:
        front.connect("decode-0", node.address)
        wait_for(lambda: heard.up == [1])
        for epoch in (2, 3):
            node._say_goodbye = lambda: None  # type: ignore[method-assign]  # as a kill would
            node.stop()
            wait_for(lambda epoch=epoch: len(heard.down) == epoch - 1)
            assert isinstance(heard.down[-1], Broken)
            time.sleep(0.3)  # some tries are refused meanwhile
            port = port_of(node)
            node = ControlLoop("decode-0", "decode", epoch, bind_host=HOST, bind_port=port)
            assert port_of(node) == port
            node.start(Listener())
            wait_for(lambda epoch=epoch: heard.up[-1] == epoch)
    finally:
        front.stop()
        node.stop()


def test_a_port_that_is_taken_is_not_insisted_on() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        node = ControlLoop("decode-0", "decode", 1, bind_host=HOST, bind_port=port)
        assert port_of(node) not in (0, port)
        node.stop()


def test_a_peer_that_is_silent_is_not_called_broken() -> None:
    heard = Listener()
    front = ControlLoop("front-0", "front", 1, bind_host=HOST)
    front.start(heard)
    node = ControlLoop("decode-0", "decode", 1, bind_host=HOST)
    node.start(Listener())
    try:
        front.connect("decode-0", node.address)
        wait_for(lambda: heard.up == [1])
        node.post(lambda: time.sleep(2.5))
        wait_for(lambda: len(heard.down) == 1)
        assert not isinstance(heard.down[0], Broken)
        assert "silent" in heard.down[0]
    finally:
        node.stop()
        front.stop()
