"""Packs KV rows into a layout and stores them at their slots.

Called once a layer for every token computed: into the paged device pool (prefill) or into the
seats' rings (decode). Byte offsets: common/layouts.py.

Suffixes: T tokens, C latent width, R rope width, N rows, X bytes of a row.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..common.errors import ConfigError, KernelError
from ..common.layouts import FP8_BLOCK, RowLayout
from . import cuda, fp8
from .registry import BYTES, FLOATS, INT64, Arguments, cpu_op, implement
from .row_bytes import put_rows


def store_rows(
    latent_TC: Tensor, rope_TR: Tensor, slots_T: Tensor, rows_NX: Tensor, layout: str
) -> None:
    """rows[slots[t]] = pack(latent[t], rope[t]).

    Args:
        latent_TC: float32, bfloat16 or float16 [T, C], after its norm.
        rope_TR: float, same kinds [T, R], after rotation.
        slots_T: int64 [T]; -1 = skip this token. Slots are distinct (else: one of them wins).
        rows_NX: uint8 [N, row bytes]; written.
        layout: name of a KvLayout.

    Raises KernelError on mismatching tensors or slots outside [-1, N).
    """
    row = row_layout(layout, latent_TC.shape[-1], rope_TR.shape[-1])
    arguments = Arguments("store_rows")
    arguments.check("latent_TC", latent_TC, FLOATS, "T", "C")
    arguments.check("rope_TR", rope_TR, FLOATS, "T", "R")
    arguments.check("slots_T", slots_T, INT64, "T")
    arguments.check("rows_NX", rows_NX, BYTES, "N", row.row_bytes)
    _op(latent_TC, rope_TR, slots_T, rows_NX, layout)


def _store_rows(
    latent_TC: Tensor, rope_TR: Tensor, slots_T: Tensor, rows_NX: Tensor, layout: str
) -> None:
    put_rows("store_rows", rows_NX, slots_T, pack_rows(latent_TC, rope_TR, layout))


_op = cpu_op(mutates=("rows_NX",))(_store_rows)
implement("store_rows", cuda.store_rows, "CUDA")


@lru_cache(maxsize=64)
def row_layout(layout: str, latent_dim: int, rope_dim: int) -> RowLayout:
    """The RowLayout of these widths; KernelError for a name or width that has none."""
    if layout not in ("mla_bf16", "mla_fp8", "mla_fp32"):
        raise KernelError(f"unknown KV layout {layout!r}, expected mla_bf16, mla_fp8 or mla_fp32")
    try:
        return RowLayout(layout, latent_dim, rope_dim)
    except ConfigError as error:
        raise KernelError(str(error)) from error


def pack_rows(latent_TC: Tensor, rope_TR: Tensor, layout: str) -> Tensor:
    """uint8 [T, row bytes] of float [T, C] and [T, R]."""
    if layout != "mla_fp8":
        dtype = torch.bfloat16 if layout == "mla_bf16" else torch.float32
        return torch.cat([latent_TC.to(dtype), rope_TR.to(dtype)], 1).view(torch.uint8)
    blocks = latent_TC.float().unflatten(1, (-1, FP8_BLOCK))
    payload, scale = fp8.quantize(blocks)
    rope = rope_TR.to(torch.bfloat16).contiguous()
    return torch.cat(
        [
            payload.flatten(1).view(torch.uint8),
            scale.flatten(1).view(torch.uint8),
            rope.view(torch.uint8),
        ],
        1,
    )


def unpack_rows(rows: Tensor, layout: str, latent_dim: int) -> tuple[Tensor, Tensor]:
    """Decodes rows, uint8 [..., row bytes]. Returns (latent float32 [..., C], rope float32 [..., R]).

    The rope width follows from the row's bytes. The two may be views of one tensor, and of
    `rows` if the layout is mla_fp32.
    """
    rows = rows.contiguous()
    if layout != "mla_fp8":
        dtype = torch.bfloat16 if layout == "mla_bf16" else torch.float32
        values = rows.view(dtype).float()
        return values[..., :latent_dim], values[..., latent_dim:]
    row = row_layout(layout, latent_dim, 0)
    payload = rows[..., :latent_dim].view(torch.float8_e4m3fn).unflatten(-1, (-1, FP8_BLOCK))
    scale = rows[..., row.scale_offset : row.rope_offset].contiguous().view(torch.float32)
    rope = rows[..., row.rope_offset :].contiguous().view(torch.bfloat16)
    return fp8.decode(payload, scale.unsqueeze(-1)).flatten(-2), rope.float()
