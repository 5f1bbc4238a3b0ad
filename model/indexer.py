"""The lightning indexer: queries, keys and head gates that decide which positions are attended.

score[s, t] = sum_i gate[s, i] * relu(query[s, i] . key[t]); one key a token, shared by the heads.
Keys are LayerNormed WITH bias; rope turns the FIRST values of queries and keys (MLA: the last).
Scoring and top-k belong to the context. Hadamard transform and FP8 of the reference are left out:
the first changes no score, the second is the index layout's business.

Head gates are two small functions that torch.compile fuses into one kernel after the matmul
(SGLang PR #22232). They run compiled on a GPU and eagerly on a CPU unless `Model.load` is told.

Shape suffixes: T tokens, M hidden width, Q query latent width, I indexer heads, D index key width,
R rope width, F = R / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .config import ModelConfig
from .context import AttentionContext
from .layers import Matrix, layer_norm, linear, linear_fp32
from .rope import apply_rope_
from .weights import Weights

K_NORM_EPS = 1e-6


def _project_and_scale_head_gates(x_TM: Tensor, weight_IM: Tensor) -> Tensor:
    """x @ weights_proj in float32 (weight: see WeightSource.exact), times I**-0.5: [T, I]."""
    return linear_fp32(x_TM, weight_IM) * weight_IM.shape[0] ** -0.5


def _get_logits_head_gate(
    x_TM: Tensor, weight_IM: Tensor, softmax_scale: float, query_scale_TI: Tensor | None = None
) -> Tensor:
    """Head gates ready for index logits, float32 [T, I].

    Holds I**-0.5, `softmax_scale` (D**-0.5) and, where queries were quantised, their scales.
    """
    gate_TI = _project_and_scale_head_gates(x_TM, weight_IM) * softmax_scale
    return gate_TI if query_scale_TI is None else gate_TI * query_scale_TI


@cache
def logits_head_gate(*, compiled: bool) -> Callable[..., Tensor]:
    """`_get_logits_head_gate` as it is, or under torch.compile with symbolic sizes."""
    if compiled:
        return torch.compile(_get_logits_head_gate, dynamic=True)
    return _get_logits_head_gate


@dataclass(frozen=True, slots=True)
class Indexer:
    """One layer's indexer; `number` counts indexers from 0."""

    number: int
    num_heads: int
    rope_dim: int
    is_interleaved: bool
    compiled_gates: bool
    query_weight: Matrix
    """[I * D, Q]"""
    key_weight_DM: Matrix
    key_norm_weight_D: Tensor
    key_norm_bias_D: Tensor
    gate_weight_IM: Tensor

    @classmethod
    def load(
        cls, weights: Weights, config: ModelConfig, layer: int, *, compiled_gates: bool
    ) -> Indexer:
        prefix = f"model.layers.{layer}.self_attn.indexer."
        return cls(
            number=config.index_layer_of[layer],
            num_heads=config.index_num_heads,
            rope_dim=config.qk_rope_head_dim,
            is_interleaved=config.indexer_rope_interleave,
            compiled_gates=compiled_gates,
            query_weight=weights.matrix(prefix + "wq_b.weight"),
            key_weight_DM=weights.matrix(prefix + "wk.weight"),
            key_norm_weight_D=weights.get(prefix + "k_norm.weight", torch.float32),
            key_norm_bias_D=weights.get(prefix + "k_norm.bias", torch.float32),
            gate_weight_IM=weights.exact(prefix + "weights_proj.weight"),
        )

    def __call__(
        self,
        x_TM: Tensor,
        q_latent_TQ: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        context: AttentionContext,
    ) -> None:
        """Stores the pass's keys and lets `context` select; `x_TM` is the normed layer input."""
        query_TID = linear(q_latent_TQ, self.query_weight).unflatten(-1, (self.num_heads, -1))
        key_TD = linear(x_TM, self.key_weight_DM)
        key_TD = layer_norm(key_TD, self.key_norm_weight_D, self.key_norm_bias_D, K_NORM_EPS)
        for roped in (query_TID[..., : self.rope_dim], key_TD[..., : self.rope_dim]):
            apply_rope_(roped, cos_TF, sin_TF, interleaved=self.is_interleaved)
        head_gate = logits_head_gate(compiled=self.compiled_gates)
        gate_TI = head_gate(x_TM, self.gate_weight_IM, key_TD.shape[-1] ** -0.5)
        context.store_index_keys(self.number, key_TD)
        context.select(self.number, query_TID, gate_TI)
