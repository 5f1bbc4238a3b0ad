"""A prefill's side of the hand-off as a process of its own, to be stopped and killed by tests.

    python -m helpers.writer NODE_ID EPOCH DECODE_ADDRESS SEED [shared]

With "shared" it copies into decode's memory where it can map it. Offers prompts of random sizes without end; every byte of request "NODE.EPOCH.n" is its tag. Source
pages are used again, under another tag, as soon as the exporter allows.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from helpers.memory import Memory, make_region
from tidepool.common import wire
from tidepool.common.config import TransferSection
from tidepool.transfer import events
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.exporter import Exporter
from tidepool.transfer.memory_copies import Block, MemoryTransport, RoutedTransport
from tidepool.transfer.mover import Mover
from tidepool.transfer.shared_paths import SharedPaths, machine_id
from tidepool.transfer.transports import make_tcp

TAGS = range(1, 251)
POISON = 0xFB
LAYERS, PAGES, PAGE_BYTES, INDEX_BYTES = 2, 48, 1024 * 1024, 16 * 1024
MAX_PROMPT_PAGES = 8
PIECE_BYTES, PIECE_S = 256 * 1024, 0.001


def tag_of(request_id: str) -> int:
    return TAGS[zlib.crc32(request_id.encode()) % len(TAGS)]


def config() -> TransferSection:
    return TransferSection(
        heartbeat_interval_s=0.1,
        heartbeat_timeout_s=0.5,
        resend_interval_s=0.1,
        write_timeout_s=0.5,
        deadline_s=5.0,
    )


def shared_paths(control: ControlLoop) -> SharedPaths:
    """What it imports takes seconds: only writers that need it wait for it."""
    import torch  # noqa: PLC0415

    from tidepool.prefill_node.borrowing import BorrowedMemory  # noqa: PLC0415

    cpu = torch.device("cpu")
    return SharedPaths(machine_id(), lambda shared: BorrowedMemory(shared, cpu), control.post)


def copy_slowly(blocks: Sequence[Block]) -> Callable[[], bool]:
    """Copies as a device does, beside the caller, and so slowly that signals come in between.

    On a busy machine it pauses less: what takes longer than a write may is in doubt for good.
    """
    is_done = threading.Event()

    def run() -> None:
        due_s = time.monotonic()
        for source, target, num_bytes in blocks:
            for at in range(0, num_bytes, PIECE_BYTES):
                ctypes.memmove(target + at, source + at, min(PIECE_BYTES, num_bytes - at))
                due_s += PIECE_S
                time.sleep(max(0.0, due_s - time.monotonic()))
        is_done.set()

    threading.Thread(target=run, daemon=True).start()
    return is_done.is_set


def main() -> None:
    node_id, epoch, decode_address, seed = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    rng = random.Random(seed)
    kv, index = Memory(LAYERS * PAGES * PAGE_BYTES), Memory(LAYERS * PAGES * INDEX_BYTES)
    regions = (
        make_region(kv, "kv", LAYERS, PAGES, PAGE_BYTES),
        make_region(index, "index", LAYERS, PAGES, INDEX_BYTES),
    )
    num_engines = 1 if "shared" in sys.argv else 2
    transport = RoutedTransport(make_tcp("127.0.0.1", num_engines), MemoryTransport(copy_slowly))
    for memory in (kv, index):
        transport.register(memory.address, memory.num_bytes)
    control = ControlLoop(node_id, "prefill", epoch, layout_hash="x", config=config())
    mover = Mover(transport, config(), control.post)
    log: list[Any] = []
    exporter = Exporter(
        control,
        mover,
        regions,
        config(),
        has_checksums=True,
        post_event=log.append,
        paths=shared_paths(control) if "shared" in sys.argv else None,
    )
    mover.start()
    control.start(exporter)
    free, used = set(range(PAGES)), {}

    def fill(pages: list[int], tag: int) -> None:
        for memory, size in ((kv, PAGE_BYTES), (index, INDEX_BYTES)):
            for layer in range(LAYERS):
                for page in pages:
                    memory.set((layer * PAGES + page) * size, size, tag)

    number = 0
    print("WRITER", flush=True)
    while True:
        while log:
            event = log.pop(0)
            pages = used.get(event.key, [])
            if isinstance(event, events.ExportGranted):
                half = rng.randint(0, len(pages))
                for first, part in ((0, pages[:half]), (half, pages[half:])):
                    if part:
                        exporter.pages_ready(event.key, first, part)
                exporter.commit(event.key, wire.OutputToken(1))
            is_quarantined = isinstance(event, events.ExportReleased) and event.is_quarantined
            is_free = isinstance(event, events.ExportReleased) and not is_quarantined
            if is_free or isinstance(event, events.ExportUnquarantined):
                fill(used.pop(event.key), POISON - 1)
                free |= set(pages)
        count = rng.randint(1, MAX_PROMPT_PAGES)
        if len(used) < 6 and len(free) >= count:
            number += 1
            key = (f"{node_id}.{epoch}.{number}", 0)
            used[key] = sorted(free)[:count]
            free -= set(used[key])
            fill(used[key], tag_of(key[0]))
            sampling = wire.Sampling(max_tokens=1)
            request = events.ExportRequest(*key, count, sampling, "f", "d", decode_address)
            exporter.offer(request)
        time.sleep(0.002)


if __name__ == "__main__":
    main()
