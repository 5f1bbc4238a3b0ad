"""The router against hand-written numbers, and experts against one token at a time."""

from __future__ import annotations

import pytest
import torch

from tidepool.model.layers import GatedMlp
from tidepool.model.moe import MixtureOfExperts, Router


def router(scores: list[float], bias: list[float], **settings: object) -> Router:
    """A router whose sigmoid gives `scores` for the input 1."""
    fields = {"num_groups": 1, "top_groups": 1, "top_experts": 2, "norm_weights": True}
    fields |= {"scaling_factor": 2.5, **settings}
    return Router(torch.tensor(scores).logit()[:, None], torch.tensor(bias), **fields)


def route(chosen: Router) -> dict[int, float]:
    weight_TK, expert_TK = chosen(torch.ones(1, 1))
    return dict(zip(expert_TK[0].tolist(), weight_TK[0].tolist(), strict=True))


def test_the_bias_chooses_and_the_bare_score_weighs():
    weights = route(router([0.8, 0.6, 0.2, 0.1], [0.0, 0.0, 0.5, 0.0]))
    assert weights == pytest.approx({0: 2.5 * 0.8, 2: 2.5 * 0.2})


def test_a_group_counts_its_two_best_and_the_others_are_out():
    scores = [0.9, 0.1, 0.2, 0.1, 0.6, 0.5, 0.3, 0.2]
    weights = route(router(scores, [0.0] * 8, num_groups=4))
    assert set(weights) == {4, 5}
    assert set(route(router(scores, [0.0] * 8, num_groups=4, top_groups=2))) == {0, 4}


def test_weights_may_stay_unnormed():
    weights = route(router([0.8, 0.6, 0.2, 0.1], [0.0] * 4, norm_weights=False))
    assert weights == pytest.approx({0: 2.0, 1: 1.5})


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_a_batch_equals_one_token_at_a_time(num_tokens):
    generator = torch.Generator().manual_seed(3)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 4

    mixture = MixtureOfExperts(
        router=Router(weights(6, 8), weights(6), 3, 2, 2, True, 2.5),
        gate_up_EFM=weights(6, 10, 8),
        down_EMF=weights(6, 8, 5),
        shared=GatedMlp(weights(10, 8), weights(8, 5)),
    )
    x_TM = torch.randn(num_tokens, 8, generator=generator)
    weight_TK, expert_TK = mixture.router(x_TM)
    expected = mixture.shared(x_TM)
    for token in range(num_tokens):
        for weight, expert in zip(weight_TK[token], expert_TK[token], strict=True):
            mlp = GatedMlp(mixture.gate_up_EFM[expert], mixture.down_EMF[expert])
            expected[token] += weight * mlp(x_TM[token : token + 1])[0]
    torch.testing.assert_close(mixture(x_TM), expected)
