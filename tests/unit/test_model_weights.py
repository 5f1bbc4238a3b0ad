"""Loading: shards, FP8 blocks, prediction layers, and one error that lists what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.dense_context import DenseContext, run
from helpers.tiny_models import (
    build,
    prompt,
    reference_model,
    save,
    session_checkpoint,
    tiny_config,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from tidepool.common.errors import CheckpointError
from tidepool.kernels.block_fp8 import dequantize_blocks
from tidepool.model.config import ModelConfig
from tidepool.model.layers import BlockFp8
from tidepool.model.model import Model
from tidepool.model.weights import Checkpoint, Weights

IDS = prompt(0, 24)
BLOCK = 16


@pytest.fixture
def folder(tmp_path_factory, tmp_path) -> Path:
    """A copy of the tiny GLM-5.2 checkpoint that a test may spoil."""
    source = session_checkpoint(tmp_path_factory, "glm52")
    return Path(shutil.copytree(source, tmp_path / "checkpoint"))


def load(path: Path) -> Model:
    return Model.load(path, dtype=torch.float32, device="cpu", strict_norm_eps=True)


def logits(path: Path) -> Tensor:
    model = load(path)
    return run(model, IDS, DenseContext(model.config))


def rewrite(path: Path, change: dict[str, Tensor | None]) -> None:
    """Replaces, adds (tensor) or removes (None) tensors of the single file."""
    file = path / "model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def set_config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return str(caught.value)


def shard(path: Path, num_files: int = 3) -> dict[str, str]:
    """Splits the single file the way the hub does; returns the weight map."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    weight_map = {name: names[i % num_files] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def test_shards_with_an_index_hold_the_same_model(folder):
    expected = logits(folder)
    shard(folder)
    assert torch.equal(logits(folder), expected)


def test_prediction_layers_behind_the_last_one_are_skipped(folder):
    expected = logits(folder)
    rewrite(
        folder,
        {
            "model.layers.4.eh_proj.weight": torch.zeros(64, 128),
            "model.layers.4.shared_head.norm.weight": torch.ones(64),
            "model.layers.4.self_attn.q_a_proj.weight": torch.zeros(1, 1),
        },
    )
    assert torch.equal(logits(folder), expected)


def quantize(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Block-scaled FP8 by loops, so that the reader is not tested with itself."""
    rows, columns = weight.shape
    scale = torch.zeros(-(-rows // block), -(-columns // block))
    out = torch.zeros_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight[at].abs().max() / 448
            out[at] = weight[at] / scale[i, j]
    return out.to(torch.float8_e4m3fn), scale


def dequantize_by_loops(weight: Tensor, scale: Tensor) -> Tensor:
    out = weight.float()
    for i in range(out.shape[0]):
        for j in range(0, out.shape[1], BLOCK):
            out[i, j : j + BLOCK] *= scale[i // BLOCK, j // BLOCK]
    return out


def names_to_quantise(tensors: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in tensors
        if (name.endswith("_proj.weight") and "weights_proj" not in name) or "wq_b" in name
    ]


def test_fp8_blocks_are_multiplied_by_their_scales(folder):
    """V3.2's list of quantised weights; the ragged last block is in kv_b (176 x 32) and q_b."""
    tensors = load_file(folder / "model.safetensors")
    quantised = names_to_quantise(tensors)
    changes, plain = {}, {}
    for name in quantised:
        weight, scale = quantize(tensors[name])
        changes |= {name: weight, f"{name}_scale_inv": scale}
        plain[name] = dequantize_by_loops(weight, scale)
    same = Path(shutil.copytree(folder, folder.parent / "plain"))
    rewrite(same, plain)
    rewrite(folder, changes)
    block = [BLOCK, BLOCK]
    set_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    config = ModelConfig.from_dir(folder)
    with Checkpoint(folder) as checkpoint:
        weights = Weights(checkpoint, config, torch.float32, torch.device("cpu"))
        for name in quantised:
            assert torch.equal(weights.get(name), plain[name]), name
    assert torch.equal(logits(folder), logits(same))


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory) -> Path:
    """A tiny GLM-5 with blocks of 128: whole ones in the experts, ragged ones elsewhere."""
    config = tiny_config("glm5", hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2)
    folder = save(build(config, 3), tmp_path_factory.mktemp("fp8"))
    tensors = load_file(folder / "model.safetensors")
    changes = {}
    for name in names_to_quantise(tensors):
        weight, scale = quantize(tensors[name], 128)
        changes |= {name: weight, f"{name}_scale_inv": scale}
    rewrite(folder, changes)
    set_config(folder, quantization_config={"quant_method": "fp8"})
    return folder


