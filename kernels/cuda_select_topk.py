"""CUDA side of select_topk (kernel in csrc/select_topk.cu).

A cluster of CTAs a row, so that one long row uses many processors. Launched on torch's current
stream; no allocation and no synchronisation. Positions come in ascending order, as the contract
says: each warp knows how many selected positions stand before its own, so the order is free.

What differs from the reference: lengths outside [0, C] are clamped and do not raise.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..common.errors import KernelError
from .cuda_library import CudaLibrary, dense_rows, fields, stream_of

MAX_SMEM_BYTES = {8: 163 * 1024, 9: 227 * 1024, 10: 227 * 1024}
"""Dynamic shared memory of a CTA, by the major number of the compute capability."""
_MIN_SMEM_BYTES = 96 * 1024
_FIXED_SMEM_BYTES = 26 * 1024
"""At least sizeof(SelectSmem)."""
_RANKS = ((8, 8), (16, 5), (32, 3), (64, 2))
"""(batch up to, CTAs a row). A cluster of 4 would use more of the device at batch 32, but 32 of them do
not run at once: clusters do not cross the boundaries of processor groups."""
_MANY_COLUMNS = 1 << 18
_MANY_RANKS, _MANY_RANKS_BATCH = 16, 4
"""For longer rows, up to this batch."""
_CANDIDATES = (4096, 2560)
"""Candidates with the keys beside them, where both fit; the threshold's 11 bits are shared by about
1,000 of 64K normal scores, and 2,200 of 128K."""
_CANDIDATES_ALONE = 6144
_MIN_CHUNK = 4096
"""A CTA with fewer positions waits longer for the others than it works."""


class SelectParams(ctypes.Structure):
    """Mirror of tidepool::SelectParams (csrc/select_topk.cu)."""

    _fields_ = fields(
        pointers="scores lengths topk_idx",
        int64="score_stride out_stride",
        int32="batch num_columns topk lengths_are_64 num_ranks num_groups max_candidates num_keys",
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """How a launch is spread.

    Attributes:
        num_ranks: CTAs a row, 1 to 16; 1 before compute capability 9.0.
        num_threads: of a CTA: 512 or 1024.
    """

    num_ranks: int
    num_threads: int


def _max_smem(device: torch.device) -> int:
    major, _ = torch.cuda.get_device_capability(device)
    return MAX_SMEM_BYTES.get(major, _MIN_SMEM_BYTES)


def _prepare(library: ctypes.CDLL, device: torch.device) -> int:
    may_cluster = torch.cuda.get_device_capability(device) >= (9, 0)
    return library.tidepool_prepare(_max_smem(device), int(may_cluster))


_LIBRARY = CudaLibrary("select_topk.cu", _prepare)


def select_topk(scores_BC: Tensor, lengths_B: Tensor, topk_idx_BK: Tensor) -> None:
    """tidepool::select_topk on CUDA; arguments of kernels/select_topk.py."""
    launch(None, scores_BC, lengths_B, topk_idx_BK)


def launch(shape: Shape | None, scores_BC: Tensor, lengths_B: Tensor, topk_idx_BK: Tensor) -> None:
    """As `select_topk`; `shape` None: chosen."""
    batch, topk = topk_idx_BK.shape
    if not batch or not topk:
        return
    if topk_idx_BK.stride(1) != 1:
        raise KernelError(f"select_topk: topk_idx_BK has strides {topk_idx_BK.stride()}")
    scores_BC, lengths_B = dense_rows(scores_BC), lengths_B.contiguous()
    device = scores_BC.device
    library = _LIBRARY.on(device)
    shape = shape or choose_shape(batch, scores_BC.shape[1], device)
    params = SelectParams(
        scores_BC.data_ptr(),
        lengths_B.data_ptr(),
        topk_idx_BK.data_ptr(),
        scores_BC.stride(0),
        topk_idx_BK.stride(0),
        batch,
        scores_BC.shape[1],
        topk,
        lengths_B.dtype == torch.int64,
        shape.num_ranks,
        *_shared_memory(scores_BC.shape[1], shape.num_ranks, device),
    )
    code = library.tidepool_select_topk(ctypes.byref(params), shape.num_threads, stream_of(device))
    _LIBRARY.check("select_topk", code, params)


@lru_cache(maxsize=4096)
def choose_shape(batch: int, num_columns: int, device: torch.device) -> Shape:
    """As many CTAs a row as let all rows run at once, by measurement on an H200 (see _RANKS)."""
    num_ranks = 1
    if torch.cuda.get_device_capability(device) >= (9, 0):
        if num_columns > _MANY_COLUMNS and batch <= _MANY_RANKS_BATCH:
            num_ranks = _MANY_RANKS
        else:
            num_ranks = next((ranks for limit, ranks in _RANKS if batch <= limit), 1)
        num_ranks = max(1, min(num_ranks, num_columns // _MIN_CHUNK))
    return Shape(num_ranks, 1024)


@lru_cache(maxsize=4096)
def _shared_memory(num_columns: int, num_ranks: int, device: torch.device) -> tuple[int, int, int]:
    """(num_groups, max_candidates, num_keys) of SelectParams."""
    num_groups = -(-num_columns // (32 * num_ranks))
    num_keys = 32 * num_groups
    room = (_max_smem(device) - _FIXED_SMEM_BYTES) // 4 - num_groups
    for max_candidates in _CANDIDATES:
        if 2 * max_candidates + max(num_keys, max_candidates) <= room:
            return num_groups, max_candidates, num_keys
    return num_groups, min(_CANDIDATES_ALONE, max(room // 3, 1)), 0
