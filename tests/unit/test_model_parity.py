"""The model computes what transformers computes: fp32 logits and greedy tokens, however it is cut."""

from __future__ import annotations

import pytest
import torch
from helpers.dense_context import DenseContext, greedy, run
from helpers.tiny_models import (
    INDEX_TOPK,
    KINDS,
    MIN_GAP,
    NUM_GREEDY,
    PROMPT_TOKENS,
    VETTED_SEEDS,
    Kind,
    build,
    greedy_reference,
    min_gap,
    prompt,
    reference_logits,
    reference_model,
    save,
    session_checkpoint,
    tiny_config,
)

from tidepool.model import indexer as indexer_module
from tidepool.model.model import Model
from tidepool.model.rope import apply_rope_

CASES = [(kind, seed) for kind in KINDS for seed in VETTED_SEEDS[kind]]
TOLERANCE = 1e-4


def load(tmp_path_factory: pytest.TempPathFactory, kind: Kind, seed: int) -> Model:
    path = session_checkpoint(tmp_path_factory, kind, seed)
    return Model.load(path, dtype=torch.float32, device="cpu", strict_norm_eps=True)


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_logits_equal_those_of_transformers_for_every_chunk_size(tmp_path_factory, kind, seed):
    model = load(tmp_path_factory, kind, seed)
    tokens, expected = greedy_reference(kind, seed)
    sequence = prompt(seed) + list(tokens)
    for chunk in (7, 64, None):
        logits = run(model, sequence, DenseContext(model.config), chunk=chunk)
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() < TOLERANCE, chunk


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_greedy_tokens_equal_those_of_transformers(tmp_path_factory, kind, seed):
    model = load(tmp_path_factory, kind, seed)
    expected, _ = greedy_reference(kind, seed)
    assert greedy(model, prompt(seed), NUM_GREEDY, chunk=64) == list(expected)


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_vetted_seeds_have_no_near_tie_at_the_edge_of_the_top_k(kind, seed):
    tokens, _ = greedy_reference(kind, seed)
    assert PROMPT_TOKENS >= 4 * INDEX_TOPK
    assert min_gap(reference_model(kind, seed), prompt(seed) + list(tokens)) >= MIN_GAP


def test_the_yarn_factor_of_cos_and_sin_scales_the_indexer_too(tmp_path, monkeypatch):
    rope = dict(tiny_config("v32").rope_parameters, mscale=0.707, mscale_all_dim=1.0)
    reference = build(tiny_config("v32", rope_parameters=rope), seed=2)
    ids = prompt(2)
    assert min_gap(reference, ids) >= MIN_GAP
    expected = reference_logits(reference, ids)
    model = Model.load(save(reference, tmp_path), dtype=torch.float32, device="cpu")
    assert model.rope.attention_factor == pytest.approx(0.92459, abs=1e-5)
    assert (run(model, ids, DenseContext(model.config)) - expected).abs().max() < TOLERANCE
    factor = model.rope.attention_factor
    monkeypatch.setattr(
        indexer_module,
        "apply_rope_",
        lambda x, cos, sin, *, interleaved: apply_rope_(
            x, cos / factor, sin / factor, interleaved=interleaved
        ),
    )
    assert (run(model, ids, DenseContext(model.config)) - expected).abs().max() > 1e-3


def test_latent_norms_use_1e_6_only_when_told_to(tmp_path):
    reference = build(tiny_config("glm5", rms_norm_eps=1e-2), seed=7)
    ids = prompt(7)
    assert min_gap(reference, ids) >= MIN_GAP
    expected = reference_logits(reference, ids)
    path = save(reference, tmp_path)
    for strict, differs in ((True, False), (False, True)):
        model = Model.load(path, dtype=torch.float32, device="cpu", strict_norm_eps=strict)
        difference = (run(model, ids, DenseContext(model.config)) - expected).abs().max()
        assert difference > 1e-3 if differs else difference < TOLERANCE


def test_tied_embeddings_serve_as_the_head(tmp_path):
    reference = build(tiny_config("glm5", tie_word_embeddings=True), seed=10)
    ids = prompt(10, 12)
    model = Model.load(
        save(reference, tmp_path), dtype=torch.float32, device="cpu", strict_norm_eps=True
    )
    logits = run(model, ids, DenseContext(model.config))
    assert (logits - reference_logits(reference, ids)).abs().max() < TOLERANCE


def test_bfloat16_weights_give_finite_float32_logits(tmp_path_factory):
    path = session_checkpoint(tmp_path_factory, "glm52")
    model = Model.load(path, dtype=torch.bfloat16, device="cpu")
    ids = prompt(0, 40)
    logits = run(model, ids, DenseContext(model.config), chunk=16)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
