"""Not one byte changes in a page whose lease has ended: real engines, real processes, real faults.

Two writers are processes; they are stopped in the middle of writes, resumed late, killed, and
replaced while they are stopped, so that a zombie wakes beside its successor. Decode's side runs
here: pages are poisoned when their lease ends and given away again at once, newest first. Once over
Mooncake, where a writer that is lost is fenced by moving away from it, and once through memory that
both map, where only its own word or its death ends a lease.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.memory import Memory, SegmentMemory, make_region
from helpers.writer import INDEX_BYTES, LAYERS, PAGE_BYTES, POISON, config, tag_of

from tidepool.common.clock import MonotonicClock
from tidepool.common.wire import PageRun, SharedMemory
from tidepool.deploy.keeping import find_or_start
from tidepool.hostpool.segment import SharedSegment
from tidepool.transfer import events
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.fencing import DataFence
from tidepool.transfer.importer import Importer
from tidepool.transfer.mover import Mover
from tidepool.transfer.shared_paths import machine_id
from tidepool.transfer.transports import make_tcp

TESTS = Path(__file__).resolve().parents[1]
START_S, RUN_S = 30.0, 16.0
MAX_RUN_S, MAX_SETTLE_S = 240.0, 60.0
"""On a machine that is busy; the run goes on until it has seen enough, and ends when all has ended."""
NUM_PAGES = 64
MAX_QUARANTINE_SHARE = 0.25


class Writer:
    """A writer's processes: the newest incarnation, and older ones that may still be about."""

    def __init__(self, node_id: str, decode: Decode, rng: random.Random) -> None:
        self.node_id, self.decode, self.rng = node_id, decode, rng
        self.epoch = 0
        self.zombies: list[tuple[int, subprocess.Popen[bytes]]] = []
        self.start()

    def start(self) -> None:
        self.epoch += 1
        address = self.decode.control.address
        mode = "shared" if self.decode.is_shared else "wire"
        arguments = (self.node_id, self.epoch, address, self.rng.random(), mode)
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.writer", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def is_at_work(self) -> bool:
        return (self.node_id, self.epoch) in self.decode.met

    def kill(self, epoch: int, process: subprocess.Popen[bytes]) -> None:
        """A proven death ends the leases of that incarnation, if nothing else can."""
        process.kill()
        process.wait(MAX_SETTLE_S)
        if self.decode.is_shared:  # as a Fence of the front: no offer of its comes behind it
            self.decode.control.fence(self.node_id, epoch)
            self.decode.importer.fence(self.node_id, epoch)

    def end(self) -> None:
        for epoch, process in ((self.epoch, self.process), *self.zombies):
            self.kill(epoch, process)
        self.zombies.clear()


