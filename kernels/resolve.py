"""Maps selected positions to device rows, and plans which rows must come from the host.

Called once a step for each index group (an indexer layer and the layers that share its top-k): the
tables below exist once a group, the layers of a group hold the same positions in the same slots.
The plan is then executed for each layer by `load_cache_to_device_buffer`.

Rows of the device buffer of one layer, for seat s (H hot rows, ring_rows newest rows):

| rows                                             | hold                                            |
|--------------------------------------------------|-------------------------------------------------|
| [s * (H + ring_rows), + H)                       | hot slots: positions < ring_start[s], any order |
| [s * (H + ring_rows) + H, + ring_rows)           | position p >= ring_start[s] in row p % ring_rows |

Victims are chosen by the newest index scores where the caller has them (the indexer scores every
position at every step, so a resident row that was not selected has a score too), else by recency.
benchmarks/results/2026-11-20-replacement.md compares the two.

Always true, before and after: slot_of_position[s, p] == h exactly if position_of_slot[s, h] == p, so
a position is resident at most once. Only rows of the seats in `seats` change. A slot that this step
uses (last_use == step) is never a victim.

Suffixes: B batch rows, K selected positions, S seats, P pages of a sequence, H hot rows, C positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..common.errors import KernelError
from . import cuda_swap_in
from .registry import FLOAT32, INT32, INT64, INTS, Arguments, cpu_op, implement

FAULT_POSITION = 1
"""A position < -1, at or past the sequence's length, past the tables, or older than the ring holds."""
FAULT_HOLE = 2
"""A miss whose page has no host page."""
FAULT_FULL = 4
"""More distinct misses than slots that this step does not use."""
SCORE_STEPS = 63
"""Scores of the rows that may go are rounded to so many even steps, from their lowest to highest."""
MAX_SCORE = 1e30
"""Scores beyond, either way, count as this; NaN as the lowest."""
MIN_SCORE_RANGE = 1e-30
"""Scores closer together than this count as equal."""


def resolve(
    topk_idx_BK: Tensor,
    seq_lens_B: Tensor,
    seats_B: Tensor,
    page_table_SP: Tensor,
    ring_start_S: Tensor,
    position_of_slot_SH: Tensor,
    slot_of_position_SC: Tensor,
    last_use_SH: Tensor,
    step_1: Tensor,
    hot_idx_BK: Tensor,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
    fault_B: Tensor,
    page_size: int,
    ring_rows: int,
    is_scattered: bool = False,
    scores_BC: Tensor | None = None,
) -> None:
    """Resolves the top-k of B sequences and updates the tables of their seats.

    A position in the ring resolves to its ring row. A resident position is a hit: its slot's
    last_use becomes the step. Any other is a miss: it takes a victim slot, whose old position is
    forgotten, and is listed in the plan. Victims of a row are as many as its misses: empty slots,
    lowest first, then those whose positions have the lowest score, or without scores the least
    recently used; lowest slot first on ties; never one used in this step. They are handed out in ascending order. Misses are listed in the order of their first occurrence
    in the top-k row; a position that occurs twice resolves to one row and one miss.

    Args:
        topk_idx_BK: int32 [B, K], positions; -1 = none, anywhere.
        seq_lens_B: int32 or int64 [B], positions of the sequence, the newest included.
        seats_B: int32 or int64 [B]; -1 = padded row. Distinct otherwise.
        page_table_SP: int32 [S, P], host page of each page of the sequence, -1 = hole.
        ring_start_S: int32 [S], first position that the ring holds.
        position_of_slot_SH: int32 [S, H], -1 = empty; read and written.
        slot_of_position_SC: int16 or int32 [S, C], -1 = not resident; read and written.
        last_use_SH: int32 [S, H], step of the last use, below the current one; read and written.
        step_1: int32 [1], the current step; grows from call to call.
        hot_idx_BK: int32 [B, K], device row of each entry, -1 = none or fault; written.
        miss_host_slot_BK: int64 [B, K], compact; written, behind num_misses -1 or left alone.
        miss_device_row_BK: int64 [B, K], compact; written, behind num_misses -1 or left alone.
        num_misses_B: int32 [B]; written.
        fault_B: int32 [B], FAULT_* flags, 0 = none; written. A bad entry gets hot_idx -1 and
            changes no table; the other entries of the row are resolved.
        page_size: tokens a host page.
        ring_rows: rows of a seat's ring.
        is_scattered: the host pages lie all over the pool rather than in long runs: misses are
            listed by ascending host slot, for a copy that goes through the pool in order.
        scores_BC: float32 [B, any], rows may lie apart; index scores of this step by position, as
            select_topk had them, compared in steps (SCORE_STEPS). A position past the row's end has
            the score at its end. None: recency.

    A padded row writes -1 and 0 into the outputs and touches no table. Raises KernelError on
    mismatching tensors, a seat past S, or a seat that occurs twice.
    """
    tensors = (
        topk_idx_BK,
        seq_lens_B,
        seats_B,
        page_table_SP,
        ring_start_S,
        position_of_slot_SH,
        slot_of_position_SC,
        last_use_SH,
        step_1,
        hot_idx_BK,
        miss_host_slot_BK,
        miss_device_row_BK,
        num_misses_B,
        fault_B,
    )
    check_resolve("resolve", *tensors, page_size, ring_rows, scores_BC)
    _op(*tensors, page_size, ring_rows, is_scattered, scores_BC)


