"""The mover over the loopback transport."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
from helpers.memory import Memory

from tidepool.common.config import TransferSection
from tidepool.common.errors import TransferError
from tidepool.transfer.checksum import checksum
from tidepool.transfer.jobs import Part, VerifyJob, WriteJob, WriteResult
from tidepool.transfer.loopback import Fault, LoopbackTransport
from tidepool.transfer.mover import Mover
from tidepool.transfer.transport import Channel, TicketStatus, Write, Writes

SIZE = 64 * 1024
CONFIG = TransferSection(max_writes_in_flight=4, write_timeout_s=0.2)
PATIENT = TransferSection(max_writes_in_flight=4, write_timeout_s=600.0)
"""No write times out in a test."""


def plan(writes: list[Write], parts: list[Part]) -> tuple[Writes, list[Part]]:
    return Writes(writes), parts


class Bench:
    """A mover, two memories, and the results in the order of their ends."""

    def __init__(self, config: TransferSection) -> None:
        self.faults: Callable[[Write], Fault | None] = lambda write: None
        self.near = LoopbackTransport(self.choose_fault)
        self.far = LoopbackTransport()
        self.source, self.target = Memory(SIZE), Memory(SIZE)
        self.data = self.source.fill(1)
        self.near.register(self.source.address, SIZE)
        self.far.register(self.target.address, SIZE)
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.ends: list[tuple[object, WriteResult]] = []
        self.fatal: list[BaseException] = []
        self.mover = Mover(self.near, config, self.calls.put, on_fatal=self.fatal.append)
        self.mover.start()

    def choose_fault(self, write: Write) -> Fault | None:
        return self.faults(write)

    def write(self, owner: str, offsets: Sequence[int], parts: int = 0, peer: str = "") -> None:
        size = 1024
        writes = [Write(self.source.address + at, self.target.address + at, size) for at in offsets]
        segments = [[(self.source.address + at, size)] for at in offsets[:parts]]
        self.mover.write(
            WriteJob(
                owner=owner,
                peer_data_address=peer or self.far.data_address,
                plan=partial(plan, writes, segments),
                on_end=lambda result: self.ends.append((owner, result)),
            )
        )

    def wait(self, num_ends: int, timeout_s: float = 5.0) -> list[tuple[object, WriteResult]]:
        deadline_s = time.monotonic() + timeout_s
        while len(self.ends) < num_ends:
            self.calls.get(timeout=max(0.001, deadline_s - time.monotonic()))()
        return self.ends


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    before = threading.active_count()
    bench = Bench(getattr(request, "param", CONFIG))
    yield bench
    bench.mover.stop()
    bench.near.close()
    bench.far.close()
    assert not bench.fatal
    deadline_s = time.monotonic() + 10.0
    while threading.active_count() > before:  # a thread that meets a peer ends with its time-out
        assert time.monotonic() < deadline_s, threading.enumerate()
        time.sleep(0.01)


def test_a_write_job_moves_bytes_and_returns_the_checksums_of_its_source(bench: Bench) -> None:
    bench.write("a", [0, 4096, 8192], parts=3)
    ((_, result),) = bench.wait(1)
    assert result.status is TicketStatus.DONE
    expected = tuple(checksum([(bench.source.address + at, 1024)]) for at in (0, 4096, 8192))
    assert result.checksums == expected
    assert bench.target.read(4096, 1024) == bench.data[4096:5120]


def test_more_writes_than_may_be_in_flight_all_arrive(bench: Bench) -> None:
    bench.write("a", range(0, SIZE, 1024))
    ((_, result),) = bench.wait(1)
    assert result.status is TicketStatus.DONE
    assert bench.target.read() == bench.data


def test_nothing_is_read_before_it_is_staged_and_a_cancelled_job_ends_after_its_staging(
    bench: Bench,
) -> None:
    is_there = threading.Event()
    began: list[str] = []

    def stage() -> Callable[[], bool]:
        began.append(threading.current_thread().name)
        return is_there.is_set

    for owner in ("kept", "cancelled"):
        write = Write(bench.source.address, bench.target.address, 1024)
        part = [(bench.source.address, 1024)]
        end = partial(lambda owner, result: bench.ends.append((owner, result)), owner)
        job = WriteJob(owner, bench.far.data_address, partial(plan, [write], [part]), end, stage)
        bench.mover.write(job)
    bench.mover.cancel("cancelled")
    deadline_s = time.monotonic() + 5.0
    while len(began) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.005)
    time.sleep(0.05)
    assert began == ["mover", "mover"]
    assert bench.calls.empty(), "a job ended before it was staged"
    assert bench.target.read(0, 1024) == bytes(1024)
    data = bench.source.fill(5)
    is_there.set()
    results = dict(bench.wait(2))
    assert results["kept"].checksums == (checksum([(bench.source.address, 1024)]),)
    assert results["cancelled"].status is TicketStatus.FAILED_DRAINED
    assert bench.target.read(0, 1024) == data[:1024]


def test_owners_take_turns(bench: Bench) -> None:
    order: list[str] = []
    gate = threading.Event()

    def note(write: Write) -> None:
        gate.wait(5)
        order.append("a" if write.source < bench.source.address + SIZE // 2 else "b")

    bench.faults = note
    bench.write("a", range(0, SIZE // 2, 1024))
    bench.write("b", range(SIZE // 2, SIZE, 1024))
    gate.set()
    bench.wait(2)
    assert "b" in order[:16]


@pytest.mark.parametrize(
    "fault, status",
    [
        (Fault.FAIL_DRAINED, TicketStatus.FAILED_DRAINED),
        (Fault.FAIL_UNKNOWN, TicketStatus.FAILED_UNKNOWN),
        (Fault.HANG, TicketStatus.FAILED_UNKNOWN),
    ],
)
def test_a_failed_write_ends_its_job_with_what_is_known_and_no_other(
    bench: Bench, fault: Fault, status: TicketStatus
) -> None:
    bad = bench.source.address + 5 * 1024
    bench.faults = lambda write: fault if write.source == bad else None
    bench.write("a", range(0, 32 * 1024, 1024), parts=2)
    bench.write("b", range(32 * 1024, SIZE, 1024))
    results = dict(bench.wait(2))
    assert results["a"].status is status
    assert results["a"].checksums == ()
    assert results["a"].reason
    assert results["b"].status is TicketStatus.DONE
    if fault is not Fault.HANG:  # that it failed is known only after its time-out
        assert bench.target.read(20 * 1024, 1024) == bytes(1024), "writes went on after the failure"


@pytest.mark.parametrize("bench", [PATIENT], indirect=True)
def test_a_hanging_peer_does_not_hold_up_another(bench: Bench) -> None:
    other, memory = LoopbackTransport(), Memory(SIZE)
    other.register(memory.address, SIZE)
    bench.faults = lambda write: (
        None if memory.address <= write.target < memory.address + SIZE else Fault.HANG
    )
    for _ in range(8):
        bench.write("hangs", range(0, SIZE, 1024))
    ends: list[WriteResult] = []
    write = Write(bench.source.address, memory.address, 1024)
    bench.mover.write(WriteJob("fine", other.data_address, partial(plan, [write], []), ends.append))
    while not ends:
        bench.calls.get(timeout=30)()
    assert ends[0].status is TicketStatus.DONE
    assert not bench.ends, "the other did not hang any more"
    other.close()


def test_a_peer_that_does_not_exist_fails_drained(bench: Bench) -> None:
    bench.write("a", [0], peer="loopback:none")
    ((_, result),) = bench.wait(1)
    assert result.status is TicketStatus.FAILED_DRAINED


def test_a_peer_that_does_not_answer_fails_in_time_and_holds_up_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    really_open = bench.near.open

    def open_slowly(address: str) -> Channel:
        if address == "black hole":
            gate.wait(5)
            raise TransferError("test")
        return really_open(address)

    monkeypatch.setattr(bench.near, "open", open_slowly)
    bench.write("lost", [0], peer="black hole")
    bench.write("fine", [0])
    ends = bench.wait(2)
    gate.set()
    assert [(owner, result.status) for owner, result in ends] == [
        ("fine", TicketStatus.DONE),
        ("lost", TicketStatus.FAILED_DRAINED),
    ]


def test_cancelled_jobs_submit_no_more_and_end_drained(bench: Bench) -> None:
    started, gate = threading.Event(), threading.Event()

    def block(write: Write) -> None:
        started.set()
        gate.wait(5)

    bench.faults = block
    bench.write("a", range(0, SIZE, 1024))
    bench.write("a", [0])
    assert started.wait(5)
    bench.mover.cancel("a")
    gate.set()
    results = bench.wait(2)
    assert [result.status for _, result in results] == [TicketStatus.FAILED_DRAINED] * 2
    assert bench.target.read(SIZE - 1024) == bytes(1024)


def test_verification_compares_every_page(bench: Bench) -> None:
    pages = [[(bench.source.address + at, 512), (bench.source.address, 512)] for at in (0, 512)]
    expected = [checksum(page) for page in pages]
    verdicts: list[bool] = []
    bench.mover.verify(VerifyJob("v", pages, expected, verdicts.append))
    bench.mover.verify(VerifyJob("v", pages, [expected[0], 1], verdicts.append))
    bench.mover.verify(VerifyJob("v", pages, expected[:1], verdicts.append))
    for _ in range(3):
        bench.calls.get(timeout=5)()
    assert verdicts == [True, False, False]
    assert bench.mover.num_mismatches == 2


def test_an_idle_mover_does_not_spin(bench: Bench) -> None:
    bench.write("a", [0])
    bench.wait(1)
    before_s = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before_s < 0.1


@pytest.mark.parametrize("call", ["open", "submit", "poll"])
def test_what_escapes_a_call_of_the_transport_stops_the_node(bench: Bench, call: str) -> None:
    def explode(*_: object) -> None:
        raise KeyError("our own fault")

    setattr(bench.near, call, explode)
    bench.write("r", [0])
    deadline_s = time.monotonic() + 5.0
    while not bench.fatal:
        assert time.monotonic() < deadline_s, "the thread died in silence"
        time.sleep(0.005)
    assert isinstance(bench.fatal.pop(), KeyError)
