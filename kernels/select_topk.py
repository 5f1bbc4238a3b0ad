"""The exact top-k of each row of scores, as positions in ascending order.

Called once an index layer. Unlike torch.topk, equal scores have an order: the lowest position wins.
The indexer's relu makes exact zeros, so this happens, and without a rule the same prompt would give
other tokens in other chunks.

Suffixes: B rows, C positions, K selected positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..common.errors import KernelError
from . import cuda
from .registry import FLOAT32, INT32, INTS, Arguments, cpu_op, implement

_BEHIND = -(1 << 31)
"""Key of a position at or behind the row's length: never selected."""
_NAN = _BEHIND + 1
"""Key of a NaN: below every number, -inf included."""


def select_topk(scores_BC: Tensor, lengths_B: Tensor, topk_idx_BK: Tensor) -> None:
    """Writes the min(K, length) best positions of each row, ascending, then -1.

    Args:
        scores_BC: float32 [B, C]. NaN ranks lowest, below -inf.
        lengths_B: int32 or int64 [B], positions that count, at most C; 0 for a padded row.
        topk_idx_BK: int32 [B, K]; written whole.

    Raises KernelError on mismatching tensors or a length outside [0, C].
    """
    arguments = Arguments("select_topk")
    arguments.check("scores_BC", scores_BC, FLOAT32, "B", None)
    arguments.check("lengths_B", lengths_B, INTS, "B")
    arguments.check("topk_idx_BK", topk_idx_BK, INT32, "B", None)
    _op(scores_BC, lengths_B, topk_idx_BK)


def _select_topk(scores_BC: Tensor, lengths_B: Tensor, topk_idx_BK: Tensor) -> None:
    out = topk_idx_BK.numpy()
    out[:] = -1
    num_rows, k = out.shape
    lengths = lengths_B.numpy()
    if not num_rows or not k:
        return
    longest = int(lengths.max())
    if longest > scores_BC.shape[1] or int(lengths.min()) < 0:
        raise KernelError(
            f"select_topk: lengths from {int(lengths.min())} to {longest}, "
            f"expected 0 to {scores_BC.shape[1]}"
        )
    if longest <= k:
        positions = np.arange(longest, dtype=np.int32)
        out[:, :longest] = np.where(positions < lengths[:, None], positions, -1)
        return
    keys_BC = _ordered_keys(scores_BC[:, :longest], lengths)
    threshold_B = torch.topk(keys_BC, k, dim=1, sorted=False).values.amin(1).numpy()
    _write(out, keys_BC.numpy(), np.maximum(threshold_B, _NAN))


_op = cpu_op(mutates=("topk_idx_BK",))(_select_topk)
implement("select_topk", cuda.select_topk, "CUDA")


def _ordered_keys(scores_BC: Tensor, lengths: np.ndarray) -> Tensor:
    """int32 keys that order as the scores do: -0.0 equals 0.0, NaN is lowest, then what is behind."""
    values = scores_BC + 0.0
    keys = values.view(torch.int32)
    is_nan = None if not torch.isnan(values.sum()) else values.isnan()
    keys ^= (keys >> 31) & 0x7FFFFFFF
    if is_nan is not None:
        keys.masked_fill_(is_nan, _NAN)
    if int(lengths.min()) < keys.shape[1]:
        array = keys.numpy()
        for row, length in enumerate(lengths.tolist()):
            array[row, length:] = _BEHIND
    return keys


def _write(out: np.ndarray, keys: np.ndarray, threshold: np.ndarray) -> None:
    """Writes positions with keys above the row's threshold, and the lowest ones equal to it.

    All rows at once: candidates are the flat indices of keys >= threshold, in row-major order.
    """
    num_rows, k = out.shape
    width = keys.shape[1]
    flat = np.flatnonzero(keys >= threshold[:, None])
    bounds = np.searchsorted(flat, np.arange(num_rows + 1) * width)
    counts = np.diff(bounds)
    if (counts == k).all():
        out[:] = (flat % width).reshape(num_rows, k)
        return
    row = np.repeat(np.arange(num_rows), counts)
    if (counts > k).any():
        is_equal = keys.ravel()[flat] == threshold[row]
        before = np.concatenate([[0], np.cumsum(is_equal)])
        num_equal = before[bounds[1:]] - before[bounds[:-1]]
        room = k - (counts - num_equal)
        rank = before[1:] - before[bounds[:-1]][row]
        keep = ~is_equal | (rank <= room[row])
        flat, row = flat[keep], row[keep]
        bounds = np.searchsorted(flat, np.arange(num_rows + 1) * width)
    out[row, np.arange(flat.size) - bounds[:-1][row]] = flat - row * width
