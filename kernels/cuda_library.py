"""A CUDA source as a loaded library: built at first use, prepared once a device, errors as KernelError.

Every source exports `tidepool_error_string(code)` and `tidepool_prepare(...)`, which loads its
kernels so that later launches may be captured into a graph. Used by the cuda_*.py modules; any
thread may call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..common.errors import KernelError
from . import jit

Prepare = Callable[[ctypes.CDLL, torch.device], int]
"""Calls the library's tidepool_prepare on the current device; returns its cudaError_t."""

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class CudaLibrary:
    """Args: `source`, a file of csrc/; `prepare`, see Prepare."""

    def __init__(self, source: str, prepare: Prepare) -> None:
        self._source = jit.SOURCES / source
        self._prepare = prepare
        self._loaded: dict[int, ctypes.CDLL] = {}

    def on(self, device: torch.device) -> ctypes.CDLL:
        """The library, ready for `device`, which must be the current one."""
        index = torch.cuda.current_device() if device.index is None else device.index
        if torch.cuda.current_device() != index:
            raise KernelError(
                f"tensors on device {index} while device {torch.cuda.current_device()} is current"
            )
        found = self._loaded.get(index)
        if found is None:
            found = self._load(index)
            self._loaded[index] = found
        return found

    def check(self, op: str, code: int, params: ctypes.Structure) -> None:
        """Raises KernelError, with every size in `params`, unless `code` is cudaSuccess."""
        if code:
            sizes = ", ".join(
                f"{name}={getattr(params, name)}"
                for name, kind in params._fields_
                if kind is not _POINTER
            )
            library = next(iter(self._loaded.values()))
            raise KernelError(f"{op}: {library.tidepool_error_string(code).decode()} ({sizes})")

    def _load(self, index: int) -> ctypes.CDLL:
        capability = torch.cuda.get_device_capability(index)
        name = self._source.stem
        library = jit.load(jit.Library(name, self._source, capability))
        library.tidepool_error_string.restype = ctypes.c_char_p
        code = self._prepare(library, torch.device("cuda", index))
        if code:
            reason = library.tidepool_error_string(code).decode()
            raise KernelError(f"loading the {name} kernels on device {index}: {reason}")
        return library


def fields(*, pointers: str, int64: str, int32: str) -> list[tuple[str, Any]]:
    """Fields of a parameter struct: pointers, then 8-byte, then 4-byte integers."""
    return [
        *((name, _POINTER) for name in pointers.split()),
        *((name, _INT64) for name in int64.split()),
        *((name, _INT32) for name in int32.split()),
    ]


def stream_of(device: torch.device) -> ctypes.c_void_p:
    """torch's current stream on `device`."""
    return ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


@cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy if its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def check_host(op: str, name: str, tensor: Tensor) -> None:
    """Raises KernelError if a kernel could not reach the tensor's memory."""
    if tensor.device.type == "cpu" and not tensor.is_pinned():
        raise KernelError(
            f"{op}: {name} {list(tensor.shape)} is pageable memory, expected pinned and mapped"
        )
