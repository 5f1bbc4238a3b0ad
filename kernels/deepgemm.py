"""Indexer scores through DeepGEMM's wheel (extra `kernels`: sgl-deep-gemm), for Hopper and later.

Called by index_scores.py on torch's current stream. Its pages are ours: 64 keys of 128 values, then
their float32 scales. Queries go in rounded to e4m3, their powers of two folded into the weights (one
launch). Its schedule depends on the lengths: made on the device once a step. The wheel allocates its
result from torch's caching allocator (inside a captured graph: from the graph's pool, fixed), and
callers use that. It compiles for 1 to 2 s at the first call of a shape, which must not be in a capture.

What differs from index_logits: positions from a row's length on are not written, and holes in a page
table are not known (a decode step's have none before its length).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

PAGE_SIZE = 64
WIDTH = 128
HEADS = (32, 64)
_TOKEN_BYTES = WIDTH + 4


@cache
def missing() -> str:
    """Why the wheel cannot be used on this machine; empty if it can."""
    if find_spec("deep_gemm") is None:
        return "the module deep_gemm is not installed (extra `kernels`)"
    if torch.cuda.get_device_capability() < (9, 0):
        return "the GPU is older than sm_90"
    try:
        import_module("deep_gemm")
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        return f"the module deep_gemm cannot be loaded: {error}"
    return ""


def can_take(query_BID: Tensor, pages_PX: Tensor, page_size: int, layout: str) -> bool:
    """Whether the wheel is there and has a kernel for the layout and shapes."""
    return (
        layout == "index_k"
        and page_size == PAGE_SIZE
        and query_BID.shape[1] in HEADS
        and query_BID.shape[2] == WIDTH
        and pages_PX.is_contiguous()
        and query_BID.is_cuda
        and not missing()
    )


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a step's lengths are dealt to processors; device tensors.

    Attributes:
        lengths_B1: int32 [B, 1].
        parts: int32 [processors + 1, 2].
    """

    lengths_B1: Tensor
    parts: Tensor


def make_schedule(lengths_B: Tensor) -> Schedule:
    """Two launches; no synchronisation."""
    module = import_module("deep_gemm")
    lengths_B1 = lengths_B.to(torch.int32)[:, None].contiguous()
    parts = module.get_paged_mqa_logits_metadata(lengths_B1, PAGE_SIZE, module.get_num_sms())
    return Schedule(lengths_B1, parts)


def index_scores(
    schedule: Schedule,
    query_BID: Tensor,
    weight_BI: Tensor,
    pages_PX: Tensor,
    page_table_BP: Tensor,
    num_columns: int,
) -> Tensor:
    """Scores float32 [B, num_columns], rows further apart; for what `can_take` takes."""
    from .triton_index_logits_chunk import prepare_queries  # noqa: PLC0415  (needs Triton)

    rounded = prepare_queries(query_BID, weight_BI, torch.float8_e4m3fn, rounds_queries=True)
    return scores_of_fp8(schedule, *rounded, pages_PX, page_table_BP, num_columns)


def scores_of_fp8(
    schedule: Schedule,
    query_BID: Tensor,
    weight_BI: Tensor,
    pages_PX: Tensor,
    page_table_BP: Tensor,
    num_columns: int,
) -> Tensor:
    """As `index_scores`, of queries in e4m3 and weights that hold their powers."""
    scores_BC: Tensor = import_module("deep_gemm").fp8_paged_mqa_logits(
        query_BID[:, None],
        pages_PX.view(-1, PAGE_SIZE, 1, _TOKEN_BYTES),
        weight_BI,
        schedule.lengths_B1,
        page_table_BP,
        schedule.parts,
        num_columns,
        False,
    )
    return scores_BC
