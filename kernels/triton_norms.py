"""Triton side of the norms and of SwiGLU: one launch each.

A program a token for norms, so that a token's result does not depend on the others. On torch's
current stream; no synchronisation, no allocation unless a tensor's last dimension is strided.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_SWIGLU_BLOCK = 1024


@triton.jit
def _rms_kernel(
    sum_,
    x,
    weight,
    out,
    sum_stride,
    x_stride,
    out_stride,
    width,
    eps,
    HAS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    x_X = tl.arange(0, BLOCK)
    is_in_X = x_X < width
    dtype = out.dtype.element_ty
    value_X = tl.load(x + t * x_stride + x_X, mask=is_in_X, other=0.0).to(tl.float32)
    if HAS_SUM:
        sum_X = tl.load(sum_ + t * sum_stride + x_X, mask=is_in_X, other=0.0).to(tl.float32)
        rounded_X = (sum_X + value_X).to(dtype)
        tl.store(sum_ + t * sum_stride + x_X, rounded_X, mask=is_in_X)
        value_X = rounded_X.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value_X * value_X, 0) / width + eps)
    normed_X = (value_X * scale).to(dtype)
    weight_X = tl.load(weight + x_X, mask=is_in_X, other=0.0)
    # Products of two bfloat16 values are exact in float32.
    result_X = weight_X.to(tl.float32) * normed_X.to(tl.float32)
    tl.store(out + t * out_stride + x_X, result_X.to(dtype), mask=is_in_X)


@triton.jit
def _layer_kernel(x, weight, bias, out, x_stride, out_stride, width, eps, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    x_X = tl.arange(0, BLOCK)
    is_in_X = x_X < width
    value_X = tl.load(x + t * x_stride + x_X, mask=is_in_X, other=0.0).to(tl.float32)
    centred_X = tl.where(is_in_X, value_X - tl.sum(value_X, 0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred_X * centred_X, 0) / width + eps)
    weight_X = tl.load(weight + x_X, mask=is_in_X, other=0.0)
    bias_X = tl.load(bias + x_X, mask=is_in_X, other=0.0)
    result_X = centred_X * scale * weight_X + bias_X
    tl.store(out + t * out_stride + x_X, result_X.to(out.dtype.element_ty), mask=is_in_X)


@triton.jit
def _swiglu_kernel(gate_up, out, gate_up_stride, out_stride, width, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in_F = f_F < width
    gate_up += t * gate_up_stride
    gate_F = tl.load(gate_up + f_F, mask=is_in_F, other=0.0).to(tl.float32)
    up_F = tl.load(gate_up + width + f_F, mask=is_in_F, other=0.0).to(tl.float32)
    result_F = gate_F / (1.0 + tl.exp(-gate_F)) * up_F
    tl.store(out + t * out_stride + f_F, result_F.to(out.dtype.element_ty), mask=is_in_F)


def rms_norm(x_TX: Tensor, weight_X: Tensor, eps: float, out_TX: Tensor) -> None:
    """tidepool::rms_norm on CUDA; arguments of kernels/norms.py."""
    _launch_rms(None, x_TX, weight_X, eps, out_TX)


def add_rms_norm(
    sum_TX: Tensor, x_TX: Tensor, weight_X: Tensor, eps: float, out_TX: Tensor
) -> None:
    """tidepool::add_rms_norm on CUDA; arguments of kernels/norms.py."""
    if sum_TX.stride(-1) != 1:
        summed_TX = sum_TX.contiguous()
        _launch_rms(summed_TX, x_TX, weight_X, eps, out_TX)
        sum_TX.copy_(summed_TX)
        return
    _launch_rms(sum_TX, x_TX, weight_X, eps, out_TX)


def _launch_rms(
    sum_TX: Tensor | None, x_TX: Tensor, weight_X: Tensor, eps: float, out_TX: Tensor
) -> None:
    num_tokens, width = x_TX.shape
    if not num_tokens:
        return
    x_TX = dense(x_TX)
    block, num_warps = _block(width)
    _rms_kernel[(num_tokens,)](
        x_TX if sum_TX is None else sum_TX,
        x_TX,
        weight_X.contiguous(),
        out_TX,
        0 if sum_TX is None else sum_TX.stride(0),
        x_TX.stride(0),
        out_TX.stride(0),
        width,
        eps,
        HAS_SUM=sum_TX is not None,
        BLOCK=block,
        num_warps=num_warps,
    )


def layer_norm(x_TX: Tensor, weight_X: Tensor, bias_X: Tensor, eps: float, out_TX: Tensor) -> None:
    """tidepool::layer_norm on CUDA; arguments of kernels/norms.py."""
    num_tokens, width = x_TX.shape
    if not num_tokens:
        return
    x_TX = dense(x_TX)
    block, num_warps = _block(width)
    _layer_kernel[(num_tokens,)](
        x_TX,
        weight_X.contiguous(),
        bias_X.contiguous(),
        out_TX,
        x_TX.stride(0),
        out_TX.stride(0),
        width,
        eps,
        BLOCK=block,
        num_warps=num_warps,
    )


def swiglu(gate_up_TF: Tensor, out_TF: Tensor) -> None:
    """tidepool::swiglu on CUDA; arguments of kernels/norms.py."""
    num_tokens, width = out_TF.shape
    if not num_tokens:
        return
    gate_up_TF = dense(gate_up_TF)
    block = min(_SWIGLU_BLOCK, triton.next_power_of_2(width))
    _swiglu_kernel[(num_tokens, triton.cdiv(width, block))](
        gate_up_TF, out_TF, gate_up_TF.stride(0), out_TF.stride(0), width, BLOCK=block
    )


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _block(width: int) -> tuple[int, int]:
    """(padded width, warps): at most 16 values a thread."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))
