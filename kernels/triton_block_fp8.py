"""Triton side of block_fp8_linear, and the quantisation of activations for all FP8 products.

Launches: activations become FP8 with a scale for each token and 128 values; then a product whose
partial sums of 128 are scaled and added up in float32 (FP8 tensor cores add up with about 14
bits); and, where few tiles would leave processors idle, the sum of a product cut along I. On
torch's current stream, without a synchronisation; intermediate results live in memory of torch's
caching allocator (fixed inside a captured graph). A NaN stays in its row. Sizes that change from
call to call are not specialised on, so that a kernel is compiled once a tile shape.

Suffixes: T tokens, O and I width of output and input, Q blocks of I; in the kernels R rows, N
columns and K reduction steps of a tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .cuda_library import num_processors

_JOIN_BLOCK = 512
_MIN_TORCH_TOKENS = 129
"""By measurement on an H200; see docs/kernels.md."""
_TORCH_ALIGN = 8
_MIN_SPLIT_Q = 4
"""Blocks of I that a split is worth."""
_MIN_SAVED_Q = 16
"""Blocks of I that a program must be spared before a sum is split: adding up is a launch more."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a product: rows, columns (a divisor of 128), warps, pipeline stages, splits of I."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    num_splits: int = 1
    is_swapped: bool = False
    """The weight is the left factor."""


@triton.jit
def scaled_fp8(value_RN):
    """(values / scale as e4m3, scale float32 [R]); the largest magnitude of a row becomes 448."""
    amax_R = tl.max(tl.abs(value_RN), 1)
    # Rounds as the reference's division does; `/` is off by an ulp, which moves ties. div_rn of every
    # value is slow, and five times slower where values are 0, as in rows of padding.
    scale_R = tl.div_rn(tl.maximum(amax_R, 1e-4), tl.full(amax_R.shape, 448.0, tl.float32))
    inverse_R = tl.div_rn(tl.full(amax_R.shape, 1.0, tl.float32), scale_R)
    scale_RN = tl.broadcast_to(scale_R[:, None], value_RN.shape)
    inverse_RN = tl.broadcast_to(inverse_R[:, None], value_RN.shape)
    quotient_RN = value_RN * inverse_RN
    rest_RN = tl.fma(-quotient_RN, scale_RN, value_RN)
    quotient_RN = tl.fma(rest_RN, inverse_RN, quotient_RN)
    # Not clamped: rounding cannot leave the range, and a clamp would lose a NaN.
    return quotient_RN.to(tl.float8e4nv), scale_R


@triton.jit(do_not_specialize=["scale_stride_t", "scale_stride_q", "num_tokens"])
def _quantize_kernel(
    x,
    out,
    scale,
    x_stride,
    scale_stride_t,
    scale_stride_q,
    num_tokens,
    num_i,
    ROWS: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    if IS_OVERLAPPED:
        gdc_launch_dependents()
    r_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = tl.program_id(1)
    i_I = q * 128 + tl.arange(0, 128)
    mask = (r_R < num_tokens)[:, None] & (i_I < num_i)[None, :]
    row_R = r_R.to(tl.int64)
    value = tl.load(x + row_R[:, None] * x_stride + i_I[None, :], mask=mask, other=0.0)
    value, scale_R = scaled_fp8(value.to(tl.float32))
    tl.store(out + row_R[:, None] * num_i + i_I[None, :], value, mask=mask)
    tl.store(scale + row_R * scale_stride_t + q * scale_stride_q, scale_R, mask=r_R < num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "part_stride", "row_tiles", "split_q"])
