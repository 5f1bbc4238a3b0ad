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
from .cuda_library import CudaLibrary, dense_rows, fields, num_processors, stream_of

MAX_SMEM_BYTES = {8: 163 * 1024, 9: 227 * 1024, 10: 227 * 1024}
"""Dynamic shared memory of a CTA, by the major number of the compute capability."""
_MIN_SMEM_BYTES = 96 * 1024
_MIN_CHUNK = 2048
"""A CTA with fewer positions waits longer for the others than it works."""


class SelectParams(ctypes.Structure):
    """Mirror of tidepool::SelectParams (csrc/select_topk.cu)."""

    _fields_ = fields(
        pointers="scores lengths topk_idx",
        int64="score_stride out_stride",
        int32="batch num_columns topk lengths_are_64 num_ranks capacity",
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """How a launch is spread.

    Attributes:
        num_ranks: CTAs a row: 1, 2, 4, 8 or 16; 1 before compute capability 9.0.
        num_threads: of a CTA: 512 or 1024.
        capacity: positions of a CTA held in shared memory, all of its stretch; 0: none.
    """

    num_ranks: int
    num_threads: int
    capacity: int


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
        shape.capacity,
    )
    code = library.tidepool_select_topk(ctypes.byref(params), shape.num_threads, stream_of(device))
    _LIBRARY.check("select_topk", code, params)


@lru_cache(maxsize=4096)
def choose_shape(batch: int, num_columns: int, device: torch.device) -> Shape:
    """About one CTA a processor, and stretches that fit into shared memory where that is possible."""
    num_ranks = 1
    if torch.cuda.get_device_capability(device) >= (9, 0):
        limit = num_processors(device)
        while num_ranks < 16 and (
            (2 * num_ranks * batch <= limit and num_columns > num_ranks * _MIN_CHUNK)
            or not capacity(num_columns, num_ranks, device)
        ):
            num_ranks *= 2
    return Shape(num_ranks, 1024, capacity(num_columns, num_ranks, device))


def capacity(num_columns: int, num_ranks: int, device: torch.device) -> int:
    """Positions of a CTA's stretch; 0 if they do not fit into shared memory."""
    chunk = (-(-num_columns // num_ranks) + 31) // 32 * 32
    room = _max_smem(device) - _LIBRARY.on(device).tidepool_select_topk_smem()
    return chunk if 4 * chunk <= room else 0
