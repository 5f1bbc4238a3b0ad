"""Which kernel attends: FlashMLA's wheel, our CUDA kernel, Triton, or the formula in torch ops.

The CUDA side of sparse_mla. A node calls `use` once at its start, before the first call; without it
the choice is "auto": the fastest in a measured table (data/sparse_mla.json, with its provenance) for
the layout, the heads and the batch, of those that can take the call. A backend asked for by name takes
every call it can; calls it cannot take (another width, a batch of none) go the way of "auto".

Nothing synchronises. What allocates: cuda and triton take partial results from torch's caching
allocator where rows are split, flashmla_sparse what its page says; inside a captured graph these come
from the graph's pool and stay where they are. "reference" is for comparing and not for graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ConfigError
from . import cuda_sparse_mla, flashmla, triton_sparse_mla
from .attention_table import Backend, ranking

CAN_TAKE: dict[str, Callable[..., bool]] = {
    "flashmla_sparse": flashmla.can_take,
    "cuda": cuda_sparse_mla.can_take,
    "triton": lambda *_: True,
}
LAUNCH: dict[str, Callable[..., None]] = {
    "flashmla_sparse": flashmla.launch,
    "cuda": lambda *args: cuda_sparse_mla.launch(None, *args),
    "triton": lambda *args: triton_sparse_mla.launch(None, *args),
    "reference": triton_sparse_mla.launch_reference,
}
_chosen: Backend = "auto"


def use(backend: Backend) -> None:
    """Sets the process's backend. Raises ConfigError where the machine cannot run it."""
    global _chosen  # noqa: PLW0603  (one choice a process, made before the first call)
    reason = ""
    if backend == "flashmla_sparse":
        reason = flashmla.missing()
    if backend in ("flashmla_sparse", "cuda") and not reason:
        major, minor = torch.cuda.get_device_capability()
        reason = "" if (major, minor) == (9, 0) else f"the GPU is sm_{major}{minor}, not sm_90"
    if reason:
        raise ConfigError(f"kernels.attention: {backend!r} cannot be used here: {reason}")
    _chosen = backend


def sparse_mla(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
    out_BHC: Tensor,
) -> None:
    """tidepool::sparse_mla on CUDA; arguments of kernels/sparse_mla.py."""
    tensors = (q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK)
    LAUNCH[backend_for(*tensors, layout, out_BHC)](*tensors, scale, layout, out_BHC)


def attend(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    scale: float,
    layout: str,
) -> Tensor:
    """The same into a new tensor: the one that FlashMLA's wheel allocates, where it is chosen."""
    tensors = (q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK)
    if backend_for(*tensors, layout, q_latent_BHC) == "flashmla_sparse":
        return flashmla.attend(*tensors, scale, layout)
    out_BHC = torch.empty_like(q_latent_BHC)
    sparse_mla(*tensors, scale, layout, out_BHC)
    return out_BHC


def backend_for(
    q_latent_BHC: Tensor,
    q_rope_BHR: Tensor,
    rows_NX: Tensor,
    row_idx_BK: Tensor,
    layout: str,
    out_BHC: Tensor,
) -> Backend:
    """What takes the call."""
    tensors = (q_latent_BHC, q_rope_BHR, rows_NX, row_idx_BK)
    backend: Backend = _chosen if row_idx_BK.numel() and rows_NX.shape[0] else "triton"
    if backend == "auto" or not CAN_TAKE.get(backend, _always)(*tensors, layout, out_BHC):
        ranked = ranking(layout, q_latent_BHC.shape[1], q_latent_BHC.shape[0])
        takes = (name for name in ranked if CAN_TAKE[name](*tensors, layout, out_BHC))
        backend = next(takes, "triton")
    return backend


def _always(*_: Any) -> bool:
    return True
