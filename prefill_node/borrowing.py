"""Memory of a decode node on this machine, mapped into a prefill node: borrowed from its keeper.

Only the parts that hold regions are mapped, not the node's journal. Made and closed on threads of
their own (transfer/shared_paths.py): pinning takes seconds for a large pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..common.wire import SharedMemory
from ..hostpool.keeper_link import KeeperLink
from ..hostpool.memory import HostMemory, adopt_host


class BorrowedMemory:
    """Implements transfer.shared_paths.Borrowed.

    Raises SegmentError if the keeper does not lend, KernelError if CUDA does not pin.
    """

    def __init__(self, shared: SharedMemory, device: torch.device) -> None:
        self._link = KeeperLink(Path(shared.keeper))
        self._memory: dict[str, HostMemory] = {}
        try:
            segment = self._link.borrow()
            try:
                for name in shared.regions:
                    data = segment.map_part(name)
                    self._memory[name] = adopt_host(
                        data, data.numel(), pin=device.type == "cuda", what=f"{name} of a peer"
                    )
            finally:
                segment.close()
        except BaseException:
            self.close()
            raise

    @property
    def parts(self) -> Mapping[str, tuple[int, int]]:
        return {
            name: (memory.data.data_ptr(), memory.data.numel())
            for name, memory in self._memory.items()
        }

    def close(self) -> None:
        """Gives back last: until then its keeper counts this process as one that may write.

        Waits some seconds where the keeper has ended.
        """
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()
        self._link.give_back()
        self._link.close()
