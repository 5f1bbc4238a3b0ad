"""Decode's host pool: every durable KV row of every layer, in paged host memory.

Two pools share one paged allocator and the same four operations on it:

| pool                        | memory                                          | a page of a layer    |
|-----------------------------|-------------------------------------------------|----------------------|
| HostPool                    | `rows`  uint8 [layers, pages * page_size, row]  | page_size rows       |
| DeepSeekV4SingleKVPoolHost  | `data`  uint8 [layers, pages, page bytes]       | 37,440 B at 64 rows  |

Both are layer-major, so a page is contiguous within a layer and a run of pages is one write. Owned
by a node's step thread; transfer writes into the memory by address (`region()`), under a lease.
Host slot of a token = page id * page_size + offset, the same in every layer.

The four operations are those of SGLang's HiSparseHostPoolMixin (page size > 1). What differs: the
table maps pages and not tokens, a full pool is None and not an exception that ends the loop, and
each request's pages are one PageLease, so that they are given back once and by their owner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import InvariantError
from ..common.layouts import DeepSeekV4Layout, KvGeometry, check_page_size
from ..common.wire import Region
from .memory import HostMemory, adopt_host, allocate, poison_pages
from .pages import OwnerKind, PageAllocator, PageLease


class PagedHostPool:
    """Pages by request row: the operations that do not care how a row is encoded.

    Attributes:
        page_size: tokens a page.
        pages: the allocator; its on_free is the caller's to set.
    """

    def __init__(self, page_size: int, num_pages: int) -> None:
        check_page_size(page_size)
        self.page_size = page_size
        self.pages = PageAllocator(num_pages)
        self._row_leases: dict[int, PageLease] = {}
        self._loose: dict[int, PageLease] = {}

    def _round_up_to_page_size(self, size: int) -> int:
        """`size` tokens rounded up to whole pages, in tokens."""
        return -(-size // self.page_size) * self.page_size

    def alloc_page(self, num_pages: int) -> Tensor | None:
        """Takes `num_pages` pages that belong to no table row yet.

        Returns their host slots, int64 [num_pages * page_size], in order; None, with nothing
        changed, if the pool has too few. The lease is fetched once with `take_lease`.
        """
        lease = self.pages.try_acquire(num_pages, OwnerKind.REQUEST)
        if lease is None:
            return None
        if lease.pages:
            self._loose[lease.pages[0]] = lease
        return self._slots(torch.tensor(lease.pages, dtype=torch.int64))

    def take_lease(self, host_slots: Tensor) -> PageLease:
        """The lease behind what `alloc_page` returned; from now on the caller's to release."""
        page = int(host_slots[0]) // self.page_size if host_slots.numel() else -1
        lease = self._loose.pop(page, None)
        if lease is None:
            raise InvariantError(f"page {page} does not begin an allocation of alloc_page")
        return lease

    def bind_row(
        self,
        req_to_host_pool: Tensor,
        req_to_host_pool_allocated_len: Tensor,
        req_pool_idx: int,
        lease: PageLease,
    ) -> None:
        """Makes `lease` the pages of table row `req_pool_idx` (a transferred request's grant).

        Tensors as in alloc_paged_token_slots. InvariantError if the row has pages already.
        """
        if req_pool_idx in self._row_leases:
            raise InvariantError(f"table row {req_pool_idx} has pages already")
        self._write_row(req_to_host_pool, req_pool_idx, 0, lease)
        self._row_leases[req_pool_idx] = lease
        req_to_host_pool_allocated_len[req_pool_idx] = lease.num_pages * self.page_size

    def unbind_row(
        self, req_to_host_pool: Tensor, req_to_host_pool_allocated_len: Tensor, req_pool_idx: int
    ) -> PageLease | None:
        """Clears table row `req_pool_idx` and hands its lease to the caller, who releases it.

        None if the row never had pages.
        """
        req_to_host_pool[req_pool_idx] = -1
        req_to_host_pool_allocated_len[req_pool_idx] = 0
        return self._row_leases.pop(req_pool_idx, None)

    def alloc_paged_token_slots(
        self,
        req_to_host_pool: Tensor,
        req_to_host_pool_allocated_len: Tensor,
        req_pool_idx: int,
        start_pos: int,
        num_tokens: int,
    ) -> Tensor | None:
        """Host slots of positions [start_pos, start_pos + num_tokens), with pages for new ones.

        Args:
            req_to_host_pool: int32 [rows, max pages], page id of each page of a request, -1 = none;
                written where the row grows.
            req_to_host_pool_allocated_len: int [rows], tokens with a page, a multiple of page_size;
                written where the row grows.
            req_pool_idx: the table row.
            start_pos: first position; at most the row's allocated length.
            num_tokens: positions; 0 or less gives an empty result.

        Returns int64 [num_tokens] on the table's device; None, with nothing changed, if the pool
        has too few pages. InvariantError if positions before start_pos have no page, or if the row
        would not fit into its table.
        """
        if num_tokens <= 0:
            return torch.empty(0, dtype=torch.int64, device=req_to_host_pool.device)
        allocated_len = int(req_to_host_pool_allocated_len[req_pool_idx])
        if not 0 <= start_pos <= allocated_len:
            raise InvariantError(f"start {start_pos} is not in [0, allocated {allocated_len}]")
        end_pos = start_pos + num_tokens
        page_end = self._round_up_to_page_size(end_pos)
        if page_end // self.page_size > req_to_host_pool.shape[1]:
            raise InvariantError(
                f"{page_end // self.page_size} pages do not fit into a table row of "
                f"{req_to_host_pool.shape[1]}"
            )
        if page_end > allocated_len:
            if not self._grow_row(req_pool_idx, (page_end - allocated_len) // self.page_size):
                return None
            lease = self._row_leases[req_pool_idx]
            self._write_row(req_to_host_pool, req_pool_idx, allocated_len // self.page_size, lease)
            req_to_host_pool_allocated_len[req_pool_idx] = page_end
        first_page = start_pos // self.page_size
        row = req_to_host_pool[req_pool_idx, first_page : page_end // self.page_size]
        offset = start_pos - first_page * self.page_size
        return self._slots(row.to(torch.int64))[offset : offset + num_tokens]

    def allocated_host_indices(
        self, req_to_host_pool: Tensor, req_pool_idx: int, allocated_len: int
    ) -> Tensor:
        """Host slots of every page of a row's first `allocated_len` tokens (rounded up to pages).

        Returns int64 on the table's device; entries of -1 in the table are left out.
        """
        num_pages = self._round_up_to_page_size(int(allocated_len)) // self.page_size
        pages = req_to_host_pool[req_pool_idx, :num_pages].to(torch.int64)
        return self._slots(pages[pages >= 0])

    def _grow_row(self, req_pool_idx: int, num_pages: int) -> bool:
        lease = self._row_leases.get(req_pool_idx)
        if lease is not None:
            return self.pages.try_extend(lease, num_pages)
        lease = self.pages.try_acquire(num_pages, OwnerKind.REQUEST)
        if lease is None:
            return False
        self._row_leases[req_pool_idx] = lease
        return True

    def _write_row(self, table: Tensor, row: int, first_page: int, lease: PageLease) -> None:
        pages = lease.pages[first_page:]
        table[row, first_page : first_page + len(pages)] = torch.tensor(pages, dtype=table.dtype)

    def _slots(self, pages: Tensor) -> Tensor:
        offsets = torch.arange(self.page_size, device=pages.device)
        return (pages[:, None] * self.page_size + offsets).view(-1)


class HostPool(PagedHostPool):
    """Rows of `geometry.row`, all layers: the host side of the MLA layouts.

    Args:
        geometry: layout, page size and layers.
        num_pages: pages of each layer.
        device: "cpu" (tests may put the pool on a GPU).
        pin: register the memory with CUDA, so that kernels read it and copies are asynchronous.
        memory: uint8 [`bytes_needed`] on the CPU to use instead of allocating (a part of a
            SharedSegment, say); what lies in it stays.

    Raises ConfigError if the machine or its cgroup has less memory, or cannot pin, or if `memory`
    has another size.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        num_pages: int,
        *,
        device: torch.device | str = "cpu",
        pin: bool = False,
        memory: Tensor | None = None,
    ) -> None:
        super().__init__(geometry.page_size, num_pages)
        self.geometry = geometry
        layers, row_bytes = geometry.num_layers, geometry.row.row_bytes
        num_bytes = self.bytes_needed(geometry, num_pages)
        self._memory: HostMemory = (
            allocate(num_bytes, torch.device(device), pin=pin, what="host pool")
            if memory is None
            else adopt_host(memory, num_bytes, pin=pin, what="host pool")
        )
        self.rows = self._memory.data.view(layers, num_pages * geometry.page_size, row_bytes)

    @staticmethod
    def bytes_needed(geometry: KvGeometry, num_pages: int) -> int:
        """Bytes of the rows of `num_pages` pages, all layers."""
        return geometry.num_layers * num_pages * geometry.kv_page_bytes

    def region(self) -> Region:
        """Where peers write: every page of every layer."""
        return Region(
            name="kv",
            base_address=self.rows.data_ptr(),
            num_layers=self.geometry.num_layers,
            num_pages=self.pages.num_total,
            page_bytes=self.geometry.kv_page_bytes,
        )

    def poison(self, pages: list[int]) -> None:
        """Overwrites pages in every layer with bytes that are NaN in each layout."""
        by_page = self.rows.view(
            self.geometry.num_layers, self.pages.num_total, self.geometry.kv_page_bytes
        )
        poison_pages(by_page, pages)

    def close(self) -> None:
        """Unpins the memory. Nothing may be in flight."""
        self._memory.close()


MLATokenToKVPoolHost = HostPool
"""The seeds' name for the host pool of the MLA layouts."""


class DeepSeekV4SingleKVPoolHost(PagedHostPool):
    """Pages of DeepSeek-V4's C4 layout, all layers: values, then scales, then padding.

    Arguments and errors as HostPool. `page_size` counts C4 entries (64 in a page of 37,440 B).
    """

    def __init__(
        self,
        layout: DeepSeekV4Layout,
        num_layers: int,
        num_pages: int,
        *,
        page_size: int = 64,
        device: torch.device | str = "cpu",
        pin: bool = False,
    ) -> None:
        super().__init__(page_size, num_pages)
        self.layout = layout
        self.page_bytes = layout.page_bytes(page_size)
        self._memory: HostMemory = allocate(
            num_layers * num_pages * self.page_bytes,
            torch.device(device),
            pin=pin,
            what="host pool",
        )
        self.data = self._memory.data.view(num_layers, num_pages, self.page_bytes)

    def region(self) -> Region:
        """Where peers write: every page of every layer."""
        return Region(
            name="kv",
            base_address=self.data.data_ptr(),
            num_layers=self.data.shape[0],
            num_pages=self.pages.num_total,
            page_bytes=self.page_bytes,
        )

    def poison(self, pages: list[int]) -> None:
        """Overwrites pages in every layer with bytes that are NaN in the layout."""
        poison_pages(self.data, pages)

    def close(self) -> None:
        """Unpins the memory. Nothing may be in flight."""
        self._memory.close()
