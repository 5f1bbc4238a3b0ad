"""CUDA side of resolve, swap_in and load_cache_to_device_buffer (kernels in csrc/swap_in.cu).

Registered under the names of the torch references, which check shapes and dtypes; here the rest is
checked (contiguity, limits, pinned host memory) and the kernel is launched on torch's current
stream. No allocation and no synchronisation, so every op may be captured into a CUDA graph once
`load` has run on the device. Ops keep no state; any thread may call them.

Differences to the references, which a caller may not rely on: entries of a plan behind num_misses
are left as they were; rows out of range are skipped; seats must be distinct (not checked); a seat past S is flagged, FAULT_SEAT, and treated as padded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import KernelError
from ..common.layouts import DeepSeekV4Layout
from . import jit

FAULT_SEAT = 8
"""Bit in fault_B, set on CUDA only: the row's seat is not below S."""
MAX_TOPK = 2048
MAX_HOT_ROWS = 16384
MAX_BATCH = 512
PLAIN_CTAS = 4
"""Of a copy for another layer of the group, which has a layer's time: with 16 the other kernels of the step
wait for it (docs/kernels.md, "Beside the step"), with 2 it is late."""
SLICED_CTAS = 128
SLICED_BATCH = 48
SWEEP_BATCH = 24
SWEEP_WARPS = 4
COPY_WARPS = 16
EAGER_BATCH = 32
_POINTERS = 14


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class ResolveParams(ctypes.Structure):
    """Mirror of tidepool::ResolveParams (csrc/params.h)."""

    _fields_ = _fields(
        ctypes.c_void_p,
        "topk_idx seq_lens seats page_table ring_start position_of_slot slot_of_position "
        "last_use step hot_idx miss_host_slot miss_device_row num_misses fault scores",
    ) + _fields(
        ctypes.c_int32,
        "batch topk num_seats hot_rows num_positions num_pages page_shift ring_rows "
        "seq_lens_are_64 seats_are_64 rank_shift copy_warps sort_misses is_eager "
        "num_scores score_stride",
    )


class CopyParams(ctypes.Structure):
    """Mirror of tidepool::CopyParams (csrc/params.h)."""

    _fields_ = (
        _fields(ctypes.c_void_p, "host device")
        + _fields(
            ctypes.c_int64,
            "num_host_rows num_device_rows value_bytes page_bytes scale_offset",
        )
        + _fields(ctypes.c_int32, "scale_bytes page_shift")
    )


