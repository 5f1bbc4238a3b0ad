"""CUDA side of store_rows, store_index_keys and copy_rows (kernels in csrc/rows.cu).

Registered under the names of the torch references, which check shapes and dtypes. Launched on
torch's current stream, without a synchronisation; nothing is allocated unless a tensor's last
dimension is strided, or copy_rows gets its rows on the CPU (they are then copied to the device).

What differs from the references: slots and rows out of range are skipped and do not raise.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..common.errors import KernelError
from .cuda_library import CudaLibrary, check_host, dense_rows, fields, stream_of

_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROW_KINDS = {"mla_bf16": 0, "mla_fp8": 1, "mla_fp32": 2}
_ROW_ALIGNMENT = {"mla_bf16": 2, "mla_fp8": 4, "mla_fp32": 4}
_COPY_WARPS = 16
"""Warps of a CTA of copy_rows_kernel."""
MAX_COPY_CTAS = 64
"""Several times what the link to the host needs (8), far from all of the device."""


class StoreRowsParams(ctypes.Structure):
    """Mirror of tidepool::StoreRowsParams (csrc/rows.cu)."""

    _fields_ = fields(
        pointers="latent rope slots rows",
        int64="latent_stride rope_stride row_stride num_rows num_tokens",
        int32="latent_dim rope_dim latent_float rope_float row_kind",
    )


class StoreKeysParams(ctypes.Structure):
    """Mirror of tidepool::StoreKeysParams (csrc/rows.cu)."""

    _fields_ = fields(
        pointers="key slots pages",
        int64="key_stride page_stride num_slots num_tokens",
        int32="key_dim key_float page_size is_fp8",
    )


class CopyRowsParams(ctypes.Structure):
    """Mirror of tidepool::CopyRowsParams (csrc/rows.cu)."""

    _fields_ = fields(
        pointers="source target source_rows target_rows",
        int64="source_layer_stride source_row_stride target_layer_stride target_row_stride "
        "num_source_rows num_target_rows row_bytes num_pairs num_layers",
        int32="",
    )


_LIBRARY = CudaLibrary("rows.cu", lambda library, _: library.tidepool_prepare())


def store_rows(
    latent_TC: Tensor, rope_TR: Tensor, slots_T: Tensor, rows_NX: Tensor, layout: str
) -> None:
    """tidepool::store_rows on CUDA; arguments of kernels/store_rows.py."""
    if not slots_T.numel():
        return
    latent_TC, rope_TR, slots_T = dense_rows(latent_TC), dense_rows(rope_TR), slots_T.contiguous()
    _check_rows("store_rows", "rows_NX", rows_NX, _ROW_ALIGNMENT[layout])
    params = StoreRowsParams(
        latent_TC.data_ptr(),
        rope_TR.data_ptr(),
        slots_T.data_ptr(),
        rows_NX.data_ptr(),
        latent_TC.stride(0),
        rope_TR.stride(0),
        rows_NX.stride(0),
        rows_NX.shape[0],
        slots_T.shape[0],
        latent_TC.shape[1],
        rope_TR.shape[1],
        _FLOATS[latent_TC.dtype],
        _FLOATS[rope_TR.dtype],
        _ROW_KINDS[layout],
    )
    device = slots_T.device
    library = _LIBRARY.on(device)
    code = library.tidepool_store_rows(ctypes.byref(params), stream_of(device))
    _LIBRARY.check("store_rows", code, params)


def store_index_keys(
    key_TD: Tensor, slots_T: Tensor, pages_PX: Tensor, page_size: int, layout: str
) -> None:
    """tidepool::store_index_keys on CUDA; arguments of kernels/store_index_keys.py."""
    if not slots_T.numel():
        return
    key_TD, slots_T = dense_rows(key_TD), slots_T.contiguous()
    is_fp8 = layout == "index_k"
    _check_rows("store_index_keys", "pages_PX", pages_PX, 4)
    if is_fp8 and page_size * key_TD.shape[1] % 4:
        raise KernelError(
            f"store_index_keys: {page_size} keys of {key_TD.shape[1]} bytes, expected a multiple "
            "of 4 bytes a page in front of its scales"
        )
    params = StoreKeysParams(
        key_TD.data_ptr(),
        slots_T.data_ptr(),
        pages_PX.data_ptr(),
        key_TD.stride(0),
        pages_PX.stride(0),
        pages_PX.shape[0] * page_size,
        slots_T.shape[0],
        key_TD.shape[1],
        _FLOATS[key_TD.dtype],
        page_size,
        is_fp8,
    )
    device = slots_T.device
    library = _LIBRARY.on(device)
    code = library.tidepool_store_index_keys(ctypes.byref(params), stream_of(device))
    _LIBRARY.check("store_index_keys", code, params)


def copy_rows(
    source_LNX: Tensor, target_LMX: Tensor, source_rows_T: Tensor, target_rows_T: Tensor
) -> None:
    """tidepool::copy_rows on CUDA; arguments of kernels/copy_rows.py.

    Either pool may be pinned host memory; the rows may be on the CPU.
    """
    op = "copy_rows"
    num_layers, num_source_rows, row_bytes = source_LNX.shape
    num_pairs = source_rows_T.shape[0]
    if not num_layers * num_pairs * row_bytes:
        return
    for name, pool in (("source_LNX", source_LNX), ("target_LMX", target_LMX)):
        check_host(op, name, pool)
        if row_bytes > 1 and pool.stride(2) != 1:
            raise KernelError(f"{op}: {name} {list(pool.shape)} has strides {pool.stride()}")
    device = next(
        tensor.device
        for tensor in (source_LNX, target_LMX, source_rows_T, target_rows_T)
        if tensor.device.type == "cuda"
    )
    source_rows_T, target_rows_T = (
        rows.to(device, non_blocking=True).contiguous() for rows in (source_rows_T, target_rows_T)
    )
    params = CopyRowsParams(
        source_LNX.data_ptr(),
        target_LMX.data_ptr(),
        source_rows_T.data_ptr(),
        target_rows_T.data_ptr(),
        source_LNX.stride(0),
        source_LNX.stride(1),
        target_LMX.stride(0),
        target_LMX.stride(1),
        num_source_rows,
        target_LMX.shape[1],
        row_bytes,
        num_pairs,
        num_layers,
    )
    library = _LIBRARY.on(device)
    num_ctas = min(MAX_COPY_CTAS, -(-num_layers * num_pairs // _COPY_WARPS))
    code = library.tidepool_copy_rows(ctypes.byref(params), num_ctas, stream_of(device))
    _LIBRARY.check(op, code, params)


def _check_rows(op: str, name: str, rows: Tensor, alignment: int) -> None:
    """Rows must be dense and start at multiples of `alignment` bytes."""
    if rows.stride(1) != 1 or (rows.data_ptr() | rows.stride(0)) % alignment:
        raise KernelError(
            f"{op}: {name} {list(rows.shape)} has strides {rows.stride()} at {rows.data_ptr():#x}, "
            f"expected dense rows at multiples of {alignment} bytes"
        )
