"""Moving rows of bytes on the CPU: wide words where addresses allow, bytes where they do not.

Helpers of the references; no op of their own. A row is the last dimension, which must be dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import KernelError

_WORDS = (
    (16, torch.complex128),
    (8, torch.int64),
    (4, torch.int32),
    (2, torch.int16),
)


def as_words(*tensors: Tensor) -> list[Tensor]:
    """The uint8 tensors seen as the widest words that fit all of their strides and offsets.

    Bits are only ever moved, so the word's type does not matter. Views: they write through.
    """
    for num_bytes, dtype in _WORDS:
        if all(_fits(tensor, num_bytes) for tensor in tensors):
            return [tensor.view(dtype) for tensor in tensors]
    return list(tensors)


def put_rows(op: str, rows_NX: Tensor, slots_T: Tensor, packed_TX: Tensor) -> None:
    """rows[slots[t]] = packed[t]; -1 skips. KernelError for slots outside [-1, N)."""
    if not slots_T.numel():
        return
    if check_range(op, "slots", slots_T, rows_NX.shape[0]) < 0:
        keep = slots_T >= 0
        slots_T, packed_TX = slots_T[keep], packed_TX[keep]
    target, source = as_words(rows_NX, packed_TX)
    target.index_copy_(0, slots_T, source)


def check_range(op: str, name: str, index: Tensor, limit: int) -> int:
    """Raises KernelError unless every entry is in [-1, limit); returns the smallest entry."""
    lowest, highest = (int(bound) for bound in torch.aminmax(index))
    if lowest < -1 or highest >= limit:
        raise KernelError(
            f"{op}: {name} has entries from {lowest} to {highest}, expected -1 to {limit - 1}"
        )
    return lowest


def _fits(tensor: Tensor, num_bytes: int) -> bool:
    strides = tensor.stride()
    return (
        strides[-1] == 1
        and tensor.shape[-1] % num_bytes == 0
        and tensor.storage_offset() % num_bytes == 0
        and all(stride % num_bytes == 0 for stride in strides[:-1])
    )
