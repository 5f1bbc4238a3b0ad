"""Sampling and log-probabilities captured into CUDA graphs, against the references on the CPU.

Graphs are replayed on other inputs than they were captured with: a launch that asked the host, or
that remembered a value of its first run, fails or answers wrongly.
"""

from __future__ import annotations

import pytest
import torch
from helpers.gpu import capture, sampling_rows
from torch import Tensor

from tidepool.common.wire import Sampling
from tidepool.model.output import OutputBuffers
from tidepool.model.sampling import (
    SAMPLING_KINDS,
    SamplingBuffers,
    SamplingKind,
    SamplingRow,
    sample_into,
)

pytestmark = pytest.mark.gpu


def sampled_on_the_cpu(logits: Tensor, rows: list[SamplingRow], kind: SamplingKind) -> Tensor:
    buffers = SamplingBuffers(len(rows), logits.shape[1], "cpu", max_banned=8)
    buffers.fill(rows)
    tokens = torch.empty(len(rows), dtype=torch.int64)
    sample_into(logits, buffers, kind, tokens)
    return tokens


@pytest.mark.parametrize("kind", SAMPLING_KINDS)
@pytest.mark.parametrize(("batch", "vocab"), [(1, 129_280), (19, 129_280), (64, 4097), (200, 256)])
def test_captured_sampling_chooses_the_references_tokens(
    kind: SamplingKind, batch: int, vocab: int
) -> None:
    buffers = SamplingBuffers(batch, vocab, "cuda", max_banned=8)
    logits = torch.zeros(batch, vocab, device="cuda")
    tokens = torch.empty(batch, dtype=torch.int64, device="cuda")
    buffers.fill([], batch)
    graph = capture(lambda: sample_into(logits, buffers, kind, tokens))
    for seed in range(3):
        values = (torch.randn(batch, vocab) * 4).bfloat16().float()  # bfloat16: equal ones
        values[batch // 2, 7] = (float("nan"), float("-inf"), float("inf"))[seed]
        rows = sampling_rows(kind, batch, vocab, seed)
        logits.copy_(values)
        buffers.fill(rows)
        graph.replay()
        assert torch.equal(tokens.cpu(), sampled_on_the_cpu(values, rows, kind))


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(
    "fields",
    [{"top_p": 0.9}, {"top_k": 5000}, {"top_k": 3000, "top_p": 0.999}, {"min_p": 1e-3}],
    ids=str,
)
def test_filters_that_leave_thousands_of_tokens_are_exact(
    spread: float, fields: dict[str, float]
) -> None:
    batch, vocab = 3, 20_000
    values = (torch.randn(batch, vocab) * spread).bfloat16().float()
    rows = [
        SamplingRow(Sampling(max_tokens=9, seed=seed, **fields), seed, (5, 7, 9))  # type: ignore[arg-type]
        for seed in range(batch)
    ]
    buffers = SamplingBuffers(batch, vocab, "cuda", max_banned=8)
    tokens = torch.empty(batch, dtype=torch.int64, device="cuda")
    for position in range(3):
        moved_rows = [row._replace(position=position) for row in rows]
        sample_into(values.cuda(), buffers, buffers.fill(moved_rows), tokens)
        assert torch.equal(tokens.cpu(), sampled_on_the_cpu(values, moved_rows, "filtered"))


def test_captured_logprobs_are_the_references() -> None:
    batch, vocab = 5, 129_280
    top_ns = [20, 0, -1, 7, 1]
    values = (torch.randn(batch, vocab) * 4).bfloat16().float()
    tokens = torch.randint(0, vocab, (batch,))
    found = []
    for device in ("cpu", "cuda"):
        output = OutputBuffers(batch, vocab, device)
        output.token_B.copy_(tokens)
        logits = values.to(device)
        if device == "cuda":
            graph = capture(lambda: output.write_logprobs(logits, output.token_B))  # noqa: B023
            output.logprobs_BL.zero_()
            graph.replay()
        else:
            output.write_logprobs(logits, output.token_B)
        found.append(output.start_read(batch, with_logprobs=True).tokens(top_ns))
    for want, have in zip(*found, strict=True):
        assert want.token_id == have.token_id
        assert (want.logprob is None) == (have.logprob is None)
        if want.logprob is not None and have.logprob is not None:
            assert have.logprob.top_ids == want.logprob.top_ids
            assert have.logprob.logprob == pytest.approx(want.logprob.logprob, abs=1e-4)
            assert have.logprob.top_logprobs == pytest.approx(want.logprob.top_logprobs, abs=1e-4)