def check_resolve(
    op: str,
    topk_idx_BK: Tensor,
    seq_lens_B: Tensor,
    seats_B: Tensor,
    page_table_SP: Tensor,
    ring_start_S: Tensor,
    position_of_slot_SH: Tensor,
    slot_of_position_SC: Tensor,
    last_use_SH: Tensor,
    step_1: Tensor,
    hot_idx_BK: Tensor,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
    fault_B: Tensor,
    page_size: int,
    ring_rows: int,
    scores_BC: Tensor | None,
) -> Arguments:
    """Checks what `resolve` takes, in its order, on behalf of `op`; returns the sizes seen."""
    arguments = Arguments(op)
    check = arguments.check
    check("topk_idx_BK", topk_idx_BK, INT32, "B", "K")
    check("seq_lens_B", seq_lens_B, INTS, "B")
    check("seats_B", seats_B, INTS, "B")
    check("page_table_SP", page_table_SP, INT32, "S", None)
    check("ring_start_S", ring_start_S, INT32, "S")
    check("position_of_slot_SH", position_of_slot_SH, INT32, "S", "H")
    check("slot_of_position_SC", slot_of_position_SC, (torch.int16, torch.int32), "S", None)
    check("last_use_SH", last_use_SH, INT32, "S", "H")
    check("step_1", step_1, INT32, 1)
    check("hot_idx_BK", hot_idx_BK, INT32, "B", "K")
    check("miss_host_slot_BK", miss_host_slot_BK, INT64, "B", "K")
    check("miss_device_row_BK", miss_device_row_BK, INT64, "B", "K")
    check("num_misses_B", num_misses_B, INT32, "B")
    check("fault_B", fault_B, INT32, "B")
    if scores_BC is not None:
        check("scores_BC", scores_BC, FLOAT32, "B", None)
    hot_rows = arguments.sizes["H"]
    if slot_of_position_SC.dtype == torch.int16 and hot_rows > 1 << 15:
        raise KernelError(f"{op}: slot_of_position is int16, expected int32 for {hot_rows} rows")
    if page_size < 1 or ring_rows < 1:
        raise KernelError(f"{op}: page_size {page_size}, ring_rows {ring_rows}, expected >= 1")
    return arguments


def _resolve(
    topk_idx_BK: Tensor,
    seq_lens_B: Tensor,
    seats_B: Tensor,
    page_table_SP: Tensor,
    ring_start_S: Tensor,
    position_of_slot_SH: Tensor,
    slot_of_position_SC: Tensor,
    last_use_SH: Tensor,
    step_1: Tensor,
    hot_idx_BK: Tensor,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
    fault_B: Tensor,
    page_size: int,
    ring_rows: int,
    is_scattered: bool = False,
    scores_BC: Tensor | None = None,
) -> None:
    seats = seats_B.tolist()
    real = [seat for seat in seats if seat >= 0]
    if len(set(real)) != len(real) or max(real, default=-1) >= position_of_slot_SH.shape[0]:
        raise KernelError(
            f"resolve: seats {seats}, expected distinct ones below {position_of_slot_SH.shape[0]}"
        )
    topk, hot_idx = topk_idx_BK.numpy(), hot_idx_BK.numpy()
    host_slots, device_rows = miss_host_slot_BK.numpy(), miss_device_row_BK.numpy()
    num_misses, faults = num_misses_B.numpy(), fault_B.numpy()
    tables = [
        table.numpy()
        for table in (page_table_SP, position_of_slot_SH, slot_of_position_SC, last_use_SH)
    ]
    ring_starts, lengths, step = ring_start_S.tolist(), seq_lens_B.tolist(), int(step_1[0])
    base_stride = position_of_slot_SH.shape[1] + ring_rows
    hot_idx[:] = host_slots[:] = device_rows[:] = -1
    num_misses[:] = faults[:] = 0
    for row, seat in enumerate(seats):
        if seat < 0:
            continue
        view = _Seat(*(table[seat] for table in tables), ring_starts[seat], ring_rows, step)
        scores = None if scores_BC is None else scores_BC[row].numpy()
        hot, slots, misses, faults[row] = view.resolve(topk[row], lengths[row], page_size, scores)
        if is_scattered:
            order = np.argsort(misses)
            slots, misses = slots[order], misses[order]
        base, count = seat * base_stride, misses.size
        hot_idx[row] = np.where(hot >= 0, hot + base, -1)
        host_slots[row, :count] = misses
        device_rows[row, :count] = slots + base
        num_misses[row] = count