def _linear_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    num_tokens,
    num_n,
    num_k,
    out_stride,
    part_stride,
    row_tiles,
    split_q,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_SWAPPED: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """One tile, or its sum over `split_q` blocks of I; neighbours share a stretch of the weight.

    IS_SWAPPED: the weight is the left factor, so that few tokens fill the tensor cores' narrow side.
    IS_OVERLAPPED: is launched beside the quantisation, and waits for it.
    """
    tile = tl.program_id(0) // row_tiles
    r_R = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    is_row_R = r_R < num_tokens
    row_R = tl.where(is_row_R, r_R, 0).to(tl.int64)
    n_N = tile * COLUMNS + tl.arange(0, COLUMNS)
    k_K = tl.arange(0, 128)
    num_q = (num_k + 127) // 128
    x_RK = x + row_R[:, None] * num_k + k_K[None, :]
    weight_NK = weight + n_N[:, None].to(tl.int64) * num_k + k_K[None, :]
    weight_scale += tile * COLUMNS // 128 * num_q
    first = tl.program_id(1) * split_q
    if IS_OVERLAPPED:
        gdc_wait()
    if IS_SWAPPED:
        sum_RN = tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        sum_RN = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Scales are loaded a block ahead: only what a product reads is loaded further ahead by itself.
    x_scale_R = x_scale + row_R * num_q
    scale_R = tl.load(x_scale_R + first, mask=is_row_R, other=0.0)
    block_scale = tl.load(weight_scale + first)
    for q in range(first, tl.minimum(first + split_q, num_q)):
        k = q * 128
        behind = tl.minimum(q + 1, num_q - 1)
        next_scale_R = tl.load(x_scale_R + behind, mask=is_row_R, other=0.0)
        next_block_scale = tl.load(weight_scale + behind)
        is_in_K = k + k_K < num_k
        a_RK = tl.load(x_RK + k, mask=is_row_R[:, None] & is_in_K[None, :], other=0.0)
        w_NK = tl.load(weight_NK + k, mask=(n_N < num_n)[:, None] & is_in_K[None, :], other=0.0)
        scale_R *= block_scale
        if IS_SWAPPED:
            sum_RN += tl.dot(w_NK, tl.trans(a_RK)) * scale_R[None, :]
        else:
            sum_RN += tl.dot(a_RK, tl.trans(w_NK)) * scale_R[:, None]
        scale_R, block_scale = next_scale_R, next_block_scale
    if IS_OVERLAPPED:
        gdc_launch_dependents()
    if IS_SWAPPED:
        sum_RN = tl.trans(sum_RN)
    out += tl.program_id(1).to(tl.int64) * part_stride
    tl.store(
        out + row_R[:, None] * out_stride + n_N[None, :],
        sum_RN.to(out.dtype.element_ty),
        mask=is_row_R[:, None] & (n_N < num_n)[None, :],
    )


@triton.jit(do_not_specialize=["part_stride"])
def _join_kernel(
    parts,
    out,
    num_n,
    out_stride,
    part_stride,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_OVERLAPPED: tl.constexpr,
):
    """Adds up the splits of a token, in order."""
    if IS_OVERLAPPED:
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_N = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        sum_N += tl.load(parts + split * part_stride + t * num_n + n_N, mask=n_N < num_n, other=0.0)
    tl.store(out + t * out_stride + n_N, sum_N.to(out.dtype.element_ty), mask=n_N < num_n)


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a launch may start before the one it waits for has ended (from sm_90 on).

    A product is launched so behind its own quantisation, which was launched the plain way: nothing
    else can still be running. It waits before it reads.
    """
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def quantize_rows(x_TI: Tensor, *, align: int = 0) -> tuple[Tensor, Tensor]:
    """(e4m3 [T, I], scale float32 [T, ceil(I / 128)]) of float activations [T, I].

    `align`: for torch's product; T is padded to a multiple of it (what stands there is undefined),
    and the scales of a block stand together in memory.
    """
    if x_TI.stride(-1) != 1:
        x_TI = x_TI.contiguous()
    num_tokens, width = x_TI.shape
    num_q, device = triton.cdiv(width, 128), x_TI.device
    padded = triton.cdiv(num_tokens, align) * align if align else num_tokens
    out = torch.empty((padded, width), dtype=torch.float8_e4m3fn, device=device)
    shape = (num_q, padded) if align else (padded, num_q)
    scale = torch.empty(shape, dtype=torch.float32, device=device)
    if align:
        scale = scale.t()
    rows = 1 if num_tokens == 1 else 16
    _quantize_kernel[(triton.cdiv(num_tokens, rows), num_q)](
        x_TI,
        out,
        scale,
        x_TI.stride(0),
        *scale.stride(),
        num_tokens,
        width,
        ROWS=rows,
        IS_OVERLAPPED=can_overlap(device),
    )
    return out, scale


def block_fp8_linear(x_TI: Tensor, weight_OI: Tensor, scale_PQ: Tensor, out_TO: Tensor) -> None:
    """tidepool::block_fp8_linear on CUDA; arguments of kernels/block_fp8.py."""
    is_large = x_TI.shape[0] >= _MIN_TORCH_TOKENS and x_TI.dtype == torch.bfloat16
    if is_large and _fits_torch(weight_OI, scale_PQ) and _has_torch_product(x_TI.device):
        _torch_product(x_TI, weight_OI, scale_PQ, out_TO)
        return
    launch(None, x_TI, weight_OI, scale_PQ, out_TO)


def _fits_torch(weight_OI: Tensor, scale_PQ: Tensor) -> bool:
    is_dense = weight_OI.is_contiguous() and scale_PQ.is_contiguous()
    num_n, width = weight_OI.shape
    return is_dense and num_n % 16 == 0 and width % 512 == 0


@functools.cache
def _has_torch_product(device: torch.device) -> bool:
    """Whether torch multiplies with these scales here: compute capability 9.0, CUDA 12.9."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return False
    x = torch.ones((16, 512), dtype=torch.bfloat16, device=device)
    weight = torch.ones((16, 512), dtype=torch.float8_e4m3fn, device=device)
    try:
        _torch_product(x, weight, torch.ones((1, 4), device=device), torch.empty_like(x)[:, :16])
    except (RuntimeError, ValueError):
        return False
    return True


