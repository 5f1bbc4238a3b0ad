"""Prefill and decode nodes on a GPU: KV crosses the wire through pinned mirrors, tokens stay equal."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from helpers.pd import pd_pair

from tidepool.common.config import Config
from tidepool.common.wire import Sampling
from tidepool.deploy.demo.data import make_prompt
from tidepool.deploy.demo.run import demo_config
from tidepool.deploy.local import LocalNode

pytestmark = pytest.mark.gpu

HAS_MOONCAKE = importlib.util.find_spec("mooncake") is not None
LENGTHS = (300, 1500, 3000)
MAX_TOKENS = 40


def configured(device: str, **overrides: Any) -> Config:
    return demo_config({"model.device": device, "model.dtype": "float32", **overrides})


@pytest.mark.parametrize(
    "protocol",
    [
        "loopback",
        pytest.param(
            "tcp", marks=pytest.mark.skipif(not HAS_MOONCAKE, reason="mooncake is not installed")
        ),
    ],
)
def test_tokens_over_the_wire_equal_the_cpus(protocol: str) -> None:
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    cpu = LocalNode(configured("cpu"))
    for number, prompt in enumerate(prompts):
        cpu.submit(
            str(number), prompt.token_ids, Sampling(MAX_TOKENS, temperature=0.0, ignore_eos=True)
        )
    cpu.run()
    with pd_pair(configured("cuda", **{"transfer.protocol": protocol})) as pair:
        answers = pair.generate(
            [prompt.token_ids for prompt in prompts], max_tokens=MAX_TOKENS, ignore_eos=True
        )
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            text = bytes(token for token in answer if token < 256).decode("ascii", "replace")
            assert prompt.is_answered_by(text)
            # Behind the answer the model talks on without margins; rounding may part the two.
            num_sure = len(prompt.completion) + 1
            assert answer[:num_sure] == cpu.output(str(number))[:num_sure]
        assert pair.stats()["rows_swapped_in"] > 0
        pair.assert_settles_empty()
