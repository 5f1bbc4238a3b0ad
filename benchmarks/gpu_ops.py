"""How long do top-k selection, sparse attention and indexer scores of one layer take on this GPU?

    python benchmarks/gpu_ops.py --json out.json

Each figure is the median over replays of a CUDA graph that makes the call on several input sets in
turn, per call: device time, launch gaps between kernels included, Python excluded. Keys and rows
rotate over more memory than the L2 holds, as the layers of a step do; scores stay in it, as they do
behind the kernel that wrote them. Results are compared with the references' formula before timing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tidepool.kernels.index_logits import index_logits
from tidepool.kernels.select_topk import select_topk
from tidepool.kernels.sparse_mla import sparse_mla
from tidepool.kernels.store_index_keys import store_index_keys
from tidepool.kernels.store_rows import store_rows

TOPK = 2048
L2_BYTES = 60 << 20
REPLAYS = 40
Call = Callable[[], None]

SELECT_SHAPES = ((1, 65536), (8, 65536), (32, 65536), (64, 65536), (256, 32768), (32, 131072))
MLA_BATCHES = (1, 8, 32, 64, 128, 256)
MLA_TARGET_US = {1: 25.0, 8: 25.0, 32: 45.0}
DEEPGEMM_US = {
    (1, 65536): 5.1,
    (8, 65536): 22.6,
    (32, 65536): 73.5,
    (64, 65536): 141.0,
    (256, 32768): 276.0,
    (32, 131072): 141.0,
}


def time_us(calls: list[Call], replays: int = REPLAYS) -> tuple[float, float]:
    """Median and 90th percentile, microseconds a call, of a graph of all calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    times = sorted(times[3:])
    return statistics.median(times), times[int(0.9 * len(times))]


def score_sets(batch: int, columns: int, count: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sets of (scores, lengths, positions to be written)."""
    lengths = torch.full((batch,), columns, dtype=torch.int32, device="cuda")
    return [
        (
            torch.randn(batch, columns, device="cuda"),
            lengths,
            torch.empty(batch, TOPK, dtype=torch.int32, device="cuda"),
        )
        for _ in range(count)
    ]


def bench_select(batch: int, columns: int) -> dict[str, float]:
    sets = score_sets(batch, columns)
    ours, spread = time_us([lambda s=s: select_topk(*s) for s in sets])  # type: ignore[misc]
    values = torch.empty(batch, TOPK, device="cuda")
    order = torch.empty(batch, TOPK, dtype=torch.int64, device="cuda")
    theirs, _ = time_us(
        [lambda s=s: torch.topk(s[0], TOPK, out=(values, order)) for s in sets]  # type: ignore[misc]
    )
    torch.topk(sets[0][0], TOPK, out=(values, order))
    if not torch.equal(order.sort(1).values.int(), sets[0][2]):
        raise SystemExit("select_topk differs from torch.topk")
    return {"us": ours, "p90_us": spread, "torch_us": theirs, "goal_us": theirs / 5}


def bench_select_1m() -> dict[str, float]:
    return bench_select(4, 1 << 20)


def key_sets(batch: int, columns: int, page_size: int = 64) -> list[tuple[object, ...]]:
    """Argument lists of index_logits over more memory than the L2 holds; contiguous pages."""
    num_pages = columns // page_size
    page_bytes = page_size * 132
    count = max(2, min(16, -(-2 * L2_BYTES // (batch * columns * 132))))
    sets: list[tuple[object, ...]] = []
    lengths = torch.full((batch,), columns, dtype=torch.int32, device="cuda")
    table = torch.arange(batch * num_pages, dtype=torch.int32, device="cuda").view(batch, num_pages)
    for _ in range(count):
        pages = torch.empty(batch * num_pages, page_bytes, dtype=torch.uint8, device="cuda")
        for first in range(0, batch * columns, 1 << 20):
            end = min(first + (1 << 20), batch * columns)
            keys = torch.randn(end - first, 128, device="cuda")
            slots = torch.arange(first, end, device="cuda")
            store_index_keys(keys, slots, pages, page_size, "index_k")
        query = torch.randn(batch, 64, 128, device="cuda").bfloat16()
        weight = torch.randn(batch, 64, device="cuda")
        scores = torch.empty(batch, columns, device="cuda")
        sets.append((query, weight, pages, table, lengths, scores, page_size, "index_k"))
    return sets


def bench_logits(batch: int, columns: int) -> dict[str, float]:
    sets = key_sets(batch, columns)
    ours, spread = time_us([lambda s=s: index_logits(*s) for s in sets], 20)  # type: ignore[misc]
    gigabytes = batch * columns * (132 + 4) / 1e9
    goal = 1.4 * DEEPGEMM_US[batch, columns]
    return {"us": ours, "p90_us": spread, "goal_us": goal, "gb_per_s": gigabytes / ours * 1e6}


def mla_sets(
    batch: int, heads: int = 128, layout: str = "mla_bf16"
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, float, str, Tensor]]:
    """Argument lists of sparse_mla: 2048 of each request's own 4352 rows, a pool a set."""
    row_bytes = 1152 if layout == "mla_bf16" else 656
    num_rows = batch * 4352
    count = max(3, min(16, -(-3 * L2_BYTES // (batch * TOPK * row_bytes))))
    sets = []
    for _ in range(count):
        rows = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device="cuda")
        values = torch.randn(num_rows, 576, device="cuda")
        slots = torch.arange(num_rows, device="cuda")
        store_rows(values[:, :512], values[:, 512:], slots, rows, layout)
        picks = torch.rand(batch, 4352, device="cuda").topk(TOPK, 1).indices
        idx = (picks + 4352 * torch.arange(batch, device="cuda")[:, None]).int()
        q = torch.randn(batch, heads, 576, device="cuda").bfloat16()
        out = torch.empty(batch, heads, 512, dtype=torch.bfloat16, device="cuda")
        sets.append(
            (q[..., :512].contiguous(), q[..., 512:].contiguous(), rows, idx, 0.05, layout, out)
        )
    return sets


def bench_mla(batch: int, heads: int, layout: str) -> dict[str, float]:
    sets = mla_sets(batch, heads, layout)
    ours, spread = time_us([lambda s=s: sparse_mla(*s) for s in sets])  # type: ignore[misc]
    teraflops = batch * heads * TOPK * 2 * (576 + 512) / ours / 1e6
    result = {"us": ours, "p90_us": spread, "tflop_per_s": teraflops}
    if heads == 128 and layout == "mla_bf16" and batch in MLA_TARGET_US:
        result["goal_us"] = MLA_TARGET_US[batch]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, dict[str, float]] = {}

    def add(name: str, result: dict[str, float]) -> None:
        results[name] = result
        figures = "  ".join(f"{key} {value:.1f}" for key, value in result.items())
        print(f"{name:44s} {figures}", flush=True)
        torch.cuda.empty_cache()

    for batch, columns in SELECT_SHAPES:
        add(f"select_topk {batch} x {columns}", bench_select(batch, columns))
    add("select_topk 4 x 1048576", bench_select_1m())
    for batch in MLA_BATCHES:
        add(f"sparse_mla bf16 128 heads batch {batch}", bench_mla(batch, 128, "mla_bf16"))
    for batch in (1, 8, 32):
        add(f"sparse_mla bf16 64 heads batch {batch}", bench_mla(batch, 64, "mla_bf16"))
        add(f"sparse_mla fp8 128 heads batch {batch}", bench_mla(batch, 128, "mla_fp8"))
    for batch, columns in SELECT_SHAPES:
        add(f"index_logits {batch} x {columns}", bench_logits(batch, columns))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
