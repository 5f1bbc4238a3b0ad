"""The unified engine on a GPU: the same tokens as on the CPU, resident and behind a hot buffer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import UnifiedHarness
from helpers.tiny_models import (
    INDEX_TOPK,
    KINDS,
    NUM_GREEDY,
    VETTED_SEEDS,
    Kind,
    prompt,
    session_checkpoint,
)

import tidepool
from tidepool.common.config import Config, resolve
from tidepool.common.wire import Sampling
from tidepool.deploy.demo.data import Prompt, make_prompt
from tidepool.deploy.local import LocalNode
from tidepool.model.runtime import Runtime, load_runtime

pytestmark = pytest.mark.gpu

CHECKPOINT = Path(tidepool.__file__).parent / "deploy" / "demo" / "checkpoint"
HOT_ROWS = 256
NUM_PROMPTS = 8
PROMPT_TOKENS = 2048
EXACT = {"model.dtype": "float32", "kv.layout": "mla_fp32", "kv.index_layout": "index_fp32"}
DEFAULT: dict[str, Any] = {}
FP8 = {"kv.layout": "mla_fp8"}


def demo_config(device: str, overrides: dict[str, Any]) -> Config:
    settings: dict[str, Any] = {
        "model.path": str(CHECKPOINT),
        "model.device": device,
        "decode.seats": 4,
        "decode.host_tokens": 32768,
        "decode.index_tokens": 32768,
        "prefill.pool_tokens": 16384,
    }
    return resolve(None, {**settings, **overrides}).config


@cache
def runtime_of(device: str, layouts: tuple[tuple[str, str], ...]) -> Runtime:
    return load_runtime(demo_config(device, dict(layouts)))


@cache
def prompts() -> tuple[Prompt, ...]:
    return tuple(
        make_prompt(PROMPT_TOKENS, 1_000_000 + number, form="chat" if number % 2 else "raw")
        for number in range(NUM_PROMPTS)
    )


@cache
def outputs(device: str, layouts: tuple[tuple[str, str], ...], hot_rows: int) -> list[list[int]]:
    """Output tokens of the demo prompts, decoded together."""
    config = demo_config(device, {**dict(layouts), "decode.hot_rows": hot_rows})
    node = LocalNode(config, runtime_of(device, layouts))
    for number, question in enumerate(prompts()):
        sampling = Sampling(max_tokens=12 + len(question.completion), temperature=0.0)
        node.submit(str(number), question.token_ids, sampling)
    node.run()
    node.check_invariants()
    stats = node.decode.stats()
    assert (stats["rows_swapped_in"] > 0) == (hot_rows > 0)
    node.decode.coordinator.host.close()
    assert all(finish.reason != "error" for finish in node.finishes.values()), node.finishes
    return [node.output(str(number)) for number in range(NUM_PROMPTS)]


def key_of(layouts: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(layouts.items()))


def share_right(answers: list[list[int]]) -> float:
    texts = [bytes(token for token in answer if token < 256) for answer in answers]
    right = [
        question.is_answered_by(text.decode("ascii", errors="replace"))
        for question, text in zip(prompts(), texts, strict=True)
    ]
    return sum(right) / len(right)


@pytest.mark.parametrize("hot_rows", [0, HOT_ROWS])
def test_the_demo_model_gives_the_same_tokens_as_on_the_cpu_in_float32(hot_rows: int) -> None:
    assert outputs("cuda", key_of(EXACT), hot_rows) == outputs("cpu", key_of(EXACT), hot_rows)


@pytest.mark.parametrize("layouts", [DEFAULT, FP8], ids=["default layouts", "FP8 rows"])
def test_swap_in_gives_the_same_tokens_as_resident_and_the_answers_are_right(
    layouts: dict[str, str],
) -> None:
    resident = outputs("cuda", key_of(layouts), 0)
    assert outputs("cuda", key_of(layouts), HOT_ROWS) == resident
    assert share_right(resident) == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hot_rows", [0, INDEX_TOPK])
def test_tiny_models_of_each_kind_give_the_same_tokens_as_on_the_cpu(
    kind: Kind, hot_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = VETTED_SEEDS[kind][0]
    path = session_checkpoint(tmp_path_factory, kind, seed)
    tokens = []
    for device in ("cuda", "cpu"):
        node = UnifiedHarness(
            path,
            **{"decode.hot_rows": hot_rows, "kv.page_size": 4, "model.device": device},
        )
        (answer,) = node.generate([prompt(seed)], max_tokens=NUM_GREEDY)
        tokens.append(answer)
        node.assert_empty()
        torch.cuda.synchronize()
        node.decode.coordinator.host.close()
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_graphs_and_late_results_change_no_token_however_requests_come_and_park(
    graphs: bool, overlap: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = VETTED_SEEDS["glm52"][0]
    path = session_checkpoint(tmp_path_factory, "glm52", seed)
    requests = [prompt(number, 90 - 17 * number) for number in range(5)]
    settings = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4, "model.device": "cuda"}
    node = UnifiedHarness(
        path,
        **settings,
        **{
            "decode.seats": 3,
            "decode.park_after_tokens": 3,
            "decode.cuda_graphs": graphs,
            "decode.overlap": overlap,
        },
    )
    sampled = {"max_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 7}
    for number, request in enumerate(requests):
        node.ask(f"r{number}", request, **(sampled if number % 2 else {"max_tokens": 24}))
        for _ in range(3):
            node.step()
    node.cancel("r3")
    node.ask("short", prompt(9, 30), max_tokens=3)  # deserves a seat before the others
    node.run()
    assert node.decode.stats()["parks"] > 0
    alone = UnifiedHarness(path, **{"kv.page_size": 4})
    for number, request in enumerate(requests):
        if number == 3:
            continue
        sampling = sampled if number % 2 else {"max_tokens": 24}
        assert node.output(f"r{number}") == alone.generate([request], **sampling)[0]
    node.assert_empty()
    torch.cuda.synchronize()
    node.decode.coordinator.host.close()