def load_fp8(path: Path) -> Model:
    return Model.load(path, dtype=torch.float32, device="cpu", fp8_weights=True)


def test_fp8_weights_that_are_kept_give_the_same_logits_as_dequantised_ones(fp8_folder):
    kept = load_fp8(fp8_folder)
    plain = Model.load(fp8_folder, dtype=torch.float32, device="cpu")
    found = [run(model, IDS, DenseContext(model.config)) for model in (kept, plain)]
    torch.testing.assert_close(*found)


def test_fp8_weights_that_are_kept_have_the_size_of_the_file(fp8_folder):
    """But for what attention absorbs, and what ragged blocks keep from standing side by side."""
    model = load_fp8(fp8_folder)
    tensors = load_file(fp8_folder / "model.safetensors")
    mixture = model.layers[1].mlp
    prefix = "model.layers.1.mlp.experts"
    for expert in range(model.config.n_routed_experts):
        for rows, name in ((slice(0, 128), "gate_proj"), (slice(128, 256), "up_proj")):
            stored = tensors[f"{prefix}.{expert}.{name}.weight"]
            assert torch.equal(mixture.gate_up_EFM[expert, rows].float(), stored.float())
        down = tensors[f"{prefix}.{expert}.down_proj.weight_scale_inv"]
        assert torch.equal(mixture.down_scale_EPQ[expert], down)
    assert mixture.down_EMF.dtype == torch.float8_e4m3fn
    assert isinstance(mixture.shared.gate_up_FM, BlockFp8)
    attention = model.layers[0].attention
    for matrix in (attention.q_b, attention.out):
        assert isinstance(matrix, BlockFp8)
    assert attention.up_key_HNC.dtype == torch.float32
    ragged = model.layers[0].mlp.gate_up_FM
    assert isinstance(ragged, Tensor)
    assert ragged.dtype == torch.float32


def test_other_block_sizes_are_dequantised_though_fp8_is_to_be_kept(fp8_folder, tmp_path):
    folder = Path(shutil.copytree(fp8_folder, tmp_path / "other"))
    changes = {}
    for name, scale in load_file(folder / "model.safetensors").items():
        if name.endswith("_scale_inv"):
            changes[name] = scale.repeat_interleave(2, 0)[: 2 * scale.shape[0]]
    tensors = load_file(folder / "model.safetensors")
    for name in list(changes):
        rows = tensors[name.removesuffix("_scale_inv")].shape[0]
        changes[name] = changes[name][: -(-rows // 64)].contiguous()
    rewrite(folder, changes)
    block = {"quant_method": "fp8", "weight_block_size": [64, 128]}
    set_config(folder, quantization_config=block)
    model = load_fp8(folder)
    assert isinstance(model.layers[0].attention.q_b, Tensor)
    assert model.layers[1].mlp.gate_up_scale_EPQ is None


def test_fp8_scales_that_are_powers_of_two_may_have_a_dtype_of_their_own():
    weight = torch.full((3, 5), 2.0).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 0.5, 4.0], [2.0, 8.0, 1.0]]).to(torch.float8_e8m0fnu)
    expected = torch.tensor([[2.0, 2, 1, 1, 8], [2, 2, 1, 1, 8], [4, 4, 16, 16, 2]])
    assert torch.equal(dequantize_blocks(weight, scale, (2, 2)), expected)


def test_half_precision_files_load_as_float32(folder):
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    rounded = Path(shutil.copytree(folder, folder.parent / "rounded"))
    rewrite(rounded, {name: tensor.bfloat16().float() for name, tensor in tensors.items()})
    assert torch.equal(logits(folder), logits(rounded))


