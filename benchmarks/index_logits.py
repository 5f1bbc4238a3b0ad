"""Indexer scores of decode on this GPU: our kernel, DeepGEMM's where its wheel is, and the bytes.

    python benchmarks/index_logits.py --json out.json [--table]

64 heads of 128, FP8 keys in pages of 64 (132 bytes a token), more memory a replay than the L2 holds.
Microseconds a call in CUDA graphs. "floor": keys, scales and scores (136 bytes a position) at the
device's own rate, measured in the same run. deepgemm: its kernel alone, on queries already in
FP8; deepgemm step: with what a layer needs besides (queries to FP8; the schedule is made once a step).
A name with bf16 scores queries as they are, one with fp8 rounds them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_ops import key_sets, time_us
from torch import Tensor

from tidepool.kernels import cuda_index_logits, deepgemm, triton_index_logits
from tidepool.kernels.index_choice import TABLE
from tidepool.kernels.triton_index_logits_chunk import prepare_queries

SHAPES = (
    (1, 65536),
    (8, 65536),
    (32, 65536),
    (35, 65536),
    (64, 65536),
    (256, 32768),
    (32, 131072),
    (40, 131072),
)
TABLE_COLUMNS = 65536
POSITION_BYTES = 132 + 4
REPLAYS = 15


def copy_rate() -> float:
    """Bytes a second, read and written, of a kernel that doubles numbers (a graph's copy is slower)."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    us, _ = time_us([lambda: torch.mul(source, 2.0, out=target)], 5)
    return 8 * source.numel() / us * 1e6


def with_lengths(sets: list[tuple[Any, ...]], lengths_B: Tensor) -> list[tuple[Any, ...]]:
    return [(*s[:4], lengths_B, *s[5:]) for s in sets]


def in_triton(rounds: bool) -> Callable[..., None]:
    return lambda *s: triton_index_logits.launch(None, *s, rounds)


def in_cuda(rounds: bool) -> Callable[..., None]:
    return lambda *s: cuda_index_logits.launch(*s[:7], rounds)


def bench_deepgemm(sets: list[tuple[Any, ...]], expected_BC: Tensor) -> dict[str, float]:
    """Its kernel alone, a layer's launches, and how far its scores are from ours of FP8 queries."""
    schedule = deepgemm.make_schedule(sets[0][4])
    prepared = [prepare_queries(s[0], s[1], torch.float8_e4m3fn, rounds_queries=True) for s in sets]
    columns = sets[0][5].shape[1]

    def alone(query_BID: Tensor, weight_BI: Tensor, s: tuple[Any, ...]) -> Tensor:
        return deepgemm.scores_of_fp8(schedule, query_BID, weight_BI, s[2], s[3], columns)

    def layer(s: tuple[Any, ...]) -> Tensor:
        return deepgemm.index_scores(schedule, *s[:4], columns)

    have_BC = layer(sets[0])
    is_seen = torch.arange(columns, device="cuda") < sets[0][4][:, None]
    error = (have_BC - expected_BC)[is_seen].norm() / expected_BC[is_seen].norm()
    pairs = [(*q, s) for q, s in zip(prepared, sets, strict=True)]
    return {
        "deepgemm": time_us([lambda c=c: alone(*c) for c in pairs], REPLAYS)[0],  # type: ignore[misc]
        "deepgemm step": time_us([lambda s=s: layer(s) for s in sets], REPLAYS)[0],  # type: ignore[misc]
        "deepgemm schedule": time_us([lambda: deepgemm.make_schedule(sets[0][4])] * 4, REPLAYS)[0],
        "deepgemm differs by": float(error),
    }


def bench(batch: int, columns: int, rate: float, shortest: int) -> dict[str, float]:
    sets = key_sets(batch, columns)
    lengths_B = torch.randint(shortest, columns + 1, (batch,), device="cuda", dtype=torch.int32)
    sets = with_lengths(sets, lengths_B)
    seen = int(lengths_B.sum())
    result = {"floor": seen * POSITION_BYTES / rate * 1e6}
    scores_BC = sets[0][5]
    names = {"bf16": False, "fp8": True}
    scores: dict[str, Tensor] = {}
    for name, rounds in names.items():
        calls = {f"triton {name}": in_triton(rounds), f"cuda {name}": in_cuda(rounds)}
        for label, call in calls.items():
            scores_BC.fill_(7.0)
            result[label], _ = time_us(
                [lambda s=s, call=call: call(*s) for s in sets],  # type: ignore[misc]
                REPLAYS,
            )
            first = scores.setdefault(name, scores_BC.clone())
            finite = first.isfinite()
            error = float((scores_BC - first)[finite].norm() / first[finite].norm())
            if not error < 1e-3 or not torch.equal(scores_BC.isfinite(), finite):
                raise SystemExit(f"index_logits: {label} differs from Triton by {error}")
    if not deepgemm.missing():
        result |= bench_deepgemm(sets, scores["fp8"])
    return result


def write_table(results: dict[str, dict[str, float]], commit: str) -> None:
    """data/index_logits.json of the kernels: what index_choice.py chooses by."""
    us = {
        str(batch): {
            "triton": round(results[f"{batch} x {columns}"]["triton fp8"], 2),
            "cuda": round(results[f"{batch} x {columns}"]["cuda fp8"], 2),
            "deepgemm": round(results[f"{batch} x {columns}"]["deepgemm step"], 2),
        }
        for batch, columns in SHAPES
        if columns == TABLE_COLUMNS
    }
    table = {
        "what": "index scores of queries in FP8, 64 heads, context 65536: us a layer in a CUDA graph",
        "command": "python benchmarks/index_logits.py --table",
        "commit": commit,
        "machine": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, CUDA {torch.version.cuda}, sgl-deep-gemm 0.1.2",
        "date": time.strftime("%Y-%m-%d"),
        "us": us,
    }
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true", help="write the kernels' table")
    parser.add_argument("--commit", default="unknown", help="what to write as the commit")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = copy_rate()
    print(f"copy {rate / 1e9:.0f} GB/s; without deepgemm: {deepgemm.missing()!r}", flush=True)
    results: dict[str, dict[str, float]] = {}
    for batch, columns in SHAPES:
        for shortest in (columns,) if batch != 35 else (columns, columns // 4):
            name = f"{batch} x {columns}" + ("" if shortest == columns else " of any length")
            results[name] = bench(batch, columns, rate, shortest)
            figures = "  ".join(f"{key} {value:.4g}" for key, value in results[name].items())
            print(f"{name:30s} {figures}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
            torch.cuda.empty_cache()
    if arguments.table:
        write_table(results, arguments.commit)


if __name__ == "__main__":
    main()
