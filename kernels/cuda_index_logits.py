"""CUDA side of index_logits for Hopper, FP8 keys of 128 values (csrc/index_logits.cu).

`can_take` says which calls it is for; others go to Triton (triton_index_logits.py). Launched on
torch's current stream; no allocation and no synchronisation. What differs from the reference: lengths
and pages out of range are clamped and hidden and do not raise; FP8 tensor cores add up with about 14
bits.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cuda_library import CudaLibrary, fields, num_processors, stream_of

WIDTH = 128
MAX_HEADS = 64
MAX_BATCH = 512
MIN_POSITIONS = 1 << 18
"""B * C below which Triton, which starts sooner, was faster: 8.1 to 10.7 us at 1 x 64K, 31.3 to 30.5 at 8."""
TILE = 64


class IndexParams(ctypes.Structure):
    """Mirror of tidepool::IndexParams (csrc/index_logits.cu)."""

    _fields_ = fields(
        pointers="query weight pages page_table lengths scores",
        int64="query_stride_b query_stride_i weight_stride page_stride table_stride score_stride",
        int32="batch num_heads num_pages num_columns room page_shift lengths_are_64",
    )


_LIBRARY = CudaLibrary("index_logits.cu", lambda library, _: library.tidepool_prepare())


def can_take(
    query_BID: Tensor,
    weight_BI: Tensor,
    pages_PX: Tensor,
    page_table_BP: Tensor,
    scores_BC: Tensor,
    page_size: int,
    layout: str,
) -> bool:
    """Whether the layout, shapes, dtypes and strides are those the kernel is written for."""
    batch, num_heads, width = query_BID.shape
    strides = query_BID.stride()
    return (
        layout == "index_k"
        and width == WIDTH
        and 0 < num_heads <= MAX_HEADS
        and 0 < batch <= MAX_BATCH
        and query_BID.dtype == torch.bfloat16
        and strides[2] == 1
        and not (query_BID.data_ptr() | 2 * strides[0] | 2 * strides[1]) % 16
        and not page_size % TILE
        and not page_size & (page_size - 1)
        and pages_PX.shape[0] > 0
        and pages_PX.stride(1) == 1
        and not (pages_PX.data_ptr() | pages_PX.stride(0)) % 16
        and page_table_BP.shape[1] > 0
        and weight_BI.stride(1) == page_table_BP.stride(1) == scores_BC.stride(1) == 1
        and torch.cuda.get_device_capability(scores_BC.device) == (9, 0)
    )


def launch(
    query_BID: Tensor,
    weight_BI: Tensor,
    pages_PX: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    scores_BC: Tensor,
    page_size: int,
    rounds_queries: bool,
) -> None:
    """tidepool::index_logits for what `can_take` takes."""
    device = scores_BC.device
    lengths_B = lengths_B.contiguous()
    params = IndexParams(
        query_BID.data_ptr(),
        weight_BI.data_ptr(),
        pages_PX.data_ptr(),
        page_table_BP.data_ptr(),
        lengths_B.data_ptr(),
        scores_BC.data_ptr(),
        *query_BID.stride()[:2],
        weight_BI.stride(0),
        pages_PX.stride(0),
        page_table_BP.stride(0),
        scores_BC.stride(0),
        query_BID.shape[0],
        query_BID.shape[1],
        pages_PX.shape[0],
        scores_BC.shape[1],
        min(scores_BC.shape[1], page_table_BP.shape[1] * page_size),
        page_size.bit_length() - 1,
        lengths_B.dtype == torch.int64,
    )
    code = _LIBRARY.on(device).tidepool_index_logits(
        ctypes.byref(params),
        int(not rounds_queries),
        num_processors(device),
        stream_of(device),
    )
    _LIBRARY.check("index_logits", code, params)
