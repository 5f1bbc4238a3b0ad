"""The two processes of benchmarks/handoff.py: the hand-off as nodes run it, without engines.

`Bench` is the prefill process, `serve_decode` the other one, which it starts.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import queue
import socket
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tidepool.common import wire
from tidepool.common.config import TransferSection
from tidepool.deploy.keeping import find_or_start
from tidepool.hostpool.mirror import HostMirror
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
from tidepool.transfer.transport import Channel, TicketStatus, Transport, Write
from tidepool.transfer.transports import make_tcp

HOST = "127.0.0.1"
PAGE_SIZE, INDEX_TOKEN_BYTES = 64, 132
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
    engines: int
    piece_bytes: int = TransferSection().max_chunk_bytes
    source_pages: int = 1024

    @property
    def page_bytes(self) -> dict[str, int]:
        return {"kv": PAGE_SIZE * self.row_bytes, "index": PAGE_SIZE * INDEX_TOKEN_BYTES}


class End:
    """One node's side of the hand-off, without engines."""

    def __init__(self, role: wire.Role, setup: Setup, *, has_checksums: bool) -> None:
        self.mirrors: tuple[HostMirror, ...] = ()
        self.extra: dict[str, Any] = {}
        shared = None
        transport = make_tcp(HOST, setup.engines)
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
        self.config = TransferSection(
            checksums="on" if has_checksums else "off", max_chunk_bytes=setup.piece_bytes
        )
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
        self.bare = MooncakeTransport(HOST)
        self.bare_channel = self.bare.open(data_address.split(",")[0])
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
        self.bare.close()
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

    def raw(self, num_bytes: int, *, all_engines: bool = False, source: int = 0) -> float:
        """Seconds for `num_bytes` in blocks of 1 MiB, by one bare engine or by all of them.

        From host memory, or from `source`.
        """
        source = source or self.end.regions[0].base_address
        block = 1 << 20
        writes = deque(
            Write(source + at, self.target + at, min(block, num_bytes - at))
            for at in range(0, num_bytes, block)
        )
        transport, channel = self.bare, self.bare_channel
        if all_engines:
            transport, channel = self.end.transport, self.channel
        return raw_writes(transport, channel, writes, 8 * channel.num_lanes)

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
            self.bare.register(region.base_address, size)
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


def raw_writes(
    transport: Transport, channel: Channel, writes: deque[Write], in_flight: int
) -> float:
    """Seconds for just these writes, each with a ticket of its own."""
    flying: list[Any] = []
    begin = time.perf_counter()
    while writes or flying:
        while writes and len(flying) < in_flight:
            flying.append(transport.submit(channel, [writes.popleft()]))
        states = [(transport.poll(ticket), ticket) for ticket in flying]
        still = [ticket for status, ticket in states if status is TicketStatus.PENDING]
        if any(status not in (TicketStatus.PENDING, TicketStatus.DONE) for status, _ in states):
            raise RuntimeError("a write failed")
        if len(still) == len(flying):
            time.sleep(0.0001)
        flying = still
    return time.perf_counter() - begin
