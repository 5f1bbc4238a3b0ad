"""What the tests of the model's launches on a GPU share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tidepool.common.wire import Sampling
from tidepool.model.sampling import SamplingKind, SamplingRow


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Runs once, then captures."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def relative_error(have: Tensor, want: Tensor) -> float:
    have, want = have.cpu().double(), want.cpu().double()
    return float((have - want).norm() / want.norm().clamp(min=1e-30))


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
