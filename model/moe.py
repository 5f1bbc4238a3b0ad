"""Mixture of experts: sigmoid router with groups and a selection bias, routed and shared experts.

Source: DeepSeek-V3 (arXiv:2412.19437, section 2.1.2); transformers 5.23, DeepseekV32TopkRouter.

Shape suffixes: T tokens, M hidden width, F expert width, E experts, G groups, K chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig
from .layers import GatedMlp, linear_fp32


@dataclass(frozen=True, slots=True)
class Router:
    """Chooses experts by score + bias, weighs them by the score alone."""

    weight_EM: Tensor
    bias_E: Tensor
    """float32: e_score_correction_bias decides who is chosen, never how much it counts."""
    num_groups: int
    top_groups: int
    top_experts: int
    norm_weights: bool
    scaling_factor: float

    def __call__(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (weight float32 [T, K], expert int64 [T, K])."""
        score_TE = linear_fp32(x_TM, self.weight_EM).sigmoid()
        choice_TE = score_TE + self.bias_E
        if self.num_groups > 1:
            choice_TE = self._keep_best_groups(choice_TE)
        expert_TK = choice_TE.topk(self.top_experts, dim=-1).indices
        weight_TK = score_TE.gather(1, expert_TK)
        if self.norm_weights:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return weight_TK * self.scaling_factor, expert_TK

    def _keep_best_groups(self, choice_TE: Tensor) -> Tensor:
        """-inf outside the best groups; a group counts the sum of its two best choices."""
        choice_TGX = choice_TE.unflatten(-1, (self.num_groups, -1))
        group_TG = choice_TGX.topk(2, dim=-1).values.sum(-1)
        kept_TK = group_TG.topk(self.top_groups, dim=-1).indices
        is_out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept_TK, False)
        return choice_TGX.masked_fill(is_out_TG[..., None], float("-inf")).flatten(1)


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """Routed experts, weighed, plus shared experts, not weighed; the sum runs in float32."""

    router: Router
    gate_up_EFM: Tensor
    """[E, 2F, M]"""
    down_EMF: Tensor
    shared: GatedMlp

    def __call__(self, x_TM: Tensor) -> Tensor:
        weight_TK, expert_TK = self.router(x_TM)
        out_TM = self._routed(x_TM, weight_TK, expert_TK)
        return (out_TM + self.shared(x_TM)).to(x_TM.dtype)

    def _routed(self, x_TM: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """Loops over the experts that have tokens; asks the device once which those are."""
        out_TM = torch.zeros(x_TM.shape, dtype=torch.float32, device=x_TM.device)
        num_experts, top_experts = self.gate_up_EFM.shape[0], expert_TK.shape[1]
        flat_expert = expert_TK.flatten()
        order = flat_expert.argsort(stable=True)
        counts = torch.bincount(flat_expert, minlength=num_experts).tolist()
        weight = weight_TK.flatten()
        end = 0
        for expert, count in enumerate(counts):
            start, end = end, end + count
            if not count:
                continue
            picks = order[start:end]
            tokens = picks // top_experts
            mlp = GatedMlp(self.gate_up_EFM[expert], self.down_EMF[expert])
            out_TM.index_add_(0, tokens, mlp(x_TM[tokens]).float() * weight[picks, None])
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
