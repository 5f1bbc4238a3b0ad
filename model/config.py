"""What a checkpoint directory says about its model: config.json and generation_config.json, checked.

Read once by `Model.load` and by whoever sizes pools. Nothing here touches weights. Every fault of
both files is reported at once, in one CheckpointError. The class defaults of transformers are not
trusted for anything that decides a shape or a stop token (its GLM default eos is not the hub's).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..common.config import KvSection
from ..common.errors import CheckpointError
from ..common.layouts import IndexLayout, KvGeometry, RowLayout
from .config_reader import ConfigReader, read_json
from .rope import RopeConfig, softmax_scale

Architecture = Literal["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"]

MODEL_TYPES: dict[str, Architecture] = {
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}


_MAX_EXPERTS = 1 << 18
"""Experts of all layers; DeepSeek-V3.2 has 15,616. Their names are listed before any is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and switches of one model; names follow config.json where it has one.

    Attributes that are not plain copies:
        indexer_types: "full" (own indexer) or "shared" (uses the last full layer's top-k), a layer.
        mlp_types: "dense" or "sparse" (mixture of experts), a layer.
        indexer_rope_interleave: pairs of the indexer's rope; V3.2 half-split, GLM interleaved.
        eos_token_ids: union of config.json and generation_config.json, ascending.
        fp8_block: (rows, columns) that share one scale in block-quantised weights.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    mlp_types: tuple[str, ...]
    index_num_heads: int
    index_head_dim: int
    index_topk: int
    indexer_types: tuple[str, ...]
    indexer_rope_interleave: bool
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    fp8_block: tuple[int, int]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def index_layers(self) -> tuple[int, ...]:
        """The model layer of each indexer, ascending."""
        return tuple(i for i, kind in enumerate(self.indexer_types) if kind == "full")

    @property
    def index_layer_of(self) -> tuple[int, ...]:
        """For each model layer, the number of the indexer (counted from 0) that serves it."""
        numbers, number = [], -1
        for kind in self.indexer_types:
            number += kind == "full"
            numbers.append(number)
        return tuple(numbers)

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention logits, YaRN's mscale included."""
        return softmax_scale(self.rope, self.qk_head_dim)

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Reads a checkpoint directory; raises CheckpointError with every fault, one a line."""
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory")
        tree = read_json(path / "config.json")
        generation = path / "generation_config.json"
        return cls.from_dict(tree, read_json(generation) if generation.exists() else {})

    @classmethod
    def from_dict(cls, tree: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
        """As `from_dir`, from the two parsed files."""
        architecture = _architecture(tree)
        reader = ConfigReader(tree)
        config = _read(cls, reader, architecture, generation)
        reader.raise_faults()
        return config


def geometry(config: ModelConfig, kv: KvSection) -> KvGeometry:
    """The byte geometry of this model's KV under `kv`; ConfigError if the two do not fit."""
    return KvGeometry(
        row=RowLayout(kv.layout, config.kv_lora_rank, config.qk_rope_head_dim),
        index=IndexLayout(kv.index_layout, config.index_head_dim),
        page_size=kv.page_size,
        num_layers=config.num_layers,
        num_index_layers=len(config.index_layers),
    )


def _architecture(tree: dict[str, Any]) -> Architecture:
    """The class that config.json names, by `architectures` or else `model_type`."""
    names = tree.get("architectures") or [MODEL_TYPES.get(str(tree.get("model_type")))]
    known = [name for name in MODEL_TYPES.values() if isinstance(names, list) and name in names]
    if len(known) != 1:
        raise CheckpointError(
            f"config.json: architectures {tree.get('architectures')!r} (model_type "
            f"{tree.get('model_type')!r}) is not supported; supported: "
            f"{', '.join(MODEL_TYPES.values())}"
        )
    return known[0]


def _read(
    cls: type[ModelConfig],
    reader: ConfigReader,
    architecture: Architecture,
    generation: dict[str, Any],
) -> ModelConfig:
    _refuse_unsupported(reader)
    num_layers = reader.integer("num_hidden_layers", maximum=4096)
    vocab_size = reader.integer("vocab_size")
    config = cls(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=reader.integer("hidden_size"),
        num_layers=num_layers,
        num_attention_heads=reader.integer("num_attention_heads"),
        q_lora_rank=reader.integer("q_lora_rank"),
        kv_lora_rank=reader.integer("kv_lora_rank"),
        qk_nope_head_dim=reader.integer("qk_nope_head_dim"),
        qk_rope_head_dim=reader.integer("qk_rope_head_dim"),
        v_head_dim=reader.integer("v_head_dim"),
        intermediate_size=reader.integer("intermediate_size"),
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        n_routed_experts=reader.integer("n_routed_experts"),
        n_shared_experts=reader.integer("n_shared_experts"),
        num_experts_per_tok=reader.integer("num_experts_per_tok"),
        n_group=reader.integer("n_group", default=1),
        topk_group=reader.integer("topk_group", default=1),
        norm_topk_prob=reader.boolean("norm_topk_prob", default=True),
        routed_scaling_factor=reader.number("routed_scaling_factor"),
        mlp_types=_mlp_types(reader, num_layers),
        index_num_heads=reader.integer("index_n_heads"),
        index_head_dim=reader.integer("index_head_dim"),
        index_topk=reader.integer("index_topk"),
        indexer_types=_indexer_types(reader, num_layers, architecture),
        indexer_rope_interleave=reader.boolean(
            "indexer_rope_interleave", default=architecture == "GlmMoeDsaForCausalLM"
        ),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        rms_norm_eps=reader.number("rms_norm_eps"),
        rope=_rope(reader),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=False),
        bos_token_id=_bos_token_id(reader, vocab_size),
        eos_token_ids=_eos_token_ids(reader, generation, vocab_size),
        fp8_block=_fp8_block(reader),
    )
    _check_relations(reader, config)
    return config


