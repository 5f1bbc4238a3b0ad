"""What config.json and generation_config.json may say, and what is refused."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_models import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.common.config import KvSection
from tidepool.common.errors import CheckpointError, ConfigError
from tidepool.model.config import ModelConfig, geometry

V32 = {
    "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": False, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v32", "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    },
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
"""The fields of the hub's DeepSeek-V3.2."""

GLM = {
    **{key: value for key, value in V32.items() if key not in ("rope_scaling", "rope_theta")},
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa",
    "eos_token_id": [154820, 154827, 154829], "hidden_size": 6144, "index_n_heads": 32,
    "intermediate_size": 12288, "n_group": 1, "topk_group": 1, "num_attention_heads": 64,
    "num_hidden_layers": 78, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256,
    "rms_norm_eps": 1e-5, "vocab_size": 154880, "max_position_embeddings": 202752,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "indexer_rope_interleave": True, "bos_token_id": None,
}  # fmt: skip
"""The fields of the hub's GLM-5."""


def parse(tree: dict, generation: dict | None = None, **changes: object) -> ModelConfig:
    return ModelConfig.from_dict({**tree, **changes}, generation or {})


def faults(tree: dict, **changes: object) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        parse(tree, **changes)
    return str(caught.value).splitlines()


def test_the_hub_config_of_v32_is_read():
    config = parse(V32)
    assert config.architecture == "DeepseekV32ForCausalLM"
    assert config.softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert config.index_layers == tuple(range(61))
    assert config.mlp_types == ("dense",) * 3 + ("sparse",) * 58
    assert not config.indexer_rope_interleave
    assert config.eos_token_ids == (1,)
    assert config.fp8_block == (128, 128)


def test_the_hub_config_of_glm_5_is_read():
    config = parse(GLM)
    assert config.softmax_scale == 0.0625
    assert config.rope.theta == 1e6
    assert config.indexer_rope_interleave
    assert config.eos_token_ids == (154820, 154827, 154829)
    assert config.bos_token_id is None


def test_old_and_new_rope_fields_mean_the_same():
    new = {"rope_parameters": {**V32["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000}}
    del new["rope_parameters"]["type"]
    old_fields = {**V32}
    assert parse({**old_fields, "rope_scaling": None, "rope_theta": None}, **new) == parse(V32)
    plain = {"rope_scaling": None, "rope_theta": 5e5}
    assert parse(V32, **plain).rope.theta == 5e5
    assert parse(V32, **plain).rope.kind == "default"


def test_an_indexer_rope_key_overrides_the_architecture():
    assert parse(V32, indexer_rope_interleave=True).indexer_rope_interleave
    assert not parse(GLM, indexer_rope_interleave=False).indexer_rope_interleave


def test_frequency_and_offset_of_glm_52_give_21_indexers():
    config = parse(GLM, index_topk_freq=4, index_skip_topk_offset=3)
    assert config.index_layers == (0, 1, 2, *range(6, 78, 4))
    assert len(config.index_layers) == 21
    assert config.index_layer_of[:8] == (0, 1, 2, 2, 2, 2, 3, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"indexer_types": ["full", "shared", "full", "shared"]},
        {"index_topk_pattern": "FSFS"},
        {"index_topk_pattern": ["full", "shared", "full", "shared"]},
        {"index_topk_freq": 2, "index_skip_topk_offset": 1},
    ],
)
def test_every_way_to_share_indexers_is_read_as_transformers_does(changes):
    config = parse(GLM, num_hidden_layers=4, **changes)
    assert config.indexer_types == ("full", "shared", "full", "shared")
    assert list(config.indexer_types) == tiny_config("glm5", **changes).indexer_types


def test_stop_tokens_are_the_union_of_both_files():
    assert parse(V32, {"eos_token_id": [7, 1]}).eos_token_ids == (1, 7)
    assert parse(V32, {"eos_token_id": 9}, eos_token_id=None).eos_token_ids == (9,)
    assert parse(V32, eos_token_id=None).eos_token_ids == ()


def test_every_fault_is_listed_at_once():
    lines = faults(
        V32,
        hidden_size=-1,
        index_topk=None,
        hidden_act="gelu",
        topk_group=9,
        rms_norm_eps="small",
        eos_token_id=[1, 129280],
    )
    assert len(lines) == 6
    for word in ("hidden_size", "index_topk", "gelu", "topk_group", "rms_norm_eps", "129280"):
        assert sum(word in line for line in lines) == 1


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "deepseek_v4"}, "deepseek_v4"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"weight_block_size": [0, 1]}}, "weight_block_size"),
        ({"qk_rope_head_dim": 63}, "even"),
        ({"qk_rope_head_dim": 256}, "index_head_dim"),
        ({"n_group": 7}, "multiple"),
        ({"n_group": 256, "topk_group": 256}, "fewer than 2"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"indexer_types": ["full"]}, "61 layers"),
        ({"index_topk_pattern": "X" * 61}, "index_topk_pattern"),
        ({"index_topk_pattern": "S" * 61}, "first layer"),
        ({"index_topk_freq": 4}, "share"),
        ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types"),
        ({"scoring_func": "softmax"}, "softmax"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"routed_scaling_factor": 10**400}, "routed_scaling_factor"),
        ({"n_routed_experts": 2**31 - 8}, "absurd"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes, word):
    assert any(word in line for line in faults(V32, **changes))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(V32)), inner)
    ),
    max_leaves=6,
)


@given(
    base=st.sampled_from([V32, GLM]),
    changes=st.dictionaries(
        st.sampled_from([*sorted(GLM), "index_topk_pattern", "indexer_types", "index_topk_freq"]),
        JSON_VALUES,
        max_size=4,
    ),
    rope=JSON_VALUES,
    eos=JSON_VALUES,
)
@settings(max_examples=300, deadline=None)
def test_no_value_of_any_field_raises_anything_else(base, changes, rope, eos):
    for field in ("rope_scaling", "rope_parameters"):
        try:
            parse({**base, **changes, field: rope}, {"eos_token_id": eos})
        except CheckpointError as error:
            assert str(error)


def test_unreadable_files_are_checkpoint_errors(tmp_path):
    with pytest.raises(CheckpointError, match="not a directory"):
        ModelConfig.from_dir(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot read"):
        ModelConfig.from_dir(tmp_path)
    for text in ("{", "[]", "[" * 100_000, "\xff"):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError):
            ModelConfig.from_dir(tmp_path)


def test_generation_config_is_optional(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V32))
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (1, 5)


def test_geometry_has_the_published_row_sizes():
    shared = parse(GLM, index_topk_freq=4, index_skip_topk_offset=3)
    assert geometry(shared, KvSection(layout="mla_fp8")).token_bytes == 53_940
    assert geometry(parse(V32), KvSection()).token_bytes == 78_324
    with pytest.raises(ConfigError, match="multiple of 128"):
        geometry(parse(V32, kv_lora_rank=96), KvSection(layout="mla_fp8"))
