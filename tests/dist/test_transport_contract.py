"""One suite for every transport; for Mooncake two engines over 127.0.0.1, and a peer process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from helpers.memory import Memory

from tidepool.common.errors import TransferError
from tidepool.transfer.loopback import Fault, LoopbackTransport
from tidepool.transfer.mooncake import MooncakeTransport
from tidepool.transfer.striped import StripedTransport
from tidepool.transfer.transport import Channel, TicketStatus, Transport, Write
from tidepool.transfer.transports import make_tcp

SIZE = 1 << 20
FAILED = (TicketStatus.FAILED_DRAINED, TicketStatus.FAILED_UNKNOWN)


@dataclass
class Pair:
    """Two transports, each with SIZE registered bytes, and a channel from `near` to `far`."""

    near: Transport
    far: Transport
    source: Memory = field(default_factory=lambda: Memory(SIZE))
    target: Memory = field(default_factory=lambda: Memory(SIZE))

    def write(self, *parts: tuple[int, int, int]) -> TicketStatus:
        """Writes (source offset, target offset, bytes) in one batch and waits for its end."""
        writes = [
            Write(self.source.address + source, self.target.address + target, size)
            for source, target, size in parts
        ]
        channel = self.near.open(self.far.data_address)
        return wait(self.near, channel, writes)


def wait(
    transport: Transport, channel: Channel, writes: list[Write], timeout_s: float = 8.0
) -> TicketStatus:
    ticket = transport.submit(channel, writes)
    deadline_s = time.monotonic() + timeout_s
    while (status := transport.poll(ticket)) is TicketStatus.PENDING:
        assert time.monotonic() < deadline_s, "the batch did not end"
        time.sleep(0.001)
    assert transport.poll(ticket) is status
    return status


MAKERS: dict[str, Callable[[], Transport]] = {
    "loopback": LoopbackTransport,
    "mooncake": lambda: MooncakeTransport("127.0.0.1", "tcp"),
    "striped loopback": lambda: StripedTransport([LoopbackTransport(), LoopbackTransport()]),
    "striped mooncake": lambda: make_tcp("127.0.0.1", 2),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Callable[[], Transport]:
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def shared(make: Callable[[], Transport]) -> Iterator[Pair]:
    pair = Pair(make(), make())
    pair.near.register(pair.source.address, SIZE)
    pair.far.register(pair.target.address, SIZE)
    yield pair
    pair.near.close()
    pair.far.close()


def test_one_write_moves_exactly_its_bytes(shared: Pair) -> None:
    data, before = shared.source.fill(1), shared.target.fill(2)
    assert shared.write((100, 5000, 70_001)) is TicketStatus.DONE
    got = shared.target.read()
    assert got[5000:75_001] == data[100:70_101]
    assert got[:5000] == before[:5000]
    assert got[75_001:] == before[75_001:]


def test_a_batch_of_strided_writes_moves_each(shared: Pair) -> None:
    data, before = shared.source.fill(3), shared.target.fill(4)
    parts = [(index * 8192, (63 - index) * 16_000, 4096) for index in range(64)]
    assert shared.write(*parts) is TicketStatus.DONE
    expected = bytearray(before)
    for source, target, size in parts:
        expected[target : target + size] = data[source : source + size]
    assert shared.target.read() == bytes(expected)


def test_the_whole_region_and_single_bytes_can_be_written(shared: Pair) -> None:
    data = shared.source.fill(5)
    assert shared.write((0, 0, SIZE)) is TicketStatus.DONE
    assert shared.target.read() == data
    assert shared.write((7, SIZE - 1, 1), (9, 0, 1)) is TicketStatus.DONE
    assert shared.target.read(SIZE - 1)[0] == data[7]


@pytest.mark.parametrize("offset, size", [(SIZE - 10, 11), (SIZE + 4096, 8), (-4096, 4096)])
def test_a_target_out_of_range_fails_and_hurts_nothing_else(
    shared: Pair, offset: int, size: int
) -> None:
    data, before = shared.source.fill(6), shared.target.fill(7)
    assert shared.write((0, offset, size)) in FAILED
    assert shared.target.read() == before
    assert shared.write((0, 0, 4096)) is TicketStatus.DONE
    assert shared.target.read(0, 4096) == data[:4096]


def test_a_batch_with_one_bad_write_fails_as_a_whole(shared: Pair) -> None:
    shared.source.fill(8)
    assert shared.write((0, 0, 100), (0, SIZE, 100), (0, 500, 100)) in FAILED


def test_registering_twice_or_overlapping_is_a_typed_error(shared: Pair) -> None:
    for offset, size in ((0, SIZE), (SIZE // 2, SIZE), (SIZE - 1, 1)):
        with pytest.raises(TransferError, match="overlaps"):
            shared.near.register(shared.source.address + offset, size)


@pytest.mark.parametrize("address, size", [(0, 100), (4096, 0), (4096, -5)])
def test_registering_nothing_is_a_typed_error(shared: Pair, address: int, size: int) -> None:
    with pytest.raises(TransferError, match="cannot register"):
        shared.near.register(address, size)


def test_opening_a_peer_that_does_not_exist_is_a_typed_error(shared: Pair) -> None:
    with pytest.raises(TransferError):
        shared.near.open("127.0.0.1:1")


def test_both_ends_can_write(shared: Pair) -> None:
    data = shared.target.fill(9)
    channel = shared.far.open(shared.near.data_address)
    write = Write(shared.target.address, shared.source.address, 50_000)
    assert wait(shared.far, channel, [write]) is TicketStatus.DONE
    assert shared.source.read(0, 50_000) == data[:50_000]


def test_a_closed_transport_can_be_closed_again_and_is_no_peer(
    make: Callable[[], Transport],
) -> None:
    one, two = make(), make()
    address = two.data_address
    two.close()
    two.close()
    with pytest.raises(TransferError):
        one.open(address)
    one.close()


PEER = """
import sys, time
from helpers.memory import Memory
from tidepool.transfer.mooncake import MooncakeTransport
memory = Memory(64 << 20)
transport = MooncakeTransport("127.0.0.1", "tcp")
transport.register(memory.address, memory.num_bytes)
print("PEER", transport.data_address, memory.address, flush=True)
time.sleep(60)
"""


def start_peer() -> tuple[subprocess.Popen[str], str, int]:
    import helpers  # noqa: PLC0415

    path = str(next(iter(helpers.__path__))) + "/.."
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{PEER}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("PEER"):
            _, data_address, memory = line.split()
            return process, data_address, int(memory)
    raise AssertionError("the peer process did not start")


def test_a_mooncake_peer_killed_mid_batch_fails_within_bounds_and_others_go_on() -> None:
    process, data_address, target = start_peer()
    near, healthy = MooncakeTransport("127.0.0.1"), MooncakeTransport("127.0.0.1")
    source, other = Memory(64 << 20), Memory(SIZE)
    near.register(source.address, source.num_bytes)
    healthy.register(other.address, SIZE)
    try:
        channel = near.open(data_address)
        good = near.open(healthy.data_address)
        write = Write(source.address, target, 64 << 20)
        tickets = [near.submit(channel, [write]) for _ in range(4)]
        process.kill()
        started_s = time.monotonic()
        assert wait(near, good, [Write(source.address, other.address, SIZE)]) is TicketStatus.DONE
        pending = list(tickets)
        while pending and time.monotonic() - started_s < 8:
            pending = [each for each in pending if near.poll(each) is TicketStatus.PENDING]
            time.sleep(0.005)
        assert not pending
        assert any(near.poll(each) in FAILED for each in tickets)
        assert wait(near, channel, [write]) in FAILED
        with pytest.raises(TransferError):
            near.open(data_address)
    finally:
        process.kill()
        process.communicate()
        near.close()
        healthy.close()


def test_loopback_injects_each_fault() -> None:
    fault: list[Fault | None] = [None]
    pair = Pair(LoopbackTransport(lambda write: fault[0]), LoopbackTransport())
    pair.far.register(pair.target.address, SIZE)
    near = pair.near
    assert isinstance(near, LoopbackTransport)
    data = pair.source.fill(1)
    fault[0] = Fault.FAIL_DRAINED
    assert pair.write((0, 0, 100)) is TicketStatus.FAILED_DRAINED
    assert pair.target.read(0, 100) == bytes(100)
    fault[0] = Fault.FAIL_UNKNOWN
    assert pair.write((0, 0, 100)) is TicketStatus.FAILED_UNKNOWN
    assert pair.target.read(0, 100) == bytes(100)
    assert near.land_late() == 1
    assert pair.target.read(0, 100) == data[:100]
    fault[0] = Fault.CORRUPT
    assert pair.write((0, 0, 100)) is TicketStatus.DONE
    assert pair.target.read(0, 100) != data[:100]
    fault[0] = Fault.HANG
    channel = near.open(pair.far.data_address)
    ticket = near.submit(channel, [Write(pair.source.address, pair.target.address, 100)])
    assert near.poll(ticket) is near.poll(ticket) is TicketStatus.PENDING
    near.close()
    pair.far.close()