def _refuse_unsupported(reader: ConfigReader) -> None:
    """Faults for switches whose other values would change the result silently."""
    reader.only("hidden_act", "silu")
    reader.only("attention_bias", False)
    reader.only("mlp_bias", False)
    reader.only("scoring_func", "sigmoid")
    reader.only("topk_method", "noaux_tc")
    reader.only("moe_layer_freq", 1)
    reader.only("rope_interleave", True)


def _mlp_types(reader: ConfigReader, num_layers: int) -> tuple[str, ...]:
    listed = reader.choices("mlp_layer_types", {"dense": "dense", "sparse": "sparse"}, num_layers)
    if listed is not None:
        return listed
    num_dense = min(reader.integer("first_k_dense_replace", minimum=0), num_layers)
    return ("dense",) * num_dense + ("sparse",) * (num_layers - num_dense)


def _indexer_types(
    reader: ConfigReader, num_layers: int, architecture: Architecture
) -> tuple[str, ...]:
    """`indexer_types`, else `index_topk_pattern`, else frequency and offset (GLM-5.2: 4 and 3).

    transformers 5.23, GlmMoeDsaConfig; DeepSeek-V3.2 has an indexer on every layer there.
    """
    words = {"full": "full", "shared": "shared"}
    types = reader.choices("indexer_types", words, num_layers)
    if types is None:
        letters = {"F": "full", "S": "shared", **words}
        types = reader.choices("index_topk_pattern", letters, num_layers)
    if types is None:
        freq = max(reader.integer("index_topk_freq", default=1, minimum=0), 1)
        offset = reader.integer("index_skip_topk_offset", default=2, minimum=0)
        types = tuple(
            "full" if max(layer - offset + 1, 0) % freq == 0 else "shared"
            for layer in range(num_layers)
        )
    if types[0] != "full":
        reader.fault("the first layer must have an indexer of its own (indexer_types)")
    if architecture == "DeepseekV32ForCausalLM" and "shared" in types:
        reader.fault("DeepseekV32ForCausalLM has no layers that share an indexer")
    return types


