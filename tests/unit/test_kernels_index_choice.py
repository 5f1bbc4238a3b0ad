"""Queries rounded to FP8 as the published inference does, and what a node may choose."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from tidepool.common.config import parse
from tidepool.common.errors import ConfigError
from tidepool.kernels import deepgemm, index_choice
from tidepool.kernels.index_logits import index_logits, index_logits_chunk
from tidepool.kernels.index_scores import IndexScores
from tidepool.kernels.store_index_keys import store_index_keys
from tidepool.model.runtime import load_runtime

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    index_choice.use("auto", "auto", CPU)


def pages_of(layout: str) -> torch.Tensor:
    page_bytes = 4 * (132 if layout == "index_k" else 512)
    pages = torch.zeros(5, page_bytes, dtype=torch.uint8)
    store_index_keys(torch.randn(20, 128), torch.arange(20), pages, 4, layout)
    return pages


def scores(query: torch.Tensor, layout: str, rounds: bool | None) -> torch.Tensor:
    found = torch.empty(len(query), 20)
    tables = torch.arange(5, dtype=torch.int32).expand(len(query), -1).contiguous()
    lengths = torch.full((len(query),), 20)
    weight = torch.linspace(-1, 1, 3).expand(len(query), -1).contiguous()
    pages = PAGES[layout]
    index_logits(query, weight, pages, tables, lengths, found, 4, layout, rounds_queries=rounds)
    return found


torch.manual_seed(1)
PAGES = {layout: pages_of(layout) for layout in ("index_k", "index_fp32")}


def rounded_by_hand(query: torch.Tensor) -> torch.Tensor:
    """e4m3 of the head over 2**ceil(log2(amax / 448)), and back."""
    amax = query.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    return (query / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("size", [1.0, 448.0, 1e-7, 3e4])
def test_rounded_queries_score_as_their_e4m3_values(size: float) -> None:
    query = (torch.randn(2, 3, 128) * size).bfloat16()
    query[0, 0] = 0
    query[1, 1, 5] = 448 * size
    by_hand = scores(rounded_by_hand(query.float()), "index_k", False)
    assert torch.equal(scores(query, "index_k", True), by_hand)
    exact = scores(query, "index_k", False)
    assert not torch.equal(exact, by_hand)
    assert torch.equal(scores(query, "index_k", None), exact)


def test_keys_in_float32_keep_their_queries_whatever_is_asked_or_chosen() -> None:
    query = torch.randn(2, 3, 128)
    exact = scores(query, "index_fp32", False)
    index_choice.use("auto", "fp8", CPU)
    assert torch.equal(scores(query, "index_fp32", None), exact)
    assert torch.equal(scores(query, "index_fp32", True), exact)


def test_a_node_that_chose_fp8_rounds_in_decode_and_prefill_alike() -> None:
    query = torch.randn(6, 3, 128)
    wanted = scores(query, "index_k", True)
    index_choice.use("auto", "fp8", CPU)
    assert torch.equal(scores(query, "index_k", None), wanted)
    weight = torch.linspace(-1, 1, 3).expand(6, -1).contiguous()
    table = torch.arange(5, dtype=torch.int32)
    chunk = torch.empty(6, 20)
    index_logits_chunk(query, weight, PAGES["index_k"], table, 14, chunk, 4, "index_k")
    for token in range(6):
        seen = 15 + token
        assert torch.allclose(chunk[token, :seen], wanted[token, :seen], atol=1e-5)
        assert (chunk[token, seen:] == float("-inf")).all()


def test_a_step_scores_into_its_own_buffer() -> None:
    query = torch.randn(2, 3, 128)
    buffer = torch.empty(2, 20)
    step = IndexScores(torch.tensor([20, 7]), buffer, 4, "index_k")
    weight = torch.linspace(-1, 1, 3).expand(2, -1).contiguous()
    tables = torch.arange(5, dtype=torch.int32).expand(2, -1).contiguous()
    assert step(query, weight, PAGES["index_k"], tables) is buffer
    wanted = scores(query, "index_k", False)
    assert torch.allclose(buffer[0], wanted[0]) and torch.allclose(buffer[1, :7], wanted[1, :7])
    assert (buffer[1, 7:] == float("-inf")).all()


@pytest.mark.parametrize("backend", ["cuda", "triton", "deepgemm"])
def test_a_gpu_kernel_on_a_cpu_node_is_refused_by_name(backend: str) -> None:
    model = {"path": "/nowhere", "device": "cpu"}
    config = parse({"model": model, "kernels": {"index_logits": backend}})
    with pytest.raises(ConfigError, match=rf"kernels\.index_logits: '{backend}'.*needs a GPU"):
        load_runtime(config)


def test_the_faster_kernel_by_the_table_scores_rounded_queries() -> None:
    measured = json.loads(index_choice.TABLE.read_text())
    assert all(measured[key] for key in ("machine", "commit", "command", "versions", "date"))
    assert not any(index_choice.wants_deepgemm(int(batch)) for batch in measured["us"])
    index_choice.use("auto", "fp8", CPU)
    for batch, times in measured["us"].items():
        is_faster = times["deepgemm"] == min(times.values())
        assert index_choice.wants_deepgemm(int(batch)) == is_faster
    assert index_choice.wants_deepgemm(500) and not index_choice.wants_deepgemm(0)


def test_deepgemm_with_queries_that_are_not_rounded_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes FP8 queries"):
        index_choice.use("deepgemm", "bf16", CPU)


def test_without_the_wheel_deepgemm_says_so_and_takes_nothing() -> None:
    if torch.cuda.is_available():
        pytest.skip("for hosts without a GPU")
    assert "deep_gemm is not installed" in deepgemm.missing()
    assert not deepgemm.can_take(torch.zeros(1, 64, 128), torch.zeros(1, 8448), 64, "index_k")
