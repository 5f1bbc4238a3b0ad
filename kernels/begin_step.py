"""Readies the seats for one decode step: where each new row goes, what is fed, what is visible.

Called once a step before the model's first layer, with the few numbers a row that the host knows;
everything else a step needs is read from tables that stay on the device, so that a step captured in
a CUDA graph is replayed with one small upload.

Suffixes: B batch rows, S seats, G index groups, H hot rows, C positions, P pages of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda
from .registry import INT32, INT64, Arguments, cpu_op, implement

SEAT, POSITION, RING_START, TOKEN, STEP = range(5)
"""Rows of `input_5B`."""


def begin_step(
    input_5B: Tensor,
    next_token_S: Tensor,
    index_table_SP: Tensor,
    ring_start_S: Tensor,
    step_1: Tensor,
    position_of_slot_GSH: Tensor,
    slot_of_position_GSC: Tensor,
    last_use_GSH: Tensor,
    token_ids_B: Tensor,
    positions_B: Tensor,
    lens_B: Tensor,
    seats_B: Tensor,
    store_rows_2B: Tensor,
    index_slots_B: Tensor,
    index_table_BP: Tensor,
    page_size: int,
    ring_rows: int,
) -> None:
    """One new row a sequence.

    Args:
        input_5B: int64 [5, B]: seat (-1: padded row), position of the new row, oldest position its
            seat's ring will have, token fed (-1: the seat's newest of `next_token_S`), number of the
            step. Seats are distinct and below S.
        next_token_S: int64 [S], the token last chosen for each seat.
        index_table_SP: int32 [S, P], index pages of each seat's sequence, -1 behind its end.
        ring_start_S, step_1: int32, written.
        position_of_slot_GSH, slot_of_position_GSC, last_use_GSH: int32, the hot cache's tables; a
            sequence that is resident whole (position < H) gets its new row in slot `position`.
        token_ids_B, positions_B, lens_B, seats_B: int64, written; 0, 0, 0 and -1 for padded rows.
        store_rows_2B: int64 [2, B], written: device row of the ring, and the hot slot of a sequence
            resident whole; -1: none.
        index_slots_B: int64, written: slot of the new key in the index pool; -1: none.
        index_table_BP: int32 [B, P' <= P], written: the first pages of each row's `index_table_SP`.

    Raises KernelError on mismatching tensors.
    """
    arguments = Arguments("begin_step")
    arguments.check("input_5B", input_5B, INT64, 5, "B")
    arguments.check("next_token_S", next_token_S, INT64, None)
    arguments.check("index_table_SP", index_table_SP, INT32, "S", None)
    arguments.check("ring_start_S", ring_start_S, INT32, "S")
    arguments.check("step_1", step_1, INT32, 1)
    arguments.check("position_of_slot_GSH", position_of_slot_GSH, INT32, "G", "S", "H")
    arguments.check("slot_of_position_GSC", slot_of_position_GSC, INT32, "G", "S", None)
    arguments.check("last_use_GSH", last_use_GSH, INT32, "G", "S", "H")
    for name, tensor in (
        ("token_ids_B", token_ids_B),
        ("positions_B", positions_B),
        ("lens_B", lens_B),
        ("seats_B", seats_B),
        ("index_slots_B", index_slots_B),
    ):
        arguments.check(name, tensor, INT64, "B")
    arguments.check("store_rows_2B", store_rows_2B, INT64, 2, "B")
    arguments.check("index_table_BP", index_table_BP, INT32, "B", None)
    _op(
        input_5B,
        next_token_S,
        index_table_SP,
        ring_start_S,
        step_1,
        position_of_slot_GSH,
        slot_of_position_GSC,
        last_use_GSH,
        token_ids_B,
        positions_B,
        lens_B,
        seats_B,
        store_rows_2B,
        index_slots_B,
        index_table_BP,
        page_size,
        ring_rows,
    )


def _begin_step(
    input_5B: Tensor,
    next_token_S: Tensor,
    index_table_SP: Tensor,
    ring_start_S: Tensor,
    step_1: Tensor,
    position_of_slot_GSH: Tensor,
    slot_of_position_GSC: Tensor,
    last_use_GSH: Tensor,
    token_ids_B: Tensor,
    positions_B: Tensor,
    lens_B: Tensor,
    seats_B: Tensor,
    store_rows_2B: Tensor,
    index_slots_B: Tensor,
    index_table_BP: Tensor,
    page_size: int,
    ring_rows: int,
) -> None:
    hot_rows = position_of_slot_GSH.shape[2]
    is_row_B = input_5B[SEAT] >= 0
    seats_B.copy_(input_5B[SEAT])
    real_B = torch.where(is_row_B, seats_B, 0)
    positions_B.copy_(torch.where(is_row_B, input_5B[POSITION], 0))
    lens_B.copy_(torch.where(is_row_B, positions_B + 1, 0))
    fed_B = torch.where(input_5B[TOKEN] >= 0, input_5B[TOKEN], next_token_S[real_B])
    token_ids_B.copy_(torch.where(is_row_B, fed_B.clamp(min=0), 0))
    index_table_BP.copy_(index_table_SP[real_B, : index_table_BP.shape[1]])
    index_table_BP[~is_row_B] = -1
    pages_B = index_table_SP[real_B, positions_B // page_size].to(torch.int64)
    index_slots_B.copy_(
        torch.where(is_row_B & (pages_B >= 0), pages_B * page_size + positions_B % page_size, -1)
    )
    base_B = real_B * (hot_rows + ring_rows)
    is_whole_B = is_row_B & (positions_B < hot_rows)
    store_rows_2B[0] = torch.where(is_row_B, base_B + hot_rows + positions_B % ring_rows, -1)
    store_rows_2B[1] = torch.where(is_whole_B, base_B + positions_B, -1)
    ring_start_S[seats_B[is_row_B]] = input_5B[RING_START, is_row_B].to(torch.int32)
    step_1.copy_(input_5B[STEP, :1])
    seats, at = seats_B[is_whole_B], positions_B[is_whole_B]
    position_of_slot_GSH[:, seats, at] = at.to(torch.int32)
    slot_of_position_GSC[:, seats, at] = at.to(torch.int32)
    last_use_GSH[:, seats, at] = step_1


_op = cpu_op(
    mutates=(
        "ring_start_S",
        "step_1",
        "position_of_slot_GSH",
        "slot_of_position_GSC",
        "last_use_GSH",
        "token_ids_B",
        "positions_B",
        "lens_B",
        "seats_B",
        "store_rows_2B",
        "index_slots_B",
        "index_table_BP",
    )
)(_begin_step)
implement("begin_step", cuda.begin_step, "CUDA")