def _rope(reader: ConfigReader) -> RopeConfig:
    """New field `rope_parameters`, or the old pair `rope_scaling` + `rope_theta`."""
    tree = reader.tree
    name = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
    rope = reader.child(name)
    theta = reader.number("rope_theta", default=10000.0)
    kind = rope.tree.get("rope_type", rope.tree.get("type", "default"))
    if kind not in ("default", "yarn"):
        reader.fault(f"{name}: rope type must be default or yarn, not {kind!r}")
        kind = "default"
    theta = rope.number("rope_theta", default=theta)
    if theta <= 1:
        reader.fault(f"rope_theta: must be above 1, not {theta}")
    if rope.tree.get("partial_rotary_factor", 1) != 1:
        reader.fault(f"{name}.partial_rotary_factor: must be 1")
    if kind == "default":
        return RopeConfig(theta=theta)
    limit = reader.integer("max_position_embeddings")
    original = rope.integer("original_max_position_embeddings", default=limit)
    has_attention_factor = rope.tree.get("attention_factor") is not None
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=rope.number("factor", default=limit / original),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        mscale=rope.number("mscale", default=0.0, minimum=0.0),
        mscale_all_dim=rope.number("mscale_all_dim", default=0.0, minimum=0.0),
        attention_factor=rope.number("attention_factor") if has_attention_factor else None,
        original_max_position_embeddings=original,
        truncate=rope.boolean("truncate", default=True),
    )


def _bos_token_id(reader: ConfigReader, vocab_size: int) -> int | None:
    if reader.tree.get("bos_token_id") is None:
        return None
    return reader.integer("bos_token_id", minimum=0, maximum=vocab_size - 1)


def _eos_token_ids(
    reader: ConfigReader, generation: dict[str, Any], vocab_size: int
) -> tuple[int, ...]:
    ids: set[int] = set()
    for name, tree in (("config.json", reader.tree), ("generation_config.json", generation)):
        value = tree.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if type(token_id) is int and 0 <= token_id < vocab_size:
                ids.add(token_id)
            elif token_id is not None:
                reader.fault(
                    f"{name}: eos_token_id must be below vocab_size ({vocab_size}), "
                    f"not {token_id!r}"
                )
    return tuple(sorted(ids))


def _fp8_block(reader: ConfigReader) -> tuple[int, int]:
    quantization = reader.child("quantization_config")
    method = quantization.tree.get("quant_method", "fp8")
    if method != "fp8":
        reader.fault(f"quantization_config.quant_method: only fp8 is supported, not {method!r}")
    block = quantization.tree.get("weight_block_size") or [128, 128]
    if (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    ):
        return block[0], block[1]
    reader.fault(f"quantization_config.weight_block_size: must be two sizes, not {block!r}")
    return 128, 128


def _check_relations(reader: ConfigReader, config: ModelConfig) -> None:
    """Faults that no single field shows."""
    if config.qk_rope_head_dim % 2:
        reader.fault(f"qk_rope_head_dim: must be even, not {config.qk_rope_head_dim}")
    if config.index_head_dim < config.qk_rope_head_dim:
        reader.fault(
            f"index_head_dim ({config.index_head_dim}) must be at least qk_rope_head_dim "
            f"({config.qk_rope_head_dim})"
        )
    if "sparse" not in config.mlp_types:
        return
    num_experts = config.num_layers * config.n_routed_experts
    if num_experts > _MAX_EXPERTS:
        reader.fault(f"num_hidden_layers times n_routed_experts ({num_experts}) is absurd")
    if config.n_routed_experts % config.n_group:
        reader.fault(
            f"n_routed_experts ({config.n_routed_experts}) must be a multiple of n_group "
            f"({config.n_group})"
        )
    group_size = config.n_routed_experts // config.n_group
    if config.n_group > 1 and group_size < 2:
        reader.fault(f"n_group ({config.n_group}) leaves fewer than 2 experts a group")
    if config.topk_group > config.n_group:
        reader.fault(f"topk_group ({config.topk_group}) is above n_group ({config.n_group})")
    eligible = min(config.topk_group, config.n_group) * group_size
    if config.num_experts_per_tok > eligible:
        reader.fault(
            f"num_experts_per_tok ({config.num_experts_per_tok}) is above the {eligible} experts "
            f"of topk_group ({config.topk_group}) groups"
        )
