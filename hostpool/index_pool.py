"""Indexer keys of every sequence, paged on the compute device, for layers with their own indexer.

`data` is uint8 [index layers, pages, page bytes]; the layout inside a page is common/layouts.py's.
Owned by a node's step thread; a peer writes into its mirror, under a lease. Its pages are
allocated apart from the host pool's: the two are different resources with different limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.layouts import KvGeometry
from .memory import HostMemory, adopt_host, allocate, poison_pages
from .mirror import Copier, HostMirror
from .pages import PageAllocator


class IndexPool:
    """`num_pages` pages of `geometry.index` for each index layer. ConfigError as HostPool.

    Args:
        memory: uint8 [`bytes_needed`] on the CPU for the host's copy of the pages (a part of a
            SharedSegment, say): the mirror, or on a CPU the pool itself.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        num_pages: int,
        device: torch.device | str = "cpu",
        *,
        memory: Tensor | None = None,
    ) -> None:
        self.geometry = geometry
        self.pages = PageAllocator(num_pages)
        target = torch.device(device)
        num_bytes = self.bytes_needed(geometry, num_pages)
        self._mirror_memory = memory
        self._memory: HostMemory = (
            allocate(num_bytes, target, pin=False, what="index pool")
            if memory is None or target.type != "cpu"
            else adopt_host(memory, num_bytes, pin=False, what="index pool")
        )
        self.data = self._memory.data.view(
            geometry.num_index_layers, num_pages, geometry.index_page_bytes
        )

    @staticmethod
    def bytes_needed(geometry: KvGeometry, num_pages: int) -> int:
        """Bytes of the keys of `num_pages` pages, all index layers."""
        return geometry.num_index_layers * num_pages * geometry.index_page_bytes

    def mirror(self, copier: Copier | None = None) -> HostMirror:
        """Where peers write: every page of every index layer. Allocates; call once.

        `copier`: needed unless the pool is on the CPU.
        """
        return HostMirror("index", self.data, copier, memory=self._mirror_memory)

    def poison(self, pages: list[int]) -> None:
        """Overwrites pages in every index layer with bytes that are NaN in each layout."""
        poison_pages(self.data, pages)
