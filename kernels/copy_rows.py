"""Copies rows of all layers between two pools: backup, staging and preload.

Source and target may be on different devices (host rows pinned). Bits are moved, never decoded.

Suffixes: L layers, N source rows, M target rows, X bytes of a row, T rows to copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import KernelError
from . import cuda
from .registry import BYTES, INT64, Arguments, cpu_op, implement
from .row_bytes import as_words, check_range


def copy_rows(
    source_LNX: Tensor, target_LMX: Tensor, source_rows_T: Tensor, target_rows_T: Tensor
) -> None:
    """target[l, target_rows[t]] = source[l, source_rows[t]] for every layer l.

    Args:
        source_LNX: uint8 [L, N, X].
        target_LMX: uint8 [L, M, X]; written. Does not overlap the source.
        source_rows_T: int64 [T]; -1 on either side skips the pair.
        target_rows_T: int64 [T]; distinct but for -1.

    Raises KernelError on mismatching tensors or rows out of range.
    """
    arguments = Arguments("copy_rows")
    arguments.check("source_LNX", source_LNX, BYTES, "L", None, "X", is_anywhere=True)
    arguments.check("target_LMX", target_LMX, BYTES, "L", None, "X", is_anywhere=True)
    arguments.check("source_rows_T", source_rows_T, INT64, "T")
    arguments.check("target_rows_T", target_rows_T, INT64, "T")
    _op(source_LNX, target_LMX, source_rows_T, target_rows_T)


def _copy_rows(
    source_LNX: Tensor, target_LMX: Tensor, source_rows_T: Tensor, target_rows_T: Tensor
) -> None:
    if not source_rows_T.numel():
        return
    lowest = min(
        check_range("copy_rows", "source_rows", source_rows_T, source_LNX.shape[1]),
        check_range("copy_rows", "target_rows", target_rows_T, target_LMX.shape[1]),
    )
    if lowest < 0:
        keep = (source_rows_T >= 0) & (target_rows_T >= 0)
        source_rows_T, target_rows_T = source_rows_T[keep], target_rows_T[keep]
    count = source_rows_T.numel()
    if not count:
        return
    if _is_run(source_rows_T) and _is_run(target_rows_T):
        first, to = int(source_rows_T[0]), int(target_rows_T[0])
        target_LMX[:, to : to + count] = source_LNX[:, first : first + count]
        return
    source, target = as_words(source_LNX, target_LMX)
    for layer in range(source.shape[0]):
        target[layer].index_copy_(0, target_rows_T, source[layer].index_select(0, source_rows_T))


_op = cpu_op(mutates=("target_LMX",))(_copy_rows)
implement("copy_rows", cuda.copy_rows, "CUDA")


def _is_run(rows: Tensor) -> bool:
    """Whether `rows` is n, n + 1, n + 2, ..."""
    count = rows.numel()
    if int(rows[-1]) - int(rows[0]) != count - 1:
        return False
    return bool((rows[1:] - rows[:-1] == 1).all())


def rows_of_runs(runs: list[tuple[int, int]], device: torch.device | str = "cpu") -> Tensor:
    """int64 rows of [(first, count), ...] in order: the usual argument of copy_rows."""
    if any(count < 0 for _, count in runs):
        raise KernelError(f"rows_of_runs: negative count in {runs}")
    ranges = [torch.arange(first, first + count, device=device) for first, count in runs]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device=device)
