"""The whole transformer: loading, forward pass, logits. DeepSeek-V3.2 and the GLM-5 family.

Owned by a node's step thread, which alone calls it; every tensor it makes lives on the model's
device, on the caller's current stream. It holds weights and nothing that belongs to a request: KV
goes through the `AttentionContext` of the pass.

Shape suffixes: T tokens of the pass (all sequences, flattened), M hidden width, N rows wanted,
V vocabulary, F rope frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.block_fp8 import BLOCK
from .config import ModelConfig
from .context import AttentionContext
from .layers import GatedMlp, add_rms_norm_, linear_fp32, rms_norm
from .mla import LatentAttention
from .moe import MixtureOfExperts, make_router
from .random_weights import RandomWeights
from .rope import Rope
from .weight_source import WeightSource, keeps_fp8
from .weights import Checkpoint, Weights


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Pre-norm residual block: attention, then a dense or a mixture MLP."""

    norm_eps: float
    input_norm_M: Tensor
    attention: LatentAttention
    post_attention_norm_M: Tensor
    mlp: GatedMlp | MixtureOfExperts

    def __call__(
        self,
        hidden_TM: Tensor,
        last_TM: Tensor | None,
        cos_TF: Tensor,
        sin_TF: Tensor,
        context: AttentionContext,
    ) -> Tensor:
        """Adds the last layer's result and its own attention to `hidden_TM`; returns its MLP's.

        One launch adds and norms: that is why a sum is left to whoever norms it.
        """
        if last_TM is None:
            x_TM = rms_norm(hidden_TM, self.input_norm_M, self.norm_eps)
        else:
            x_TM = add_rms_norm_(hidden_TM, last_TM, self.input_norm_M, self.norm_eps)
        attended_TM = self.attention(x_TM, cos_TF, sin_TF, context)
        x_TM = add_rms_norm_(hidden_TM, attended_TM, self.post_attention_norm_M, self.norm_eps)
        return self.mlp(x_TM)


class Model:
    """Weights on one device, and the two functions a node needs."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embed_VM: Tensor,
        layers: tuple[DecoderLayer, ...],
        norm_M: Tensor,
        head_VM: Tensor,
    ) -> None:
        self.config = config
        self.dtype = embed_VM.dtype
        self.device = embed_VM.device
        self.rope = Rope(config.rope, config.qk_rope_head_dim, self.device)
        self.layers = layers
        self._embed_VM = embed_VM
        self._norm_M = norm_M
        self._head_VM = head_VM

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        strict_norm_eps: bool = False,
        compiled_gates: bool | None = None,
        fp8_weights: bool | None = None,
    ) -> Model:
        """Loads a hub checkpoint directory.

        Args:
            path: config.json, safetensors; see weights.py.
            dtype: of weights and activations: float32 or bfloat16.
            device: where the weights go.
            strict_norm_eps: 1e-6 for the latent norms, as transformers; else the config's eps.
            compiled_gates: head gates under torch.compile; None: on a GPU only.
            fp8_weights: FP8 matrices with 128x128 blocks are kept and multiplied as they are; else
                in `dtype`. None: in bfloat16 on a GPU that has FP8 products. What attention
                absorbs (kv_b_proj) is in `dtype` either way.

        Raises CheckpointError with every fault of the configuration, or of the tensors.
        """
        path, device = Path(path), torch.device(device)
        config = ModelConfig.from_dir(path)
        if fp8_weights is None:
            fp8_weights = keeps_fp8(dtype, device)
        with Checkpoint(path) as checkpoint:
            weights = Weights(checkpoint, config, dtype, device, keep_fp8=fp8_weights)
            return cls._build(
                weights, config, strict_norm_eps=strict_norm_eps, compiled_gates=compiled_gates
            )

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        seed: int = 0,
        fp8_weights: bool = False,
        compiled_gates: bool | None = None,
    ) -> Model:
        """A model with random weights, drawn on the device: for benchmarks.

        `config`: see `published_config` for the shapes of published models. `fp8_weights`: the
        matrices that an FP8 release quantises are FP8. `dtype`, `compiled_gates` as for `load`.
        """
        weights = RandomWeights(
            config, dtype, torch.device(device), seed=seed, keep_fp8=fp8_weights
        )
        return cls._build(weights, config, strict_norm_eps=False, compiled_gates=compiled_gates)

    @classmethod
    @torch.inference_mode()
    def _build(
        cls,
        weights: WeightSource,
        config: ModelConfig,
        *,
        strict_norm_eps: bool,
        compiled_gates: bool | None,
    ) -> Model:
        if compiled_gates is None:
            compiled_gates = weights.device.type == "cuda"
        layers = tuple(
            _load_layer(
                weights,
                config,
                layer,
                strict_norm_eps=strict_norm_eps,
                compiled_gates=compiled_gates,
            )
            for layer in range(config.num_layers)
        )
        return cls(
            config,
            embed_VM=weights.get("model.embed_tokens.weight"),
            layers=layers,
            norm_M=weights.get("model.norm.weight"),
            head_VM=_load_head(weights, config),
        )

    @torch.inference_mode()
    def forward(
        self, token_ids_T: Tensor, positions_T: Tensor, context: AttentionContext
    ) -> Tensor:
        """Runs all layers; returns hidden states after the final norm, [T, M] in the model's dtype.

        `token_ids_T`, `positions_T`: int64 [T] on the model's device, any mix of sequences; the
        context knows which token belongs to which. Ids must be below vocab_size (not checked here:
        a check would wait for the device).
        """
        hidden_TM = F.embedding(token_ids_T, self._embed_VM)
        cos_TF, sin_TF = self.rope.angles(positions_T)
        last_TM: Tensor | None = None
        for layer in self.layers:
            last_TM = layer(hidden_TM, last_TM, cos_TF, sin_TF, context)
        return add_rms_norm_(hidden_TM, last_TM, self._norm_M, self.config.rms_norm_eps)

    @torch.inference_mode()
    def logits(self, hidden_NM: Tensor) -> Tensor:
        """Logits of chosen rows of `forward`'s result, float32 [N, V]."""
        return linear_fp32(hidden_NM, self._head_VM)


