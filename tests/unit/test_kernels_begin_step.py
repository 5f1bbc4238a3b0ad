"""begin_step against a plain loop: what is fed, where rows go, what padded rows touch."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from tidepool.common.errors import KernelError
from tidepool.kernels.begin_step import begin_step

G, S, H, C, PAGE_SIZE = 2, 5, 8, 24, 4
PAGES, RING_ROWS = C // PAGE_SIZE, 2 * PAGE_SIZE


@dataclass
class Tensors:
    input_5B: Tensor
    next_token_S: Tensor
    index_table_SP: Tensor
    ring_start_S: Tensor
    step_1: Tensor
    position_of_slot_GSH: Tensor
    slot_of_position_GSC: Tensor
    last_use_GSH: Tensor
    token_ids_B: Tensor
    positions_B: Tensor
    lens_B: Tensor
    seats_B: Tensor
    store_rows_2B: Tensor
    index_slots_B: Tensor
    index_table_BP: Tensor

    def run(self) -> None:
        begin_step(*(getattr(self, field.name) for field in fields(self)), PAGE_SIZE, RING_ROWS)


def example(rows: list[tuple[int, int, int, int]], batch_pages: int = PAGES) -> Tensors:
    """Rows of (seat, position, ring start, token) in step 9; outputs hold rubbish."""
    batch = len(rows)
    columns = [list(column) for column in zip(*rows, strict=True)]

    def rubbish(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full(shape, 77, dtype=dtype)

    def table(*shape: int) -> Tensor:
        return torch.full(shape, -1, dtype=torch.int32)

    return Tensors(
        input_5B=torch.tensor([*columns, [9] * batch]),
        next_token_S=torch.arange(100, 100 + S),
        index_table_SP=torch.arange(S * PAGES, dtype=torch.int32).view(S, PAGES),
        ring_start_S=table(S),
        step_1=table(1),
        position_of_slot_GSH=table(G, S, H),
        slot_of_position_GSC=table(G, S, C),
        last_use_GSH=table(G, S, H),
        token_ids_B=rubbish(batch),
        positions_B=rubbish(batch),
        lens_B=rubbish(batch),
        seats_B=rubbish(batch),
        store_rows_2B=rubbish(2, batch),
        index_slots_B=rubbish(batch),
        index_table_BP=rubbish(batch, batch_pages, dtype=torch.int32),
    )


@pytest.mark.parametrize("seed", range(20))
def test_each_row_is_fed_stored_and_seen_where_a_plain_loop_says(seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for seat in rng.sample(range(S), 3):
        position = rng.randrange(C)
        token = rng.choice([-1, rng.randrange(50)])
        rows.append((seat, position, max(0, position - 3), token))
    tensors = example(rows)
    tensors.run()
    for b, (seat, position, ring_start, token) in enumerate(rows):
        base = seat * (H + RING_ROWS)
        assert tensors.token_ids_B[b] == (token if token >= 0 else 100 + seat)
        assert tensors.positions_B[b] == position
        assert tensors.lens_B[b] == position + 1
        assert tensors.seats_B[b] == seat
        assert tensors.store_rows_2B[0, b] == base + H + position % RING_ROWS
        page = seat * PAGES + position // PAGE_SIZE
        assert tensors.index_slots_B[b] == page * PAGE_SIZE + position % PAGE_SIZE
        assert torch.equal(tensors.index_table_BP[b], tensors.index_table_SP[seat])
        assert tensors.ring_start_S[seat] == ring_start
        is_whole = position < H
        assert tensors.store_rows_2B[1, b] == (base + position if is_whole else -1)
        for group in range(G):
            slots = tensors.position_of_slot_GSH[group, seat]
            assert slots.tolist() == [p if is_whole and p == position else -1 for p in range(H)]
            uses = tensors.last_use_GSH[group, seat]
            assert uses.tolist() == [9 if is_whole and p == position else -1 for p in range(H)]
            found = tensors.slot_of_position_GSC[group, seat, position]
            assert found == (position if is_whole else -1)
    assert tensors.step_1.tolist() == [9]


def test_padded_rows_touch_nothing() -> None:
    tensors = example([(-1, 3, 1, 5), (-1, 0, 0, -1)])
    tensors.run()
    assert tensors.token_ids_B.tolist() == [0, 0]
    assert tensors.lens_B.tolist() == [0, 0]
    assert tensors.seats_B.tolist() == [-1, -1]
    assert tensors.store_rows_2B.tolist() == [[-1, -1], [-1, -1]]
    assert tensors.index_slots_B.tolist() == [-1, -1]
    for table in (
        tensors.index_table_BP,
        tensors.ring_start_S,
        tensors.position_of_slot_GSH,
        tensors.slot_of_position_GSC,
        tensors.last_use_GSH,
    ):
        assert bool((table == -1).all())


def test_a_seat_whose_last_step_chose_no_token_is_fed_one_that_exists() -> None:
    tensors = example([(2, 3, 0, -1)])
    tensors.next_token_S[2] = -1
    tensors.run()
    assert tensors.token_ids_B.tolist() == [0]


def test_a_shorter_table_takes_the_first_pages() -> None:
    tensors = example([(1, 3, 0, 4)], batch_pages=2)
    tensors.run()
    assert tensors.index_table_BP.tolist() == [[PAGES, PAGES + 1]]


def test_mismatching_tensors_are_refused() -> None:
    tensors = example([(1, 3, 0, 4)])
    tensors.lens_B = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(KernelError, match="lens_B"):
        tensors.run()
