"""No socket stays behind for a peer that was killed, hangs, or lost its power; real engines and processes."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.memory import Memory

from tidepool.common.clock import MonotonicClock
from tidepool.common.config import TransferSection
from tidepool.transfer import control, own_sockets
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.jobs import WriteJob, WriteResult
from tidepool.transfer.mooncake import MooncakeTransport
from tidepool.transfer.mover import Mover
from tidepool.transfer.session import Peer
from tidepool.transfer.transport import TicketStatus, Transport, Write, Writes
from tidepool.transfer.transports import make_tcp

HOST = "127.0.0.1"
SIZE, PIECE = 4 << 20, 256 << 10
TESTS = Path(__file__).resolve().parents[1]
TARGET = f"""
import sys, time
from helpers.memory import Memory
from tidepool.transfer.transports import make_tcp
memory = Memory({SIZE})
transport = make_tcp("{HOST}", int(sys.argv[1]))
transport.register(memory.address, memory.num_bytes)
print("TARGET", transport.data_address, memory.address, flush=True)
time.sleep(60)
"""
_TCP_REPAIR = 19
"""Linux: a socket that is closed in this state says nothing to the other end, as if the power failed."""


def wait_for(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.01)


@contextmanager
def target(num_engines: int) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A process that takes writes: its data address, and where SIZE bytes are."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", TARGET, str(num_engines)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        _, data_address, address = next(
            line for line in process.stdout if line.startswith("TARGET")
        ).split()
        yield process, data_address, int(address)
    finally:
        process.kill()
        process.communicate()


class Writer:
    """A mover over a transport, and what it has open."""

    def __init__(self, transport: Transport) -> None:
        self.source = Memory(SIZE)
        transport.register(self.source.address, SIZE)
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.mover = Mover(transport, TransferSection(write_timeout_s=5.0), self.calls.put)
        self.mover.start()

    def write(self, data_address: str, address: int) -> TicketStatus:
        writes = Writes(
            [Write(self.source.address + at, address + at, PIECE) for at in range(0, SIZE, PIECE)]
        )
        results: list[WriteResult] = []
        self.mover.write(WriteJob("test", data_address, lambda: (writes, []), results.append))
        self.calls.get(timeout=15.0)()
        return results[0].status


def num_sockets() -> int:
    return len(own_sockets._descriptors())


def connections(data_address: str) -> frozenset[int]:
    ports = {int(each.rpartition("/")[2]) for each in data_address.split(",")}
    return frozenset().union(*(own_sockets.connections_to({HOST}, port) for port in ports))


@pytest.mark.parametrize("num_engines", [1, 2])
def test_nothing_stays_open_for_a_writer_whose_peers_end_or_hang(num_engines: int) -> None:
    transport = make_tcp(HOST, num_engines)
    writer = Writer(transport)
    try:
        with target(num_engines) as (_, healthy, healthy_at):
            assert writer.write(healthy, healthy_at) is TicketStatus.DONE
            kept = connections(healthy)
            before = num_sockets()
            for fault in (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL):
                with target(num_engines) as (process, data_address, address):
                    assert writer.write(data_address, address) is TicketStatus.DONE
                    assert connections(data_address)
                    process.send_signal(fault)
                    if fault == signal.SIGKILL:
                        process.wait(10.0)
                    writer.mover.abandon(data_address)
                    wait_for(lambda: num_sockets() <= before)
            assert kept
            assert connections(healthy) == kept, "a live peer's connections were touched"
            assert writer.write(healthy, healthy_at) is TicketStatus.DONE
    finally:
        writer.mover.stop()
        transport.close()


def test_an_address_that_a_live_peer_shares_is_left_alone() -> None:
    """Two names of one engine stand for two incarnations that got the same data port."""
    near, far = MooncakeTransport(HOST), MooncakeTransport(HOST)
    source, memory = Memory(SIZE), Memory(SIZE)
    near.register(source.address, SIZE)
    far.register(memory.address, SIZE)
    try:
        address = far.data_address
        ticket = near.submit(near.open(address), [Write(source.address, memory.address, SIZE)])
        wait_for(lambda: near.poll(ticket) is not TicketStatus.PENDING)
        near.open(address.replace(HOST, "localhost"))
        kept = connections(address)
        assert kept
        assert near.abandon(address) is None
        assert own_sockets.still_open(kept) == kept == connections(address)
    finally:
        near.close()
        far.close()


def vanish(connection: socket.socket) -> None:
    """Closes it without a word."""
    try:
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    except PermissionError:
        pytest.skip("needs CAP_NET_ADMIN")
    connection.close()


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (own_sockets, control):
        monkeypatch.setattr(module, "SILENT_S", 1)
        monkeypatch.setattr(module, "PROBE_INTERVAL_S", 1)


@pytest.mark.usefixtures("short_silence")
def test_an_engine_closes_connections_of_writers_that_lost_their_power() -> None:
    transport = MooncakeTransport(HOST)
    try:
        port = int(transport.data_address.rpartition("/")[2])
        before = num_sockets()
        connection = socket.create_connection((HOST, port))
        wait_for(lambda: num_sockets() == before + 2)  # both ends
        vanish(connection)
        wait_for(lambda: num_sockets() == before)
    finally:
        transport.close()


class Handler:
    """Notes who is up."""

    def __init__(self) -> None:
        self.up: list[str] = []

    def on_message(self, peer: Peer, message: object) -> bool:
        return True

    def on_peer_up(self, peer: Peer) -> None:
        self.up.append(peer.node_id)

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        return

    def on_tick(self, now_s: float) -> None:
        return


@pytest.mark.usefixtures("short_silence")
def test_the_control_plane_closes_connections_of_peers_that_lost_their_power() -> None:
    """Heartbeats are off here: they end the session, and not the connection it came on."""
    quiet = TransferSection(heartbeat_interval_s=1000.0, heartbeat_timeout_s=4000.0)
    clock = MonotonicClock()
    decode = ControlLoop("decode-0", "decode", 1, bind_host=HOST, config=quiet, clock=clock)
    prefill = ControlLoop("prefill-0", "prefill", 1, bind_host=HOST, config=quiet, clock=clock)
    heard = Handler()
    decode.start(heard)
    prefill.start(Handler())
    port = int(decode.address.rpartition(":")[2])
    try:
        prefill.connect("decode-0", decode.address)
        wait_for(lambda: heard.up == ["prefill-0"])
        (name,) = own_sockets.connections_to({HOST}, port)
        duplicate = own_sockets._duplicate(own_sockets._descriptors()[name])
        accepted = accepted_on(port)
        assert len(accepted) == 1
        vanish(duplicate)
        prefill.stop()
        assert not own_sockets.still_open(frozenset([name]))
        wait_for(lambda: not own_sockets.still_open(accepted))
    finally:
        prefill.stop()
        decode.stop()


def accepted_on(port: int) -> frozenset[int]:
    mine = own_sockets._descriptors()
    return frozenset(
        each.inode
        for each in own_sockets._table()
        if each.local_port == port and not each.is_listening and each.inode in mine
    )
