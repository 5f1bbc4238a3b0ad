"""Packs entries into DeepSeek-V4's C4 page: values, then scales, then padding.

Value of slot s in a page: 448 e4m3 + 64 bf16 at 576 * s. Scales: 7 ue8m0 bytes, one per 64 of the
448, and one zero byte, at page_size * 576 + 8 * s. Byte offsets: common/layouts.py.

Suffixes: T tokens (C4 entries), V nope width, R rope width, P pages, X bytes of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import KernelError
from ..common.layouts import DeepSeekV4Layout
from . import fp8
from .registry import BYTES, FLOATS, INT64, Arguments, cpu_op
from .row_bytes import as_words, check_range

_LAYOUT = DeepSeekV4Layout()
_SCALE_BLOCK = 64


def store_v4_rows(
    nope_TV: Tensor, rope_TR: Tensor, slots_T: Tensor, pages_PX: Tensor, page_size: int
) -> None:
    """Stores entry t at slot slots[t] of its page.

    Args:
        nope_TV: float32, bfloat16 or float16 [T, 448], to be quantised.
        rope_TR: float, same kinds [T, 64], stored as bf16.
        slots_T: int64 [T], page * page_size + offset; -1 = skip. Distinct.
        pages_PX: uint8 [P, page bytes] (37,440 for 64 entries); written.
        page_size: entries a page.

    Raises KernelError on mismatching tensors or slots outside [-1, P * page_size).
    """
    arguments = Arguments("store_v4_rows")
    arguments.check("nope_TV", nope_TV, FLOATS, "T", _LAYOUT.nope_dim)
    arguments.check("rope_TR", rope_TR, FLOATS, "T", _LAYOUT.rope_dim)
    arguments.check("slots_T", slots_T, INT64, "T")
    arguments.check("pages_PX", pages_PX, BYTES, "P", _LAYOUT.page_bytes(page_size))
    _op(nope_TV, rope_TR, slots_T, pages_PX, page_size)


def _store_v4_rows(
    nope_TV: Tensor, rope_TR: Tensor, slots_T: Tensor, pages_PX: Tensor, page_size: int
) -> None:
    if not slots_T.numel():
        return
    if check_range("store_v4_rows", "slots", slots_T, pages_PX.shape[0] * page_size) < 0:
        keep = slots_T >= 0
        nope_TV, rope_TR, slots_T = nope_TV[keep], rope_TR[keep], slots_T[keep]
    payload, exponent = fp8.quantize_ue8m0(nope_TV.float().unflatten(1, (-1, _SCALE_BLOCK)))
    rope = rope_TR.to(torch.bfloat16).contiguous().view(torch.uint8)
    value = torch.cat([payload.flatten(1).view(torch.uint8), rope], 1)
    scale = torch.nn.functional.pad(exponent.flatten(1), (0, 1))
    at = (slots_T // page_size, slots_T % page_size)
    for region, data in zip(_regions(pages_PX, page_size), (value, scale), strict=True):
        target, source = as_words(region, data)
        target.index_put_(at, source)


_op = cpu_op(mutates=("pages_PX",))(_store_v4_rows)


def unpack_v4_pages(pages: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Decodes pages, uint8 [n, page bytes].

    Returns (nope float32 [n, page_size, 448], rope float32 [n, page_size, 64]). KernelError if the
    pages are of another size.
    """
    if pages.shape[-1] != _LAYOUT.page_bytes(page_size):
        raise KernelError(
            f"unpack_v4_pages: a page has {pages.shape[-1]} bytes, "
            f"expected {_LAYOUT.page_bytes(page_size)} for {page_size} entries"
        )
    values, scales = _regions(pages, page_size)
    payload = values[..., : _LAYOUT.nope_dim].contiguous().view(torch.float8_e4m3fn)
    rope = values[..., _LAYOUT.nope_dim :].contiguous().view(torch.bfloat16)
    scale = fp8.scale_of_ue8m0(scales[..., : _LAYOUT.nope_dim // _SCALE_BLOCK])
    blocks = payload.unflatten(-1, (-1, _SCALE_BLOCK))
    return fp8.decode(blocks, scale.unsqueeze(-1)).flatten(-2), rope.float()


def _regions(pages: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Views [P, page_size, 576] and [P, page_size, 8] of a page's values and scales."""
    start = _LAYOUT.scale_offset(page_size)
    end = start + page_size * _LAYOUT.scale_bytes
    return (
        pages[:, :start].unflatten(1, (page_size, _LAYOUT.value_bytes)),
        pages[:, start:end].unflatten(1, (page_size, _LAYOUT.scale_bytes)),
    )
