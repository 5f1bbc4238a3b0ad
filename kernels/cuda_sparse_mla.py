"""CUDA side of sparse_mla for Hopper, rows of 512 + 64 values, bf16 or FP8 (csrc/sparse_mla.cu).

`can_take` says which calls it is for; others go to Triton (triton_sparse_mla.py). Launched on torch's
current stream, without a synchronisation; partial results live in memory of torch's caching
allocator. What differs from the reference: rows outside [0, N) count as -1 and do not raise.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from .cuda_library import CudaLibrary, fields, num_processors, stream_of

HEADS = 64
TILE_ROWS = 64
LATENT, ROPE = 512, 64
LAYOUTS = ("mla_bf16", "mla_fp8")
MAX_SPLITS = 64
MAX_CLUSTER_SPLITS = 8
_TRIM_BATCH = 512
"""Above it a call is a prompt's chunk, whose first tokens see few rows: it pays to look where they end."""
_LOG2E = 1.4426950408889634


class MlaParams(ctypes.Structure):
    """Mirror of tidepool::MlaParams (csrc/sparse_mla.cu)."""

    _fields_ = [
        *fields(
            pointers="q_latent q_rope rows row_idx parts lse out",
            int64="latent_stride_b latent_stride_h rope_stride_b rope_stride_h idx_stride_b "
            "out_stride_b out_stride_h row_stride",
            int32="batch num_heads num_selected num_rows num_splits split_rows trims "
            "joins_in_cluster",
        ),
        ("scale_log2", ctypes.c_float),
    ]


_LIBRARY = CudaLibrary("sparse_mla.cu", lambda library, _: library.tidepool_prepare())


def can_take(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    layout: str,
    out_BHC: Tensor,
) -> bool:
    """Whether the layout, shapes, dtypes and strides are those the kernel is written for."""
    latent_dim = q_latent_BHC.shape[2]
    return (
        layout in LAYOUTS
        and bool(row_idx_BK.numel() and rows_NX.shape[0])
        and (latent_dim, q_rope_BHR.shape[2]) == (LATENT, ROPE)
        and q_latent_BHC.dtype == q_rope_BHR.dtype == out_BHC.dtype == torch.bfloat16
        and row_idx_BK.stride(1) == 1
        and all(_is_aligned(tensor) for tensor in (q_latent_BHC, q_rope_BHR, out_BHC))
        and rows_NX.stride(1) == 1
        and (rows_NX.data_ptr() | rows_NX.stride(0)) % 16 == 0
        and torch.cuda.get_device_capability(out_BHC.device) == (9, 0)
    )


def launch(
    num_splits: int | None,
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
    out_BHC: Tensor,
) -> None:
    """tidepool::sparse_mla for what `can_take` takes; `num_splits` None: chosen."""
    batch, num_heads, _ = q_latent_BHC.shape
    num_selected = row_idx_BK.shape[1]
    device = out_BHC.device
    if num_splits is None:
        num_splits = choose_splits(batch, num_heads, num_selected, num_processors(device))
    joins = num_splits > 1 and batch * -(-num_heads // HEADS) <= max_clusters(num_splits, device)
    parts = torch.empty(0, dtype=torch.float32, device=device)
    if num_splits > 1 and not joins:
        parts = torch.empty(
            batch * num_splits * num_heads * (LATENT + 1), dtype=torch.float32, device=device
        )
    params = MlaParams(
        q_latent_BHC.data_ptr(),
        q_rope_BHR.data_ptr(),
        rows_NX.data_ptr(),
        row_idx_BK.data_ptr(),
        parts.data_ptr(),
        parts.data_ptr() + 4 * batch * num_splits * num_heads * LATENT,
        out_BHC.data_ptr(),
        *q_latent_BHC.stride()[:2],
        *q_rope_BHR.stride()[:2],
        row_idx_BK.stride(0),
        *out_BHC.stride()[:2],
        rows_NX.stride(0),
        batch,
        num_heads,
        num_selected,
        rows_NX.shape[0],
        num_splits,
        -(-num_selected // (num_splits * TILE_ROWS)) * TILE_ROWS,
        batch > _TRIM_BATCH,
        joins,
        scale * _LOG2E,
    )
    library = _LIBRARY.on(device)
    is_fp8 = int(layout == "mla_fp8")
    code = library.tidepool_sparse_mla(ctypes.byref(params), is_fp8, stream_of(device))
    _LIBRARY.check("sparse_mla", code, params)


def choose_splits(batch: int, num_heads: int, num_selected: int, num_ctas: int) -> int:
    """As many as give every processor a CTA, each with a tile of rows at least."""
    wanted = num_ctas // (batch * -(-num_heads // HEADS))
    return max(1, min(wanted, MAX_SPLITS, -(-num_selected // TILE_ROWS)))


@cache
def max_clusters(num_splits: int, device: torch.device) -> int:
    """Clusters of `num_splits` CTAs that run at once on the device: they join in shared memory."""
    if num_splits > MAX_CLUSTER_SPLITS:
        return 0
    count = ctypes.c_int(0)
    code = _LIBRARY.on(device).tidepool_max_clusters(num_splits, ctypes.byref(count))
    return 0 if code else count.value


def _is_aligned(tensor: Tensor) -> bool:
    """Rows of heads start at multiples of 16 bytes and are dense."""
    strides = tensor.stride()
    return strides[2] == 1 and not (tensor.data_ptr() | 2 * strides[0] | 2 * strides[1]) % 16
