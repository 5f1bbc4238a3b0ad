"""Multi-head latent attention over the selected rows, in the absorbed form.

Called once a layer, with rows of the paged device pool (prefill) or of the seats (decode). Math is
float32 whatever the layout. Only selected rows are read: a NaN in any other row cannot be seen.

Suffixes: B tokens, H heads, C latent width, R rope width, K selected rows, N rows, X bytes of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import cuda
from .registry import BYTES, FLOATS, INT32, Arguments, cpu_op, implement
from .row_bytes import as_words, check_range
from .store_rows import row_layout, unpack_rows

_BLOCK_BYTES = 4 << 20
"""Decoded rows at a time: what stays in the cache between the two products."""


def sparse_mla(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
    out_BHC: Tensor,
) -> None:
    """out = softmax(scale * (q_latent . latent + q_rope . rope)) . latent over the rows of row_idx.

    Args:
        q_latent_BHC: float32, bfloat16 or float16 [B, H, C].
        q_rope_BHR: float, same kinds [B, H, R].
        rows_NX: uint8 [N, row bytes], KV rows of one layer.
        row_idx_BK: int32 [B, K], rows to attend to; -1 = none, anywhere. A row with none at all
            gives zeros. A row that occurs twice counts twice.
        scale: softmax scale.
        layout: name of a KvLayout.
        out_BHC: float [B, H, C]; written.

    Raises KernelError on mismatching tensors or rows outside [-1, N).
    """
    arguments = _checked(q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK, layout)
    arguments.check("out_BHC", out_BHC, FLOATS, "B", "H", "C")
    _op(q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK, scale, layout, out_BHC)


def attend(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
) -> Tensor:
    """`sparse_mla` into a new tensor [B, H, C] of the dtype of `q_latent_BHC`, in any order of memory.

    For callers that need no tensor of their own: a backend that allocates its result hands that over.
    """
    if q_latent_BHC.is_cuda:
        _checked(q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK, layout)
        found: Tensor = cuda.attend(q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK, scale, layout)
        return found
    out_BHC = torch.empty_like(q_latent_BHC)
    sparse_mla(q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK, scale, layout, out_BHC)
    return out_BHC


def _checked(
    q_latent_BHC: Tensor, q_rope_BHR: Tensor, rows_NX: Tensor, row_idx_BK: Tensor, layout: str
) -> Arguments:
    row = row_layout(layout, q_latent_BHC.shape[-1], q_rope_BHR.shape[-1])
    arguments = Arguments("sparse_mla")
    arguments.check("q_latent_BHC", q_latent_BHC, FLOATS, "B", "H", "C")
    arguments.check("q_rope_BHR", q_rope_BHR, FLOATS, "B", "H", "R")
    arguments.check("rows_NX", rows_NX, BYTES, None, row.row_bytes)
    arguments.check("row_idx_BK", row_idx_BK, INT32, "B", None)
    return arguments


def _sparse_mla(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
    out_BHC: Tensor,
) -> None:
    row_idx_BK = _without_empty_columns(row_idx_BK)
    num_tokens, k = row_idx_BK.shape
    if not num_tokens or not k:
        out_BHC.zero_()
        return
    has_holes = check_range("sparse_mla", "row_idx", row_idx_BK, rows_NX.shape[0]) < 0
    latent_dim = q_latent_BHC.shape[-1]
    if layout == "mla_fp8":
        rows_NX, row_idx_BK, layout = _decode_once(rows_NX, row_idx_BK, layout, latent_dim)
    q_BHX = torch.cat([q_latent_BHC, q_rope_BHR], -1).float().mul_(scale)
    block = max(1, _BLOCK_BYTES // (4 * k * q_BHX.shape[-1]))
    for start in range(0, num_tokens, block):
        idx_BK = row_idx_BK[start : start + block]
        is_none = (idx_BK < 0) if has_holes else None
        latent_BKC, rope_BKR = _gather(rows_NX, idx_BK, is_none, layout, latent_dim)
        out_BHC[start : start + block] = _attend(
            q_BHX[start : start + block], latent_BKC, rope_BKR, is_none
        )


_op = cpu_op(mutates=("out_BHC",))(_sparse_mla)
implement("sparse_mla", cuda.sparse_mla, "CUDA")


def _without_empty_columns(row_idx_BK: Tensor) -> Tensor:
    """Drops the columns behind the last one in which any row selects something."""
    used = np.flatnonzero((row_idx_BK.numpy() >= 0).any(0))
    return row_idx_BK[:, : int(used[-1]) + 1 if used.size else 0]


def _decode_once(
    rows_NX: Tensor, row_idx_BK: Tensor, layout: str, latent_dim: int
) -> tuple[Tensor, Tensor, str]:
    """The same rows and indices as mla_fp32, if the selections overlap enough to be worth it.

    Tokens of a prompt's chunk select mostly the same rows. Only for a range of rows at most half
    as long as the indices are many, so the copy is smaller than what is gathered anyway.
    """
    highest = int(row_idx_BK.max())
    lowest = int(row_idx_BK.masked_fill(row_idx_BK < 0, highest).min())
    if 2 * (highest + 1 - lowest) > row_idx_BK.numel():
        return rows_NX, row_idx_BK, layout
    decoded = torch.cat(unpack_rows(rows_NX[lowest : highest + 1], layout, latent_dim), -1)
    shifted = torch.where(row_idx_BK < 0, -1, row_idx_BK - lowest)
    return decoded.view(torch.uint8), shifted, "mla_fp32"


def _gather(
    rows_NX: Tensor, idx_BK: Tensor, is_none: Tensor | None, layout: str, latent_dim: int
) -> tuple[Tensor, Tensor]:
    """Decoded rows (latent BKC, rope BKR); where there is none, zeros and not row 0's values."""
    flat = idx_BK.reshape(-1)
    if is_none is not None:
        flat = flat.clamp(min=0)
    (words,) = as_words(rows_NX)
    picked = words.index_select(0, flat).view(torch.uint8)
    if is_none is not None:
        picked[is_none.reshape(-1)] = 0
    return unpack_rows(picked.view(*idx_BK.shape, -1), layout, latent_dim)


def _attend(q_BHX: Tensor, latent_BKC: Tensor, rope_BKR: Tensor, is_none: Tensor | None) -> Tensor:
    latent_dim = latent_BKC.shape[-1]
    logits_BHK = torch.bmm(q_BHX[..., :latent_dim], latent_BKC.transpose(1, 2))
    logits_BHK.baddbmm_(q_BHX[..., latent_dim:], rope_BKR.transpose(1, 2))
    if is_none is not None:
        logits_BHK.masked_fill_(is_none[:, None], float("-inf"))
    out_BHC = torch.bmm(logits_BHK.softmax(-1), latent_BKC)
    if is_none is not None:
        out_BHC.masked_fill_(is_none.all(1)[:, None, None], 0.0)
    return out_BHC
