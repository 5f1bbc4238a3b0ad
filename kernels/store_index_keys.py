"""Packs indexer keys into their pages: all payloads of a page, then all its scales.

Called once an index layer for every token computed. Byte offsets: common/layouts.py.

Suffixes: T tokens, D key width, P pages, X bytes of a page.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..common.errors import KernelError
from ..common.layouts import IndexLayout
from . import cuda, fp8
from .registry import BYTES, FLOATS, INT64, Arguments, cpu_op, implement
from .row_bytes import as_words, check_range


def store_index_keys(
    key_TD: Tensor, slots_T: Tensor, pages_PX: Tensor, page_size: int, layout: str
) -> None:
    """Stores key t at slot slots[t] = page * page_size + offset.

    Args:
        key_TD: float32, bfloat16 or float16 [T, D], after LayerNorm and rope.
        slots_T: int64 [T]; -1 = skip this token. Distinct.
        pages_PX: uint8 [P, page bytes]; written.
        page_size: tokens a page.
        layout: name of an IndexLayout.

    Raises KernelError on mismatching tensors or slots outside [-1, P * page_size).
    """
    index = index_layout(layout, key_TD.shape[-1])
    arguments = Arguments("store_index_keys")
    arguments.check("key_TD", key_TD, FLOATS, "T", "D")
    arguments.check("slots_T", slots_T, INT64, "T")
    arguments.check("pages_PX", pages_PX, BYTES, "P", index.page_bytes(page_size))
    _op(key_TD, slots_T, pages_PX, page_size, layout)


def _store_index_keys(
    key_TD: Tensor, slots_T: Tensor, pages_PX: Tensor, page_size: int, layout: str
) -> None:
    if not slots_T.numel():
        return
    if check_range("store_index_keys", "slots", slots_T, pages_PX.shape[0] * page_size) < 0:
        keep = slots_T >= 0
        key_TD, slots_T = key_TD[keep], slots_T[keep]
    at = (slots_T // page_size, slots_T % page_size)
    index = index_layout(layout, key_TD.shape[-1])
    key_TD = key_TD.float().contiguous()
    if layout == "index_fp32":
        parts = [key_TD.view(torch.uint8)]
    else:
        payload, scale = fp8.quantize(key_TD)
        parts = [payload.view(torch.uint8), scale.view(torch.uint8)]
    for region, part in zip(_regions(pages_PX, page_size, index), parts, strict=False):
        target, source = as_words(region, part)
        target.index_put_(at, source)


_op = cpu_op(mutates=("pages_PX",))(_store_index_keys)
implement("store_index_keys", cuda.store_index_keys, "CUDA")


@lru_cache(maxsize=64)
def index_layout(layout: str, head_dim: int) -> IndexLayout:
    """The IndexLayout of this width; KernelError for a name that has none."""
    if layout not in ("index_k", "index_fp32"):
        raise KernelError(f"unknown index layout {layout!r}, expected index_k or index_fp32")
    return IndexLayout(layout, head_dim)


def unpack_index_pages(pages: Tensor, page_size: int, layout: str, head_dim: int) -> Tensor:
    """Decodes pages, uint8 [n, page bytes], to float32 [n, page_size, D]."""
    payload, scale = _regions(pages, page_size, index_layout(layout, head_dim))
    if layout == "index_fp32":
        return payload.contiguous().view(torch.float32)
    keys = payload.contiguous().view(torch.float8_e4m3fn)
    return fp8.decode(keys, scale.contiguous().view(torch.float32))


def _regions(pages: Tensor, page_size: int, index: IndexLayout) -> tuple[Tensor, Tensor]:
    """Views [P, page_size, key bytes] and [P, page_size, 4 or 0] of a page's keys and scales."""
    start = index.scale_offset(page_size)
    scale_bytes = index.token_bytes - index.key_bytes
    return (
        pages[:, :start].unflatten(1, (page_size, index.key_bytes)),
        pages[:, start:].unflatten(1, (page_size, scale_bytes)),
    )
