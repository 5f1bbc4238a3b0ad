"""A prefill and a decode node's hand-off without sockets: fake loops, a network that loses,
duplicates, reorders and delays, and memory in which a write may land late.

Pages are bytes in a bytearray: a page holds the tag of whoever wrote it last. `World` drives both
ends with a FakeClock and keeps the ledgers that the properties speak of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tidepool.common import wire
from tidepool.common.clock import FakeClock
from tidepool.common.config import TransferSection
from tidepool.common.errors import ProtocolError
from tidepool.transfer import events
from tidepool.transfer.events import ExportRequest, Key
from tidepool.transfer.exporter import Exporter
from tidepool.transfer.importer import Importer
from tidepool.transfer.jobs import Part, VerifyJob, WriteJob, WriteResult
from tidepool.transfer.session import Handler, Peer
from tidepool.transfer.transport import TicketStatus

CONFIG = TransferSection(
    resend_interval_s=1.0, deadline_s=60.0, max_chunk_tries=3, write_timeout_s=5.0
)
NUM_SOURCE_PAGES = 24
NUM_TARGET_PAGES = 24
PAGE_BYTES = 8
TOKEN = wire.OutputToken(token_id=7)


def hello(node_id: str, role: wire.Role, epoch: int, region: wire.Region) -> wire.Hello:
    return wire.Hello(
        protocol_version=wire.PROTOCOL_VERSION,
        node_id=node_id,
        role=role,
        epoch=epoch,
        layout_hash="",
        layout_text="",
        data_address=f"data:{node_id}:{epoch}",
        regions=(region,),
    )


def fake_checksum(part: Part, base: int, tag_of: dict[int, int]) -> int:
    """A value that tells the tags of the part's pages apart, in order."""
    pages = [
        (address + offset - base) // PAGE_BYTES
        for address, num_bytes in part
        for offset in range(0, num_bytes, PAGE_BYTES)
    ]
    return hash(tuple(tag_of[page] for page in pages)) % 2**64


