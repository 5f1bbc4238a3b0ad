"""Norms over the last dimension, in float32, and what stands beside them in a layer.

Suffixes: T tokens, X width, F inner width of an MLP.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import cuda
from .registry import FLOAT32, FLOATS, Arguments, cpu_op, implement


def rms_norm(x_TX: Tensor, weight_X: Tensor, eps: float, out_TX: Tensor) -> None:
    """out = weight * (x / sqrt(mean(x**2) + eps)), cast back before the weight.

    Args:
        x_TX: float32, bfloat16 or float16 [T, X]; rows may be strided.
        weight_X, out_TX: of the same dtype; `out_TX` [T, X] is written.
    """
    arguments = Arguments("rms_norm")
    arguments.check("x_TX", x_TX, FLOATS, "T", "X")
    arguments.check("weight_X", weight_X, (x_TX.dtype,), "X")
    arguments.check("out_TX", out_TX, (x_TX.dtype,), "T", "X")
    _rms_op(x_TX, weight_X, eps, out_TX)


def add_rms_norm(
    sum_TX: Tensor, x_TX: Tensor, weight_X: Tensor, eps: float, out_TX: Tensor
) -> None:
    """sum += x, then `rms_norm` of the sum.

    Args:
        sum_TX: as `x_TX`; read and written: the residual stream.
        x_TX, weight_X, out_TX: as of `rms_norm`.
    """
    arguments = Arguments("add_rms_norm")
    arguments.check("x_TX", x_TX, FLOATS, "T", "X")
    arguments.check("sum_TX", sum_TX, (x_TX.dtype,), "T", "X")
    arguments.check("weight_X", weight_X, (x_TX.dtype,), "X")
    arguments.check("out_TX", out_TX, (x_TX.dtype,), "T", "X")
    _add_op(sum_TX, x_TX, weight_X, eps, out_TX)


def layer_norm(x_TX: Tensor, weight_X: Tensor, bias_X: Tensor, eps: float, out_TX: Tensor) -> None:
    """LayerNorm with bias.

    Args:
        x_TX: float32, bfloat16 or float16 [T, X]; rows may be strided.
        weight_X, bias_X: float32.
        out_TX: dtype of `x_TX`; written.
    """
    arguments = Arguments("layer_norm")
    arguments.check("x_TX", x_TX, FLOATS, "T", "X")
    arguments.check("weight_X", weight_X, FLOAT32, "X")
    arguments.check("bias_X", bias_X, FLOAT32, "X")
    arguments.check("out_TX", out_TX, (x_TX.dtype,), "T", "X")
    _layer_op(x_TX, weight_X, bias_X, eps, out_TX)


def swiglu(gate_up_TF: Tensor, out_TF: Tensor) -> None:
    """out = silu(gate) * up

    Args:
        gate_up_TF: float32, bfloat16 or float16 [T, 2F]: gate, then up; rows may be strided.
        out_TF: of the same dtype [T, F]; written.
    """
    arguments = Arguments("swiglu", twoF=gate_up_TF.shape[-1], F=gate_up_TF.shape[-1] // 2)
    arguments.check("gate_up_TF", gate_up_TF, FLOATS, "T", "twoF")
    arguments.check("out_TF", out_TF, (gate_up_TF.dtype,), "T", "F")
    _swiglu_op(gate_up_TF, out_TF)


def _rms_norm(x_TX: Tensor, weight_X: Tensor, eps: float, out_TX: Tensor) -> None:
    x32_TX = x_TX.float()
    scale_T1 = (x32_TX.square().mean(-1, keepdim=True) + eps).rsqrt()
    out_TX.copy_(weight_X * (x32_TX * scale_T1).to(x_TX.dtype))


def _add_rms_norm(
    sum_TX: Tensor, x_TX: Tensor, weight_X: Tensor, eps: float, out_TX: Tensor
) -> None:
    _rms_norm(sum_TX.add_(x_TX), weight_X, eps, out_TX)


def _layer_norm(x_TX: Tensor, weight_X: Tensor, bias_X: Tensor, eps: float, out_TX: Tensor) -> None:
    out_TX.copy_(F.layer_norm(x_TX.float(), weight_X.shape, weight_X, bias_X, eps))


def _swiglu(gate_up_TF: Tensor, out_TF: Tensor) -> None:
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
    out_TF.copy_(F.silu(gate_TF) * up_TF)


_rms_op = cpu_op(mutates=("out_TX",))(_rms_norm)
_add_op = cpu_op(mutates=("sum_TX", "out_TX"))(_add_rms_norm)
_layer_op = cpu_op(mutates=("out_TX",))(_layer_norm)
_swiglu_op = cpu_op(mutates=("out_TF",))(_swiglu)
for _name in ("rms_norm", "add_rms_norm", "layer_norm", "swiglu"):
    implement(_name, getattr(cuda, _name), "CUDA")
