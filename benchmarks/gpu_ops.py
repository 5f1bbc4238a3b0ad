"""How long do top-k selection, sparse attention and indexer scores of one layer take on this GPU?

    python benchmarks/gpu_ops.py --json out.json [--table]

Each figure is the median over replays of a CUDA graph that makes the call on several input sets in
turn, per call: device time, launch gaps between kernels included, Python excluded. Keys and rows
rotate over more memory than the L2 holds, as the layers of a step do; scores stay in it, as they do
behind the kernel that wrote them. --table writes what was measured of attention into the table that the
automatic choice goes by.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tidepool.kernels import attention, flashmla
from tidepool.kernels.attention_table import TABLE
from tidepool.kernels.index_logits import index_logits
from tidepool.kernels.select_topk import select_topk
from tidepool.kernels.store_index_keys import store_index_keys
from tidepool.kernels.store_rows import store_rows

TOPK = 2048
L2_BYTES = 60 << 20
ROW_BLOCK = 1 << 16
"""Rows that are drawn; a pool repeats them."""
REPLAYS = 40
Call = Callable[[], object]

SELECT_SHAPES = ((1, 65536), (8, 65536), (32, 65536), (64, 65536), (256, 32768), (32, 131072))
MLA_BATCHES = (1, 8, 32, 34, 40, 48, 64, 67, 80, 96, 112, 128, 133, 160, 256)
MLA_POINTS = tuple(
    (layout, heads, batch)
    for layout in ("mla_bf16", "mla_fp8")
    for heads in (8, 16, 32, 64, 128)
    for batch in (MLA_BATCHES if heads >= 64 else (1, 8, 32, 128))
)
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
    """Argument lists of sparse_mla: 2048 of each request's own 4352 rows; queries as the model has them."""
    row_bytes = 1152 if layout == "mla_bf16" else 656
    count = max(3, min(16, -(-3 * L2_BYTES // (batch * TOPK * row_bytes))))
    block = torch.empty(ROW_BLOCK, row_bytes, dtype=torch.uint8, device="cuda")
    values = torch.randn(ROW_BLOCK, 576, device="cuda")
    slots = torch.arange(ROW_BLOCK, device="cuda")
    store_rows(values[:, :512], values[:, 512:], slots, block, layout)
    rows = block.repeat(-(-count * batch * 4352 // ROW_BLOCK), 1)
    sets = []
    for number in range(count):
        picks = torch.rand(batch, 4352, device="cuda").topk(TOPK, 1).indices
        first = 4352 * (number * batch + torch.arange(batch, device="cuda"))
        idx = (picks + first[:, None]).int()
        q = torch.randn(batch, heads, 576, device="cuda").bfloat16()
        out = torch.empty(batch, heads, 512, dtype=torch.bfloat16, device="cuda")
        sets.append((q[..., :512], q[..., 512:], rows, idx, 0.05, layout, out))
    return sets


def backends_of(arguments: tuple[object, ...]) -> list[str]:
    """Those that can take the call and are worth timing: Triton is for few heads."""
    tensors = (*arguments[:4], *arguments[5:])
    names = ["cuda", "flashmla_sparse"] + ["triton"] * (arguments[0].shape[1] < 64)  # type: ignore[attr-defined]
    return [name for name in names if attention.CAN_TAKE[name](*tensors)]


def attend_by(name: str) -> Callable[..., Tensor | None]:
    """A backend as the op's `attend` calls it: FlashMLA's result stays where its wheel put it."""
    return flashmla.attend if name == "flashmla_sparse" else attention.LAUNCH[name]


def bench_mla(batch: int, heads: int, layout: str) -> dict[str, float]:
    """Microseconds of each backend, and of the automatic choice; results are compared."""
    sets = mla_sets(batch, heads, layout)
    result: dict[str, float] = {}
    reference = None
    for name in backends_of(sets[0]):
        given = 6 if name == "flashmla_sparse" else 7
        calls = [partial(attend_by(name), *s[:given]) for s in sets]
        result[name], _ = time_us(calls, 15)
        attention.LAUNCH[name](*sets[0])
        out = sets[0][-1].float()
        reference = out if reference is None else reference
        error = float((out - reference).norm() / reference.norm())
        if not error < 1e-2:
            raise SystemExit(f"sparse_mla: {name} differs from the first by {error}")
    result["auto"], _ = time_us([partial(attention.attend, *s[:6]) for s in sets], 15)
    return result


def write_table(results: dict[str, dict[str, float]], commit: str) -> None:
    """data/sparse_mla.json of the kernels: what attention.py chooses by."""
    us: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for layout, heads, batch in MLA_POINTS:
        times = results[mla_name(layout, heads, batch)]
        kept = {name: round(times[name], 2) for name in times if name in attention.LAUNCH}
        us.setdefault(layout, {}).setdefault(str(heads), {})[str(batch)] = kept
    table = {
        "what": "sparse_mla, top-k 2048, rows of 512 + 64: microseconds a call in a CUDA graph",
        "command": "python benchmarks/gpu_ops.py --table",
        "commit": commit,
        "machine": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, sgl-flash-mla 1.0.0",
        "date": time.strftime("%Y-%m-%d"),
        "us": us,
    }
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def mla_name(layout: str, heads: int, batch: int) -> str:
    return f"sparse_mla {layout} {heads} heads batch {batch}"


def bench_prefill(context: int, layout: str) -> dict[str, float]:
    """A chunk of 2048 tokens at the end of `context`, 128 heads; beside it, dense products."""
    tokens, heads = 2048, 128
    row_bytes = 1152 if layout == "mla_bf16" else 656
    rows = torch.empty(context, row_bytes, dtype=torch.uint8, device="cuda")
    values = torch.randn(context, 576, device="cuda")
    store_rows(values[:, :512], values[:, 512:], torch.arange(context, device="cuda"), rows, layout)
    first = context - tokens
    idx = torch.full((tokens, TOPK), -1, dtype=torch.int32, device="cuda")
    for token in range(tokens):
        seen = min(first + token + 1, TOPK)
        idx[token, :seen] = torch.randperm(first + token + 1, device="cuda")[:seen].sort().values
    q = torch.randn(tokens, heads, 576, device="cuda").bfloat16()
    out = torch.empty(tokens, heads, 512, dtype=torch.bfloat16, device="cuda")
    arguments = (q[..., :512], q[..., 512:], rows, idx, 0.05, layout, out)
    result: dict[str, float] = {}
    for name in backends_of(arguments):
        launch = attention.LAUNCH[name]
        result[name], _ = time_us([lambda launch=launch: launch(*arguments)] * 2, 5)
    keys = values.bfloat16()
    block = q[:256].flatten(0, 1)

    def dense() -> None:
        torch.mm((block @ keys.T).softmax(-1), keys[:, :512])

    result["dense products"] = time_us([dense], 5)[0] * tokens / 256
    result["rows"] = float((idx >= 0).sum()) / tokens
    return result


def benches() -> dict[str, Callable[[], dict[str, float]]]:
    """What there is to measure, by name."""
    found: dict[str, Callable[[], dict[str, float]]] = {}
    for batch, columns in SELECT_SHAPES:
        found[f"select_topk {batch} x {columns}"] = partial(bench_select, batch, columns)
    found["select_topk 4 x 1048576"] = bench_select_1m
    for layout, heads, batch in MLA_POINTS:
        found[mla_name(layout, heads, batch)] = partial(bench_mla, batch, heads, layout)
    for context in (2048, 16384, 65536):
        for layout in ("mla_bf16", "mla_fp8"):
            found[f"prefill {layout} context {context}"] = partial(bench_prefill, context, layout)
    for batch, columns in SELECT_SHAPES:
        found[f"index_logits {batch} x {columns}"] = partial(bench_logits, batch, columns)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true", help="write the kernels' table")
    parser.add_argument("--only", default="", help="names that begin so")
    parser.add_argument("--commit", default="unknown", help="what to write as the commit")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, dict[str, float]] = {}

    def add(name: str, result: dict[str, float]) -> None:
        results[name] = result
        figures = "  ".join(f"{key} {value:.1f}" for key, value in result.items())
        print(f"{name:44s} {figures}", flush=True)
        torch.cuda.empty_cache()

    for name, bench in benches().items():
        if name.startswith(arguments.only):
            add(name, bench())
    if arguments.table:
        write_table(results, arguments.commit)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