class PlanParams(ctypes.Structure):
    """Mirror of tidepool::PlanParams (csrc/params.h)."""

    _fields_ = _fields(ctypes.c_void_p, "miss_host_slot miss_device_row num_misses") + _fields(
        ctypes.c_int32, "batch topk"
    )


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a launch is spread; None: chosen from the shapes.

    Attributes:
        num_ranks: CTAs a batch row of `swap_in`: 1, 2, 4, 8 or 16.
        copy_warps: warps of such a CTA that copy, 1 to 16.
        sort_misses: whether plans are listed by ascending host slot.
        copy_ctas: CTAs of the copy kernel.
        is_sliced: the copy kernel gives each CTA a slice of the host rows; needs a sorted plan.
        is_eager: resolve loads what misses need before it knows of any: quicker at small batch.
        is_dependent: the copy kernel may be set up while its predecessor runs.
    """

    num_ranks: int | None = None
    copy_warps: int | None = None
    sort_misses: bool | None = None
    copy_ctas: int | None = None
    is_sliced: bool | None = None
    is_eager: bool | None = None
    is_dependent: bool | None = None


DEFAULT_TUNING = Tuning()


def load(device: torch.device, cache_dir: Path | None = None) -> None:
    """Builds (if need be) and loads the kernels for `device`; a CUDA op does it at its first call.

    Raises KernelError where there is no nvcc or the build fails.
    """
    _library(_index(device), cache_dir)


def resolve(*args: Any) -> None:
    """tidepool::resolve on CUDA; arguments of kernels/resolve.py, in its order."""
    *args, scores_BC = _filled(args, False, None, count=18)
    launch_resolve(DEFAULT_TUNING, *args, scores_BC=scores_BC)


def swap_in(*args: Any) -> None:
    """tidepool::swap_in on CUDA; arguments of kernels/swap_in.py, in its order."""
    *args, scores_BC = _filled(args, False, None, count=20)
    launch_swap_in(DEFAULT_TUNING, *args, scores_BC=scores_BC)


def load_cache_to_device_buffer(*args: Any) -> None:
    """tidepool::load_cache_to_device_buffer on CUDA; arguments of kernels/swap_in.py."""
    launch_copy(DEFAULT_TUNING, *_filled(args, False, count=6))


def _filled(args: tuple[Any, ...], *defaults: Any, count: int) -> tuple[Any, ...]:
    """All `count` arguments: the dispatcher leaves out those at the end that have their default."""
    left_out = count - len(args)
    return (*args, *defaults[len(defaults) - left_out :]) if left_out else args


def load_v4_cache_to_device_buffer(
    host_pages_PX: Tensor,
    device_pages_QX: Tensor,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
    page_size: int,
) -> None:
    """tidepool::load_v4_cache_to_device_buffer on CUDA; arguments of kernels/swap_in_v4.py."""
    op = "load_v4_cache_to_device_buffer"
    rows = _paged_rows(op, host_pages_PX, device_pages_QX, page_size)
    _launch_plan(
        op, Tuning(is_sliced=False), rows, miss_host_slot_BK, miss_device_row_BK, num_misses_B
    )


def launch_resolve(tuning: Tuning, *args: Any, scores_BC: Tensor | None = None) -> None:
    *args, is_scattered = args
    params, device = _resolve_params("resolve", tuning, args, 1, is_scattered, scores_BC)
    if params.batch:
        library = _library(_index(device), None)
        code = library.tidepool_resolve(ctypes.byref(params), _stream(device))
        _raise_if("resolve", library, code, params)


def launch_swap_in(tuning: Tuning, *args: Any, scores_BC: Tensor | None = None) -> None:
    *tensors, host_rows_NX, device_rows_MX, page_size, ring_rows, is_scattered = args
    resolve_args = (*tensors, page_size, ring_rows)
    batch = tensors[0].shape[0]
    if tuning.num_ranks is None and is_sliced(batch, host_rows_NX, is_scattered):
        launch_resolve(tuning, *resolve_args, is_scattered, scores_BC=scores_BC)
        launch_copy(tuning, host_rows_NX, device_rows_MX, *tensors[10:13], is_scattered)
        return
    num_ranks = tuning.num_ranks or choose_ranks(batch, tensors[0].device)
    if tuning.sort_misses is None and sweeps(batch, host_rows_NX, is_scattered):
        tuning = replace(tuning, sort_misses=True, copy_warps=tuning.copy_warps or SWEEP_WARPS)
    params, device = _resolve_params("swap_in", tuning, resolve_args, num_ranks, False, scores_BC)
    rows = _plain_rows("swap_in", host_rows_NX, device_rows_MX)
    if params.batch:
        library = _library(_index(device), None)
        code = library.tidepool_swap_in(ctypes.byref(params), ctypes.byref(rows), _stream(device))
        _raise_if("swap_in", library, code, params)


def launch_copy(
    tuning: Tuning,
    host_rows_NX: Tensor,
    device_rows_MX: Tensor,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
    is_scattered: bool,
) -> None:
    op = "load_cache_to_device_buffer"
    rows = _plain_rows(op, host_rows_NX, device_rows_MX)
    if tuning.is_sliced is None:
        sliced = is_sliced(num_misses_B.shape[0], host_rows_NX, is_scattered)
        tuning = replace(tuning, is_sliced=sliced)
    _launch_plan(op, tuning, rows, miss_host_slot_BK, miss_device_row_BK, num_misses_B)


def _launch_plan(
    op: str,
    tuning: Tuning,
    rows: CopyParams,
    miss_host_slot_BK: Tensor,
    miss_device_row_BK: Tensor,
    num_misses_B: Tensor,
) -> None:
    batch, topk = miss_host_slot_BK.shape
    _check_contiguous(
        op,
        miss_host_slot_BK=miss_host_slot_BK,
        miss_device_row_BK=miss_device_row_BK,
        num_misses_B=num_misses_B,
    )
    if batch > MAX_BATCH:
        raise KernelError(f"{op}: {batch} batch rows, expected at most {MAX_BATCH}")
    if not batch:
        return
    plan = PlanParams(
        miss_host_slot_BK.data_ptr(),
        miss_device_row_BK.data_ptr(),
        num_misses_B.data_ptr(),
        batch,
        topk,
    )
    device = num_misses_B.device
    library = _library(_index(device), None)
    # Set up early, CTAs land where room is left, not evenly: worth it only while the launch counts.
    is_dependent = batch < 32 if tuning.is_dependent is None else tuning.is_dependent
    code = library.tidepool_copy_plan(
        ctypes.byref(plan),
        ctypes.byref(rows),
        tuning.copy_ctas or (SLICED_CTAS if tuning.is_sliced else PLAIN_CTAS),
        int(bool(tuning.is_sliced)),
        int(_has_clusters(device) and is_dependent),
        _stream(device),
    )
    _raise_if(op, library, code, plan, rows)


def _resolve_params(
    op: str,
    tuning: Tuning,
    args: Sequence[Any],
    num_ranks: int,
    is_scattered: bool,
    scores_BC: Tensor | None,
) -> tuple[ResolveParams, torch.device]:
    """`args`: what resolve takes, without is_scattered."""
    *tensors, page_size, ring_rows = args
    topk_idx_BK, seq_lens_B, seats_B, page_table_SP = tensors[:4]
    position_of_slot_SH, slot_of_position_SC = tensors[5:7]
    batch, topk = topk_idx_BK.shape
    num_seats, hot_rows = position_of_slot_SH.shape
    if len(tensors) != _POINTERS:
        raise KernelError(f"{op}: {len(tensors)} tensors, expected {_POINTERS}")
    if not (1 <= topk <= MAX_TOPK and 1 <= hot_rows <= MAX_HOT_ROWS and batch <= MAX_BATCH):
        raise KernelError(
            f"{op}: batch {batch}, top-k {topk}, hot rows {hot_rows}; expected at most "
            f"{MAX_BATCH}, 1 to {MAX_TOPK}, 1 to {MAX_HOT_ROWS}"
        )
    if page_size & (page_size - 1) or not page_table_SP.shape[1]:
        raise KernelError(
            f"{op}: page size {page_size}, page table {list(page_table_SP.shape)}; expected a power "
            "of two, and at least one page"
        )
    if slot_of_position_SC.dtype != torch.int32:
        raise KernelError(
            f"{op}: slot_of_position_SC is {slot_of_position_SC.dtype}, expected torch.int32"
        )
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise KernelError(f"{op}: {list(tensor.shape)} with strides {tensor.stride()}")
    num_scores = score_stride = 0
    if scores_BC is not None:
        num_scores, score_stride = scores_BC.shape[1], scores_BC.stride(0)
        if not num_scores or scores_BC.stride(1) != 1:
            raise KernelError(
                f"{op}: scores_BC {list(scores_BC.shape)} with strides {scores_BC.stride()}, "
                "expected at least one score a row, side by side"
            )
    device = topk_idx_BK.device
    params = ResolveParams(
        *[tensor.data_ptr() for tensor in tensors],
        None if scores_BC is None else scores_BC.data_ptr(),
        batch,
        topk,
        num_seats,
        hot_rows,
        slot_of_position_SC.shape[1],
        page_table_SP.shape[1],
        page_size.bit_length() - 1,
        ring_rows,
        seq_lens_B.dtype == torch.int64,
        seats_B.dtype == torch.int64,
        num_ranks.bit_length() - 1,
        tuning.copy_warps or COPY_WARPS,
        is_scattered if tuning.sort_misses is None else tuning.sort_misses,
        batch <= EAGER_BATCH if tuning.is_eager is None else tuning.is_eager,
        num_scores,
        score_stride,
    )
    return params, device


def choose_ranks(batch: int, device: torch.device) -> int:
    """CTAs a row of `swap_in`: up to 64 in all keep the link busy, more only cost their start."""
    if not _has_clusters(device):
        return 1
    return 16 if batch <= 4 else 8 if batch <= 8 else 4 if batch <= 16 else 2 if batch <= 32 else 1


def is_sliced(batch: int, host_rows_NX: Tensor, is_scattered: bool) -> bool:
    """Whether a launch's rows span more than the link's address translation holds at one time."""
    return is_scattered and batch >= SLICED_BATCH and host_rows_NX.nbytes > 1 << 30


def sweeps(batch: int, host_rows_NX: Tensor, is_scattered: bool) -> bool:
    """Whether rows in address order, few at a time, beat many at once: scattered, middle batches."""
    return is_scattered and batch >= SWEEP_BATCH and host_rows_NX.nbytes > 1 << 30


def _plain_rows(op: str, host_rows_NX: Tensor, device_rows_MX: Tensor) -> CopyParams:
    _check_pinned(op, host_rows_NX)
    _check_contiguous(op, host_rows_NX=host_rows_NX, device_rows_MX=device_rows_MX)
    num_host_rows, row_bytes = host_rows_NX.shape
    return CopyParams(
        host_rows_NX.data_ptr(),
        device_rows_MX.data_ptr(),
        num_host_rows,
        device_rows_MX.shape[0],
        row_bytes,
    )


def _paged_rows(
    op: str, host_pages_PX: Tensor, device_pages_QX: Tensor, page_size: int
) -> CopyParams:
    _check_pinned(op, host_pages_PX)
    _check_contiguous(op, host_pages_PX=host_pages_PX, device_pages_QX=device_pages_QX)
    layout = DeepSeekV4Layout()
    if page_size < 1 or page_size & (page_size - 1):
        raise KernelError(f"{op}: page size {page_size}, expected a power of two")
    return CopyParams(
        host_pages_PX.data_ptr(),
        device_pages_QX.data_ptr(),
        host_pages_PX.shape[0] * page_size,
        device_pages_QX.shape[0] * page_size,
        layout.value_bytes,
        layout.page_bytes(page_size),
        layout.scale_offset(page_size),
        layout.scale_bytes,
        page_size.bit_length() - 1,
    )


def _check_pinned(op: str, host: Tensor) -> None:
    if host.device.type == "cpu" and not host.is_pinned():
        raise KernelError(
            f"{op}: host rows {list(host.shape)} are pageable memory, expected pinned and mapped"
        )


def _check_contiguous(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise KernelError(
                f"{op}: {name} {list(tensor.shape)} has strides {tensor.stride()}, "
                "expected a contiguous tensor"
            )


def _raise_if(op: str, library: ctypes.CDLL, code: int, *params: ctypes.Structure) -> None:
    if code:
        sizes = ", ".join(
            f"{name}={getattr(struct, name)}"
            for struct in params
            for name, kind in struct._fields_
            if kind is not ctypes.c_void_p
        )
        raise KernelError(f"{op}: {library.tidepool_error_string(code).decode()} ({sizes})")


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


@cache
def _has_clusters(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


_LIBRARIES: dict[int, ctypes.CDLL] = {}


def _library(index: int, cache_dir: Path | None) -> ctypes.CDLL:
    found = _LIBRARIES.get(index)
    if found is None:
        capability = torch.cuda.get_device_capability(index)
        found = jit.load(jit.Library("swap_in", jit.SOURCES / "swap_in.cu", capability), cache_dir)
        found.tidepool_error_string.restype = ctypes.c_char_p
        with torch.cuda.device(index):
            code = found.tidepool_prepare(int(capability >= (9, 0)))
        if code:
            reason = found.tidepool_error_string(code).decode()
            raise KernelError(f"loading the swap-in kernels on device {index}: {reason}")
        _LIBRARIES[index] = found
    if torch.cuda.current_device() != index:
        raise KernelError(
            f"tensors on device {index} while device {torch.cuda.current_device()} is current"
        )
    return found
