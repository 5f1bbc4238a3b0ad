"""Exporter and importer over real control loops, movers and transports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.memory import Memory, make_region

from tidepool.common import wire
from tidepool.common.config import TransferSection
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.events import (
    ExportDone,
    ExportFailed,
    ExportGranted,
    ExportReleased,
    ExportRequest,
    ImportFailed,
    ImportReady,
    LeaseEnded,
    LeaseQuarantined,
    OfferArrived,
)
from tidepool.transfer.exporter import Exporter
from tidepool.transfer.importer import Importer
from tidepool.transfer.loopback import Fault, LoopbackTransport
from tidepool.transfer.mooncake import MooncakeTransport
from tidepool.transfer.mover import Mover
from tidepool.transfer.transport import Transport, Write

LAYERS, INDEX_LAYERS, PAGES, PAGE_BYTES, INDEX_BYTES = 3, 2, 32, 1152, 132
CONFIG = TransferSection(
    heartbeat_interval_s=0.05,
    heartbeat_timeout_s=0.5,
    resend_interval_s=0.1,
    write_timeout_s=0.5,
    max_write_bytes=4000,
)
TOKEN = wire.OutputToken(5)


class End:
    """One node: memory, transport, mover, loop, and its events."""

    def __init__(self, node_id: str, role: wire.Role, transport: Transport, epoch: int = 1) -> None:
        self.kv = Memory(LAYERS * PAGES * PAGE_BYTES)
        self.index = Memory(INDEX_LAYERS * PAGES * INDEX_BYTES)
        self.regions = (
            make_region(self.kv, "kv", LAYERS, PAGES, PAGE_BYTES),
            make_region(self.index, "index", INDEX_LAYERS, PAGES, INDEX_BYTES),
        )
        self.transport = transport
        for memory in (self.kv, self.index):
            transport.register(memory.address, memory.num_bytes)
        self.control = ControlLoop(
            node_id,
            role,
            epoch,
            layout_hash="x",
            data_address=transport.data_address,
            regions=self.regions,
            config=CONFIG,
        )
        self.mover = Mover(transport, CONFIG, self.control.post)
        self.events: list[Any] = []
        make: Any = Exporter if role == "prefill" else Importer
        self.side: Any = make(
            self.control,
            self.mover,
            self.regions,
            CONFIG,
            has_checksums=True,
            post_event=self.events.append,
        )
        self.mover.start()
        self.control.start(self.side)

    def stop(self) -> None:
        self.control.stop()
        self.mover.stop()
        self.transport.close()

    def page(self, kv_page: int, index_page: int) -> list[bytes]:
        parts = [
            self.kv.read((layer * PAGES + kv_page) * PAGE_BYTES, PAGE_BYTES)
            for layer in range(LAYERS)
        ]
        return parts + [
            self.index.read((layer * PAGES + index_page) * INDEX_BYTES, INDEX_BYTES)
            for layer in range(INDEX_LAYERS)
        ]


def wait_for(condition: Callable[[], Any], timeout_s: float = 8.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.003)
    return found


def find(end: End, kind: type) -> Any:
    return next((each for each in list(end.events) if isinstance(each, kind)), None)


class Link:
    """A prefill p, a decode d, and one request r."""

    def __init__(self, make: Callable[..., Transport]) -> None:
        self.fault: Callable[[Write], Fault | None] = lambda write: None
        if make is LoopbackTransport:
            transport: Transport = LoopbackTransport(self.choose_fault)
        else:
            transport = make()
        self.p = End("p", "prefill", transport)
        self.d = End("d", "decode", make())
        self.p.kv.fill(1)
        self.p.index.fill(2)
        self.key = ("r", 0)
        self.source_pages = [3, 4, 5, 9, 8, 20]
        self.target_pages = [10, 11, 12, 13, 2, 3]
        self.lease_id = 0

    def choose_fault(self, write: Write) -> Fault | None:
        return self.fault(write)

    def offer(self) -> None:
        address = self.d.control.address
        self.p.side.offer(ExportRequest("r", 0, 6, wire.Sampling(max_tokens=1), "f", "d", address))

    def grant(self) -> None:
        self.offer()
        wait_for(lambda: find(self.d, OfferArrived))
        self.lease_id = self.d.side.grant(
            self.key,
            [wire.PageRun(10, 4), wire.PageRun(2, 2)],
            [wire.PageRun(25, 6)],
            6,
        )
        wait_for(lambda: find(self.p, ExportGranted))

    def stream(self) -> None:
        self.p.side.pages_ready(self.key, 0, self.source_pages[:4])
        self.p.side.pages_ready(self.key, 4, self.source_pages[4:])
        self.p.side.commit(self.key, TOKEN, (b"\1\0\0\0", b"\2\0\0\0\3\0\0\0"))

    def stop(self) -> None:
        self.p.stop()
        self.d.stop()


def mooncake() -> Transport:
    return MooncakeTransport("127.0.0.1")


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link(LoopbackTransport)
    yield link
    link.stop()


@pytest.mark.parametrize("make", [LoopbackTransport, mooncake])
def test_a_prompt_arrives_whole_and_both_sides_let_go(make: Callable[..., Transport]) -> None:
    link = Link(make)
    try:
        link.grant()
        link.stream()
        wait_for(lambda: find(link.d, LeaseEnded))
        wait_for(lambda: find(link.p, ExportReleased))
        assert find(link.d, ImportReady) == ImportReady(
            link.key, link.lease_id, TOKEN, (b"\1\0\0\0", b"\2\0\0\0\3\0\0\0")
        )
        assert [type(each) for each in link.p.events] == [ExportGranted, ExportDone, ExportReleased]
        assert find(link.p, ExportReleased).is_quarantined is False
        for index, (source, target) in enumerate(
            zip(link.source_pages, link.target_pages, strict=True)
        ):
            assert link.d.page(target, 25 + index) == link.p.page(source, source)
        wait_for(lambda: link.p.side.num_transfers == 0 and link.d.side.num_leases == 0)
    finally:
        link.stop()


def test_bytes_that_arrive_wrong_are_written_again(link: Link) -> None:
    faults = iter([Fault.CORRUPT, Fault.CORRUPT])
    link.fault = lambda write: next(faults, None)
    link.grant()
    link.stream()
    wait_for(lambda: find(link.d, ImportReady))
    assert link.d.mover.num_mismatches >= 1
    assert link.d.page(10, 25) == link.p.page(3, 3)
    wait_for(lambda: find(link.p, ExportReleased))


def test_bytes_that_stay_wrong_fail_the_attempt_and_end_the_lease(link: Link) -> None:
    link.fault = lambda write: Fault.CORRUPT
    link.grant()
    link.stream()
    failed = wait_for(lambda: find(link.p, ExportFailed))
    assert f"wrong {CONFIG.max_chunk_tries} times" in failed.reason
    wait_for(lambda: find(link.d, LeaseEnded))
    assert not find(link.d, ImportReady)
    assert find(link.d, ImportFailed)


def test_a_failed_write_with_nothing_in_flight_ends_the_lease(link: Link) -> None:
    link.fault = lambda write: Fault.FAIL_DRAINED
    link.grant()
    link.stream()
    assert wait_for(lambda: find(link.p, ExportReleased)).is_quarantined is False
    wait_for(lambda: find(link.d, LeaseEnded))
    assert find(link.d, ImportFailed)


def test_a_write_of_unknown_outcome_keeps_the_lease_until_its_writer_is_fenced(link: Link) -> None:
    hangs = iter([Fault.HANG])
    link.fault = lambda write: next(hangs, None)
    link.grant()
    link.stream()
    assert wait_for(lambda: find(link.p, ExportReleased)).is_quarantined is True
    wait_for(lambda: find(link.d, LeaseQuarantined))
    time.sleep(0.5)
    assert not find(link.d, LeaseEnded)
    link.d.side.fence("p", 1)
    assert wait_for(lambda: find(link.d, LeaseEnded)) == LeaseEnded(link.lease_id)


def test_a_client_that_leaves_frees_both_sides(link: Link) -> None:
    link.grant()
    link.p.side.pages_ready(link.key, 0, link.source_pages[:4])
    link.p.side.cancel(link.key, "the client is gone")
    wait_for(lambda: find(link.p, ExportReleased))
    wait_for(lambda: find(link.d, LeaseEnded))
    assert find(link.d, ImportFailed)


def test_decode_can_give_up_while_receiving(link: Link) -> None:
    link.grant()
    link.d.side.cancel(link.key, "no more")
    assert "no more" in wait_for(lambda: find(link.p, ExportFailed)).reason
    wait_for(lambda: find(link.d, LeaseEnded))


def test_a_deferred_offer_is_made_again(link: Link) -> None:
    link.offer()
    wait_for(lambda: find(link.d, OfferArrived))
    link.d.side.defer(link.key, 0.05)
    wait_for(lambda: len(link.d.events) == 2)
    link.d.side.refuse(link.key, "too long", 400, "context_length_exceeded")
    wait_for(lambda: find(link.p, ExportReleased))
    refused = link.p.events[0]
    assert (refused.status, refused.code) == (400, "context_length_exceeded")


def test_a_lost_session_fails_what_is_under_way_and_drains_on_the_next_one(link: Link) -> None:
    link.grant()
    link.p.side.pages_ready(link.key, 0, link.source_pages[:4])
    control = link.d.control
    control.post(lambda: control._end(control._sessions["p"], "cut by the test"))
    wait_for(lambda: find(link.p, ExportFailed))
    wait_for(lambda: find(link.d, LeaseQuarantined))
    wait_for(lambda: find(link.d, LeaseEnded))


def test_leases_of_a_prefill_that_was_replaced_end_once_its_death_is_proven(link: Link) -> None:
    link.grant()
    link.p.stop()
    wait_for(lambda: find(link.d, LeaseQuarantined))
    assert not find(link.d, LeaseEnded)
    again = End("p", "prefill", LoopbackTransport(), epoch=2)
    try:
        again.control.connect("d", link.d.control.address)
        wait_for(lambda: again.control.peer("d"))
        assert not find(link.d, LeaseEnded)
        link.d.side.fence("p", 2)
        link.d.side.fence("p", 1)
        wait_for(lambda: find(link.d, LeaseEnded))
    finally:
        again.stop()


def test_a_decode_that_dies_fails_the_attempt_and_frees_the_source(link: Link) -> None:
    link.grant()
    link.p.side.pages_ready(link.key, 0, link.source_pages[:4])
    link.d.stop()
    wait_for(lambda: find(link.p, ExportFailed))
    wait_for(lambda: find(link.p, ExportReleased))