class FakeControl:
    """Implements session.Control; posts run when the world lets them."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.outbox: list[tuple[str, wire.AnyMessage]] = []
        self.posts: list[Callable[[], None]] = []
        self.refusals: dict[str, str] = {}

    def connect(self, node_id: str, address: str) -> None:
        pass

    def send(self, node_id: str, message: wire.AnyMessage) -> None:
        self.outbox.append((node_id, message))

    def post(self, call: Callable[[], None]) -> None:
        self.posts.append(call)

    def refusal(self, node_id: str) -> str | None:
        return self.refusals.get(node_id)

    def run(self) -> None:
        while self.posts:
            self.posts.pop(0)()


class FakeMover:
    """Keeps jobs until the world decides how they end."""

    def __init__(self) -> None:
        self.writes: list[WriteJob] = []
        self.verifies: list[VerifyJob] = []
        self.abandoned: list[str] = []

    def write(self, job: WriteJob) -> None:
        self.writes.append(job)

    def verify(self, job: VerifyJob) -> None:
        self.verifies.append(job)

    def cancel(self, owner: object) -> None:
        pass

    def forget(self, peer_data_address: str) -> None:
        pass

    def abandon(self, peer_data_address: str) -> None:
        self.abandoned.append(peer_data_address)


@dataclass
class Node:
    """One incarnation of one side."""

    peer: Peer
    control: FakeControl
    mover: FakeMover
    handler: Any = None
    log: list[Any] = field(default_factory=list)
    is_up: bool = False
    """Whether it thinks the session is up."""


@dataclass
class LeaseRecord:
    """What a decode node knows of a lease it granted."""

    key: Key
    pages: list[int]
    is_open: bool = True
    outcome: str = ""


class World:
    """See the module. Decode's incarnations share one memory only within an epoch."""

    def __init__(self, config: TransferSection = CONFIG, num_layers: int = 1) -> None:
        """With more layers than one, each is written, announced and verified by itself."""
        self.config = config if num_layers == 1 else dataclasses.replace(config, max_chunk_bytes=1)
        self.num_layers = num_layers
        self.clock = FakeClock(100.0)
        self.epochs = {"p": 0, "d": 0}
        self.wire: list[tuple[Node, Node, wire.AnyMessage]] = []
        """Messages under way: (from, to, message)."""
        self.late_writes: list[tuple[Node, WriteJob, dict[int, int]]] = []
        """(target node, job, slot -> tag) of writes with an unknown outcome."""
        self.protocol_errors: list[str] = []
        self.next_key = 0
        self.num_unknown = 0
        self.generation = 0
        self.start("p")
        self.start("d")

    # ---- nodes ----

    def start(self, name: str) -> None:
        self.epochs[name] += 1
        control = FakeControl(self.clock)
        mover = FakeMover()
        if name == "p":
            region = wire.Region("kv", 1 << 20, self.num_layers, NUM_SOURCE_PAGES, PAGE_BYTES)
            peer = Peer(
                "p", self.epochs[name], "prefill", hello("p", "prefill", self.epochs[name], region)
            )
            node = Node(peer, control, mover)
            node.handler = Exporter(
                control,
                mover,
                [region],
                self.config,
                has_checksums=True,
                post_event=node.log.append,
            )
            self.p = node
            self.free_source = set(range(NUM_SOURCE_PAGES))
            self.source_tag = dict.fromkeys(range(self.num_layers * NUM_SOURCE_PAGES), 0)
            self.jobs: dict[Key, dict[str, Any]] = {}
            self.quarantined_source: set[int] = set()
        else:
            region = wire.Region("kv", 2 << 20, self.num_layers, NUM_TARGET_PAGES, PAGE_BYTES)
            peer = Peer(
                "d", self.epochs[name], "decode", hello("d", "decode", self.epochs[name], region)
            )
            node = Node(peer, control, mover)
            node.handler = Importer(
                control,
                mover,
                [region],
                self.config,
                has_checksums=True,
                post_event=node.log.append,
            )
            self.d = node
            self.free_target = set(range(NUM_TARGET_PAGES))
            self.target_tag = dict.fromkeys(range(self.num_layers * NUM_TARGET_PAGES), 0)
            self.leases: dict[int, LeaseRecord] = {}
            self.undecided: list[events.OfferArrived] = []
            self.expected_tag: dict[Key, int] = getattr(self, "expected_tag", {})

    def side(self, name: str) -> Node:
        return self.p if name == "p" else self.d

    def other(self, node: Node) -> Node:
        return self.d if node is self.p else self.p

    # ---- sessions ----

    def session_down(self, first: str) -> None:
        """Both ends lose the session, `first` before the other; what was under way is lost."""
        self.wire.clear()
        for node in (self.side(first), self.other(self.side(first))):
            if node.is_up:
                node.is_up = False
                node.handler.on_peer_down(self.other(node).peer, "the session is down")
            self.flush(node)
        self.wire.clear()

    def session_up(self, first: str) -> None:
        for node in (self.side(first), self.other(self.side(first))):
            if not node.is_up:
                node.is_up = True
                node.handler.on_peer_up(self.other(node).peer)
            self.flush(node)

    def restart(self, name: str) -> None:
        """kill -9, and a new incarnation; its session comes with session_up.

        A dead prefill cannot write any more: what it had in flight lands before it is fenced.
        """
        dying = self.side(name)
        dead_epoch = self.epochs[name]
        if name == "p":
            for job in list(dying.mover.writes):
                dying.mover.writes.remove(job)
                self.land(self.target_of(job), self.tags_of(job))
            self.late_writes.clear()
        self.session_down("d" if name == "p" else "p")
        self.start(name)
        if name == "p":
            self.fence("p", dead_epoch)

    # ---- moving things along ----

    def flush(self, node: Node) -> None:
        """Runs posts, takes messages onto the wire, and lets the node's step thread react."""
        while node.control.posts or node.control.outbox or node.log:
            node.control.run()
            for _, message in node.control.outbox:
                if node.is_up:
                    self.wire.append((node, self.other(node), message))
            node.control.outbox.clear()
            log, node.log[:] = list(node.log), []
            for event in log:
                (self.on_export if node is self.p else self.on_import)(event)

    def deliver(self, index: int, *, keep: bool = False) -> None:
        """Delivers message `index`; `keep` leaves a duplicate under way."""
        sender, receiver, message = self.wire[index]
        if not keep:
            del self.wire[index]
        frame = wire.encode(wire.Envelope("", 0, 0, message))
        body = wire.decode(frame).body
        is_current = receiver in (self.p, self.d) and sender in (self.p, self.d)
        if is_current and receiver.is_up:
            try:
                assert receiver.handler.on_message(sender.peer, body)
            except ProtocolError as error:
                self.protocol_errors.append(str(error))
            self.flush(receiver)

    def tick(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for node in (self.p, self.d):
            node.handler.on_tick(self.clock.now())
            self.flush(node)

    # ---- memory ----

    def tags_of(self, job: WriteJob) -> dict[int, int]:
        """What the job's writes would put into target slots, were they executed now.

        A slot is a page of a layer: layer * pages + page.
        """
        tags = {}
        for write in job.writes:
            for offset in range(0, write.num_bytes, PAGE_BYTES):
                source = (write.source + offset - (1 << 20)) // PAGE_BYTES
                target = (write.target + offset - (2 << 20)) // PAGE_BYTES
                tags[target] = self.source_tag[source]
        return tags

    def tag_source(self, page: int, tag: int) -> None:
        for layer in range(self.num_layers):
            self.source_tag[layer * NUM_SOURCE_PAGES + page] = tag

    def target_of(self, job: WriteJob) -> Node | None:
        is_alive = job.peer_data_address == self.d.peer.hello.data_address
        return self.d if is_alive else None

    def land(self, target: Node | None, tags: dict[int, int]) -> None:
        """THE property: no write lands in a page after its lease ended."""
        if target is not self.d:
            return
        for slot, tag in tags.items():
            page = slot % NUM_TARGET_PAGES
            holders = [
                lease for lease in self.leases.values() if lease.is_open and page in lease.pages
            ]
            assert len(holders) == 1, f"a write landed in page {page}, held by {holders}"
            assert holders[0].outcome != "ready", f"page {page} was written while its request runs"
            self.target_tag[slot] = tag

    def end_write(self, index: int, status: TicketStatus, *, is_bad: bool = False) -> None:
        job = self.p.mover.writes.pop(index)
        if self.target_of(job) is None and status is TicketStatus.DONE:
            status = TicketStatus.FAILED_UNKNOWN
        tags = self.tags_of(job)
        checksums = tuple(fake_checksum(part, 1 << 20, self.source_tag) for part in job.parts)
        if status is TicketStatus.DONE:
            if is_bad:
                tags = dict.fromkeys(tags, -1)
            self.land(self.target_of(job), tags)
        elif status is TicketStatus.FAILED_UNKNOWN:
            self.num_unknown += self.target_of(job) is self.d
            self.late_writes.append((self.d, job, tags))
            checksums = ()
        else:
            checksums = ()
        job.on_end(WriteResult(status, checksums, "" if status is TicketStatus.DONE else "test"))
        self.flush(self.p)

    def land_late(self, index: int) -> None:
        """The unknown write lands now, with what its source pages hold now."""
        target, job, _ = self.late_writes.pop(index)
        if target is self.d and self.target_of(job) is target:
            self.land(target, self.tags_of(job))

    def verify(self, index: int) -> None:
        job = self.d.mover.verifies.pop(index)
        actual = [fake_checksum(part, 2 << 20, self.target_tag) for part in job.parts]
        job.on_end(actual == list(job.expected))
        self.flush(self.d)

    # ---- prefill's step thread ----

    def offer(self, num_pages: int) -> Key | None:
        if len(self.free_source) < num_pages:
            return None
        self.next_key += 1
        key = (f"r{self.next_key}", 0)
        pages = sorted(self.free_source)[:num_pages]
        self.free_source -= set(pages)
        for page in pages:
            self.tag_source(page, self.next_key * 1000 + page)
        self.jobs[key] = {"pages": pages, "given": 0, "log": [], "committed": False}
        self.expected_tag[key] = self.next_key
        request = ExportRequest(key[0], 0, num_pages, wire.Sampling(max_tokens=1), "f", "d", "addr")
        self.p.handler.offer(request)
        self.flush(self.p)
        return key

    def give_pages(self, key: Key, count: int) -> None:
        job = self.jobs[key]
        first = job["given"]
        pages = job["pages"][first : first + count]
        if pages:
            job["given"] += len(pages)
            self.p.handler.pages_ready(key, first, pages)
            self.flush(self.p)

    def commit(self, key: Key) -> None:
        job = self.jobs[key]
        if job["given"] == len(job["pages"]) and not job["committed"]:
            job["committed"] = True
            self.p.handler.commit(key, TOKEN, (b"\1\0\0\0\2\0\0\0", b"\3\0\0\0"))
            self.flush(self.p)

    def cancel_export(self, key: Key) -> None:
        self.p.handler.cancel(key, "the client is gone")
        self.flush(self.p)

    def on_export(self, event: events.ExportEvent) -> None:
        job = self.jobs[event.key]
        log: list[str] = job["log"]
        kind = type(event).__name__
        if isinstance(event, events.ExportUnquarantined):
            pages = set(job["pages"])
            assert pages <= self.quarantined_source, "not quarantined"
            self.quarantined_source -= pages
            self.free_source |= pages
            return
        assert "ExportReleased" not in log, f"{kind} after ExportReleased"
        ends = ("ExportRefused", "ExportFailed", "ExportDone")
        assert not (kind in ends and set(log) & set(ends)), f"{kind} after {log}"
        if kind == "ExportGranted":
            assert log == []
        log.append(kind)
        if isinstance(event, events.ExportReleased):
            assert set(log) & set(ends), "released before its end"
            assert not any(job_.owner == event.key for job_ in self.p.mover.writes), (
                "still in flight"
            )
            pages = set(job["pages"])
            if event.is_quarantined:
                self.quarantined_source |= pages
            else:
                assert not self.free_source & pages
                self.free_source |= pages
                for page in pages:
                    self.tag_source(page, -2)  # poison: whoever reads it now reads garbage

    # ---- decode's step thread ----

    def on_import(self, event: events.ImportEvent) -> None:
        if isinstance(event, events.OfferArrived):
            self.undecided.append(event)
            return
        lease = self.leases[event.lease_id]
        assert lease.is_open, f"{event} after LeaseEnded"
        if isinstance(event, events.ImportReady):
            assert lease.outcome == ""
            lease.outcome = "ready"
            assert event.first_token == TOKEN
            number = self.expected_tag[lease.key]
            got = [
                self.target_tag[layer * NUM_TARGET_PAGES + page] // 1000
                for page in lease.pages
                for layer in range(self.num_layers)
            ]
            assert got == [number] * len(got), f"ready with pages of {got}, not {number}"
        elif isinstance(event, events.ImportFailed):
            assert lease.outcome == ""
            lease.outcome = "failed"
        elif isinstance(event, events.LeaseEnded):
            assert lease.outcome, "a lease ended without an outcome"
            lease.is_open = False
            assert not self.free_target & set(lease.pages)
            self.free_target |= set(lease.pages)

    def decide(self, index: int, answer: str) -> None:
        arrived = self.undecided.pop(index)
        key = (arrived.offer.request_id, arrived.offer.attempt)
        num_pages = arrived.offer.num_prompt_tokens
        if answer == "grant" and len(self.free_target) >= num_pages:
            pages = sorted(self.free_target)[-num_pages:]
            self.free_target -= set(pages)
            runs = [wire.PageRun(page, 1) for page in pages]
            lease_id = self.d.handler.grant(key, runs, [], num_pages)
            assert lease_id not in self.leases
            self.leases[lease_id] = LeaseRecord(key, pages)
        elif answer == "refuse":
            self.d.handler.refuse(key, "test", 400, "test")
        else:
            self.d.handler.defer(key, 0.5)
        self.flush(self.d)

    def cancel_import(self, key: Key) -> None:
        self.d.handler.cancel(key, "the client is gone")
        self.flush(self.d)

    def fence(self, which: str, epoch: int) -> None:
        node = self.d if which == "p" else self.p
        node.handler.fence(which, epoch)
        self.flush(node)

    def fence_data(self, *, is_noticed: bool = True) -> None:
        """Decode closes its data address: no write for it lands any more; then peers hear.

        `is_noticed`: writes under way fail before prefill hears of it; else they end later.
        """
        self.d.handler.end_all("fenced by the test")
        self.flush(self.d)
        self.generation += 1
        fresh = f"data:d:{self.epochs['d']}:{self.generation}"
        self.d.peer = dataclasses.replace(
            self.d.peer, hello=msgspec.structs.replace(self.d.peer.hello, data_address=fresh)
        )
        for job in list(self.p.mover.writes):
            if is_noticed and self.target_of(job) is None:
                self.p.mover.writes.remove(job)
                job.on_end(WriteResult(TicketStatus.FAILED_UNKNOWN, (), "fenced"))
        self.num_unknown = 0
        self.session_down("d")
        self.session_up("p")

    # ---- what must hold ----

    def check(self) -> None:
        held = [page for lease in self.leases.values() if lease.is_open for page in lease.pages]
        assert len(held) == len(set(held))
        assert self.free_target | set(held) == set(range(NUM_TARGET_PAGES))
        busy = [
            page
            for job in self.jobs.values()
            if "ExportReleased" not in job["log"]
            for page in job["pages"]
        ]
        assert self.free_source | set(busy) | self.quarantined_source == set(
            range(NUM_SOURCE_PAGES)
        )

    def settle(self, rounds: int = 60) -> None:
        """A healthy network from now on: everything that can end does."""
        self.session_up("p")
        for _ in range(rounds):
            while self.p.mover.writes:
                self.end_write(0, TicketStatus.DONE)
            while self.undecided:
                self.decide(0, "grant")
            for key, job in list(self.jobs.items()):
                if "ExportReleased" not in job["log"] and job["log"]:
                    self.give_pages(key, 99)
                    self.commit(key)
            while self.d.mover.verifies:
                self.verify(0)
            while self.wire:
                self.deliver(0)
            self.tick(1.0)
            self.check()
        assert not self.p.mover.writes


def as_handler(world: World) -> tuple[Handler, Handler]:
    """mypy's proof that both ends are handlers."""
    exporter: Exporter = world.p.handler
    importer: Importer = world.d.handler
    return exporter, importer
