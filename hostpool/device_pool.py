"""Prefill's KV on the compute device: paged rows and paged indexer keys under one allocator.

A page id means the same tokens in `rows` (uint8 [layers, pages * page_size, row bytes]) and in
`index` (uint8 [index layers, pages, index page bytes]). Page size and row layout are decode's, so
that a page moves byte for byte. Owned by a node's step thread; the transfer reads its mirrors.
"""

from __future__ import annotations

import torch

from ..common.layouts import KvGeometry
from .memory import HostMemory, allocate, poison_pages
from .mirror import Copier, HostMirror
from .pages import PageAllocator


class DevicePool:
    """`num_pages` pages of every layer. ConfigError as HostPool (CPU device only)."""

    def __init__(
        self, geometry: KvGeometry, num_pages: int, device: torch.device | str = "cpu"
    ) -> None:
        self.geometry = geometry
        self.pages = PageAllocator(num_pages)
        target = torch.device(device)
        self._row_memory: HostMemory = allocate(
            geometry.num_layers * num_pages * geometry.kv_page_bytes,
            target,
            pin=False,
            what="device pool",
        )
        self._index_memory: HostMemory = allocate(
            geometry.num_index_layers * num_pages * geometry.index_page_bytes,
            target,
            pin=False,
            what="device pool's indexer keys",
        )
        self.rows = self._row_memory.data.view(
            geometry.num_layers, num_pages * geometry.page_size, geometry.row.row_bytes
        )
        self.index = self._index_memory.data.view(
            geometry.num_index_layers, num_pages, geometry.index_page_bytes
        )

    def mirrors(self, copier: Copier | None = None) -> tuple[HostMirror, HostMirror]:
        """Where the transfer reads: "kv", then "index". Allocates; call once.

        `copier`: needed unless the pool is on the CPU.
        """
        by_page = self.rows.view(self.geometry.num_layers, self.pages.num_total, -1)
        return HostMirror("kv", by_page, copier), HostMirror("index", self.index, copier)

    def poison(self, pages: list[int]) -> None:
        """Overwrites pages in every layer, rows and indexer keys, with NaN bytes."""
        by_page = self.rows.view(
            self.geometry.num_layers, self.pages.num_total, self.geometry.kv_page_bytes
        )
        poison_pages(by_page, pages)
        poison_pages(self.index, pages)
