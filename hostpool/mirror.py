"""Pages of a device pool where the transfer can reach them: host memory with the same page ids.

The wire reads and writes host addresses. A pool on the CPU is its own mirror and copies are no-ops;
a pool on a GPU gets pinned host memory of the same size, and pages are gathered into it before they
are sent (prefill) or scattered from it after they have arrived (decode's index keys): straight from
GPU memory the engine reaches a fraction of the link. Copies run on the copier's stream and nobody
waits for them on the host: `to_host` is asked whether it has ended, `to_device` comes before what
the caller's stream does next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from ..common.errors import ConfigError
from ..common.wire import Region
from .memory import HostMemory, adopt_host, allocate_host


class Copier(Protocol):
    """What a mirror uses of kernels.copy_blocks.BlockCopier."""

    def copy(
        self, blocks: Sequence[tuple[int, int, int]], after: Any = None
    ) -> Callable[[], bool]: ...

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
        self._name = name
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

    def to_host(self, pages: Sequence[int], after: Any = None) -> Callable[[], bool]:
        """Copies pages of every layer device -> host, once `after` (a CUDA event) has happened.

        Returns what tells, without waiting, whether it has ended. Calls of both directions must not
        come from two threads at a time.
        """
        if self._memory is None or self._copier is None:
            return lambda: True
        return self._copier.copy(list(self._blocks(self._device_LPX, self.host_LPX, pages)), after)

    def to_device(self, pages: Sequence[int]) -> None:
        """Copies pages of every layer host -> device, before what the current stream does next."""
        if self._memory is not None and self._copier is not None and pages:
            self._copier.copy(list(self._blocks(self.host_LPX, self._device_LPX, pages)))
            self._copier.make_wait()

    def close(self) -> None:
        """Unpins. Nothing may be in flight."""
        if self._memory is not None:
            self._memory.close()

    def _region(self, memory_LPX: Tensor) -> Region:
        layers, pages, page_bytes = memory_LPX.shape
        return Region(self._name, memory_LPX.data_ptr(), layers, pages, page_bytes)

    def _blocks(
        self, source_LPX: Tensor, target_LPX: Tensor, pages: Sequence[int]
    ) -> Iterator[tuple[int, int, int]]:
        """Yields (source, target, bytes) of each layer's contiguous pages."""
        layers, num_pages, size = source_LPX.shape
        for layer in range(layers):
            first = layer * num_pages * size
            source, target = source_LPX.data_ptr() + first, target_LPX.data_ptr() + first
            for page, count in _runs(pages):
                yield source + page * size, target + page * size, count * size


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields (first page, number of pages) of contiguous stretches, in order."""
    start = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[end - 1] + 1:
            yield pages[start], end - start
            start = end
