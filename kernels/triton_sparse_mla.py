"""Triton side of sparse_mla: split-KV attention over selected rows, bf16 and FP8.

A program takes up to 64 heads of one token and a stretch of its selected rows; a second kernel
joins the stretches by their log-sum-exp, where there is more than one. A row serves as key and as
value from the same load. Products run in bf16 with float32 sums, softmax in float32.

Launched on torch's current stream, without a synchronisation. Partial results live in memory of
torch's caching allocator (no cudaMalloc once warm; fixed inside a captured graph). Rows in float32
(mla_fp32, for exact tests) are attended to by torch ops on the device instead.

What differs from the reference: rows outside [0, N) count as -1 and do not raise.

Suffixes: B tokens, H heads, C latent width, R rope width, K selected rows, N rows or rows of a tile,
X bytes of a row, S splits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.errors import KernelError
from .cuda_library import num_processors
from .store_rows import row_layout, unpack_rows

MAX_SPLITS = 64
_LOG2E = 1.4426950408889634
_REFERENCE_BLOCK_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Tuning:
    """Shape of a launch: heads of a program, rows of a tile, splits, warps, pipeline stages."""

    block_h: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int


@triton.jit
def _load_tile(
    rows,
    idx_N,
    num_rows,
    c_C,
    r_R,
    ROW_BYTES: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    """bf16 latent [N, C] and rope [N, R] of the rows; zeros where there is none."""
    is_row_N = (idx_N >= 0) & (idx_N < num_rows)
    base_N = rows + tl.where(is_row_N, idx_N, 0).to(tl.int64) * ROW_BYTES
    mask_NC = is_row_N[:, None]
    mask_NR = is_row_N[:, None]
    if C != BLOCK_C:
        mask_NC = mask_NC & (c_C < C)[None, :]
    if R != BLOCK_R:
        mask_NR = mask_NR & (r_R < R)[None, :]
    if IS_FP8:
        bytes_NC = tl.load(base_N[:, None] + c_C[None, :], mask=mask_NC, other=0)
        scale_at_N = (base_N + C).to(tl.pointer_type(tl.float32))
        scale_NC = tl.load(scale_at_N[:, None] + (c_C // 128)[None, :], mask=mask_NC, other=0.0)
        latent_NC = bytes_NC.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale_NC
        latent_NC = latent_NC.to(tl.bfloat16)
        rope_at_N = (base_N + (C + C // 32)).to(tl.pointer_type(tl.bfloat16))
    else:
        latent_at_N = base_N.to(tl.pointer_type(tl.bfloat16))
        latent_NC = tl.load(latent_at_N[:, None] + c_C[None, :], mask=mask_NC, other=0.0)
        rope_at_N = latent_at_N + C
    rope_NR = tl.load(rope_at_N[:, None] + r_R[None, :], mask=mask_NR, other=0.0)
    return latent_NC, rope_NR, is_row_N


@triton.jit
def _sparse_mla_kernel(
    q_latent,
    q_rope,
    rows,
    row_idx,
    out,
    lse,
    latent_stride_b,
    latent_stride_h,
    rope_stride_b,
    rope_stride_h,
    idx_stride_b,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    lse_stride_b,
    lse_stride_s,
    num_selected,
    num_rows,
    split_rows,
    scale_log2,
    NUM_HEADS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """Grid (blocks of heads, splits, tokens)."""
    b = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    h_H = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    c_C = tl.arange(0, BLOCK_C)
    r_R = tl.arange(0, BLOCK_R)
    n_N = tl.arange(0, BLOCK_N)
    is_head_H = h_H < NUM_HEADS
    mask_HC = is_head_H[:, None] & (c_C < C)[None, :]
    q_HC = tl.load(
        q_latent + b * latent_stride_b + h_H[:, None] * latent_stride_h + c_C[None, :],
        mask=mask_HC,
        other=0.0,
    ).to(tl.bfloat16)
    q_HR = tl.load(
        q_rope + b * rope_stride_b + h_H[:, None] * rope_stride_h + r_R[None, :],
        mask=is_head_H[:, None] & (r_R < R)[None, :],
        other=0.0,
    ).to(tl.bfloat16)
    row_idx += b * idx_stride_b
    best_H = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    sum_H = tl.zeros((BLOCK_H,), tl.float32)
    acc_HC = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    first = split * split_rows
    end = tl.minimum(first + split_rows, num_selected)
    for start in tl.range(first, end, BLOCK_N, num_stages=STAGES):
        k_N = start + n_N
        idx_N = tl.load(row_idx + k_N, mask=k_N < end, other=-1)
        latent_NC, rope_NR, is_row_N = _load_tile(
            rows, idx_N, num_rows, c_C, r_R, ROW_BYTES, C, R, BLOCK_C, BLOCK_R, IS_FP8
        )
        logits_HN = tl.dot(q_HR, tl.trans(rope_NR))
        logits_HN = tl.dot(q_HC, tl.trans(latent_NC), logits_HN)
        logits_HN = tl.where(is_row_N[None, :], logits_HN * scale_log2, float("-inf"))
        new_H = tl.maximum(best_H, tl.max(logits_HN, 1))
        # Nothing seen yet: any finite reference gives weights of zero.
        reference_H = tl.where(new_H == float("-inf"), 0.0, new_H)
        weight_HN = tl.exp2(logits_HN - reference_H[:, None])
        keep_H = tl.exp2(best_H - reference_H)
        sum_H = sum_H * keep_H + tl.sum(weight_HN, 1)
        acc_HC = tl.dot(weight_HN.to(tl.bfloat16), latent_NC, acc_HC * keep_H[:, None])
        best_H = new_H
    acc_HC = acc_HC / tl.where(sum_H > 0, sum_H, 1.0)[:, None]
    out += b * out_stride_b + split * out_stride_s
    out_HC = out + h_H[:, None] * out_stride_h + c_C[None, :]
    tl.store(out_HC, acc_HC.to(out.dtype.element_ty), mask=mask_HC)
    if IS_SPLIT:
        lse_H = tl.where(sum_H > 0, best_H + tl.log2(sum_H), float("-inf"))
        tl.store(lse + b * lse_stride_b + split * lse_stride_s + h_H, lse_H, mask=is_head_H)


@triton.jit
def _join_kernel(
    parts,
    lse,
    out,
    part_stride_b,
    part_stride_s,
    lse_stride_b,
    lse_stride_s,
    out_stride_b,
    out_stride_h,
    num_splits,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (heads, tokens): the mean of the splits, weighed by their sums of exponentials."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    s_S = tl.arange(0, BLOCK_S)
    c_C = tl.arange(0, BLOCK_C)
    lse_S = tl.load(
        lse + b * lse_stride_b + s_S * lse_stride_s + h, mask=s_S < num_splits, other=float("-inf")
    )
    best = tl.max(lse_S, 0)
    weight_S = tl.exp2(lse_S - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(weight_S, 0)
    weight_S = weight_S / tl.where(total > 0, total, 1.0)
    parts += b * part_stride_b + h * C
    part_SC = tl.load(
        parts + s_S[:, None] * part_stride_s + c_C[None, :],
        mask=(s_S < num_splits)[:, None] & (c_C < C)[None, :],
        other=0.0,
    )
    out_C = tl.sum(part_SC * weight_S[:, None], 0)
    out += b * out_stride_b + h * out_stride_h
    tl.store(out + c_C, out_C.to(out.dtype.element_ty), mask=c_C < C)


def launch(
    tuning: Tuning | None,
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
    out_BHC: Tensor,
) -> None:
    """tidepool::sparse_mla for any call; `tuning` None: chosen."""
    batch, num_heads, latent_dim = q_latent_BHC.shape
    num_selected = row_idx_BK.shape[1]
    if not batch or not num_selected or not rows_NX.shape[0]:
        out_BHC.zero_()
        return
    if layout == "mla_fp32":
        launch_reference(q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK, scale, layout, out_BHC)
        return
    if rows_NX.stride(1) != 1 or out_BHC.stride(2) != 1:
        raise KernelError(
            f"sparse_mla: rows_NX and out_BHC have strides {rows_NX.stride()} and "
            f"{out_BHC.stride()}, expected a dense last dimension"
        )
    tuning = tuning or choose_tuning(batch, num_heads, num_selected, layout, out_BHC.device)
    is_split = tuning.num_splits > 1
    q_latent_BHC, q_rope_BHR, row_idx_BK = map(_dense, (q_latent_BHC, q_rope_BHR, row_idx_BK))
    parts_BSHC, lse_BSH = out_BHC, out_BHC
    if is_split:
        shape = (batch, tuning.num_splits, num_heads, latent_dim)
        parts_BSHC = torch.empty(shape, dtype=torch.float32, device=out_BHC.device)
        lse_BSH = torch.empty(shape[:3], dtype=torch.float32, device=out_BHC.device)
    split_rows = -(-num_selected // (tuning.num_splits * tuning.block_n)) * tuning.block_n
    strides = parts_BSHC.stride()
    _sparse_mla_kernel[(-(-num_heads // tuning.block_h), tuning.num_splits, batch)](
        q_latent_BHC,
        q_rope_BHR,
        rows_NX,
        row_idx_BK,
        parts_BSHC,
        lse_BSH,
        q_latent_BHC.stride(0),
        q_latent_BHC.stride(1),
        q_rope_BHR.stride(0),
        q_rope_BHR.stride(1),
        row_idx_BK.stride(0),
        strides[0],
        strides[-2],
        strides[1] if is_split else 0,
        lse_BSH.stride(0),
        lse_BSH.stride(1),
        num_selected,
        rows_NX.shape[0],
        split_rows,
        scale * _LOG2E,
        NUM_HEADS=num_heads,
        C=latent_dim,
        R=q_rope_BHR.shape[2],
        ROW_BYTES=rows_NX.stride(0),
        BLOCK_H=tuning.block_h,
        BLOCK_C=max(16, triton.next_power_of_2(latent_dim)),
        BLOCK_R=max(16, triton.next_power_of_2(q_rope_BHR.shape[2])),
        BLOCK_N=tuning.block_n,
        STAGES=tuning.num_stages,
        IS_FP8=layout == "mla_fp8",
        IS_SPLIT=is_split,
        num_warps=tuning.num_warps,
    )
    if is_split:
        _join_kernel[(num_heads, batch)](
            parts_BSHC,
            lse_BSH,
            out_BHC,
            strides[0],
            strides[1],
            lse_BSH.stride(0),
            lse_BSH.stride(1),
            out_BHC.stride(0),
            out_BHC.stride(1),
            tuning.num_splits,
            C=latent_dim,
            BLOCK_C=max(16, triton.next_power_of_2(latent_dim)),
            BLOCK_S=triton.next_power_of_2(tuning.num_splits),
            num_warps=4,
        )


@functools.lru_cache(maxsize=4096)
def choose_tuning(
    batch: int, num_heads: int, num_selected: int, layout: str, device: torch.device
) -> Tuning:
    """Enough splits for one program a processor; few enough that a split has two tiles."""
    block_h = min(64, max(16, triton.next_power_of_2(num_heads)))
    block_n = 64 if layout == "mla_bf16" else 32
    programs = batch * -(-num_heads // block_h)
    limit = min(MAX_SPLITS, -(-num_selected // block_n))
    num_splits = max(1, min(limit, num_processors(device) // programs))
    is_wide = block_h == 64
    return Tuning(block_h, block_n, num_splits, 8 if is_wide else 4, 2)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def launch_reference(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
    out_BHC: Tensor,
) -> None:
    """The reference's formula in torch ops, a block of tokens at a time.

    Allocates its temporaries; waits for the device only to look for NaN in FP8 rows.
    """
    latent_dim = q_latent_BHC.shape[-1]
    row_layout(layout, latent_dim, q_rope_BHR.shape[-1])
    q_BHX = torch.cat([q_latent_BHC, q_rope_BHR], -1).float() * scale
    block = max(1, _REFERENCE_BLOCK_BYTES // (row_idx_BK.shape[1] * 4 * q_BHX.shape[-1]))
    for start in range(0, q_BHX.shape[0], block):
        tokens = slice(start, start + block)
        idx_BK = row_idx_BK[tokens]
        is_none_BK = (idx_BK < 0) | (idx_BK >= rows_NX.shape[0])
        picked = rows_NX[idx_BK.masked_fill(is_none_BK, 0).to(torch.int64)]
        latent_BKC, rope_BKR = unpack_rows(
            picked.masked_fill_(is_none_BK[..., None], 0), layout, latent_dim
        )
        rows_BKX = torch.cat([latent_BKC, rope_BKR], -1)
        logits_BHK = torch.bmm(q_BHX[tokens], rows_BKX.transpose(1, 2))
        logits_BHK.masked_fill_(is_none_BK[:, None], float("-inf"))
        out = torch.bmm(logits_BHK.softmax(-1), latent_BKC)
        # A token with nothing selected: softmax of -inf is NaN, its result is zero.
        out_BHC[tokens] = out.masked_fill_(is_none_BK.all(1)[:, None, None], 0.0).to(out_BHC.dtype)
