"""Copies a miss plan between pools of DeepSeek-V4's C4 pages, one layer.

Like `load_cache_to_device_buffer`, but an entry is 576 bytes of value and 8 bytes of scale at two
places of its page (byte offsets: common/layouts.py), on the host and on the device.

Suffixes: B batch rows, K entries of a miss list, P host pages, Q device pages, X bytes of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import KernelError
from ..common.layouts import DeepSeekV4Layout
from . import cuda_swap_in
from .registry import BYTES, INT32, INT64, Arguments, cpu_op, implement

_LAYOUT = DeepSeekV4Layout()


def load_v4_cache_to_device_buffer(
    host_pages_PX: Tensor,
    device_pages_QX: Tensor,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
    page_size: int,
) -> None:
    """Copies entry miss_host_slot[b, i] to entry miss_device_row[b, i] for i < num_misses[b].

    Args:
        host_pages_PX: uint8 [P, page bytes] (37,440 for 64 entries), one layer of the host pool;
            may be pinned host memory while the others are on the device.
        device_pages_QX: uint8 [Q, page bytes]; written.
        miss_host_slot_BK: int64 [B, K], page * page_size + offset; compact.
        miss_device_row_BK: int64 [B, K], likewise, distinct.
        num_misses_B: int32 [B].
        page_size: entries a page, a power of two.

    Raises KernelError on mismatching tensors or (CPU) entries out of range, which CUDA skips.
    """
    arguments = Arguments("load_v4_cache_to_device_buffer")
    page_bytes = _LAYOUT.page_bytes(page_size)
    arguments.check("host_pages_PX", host_pages_PX, BYTES, None, page_bytes, is_anywhere=True)
    arguments.check("device_pages_QX", device_pages_QX, BYTES, None, page_bytes)
    arguments.check("miss_host_slot_BK", miss_host_slot_BK, INT64, "B", "K")
    arguments.check("miss_device_row_BK", miss_device_row_BK, INT64, "B", "K")
    arguments.check("num_misses_B", num_misses_B, INT32, "B")
    _op(
        host_pages_PX,
        device_pages_QX,
        miss_host_slot_BK,
        miss_device_row_BK,
        num_misses_B,
        page_size,
    )


def _load_v4_cache_to_device_buffer(
    host_pages_PX: Tensor,
    device_pages_QX: Tensor,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
    page_size: int,
) -> None:
    is_miss = torch.arange(miss_host_slot_BK.shape[1]) < num_misses_B[:, None]
    source, target = miss_host_slot_BK[is_miss], miss_device_row_BK[is_miss]
    for name, entries, pages in (
        ("host slots", source, host_pages_PX),
        ("device rows", target, device_pages_QX),
    ):
        if bool(((entries < 0) | (entries >= pages.shape[0] * page_size)).any()):
            raise KernelError(
                f"load_v4_cache_to_device_buffer: {name} out of range, "
                f"expected 0 to {pages.shape[0] * page_size - 1}"
            )
    start = _LAYOUT.scale_offset(page_size)
    for first, width in ((0, _LAYOUT.value_bytes), (start, _LAYOUT.scale_bytes)):
        host, device = (
            pages[:, first : first + page_size * width].unflatten(1, (page_size, width))
            for pages in (host_pages_PX, device_pages_QX)
        )
        device[target // page_size, target % page_size] = host[
            source // page_size, source % page_size
        ]


_op = cpu_op(mutates=("device_pages_QX",))(_load_v4_cache_to_device_buffer)
implement("load_v4_cache_to_device_buffer", cuda_swap_in.load_v4_cache_to_device_buffer, "CUDA")