class Decode:
    """Importer, engine and pages; the test's thread is the step thread."""

    def __init__(self, rng: random.Random, keeper: Path | None) -> None:
        self.rng = rng
        self.fatal: list[BaseException] = []
        self.is_shared = keeper is not None
        sizes = {size: LAYERS * NUM_PAGES * size for size in (PAGE_BYTES, INDEX_BYTES)}
        self.memories: dict[int, Memory] = {}
        if keeper is None:
            self.memories |= {size: Memory(num_bytes) for size, num_bytes in sizes.items()}
        else:
            self.link = find_or_start(keeper, idle_s=1.0, anchor_pid=os.getpid())
            assert self.link.own(1.0) is None
            names = dict(zip(("kv", "index"), sizes, strict=True))
            parts = {name: sizes[size] for name, size in names.items()}
            segment = SharedSegment.create(parts, identity="test", what="test")
            self.link.hold(segment)
            self.memories |= {size: SegmentMemory(segment, name) for name, size in names.items()}
        kv, index = self.memories.values()
        regions = (
            make_region(kv, "kv", LAYERS, NUM_PAGES, PAGE_BYTES),
            make_region(index, "index", LAYERS, NUM_PAGES, INDEX_BYTES),
        )
        self.transport = make_tcp("127.0.0.1", 1 if self.is_shared else 2)
        for memory in self.memories.values():
            self.transport.register(memory.address, memory.num_bytes)
        self.control = ControlLoop(
            "d",
            "decode",
            1,
            layout_hash="x",
            data_address=self.transport.data_address,
            regions=regions,
            shared=SharedMemory(machine_id(), str(keeper), ("kv", "index")) if keeper else None,
            config=config(),
            on_fatal=self.fatal.append,
        )
        self.mover = Mover(self.transport, config(), self.control.post, on_fatal=self.fatal.append)
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.importer = Importer(
            self.control,
            self.mover,
            regions,
            config(),
            has_checksums=True,
            post_event=self.inbox.put,
            end_reach=lambda reason: self.fence.request(reason, 0.2),
            proof_wait_s=0.2,
        )
        self.fence = DataFence(
            self.transport,
            end_leases=self.importer.end_all,
            set_data_address=self.control.set_data_address,
            post=self.control.post,
            num_receiving=lambda: self.importer.num_receiving,
            clock=MonotonicClock(),
            min_interval_s=0.3,
        )
        self.free = list(range(NUM_PAGES))
        self.poison(self.free)
        self.leases: dict[int, tuple[str, list[int]]] = {}
        self.ready: set[int] = set()
        self.quarantined: set[int] = set()
        self.beyond_reach: set[int] = set()
        """Leases whose writers copy into memory that they map: no forced fence ends them."""
        self.running: list[tuple[float, str, list[int]]] = []
        """Requests whose lease has ended: until when they keep their pages."""
        self.met: set[tuple[str, int]] = set()
        """Incarnations of writers that have offered something."""
        self.tally: Counter[str] = Counter()
        self.mover.start()
        self.control.start(self.importer)

    def stop(self) -> None:
        if self.is_shared:
            self.link.end()
            self.link.close()
        self.control.stop()
        self.fence.stop()
        self.mover.stop()
        self.transport.close()

    @property
    def has_seen_enough(self) -> bool:
        """Whether the run says anything: prompts, lost writers, and what fences them."""
        tally = self.tally
        is_fenced = self.fence.num_fences >= 3 and (tally["shared"] > 100 or not self.is_shared)
        is_lively = tally["ImportReady"] > 100 and tally["LeaseQuarantined"] > 10
        return is_fenced and is_lively and bool(tally["stop"] and tally["zombie"] + tally["kill"])

    def poison(self, pages: list[int]) -> None:
        for size, memory in self.memories.items():
            for layer in range(LAYERS):
                for page in pages:
                    memory.set((layer * NUM_PAGES + page) * size, size, POISON)

    def check(self, pages: list[int], byte: int, what: str) -> None:
        for size, memory in self.memories.items():
            expected = bytes([byte]) * size
            for layer in range(LAYERS):
                for page in pages:
                    found = memory.read((layer * NUM_PAGES + page) * size, size)
                    if found != expected:
                        others = Counter(found).most_common(3)
                        raise AssertionError(f"{what}: page {page} holds {others}, not {byte}")

    def turn(self) -> None:
        """One turn of the step loop."""
        assert not self.fatal, self.fatal
        with contextlib.suppress(queue.Empty):
            for _ in range(64):
                self.on_event(self.inbox.get_nowait())
        now_s = time.monotonic()
        for each in [each for each in self.running if each[0] <= now_s]:
            self.running.remove(each)
            self.check(each[2], tag_of(each[1]), f"{each[1]} ran")
            self.give_back(each[2])
        within_reach = self.quarantined - self.beyond_reach
        num_quarantined = sum(len(self.leases[lease_id][1]) for lease_id in within_reach)
        if num_quarantined > MAX_QUARANTINE_SHARE * NUM_PAGES:
            self.tally["forced"] += self.fence.request("too many pages in quarantine")

    def on_event(self, event: Any) -> None:
        self.tally[type(event).__name__] += 1
        if isinstance(event, events.OfferArrived):
            self.answer(event)
            return
        request_id, pages = self.leases[event.lease_id]
        if isinstance(event, events.ImportReady):
            self.ready.add(event.lease_id)
            self.check(pages, tag_of(request_id), f"{request_id} became ready")
        elif isinstance(event, events.LeaseQuarantined):
            self.quarantined.add(event.lease_id)
        elif isinstance(event, events.LeaseEnded):
            del self.leases[event.lease_id]
            self.quarantined.discard(event.lease_id)
            self.beyond_reach.discard(event.lease_id)
            if event.lease_id in self.ready:
                end_s = time.monotonic() + self.rng.uniform(0, 0.3)
                self.running.append((end_s, request_id, pages))
            else:
                self.give_back(pages)

    def give_back(self, pages: list[int]) -> None:
        self.poison(pages)
        self.free += pages

    def answer(self, event: events.OfferArrived) -> None:
        offer = event.offer
        self.met.add((event.peer.node_id, event.peer.epoch))
        key, count = (offer.request_id, offer.attempt), offer.num_prompt_tokens
        self.tally["shared"] += offer.is_shared
        if len(self.free) < count:
            self.importer.defer(key, 0.02)
            return
        pages = sorted(self.free.pop() for _ in range(count))
        self.check(pages, POISON, f"free pages for {key[0]}")
        runs = [PageRun(page, 1) for page in pages]
        lease_id = self.importer.grant(key, runs, runs, count)
        self.leases[lease_id] = (offer.request_id, pages)
        if offer.is_shared:
            self.beyond_reach.add(lease_id)

    def still_open(self) -> str:
        """What the pages wait for that are not free."""
        machines = {
            lease_id: (lease.machine.key, lease.peer.epoch, lease.is_shared, lease.machine.state)
            for lease_id, lease in self.importer._leases.copy().items()
        }
        return f"{self.leases}, {self.quarantined}, {self.running}, importer: {machines}"


