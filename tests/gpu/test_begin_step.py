"""begin_step on CUDA writes what the reference writes, padded rows included."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tidepool.kernels.begin_step import begin_step

pytestmark = pytest.mark.gpu

G, S, H, PAGE_SIZE, PAGES = 5, 40, 256, 64, 1500
RING_ROWS = 2 * PAGE_SIZE
CONTEXT = PAGES * PAGE_SIZE


def example(seed: int, batch: int, batch_pages: int) -> list[Tensor]:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for seat in rng.sample(range(S), batch):
        position = rng.choice([rng.randrange(H + 3), rng.randrange(batch_pages * PAGE_SIZE)])
        is_padded = rng.random() < 0.2
        columns.append(
            (-1 if is_padded else seat, position, max(0, position - 70), rng.choice([-1, 9]), 12)
        )

    def table(*shape: int) -> Tensor:
        return torch.randint(-1, 999, shape, dtype=torch.int32, generator=generator)

    def rubbish(*shape: int) -> Tensor:
        return torch.full(shape, 77)

    return [
        torch.tensor(columns).t().contiguous(),
        torch.randint(-1, 99, (S + 1,), generator=generator),
        table(S, PAGES),
        table(S),
        table(1),
        table(G, S, H),
        table(G, S, CONTEXT),
        table(G, S, H),
        *(rubbish(batch) for _ in range(4)),
        rubbish(2, batch),
        rubbish(batch),
        torch.full((batch, batch_pages), 77, dtype=torch.int32),
    ]


@pytest.mark.parametrize(("batch", "batch_pages"), [(1, PAGES), (7, 3), (32, 1024), (33, 1025)])
@pytest.mark.parametrize("seed", range(4))
def test_every_table_is_as_the_reference_leaves_it(seed: int, batch: int, batch_pages: int) -> None:
    expected = example(seed, batch, batch_pages)
    actual = [tensor.cuda() for tensor in expected]
    begin_step(*expected, PAGE_SIZE, RING_ROWS)
    begin_step(*actual, PAGE_SIZE, RING_ROWS)
    for number, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(ours.cpu(), reference), f"argument {number}"
