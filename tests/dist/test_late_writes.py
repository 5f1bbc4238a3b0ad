"""Not one byte changes in a page whose lease has ended: real engines, real processes, real faults.

Two writers are processes; they are stopped in the middle of writes, resumed late, killed, and
replaced while they are stopped, so that a zombie wakes beside its successor. Decode's side runs
here: pages are poisoned when their lease ends and given away again at once, newest first.
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

from helpers.memory import Memory, make_region
from helpers.writer import INDEX_BYTES, LAYERS, PAGE_BYTES, POISON, config, tag_of

from tidepool.common.clock import MonotonicClock
from tidepool.common.wire import PageRun
from tidepool.transfer import events
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.fencing import DataFence
from tidepool.transfer.importer import Importer
from tidepool.transfer.mooncake import MooncakeTransport
from tidepool.transfer.mover import Mover

TESTS = Path(__file__).resolve().parents[1]
RUN_S = 16.0
NUM_PAGES = 64
MAX_QUARANTINE_SHARE = 0.25


class Writer:
    """A writer's processes: the newest incarnation, and older ones that may still be about."""

    def __init__(self, node_id: str, decode_address: str, rng: random.Random) -> None:
        self.node_id, self.decode_address, self.rng = node_id, decode_address, rng
        self.epoch = 0
        self.zombies: list[subprocess.Popen[bytes]] = []
        self.start()

    def start(self) -> None:
        self.epoch += 1
        arguments = (self.node_id, self.epoch, self.decode_address, self.rng.random())
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.writer", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def end(self) -> None:
        for process in (self.process, *self.zombies):
            process.kill()
            process.wait(10.0)


class Decode:
    """Importer, engine and pages; the test's thread is the step thread."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.memories = {
            PAGE_BYTES: Memory(LAYERS * NUM_PAGES * PAGE_BYTES),
            INDEX_BYTES: Memory(LAYERS * NUM_PAGES * INDEX_BYTES),
        }
        kv, index = self.memories.values()
        regions = (
            make_region(kv, "kv", LAYERS, NUM_PAGES, PAGE_BYTES),
            make_region(index, "index", LAYERS, NUM_PAGES, INDEX_BYTES),
        )
        self.transport = MooncakeTransport("127.0.0.1")
        for memory in self.memories.values():
            self.transport.register(memory.address, memory.num_bytes)
        self.control = ControlLoop(
            "d",
            "decode",
            1,
            layout_hash="x",
            data_address=self.transport.data_address,
            regions=regions,
            config=config(),
        )
        self.mover = Mover(self.transport, config(), self.control.post)
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
        self.running: list[tuple[float, str, list[int]]] = []
        """Requests whose lease has ended: until when they keep their pages."""
        self.tally: Counter[str] = Counter()
        self.mover.start()
        self.control.start(self.importer)

    def stop(self) -> None:
        self.control.stop()
        self.fence.stop()
        self.mover.stop()
        self.transport.close()

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
        with contextlib.suppress(queue.Empty):
            for _ in range(64):
                self.on_event(self.inbox.get_nowait())
        now_s = time.monotonic()
        for each in [each for each in self.running if each[0] <= now_s]:
            self.running.remove(each)
            self.check(each[2], tag_of(each[1]), f"{each[1]} ran")
            self.give_back(each[2])
        num_quarantined = sum(len(self.leases[lease_id][1]) for lease_id in self.quarantined)
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
        key, count = (offer.request_id, offer.attempt), offer.num_prompt_tokens
        if len(self.free) < count:
            self.importer.defer(key, 0.02)
            return
        pages = sorted(self.free.pop() for _ in range(count))
        self.check(pages, POISON, f"free pages for {key[0]}")
        runs = [PageRun(page, 1) for page in pages]
        lease_id = self.importer.grant(key, runs, runs, count)
        self.leases[lease_id] = (offer.request_id, pages)


def fault(writer: Writer, rng: random.Random, tally: Counter[str]) -> list[tuple[float, Any]]:
    """Does one thing to a writer; returns what to do later: (after seconds, call)."""
    what = rng.choices(["pause", "stop", "zombie", "kill"], [4, 6, 2, 2])[0]
    tally[what] += 1
    process = writer.process
    if what == "kill":
        process.kill()
        process.wait(10.0)
        writer.start()
        return []
    process.send_signal(signal.SIGSTOP)
    if what == "zombie":  # said to be dead, and replaced; wakes up when its successor is at work
        writer.zombies.append(process)
        writer.start()
        return [(rng.uniform(1.5, 2.5), lambda: process.send_signal(signal.SIGCONT))]
    seconds = rng.uniform(0.05, 0.3) if what == "pause" else rng.uniform(0.6, 1.6)
    return [(seconds, lambda: process.send_signal(signal.SIGCONT))]


def test_not_one_byte_changes_in_a_page_whose_lease_has_ended() -> None:
    rng = random.Random(20)
    decode = Decode(rng)
    writers = [Writer(name, decode.control.address, rng) for name in ("p0", "p1")]
    later: list[tuple[float, Any]] = []
    busy_until_s = {id(writer): time.monotonic() + 2.5 for writer in writers}
    try:
        end_s = time.monotonic() + RUN_S
        while (now_s := time.monotonic()) < end_s:
            decode.turn()
            for due in [each for each in later if each[0] <= now_s]:
                later.remove(due)
                due[1]()
            for writer in writers:
                if now_s >= busy_until_s[id(writer)] and rng.random() < 0.01:
                    todo = [
                        (now_s + after_s, call)
                        for after_s, call in fault(writer, rng, decode.tally)
                    ]
                    later += todo
                    resumed_s = max([now_s, *(due_s for due_s, _ in todo)])
                    busy_until_s[id(writer)] = resumed_s + rng.uniform(0.2, 0.8)
            time.sleep(0.001)
        for _, call in later:
            call()
        for writer in writers:
            writer.end()
        decode.fence.request("the end")
        settle_s = time.monotonic() + 8.0
        while len(decode.free) < NUM_PAGES:
            assert time.monotonic() < settle_s, (decode.leases, decode.quarantined)
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
    assert decode.fence.num_fences >= 3
    assert tally["ImportReady"] > 100, tally
    assert tally["LeaseQuarantined"] > 10, tally
    assert tally["stop"] and tally["zombie"] + tally["kill"], tally
