"""CUDA side of sparse_mla for Hopper, rows of 512 + 64 values, bf16 or FP8 (csrc/sparse_mla.cu).

`can_take` says which calls it is for; others go to Triton (triton_sparse_mla.py). Launched on torch's
current stream, without a synchronisation; partial results live in memory of torch's caching
allocator. What differs from the reference: rows outside [0, N) count as -1 and do not raise.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .cuda_library import CudaLibrary, fields, num_processors, stream_of

HEADS = 64
TILE_ROWS = 64
LATENT, ROPE = 512, 64
LAYOUTS = ("mla_bf16", "mla_fp8")
MAX_CLUSTER = 8
_MAX_LANES_A_TOKEN = 64
_TRIM_BATCH = 512
"""Above it a call is a prompt's chunk, whose first tokens see few rows: it pays to look where they end."""
_LOG2E = 1.4426950408889634
_ALONE_US = (14.0, 2.4)
_CLUSTER_US = (14.0, 2.25)
_JOINED_US = (14.0, 2.87)
_UNEVEN_US = (17.3, 2.96)
_UNEVEN_BF16_US = (17.3, 3.2)
"""Start and tile of a lane, as measured on an H200 with FP8 rows and 128 heads; bf16 rows take 0.8 of it."""
_CLUSTER_LANE_US = 1.0


class MlaParams(ctypes.Structure):
    """Mirror of tidepool::MlaParams (csrc/sparse_mla.cu)."""

    _fields_ = [
        *fields(
            pointers="q_latent q_rope rows row_idx parts lse out",
            int64="latent_stride_b latent_stride_h rope_stride_b rope_stride_h idx_stride_b "
            "out_stride_b out_stride_h row_stride",
            int32="batch num_heads num_selected num_rows num_tiles tile_inverse num_lanes cluster "
            "trims",
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
        and row_idx_BK.shape[0] * (row_idx_BK.shape[1] // TILE_ROWS + 1) ** 2 < 1 << 32
        and all(_is_aligned(tensor) for tensor in (q_latent_BHC, q_rope_BHR, out_BHC))
        and rows_NX.stride(1) == 1
        and (rows_NX.data_ptr() | rows_NX.stride(0)) % 16 == 0
        and torch.cuda.get_device_capability(out_BHC.device) == (9, 0)
    )


def launch(
    plan: Plan | None,
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
    out_BHC: Tensor,
) -> None:
    """tidepool::sparse_mla for what `can_take` takes; `plan` None: chosen."""
    batch, num_heads, _ = q_latent_BHC.shape
    num_selected = row_idx_BK.shape[1]
    num_tiles = -(-num_selected // TILE_ROWS)
    device = out_BHC.device
    is_fp8 = layout == "mla_fp8"
    plan = plan or plan_of(batch, num_heads, num_tiles, device, is_fp8=is_fp8)
    parts = torch.empty(0, dtype=torch.float32, device=device)
    if plan.num_lanes != batch and plan.cluster == 1:
        count = 2 * plan.num_lanes * num_heads * (LATENT + 1)
        parts = torch.empty(count, dtype=torch.float32, device=device)
    params = MlaParams(
        q_latent_BHC.data_ptr(),
        q_rope_BHR.data_ptr(),
        rows_NX.data_ptr(),
        row_idx_BK.data_ptr(),
        parts.data_ptr(),
        parts.data_ptr() + 4 * 2 * plan.num_lanes * num_heads * LATENT,
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
        num_tiles,
        -(-(1 << 32) // num_tiles),
        plan.num_lanes,
        plan.cluster,
        plan.trims,
        scale * _LOG2E,
    )
    library = _LIBRARY.on(device)
    code = library.tidepool_sparse_mla(ctypes.byref(params), int(is_fp8), stream_of(device))
    _LIBRARY.check("sparse_mla", code, params)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the tiles of all tokens are dealt out: evenly to `num_lanes`, a CTA for each 64 heads.

    Attributes:
        cluster: lanes a token, which then join in shared memory; 1: lanes may share tokens, and what
            they share is joined by a second kernel.
        trims: a lane is a token, and looks first where its rows end.
    """

    num_lanes: int
    cluster: int = 1
    trims: bool = False


@cache
def plan_of(
    batch: int, num_heads: int, num_tiles: int, device: torch.device, *, is_fp8: bool
) -> Plan:
    """The cheapest by `cost_us` of those that the device can run."""
    if batch > _TRIM_BATCH:
        return Plan(batch, trims=True)
    num_blocks = -(-num_heads // HEADS)
    num_lanes = max(1, num_processors(device) // num_blocks)
    fitting = [
        plan
        for plan in plans_of(batch, num_tiles, num_lanes)
        if plan.cluster == 1 or batch * num_blocks <= max_clusters(plan.cluster, device)
    ]
    return min(fitting, key=lambda plan: cost_us(plan, batch, num_tiles, num_lanes, is_fp8=is_fp8))


def plans_of(batch: int, num_tiles: int, num_lanes: int) -> list[Plan]:
    """A lane a token; some lanes a token, in a cluster or not; as many lanes as run at once."""
    most = batch * min(num_tiles, _MAX_LANES_A_TOKEN)
    return [
        Plan(batch),
        Plan(batch * max(1, min(num_tiles, num_lanes // batch))),
        Plan(max(1, min(num_lanes, most))),
        *(Plan(batch * size, size) for size in range(2, min(MAX_CLUSTER, num_tiles) + 1)),
    ]


def cost_us(plan: Plan, batch: int, num_tiles: int, num_lanes: int, *, is_fp8: bool) -> float:
    """Of a call whose `num_lanes` run at once; only compared."""
    tiles = -(-batch * num_tiles // plan.num_lanes)
    if plan.num_lanes % batch:
        start, tile = _UNEVEN_US if is_fp8 else _UNEVEN_BF16_US
    elif plan.num_lanes == batch:
        start, tile = _ALONE_US
    elif plan.cluster == 1:
        start, tile = _JOINED_US
    else:
        start, tile = _CLUSTER_US
        start += plan.cluster * _CLUSTER_LANE_US
    return -(-plan.num_lanes // num_lanes) * (start + tiles * tile)


@cache
def max_clusters(size: int, device: torch.device) -> int:
    """Clusters of `size` CTAs that run at once on the device: they join in shared memory."""
    count = ctypes.c_int(0)
    code = _LIBRARY.on(device).tidepool_max_clusters(size, ctypes.byref(count))
    return 0 if code else count.value


def _is_aligned(tensor: Tensor) -> bool:
    """Rows of heads start at multiples of 16 bytes and are dense."""
    strides = tensor.stride()
    return strides[2] == 1 and not (tensor.data_ptr() | 2 * strides[0] | 2 * strides[1]) % 16