_op = cpu_op(
    mutates=(
        "position_of_slot_SH",
        "slot_of_position_SC",
        "last_use_SH",
        "hot_idx_BK",
        "miss_host_slot_BK",
        "miss_device_row_BK",
        "num_misses_B",
        "fault_B",
    )
)(_resolve)
implement("resolve", cuda_swap_in.resolve, "CUDA")


class _Seat:
    """One seat's rows of the tables, and the resolution of one top-k row against them."""

    def __init__(
        self,
        pages: np.ndarray,
        position_of_slot: np.ndarray,
        slot_of_position: np.ndarray,
        last_use: np.ndarray,
        ring_start: int,
        ring_rows: int,
        step: int,
    ) -> None:
        self.pages = pages
        self.position_of_slot = position_of_slot
        self.slot_of_position = slot_of_position
        self.last_use = last_use
        self.ring_start = ring_start
        self.ring_rows = ring_rows
        self.step = step

    def resolve(
        self, topk: np.ndarray, seq_len: int, page_size: int, scores: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Returns (row of each entry within the seat or -1, victims, their host slots, faults)."""
        hot = np.full(topk.shape, -1, dtype=np.int64)
        end = min(seq_len, self.ring_start + self.ring_rows, self.slot_of_position.size)
        is_good = (topk >= 0) & (topk < end)
        fault = FAULT_POSITION if (is_good != (topk != -1)).any() else 0
        in_ring = is_good & (topk >= self.ring_start)
        hot[in_ring] = self.position_of_slot.size + topk[in_ring] % self.ring_rows
        cached = np.flatnonzero(is_good & ~in_ring)
        positions = topk[cached]
        slots = self.slot_of_position[positions]
        self.last_use[slots[slots >= 0]] = self.step
        victims, host_slots, flags = self._take_in(positions[slots < 0], page_size, scores)
        if victims.size:
            slots = self.slot_of_position[positions]
        hot[cached] = slots
        return hot, victims, host_slots, fault | flags

    def _take_in(
        self, missing: np.ndarray, page_size: int, scores: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Gives missing positions a slot each; returns (victims, host slots, faults)."""
        none = np.empty(0, dtype=np.int64)
        if not missing.size:
            return none, none, 0
        missing = _distinct(missing)
        fault = 0
        page = missing // page_size
        in_table = page < self.pages.size
        host_page = np.full(page.shape, -1, dtype=np.int64)
        host_page[in_table] = self.pages[page[in_table]]
        if (host_page < 0).any():
            fault |= FAULT_HOLE
            missing, host_page = missing[host_page >= 0], host_page[host_page >= 0]
        victims = self._victims(missing.size, scores)
        if victims.size < missing.size:
            fault |= FAULT_FULL
            missing, host_page = missing[: victims.size], host_page[: victims.size]
        old = self.position_of_slot[victims]
        self.slot_of_position[old[old >= 0]] = -1
        self.position_of_slot[victims] = missing
        self.slot_of_position[missing] = victims
        self.last_use[victims] = self.step
        return victims, host_page * page_size + missing % page_size, fault

    def _victims(self, count: int, scores: np.ndarray | None) -> np.ndarray:
        """Up to `count` slots to overwrite, ascending: the empty ones, then the least wanted."""
        empty = np.flatnonzero(self.position_of_slot < 0)[:count]
        if empty.size == count:
            return empty
        free = np.flatnonzero((self.position_of_slot >= 0) & (self.last_use != self.step))
        count -= empty.size
        if count < free.size:
            if scores is None:
                wanted = self.last_use[free].astype(np.int64)
            else:
                wanted = score_steps(scores, self.position_of_slot[free])
            order = wanted * self.last_use.size + free
            free = free[np.argpartition(order, count)[:count]]
        return np.sort(np.concatenate([empty, free]))


def score_steps(scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """int64, the positions' scores rounded to SCORE_STEPS even steps, lowest of them to highest.

    Float32 throughout, one rounding an operation, as the CUDA kernel does it.
    """
    values = scores[np.minimum(positions, scores.size - 1)]
    values = np.fmin(np.fmax(values, np.float32(-MAX_SCORE)), np.float32(MAX_SCORE))
    low = values.min()
    span = values.max() - low
    if span < np.float32(MIN_SCORE_RANGE):
        return np.zeros(values.shape, dtype=np.int64)
    return np.rint((values - low) * (np.float32(SCORE_STEPS - 1) / span)).astype(np.int64)


def _distinct(positions: np.ndarray) -> np.ndarray:
    """`positions` without repetitions, in the order of first occurrence."""
    if positions.size < 2 or (np.diff(positions) > 0).all():
        return positions
    _, first = np.unique(positions, return_index=True)
    return positions[np.sort(first)]
