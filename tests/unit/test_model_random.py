"""Random models for benchmarks: published shapes, finite logits, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from helpers.dense_context import DenseContext, run
from helpers.tiny_models import session_checkpoint

from tidepool.common.errors import CheckpointError
from tidepool.model.config import ModelConfig
from tidepool.model.model import Model
from tidepool.model.random_weights import PUBLISHED_MODELS, published_config
from tidepool.model.weight_shapes import expected_shapes

PARAMETERS = {"deepseek-v3.2": 671.88e9, "glm-5": 743.91e9, "glm-5.2": 743.38e9}
"""Counted by transformers on the meta device."""


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_published_shapes_have_the_published_number_of_parameters(name):
    shapes = expected_shapes(published_config(name)).values()
    total = sum(torch.Size(shape).numel() for shape in shapes)
    assert total == pytest.approx(PARAMETERS[name], rel=1e-4)


def test_depth_and_experts_can_be_cut():
    config = published_config("deepseek-v3.2", num_layers=4, num_dense_layers=1, num_experts=16)
    assert config.mlp_types == ("dense", "sparse", "sparse", "sparse")
    assert config.n_routed_experts == 16
    with pytest.raises(CheckpointError, match="n_routed_experts"):
        published_config("deepseek-v3.2", num_experts=12)
    shared = published_config("glm-5.2", num_layers=8)
    assert [i for i, kind in enumerate(shared.indexer_types) if kind == "full"] == [0, 1, 2, 6]
    alike = published_config("glm-5.2", num_layers=4, num_leading_indexers=1)
    assert alike.indexer_types == ("full", "shared", "shared", "shared")


@pytest.mark.parametrize("kind", ["v32", "glm52"])
def test_a_random_model_runs_and_its_seed_decides(tmp_path_factory, kind):
    config = ModelConfig.from_dir(session_checkpoint(tmp_path_factory, kind))

    def logits(seed: int) -> torch.Tensor:
        model = Model.random(config, dtype=torch.float32, device="cpu", seed=seed)
        return run(model, list(range(40)), DenseContext(config))

    first = logits(1)
    assert first.isfinite().all()
    assert first.std() > 0.1
    assert torch.equal(logits(1), first)
    assert not torch.equal(logits(2), first)
