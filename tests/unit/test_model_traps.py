"""Each known way to get these models wrong changes the logits, so the parity tests can fail.

A trap is sprung by altering the loaded model (or one function of it); the result must differ from
the right one by more than 1e-3. Faults that cannot show in logits (a constant factor on the index
scores) are tested directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.dense_context import DenseContext, run
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, Kind, prompt, session_checkpoint

from tidepool.kernels import routed_experts
from tidepool.model import indexer as indexer_module
from tidepool.model import mla as mla_module
from tidepool.model.indexer import Indexer
from tidepool.model.layers import rms_norm
from tidepool.model.mla import LatentAttention
from tidepool.model.model import DecoderLayer, Model
from tidepool.model.moe import MixtureOfExperts, Router
from tidepool.model.rope import Rope, RopeConfig, apply_rope_

VISIBLE = 1e-3


@pytest.fixture
def load(tmp_path_factory) -> Callable[[Kind], Model]:
    def load_kind(kind: Kind) -> Model:
        path = session_checkpoint(tmp_path_factory, kind)
        return Model.load(path, dtype=torch.float32, device="cpu", strict_norm_eps=True)

    return load_kind


def logits(model: Model, kind: Kind, length: int | None = None) -> torch.Tensor:
    ids = prompt(VETTED_SEEDS[kind][0])[:length]
    return run(model, ids, DenseContext(model.config))


def alter_attention(model: Model, change: Callable[[LatentAttention], LatentAttention]) -> None:
    model.layers = tuple(
        replace(layer, attention=change(layer.attention)) for layer in model.layers
    )


def alter_indexers(model: Model, change: Callable[[Indexer], Indexer]) -> None:
    def in_attention(attention: LatentAttention) -> LatentAttention:
        indexer = attention.indexer
        return replace(attention, indexer=None if indexer is None else change(indexer))

    alter_attention(model, in_attention)


def alter_mixtures(model: Model, change: Callable[[MixtureOfExperts], MixtureOfExperts]) -> None:
    def in_layer(layer: DecoderLayer) -> DecoderLayer:
        is_mixture = isinstance(layer.mlp, MixtureOfExperts)
        return replace(layer, mlp=change(layer.mlp)) if is_mixture else layer

    model.layers = tuple(in_layer(layer) for layer in model.layers)


def flip_rope(indexer: Indexer) -> Indexer:
    return replace(indexer, is_interleaved=not indexer.is_interleaved)


def rope_last_values(indexer: Indexer) -> Indexer:
    """Rolling the width by D - R puts the last R values where rope is applied; dots stay equal."""
    shift, width = indexer.rope_dim, indexer.key_weight_DM.shape[0]
    query = indexer.query_weight.unflatten(0, (-1, width)).roll(shift, 1).flatten(0, 1)
    return replace(
        indexer,
        query_weight=query,
        key_weight_DM=indexer.key_weight_DM.roll(shift, 0),
        key_norm_weight_D=indexer.key_norm_weight_D.roll(shift, 0),
        key_norm_bias_D=indexer.key_norm_bias_D.roll(shift, 0),
    )


INDEXER_TRAPS: dict[str, Callable[[Indexer], Indexer]] = {
    "rope style": flip_rope,
    "rope on the last values": rope_last_values,
    "no LayerNorm bias": lambda i: replace(i, key_norm_bias_D=0 * i.key_norm_bias_D),
    "no LayerNorm weight": lambda i: replace(i, key_norm_weight_D=i.key_norm_weight_D * 0 + 1),
    "no head gates": lambda i: replace(i, gate_weight_IM=i.gate_weight_IM.mean(0).expand(32, -1)),
    "positive head gates": lambda i: replace(i, gate_weight_IM=i.gate_weight_IM.abs()),
}


@pytest.mark.parametrize("kind", ["v32", "glm5", "glm52"])
@pytest.mark.parametrize("trap", INDEXER_TRAPS)
def test_a_wrong_indexer_shows_in_the_logits(load, kind, trap):
    model = load(kind)
    right = logits(model, kind)
    alter_indexers(model, INDEXER_TRAPS[trap])
    assert (logits(model, kind) - right).abs().max() > VISIBLE


def test_a_prompt_within_the_top_k_cannot_see_the_indexer(load):
    model = load("v32")
    right = logits(model, "v32", INDEX_TOPK)
    alter_indexers(model, flip_rope)
    assert torch.equal(logits(model, "v32", INDEX_TOPK), right)


def test_rms_norm_in_place_of_the_key_layer_norm_shows_in_the_logits(load, monkeypatch):
    model = load("v32")
    right = logits(model, "v32")
    monkeypatch.setattr(
        indexer_module, "layer_norm", lambda x, weight, bias, eps: rms_norm(x, weight, eps) + bias
    )
    assert (logits(model, "v32") - right).abs().max() > VISIBLE


def test_half_split_rope_in_attention_shows_in_the_logits(load, monkeypatch):
    model = load("glm5")
    right = logits(model, "glm5")
    monkeypatch.setattr(
        mla_module,
        "apply_rope_",
        lambda x, cos, sin, *, interleaved: apply_rope_(x, cos, sin, interleaved=not interleaved),
    )
    assert (logits(model, "glm5") - right).abs().max() > VISIBLE


def test_leaving_yarn_mscale_out_of_the_softmax_scale_shows_in_the_logits(load):
    model = load("v32")
    right = logits(model, "v32")
    alter_attention(model, lambda a: replace(a, scale=model.config.qk_head_dim**-0.5))
    assert (logits(model, "v32") - right).abs().max() > VISIBLE


@pytest.mark.parametrize(
    "wrong",
    [
        RopeConfig(theta=10000.0),
        RopeConfig(kind="yarn", factor=32, original_max_position_embeddings=4096),
        RopeConfig(kind="yarn", factor=32, original_max_position_embeddings=128, truncate=False),
    ],
    ids=["no yarn", "original length", "truncation"],
)
def test_wrong_yarn_frequencies_show_in_the_logits(load, wrong):
    model = load("v32")
    right = logits(model, "v32")
    factor = model.rope.attention_factor
    model.rope = Rope(wrong, model.config.qk_rope_head_dim, model.device)
    model.rope.attention_factor = factor
    assert (logits(model, "v32") - right).abs().max() > VISIBLE


ROUTER_TRAPS: dict[str, Callable[[Router], Router]] = {
    "no groups": lambda r: replace(r, num_groups=1),
    "one group too few": lambda r: replace(r, top_groups=1),
    "no bias": lambda r: replace(r, bias_E=0 * r.bias_E),
    "weights not normed": lambda r: replace(r, norm_weights=False),
    "weights not scaled": lambda r: replace(r, scaling_factor=1.0),
}


@pytest.mark.parametrize("trap", ROUTER_TRAPS)
def test_a_wrong_router_shows_in_the_logits(load, trap):
    model = load("v32")
    right = logits(model, "v32")
    alter_mixtures(model, lambda m: replace(m, router=ROUTER_TRAPS[trap](m.router)))
    assert (logits(model, "v32") - right).abs().max() > VISIBLE


def test_biased_routing_weights_show_in_the_logits(load, monkeypatch):
    model = load("v32")
    right = logits(model, "v32")
    unbiased = Router.__call__

    def biased(router: Router, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _, experts = unbiased(router, x)
        choice = (x @ router.weight_EM.T).sigmoid() + router.bias_E
        weights = choice.gather(1, experts)
        return weights / weights.sum(-1, keepdim=True) * router.scaling_factor, experts

    monkeypatch.setattr(Router, "__call__", biased)
    assert (logits(model, "v32") - right).abs().max() > VISIBLE


def test_scoring_a_group_by_its_best_expert_alone_shows_in_the_logits(load, monkeypatch):
    model = load("v32")
    right = logits(model, "v32")

    def by_best(choice: torch.Tensor, num_groups: int, top_groups: int) -> torch.Tensor:
        groups = choice.unflatten(-1, (num_groups, -1))
        kept = groups.amax(-1).topk(top_groups, dim=-1).indices
        is_out = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, kept, False)
        return groups.masked_fill(is_out[..., None], float("-inf")).flatten(1)

    monkeypatch.setattr(routed_experts, "_keep_best_groups", by_best)
    assert (logits(model, "v32") - right).abs().max() > VISIBLE


def test_scaling_the_shared_expert_shows_in_the_logits(load):
    model = load("glm5")
    right = logits(model, "glm5")
    alter_mixtures(
        model, lambda m: replace(m, shared=replace(m.shared, down_MF=2.5 * m.shared.down_MF))
    )
    assert (logits(model, "glm5") - right).abs().max() > VISIBLE


def test_a_shared_layer_uses_the_selection_of_the_indexer_before_it(load):
    class FirstSelectionOnly(DenseContext):
        def select(self, index_layer, query_TID, weight_TI):
            if index_layer == 0:
                super().select(index_layer, query_TID, weight_TI)

    model = load("glm52")
    ids = prompt(VETTED_SEEDS["glm52"][0])
    context = DenseContext(model.config)
    right = run(model, ids, context)
    assert [number for number, _ in context.selections] == [0, 1]
    wrong = run(model, ids, FirstSelectionOnly(model.config))
    assert (wrong - right).abs().max() > VISIBLE


def test_among_equal_scores_the_lowest_positions_are_selected(load):
    model = load("v32")
    alter_indexers(model, lambda i: replace(i, gate_weight_IM=0 * i.gate_weight_IM))
    context = DenseContext(model.config)
    run(model, prompt(0, 40), context, chunk=13)
    for _, selected in context.selections:
        assert selected[-1, :INDEX_TOPK].all()
        assert not selected[:, INDEX_TOPK:].any()
