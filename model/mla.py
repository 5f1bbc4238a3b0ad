"""Multi-head latent attention in the absorbed form, over the positions the indexer selected.

   x --W_DQ--> norm --> q_latent --W_UQ--> q_nope, q_rope       q_rope, k_rope: rotated in place
   x --W_DKV-> norm --> latent, k_rope    (one row of cache)
   attend( q_nope @ W_UK, q_rope | latent, k_rope ) --> W_UV --> W_O

Keys and values are never expanded: W_UK joins the query, W_UV the output (DeepSeek-V2,
arXiv:2405.04434, section 2.1). The layer owns weights only; rows live in the context.

Shape suffixes: T tokens, M hidden width, Q query latent width, H heads, N nope width, R rope width,
C latent width, V value width, F = R / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.rotate import rotate_into
from .config import ModelConfig
from .context import AttentionContext
from .indexer import Indexer
from .layers import Matrix, linear, rms_norm
from .rope import apply_rope_
from .weights import Weights

STRICT_NORM_EPS = 1e-6
"""What transformers hard-codes for the two latent norms."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """One layer's attention. `indexer` is None where the layer shares the last one's selection."""

    layer: int
    nope_dim: int
    norm_eps: float
    scale: float
    compress: Matrix
    """[Q + C + R, M]: W_DQ, then W_DKV."""
    q_norm_Q: Tensor
    q_b: Matrix
    """[H * (N + R), Q]"""
    kv_norm_C: Tensor
    up_key_HNC: Tensor
    up_value_HVC: Tensor
    out: Matrix
    """[M, H * V]"""
    indexer: Indexer | None

    @classmethod
    def load(
        cls,
        weights: Weights,
        config: ModelConfig,
        layer: int,
        *,
        strict_norm_eps: bool,
        compiled_gates: bool,
    ) -> LatentAttention:
        prefix = f"model.layers.{layer}.self_attn."
        kv_b = weights.get(prefix + "kv_b_proj.weight")
        kv_b = kv_b.unflatten(0, (config.num_attention_heads, -1))
        has_indexer = config.indexer_types[layer] == "full"
        return cls(
            layer=layer,
            nope_dim=config.qk_nope_head_dim,
            norm_eps=STRICT_NORM_EPS if strict_norm_eps else config.rms_norm_eps,
            scale=config.softmax_scale,
            compress=weights.fused(
                prefix + "q_a_proj.weight", prefix + "kv_a_proj_with_mqa.weight"
            ),
            q_norm_Q=weights.get(prefix + "q_a_layernorm.weight"),
            q_b=weights.matrix(prefix + "q_b_proj.weight"),
            kv_norm_C=weights.get(prefix + "kv_a_layernorm.weight"),
            up_key_HNC=kv_b[:, : config.qk_nope_head_dim].contiguous(),
            up_value_HVC=kv_b[:, config.qk_nope_head_dim :].contiguous(),
            out=weights.matrix(prefix + "o_proj.weight"),
            indexer=Indexer.load(weights, config, layer, compiled_gates=compiled_gates)
            if has_indexer
            else None,
        )

    def __call__(
        self, x_TM: Tensor, cos_TF: Tensor, sin_TF: Tensor, context: AttentionContext
    ) -> Tensor:
        q_width = self.q_norm_Q.shape[0]
        compressed_T = linear(x_TM, self.compress)
        q_latent_TQ = rms_norm(compressed_T[:, :q_width], self.q_norm_Q, self.norm_eps)
        # First of all: what is selected may have to be fetched while the rest is computed.
        if self.indexer is not None:
            self.indexer(x_TM, q_latent_TQ, cos_TF, sin_TF, context)
        self._store(compressed_T[:, q_width:], cos_TF, sin_TF, context)
        num_heads = self.up_key_HNC.shape[0]
        q_TH = linear(q_latent_TQ, self.q_b).unflatten(-1, (num_heads, -1))
        q_nope_THN, q_rope_THR = q_TH[..., : self.nope_dim], q_TH[..., self.nope_dim :]
        # The two parts side by side, as FlashMLA takes them.
        latent_dim, rope_dim = self.up_key_HNC.shape[2], q_rope_THR.shape[2]
        query_THX = q_TH.new_empty(*q_TH.shape[:2], latent_dim + rope_dim)
        latent_THC, rope_THR = query_THX.split([latent_dim, rope_dim], -1)
        rotate_into(q_rope_THR, cos_TF, sin_TF, True, rope_THR)
        absorbed_HTC = latent_THC.transpose(0, 1)
        torch.bmm(q_nope_THN.transpose(0, 1), self.up_key_HNC, out=absorbed_HTC)
        out_THC = context.attend(self.layer, latent_THC, rope_THR, self.scale)
        out_THV = out_THC.new_empty(x_TM.shape[0], *self.up_value_HVC.shape[:2])
        up_value_HCV = self.up_value_HVC.transpose(1, 2)
        torch.bmm(out_THC.transpose(0, 1), up_value_HCV, out=out_THV.transpose(0, 1))
        return linear(out_THV.flatten(1), self.out)

    def _store(
        self, kv_T: Tensor, cos_TF: Tensor, sin_TF: Tensor, context: AttentionContext
    ) -> None:
        """Hands the pass's rows over, from [T, C + R]: normed latent, rotated rope key."""
        latent_dim = self.kv_norm_C.shape[0]
        latent_TC = rms_norm(kv_T[:, :latent_dim], self.kv_norm_C, self.norm_eps)
        k_rope_TR = apply_rope_(kv_T[:, latent_dim:], cos_TF, sin_TF, interleaved=True)
        context.store_kv(self.layer, latent_TC, k_rope_TR)
