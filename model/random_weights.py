"""Weights drawn on the device, for benchmarks: real shapes, no checkpoint, no copy on the host.

Used by `Model.random` alone. Matrices are normal with variance 1 / fan-in, so that activations keep
their size through the layers and nothing overflows; norms are one, biases are small.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..kernels.block_fp8 import BLOCK
from ..kernels.fp8 import E4M3_MAX
from .config import ModelConfig
from .layers import BlockFp8
from .weight_shapes import expected_shapes
from .weight_source import WeightSource

_FP8_NAME = re.compile(r"(?<!weights)_proj(_with_mqa)?\.weight$|indexer\.w(q_b|k)\.weight$")
_FP8_STD = 100.0

_SHAPES: dict[str, dict[str, Any]] = {
    "deepseek-v3.2": {
        "architectures": ["DeepseekV32ForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 2048,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "topk_group": 4,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "glm-5": {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "eos_token_id": [154820, 154827, 154829],
        "first_k_dense_replace": 3,
        "hidden_size": 6144,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_topk": 2048,
        "intermediate_size": 12288,
        "kv_lora_rank": 512,
        "max_position_embeddings": 202752,
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 78,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "routed_scaling_factor": 2.5,
        "topk_group": 1,
        "v_head_dim": 256,
        "vocab_size": 154880,
    },
}
_SHAPES["glm-5.2"] = {
    **_SHAPES["glm-5"],
    "max_position_embeddings": 1048576,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
}
PUBLISHED_MODELS = tuple(_SHAPES)


def published_config(
    name: str,
    *,
    num_layers: int | None = None,
    num_dense_layers: int | None = None,
    num_experts: int | None = None,
    num_leading_indexers: int | None = None,
) -> ModelConfig:
    """Configuration of a published model (PUBLISHED_MODELS), cut in depth and experts.

    `num_experts` must leave every group of DeepSeek-V3.2's eight at least two: 16 or more.
    `num_leading_indexers`: GLM-5.2 has three layers with an indexer before its pattern of one in
    four begins; with 1 a cut to four layers has the share of indexers that the whole model has.
    CheckpointError if the numbers do not go together.
    """
    changes = {
        "num_hidden_layers": num_layers,
        "first_k_dense_replace": num_dense_layers,
        "n_routed_experts": num_experts,
        "index_skip_topk_offset": num_leading_indexers,
    }
    tree = {**_SHAPES[name], **{key: v for key, v in changes.items() if v is not None}}
    return ModelConfig.from_dict(tree, {})


class RandomWeights(WeightSource):
    """Stands for `Weights`: the same names and shapes, values from a seeded generator."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        seed: int,
        keep_fp8: bool,
    ) -> None:
        super().__init__(dtype, device, keep_fp8=keep_fp8)
        self._shapes = expected_shapes(config)
        self._generator = torch.Generator(device).manual_seed(seed)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Draws one tensor; asking again draws others."""
        shape = self._shapes[name]
        out = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        if name.endswith("norm.weight"):
            return out.fill_(1)
        std = shape[1] ** -0.5 if len(shape) == 2 else 0.01
        return out.normal_(0, std, generator=self._generator)

    def exact(self, name: str) -> Tensor:
        return self.get(name, None if self.device.type == "cuda" else torch.float32)

    def is_fp8(self, name: str) -> bool:
        """What the FP8 releases quantise."""
        return _FP8_NAME.search(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get_fp8(self, name: str) -> BlockFp8:
        """Normal values at the upper end of the range, and the scale that undoes it."""
        shape = self._shapes[name]
        values = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        values.normal_(0, _FP8_STD, generator=self._generator)
        weight = values.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        blocks = [-(-size // BLOCK) for size in shape]
        scale = torch.full(blocks, shape[1] ** -0.5 / _FP8_STD, device=self.device)
        return BlockFp8(weight, scale)
