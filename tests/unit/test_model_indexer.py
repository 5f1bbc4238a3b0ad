"""Head gates: their value, and the compiled path beside the eager one."""

from __future__ import annotations

import shutil

import pytest
import torch

from tidepool.model.indexer import (
    _get_logits_head_gate,
    _project_and_scale_head_gates,
    logits_head_gate,
)

GENERATOR = torch.Generator().manual_seed(0)
X_TM = torch.randn(5, 24, generator=GENERATOR)
WEIGHT_IM = torch.randn(4, 24, generator=GENERATOR)


def test_gates_hold_both_scales_and_nothing_else():
    expected = (X_TM.double() @ WEIGHT_IM.double().T) / 4**0.5
    torch.testing.assert_close(_project_and_scale_head_gates(X_TM, WEIGHT_IM), expected.float())
    gates = _get_logits_head_gate(X_TM, WEIGHT_IM, 128**-0.5)
    torch.testing.assert_close(gates, (expected / 128**0.5).float())


def test_gates_take_in_the_scales_of_quantised_queries():
    query_scale_TI = torch.rand(5, 4, generator=GENERATOR)
    scaled = _get_logits_head_gate(X_TM, WEIGHT_IM, 0.25, query_scale_TI)
    expected = _get_logits_head_gate(X_TM, WEIGHT_IM, 0.25) * query_scale_TI
    torch.testing.assert_close(scaled, expected)


def test_gates_of_bfloat16_activations_are_computed_in_float32():
    gates = _project_and_scale_head_gates(X_TM.bfloat16(), WEIGHT_IM)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates, X_TM.bfloat16().float() @ WEIGHT_IM.T / 2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_gates_equal_eager_ones_for_every_number_of_tokens():
    compiled = logits_head_gate(compiled=True)
    for num_tokens in (1, 2, 5):
        with torch.inference_mode():
            gates = compiled(X_TM[:num_tokens], WEIGHT_IM, 0.125)
        torch.testing.assert_close(
            gates, _get_logits_head_gate(X_TM[:num_tokens], WEIGHT_IM, 0.125)
        )


def test_eager_gates_are_the_plain_function():
    assert logits_head_gate(compiled=False) is _get_logits_head_gate
