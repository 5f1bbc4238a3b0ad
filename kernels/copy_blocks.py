"""Copies blocks of memory by address on a stream of its own: what a transfer plans, a GPU does.

    copier = BlockCopier(device)
    is_done = copier.copy(blocks, after)    # after: a CUDA event, or None
    ...
    if is_done(): ...

Addresses may be of the device, of a peer that is mapped, or of pinned host memory. Nobody waits: the
copy begins when `after` has happened, and `is_done` asks an event. Any thread may call, one at a
time; on a CPU device the copy is made at once, by the caller.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .cuda_library import CudaLibrary, fields, stream_of

Block = tuple[int, int, int]
"""(source address, target address, bytes)."""

ENGINE_BYTES = 512 * 1024
"""From this size on the copy engine is as fast as the kernel, and takes no processor from the model."""
NUM_CTAS = 32
"""Of the kernel: several times what the link to the host needs."""

_LIBRARY = CudaLibrary("blocks.cu", lambda library, _: library.tidepool_prepare())


class CopyBlocksParams(ctypes.Structure):
    """Mirror of tidepool::CopyBlocksParams (csrc/blocks.cu)."""

    _fields_ = fields(pointers="blocks", int64="num_blocks max_bytes", int32="")


class BlockCopier:
    """See the module.

    Args:
        device: whose stream copies.
        engine_bytes: bytes of a block from which the copy engine is used.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        engine_bytes: int = ENGINE_BYTES,
        num_ctas: int = NUM_CTAS,
    ) -> None:
        self._device = device
        self._engine_bytes = engine_bytes
        self._num_ctas = num_ctas
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, blocks: Sequence[Block] | NDArray[np.int64], after: Any = None
    ) -> Callable[[], bool]:
        """Starts the copies; returns what tells whether they have ended.

        `blocks`: (source, target, bytes) each; as an array: int64 [blocks, 3].

        `after`: a torch.cuda.Event that must have happened before anything is read. KernelError if
        CUDA refuses.
        """
        table = np.asarray(blocks, dtype=np.int64).reshape(-1, 3)
        if self._stream is None:
            for source, target, num_bytes in table.tolist():
                ctypes.memmove(target, source, num_bytes)
            return lambda: True
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            if len(table):
                self._launch(table)
            done = torch.cuda.Event()
            done.record(self._stream)
        query: Callable[[], bool] = done.query
        return query

    def make_wait(self) -> None:
        """What the current stream does from now on comes behind the copies started so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _launch(self, table: NDArray[np.int64]) -> None:
        is_large = table[:, 2] >= self._engine_bytes
        library = _LIBRARY.on(self._device)
        stream = stream_of(self._device)
        large, small = table[is_large], table[~is_large]
        if len(large):
            sources, targets, sizes = np.ascontiguousarray(large.T)
            code = library.tidepool_copy_blocks_engine(
                ctypes.c_void_p(targets.ctypes.data),
                ctypes.c_void_p(sources.ctypes.data),
                ctypes.c_void_p(sizes.ctypes.data),
                ctypes.c_size_t(len(large)),
                stream,
            )
            params = CopyBlocksParams(None, len(large), int(sizes.max()))
            _LIBRARY.check("copy_blocks", code, params)
        if len(small):
            columns = torch.from_numpy(np.ascontiguousarray(small.T)).pin_memory()
            on_device = columns.to(self._device, non_blocking=True)
            params = CopyBlocksParams(on_device.data_ptr(), len(small), int(small[:, 2].max()))
            code = library.tidepool_copy_blocks(ctypes.byref(params), self._num_ctas, stream)
            _LIBRARY.check("copy_blocks", code, params)
