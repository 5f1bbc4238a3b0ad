"""Copies the rows of a miss plan from the host pool into the hot buffers, one layer.

`load_cache_to_device_buffer` is called once a layer after `resolve`, with the plan of the layer's
index group. `swap_in` does both at once, for the first layer of a group: one launch on CUDA
(`load_cache_to_device_buffer_kernel`). Bits are moved, never decoded.

Suffixes: B batch rows, K entries of a miss list, N host rows, M device rows, X bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import KernelError
from . import cuda_swap_in
from .registry import BYTES, INT32, INT64, Arguments, cpu_op, implement
from .resolve import check_resolve
from .resolve import resolve as resolve_rows
from .row_bytes import as_words


def load_cache_to_device_buffer(
    host_rows_NX: Tensor,
    device_rows_MX: Tensor,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
    is_scattered: bool = False,
) -> None:
    """device_rows[miss_device_row[b, i]] = host_rows[miss_host_slot[b, i]] for i < num_misses[b].

    Args:
        host_rows_NX: uint8 [N, row bytes], one layer of the host pool; may be pinned host memory
            while the others are on the device.
        device_rows_MX: uint8 [M, row bytes], one layer of the seats; written.
        miss_host_slot_BK: int64 [B, K], compact; entries at num_misses and behind are not read.
        miss_device_row_BK: int64 [B, K], likewise; device rows are distinct.
        num_misses_B: int32 [B].
        is_scattered: as it was given to the `resolve` or `swap_in` that made the plan, for the same
            batch and pool.

    Raises KernelError on mismatching tensors, (CPU) counts beyond K or rows out of range.
    """
    arguments = Arguments("load_cache_to_device_buffer")
    arguments.check("host_rows_NX", host_rows_NX, BYTES, None, "X", is_anywhere=True)
    arguments.check("device_rows_MX", device_rows_MX, BYTES, None, "X")
    arguments.check("miss_host_slot_BK", miss_host_slot_BK, INT64, "B", "K")
    arguments.check("miss_device_row_BK", miss_device_row_BK, INT64, "B", "K")
    arguments.check("num_misses_B", num_misses_B, INT32, "B")
    _op(
        host_rows_NX,
        device_rows_MX,
        miss_host_slot_BK,
        miss_device_row_BK,
        num_misses_B,
        is_scattered,
    )


def _load_cache_to_device_buffer(
    host_rows_NX: Tensor,
    device_rows_MX: Tensor,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
    is_scattered: bool = False,
) -> None:
    counts = num_misses_B.tolist()
    if not any(counts):
        return
    if max(counts) > miss_host_slot_BK.shape[1] or min(counts) < 0:
        raise KernelError(
            f"load_cache_to_device_buffer: {counts} misses, "
            f"expected 0 to {miss_host_slot_BK.shape[1]}"
        )
    host_slots = torch.cat([miss_host_slot_BK[row, :n] for row, n in enumerate(counts)])
    device_rows = torch.cat([miss_device_row_BK[row, :n] for row, n in enumerate(counts)])
    _check("host slots", host_slots, host_rows_NX.shape[0])
    _check("device rows", device_rows, device_rows_MX.shape[0])
    source, target = as_words(host_rows_NX, device_rows_MX)
    target.index_copy_(0, device_rows, source.index_select(0, host_slots))


_op = cpu_op(mutates=("device_rows_MX",))(_load_cache_to_device_buffer)
implement("load_cache_to_device_buffer", cuda_swap_in.load_cache_to_device_buffer, "CUDA")


def swap_in(
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
    host_rows_NX: Tensor,
    device_rows_MX: Tensor,
    page_size: int,
    ring_rows: int,
    is_scattered: bool = False,
    scores_BC: Tensor | None = None,
) -> None:
    """`resolve`, then `load_cache_to_device_buffer` of its plan: arguments of both, in that order.

    The plan is left behind for the other layers of the group, in an order of the op's choice within
    a row. On CUDA a host slot past N is a hole.
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
    arguments = check_resolve("swap_in", *tensors, page_size, ring_rows, scores_BC)
    arguments.check("host_rows_NX", host_rows_NX, BYTES, None, "X", is_anywhere=True)
    arguments.check("device_rows_MX", device_rows_MX, BYTES, None, "X")
    _swap_in_op(
        *tensors, host_rows_NX, device_rows_MX, page_size, ring_rows, is_scattered, scores_BC
    )


def _swap_in(
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
    host_rows_NX: Tensor,
    device_rows_MX: Tensor,
    page_size: int,
    ring_rows: int,
    is_scattered: bool = False,
    scores_BC: Tensor | None = None,
) -> None:
    plan = miss_host_slot_BK, miss_device_row_BK, num_misses_B
    resolve_rows(
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
        *plan,
        fault_B,
        page_size,
        ring_rows,
        is_scattered,
        scores_BC,
    )
    load_cache_to_device_buffer(host_rows_NX, device_rows_MX, *plan, is_scattered)


_swap_in_op = cpu_op(
    mutates=(
        "position_of_slot_SH",
        "slot_of_position_SC",
        "last_use_SH",
        "hot_idx_BK",
        "miss_host_slot_BK",
        "miss_device_row_BK",
        "num_misses_B",
        "fault_B",
        "device_rows_MX",
    )
)(_swap_in)
implement("swap_in", cuda_swap_in.swap_in, "CUDA")


def _check(name: str, rows: Tensor, limit: int) -> None:
    lowest, highest = (int(bound) for bound in torch.aminmax(rows))
    if lowest < 0 or highest >= limit:
        raise KernelError(
            f"load_cache_to_device_buffer: {name} from {lowest} to {highest}, "
            f"expected 0 to {limit - 1}"
        )
