"""Triton side of begin_step: one program a batch row, on torch's current stream."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK_P = 1024


@triton.jit
def _begin_step_kernel(
    inputs,
    next_token,
    index_table,
    ring_start,
    step_out,
    position_of_slot,
    slot_of_position,
    last_use,
    token_ids,
    positions,
    lens,
    seats,
    store_rows,
    index_slots,
    batch_table,
    input_stride,
    store_stride,
    num_groups,
    num_seats,
    hot_rows,
    num_positions,
    num_pages,
    batch_pages,
    page_size,
    ring_rows,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b = tl.program_id(0)
    seat = tl.load(inputs + b)
    is_row = seat >= 0
    real = tl.where(is_row, seat, 0)
    position = tl.where(is_row, tl.load(inputs + input_stride + b), 0)
    token = tl.load(inputs + 3 * input_stride + b)
    token = tl.where(token >= 0, token, tl.load(next_token + real))
    step = tl.load(inputs + 4 * input_stride + b).to(tl.int32)
    tl.store(seats + b, seat)
    tl.store(positions + b, position)
    tl.store(lens + b, tl.where(is_row, position + 1, 0))
    tl.store(token_ids + b, tl.where(is_row & (token >= 0), token, 0))
    if b == 0:
        tl.store(step_out, step)

    table = index_table + real * num_pages
    page = tl.load(table + position // page_size).to(tl.int64)
    slot = page * page_size + position % page_size
    tl.store(index_slots + b, tl.where(is_row & (page >= 0), slot, -1))
    for first in range(0, batch_pages, BLOCK_P):
        p_P = first + tl.arange(0, BLOCK_P)
        is_in_P = p_P < batch_pages
        page_P = tl.load(table + p_P, mask=is_in_P & is_row, other=-1)
        tl.store(batch_table + b.to(tl.int64) * batch_pages + p_P, page_P, mask=is_in_P)

    base = real * (hot_rows + ring_rows)
    is_whole = is_row & (position < hot_rows)
    ring = base + hot_rows + position % ring_rows
    tl.store(store_rows + b, tl.where(is_row, ring, -1))
    tl.store(store_rows + store_stride + b, tl.where(is_whole, base + position, -1))
    if is_row:
        tl.store(ring_start + real, tl.load(inputs + 2 * input_stride + b).to(tl.int32))
    if is_whole:
        g_G = tl.arange(0, BLOCK_G)
        is_in_G = g_G < num_groups
        seat_G = g_G.to(tl.int64) * num_seats + real
        value_G = tl.zeros([BLOCK_G], tl.int32) + position.to(tl.int32)
        tl.store(position_of_slot + seat_G * hot_rows + position, value_G, mask=is_in_G)
        tl.store(slot_of_position + seat_G * num_positions + position, value_G, mask=is_in_G)
        tl.store(last_use + seat_G * hot_rows + position, value_G * 0 + step, mask=is_in_G)


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
    """tidepool::begin_step on CUDA; arguments of kernels/begin_step.py. Tables are contiguous."""
    num_groups, num_seats, hot_rows = position_of_slot_GSH.shape
    batch = input_5B.shape[1]
    if not batch:
        return
    _begin_step_kernel[(batch,)](
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
        input_5B.stride(0),
        store_rows_2B.stride(0),
        num_groups,
        num_seats,
        hot_rows,
        slot_of_position_GSC.shape[2],
        index_table_SP.shape[1],
        index_table_BP.shape[1],
        page_size,
        ring_rows,
        BLOCK_G=triton.next_power_of_2(num_groups),
        BLOCK_P=_BLOCK_P,
        num_warps=4,
    )
