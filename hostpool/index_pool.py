"""Indexer keys of every sequence, paged on the compute device, for layers with their own indexer.

`data` is uint8 [index layers, pages, page bytes]; the layout inside a page is common/layouts.py's.
Owned by a node's step thread; a peer writes into its mirror, under a lease. Its pages are
allocated apart from the host pool's: the two are different resources with different limits.
"""

from __future__ import annotations

import torch

from ..common.layouts import KvGeometry
from .memory import HostMemory, allocate, poison_pages
from .mirror import HostMirror
from .pages import PageAllocator


class IndexPool:
    """`num_pages` pages of `geometry.index` for each index layer. ConfigError as HostPool."""

    def __init__(
        self, geometry: KvGeometry, num_pages: int, device: torch.device | str = "cpu"
    ) -> None:
        self.geometry = geometry
        self.pages = PageAllocator(num_pages)
        layers, page_bytes = geometry.num_index_layers, geometry.index_page_bytes
        self._memory: HostMemory = allocate(
            layers * num_pages * page_bytes, torch.device(device), pin=False, what="index pool"
        )
        self.data = self._memory.data.view(layers, num_pages, page_bytes)

    def mirror(self) -> HostMirror:
        """Where peers write: every page of every index layer. Allocates; call once."""
        return HostMirror("index", self.data)

    def poison(self, pages: list[int]) -> None:
        """Overwrites pages in every index layer with bytes that are NaN in each layout."""
        poison_pages(self.data, pages)