def _load_layer(
    weights: WeightSource,
    config: ModelConfig,
    layer: int,
    *,
    strict_norm_eps: bool,
    compiled_gates: bool,
) -> DecoderLayer:
    prefix = f"model.layers.{layer}."
    is_dense = config.mlp_types[layer] == "dense"
    return DecoderLayer(
        norm_eps=config.rms_norm_eps,
        input_norm_M=weights.get(prefix + "input_layernorm.weight"),
        attention=LatentAttention.load(
            weights, config, layer, strict_norm_eps=strict_norm_eps, compiled_gates=compiled_gates
        ),
        post_attention_norm_M=weights.get(prefix + "post_attention_layernorm.weight"),
        mlp=_load_mlp(weights, prefix + "mlp.")
        if is_dense
        else _load_mixture(weights, config, prefix + "mlp."),
    )


def _load_mlp(weights: WeightSource, prefix: str) -> GatedMlp:
    return GatedMlp(
        gate_up_FM=weights.fused(prefix + "gate_proj.weight", prefix + "up_proj.weight"),
        down_MF=weights.matrix(prefix + "down_proj.weight"),
    )


def _load_mixture(weights: WeightSource, config: ModelConfig, prefix: str) -> MixtureOfExperts:
    router = make_router(
        config,
        weights.exact(prefix + "gate.weight"),
        weights.get(prefix + "gate.e_score_correction_bias", torch.float32),
    )
    names = [f"{prefix}experts.{expert}." for expert in range(config.n_routed_experts)]
    gate_up = [(name + "gate_proj.weight", name + "up_proj.weight") for name in names]
    down = [(name + "down_proj.weight",) for name in names]
    as_fp8 = config.moe_intermediate_size % BLOCK == 0
    as_fp8 = as_fp8 and all(weights.stays_fp8(group) for group in gate_up + down)
    gate_up_EFM, gate_up_scale_EPQ = weights.stacked(gate_up, as_fp8=as_fp8)
    down_EMF, down_scale_EPQ = weights.stacked(down, as_fp8=as_fp8)
    return MixtureOfExperts(
        router,
        gate_up_EFM=gate_up_EFM,
        down_EMF=down_EMF,
        shared=_load_mlp(weights, prefix + "shared_experts."),
        gate_up_scale_EPQ=gate_up_scale_EPQ,
        down_scale_EPQ=down_scale_EPQ,
    )


def _load_head(weights: WeightSource, config: ModelConfig) -> Tensor:
    """lm_head, or the embedding when tied; float32 on a CPU, which has no mixed matmul."""
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return weights.get(name, torch.float32 if weights.device.type == "cpu" else None)
