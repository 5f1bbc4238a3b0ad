"""Rotation of queries and keys by their positions, in place or into another tensor.

Suffixes: T tokens, H heads, R rope width, F = R / 2.
"""

from __future__ import annotations

from torch import Tensor

from . import cuda
from .registry import FLOAT32, FLOATS, Arguments, cpu_op, implement


def rotate(x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor, is_interleaved: bool) -> None:
    """Turns each pair of values of a head by its token's angle, in float32.

    Args:
        x_THR: float32, bfloat16 or float16 [T, H, R], any strides, no two elements at one place;
            read and written.
        cos_TF, sin_TF: float32 [T, F].
        is_interleaved: pairs are (0, 1), (2, 3), ...; else (0, F), (1, F + 1), ...
    """
    arguments = Arguments("rotate", R=2 * cos_TF.shape[-1])
    arguments.check("x_THR", x_THR, FLOATS, "T", "H", "R")
    arguments.check("cos_TF", cos_TF, FLOAT32, "T", "F")
    arguments.check("sin_TF", sin_TF, FLOAT32, "T", "F")
    _op(x_THR, cos_TF, sin_TF, is_interleaved)


def rotate_into(
    x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor, is_interleaved: bool, out_THR: Tensor
) -> None:
    """As `rotate`, but written to `out_THR`, of the dtype of `x_THR`, which is left as it is."""
    arguments = Arguments("rotate_into", R=2 * cos_TF.shape[-1])
    arguments.check("x_THR", x_THR, FLOATS, "T", "H", "R")
    arguments.check("cos_TF", cos_TF, FLOAT32, "T", "F")
    arguments.check("sin_TF", sin_TF, FLOAT32, "T", "F")
    arguments.check("out_THR", out_THR, (x_THR.dtype,), "T", "H", "R")
    _into_op(x_THR, cos_TF, sin_TF, is_interleaved, out_THR)


def _rotate(x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor, is_interleaved: bool) -> None:
    if is_interleaved:
        first, second = x_THR[..., 0::2], x_THR[..., 1::2]
    else:
        first, second = x_THR.chunk(2, dim=-1)
    cos_T1F, sin_T1F = cos_TF[:, None], sin_TF[:, None]
    rotated_first = first * cos_T1F - second * sin_T1F
    rotated_second = second * cos_T1F + first * sin_T1F
    first.copy_(rotated_first)
    second.copy_(rotated_second)


def _rotate_into(
    x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor, is_interleaved: bool, out_THR: Tensor
) -> None:
    out_THR.copy_(x_THR)
    _rotate(out_THR, cos_TF, sin_TF, is_interleaved)


_op = cpu_op(mutates=("x_THR",))(_rotate)
_into_op = cpu_op(mutates=("out_THR",))(_rotate_into)
implement("rotate", cuda.rotate, "CUDA")
implement("rotate_into", cuda.rotate_into, "CUDA")
