"""What the model launches on a GPU, against the references: sampling, experts, block-scaled FP8.

Whatever a decode step launches is captured into a CUDA graph and replayed on other inputs here: a
launch that asked the host, or that remembered a value of its first run, fails or answers wrongly.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
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


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Runs once, then captures."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


# Sampling


def sampling_rows(kind: SamplingKind, batch: int, vocab: int, seed: int) -> list[SamplingRow]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row, draw in enumerate(torch.rand(batch, 4, generator=generator).tolist()):
        is_sampled = kind != "greedy" and row % 3
        fields: dict[str, float | int] = {"temperature": 0.2 + 2 * draw[0] if is_sampled else 0.0}
        if kind == "filtered":
            fields |= {
                "top_k": int(100 * draw[1]),
                "top_p": 0.3 + 0.7 * draw[2] if row % 2 else 1.0,
                "min_p": draw[3] / 10 if row % 5 == 0 else 0.0,
            }
        banned = (0, vocab - 1, row) if row % 4 == 1 else ()
        parameters = Sampling(max_tokens=9, seed=1 - row, **fields)  # type: ignore[arg-type]
        rows.append(SamplingRow(parameters, seed + row, banned))
    return rows


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