def test_missing_extra_and_mis_shaped_tensors_are_listed_together(folder):
    rewrite(
        folder,
        {
            "model.norm.weight": None,
            "model.layers.0.self_attn.o_proj.weight": torch.zeros(64, 79),
            "model.layers.1.self_attn.indexer.wk.weight": torch.zeros(32, 64),
            "model.layers.2.mlp.gate.weight": torch.zeros(8, 64, dtype=torch.int8),
        },
    )
    text = message(folder)
    assert "missing tensors (1): model.norm.weight" in text
    assert "extra tensors (1): model.layers.1.self_attn.indexer.wk.weight" in text
    assert "unusable tensors (2)" in text
    assert "o_proj.weight is [64, 79], must be [64, 80]" in text
    assert "gate.weight has dtype I8" in text


def test_long_lists_are_cut_and_counted(folder):
    rewrite(
        folder, {name: None for name in load_file(folder / "model.safetensors") if "mlp" in name}
    )
    text = message(folder)
    assert "and 82 more" in text
    assert len(text) < 1500


def test_fp8_without_its_scale_is_listed(folder):
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = torch.zeros(64, 80).to(torch.float8_e4m3fn)
    rewrite(folder, {name: weight})
    assert f"{name} is FP8 and has no {name}_scale_inv" in message(folder)
    rewrite(folder, {f"{name}_scale_inv": torch.ones(2, 2)})
    assert f"{name}_scale_inv is [2, 2], must be [1, 1]" in message(folder)
    rewrite(folder, {name: torch.zeros(64, 80)})
    assert f"extra tensors (1): {name}_scale_inv" in message(folder)


@pytest.mark.parametrize("size", [0, 4, 100, 200_000])
def test_a_truncated_file_is_a_checkpoint_error(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors" in message(folder)


def test_a_header_that_lies_is_a_checkpoint_error(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    for spoiled in (b"\xff" * 8, (2**40).to_bytes(8, "little")):
        data[:8] = spoiled
        file.write_bytes(data)
        assert "cannot read" in message(folder)


def test_absent_shards_and_wrong_indexes_are_checkpoint_errors(folder):
    weight_map = shard(folder)
    index = folder / "model.safetensors.index.json"

    def with_map(value: object) -> str:
        index.write_text(json.dumps({"weight_map": value}))
        return message(folder)

    assert "model-9" in with_map({**weight_map, "x": "model-9.safetensors"})
    assert "not the name of a file" in with_map({**weight_map, "x": "../model.safetensors"})
    assert "not the name of a file" in with_map({**weight_map, "x": 3})
    assert "weight_map must be" in with_map([])
    ghost = {**weight_map, "ghost": next(iter(weight_map.values()))}
    assert "the index names and no file holds (1): ghost" in with_map(ghost)
    index.write_text("{")
    assert "not JSON" in message(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    weight_map = shard(folder, 2)
    first, second = (folder / name for name in sorted(set(weight_map.values())))
    tensors = load_file(second)
    save_file({**tensors, "model.norm.weight": torch.ones(64)}, second)
    save_file({**load_file(first), "model.norm.weight": torch.ones(64)}, first)
    assert "held by two files (1): model.norm.weight" in message(folder)


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "no other weight format is ever opened" in message(folder)


def test_weights_equal_the_saved_model(folder):
    state = reference_model("glm52", 6).state_dict()
    model = load(folder)
    experts = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(model.layers[1].mlp.gate_up_EFM, experts)
    assert model.layers[1].mlp.router.bias_E.dtype == torch.float32
    assert model.layers[1].attention.indexer is None
    assert model.layers[2].attention.indexer.number == 1


def test_a_loaded_model_does_not_see_later_changes_of_the_file(folder):
    model = load(folder)
    before = run(model, IDS, DenseContext(model.config))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(100_000)
        file.write(b"\x3f" * 1_000_000)
    assert torch.equal(run(model, IDS, DenseContext(model.config)), before)
