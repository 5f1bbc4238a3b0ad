"""Mixture of experts: sigmoid router with groups and a selection bias, routed and shared experts.

Source: DeepSeek-V3 (arXiv:2412.19437, section 2.1.2); transformers 5.23, DeepseekV32TopkRouter.
Nothing here waits for the device: on a GPU the tokens of each expert are counted and sorted there
(kernels/routed_experts.py).

Shape suffixes: T tokens, M hidden width, F expert width, E experts, K chosen experts, P and Q
128x128 blocks of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.routed_experts import route_experts, routed_experts
from .config import ModelConfig
from .layers import GatedMlp, linear_fp32


@dataclass(frozen=True, slots=True)
class Router:
    """Chooses experts by score + bias, weighs them by the score alone."""

    weight_EM: Tensor
    """See WeightSource.exact: scores are float32."""
    bias_E: Tensor
    """float32: e_score_correction_bias decides who is chosen, never how much it counts."""
    num_groups: int
    top_groups: int
    top_experts: int
    norm_weights: bool
    scaling_factor: float

    def __call__(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (weight float32 [T, K], expert int64 [T, K])."""
        logits_TE = linear_fp32(x_TM, self.weight_EM)
        weight_TK = logits_TE.new_empty(x_TM.shape[0], self.top_experts)
        expert_TK = torch.empty_like(weight_TK, dtype=torch.int64)
        route_experts(
            logits_TE,
            self.bias_E,
            self.num_groups,
            self.top_groups,
            self.norm_weights,
            self.scaling_factor,
            weight_TK,
            expert_TK,
        )
        return weight_TK, expert_TK


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Routed experts, weighed, plus shared experts, not weighed; the sum runs in float32."""

    router: Router
    gate_up_EFM: Tensor
    """[E, 2F, M], the model's dtype, or FP8 with scales"""
    down_EMF: Tensor
    shared: GatedMlp
    gate_up_scale_EPQ: Tensor | None = None
    down_scale_EPQ: Tensor | None = None

    def __call__(self, x_TM: Tensor) -> Tensor:
        weight_TK, expert_TK = self.router(x_TM)
        out_TM = torch.empty_like(x_TM)
        routed_experts(
            x_TM,
            weight_TK,
            expert_TK,
            self.gate_up_EFM,
            self.gate_up_scale_EPQ,
            self.down_EMF,
            self.down_scale_EPQ,
            self.shared(x_TM),
            out_TM,
        )
        return out_TM


def make_router(config: ModelConfig, weight_EM: Tensor, bias_E: Tensor) -> Router:
    return Router(
        weight_EM=weight_EM,
        bias_E=bias_E,
        num_groups=config.n_group,
        top_groups=config.topk_group,
        top_experts=config.num_experts_per_tok,
        norm_weights=config.norm_topk_prob,
        scaling_factor=config.routed_scaling_factor,
    )
