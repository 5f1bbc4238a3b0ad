"""How many sequences fit: as computed from bytes, and as a decode engine admits them.

    python benchmarks/decode_capacity.py --out report.json [--model glm-5.2] [--kv-gib 43.9 35.9]

For each budget of GPU memory for KV, context and kind of buffer (resident, hot):

    computed   budget / seat_bytes of the whole model
    as run     few layers, and of the budget the share that a sequence's bytes have in so many
               layers. The pools are sized for the computed number and built by decode_node/build.py;
               if the memory they really take is more than the budget, for fewer. Then requests are
               admitted until one is refused, all are seated, and a few steps run.

What does not grow with layers (page tables, plans) is charged to the few layers in full, so "as run"
errs to the low side. A step's own buffers and weights are no part of the budget; see `step_mb`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidepool.benchmarks.decode_points import (
    GROWTH,
    Point,
    add_arguments,
    cut_config,
    kv_of,
    seat_bytes,
    whole_config,
)
from tidepool.common.clock import MonotonicClock
from tidepool.common.config import Config, KvSection, resolve
from tidepool.common.layouts import KvGeometry
from tidepool.common.wire import OutputToken, Sampling
from tidepool.decode_node.build import build_coordinator, build_engine
from tidepool.decode_node.coordinator import HiSparseCoordinator
from tidepool.decode_node.engine import DecodeEngine
from tidepool.decode_node.sequence import SequenceState
from tidepool.model.model import Model

STEPS = 4
SPARE = 8
"""Requests more than fit that the engine would take if it had the memory."""


def config_for(kv: KvGeometry, section: KvSection, point: Point) -> Config:
    """What an operator writes for `point.batch` sequences of this length."""
    length = point.context + GROWTH
    tokens = point.batch * kv.num_pages(length) * kv.page_size
    decode = {
        "seats": point.batch,
        "hot_rows": 0 if point.mode == "resident" else point.hot_rows,
        "host_tokens": tokens,
        "index_tokens": tokens,
        "max_context": length,
        "max_requests": point.batch + SPARE,
        "warm_start": False,
        "cuda_graphs": False,
    }
    config = resolve(None, {f"decode.{name}": value for name, value in decode.items()}).config
    return replace(config, kv=section)


def pool_bytes(coordinator: HiSparseCoordinator) -> int:
    """Device bytes of the index pool and of the hot cache's rows, tables and plans."""
    parts = [*vars(coordinator.cache).values(), coordinator.index.data]
    plan = coordinator.cache._plan
    parts += [getattr(plan, name) for name in type(plan).__slots__]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def fill(engine: DecodeEngine, context: int) -> int:
    """Admits requests until one is refused; returns how many were taken, all of them seated."""
    sampling = Sampling(max_tokens=GROWTH, temperature=0.0, ignore_eos=True)
    count = 0
    while (sequence := engine.try_admit((str(count), 0), "front", context, sampling)) is not None:
        sequence.advance(SequenceState.RECEIVING)
        engine.make_ready(sequence, OutputToken(count + 1), ())
        count += 1
    for _ in range(STEPS):
        engine.step()
    return count


def run(
    model: Model, section: KvSection, kv: KvGeometry, point: Point, budget: int
) -> dict[str, Any]:
    """Builds pools of `budget` bytes and fills them; `point.batch` is what is thought to fit."""
    device = model.device
    while True:
        config = config_for(kv, section, point)
        coordinator = build_coordinator(config, model.config, kv, device)
        taken = pool_bytes(coordinator)
        if taken <= budget:
            break
        coordinator.host.close()
        point = replace(point, batch=min(point.batch - 1, budget * point.batch // taken))
        del coordinator
    coordinator.index.data.zero_()
    coordinator.cache.rows.zero_()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    engine = build_engine(config, model, coordinator, send=lambda *_: None, clock=MonotonicClock())
    step_bytes = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
    admitted = fill(engine, point.context)
    engine.check_invariants()
    found = {
        "as_run": admitted,
        "seated": coordinator.seats.num_taken,
        "tokens": engine.num_tokens - admitted,
        "failed": engine.num_failed,
        "pools_mb": round(taken / 1e6, 1),
        "budget_mb": round(budget / 1e6, 1),
        "step_mb": round(step_bytes / 1e6, 1),
    }
    if device.type == "cuda":
        torch.cuda.synchronize()
    coordinator.host.close()
    return found


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    config, section = cut_config(args), KvSection(layout=args.layout)
    model = Model.random(
        config,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        fp8_weights=args.weights == "fp8",
    )
    whole, kv = kv_of(whole_config(args), args.layout), kv_of(config, args.layout)
    results = []
    for kv_gib in args.kv_gib:
        for context in args.contexts:
            for mode in ("resident", "hot"):
                point = Point("capacity", mode, 1, context, args.layout, args.hot_rows, 0)
                seat = seat_bytes(whole, point)
                computed = int(kv_gib * (1 << 30)) // seat
                budget = int(kv_gib * (1 << 30)) * seat_bytes(kv, point) // seat
                row = {"kv_gib": kv_gib, "context": context, "mode": mode, "computed": computed}
                row |= run(model, section, kv, replace(point, batch=computed), budget)
                results.append(row)
                print(json.dumps(row), flush=True)
                if model.device.type == "cuda":
                    torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument(
        "--kv-gib",
        type=float,
        nargs="+",
        default=[43.9],
        help="139 GiB x 0.92 - 4 GiB less weights: V3.2 80 (tensor parallel), GLM-5 88.5",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = measure_all(args)
    if args.out:
        about = {k: str(v) for k, v in vars(args).items()}
        args.out.write_text(json.dumps({"arguments": about, "points": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
