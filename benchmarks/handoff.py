"""How fast does a prompt's KV go from a prefill process to a decode process?

    python benchmarks/handoff.py --out benchmarks/results
    python benchmarks/handoff.py --device cuda --pool-pages 2048 --out benchmarks/results
    python benchmarks/handoff.py --device cuda --pool-pages 2048 --path shared --out benchmarks/results

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
import itertools
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from handoff_ends import PAGE_SIZE, Bench, Setup

from tidepool.common.config import TransferSection
from tidepool.hostpool.mirror import HostMirror
from tidepool.hostpool.pages import OwnerKind, PageAllocator, PageLease
from tidepool.transfer.transports import default_engines

TOKENS, LONG_TOKENS = 8192, 32768
MAX_PROMPTS, SOAK_STEPS = 8, 6000
COMPUTE_SHARE = 1.3
"""A chunk's compute time, in transfer times of a chunk."""


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
            ours, raw, raw_all, plain, direct = [], [], [], [], []
            writes = bench.plan(source, target)
            for _ in range(rounds):
                raw.append(num_bytes / bench.raw(num_bytes) / 1e9)
                ours.append(num_bytes / bench.send(source, target) / 1e9)
                raw_all.append(num_bytes / bench.raw(num_bytes, all_engines=True) / 1e9)
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
                "raw_all_gb_s": statistics.median(raw_all),
                "of_raw": statistics.median(a / b for a, b in zip(ours, raw, strict=True)),
                "of_raw_all": statistics.median(a / b for a, b in zip(ours, raw_all, strict=True)),
                "all": [ours, raw, raw_all, plain],
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
    parser.add_argument("--piece-bytes", type=int, default=TransferSection().max_chunk_bytes)
    parser.add_argument("--engines", type=int, default=default_engines())
    arguments = parser.parse_args()
    found: dict[str, Any] = {"rates": [], "overlap": []}
    layers, device, path = arguments.layers, arguments.device, arguments.path
    setups = [
        Setup(
            layers,
            row_bytes,
            device,
            path,
            arguments.pool_pages,
            arguments.engines,
            arguments.piece_bytes,
        )
        for row_bytes in arguments.rows
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
