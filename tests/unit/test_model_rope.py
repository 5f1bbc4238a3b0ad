"""Rotary embedding: in place, in both pairings, with transformers' YaRN frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny_models import YARN, tiny_config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32RotaryEmbedding

from tidepool.model.rope import Rope, RopeConfig, apply_rope_, attention_factor, softmax_scale

QUARTER = torch.tensor([[0.0, math.pi / 2]])


@pytest.mark.parametrize(
    ("interleaved", "expected"),
    [(True, [1.0, 2.0, -4.0, 3.0]), (False, [1.0, -4.0, 3.0, 2.0])],
)
def test_pairs_are_adjacent_or_half_a_width_apart(interleaved, expected):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    apply_rope_(x, QUARTER.cos(), QUARTER.sin(), interleaved=interleaved)
    torch.testing.assert_close(x, torch.tensor([expected]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False])
def test_a_slice_is_rotated_where_it_lies_and_the_rest_stays(dtype, interleaved):
    whole = torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = whole.clone()
    angle = torch.rand(3, 2)
    rotated = apply_rope_(whole[..., 6:], angle.cos(), angle.sin(), interleaved=interleaved)
    assert rotated.data_ptr() == whole[..., 6:].data_ptr()
    assert torch.equal(whole[..., :6], before[..., :6])
    assert not torch.equal(whole[..., 6:], before[..., 6:])
    norms = [t[..., 6:].float().norm(dim=-1) for t in (whole, before)]
    torch.testing.assert_close(*norms, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("changes", [{}, {"mscale": 0.7}, {"mscale_all_dim": 0}, {"factor": 4}])
def test_angles_equal_those_of_transformers(changes):
    fields = {**YARN, **changes}
    reference = DeepseekV32RotaryEmbedding(tiny_config("v32", rope_parameters=dict(fields)))
    fields = {key: value for key, value in fields.items() if not key.startswith("rope_")}
    rope = Rope(RopeConfig(kind="yarn", **fields), 16, torch.device("cpu"))
    positions = torch.tensor([0, 1, 77, 4095])
    cos, sin = rope.angles(positions)
    expected_cos, expected_sin = reference(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos, expected_cos[0, :, :8], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin, expected_sin[0, :, :8], atol=1e-6, rtol=0)


def test_v32_scales_are_the_published_ones():
    rope = RopeConfig(kind="yarn", factor=40, mscale=1, mscale_all_dim=1)
    assert attention_factor(rope) == 1.0
    assert softmax_scale(rope, 192) == pytest.approx(0.135234, abs=1e-6)
    assert softmax_scale(RopeConfig(theta=1e6), 256) == 0.0625


def test_an_explicit_attention_factor_wins():
    assert attention_factor(RopeConfig(kind="yarn", factor=40, attention_factor=1.25)) == 1.25
    only_factor = RopeConfig(kind="yarn", factor=40)
    assert attention_factor(only_factor) == pytest.approx(0.1 * math.log(40) + 1)
