"""The plain parts of a transformer layer: norms, projections, gated MLP. Functions of tensors.

Shape suffixes: T tokens, M hidden width, F inner width of an MLP, X any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import norms
from ..kernels.block_fp8 import block_fp8_linear


def rms_norm(x_TX: Tensor, weight_X: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32; cast back before the weight, as the reference models do."""
    out_TX = torch.empty(x_TX.shape, dtype=x_TX.dtype, device=x_TX.device)
    norms.rms_norm(x_TX, weight_X, eps, out_TX)
    return out_TX


def add_rms_norm_(sum_TX: Tensor, x_TX: Tensor, weight_X: Tensor, eps: float) -> Tensor:
    """Adds `x_TX` to `sum_TX` IN PLACE and returns the sum's RMSNorm."""
    out_TX = torch.empty_like(sum_TX)
    norms.add_rms_norm(sum_TX, x_TX, weight_X, eps, out_TX)
    return out_TX


def layer_norm(x_TX: Tensor, weight_X: Tensor, bias_X: Tensor, eps: float) -> Tensor:
    """LayerNorm with bias, in float32; `weight_X` and `bias_X` are float32."""
    out_TX = torch.empty(x_TX.shape, dtype=x_TX.dtype, device=x_TX.device)
    norms.layer_norm(x_TX, weight_X, bias_X, eps, out_TX)
    return out_TX


def linear_fp32(x_TM: Tensor, weight_XM: Tensor) -> Tensor:
    """x @ weight.T accumulated and returned in float32, whatever the input dtypes are."""
    if x_TM.dtype == weight_XM.dtype != torch.float32 and x_TM.is_cuda:
        return torch.mm(x_TM, weight_XM.t(), out_dtype=torch.float32)
    return F.linear(x_TM.float(), weight_XM.float())


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """A matrix as an FP8 checkpoint stores it: weight * its 128x128 block's scale."""

    weight_OI: Tensor
    """float8_e4m3fn"""
    scale_PQ: Tensor
    """float32 [ceil(O / 128), ceil(I / 128)]"""


Matrix = Tensor | BlockFp8
"""Weight of a projection, [output width, input width]."""


def linear(x_TX: Tensor, weight: Matrix) -> Tensor:
    """x @ weight.T in x's dtype."""
    if isinstance(weight, Tensor):
        return F.linear(x_TX, weight)
    out = x_TX.new_empty(x_TX.shape[0], weight.weight_OI.shape[0])
    block_fp8_linear(x_TX, weight.weight_OI, weight.scale_PQ, out)
    return out


@dataclass(frozen=True, slots=True)
class GatedMlp:
    """SwiGLU: down(silu(gate x) * up x); gate and up are one matrix."""

    gate_up_FM: Matrix
    """[2F, M]: gate rows, then up rows."""
    down_MF: Matrix

    def __call__(self, x_TM: Tensor) -> Tensor:
        gate_up_TF = linear(x_TM, self.gate_up_FM)
        hidden_TF = gate_up_TF.new_empty(x_TM.shape[0], gate_up_TF.shape[1] // 2)
        norms.swiglu(gate_up_TF, hidden_TF)
        return linear(hidden_TF, self.down_MF)
