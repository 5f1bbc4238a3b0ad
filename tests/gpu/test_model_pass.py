"""A whole pass of the model on a GPU: captured, without synchronisation, near the CPU, in FP8."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from helpers.gpu import capture, relative_error, sampling_rows
from torch import Tensor

from tidepool.kernels.block_fp8 import dequantize_blocks
from tidepool.model.config import ModelConfig
from tidepool.model.indexer import logits_head_gate
from tidepool.model.layers import BlockFp8
from tidepool.model.model import Model
from tidepool.model.moe import MixtureOfExperts
from tidepool.model.output import OutputBuffers
from tidepool.model.random_weights import published_config
from tidepool.model.sampling import SamplingBuffers, sample_into

pytestmark = pytest.mark.gpu


class EchoContext:
    """Attention that answers with the queries: what matters here is everything around it."""

    def store_kv(self, layer: int, latent_TC: Tensor, rope_key_TR: Tensor) -> None:
        self.rope_sum = rope_key_TR.sum(-1)

    def store_index_keys(self, index_layer: int, key_TD: Tensor) -> None:
        self.key_sum = key_TD.sum(-1)

    def select(self, index_layer: int, query_TID: Tensor, weight_TI: Tensor) -> None:
        self.query_sum = query_TID.sum((1, 2)) + weight_TI.sum(-1)

    def attend(self, layer: int, q_latent_THC: Tensor, q_rope_THR: Tensor, scale: float) -> Tensor:
        extra = self.rope_sum + self.key_sum + self.query_sum
        return q_latent_THC * (1 + 0.1 * torch.tanh(extra))[:, None, None].to(q_latent_THC.dtype)


def small_config(name: str) -> ModelConfig:
    return published_config(name, num_layers=3, num_dense_layers=1, num_experts=16)


@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5"])
@pytest.mark.parametrize("fp8_weights", [False, True])
def test_a_captured_step_answers_as_an_eager_one(name: str, fp8_weights: bool) -> None:
    config = small_config(name)
    model = Model.random(
        config,
        dtype=torch.bfloat16,
        device="cuda",
        fp8_weights=fp8_weights,
        compiled_gates=False,
    )
    batch = 6
    buffers = SamplingBuffers(batch, config.vocab_size, "cuda")
    ids = torch.zeros(batch, dtype=torch.int64, device="cuda")
    positions, tokens = torch.zeros_like(ids), torch.zeros_like(ids)
    logits: list[Tensor] = []

    def step() -> None:
        logits[:] = [model.logits(model.forward(ids, positions, EchoContext()))]
        sample_into(logits[0], buffers, "plain", tokens)

    with torch.inference_mode():
        graph = capture(step)
        held = logits[0]
        for seed in range(2):
            ids.copy_(torch.randint(0, config.vocab_size, (batch,)))
            positions.copy_(torch.randint(0, 100_000, (batch,)))
            buffers.fill(sampling_rows("plain", batch, config.vocab_size, seed))
            graph.replay()
            found = (held.clone(), tokens.clone())
            step()
            assert torch.equal(found[0], logits[0])
            assert torch.equal(found[1], tokens)
            assert held.std() > 0.1


def test_a_pass_never_waits_for_the_device() -> None:
    config = small_config("deepseek-v3.2")
    kind = {"dtype": torch.bfloat16, "device": "cuda", "compiled_gates": False}
    model = Model.random(config, fp8_weights=True, **kind)  # type: ignore[arg-type]
    buffers = SamplingBuffers(300, config.vocab_size, "cuda")
    output = OutputBuffers(300, config.vocab_size, "cuda")

    def run(batch: int) -> None:
        ids = torch.full((batch,), 7, device="cuda")
        logits = model.logits(model.forward(ids, ids, EchoContext()))
        rows = sampling_rows("filtered", batch, config.vocab_size, 1)
        kind = buffers.fill(rows)
        sample_into(logits, buffers, kind, output.token_B[:batch])
        output.write_logprobs(logits, output.token_B[:batch])
        output.start_read(batch, with_logprobs=True)

    for batch in (3, 300):
        run(batch)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in (3, 300):
            run(batch)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def dequantised(value: object) -> object:
    """The same weights in bfloat16."""
    if isinstance(value, BlockFp8):
        return dequantize_blocks(value.weight_OI, value.scale_PQ, (128, 128)).bfloat16()
    if isinstance(value, MixtureOfExperts):
        pairs = (
            (value.gate_up_EFM, value.gate_up_scale_EPQ),
            (value.down_EMF, value.down_scale_EPQ),
        )
        gate_up, down = (
            torch.stack(
                [dequantize_blocks(*e, (128, 128)).bfloat16() for e in zip(*pair, strict=True)]
            )
            for pair in pairs
        )
        shared, router = dequantised(value.shared), value.router
        return MixtureOfExperts(router, gate_up, down, shared)  # type: ignore[arg-type]
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: dequantised(getattr(value, f.name)) for f in fields(value)}
        return replace(value, **parts)
    return value


@pytest.mark.parametrize("batch", [5, 300])
def test_fp8_weights_give_nearly_the_logits_of_their_dequantised_copy(batch: int) -> None:
    """Within a quarter of the logits' norm over three layers of random weights.

    That is what FP8 activations cost where nothing is trained: 15 % by emulation on a CPU with
    narrower layers, experts chosen differently included. Each product alone is held to 4 % above.
    """
    config = small_config("glm-5")
    kind = {"dtype": torch.bfloat16, "device": "cuda", "compiled_gates": False}
    model = Model.random(config, fp8_weights=True, **kind)  # type: ignore[arg-type]
    ids = torch.randint(0, config.vocab_size, (batch,), device="cuda")
    have = model.logits(model.forward(ids, ids, EchoContext()))
    model.layers = tuple(dequantised(layer) for layer in model.layers)  # type: ignore[misc]
    want = model.logits(model.forward(ids, ids, EchoContext()))
    error = relative_error(have, want)
    assert 0 < error < 0.25


def test_compiled_head_gates_of_bfloat16_weights_are_float32() -> None:
    x, weight = torch.randn(70, 512).bfloat16(), torch.randn(32, 512).bfloat16()
    want = x.double() @ weight.double().t() * 32**-0.5 * 0.125
    for tokens in (70, 1, 2):
        with torch.inference_mode():
            for compiled in (False, True):
                gate = logits_head_gate(compiled=compiled)
                have = gate(x[:tokens].cuda(), weight.cuda(), 0.125)
                assert have.dtype == torch.float32
                assert relative_error(have, want[:tokens]) < 1e-6


def test_float32_on_the_gpu_is_the_cpu_to_rounding() -> None:
    config = published_config("deepseek-v3.2", num_layers=2, num_dense_layers=1, num_experts=16)
    config = replace(config, vocab_size=500, hidden_size=256, intermediate_size=384)
    config = replace(config, num_attention_heads=4, moe_intermediate_size=96)
    source = Model.random(config, dtype=torch.float32, device="cpu", seed=3)
    found = []
    for device in ("cpu", "cuda"):
        model = moved(source, device)
        ids = torch.arange(40, device=device)
        hidden = model.forward(ids, 1000 * ids, EchoContext())
        found.append(model.logits(hidden).cpu())
    assert relative_error(found[1], found[0]) < 1e-5


def moved(model: Model, device: str) -> Model:
    """The same weights on another device."""

    def move(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(device)
        if is_dataclass(value) and not isinstance(value, type) and value is not model.config:
            return replace(value, **{f.name: move(getattr(value, f.name)) for f in fields(value)})
        return value

    layers = tuple(move(layer) for layer in model.layers)
    parts = {name: move(getattr(model, f"_{name}")) for name in ("embed_VM", "norm_M", "head_VM")}
    return Model(model.config, layers=layers, **parts)  # type: ignore[arg-type]
