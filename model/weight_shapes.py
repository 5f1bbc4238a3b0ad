"""The tensors a hub checkpoint of either architecture must hold, and their shapes."""

from __future__ import annotations

from .config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: ModelConfig) -> Shapes:
    """Name -> shape of every tensor, in the order in which the model reads them."""
    vocab, hidden = config.vocab_size, config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        parts = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            **{f"self_attn.{name}": shape for name, shape in _attention(config).items()},
        }
        if config.indexer_types[layer] == "full":
            indexer = _indexer(config)
            parts |= {f"self_attn.indexer.{name}": shape for name, shape in indexer.items()}
        if config.mlp_types[layer] == "dense":
            parts |= _mlp("mlp.", hidden, config.intermediate_size)
        else:
            parts |= _mixture(config)
        shapes |= {prefix + name: shape for name, shape in parts.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _attention(config: ModelConfig) -> Shapes:
    heads, hidden = config.num_attention_heads, config.hidden_size
    q_rank, kv_rank = config.q_lora_rank, config.kv_lora_rank
    return {
        "q_a_proj.weight": (q_rank, hidden),
        "q_a_layernorm.weight": (q_rank,),
        "q_b_proj.weight": (heads * config.qk_head_dim, q_rank),
        "kv_a_proj_with_mqa.weight": (kv_rank + config.qk_rope_head_dim, hidden),
        "kv_a_layernorm.weight": (kv_rank,),
        "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), kv_rank),
        "o_proj.weight": (hidden, heads * config.v_head_dim),
    }


def _indexer(config: ModelConfig) -> Shapes:
    width = config.index_head_dim
    return {
        "wq_b.weight": (config.index_num_heads * width, config.q_lora_rank),
        "wk.weight": (width, config.hidden_size),
        "k_norm.weight": (width,),
        "k_norm.bias": (width,),
        "weights_proj.weight": (config.index_num_heads, config.hidden_size),
    }


def _mixture(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    shapes: Shapes = {
        "mlp.gate.weight": (config.n_routed_experts, hidden),
        "mlp.gate.e_score_correction_bias": (config.n_routed_experts,),
    }
    for expert in range(config.n_routed_experts):
        shapes |= _mlp(f"mlp.experts.{expert}.", hidden, inner)
    return shapes | _mlp("mlp.shared_experts.", hidden, inner * config.n_shared_experts)


def _mlp(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }
