"""How fast do whole pages leave a GPU, and come back, by which means?

    python benchmarks/device_copies.py --json out.json

A chunk of 128 pages of 64 tokens of DeepSeek-V3.2's layout, 61 layers: KV rows of 656 B and of
1152 B, and indexer keys (132 B), in runs of 1, 4, 16 and 128 pages, between a device pool and pinned
host memory, both ways: the copy engine (one batched call) and the kernel, by its CTAs.

GB/s from the call to the event behind it, the host's planning of the copies not counted; medians of
ROUNDS. Beside it one cudaMemcpyAsync of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tidepool.hostpool.memory import allocate_host
from tidepool.hostpool.mirror import HostMirror
from tidepool.kernels.copy_blocks import BlockCopier

LAYERS, PAGES, CHUNK_PAGES, ROUNDS = 61, 512, 128, 7
PAGE_BYTES = {"kv 656": 64 * 656, "kv 1152": 64 * 1152, "index 132": 64 * 132}
RUNS = (1, 4, 16, 128)
NEVER = 1 << 60


def pages_in_runs(length: int) -> list[int]:
    """CHUNK_PAGES pages in runs of `length` that do not touch."""
    starts = list(range(0, PAGES - length, length + 1 if length < CHUNK_PAGES else length))
    chosen = random.Random(0).sample(starts, CHUNK_PAGES // length)
    return [start + offset for start in chosen for offset in range(length)]


def timed(start: Callable[[], Callable[[], bool]]) -> float:
    """Median seconds from the call to its end."""
    times = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        is_done = start()
        while not is_done():
            pass
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def plain(source: torch.Tensor, target: torch.Tensor) -> Callable[[], Callable[[], bool]]:
    def start() -> Callable[[], bool]:
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        query: Callable[[], bool] = event.query
        return query

    return start


def copiers(device: torch.device) -> dict[str, BlockCopier]:
    found = {"engine": BlockCopier(device, engine_bytes=0)}
    for ctas in (16, 32, 64, 128):
        found[f"kernel {ctas}"] = BlockCopier(device, engine_bytes=NEVER, num_ctas=ctas)
    return found


def host_rows(name: str, page_bytes: int) -> list[dict[str, Any]]:
    pool = torch.randint(0, 256, (LAYERS, PAGES, page_bytes), dtype=torch.uint8, device="cuda")
    memory = allocate_host(pool.numel(), pin=True)
    host = memory.data.view(pool.shape)
    num_bytes = LAYERS * CHUNK_PAGES * page_bytes
    flat, flat_host = pool.view(-1)[:num_bytes], memory.data[:num_bytes]
    rows = [
        {"what": name, "way": way, "by": "one memcpy", "gb_s": num_bytes / timed(call) / 1e9}
        for way, call in (("out", plain(flat, flat_host)), ("in", plain(flat_host, flat)))
    ]
    mirror = HostMirror.__new__(HostMirror)
    for length in RUNS:
        pages = pages_in_runs(length)
        for way, (source, target) in {"out": (pool, host), "in": (host, pool)}.items():
            blocks = list(mirror._blocks(source, target, pages))
            for by, copier in copiers(pool.device).items():
                seconds = timed(lambda c=copier, b=blocks: c.copy(b))  # type: ignore[misc]
                rows.append(
                    {"what": name, "way": way, "run": length, "by": by}
                    | {"gb_s": num_bytes / seconds / 1e9}
                )
    memory.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.cuda.set_device(0)
    rows = [row for name, size in PAGE_BYTES.items() for row in host_rows(name, size)]
    for row in rows:
        print(row["what"], row["way"], row.get("run", ""), row["by"], round(row["gb_s"], 1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