def fault(writer: Writer, rng: random.Random, tally: Counter[str]) -> list[tuple[float, Any]]:
    """Does one thing to a writer; returns what to do later: (after seconds, call)."""
    what = rng.choices(["pause", "stop", "zombie", "kill"], [4, 6, 2, 2])[0]
    tally[what] += 1
    process = writer.process
    if what == "kill":
        writer.kill(writer.epoch, process)
        writer.start()
        return []
    process.send_signal(signal.SIGSTOP)
    if what == "zombie":  # said to be dead, and replaced; wakes up when its successor is at work
        zombie = (writer.epoch, process)
        writer.zombies.append(zombie)
        writer.start()
        wakes_s = rng.uniform(1.5, 2.5)
        todo: list[tuple[float, Any]] = [(wakes_s, lambda: process.send_signal(signal.SIGCONT))]
        if writer.decode.is_shared:  # else nobody could ever tell that it writes no more
            todo.append((wakes_s + 0.5, lambda: writer.kill(*zombie)))
        return todo + forced_fence(writer, wakes_s)
    seconds = rng.uniform(0.05, 0.3) if what == "pause" else rng.uniform(0.6, 1.6)
    todo = [(seconds, lambda: process.send_signal(signal.SIGCONT))]
    return todo if what == "pause" else forced_fence(writer, seconds) + todo


def forced_fence(writer: Writer, wakes_s: float) -> list[tuple[float, Any]]:
    """Just before a writer goes on that is stopped in a copy: its lease must not end by this."""
    if not writer.decode.is_shared:  # there its pages in quarantine force it
        return []
    return [(wakes_s - 0.1, lambda: writer.decode.fence.request("a writer is stopped"))]


@pytest.mark.timeout(START_S + MAX_RUN_S + MAX_SETTLE_S + 60.0)
@pytest.mark.parametrize("path", ["wire", "shared"])
def test_not_one_byte_changes_in_a_page_whose_lease_has_ended(path: str, tmp_path: Path) -> None:
    rng = random.Random(20)
    decode = Decode(rng, tmp_path / "keeper" if path == "shared" else None)
    writers = [Writer(name, decode, rng) for name in ("p0", "p1")]
    later: list[tuple[float, Any]] = []
    try:
        start_s = time.monotonic()
        while decode.tally["ImportReady"] < 10 and time.monotonic() < start_s + START_S:
            decode.turn()
            time.sleep(0.001)
        busy_until_s = {id(writer): time.monotonic() + 0.5 for writer in writers}
        begin_s = time.monotonic()
        while (now_s := time.monotonic()) < begin_s + RUN_S or (
            not decode.has_seen_enough and now_s < begin_s + MAX_RUN_S
        ):
            decode.turn()
            for due in [each for each in later if each[0] <= now_s]:
                later.remove(due)
                due[1]()
            for writer in writers:
                if not writer.is_at_work:  # a busy machine takes seconds to start one
                    busy_until_s[id(writer)] = max(now_s + 0.2, busy_until_s[id(writer)])
                elif now_s >= busy_until_s[id(writer)]:
                    todo = [
                        (now_s + after_s, call)
                        for after_s, call in fault(writer, rng, decode.tally)
                    ]
                    later += todo
                    resumed_s = max([now_s, *(due_s for due_s, _ in todo)])
                    busy_until_s[id(writer)] = resumed_s + rng.uniform(0.2, 1.2)
            time.sleep(0.001)
        for _, call in later:
            call()
        for writer in writers:
            writer.end()
        decode.fence.request("the end")
        settle_s = time.monotonic() + MAX_SETTLE_S
        while len(decode.free) < NUM_PAGES:
            assert time.monotonic() < settle_s, decode.still_open()
            decode.turn()
            decode.fence.request("the end")
            time.sleep(0.01)
        time.sleep(0.3)
        decode.check(list(range(NUM_PAGES)), POISON, "everything is over")
    finally:
        for writer in writers:
            writer.end()
        decode.stop()
    tally = decode.tally
    print(dict(tally), decode.fence.num_fences, decode.fence.last_ms)
    assert decode.fence.num_failed == 0
    assert decode.has_seen_enough, (tally, decode.fence.num_fences)
