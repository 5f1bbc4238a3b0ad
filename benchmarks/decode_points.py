"""What benchmarks/decode.py measures: points, the model they run, and the least time a step can take.

Counts bytes only; nothing here runs on a device.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from tidepool.common.config import KvSection
from tidepool.common.layouts import KvGeometry
from tidepool.model.config import ModelConfig, geometry
from tidepool.model.random_weights import published_config
from tidepool.model.weight_shapes import expected_shapes

GROWTH = 256
"""Output tokens a sequence has room for."""
HBM_BYTES_US = 4.3e6
"""Bytes a microsecond that the experts' weights come at (measured, benchmarks/results/2026-11-20-decode.md)."""
LINK_BYTES_US = 0.049e6
"""The same for 656-byte rows from pinned host memory, in runs."""
ATTENTION_FLOP_US = 537e6
"""Best sparse MLA decode rate measured on the same GPU."""


@dataclass(frozen=True)
class Point:
    suite: str
    mode: str
    batch: int
    context: int
    layout: str
    hot_rows: int
    misses: int
    resident_batch: int = 0
    """Suite "memory": sequences whose memory, with everything resident, the point may use."""


def whole_config(args: argparse.Namespace) -> ModelConfig:
    """The model as published: what is worth comparing is what fits of it."""
    return published_config(args.model)


def cut_config(args: argparse.Namespace) -> ModelConfig:
    """The few layers and experts that run, with the whole model's share of indexers."""
    return published_config(
        args.model,
        num_layers=args.layers,
        num_dense_layers=args.dense_layers,
        num_experts=args.experts,
        num_leading_indexers=1,
    )


def kv_of(config: ModelConfig, layout: str) -> KvGeometry:
    return geometry(config, KvSection(layout=layout))  # type: ignore[arg-type]


def seat_bytes(kv: KvGeometry, point: Point) -> int:
    """GPU bytes of a seated sequence: rows, ring, index keys, tables."""
    length = point.context + GROWTH
    rows = length if point.mode == "resident" else point.hot_rows
    rows_bytes = (rows + 2 * kv.page_size) * kv.num_layers * kv.row.row_bytes
    keys = kv.num_pages(length) * kv.num_index_layers * kv.index_page_bytes
    tables = kv.num_index_layers * 4 * (length + 2 * rows)
    return rows_bytes + keys + tables


def points(args: argparse.Namespace) -> list[Point]:
    """All points asked for. Equal memory: as much as `resident_batches` sequences of the *whole* model
    take with everything resident, spent on sequences with a hot buffer."""
    kv, suites = kv_of(whole_config(args), args.layout), args.suite.split(",")

    def point(suite: str, mode: str, batch: int, context: int, resident_batch: int = 0) -> Point:
        sizes = (args.hot_rows, args.misses, resident_batch)
        return Point(suite, mode, batch, context, args.layout, *sizes)

    found: list[Point] = []
    if "memory" in suites:
        for context in args.contexts:
            for resident in args.resident_batches:
                found.append(point("memory", "resident", resident, context, resident))
                budget = resident * seat_bytes(kv, found[-1])
                batch = budget // seat_bytes(kv, point("memory", "hot", 1, context))
                batch = min(batch, args.max_batch)
                found += [point("memory", m, batch, context, resident) for m in ("hot", "no-copy")]
    if "fits" in suites:
        for batch in (1, 16):
            found += [point("fits", mode, batch, args.fits_context) for mode in ("resident", "hot")]
    if "swap" in suites:
        for batch in args.swap_batches:
            found += [
                point("swap", m, batch, args.swap_context) for m in ("hot", "serial", "no-copy")
            ]
    return list(dict.fromkeys(found))


def least_us(
    config: ModelConfig, kv: KvGeometry, point: Point, *, is_fp8: bool
) -> dict[str, float]:
    """Microseconds that a step of `point` takes at least, by what it must move and multiply.

    weights: read once, of the experts those that a uniform choice hits; head: the output layer;
    keys: index keys of all positions; attention: selected rows read, or their products, whichever
    takes longer; link: missed rows, beside all the rest. `total`: of a step in which they overlap
    wholly, `in_the_open`: in which they do not at all.
    """
    length = point.context + GROWTH // 2
    chosen = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** point.batch
    weights = head = 0.0
    for name, shape in expected_shapes(config).items():
        size = 1
        for side in shape:
            size *= side
        if name == "lm_head.weight":
            head = 2 * size
        elif name != "model.embed_tokens.weight":
            is_small = len(shape) == 1 or "gate.weight" in name or "weights_proj" in name
            size *= 2 if is_small or not is_fp8 else 1
            weights += size * (chosen if ".experts." in name else 1)
    selected = min(config.index_topk, length)
    rows = point.batch * selected * kv.num_layers
    per_row = 2 * config.num_attention_heads * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
    keys = point.batch * length * kv.num_index_layers * kv.index.token_bytes
    is_missing = point.mode in ("hot", "serial")
    missed = point.batch * point.misses * kv.num_layers * kv.row.row_bytes * is_missing
    parts = {
        "weights": weights / HBM_BYTES_US,
        "head": head / HBM_BYTES_US,
        "keys": keys / HBM_BYTES_US,
        "attention": max(
            rows * kv.row.row_bytes / HBM_BYTES_US, rows * per_row / ATTENTION_FLOP_US
        ),
    }
    link, rest = missed / LINK_BYTES_US, sum(parts.values())
    parts |= {"link": link, "total": max(link, rest), "in_the_open": link + rest}
    return {name: round(us, 1) for name, us in parts.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the model and the points."""
    parser.add_argument("--model", default="deepseek-v3.2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dense-layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--weights", choices=["bf16", "fp8"], default="fp8")
    parser.add_argument("--layout", default="mla_fp8")
    parser.add_argument("--suite", default="memory,fits,swap")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--resident-batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--fits-context", type=int, default=32768)
    parser.add_argument("--swap-context", type=int, default=65536)
    parser.add_argument("--swap-batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--hot-rows", type=int, default=4096)
    parser.add_argument("--misses", type=int, default=137)
    parser.add_argument("--device", default="cuda")
