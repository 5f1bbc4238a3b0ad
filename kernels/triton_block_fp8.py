"""Triton side of block_fp8_linear, and the quantisation of activations for all FP8 products.

Two launches: activations become FP8 with a scale for each token and 128 values; then a product
whose partial sums of 128 are scaled and added up in float32 (FP8 tensor cores add up with about 14
bits). Launched on torch's current stream, without a synchronisation; what is quantised lives in
memory of torch's caching allocator (fixed inside a captured graph). A NaN stays in its row.

Suffixes: T tokens, O and I width of output and input, Q blocks of I; in the kernels R rows, N
columns and K reduction steps of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a product: rows, columns (a divisor of 128), warps, pipeline stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@triton.jit
def scaled_fp8(value_RN):
    """(values / scale as e4m3, scale float32 [R]); the largest magnitude of a row becomes 448."""
    amax_R = tl.max(tl.abs(value_RN), 1)
    scale_R = tl.maximum(amax_R, 1e-4) * (1.0 / 448.0)
    # Not clamped: rounding cannot leave the range, and a clamp would lose a NaN.
    return (value_RN / scale_R[:, None]).to(tl.float8e4nv), scale_R


@triton.jit
def _quantize_kernel(x, out, scale, x_stride, num_tokens, num_i, num_q, ROWS: tl.constexpr):
    r_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = tl.program_id(1)
    i_I = q * 128 + tl.arange(0, 128)
    mask = (r_R < num_tokens)[:, None] & (i_I < num_i)[None, :]
    row_R = r_R.to(tl.int64)
    value = tl.load(x + row_R[:, None] * x_stride + i_I[None, :], mask=mask, other=0.0)
    value, scale_R = scaled_fp8(value.to(tl.float32))
    tl.store(out + row_R[:, None] * num_i + i_I[None, :], value, mask=mask)
    tl.store(scale + row_R * num_q + q, scale_R, mask=r_R < num_tokens)


@triton.jit
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
    row_tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Neighbouring programs share a stretch of the weight."""
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
    sum_RN = tl.zeros((ROWS, COLUMNS), tl.float32)
    for q in range(num_q):
        k = q * 128
        is_in_K = k + k_K < num_k
        a_RK = tl.load(x_RK + k, mask=is_row_R[:, None] & is_in_K[None, :], other=0.0)
        w_NK = tl.load(weight_NK + k, mask=(n_N < num_n)[:, None] & is_in_K[None, :], other=0.0)
        scale_R = tl.load(x_scale + row_R * num_q + q, mask=is_row_R, other=0.0)
        scale_R *= tl.load(weight_scale + q)
        sum_RN += tl.dot(a_RK, tl.trans(w_NK)) * scale_R[:, None]
    tl.store(
        out + row_R[:, None] * out_stride + n_N[None, :],
        sum_RN.to(out.dtype.element_ty),
        mask=is_row_R[:, None] & (n_N < num_n)[None, :],
    )


def quantize_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [T, I], scale float32 [T, ceil(I / 128)]) of float activations [T, I]."""
    if x_TI.stride(-1) != 1:
        x_TI = x_TI.contiguous()
    num_tokens, width = x_TI.shape
    num_q = triton.cdiv(width, 128)
    out = torch.empty((num_tokens, width), dtype=torch.float8_e4m3fn, device=x_TI.device)
    scale = torch.empty((num_tokens, num_q), dtype=torch.float32, device=x_TI.device)
    rows = 1 if num_tokens == 1 else 16
    _quantize_kernel[(triton.cdiv(num_tokens, rows), num_q)](
        x_TI, out, scale, x_TI.stride(0), num_tokens, width, num_q, ROWS=rows
    )
    return out, scale


def block_fp8_linear(x_TI: Tensor, weight_OI: Tensor, scale_PQ: Tensor, out_TO: Tensor) -> None:
    """tidepool::block_fp8_linear on CUDA; arguments of kernels/block_fp8.py."""
    launch(None, x_TI, weight_OI, scale_PQ, out_TO)


def launch(
    tiles: Tiles | None, x_TI: Tensor, weight_OI: Tensor, scale_PQ: Tensor, out_TO: Tensor
) -> None:
    """As `block_fp8_linear`; `tiles` None: chosen."""
    num_tokens, width = x_TI.shape
    if not num_tokens:
        return
    x, x_scale = quantize_rows(x_TI)
    num_n = weight_OI.shape[0]
    tiles = tiles or choose_tiles(num_tokens, num_n)
    row_tiles = triton.cdiv(num_tokens, tiles.rows)
    _linear_kernel[(row_tiles * triton.cdiv(num_n, tiles.columns),)](
        x,
        x_scale,
        weight_OI.contiguous(),
        scale_PQ.contiguous(),
        out_TO,
        num_tokens,
        num_n,
        width,
        out_TO.stride(0),
        row_tiles,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def choose_tiles(num_tokens: int, num_n: int) -> Tiles:
    """Few tokens: narrow tiles, so that every processor streams weights."""
    if num_tokens <= 32:
        columns = 16 if num_n < 4096 else 32 if num_n < 8192 else 64
        return Tiles(16 if num_tokens <= 16 else 32, columns, 4, 5)
    if num_tokens <= 128:
        return Tiles(64, 32 if num_n < 4096 else 64, 4, 4)
    return Tiles(128, 128, 8, 3)