def _torch_product(x_TI: Tensor, weight_OI: Tensor, scale_PQ: Tensor, out_TO: Tensor) -> None:
    """By cuBLAS, which adds up as `_linear_kernel` does, and is twice as fast for many tokens."""
    num_tokens = x_TI.shape[0]
    x, x_scale = quantize_rows(x_TI, align=_TORCH_ALIGN)
    is_whole = x.shape[0] == num_tokens and out_TO.is_contiguous()
    result = out_TO if is_whole else out_TO.new_empty(x.shape[0], out_TO.shape[1])
    torch._scaled_mm(
        x,
        weight_OI.t(),
        scale_a=x_scale,
        scale_b=scale_PQ.t(),
        out_dtype=out_TO.dtype,
        out=result,
    )
    if not is_whole:
        out_TO.copy_(result[:num_tokens])


def launch(
    tiles: Tiles | None, x_TI: Tensor, weight_OI: Tensor, scale_PQ: Tensor, out_TO: Tensor
) -> None:
    """As `block_fp8_linear`; `tiles` None: chosen."""
    num_tokens, width = x_TI.shape
    if not num_tokens:
        return
    x, x_scale = quantize_rows(x_TI)
    num_n, num_q = weight_OI.shape[0], triton.cdiv(width, 128)
    tiles = tiles or choose_tiles(num_tokens, num_n, num_q, num_processors(x.device))
    row_tiles = triton.cdiv(num_tokens, tiles.rows)
    split_q = triton.cdiv(num_q, tiles.num_splits)
    num_splits = triton.cdiv(num_q, split_q)
    overlap = (
        {"IS_OVERLAPPED": True, "launch_pdl": True}
        if can_overlap(x.device)
        else {"IS_OVERLAPPED": False}
    )
    target = out_TO
    if num_splits > 1:
        shape = (num_splits, num_tokens, num_n)
        target = torch.empty(shape, dtype=torch.float32, device=x.device)
    _linear_kernel[(row_tiles * triton.cdiv(num_n, tiles.columns), num_splits)](
        x,
        x_scale,
        weight_OI.contiguous(),
        scale_PQ.contiguous(),
        target,
        num_tokens,
        num_n,
        width,
        target.stride(-2),
        num_tokens * num_n,
        row_tiles,
        split_q,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        IS_SWAPPED=tiles.is_swapped,
        **overlap,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_splits > 1:
        _join_kernel[(num_tokens, triton.cdiv(num_n, _JOIN_BLOCK))](
            target,
            out_TO,
            num_n,
            out_TO.stride(0),
            num_tokens * num_n,
            SPLITS=num_splits,
            BLOCK=_JOIN_BLOCK,
            **overlap,
        )


def choose_tiles(num_tokens: int, num_n: int, num_q: int, num_processors: int) -> Tiles:
    """Few tokens: narrow tiles and split sums, so that every processor streams weights."""
    if num_tokens > 128:
        return Tiles(128, 128, 8, 3)
    rows = max(16, triton.next_power_of_2(min(num_tokens, 64)))
    row_tiles = triton.cdiv(num_tokens, rows)
    programs = row_tiles * triton.cdiv(num_n, 64)
    num_splits = max(1, min(2 * num_processors // programs, num_q // _MIN_SPLIT_Q))
    if num_q - num_q // num_splits < _MIN_SAVED_Q:
        num_splits = 1
    if rows > 32:
        return Tiles(rows, 64, 4, 4, num_splits)
    return Tiles(rows, 64, 4, 6 if num_splits == 1 else 8, num_splits, is_swapped=True)
