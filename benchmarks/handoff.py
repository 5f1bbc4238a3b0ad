"""How fast does a prompt's KV go from a prefill process to a decode process?

    python benchmarks/handoff.py --out docs/reports
    python benchmarks/handoff.py --device cuda --pool-pages 2048 --out docs/reports
    python benchmarks/handoff.py --device cuda --pool-pages 2048 --path shared --out docs/reports

Two processes on this machine with the hand-off as nodes run it (control loops, exporter, importer,
movers, Mooncake over TCP) and no model. Prompts of TOKENS tokens of DeepSeek-V3.2's layout: --layers
layers of KV rows (656 B, or 1152 B) and of indexer keys (132 B), in pages of 64 tokens. With --device
cuda prefill's pages lie on a GPU; with --path shared decode's lie in a segment that prefill maps.

* Rate: from the moment all pages are ready to the moment prefill knows that decode has verified
  them; GB/s, writes and bytes a write, with checksums and without, on the pages that a soak of the
  pools leaves (one run; the median, 95th percentile and worst number of runs). In the same run and
  round by round beside it, between the same two processes: the bare engine with 1 MiB blocks, the
  bare engine with the same writes, and a plain socket (8 MiB sends, one connection).
* Overlap: a prompt of LONG_TOKENS tokens in chunks of --chunk tokens, each ready when the one before
  has had 1.3 times its transfer time; from the last one's being ready to READY on decode, in
  transfer times of a chunk.

Figures are medians of --rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import mmap
import multiprocessing
import os
import queue
import random
import socket
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tidepool.common import wire
from tidepool.common.config import TransferSection
from tidepool.deploy.keeping import find_or_start
from tidepool.hostpool.mirror import HostMirror
from tidepool.hostpool.pages import OwnerKind, PageAllocator, PageLease
from tidepool.hostpool.segment import SharedSegment
from tidepool.kernels.copy_blocks import BlockCopier
from tidepool.prefill_node.borrowing import BorrowedMemory
from tidepool.prefill_node.exporting import ComputedPages
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.events import (
    ExportDone,
    ExportGranted,
    ExportReleased,
    ExportRequest,
    ImportReady,
    OfferArrived,
)
from tidepool.transfer.exporter import Exporter
from tidepool.transfer.importer import Importer
from tidepool.transfer.memory_copies import (
    DEVICE_BATCH_BYTES,
    MemoryTransport,
    RoutedTransport,
)
from tidepool.transfer.mooncake import MooncakeTransport
from tidepool.transfer.mover import Mover
from tidepool.transfer.pages import plan_writes
from tidepool.transfer.shared_paths import SharedPaths, machine_id
from tidepool.transfer.transport import TicketStatus, Transport, Write

HOST = "127.0.0.1"
PAGE_SIZE, INDEX_TOKEN_BYTES = 64, 132
TOKENS, LONG_TOKENS = 8192, 32768
MAX_PROMPTS, SOAK_STEPS = 8, 6000
COMPUTE_SHARE = 1.3
"""A chunk's compute time, in transfer times of a chunk."""
SOCKET_BYTES = 8 << 20
TOKEN = wire.OutputToken(5)


@dataclass(frozen=True)
class Setup:
    """What is measured."""

    layers: int
    row_bytes: int
    device: str
    path: str
    pool_pages: int
    source_pages: int = 1024

    @property
    def page_bytes(self) -> dict[str, int]:
        return {"kv": PAGE_SIZE * self.row_bytes, "index": PAGE_SIZE * INDEX_TOKEN_BYTES}


@dataclass(frozen=True)
class Case:
    """One table row: which pages, which checksums."""

    pages: str
    has_checksums: bool


