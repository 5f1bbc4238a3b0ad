"""Pages of a device pool where the transfer can reach them: host memory with the same page ids.

The wire reads and writes host addresses. A pool on the CPU is its own mirror and copies are no-ops;
a pool on a GPU gets pinned host memory of the same size, and pages are gathered into it before they
are sent (prefill) or scattered from it after they have arrived (decode's index keys): straight from
GPU memory the engine reaches a fraction of the link. Used on a node's step thread; a copy has ended
when the call returns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..common.wire import Region
from .memory import adopt_host, allocate_host


class HostMirror:
    """Args:
    name: region name on the wire.
    device_LPX: uint8 [layers, pages, page bytes], the pool's memory.
    memory: uint8 of that size on the CPU to use for a device's mirror instead of allocating.

    Attributes:
        host_LPX: the same shape in host memory; `device_LPX` itself if that is on the CPU.
    """

    def __init__(
        self,
        name: Literal["kv", "index"],
        device_LPX: Tensor,
        *,
        memory: Tensor | None = None,
    ) -> None:
        self._name = name
        self._device_LPX = device_LPX
        if device_LPX.device.type == "cpu":
            self._memory = None
            self.host_LPX = device_LPX
        else:
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
        layers, pages, page_bytes = self.host_LPX.shape
        return Region(self._name, self.host_LPX.data_ptr(), layers, pages, page_bytes)

    def to_host(self, pages: list[int]) -> None:
        """Copies pages of every layer device -> host."""
        if self._memory is not None and pages:
            index = torch.tensor(pages)
            gathered = self._device_LPX[:, index.to(self._device_LPX.device)]
            self.host_LPX[:, index] = gathered.cpu()

    def to_device(self, pages: list[int]) -> None:
        """Copies pages of every layer host -> device."""
        if self._memory is not None and pages:
            index = torch.tensor(pages)
            arrived = self.host_LPX[:, index].to(self._device_LPX.device)
            self._device_LPX[:, index.to(self._device_LPX.device)] = arrived

    def close(self) -> None:
        """Unpins. Nothing may be in flight."""
        if self._memory is not None:
            self._memory.close()
