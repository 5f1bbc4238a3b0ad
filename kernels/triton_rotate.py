"""Triton side of rotate: one launch, some heads of a token a program.

On torch's current stream; no allocation, no synchronisation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_PAIRS = 1024
"""Pairs of a program."""


@triton.jit
def _rotate_kernel(
    x,
    out,
    cos,
    sin,
    stride_t,
    stride_h,
    stride_r,
    out_stride_t,
    out_stride_h,
    out_stride_r,
    cos_stride,
    sin_stride,
    num_heads,
    F: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    f_F = tl.arange(0, BLOCK_F)
    cos_1F = tl.load(cos + t * cos_stride + f_F, mask=f_F < F, other=0.0)[None, :]
    sin_1F = tl.load(sin + t * sin_stride + f_F, mask=f_F < F, other=0.0)[None, :]
    head_H1 = x + t * stride_t + h_H[:, None].to(tl.int64) * stride_h
    out_H1 = out + t * out_stride_t + h_H[:, None].to(tl.int64) * out_stride_h
    is_head_H1 = (h_H < num_heads)[:, None]
    dtype = x.dtype.element_ty
    if IS_INTERLEAVED:  # pairs are loaded side by side
        r_R = tl.arange(0, 2 * BLOCK_F)
        at_HR = head_H1 + (r_R * stride_r)[None, :]
        mask_HR = is_head_H1 & (r_R < 2 * F)[None, :]
        value_HR = tl.load(at_HR, mask=mask_HR, other=0.0).to(tl.float32)
        a_HF, b_HF = tl.split(tl.reshape(value_HR, (BLOCK_H, BLOCK_F, 2)))
        pair_HF2 = tl.join(a_HF * cos_1F - b_HF * sin_1F, b_HF * cos_1F + a_HF * sin_1F)
        turned_HR = tl.reshape(pair_HF2, (BLOCK_H, 2 * BLOCK_F))
        tl.store(out_H1 + (r_R * out_stride_r)[None, :], turned_HR.to(dtype), mask=mask_HR)
    else:
        first_HF = head_H1 + (f_F * stride_r)[None, :]
        second_HF = first_HF + F * stride_r
        mask = is_head_H1 & (f_F < F)[None, :]
        a_HF = tl.load(first_HF, mask=mask, other=0.0).to(tl.float32)
        b_HF = tl.load(second_HF, mask=mask, other=0.0).to(tl.float32)
        first_HF = out_H1 + (f_F * out_stride_r)[None, :]
        second_HF = first_HF + F * out_stride_r
        tl.store(first_HF, (a_HF * cos_1F - b_HF * sin_1F).to(dtype), mask=mask)
        tl.store(second_HF, (b_HF * cos_1F + a_HF * sin_1F).to(dtype), mask=mask)


def rotate(x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor, is_interleaved: bool) -> None:
    """tidepool::rotate on CUDA; arguments of kernels/rotate.py."""
    rotate_into(x_THR, cos_TF, sin_TF, is_interleaved, x_THR)


def rotate_into(
    x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor, is_interleaved: bool, out_THR: Tensor
) -> None:
    """tidepool::rotate_into on CUDA."""
    num_tokens, num_heads, width = x_THR.shape
    if not x_THR.numel():
        return
    cos_TF, sin_TF = cos_TF.contiguous(), sin_TF.contiguous()
    block_f = triton.next_power_of_2(width // 2)
    block_h = max(1, min(triton.next_power_of_2(num_heads), _PAIRS // block_f))
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
        x_THR,
        out_THR,
        cos_TF,
        sin_TF,
        *x_THR.stride(),
        *out_THR.stride(),
        cos_TF.stride(0),
        sin_TF.stride(0),
        num_heads,
        F=width // 2,
        IS_INTERLEAVED=is_interleaved,
        BLOCK_H=block_h,
        BLOCK_F=block_f,
        num_warps=4 if block_h * block_f >= 512 else 1,
    )
