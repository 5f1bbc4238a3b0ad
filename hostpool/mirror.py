"""Pages of a device pool where the transfer can reach them: host memory with the same page ids.

The wire reads and writes host addresses. A pool on the CPU is its own mirror and copies are no-ops;
a pool on a GPU gets pinned host memory of the same size, and pages are gathered into it before they
are sent (prefill) or scattered from it after they have arrived (decode's index keys): straight from
GPU memory the engine reaches a fraction of the link. Copies run on the copier's stream and nobody
waits for them on the host: `to_host` is asked whether it has ended, `to_device` comes before what
the caller's stream does next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..common.errors import ConfigError
from ..common.wire import Region
from .memory import HostMemory, adopt_host, allocate_host


class Copier(Protocol):
    """What a mirror uses of kernels.copy_blocks.BlockCopier."""

    def copy(self, blocks: NDArray[np.int64], after: Any = None) -> Callable[[], bool]: ...

    def make_wait(self) -> None: ...


class HostMirror:
    """Args:
    name: region name on the wire.
    device_LPX: uint8 [layers, pages, page bytes], contiguous: the pool's memory.
    copier: copies between the two; not used on the CPU.
    memory: uint8 of that size on the CPU to use for a device's mirror instead of allocating.

    Attributes:
        host_LPX: the same shape in host memory; `device_LPX` itself if that is on the CPU.
    """

    def __init__(
        self,
        name: Literal["kv", "index"],
        device_LPX: Tensor,
        copier: Copier | None = None,
        *,
        memory: Tensor | None = None,
    ) -> None:
        self.name = name
        self._device_LPX = device_LPX
        self._memory: HostMemory | None = None
        self._copier = copier
        self.host_LPX = device_LPX
        if device_LPX.device.type != "cpu":
            if copier is None:
                raise ConfigError(f"the {name} pool is on a device: its mirror needs a copier")
            what, num_bytes = f"host mirror of the {name} pool", device_LPX.numel()
            self._memory = (
                allocate_host(num_bytes, pin=True, what=what)
                if memory is None
                else adopt_host(memory, num_bytes, pin=True, what=what)
            )
            self.host_LPX = self._memory.data.view(device_LPX.shape)

    @property
    def is_device(self) -> bool:
        """The mirror is the pool's own memory."""
        return self._memory is None

    def region(self) -> Region:
        """What peers are told and the transport registers."""
        return self._region(self.host_LPX)

    def device_region(self) -> Region:
        """The pool itself: for copies that start on the device."""
        return self._region(self._device_LPX)

    def to_host(
        self, pages: Sequence[int], after: Any = None, layers: range | None = None
    ) -> Callable[[], bool]:
        """Copies pages of `layers` (default: all) device -> host, once `after` has happened.

        `after`: a CUDA event.

        Returns what tells, without waiting, whether it has ended. Calls of both directions must not
        come from two threads at a time.
        """
        if self._memory is None or self._copier is None or not pages:
            return lambda: True
        blocks = self._blocks(self._device_LPX, self.host_LPX, pages, layers)
        return self._copier.copy(blocks, after)

    def to_device(self, pages: Sequence[int]) -> None:
        """Copies pages of every layer host -> device, before what the current stream does next."""
        self.start_to_device(pages)
        if self._copier is not None and not self.is_device:
            self._copier.make_wait()

    def start_to_device(self, pages: Sequence[int]) -> Callable[[], bool]:
        """As `to_device`, but nothing waits: returns what tells whether the copy has ended."""
        if self._memory is None or self._copier is None or not pages:
            return lambda: True
        return self._copier.copy(self._blocks(self.host_LPX, self._device_LPX, pages, None))

    def close(self) -> None:
        """Unpins. Nothing may be in flight."""
        if self._memory is not None:
            self._memory.close()

    def _region(self, memory_LPX: Tensor) -> Region:
        layers, pages, page_bytes = memory_LPX.shape
        return Region(self.name, memory_LPX.data_ptr(), layers, pages, page_bytes)

    def _blocks(
        self, source_LPX: Tensor, target_LPX: Tensor, pages: Sequence[int], layers: range | None
    ) -> NDArray[np.int64]:
        """(source, target, bytes) of each layer's contiguous pages: int64 [layers * runs, 3]."""
        num_layers, num_pages, size = source_LPX.shape
        chosen = range(num_layers) if layers is None else layers
        in_order = np.array(pages, dtype=np.int64)
        starts = np.concatenate(([0], np.flatnonzero(np.diff(in_order) != 1) + 1))
        counts = np.diff(np.append(starts, len(in_order)))
        numbers = np.arange(chosen.start, chosen.stop, dtype=np.int64)
        offsets = numbers[:, None] * (num_pages * size) + in_order[starts] * size
        blocks = np.empty((*offsets.shape, 3), dtype=np.int64)
        blocks[..., 0] = offsets + source_LPX.data_ptr()
        blocks[..., 1] = offsets + target_LPX.data_ptr()
        blocks[..., 2] = counts * size
        return blocks.reshape(-1, 3)
