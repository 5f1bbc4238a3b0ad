"""What does a page of more than one token cost, and what does it bring?

    python benchmarks/page_size.py --out benchmarks/results

Two questions of the host pool with pages of 1, 16 and 64 tokens:

* decode: tokens a second of the demo model on one CPU thread, hot buffer of 256 rows, one request
  of 2,000 prompt tokens. A larger page must not be slower.
* hand-off: 8,192 tokens of DeepSeek-V3.2's FP8 row in LAYERS layers, written by Mooncake TCP to
  another process, with the pool's pages in one run and in random order. Larger pages mean fewer
  writes; beside it the raw engine with 1 MiB blocks.

Figures are medians of REPETITIONS.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import multiprocessing
import os
import random
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path

from tidepool.common.wire import Region, Sampling
from tidepool.deploy.demo.data import make_prompt
from tidepool.deploy.demo.run import demo_config
from tidepool.deploy.local import LocalNode
from tidepool.transfer.mooncake import MooncakeTransport
from tidepool.transfer.pages import plan_writes
from tidepool.transfer.transport import Channel, TicketStatus, Write

HOST = "127.0.0.1"
PAGE_SIZES = (1, 16, 64)
TOKENS, LAYERS, ROW_BYTES = 8192, 8, 656
NUM_BYTES = TOKENS * LAYERS * ROW_BYTES
MAX_IN_FLIGHT = 8
REPETITIONS = 5
DECODE_TOKENS = 64


def decode_rate(page_size: int) -> float:
    """Output tokens a second of one request, its prompt not counted."""
    node = LocalNode(demo_config({"kv.page_size": page_size, "prefill.pool_tokens": 4096}))
    rates = []
    for number in range(REPETITIONS):
        request_id = str(number)
        prompt = make_prompt(2000, seed=number).token_ids
        sampling = Sampling(DECODE_TOKENS + 1, temperature=0.0, ignore_eos=True)
        node.submit(request_id, prompt, sampling)
        while not node.tokens[request_id]:
            node.step()
        begin, have = time.perf_counter(), len(node.tokens[request_id])
        node.run()
        rates.append((DECODE_TOKENS + 1 - have) / (time.perf_counter() - begin))
    return statistics.median(rates)


def buffer() -> tuple[mmap.mmap, int]:
    """Touched memory of NUM_BYTES and its address."""
    memory = mmap.mmap(-1, NUM_BYTES)
    memory.write(b"\1" * NUM_BYTES)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def serve(pipe: Connection) -> None:
    """The other process: receives until told to end."""
    _memory, address = buffer()
    transport = MooncakeTransport(HOST)
    transport.register(address, NUM_BYTES)
    pipe.send((transport.data_address, address))
    pipe.recv()
    transport.close()
    os._exit(0)  # the mapping is still exported through ctypes


def move(transport: MooncakeTransport, channel: Channel, writes: list[Write]) -> float:
    """Seconds to execute all writes, MAX_IN_FLIGHT at a time."""
    begin = time.perf_counter()
    waiting, flying = deque(writes), deque()
    while waiting or flying:
        while waiting and len(flying) < MAX_IN_FLIGHT:
            flying.append(transport.submit(channel, [waiting.popleft()]))
        status = transport.poll(flying[0])
        if status is TicketStatus.PENDING:
            time.sleep(0.0001)
        elif status is TicketStatus.DONE:
            flying.popleft()
        else:
            raise RuntimeError(f"a write ended {status.value}")
    return time.perf_counter() - begin


def page_writes(source: int, target: int, page_size: int, *, is_shuffled: bool) -> list[Write]:
    num_pages = TOKENS // page_size
    regions = [
        Region("kv", base, LAYERS, num_pages, page_size * ROW_BYTES) for base in (source, target)
    ]
    target_pages = list(range(num_pages))
    if is_shuffled:
        random.Random(0).shuffle(target_pages)
    return list(plan_writes(*regions, list(range(num_pages)), target_pages, 16 << 20))


def block_writes(source: int, target: int, size: int) -> list[Write]:
    return [
        Write(source + at, target + at, min(size, NUM_BYTES - at))
        for at in range(0, NUM_BYTES, size)
    ]


def hand_off_rows() -> Iterator[tuple[str, int, float]]:
    """Yields (what, number of writes, GB/s)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    peer = context.Process(target=serve, args=(theirs,))
    peer.start()
    address, target = ours.recv()
    _memory, source = buffer()
    transport = MooncakeTransport(HOST)
    transport.register(source, NUM_BYTES)
    channel = transport.open(address)
    plans = {"raw engine, 1 MiB blocks": block_writes(source, target, 1 << 20)}
    for page_size in PAGE_SIZES:
        for is_shuffled in (False, True):
            order = "random order" if is_shuffled else "one run"
            plans[f"page {page_size}, {order}"] = page_writes(
                source, target, page_size, is_shuffled=is_shuffled
            )
    for what, writes in plans.items():
        move(transport, channel, writes)
        times = [move(transport, channel, writes) for _ in range(REPETITIONS)]
        yield what, len(writes), NUM_BYTES / statistics.median(times) / 1e9
    transport.close()
    ours.send("end")
    peer.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    rates = {page_size: decode_rate(page_size) for page_size in PAGE_SIZES}
    rows = list(hand_off_rows())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = [
        f"# Pages of one and of many tokens, {date.today()}",
        "",
        f"`python benchmarks/page_size.py`, commit {commit}, {os.cpu_count()} cores, CPU only; "
        f"medians of {REPETITIONS}.",
        "",
        "| page | decode tokens/s | against page 1 |",
        "|---|---|---|",
        *(f"| {p} | {rate:.1f} | {rate / rates[1]:.2f} |" for p, rate in rates.items()),
        "",
        f"Hand-off of {NUM_BYTES / 1e6:.0f} MB over Mooncake TCP on loopback:",
        "",
        "| pages | writes | GB/s |",
        "|---|---|---|",
        *(f"| {what} | {count} | {rate:.2f} |" for what, count, rate in rows),
        "",
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"{date.today()}-page-size"
    stem.with_suffix(".md").write_text("\n".join(lines))
    stem.with_suffix(".json").write_text(json.dumps({"decode": rates, "hand_off": rows}))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
