"""What was measured of the attention backends: the table behind the choice "auto".

data/sparse_mla.json is written by benchmarks/gpu_ops.py --table and says where it was measured. Read
once a process, by attention.py; needs no GPU.
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, cast

Backend = Literal["auto", "flashmla_sparse", "cuda", "triton", "reference"]
TABLE = Path(__file__).parent / "data" / "sparse_mla.json"


@lru_cache(maxsize=4096)
def ranking(layout: str, num_heads: int, batch: int) -> tuple[Backend, ...]:
    """Backends from the fastest to the slowest at the nearest size that was measured.

    The nearest size has as many heads or the next more, and the largest batch not above this one.
    Triton alone where nothing was measured of `layout`.
    """
    heads = _of_layout(layout)
    if not heads:
        return ("triton",)
    batches = heads[min((h for h in heads if h >= num_heads), default=max(heads))]
    times = batches[max((b for b in batches if b <= batch), default=min(batches))]
    return cast(tuple[Backend, ...], tuple(sorted(times, key=times.__getitem__)))


@cache
def _of_layout(layout: str) -> dict[int, dict[int, dict[str, float]]]:
    """Microseconds by heads, batch and backend."""
    measured: dict[str, Any] = json.loads(TABLE.read_text())["us"].get(layout, {})
    return {
        int(heads): {int(batch): times for batch, times in batches.items()}
        for heads, batches in measured.items()
    }
