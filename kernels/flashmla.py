"""sparse_mla through FlashMLA's wheel (extra `kernels`: sgl-flash-mla), for Hopper.

Called by attention.py on torch's current stream. bf16 rows go to its sparse prefill kernel, one
query a token; FP8 rows (its 656-byte layout is ours) to its decode kernel, which splits rows. No
synchronisation. The wheel allocates its result from torch's caching allocator (inside a captured
graph: from the graph's pool, fixed): `attend` returns it, `launch` copies it; queries that are not the two ends of
one [B, H, 576] tensor are joined first. The decode kernel's schedule depends on the shapes alone: made
at the first call of a shape, on the device, and kept; one that is first seen during a capture is made
again at each replay.

What differs from the reference: -1 alone means no row; other rows out of range are not checked.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

LATENT, ROPE = 512, 64
HEADS = (64, 128)
_ROW_VALUES = LATENT + ROPE
_FP8_ROW_BYTES = 656
_FP8_PAGE = 64
"""Rows a page of the decode kernel's view; it has no meaning beyond that."""
_TOPK_MULTIPLE = 128


@cache
def missing() -> str:
    """Why the wheel cannot be used on this machine; empty if it can."""
    if find_spec("flash_mla") is None:
        return "the module flash_mla is not installed (extra `kernels`)"
    try:
        has_hopper = import_module("flash_mla").has_legacy()
    except (ImportError, OSError, RuntimeError) as error:
        return f"the module flash_mla cannot be loaded: {error}"
    return "" if has_hopper else "the module flash_mla was built without its Hopper kernels"


def can_take(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    layout: str,
    out_BHC: Tensor,
) -> bool:
    """Whether the wheel is there and has a kernel for the layout, shapes and dtypes."""
    num_heads, latent_dim = q_latent_BHC.shape[1:]
    return (
        layout in ("mla_bf16", "mla_fp8")
        and num_heads in HEADS
        and (latent_dim, q_rope_BHR.shape[2]) == (LATENT, ROPE)
        and q_latent_BHC.dtype == q_rope_BHR.dtype == out_BHC.dtype == torch.bfloat16
        and bool(row_idx_BK.numel() and rows_NX.shape[0])
        and not row_idx_BK.shape[1] % _TOPK_MULTIPLE
        and row_idx_BK.is_contiguous()
        and rows_NX.is_contiguous()
        and (layout == "mla_bf16" or not rows_NX.shape[0] % _FP8_PAGE)
        and torch.cuda.get_device_capability(out_BHC.device) == (9, 0)
        and not missing()
    )


def launch(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
    out_BHC: Tensor,
) -> None:
    """tidepool::sparse_mla for what `can_take` takes."""
    out_BHC.copy_(attend(q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK, scale, layout))


def attend(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
) -> Tensor:
    """The same, as the wheel's own tensor."""
    module = import_module("flash_mla")
    q_BHX = _joined(q_latent_BHC, q_rope_BHR)
    if layout == "mla_bf16":
        rows = rows_NX.view(torch.bfloat16).view(-1, 1, _ROW_VALUES)
        out_BHC, _, _ = module.flash_mla_sparse_fwd(
            q_BHX, rows, row_idx_BK[:, None], scale, LATENT, use_legacy=True, return_log2_lse=False
        )
        return cast(Tensor, out_BHC)
    schedule = _schedule(q_BHX, row_idx_BK.shape[1])
    out_B1HC, _ = module.flash_mla_with_kvcache(
        q_BHX[:, None],
        rows_NX.view(-1, _FP8_PAGE, 1, _FP8_ROW_BYTES),
        None,
        None,
        LATENT,
        schedule,
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=row_idx_BK[:, None],
        use_legacy=True,
    )
    return cast(Tensor, out_B1HC[:, 0])


def _joined(q_latent_BHC: Tensor, q_rope_BHR: Tensor) -> Tensor:
    """[B, H, 576]: the tensor that both are parts of, or a new one."""
    batch, num_heads, _ = q_latent_BHC.shape
    whole = (num_heads * _ROW_VALUES, _ROW_VALUES, 1)
    follows = q_rope_BHR.data_ptr() == q_latent_BHC.data_ptr() + 2 * LATENT
    if follows and q_latent_BHC.stride() == q_rope_BHR.stride() == whole:
        return q_latent_BHC.as_strided((batch, num_heads, _ROW_VALUES), whole)
    return torch.cat([q_latent_BHC, q_rope_BHR], -1)


_SCHEDULES: dict[tuple[torch.device, int, int, int], Any] = {}
"""Bounded: a batch bucket of a node each."""
_MAX_SCHEDULES = 1024


def _schedule(q_BHX: Tensor, topk: int) -> Any:
    key = (q_BHX.device, q_BHX.shape[0], q_BHX.shape[1], topk)
    found = _SCHEDULES.get(key)
    if found is None:
        found, _ = import_module("flash_mla").get_mla_metadata()
        if not torch.cuda.is_current_stream_capturing() and len(_SCHEDULES) < _MAX_SCHEDULES:
            _SCHEDULES[key] = found
    return found
