"""x @ weight.T with a weight in FP8 and a float32 scale for each 128x128 block of it.

As DeepSeek-V3 stores and multiplies its weights (arXiv:2412.19437, section 3.3): on CUDA the
activations become FP8 too, with a scale for each token and 128 values, and partial sums of 128
products are added up in float32.

Suffixes: T tokens, O and I width of output and input, P and Q blocks of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda
from .registry import FLOAT32, FLOATS, Arguments, cpu_op, implement

BLOCK = 128
FP8 = (torch.float8_e4m3fn,)


def dequantize_blocks(weight_OI: Tensor, scale_PQ: Tensor, block: tuple[int, int]) -> Tensor:
    """FP8 [O, I] times its block's scale [ceil(O/block), ceil(I/block)], as float32 [O, I]."""
    rows, columns = weight_OI.shape
    scale_PI = scale_PQ.float().repeat_interleave(block[1], dim=1)[:, :columns]
    scale_OI = scale_PI.repeat_interleave(block[0], dim=0)[:rows]
    return weight_OI.float() * scale_OI


def block_fp8_linear(x_TI: Tensor, weight_OI: Tensor, scale_PQ: Tensor, out_TO: Tensor) -> None:
    """out = x @ (weight * scale).T

    Args:
        x_TI: float32, bfloat16 or float16 [T, I].
        weight_OI: float8_e4m3fn [O, I].
        scale_PQ: float32 [ceil(O / 128), ceil(I / 128)].
        out_TO: dtype of `x_TI` [T, O]; written.

    The reference multiplies by the weight in `x_TI`'s dtype. On CUDA the result is as exact as FP8
    activations are: for normal ones within 4 % of the exact result, in the norm.
    """
    arguments = Arguments("block_fp8_linear")
    arguments.check("x_TI", x_TI, FLOATS, "T", "I")
    arguments.check("weight_OI", weight_OI, FP8, "O", "I")
    rows, columns = (-(-size // BLOCK) for size in weight_OI.shape)
    arguments.check("scale_PQ", scale_PQ, FLOAT32, rows, columns)
    arguments.check("out_TO", out_TO, (x_TI.dtype,), "T", "O")
    _op(x_TI, weight_OI, scale_PQ, out_TO)


def _block_fp8_linear(x_TI: Tensor, weight_OI: Tensor, scale_PQ: Tensor, out_TO: Tensor) -> None:
    weight = dequantize_blocks(weight_OI, scale_PQ, (BLOCK, BLOCK)).to(x_TI.dtype)
    out_TO.copy_(F.linear(x_TI, weight))


_op = cpu_op(mutates=("out_TO",))(_block_fp8_linear)
implement("block_fp8_linear", cuda.block_fp8_linear, "CUDA")