def probes(num_pages: int, max_live: int) -> Iterator[list[int]]:
    """Pages that a request of TOKENS tokens gets while a pool is in use.

    Requests of log-normal length (median 3,500 tokens) come and, when the pool or `max_live` is
    full, one chosen at random goes.
    """
    chance = random.Random(1)
    allocator = PageAllocator(num_pages)
    live: list[PageLease] = []
    for step in range(SOAK_STEPS):
        count = max(1, min(num_pages // 4, int(chance.lognormvariate(4.0, 1.2))))
        while len(live) >= max_live or count > allocator.num_free:
            live.pop(chance.randrange(len(live))).release(OwnerKind.REQUEST)
        lease = allocator.try_acquire(count, OwnerKind.REQUEST)
        assert lease is not None
        live.append(lease)
        probe = allocator.try_acquire(TOKENS // PAGE_SIZE, OwnerKind.REQUEST)
        if probe is not None and step > SOAK_STEPS // 2:
            yield probe.pages
        if probe is not None:
            probe.release(OwnerKind.REQUEST)


def soak(setup: Setup) -> dict[str, tuple[list[int], list[int]]]:
    """(source pages, target pages): one run, and what soaks of both pools leave.

    Decode's pool is full but for a request; prefill's holds at most MAX_PROMPTS prompts.
    """
    source = sorted(probes(setup.source_pages, MAX_PROMPTS), key=num_runs)
    target = sorted(probes(setup.pool_pages, setup.pool_pages), key=num_runs)
    plain = list(range(TOKENS // PAGE_SIZE))
    plans = {"one run": (plain, plain)}
    for name, share in (("median", 0.5), ("95th percentile", 0.95), ("worst", 1.0)):
        plans[name] = tuple(  # type: ignore[assignment]
            pages[min(int(len(pages) * share), len(pages) - 1)] for pages in (source, target)
        )
    return plans


def num_runs(pages: list[int]) -> int:
    return 1 + sum(b != a + 1 for a, b in itertools.pairwise(pages))


class End:
    """One node's side of the hand-off, without engines."""

    def __init__(self, role: wire.Role, setup: Setup, *, has_checksums: bool) -> None:
        self.mirrors: tuple[HostMirror, ...] = ()
        self.extra: dict[str, Any] = {}
        shared = None
        transport = MooncakeTransport(HOST)
        if role == "prefill":
            device = torch.device(setup.device)
            copier = BlockCopier(device)
            self.mirrors = self._prefill_pools(setup, device, copier)
            memory = MemoryTransport()
            if device.type == "cuda":
                memory = MemoryTransport(copier.copy, DEVICE_BATCH_BYTES)
            self.transport: Transport = RoutedTransport(transport, memory)
            self.regions = tuple(mirror.region() for mirror in self.mirrors)
        else:
            self.transport = transport
            self.regions, shared = self._decode_pools(setup)
        for region in self.regions:
            num_bytes = region.num_layers * region.num_pages * region.page_bytes
            self.transport.register(region.base_address, num_bytes)
        self.config = TransferSection(checksums="on" if has_checksums else "off")
        self.control = ControlLoop(
            role,
            role,
            time.time_ns(),
            layout_hash="benchmark",
            data_address=self.transport.data_address,
            regions=self.regions,
            shared=shared,
            config=self.config,
        )
        if role == "prefill":
            borrow = partial(BorrowedMemory, device=device)
            self.paths = SharedPaths(machine_id(), borrow, self.control.post)
            self.extra["paths"] = self.paths if setup.path == "shared" else None
            self.extra["direct_regions"] = [mirror.device_region() for mirror in self.mirrors]
        self.mover = Mover(self.transport, self.config, self.control.post)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        kind: Any = Exporter if role == "prefill" else Importer
        self.side: Any = kind(
            self.control,
            self.mover,
            self.regions,
            self.config,
            has_checksums=has_checksums,
            post_event=self.events.put,
            **self.extra,
        )
        self.mover.start()
        self.control.start(self.side)

    def _prefill_pools(
        self, setup: Setup, device: torch.device, copier: BlockCopier
    ) -> tuple[HostMirror, ...]:
        mirrors = []
        for name, page_bytes in setup.page_bytes.items():
            num_bytes = setup.layers * setup.source_pages * page_bytes
            if device.type == "cpu":
                data = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
            else:
                data = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            by_page = data.view(setup.layers, setup.source_pages, page_bytes)
            mirrors.append(HostMirror(name, by_page, copier))  # type: ignore[arg-type]
        return tuple(mirrors)

    def _decode_pools(
        self, setup: Setup
    ) -> tuple[tuple[wire.Region, ...], wire.SharedMemory | None]:
        sizes = {
            name: setup.layers * setup.pool_pages * page_bytes
            for name, page_bytes in setup.page_bytes.items()
        }
        segment = SharedSegment.create(sizes, identity="benchmark", what="benchmark")
        self.memory = [segment.part(name) for name in sizes]
        shared = None
        if setup.path == "shared":
            path = Path(tempfile.mkdtemp()) / "keeper"
            self.link = find_or_start(path, idle_s=1.0, anchor_pid=os.getpid())
            self.link.own(1.0)
            self.link.hold(segment)
            shared = wire.SharedMemory(machine_id(), str(path), tuple(sizes))  # type: ignore[arg-type]
        regions = tuple(
            wire.Region(name, memory.data_ptr(), setup.layers, setup.pool_pages, page_bytes)  # type: ignore[arg-type]
            for memory, (name, page_bytes) in zip(
                self.memory, setup.page_bytes.items(), strict=True
            )
        )
        return regions, shared

    def give(self, key: tuple[str, int], first: int, pages: list[int]) -> None:
        """As a prefill node's hand-off does."""
        source = None if self.mirrors[0].is_device else ComputedPages(self.mirrors)
        self.side.pages_ready(key, first, pages, source)

    def wait_for(self, kind: type) -> Any:
        while not isinstance(event := self.events.get(timeout=60), kind):
            pass
        return event


def serve_decode(pipe: Connection, setup: Setup, has_checksums: bool) -> None:
    """The decode process: grants what the pipe says, and tells when a request is READY."""
    end = End("decode", setup, has_checksums=has_checksums)
    sink = socket.create_server((HOST, 0))
    threading.Thread(target=drain, args=(sink,), daemon=True).start()
    port = sink.getsockname()[1]
    pipe.send((end.control.address, end.transport.data_address, end.regions, port))
    while (pages := pipe.recv()) is not None:
        offer = end.wait_for(OfferArrived).offer
        runs = tuple(wire.PageRun(page, 1) for page in pages)
        end.side.grant((offer.request_id, offer.attempt), runs, runs, len(pages))
        end.wait_for(ImportReady)
        pipe.send(time.monotonic())
    os._exit(0)  # the mapping is still exported through ctypes


def drain(server: socket.socket) -> None:
    """Reads whatever comes; one byte back for each SOCKET_BYTES."""
    buffer = bytearray(SOCKET_BYTES)
    while True:
        connection, _ = server.accept()
        while True:
            got = 0
            while got < SOCKET_BYTES:
                count = connection.recv_into(memoryview(buffer)[got:])
                if count == 0:
                    break
                got += count
            if got < SOCKET_BYTES:
                break
            connection.send(b".")


class Bench:
    """The prefill process, and what it knows of the other."""

    def __init__(self, setup: Setup, *, has_checksums: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.peer = context.Process(target=serve_decode, args=(theirs, setup, has_checksums))
        self.peer.start()
        self.end = End("prefill", setup, has_checksums=has_checksums)
        self.address, data_address, self.their_regions, port = self.pipe.recv()
        self.target = self.their_regions[0].base_address
        self.channel = self.end.transport.open(data_address)
        self.socket = socket.create_connection((HOST, port))
        self.number = 0
        self.is_device_registered = False
        if setup.path == "shared":
            self.end.control.connect("decode", self.address)
            while not self.end.paths.num_opened:
                time.sleep(0.01)
        self.page_bytes = sum(each.num_layers * each.page_bytes for each in self.end.regions)

    def close(self) -> None:
        self.pipe.send(None)
        self.peer.join(20)
        self.end.control.stop()
        self.end.mover.stop()
        self.end.transport.close()
        for mirror in self.end.mirrors:
            mirror.close()

    def offer(self, target_pages: list[int], num_tokens: int) -> tuple[str, int]:
        self.number += 1
        key = (str(self.number), 0)
        self.pipe.send(target_pages)
        sampling = wire.Sampling(max_tokens=1)
        self.end.side.offer(
            ExportRequest(*key, num_tokens, sampling, "front", "decode", self.address)
        )
        self.end.wait_for(ExportGranted)
        return key

    def send(self, source_pages: list[int], target_pages: list[int]) -> float:
        """Seconds until prefill knows that all pages are verified; all are ready at once."""
        key = self.offer(target_pages, len(source_pages) * PAGE_SIZE)
        begin = time.perf_counter()
        self.end.give(key, 0, source_pages)
        self.end.side.commit(key, TOKEN)
        self.end.wait_for(ExportDone)
        took = time.perf_counter() - begin
        self.finish()
        return took

    def send_chunks(
        self, num_pages: int, chunk_pages: int, compute_s: float
    ) -> tuple[float, float]:
        """(seconds from the last chunk's being ready to READY, seconds from the first one's)."""
        pages = list(range(num_pages))
        key = self.offer(pages, num_pages * PAGE_SIZE)
        first_s = time.monotonic()
        for first in range(0, num_pages, chunk_pages):
            if first:
                time.sleep(compute_s)
            last_s = time.monotonic()
            self.end.give(key, first, pages[first : first + chunk_pages])
        self.end.side.commit(key, TOKEN)
        ready_s = self.pipe.recv()
        self.end.wait_for(ExportReleased)
        return ready_s - last_s, ready_s - first_s

    def finish(self) -> None:
        self.end.wait_for(ExportReleased)
        self.pipe.recv()

    def raw(
        self, num_bytes: int, block: int = 1 << 20, in_flight: int = 8, source: int = 0
    ) -> float:
        """Seconds the bare engine takes for `num_bytes` in blocks; from host memory by default."""
        source = source or self.end.regions[0].base_address
        return self.raw_writes(
            [
                Write(source + at, self.target + at, min(block, num_bytes - at))
                for at in range(0, num_bytes, block)
            ],
            in_flight,
        )

    def raw_writes(self, planned: list[Write], in_flight: int = 16) -> float:
        """Seconds the bare engine takes for just these writes, each with a ticket of its own."""
        writes, flying = deque(planned), deque[Any]()
        transport = self.end.transport
        begin = time.perf_counter()
        while writes or flying:
            while writes and len(flying) < in_flight:
                flying.append(transport.submit(self.channel, [writes.popleft()]))
            status = transport.poll(flying[0])
            if status is TicketStatus.DONE:
                flying.popleft()
            elif status is TicketStatus.PENDING:
                time.sleep(0.0001)
            else:
                raise RuntimeError(f"a write ended {status.value}")
        return time.perf_counter() - begin

    def plan(self, source: list[int], target: list[int]) -> list[Write]:
        """The writes of a request, as the exporter plans them for the wire."""
        return [
            write
            for own, theirs in zip(self.end.regions, self.their_regions, strict=True)
            for write in plan_writes(own, theirs, source, target, self.end.config.max_write_bytes)
        ]

    def raw_from_device(self, num_bytes: int) -> float:
        """Seconds the bare engine takes from GPU memory."""
        region = self.end.mirrors[0].device_region()
        if not self.is_device_registered:
            self.is_device_registered = True
            size = region.num_layers * region.num_pages * region.page_bytes
            self.end.transport.register(region.base_address, size)
        return self.raw(num_bytes, source=region.base_address)

    def plain(self, num_bytes: int) -> float:
        """Seconds for a plain socket, acknowledged each SOCKET_BYTES, two under way."""
        base = self.end.regions[0].base_address
        view = memoryview((ctypes.c_char * num_bytes).from_address(base)).cast("B")
        begin = time.perf_counter()
        blocks = num_bytes // SOCKET_BYTES
        for number in range(blocks):
            self.socket.sendall(view[number * SOCKET_BYTES : (number + 1) * SOCKET_BYTES])
            if number:
                self.socket.recv(1)
        self.socket.recv(1)
        return (time.perf_counter() - begin) * num_bytes / (blocks * SOCKET_BYTES)


def rates(
    setup: Setup, rounds: int, checksums: str, names: list[str] | None
) -> list[dict[str, Any]]:
    """One entry for each kind of pages and of checksums."""
    rows: dict[Case, dict[str, Any]] = {}
    plans = soak(setup)
    choices = {"off": (False,), "on": (True,), "both": (False, True)}[checksums]
    for has_checksums in choices if setup.path == "wire" else (False,):
        bench = Bench(setup, has_checksums=has_checksums)
        num_bytes = TOKENS // PAGE_SIZE * bench.page_bytes
        for name, (source, target) in plans.items():
            if names is not None and name not in names:
                continue
            touch(bench.end.mirrors, source)
            bench.send(source, target)
            bench.raw(num_bytes)
            ours, raw, plain, direct, same = [], [], [], [], []
            writes = bench.plan(source, target)
            for _ in range(rounds):
                raw.append(num_bytes / bench.raw(num_bytes) / 1e9)
                ours.append(num_bytes / bench.send(source, target) / 1e9)
                same.append(num_bytes / bench.raw_writes(writes) / 1e9)
                plain.append(num_bytes / bench.plain(num_bytes) / 1e9)
                if setup.device == "cuda" and setup.path == "wire":
                    direct.append(num_bytes / bench.raw_from_device(num_bytes) / 1e9)
            rows[Case(name, has_checksums)] = {
                **asdict(setup),
                **asdict(Case(name, has_checksums)),
                "runs": [num_runs(source), num_runs(target)],
                "writes": len(writes),
                "bytes_a_write": num_bytes // len(writes),
                "gb_s": statistics.median(ours),
                "raw_gb_s": statistics.median(raw),
                "socket_gb_s": statistics.median(plain),
                "direct_gb_s": statistics.median(direct) if direct else None,
                "same_writes_gb_s": statistics.median(same),
                "of_raw": statistics.median(a / b for a, b in zip(ours, raw, strict=True)),
                "all": [ours, raw, plain],
            }
            print(
                json.dumps(
                    {k: v for k, v in rows[Case(name, has_checksums)].items() if k != "all"}
                ),
                flush=True,
            )
        bench.close()
    return list(rows.values())


def touch(mirrors: tuple[HostMirror, ...], pages: list[int]) -> None:
    """Gives each page of the source bytes of its own."""
    for mirror in mirrors:
        for page in pages:
            mirror._device_LPX[:, page] = page % 255


def overlap(setup: Setup, chunk_tokens: int, rounds: int) -> dict[str, Any]:
    """How long after the last chunk a long prompt is READY, in transfer times of a chunk."""
    bench = Bench(setup, has_checksums=setup.path == "wire")
    num_pages, chunk_pages = LONG_TOKENS // PAGE_SIZE, chunk_tokens // PAGE_SIZE
    touch(bench.end.mirrors, list(range(num_pages)))
    bench.send_chunks(num_pages, chunk_pages, 0.0)
    tails = []
    for _ in range(rounds):
        _, whole_s = bench.send_chunks(num_pages, chunk_pages, 0.0)
        chunk_s = whole_s * chunk_pages / num_pages
        tail_s, _ = bench.send_chunks(num_pages, chunk_pages, COMPUTE_SHARE * chunk_s)
        tails.append((tail_s / chunk_s, tail_s, chunk_s))
    bench.close()
    ratio, tail_s, chunk_s = sorted(tails)[len(tails) // 2]
    return {
        **asdict(setup),
        "chunk_tokens": chunk_tokens,
        "chunk_mb": chunk_pages * bench.page_bytes / 1e6,
        "chunk_ms": chunk_s * 1e3,
        "tail_ms": tail_s * 1e3,
        "tail_in_chunks": ratio,
        "all": [each[0] for each in tails],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--rows", type=int, nargs="+", default=[656, 1152])
    parser.add_argument("--chunk", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--path", choices=("wire", "shared"), default="wire")
    parser.add_argument("--pages", nargs="+", help="of: one run, median, 95th percentile, worst")
    parser.add_argument("--checksums", choices=("on", "off", "both"), default="both")
    parser.add_argument("--pool-pages", type=int, default=4096)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"rates": [], "overlap": []}
    layers, device, path = arguments.layers, arguments.device, arguments.path
    setups = [
        Setup(layers, row_bytes, device, path, arguments.pool_pages) for row_bytes in arguments.rows
    ]
    for setup in setups:
        found["rates"] += rates(setup, arguments.rounds, arguments.checksums, arguments.pages)
    for chunk_tokens in arguments.chunk:
        row = overlap(setups[0], chunk_tokens, arguments.rounds)
        print(json.dumps(row), flush=True)
        found["overlap"].append(row)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        stem = arguments.out / f"{date.today()}-handoff-{device}-{path}"
        stem.with_suffix(".json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
