"""How a node scores its indexer's keys: the precision of queries, and which kernel (GPU only).

Set once by a node at its start (model/runtime.py), before the first call; read by index_logits.py and
index_scores.py. Needs no GPU and no Triton. "auto" goes by a measured table, data/index_logits.json,
which benchmarks/index_logits.py --table writes and which says where it was measured.

Queries are as the model computes them ("bf16", the default), or rounded to e4m3 as DeepSeek's own
inference does ("fp8"); keys in float32 always keep theirs. Why that default: docs/kernels.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from ..common.errors import ConfigError

Queries = Literal["auto", "fp8", "bf16"]
Backend = Literal["auto", "cuda", "triton", "deepgemm"]
TABLE = Path(__file__).parent / "data" / "index_logits.json"


@dataclass(slots=True)
class _Choice:
    backend: Backend = "auto"
    rounds_queries: bool = False


_choice = _Choice()


def use(backend: Backend, queries: Queries, device: torch.device) -> None:
    """Sets the process's choice. Raises ConfigError where `device` cannot run it."""
    reason = _missing(backend, device)
    if backend == "deepgemm" and queries == "bf16":
        reason = "its kernel takes FP8 queries, and kernels.index_queries is bf16"
    if reason:
        raise ConfigError(f"kernels.index_logits: {backend!r} cannot be used here: {reason}")
    _choice.backend = backend
    _choice.rounds_queries = queries == "fp8" or backend == "deepgemm"


def backend() -> Backend:
    return _choice.backend


def wants_deepgemm(batch: int) -> bool:
    """Whether a step of so many rows goes to DeepGEMM's wheel, if that can take it.

    By name, or where queries are rounded and it was faster at the largest batch measured that is not
    above this one.
    """
    if _choice.backend != "auto":
        return _choice.backend == "deepgemm"
    if not _choice.rounds_queries:
        return False
    us = _measured()
    times = us[max((b for b in us if b <= batch), default=min(us))]
    return times["deepgemm"] < min(times["cuda"], times["triton"])


def rounds_queries(layout: str, asked: bool | None = None) -> bool:
    """Whether queries of keys in `layout` are rounded: as asked, or as chosen (None)."""
    return layout == "index_k" and (_choice.rounds_queries if asked is None else asked)


@cache
def _measured() -> dict[int, dict[str, float]]:
    """Microseconds by batch and backend, of queries that are rounded."""
    return {int(batch): times for batch, times in json.loads(TABLE.read_text())["us"].items()}


def _missing(backend: Backend, device: torch.device) -> str:
    if backend == "auto":
        return ""
    if device.type != "cuda":
        return "it needs a GPU, the model runs on the CPU"
    if backend == "deepgemm":
        from . import deepgemm  # noqa: PLC0415  (asks for the wheel)

        return deepgemm.missing()
    if backend == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        return "the GPU is not sm_90"
    return ""
