"""Writes the demo model as a checkpoint directory of the hub's form: config, bf16 safetensors, tokenizer, chat template.

Called at the end of training; needs no network and no tokenizer library. What is written loads in transformers as
GlmMoeDsaForCausalLM. config.json has no `layer_types`: its values differ between transformers' versions, and every
version derives them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import train_model as tm
from .data import BOS, EOS, PAD, SPECIAL_TOKENS, VOCAB_SIZE

MAX_POSITIONS = 16384
CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}{%- for part in content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- '<|bos|>' -}}
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{- raise_exception('unknown role: ' + message.role) -}}
{%- endif -%}
{{- '<|' + message.role + '|>' + text_of(message.content) -}}
{%- if message.role == 'assistant' -%}{{- '<|eos|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def export(weights: tm.Weights, folder: Path) -> None:
    """Writes the whole checkpoint directory; weights are rounded to bf16, the router's correction biases stay fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: _to_file_dtype(name, t) for name, t in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", hub_config())
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": [EOS], "pad_token_id": PAD, "do_sample": False},
    )
    _write_json(folder / "tokenizer.json", tokenizer())
    _write_json(folder / "tokenizer_config.json", tokenizer_config())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="ascii")


def load(folder: Path, device: torch.device) -> tm.Weights:
    """The checkpoint's weights upcast to fp32."""
    tensors = load_file(folder / "model.safetensors")
    return {name: t.float().to(device) for name, t in tensors.items()}


def _to_file_dtype(name: str, tensor: Tensor) -> Tensor:
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
    return tensor.detach().to("cpu", dtype).contiguous()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hub_config() -> dict:
    """config.json."""
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": tm.D,
        "intermediate_size": tm.DENSE_INNER,
        "moe_intermediate_size": tm.EXPERT_INNER,
        "num_hidden_layers": tm.NUM_LAYERS,
        "first_k_dense_replace": tm.NUM_DENSE_LAYERS,
        "num_attention_heads": tm.NUM_HEADS,
        "num_key_value_heads": tm.NUM_HEADS,
        "q_lora_rank": tm.Q_RANK,
        "kv_lora_rank": tm.KV_RANK,
        "qk_nope_head_dim": tm.NOPE_DIM,
        "qk_rope_head_dim": tm.ROPE_DIM,
        "v_head_dim": tm.V_DIM,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "n_routed_experts": tm.NUM_EXPERTS,
        "num_experts_per_tok": tm.EXPERTS_PER_TOKEN,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "index_n_heads": tm.INDEX_HEADS,
        "index_head_dim": tm.INDEX_DIM,
        "index_topk": tm.TOP_K,
        "indexer_types": list(tm.INDEXER_TYPES),
        "hidden_act": "silu",
        "rms_norm_eps": tm.EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": tm.ROPE_THETA},
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte (printable Latin-1 as itself, others from 256 on)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def tokenizer() -> dict:
    """tokenizer.json: byte-level BPE without merges, id of byte b is b; bos is put before a text."""
    bos, bos_id = SPECIAL_TOKENS[0], BOS
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(256 + i, name) for i, name in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos), {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                _special(bos),
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {char: b for b, char in enumerate(byte_characters())},
            "merges": [],
        },
    }


def _special(name: str) -> dict:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _added_token(token_id: int, name: str) -> dict:
    """An entry of `added_tokens`. <think> and </think> are text to the reader, so they are not `special`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": name, **flags, "special": "think" not in name}


def tokenizer_config() -> dict:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
