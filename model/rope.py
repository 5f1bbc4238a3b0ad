"""Rotary position embedding with YaRN: frequencies, angles of a pass, rotation in place.

Owned by `Model`; angles are computed once a forward pass, in float32, and shared by all layers and
indexers (HF's bfloat16 angles lose positions beyond a few thousand). Every rotation writes its
result where the input was.

Shape suffixes: T tokens, H heads, R rope width, F = R / 2 frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.rotate import rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding; the fields behind `theta` count only for yarn.

    `mscale` and `mscale_all_dim` are 0 when absent; `attention_factor` None: derived from them.
    """

    kind: Literal["default", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    original_max_position_embeddings: int = 4096
    truncate: bool = True


def yarn_mscale(factor: float, mscale: float) -> float:
    """g(m) = 0.1 * m * ln(factor) + 1, and 1 where the context is not extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def attention_factor(rope: RopeConfig) -> float:
    """Multiplier of cos and sin; it scales queries and keys of the indexer too."""
    if rope.kind == "default":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def softmax_scale(rope: RopeConfig, qk_head_dim: int) -> float:
    """qk_head_dim**-0.5, times g(mscale_all_dim)**2 under YaRN when mscale_all_dim is set."""
    scale = qk_head_dim**-0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(rope: RopeConfig, rope_dim: int) -> Tensor:
    """Radians a position, float32 [F] on the CPU. YaRN (arXiv:2309.00071, section 3.2)."""
    exponent_F = torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim
    extrapolated_F = 1.0 / rope.theta**exponent_F
    if rope.kind == "default":
        return extrapolated_F
    interpolated_F = 1.0 / (rope.factor * rope.theta**exponent_F)
    keep_F = 1 - _yarn_ramp(rope, rope_dim)
    return interpolated_F * (1 - keep_F) + extrapolated_F * keep_F


def _yarn_ramp(rope: RopeConfig, rope_dim: int) -> Tensor:
    """0 where a frequency turns often enough to be left alone, 1 where it is interpolated."""

    def dimension_of(num_rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return rope_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1)
    if low == high:
        high += 0.001
    steps_F = torch.arange(rope_dim // 2, dtype=torch.float32)
    return ((steps_F - low) / (high - low)).clamp(0, 1)


class Rope:
    """Angles by position. Computed, not tabled: a table for 1M positions would hold 256 MiB."""

    def __init__(self, rope: RopeConfig, rope_dim: int, device: torch.device) -> None:
        self.inverse_frequency_F = inverse_frequencies(rope, rope_dim).to(device)
        self.attention_factor = attention_factor(rope)

    def angles(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the pass, float32 [T, F], times the attention factor.

        `positions_T` int64 [T] on the rope's device.
        """
        angle_TF = positions_T[:, None].float() * self.inverse_frequency_F
        return angle_TF.cos() * self.attention_factor, angle_TF.sin() * self.attention_factor


def apply_rope_(x: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates `x` [T, R] or [T, H, R] IN PLACE, in float32, and returns it.

    Pairs are (0, 1), (2, 3), ... when `interleaved`, else (0, F), (1, F + 1), ... (half-split). `x`
    is usually a slice of a larger tensor, so writing through it is the whole update: there is no
    copy back, and thus no need for a guard like SGLang's `update_rope_guarded` (PR #22232), which
    compares addresses to find out whether a rotated copy must still be written back. `x` must own
    its elements (no expanded dimension).
    """
    x_THR = x if x.dim() == 3 else x[:, None]
    rotate(x_THR, cos_TF, sin_TF, interleaved)
    return x
