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

import torch

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

    def copy(self, blocks: Sequence[Block], after: Any = None) -> Callable[[], bool]:
        """Starts the copies; returns what tells whether they have ended.

        `after`: a torch.cuda.Event that must have happened before anything is read. KernelError if
        CUDA refuses.
        """
        if self._stream is None:
            for source, target, num_bytes in blocks:
                ctypes.memmove(target, source, num_bytes)
            return lambda: True
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            if blocks:
                self._launch(blocks)
            done = torch.cuda.Event()
            done.record(self._stream)
        query: Callable[[], bool] = done.query
        return query

    def make_wait(self) -> None:
        """What the current stream does from now on comes behind the copies started so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _launch(self, blocks: Sequence[Block]) -> None:
        large = [block for block in blocks if block[2] >= self._engine_bytes]
        small = (
            blocks if not large else [block for block in blocks if block[2] < self._engine_bytes]
        )
        library = _LIBRARY.on(self._device)
        stream = stream_of(self._device)
        if large:
            sources, targets, sizes = zip(*large, strict=True)
            count = len(large)
            pointers, lengths = ctypes.c_void_p * count, ctypes.c_size_t * count
            code = library.tidepool_copy_blocks_engine(
                pointers(*targets),
                pointers(*sources),
                lengths(*sizes),
                ctypes.c_size_t(count),
                stream,
            )
            _LIBRARY.check("copy_blocks", code, CopyBlocksParams(None, count, max(sizes)))
        if small:
            columns = list(zip(*small, strict=True))
            table = torch.tensor(columns, dtype=torch.int64).pin_memory()
            on_device = table.to(self._device, non_blocking=True)
            params = CopyBlocksParams(on_device.data_ptr(), len(small), max(columns[2]))
            code = library.tidepool_copy_blocks(ctypes.byref(params), self._num_ctas, stream)
            _LIBRARY.check("copy_blocks", code, params)
