"""Fills the hot buffer of a seat for the sequence that takes it, beside the steps of the others.

Used by the coordinator on the step thread. All that a seat needs (page tables, empty hot tables, the
rows that are known to be wanted) goes to the device in one upload, a few launches and one copy of
rows, whatever the number of layers, on a stream of its own: no step waits for it. The sequence joins
the steps when the fill's mark has passed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..hostpool.side_stream import Mark, SideStream
from ..kernels.copy_rows import copy_rows
from .hot_cache import HotCache

Integers = npt.NDArray[np.int64]


class SeatFill:
    """Args: the cache whose seats are filled; `host_rows`: uint8 [L, slots, row bytes]."""

    def __init__(self, cache: HotCache, host_rows: Tensor) -> None:
        self._cache = cache
        self._host_rows = host_rows
        self._side = SideStream(cache.rows.device)

    def start(
        self,
        seat: int,
        host_pages: list[int],
        index_pages: list[int],
        length: int,
        warm_positions: Sequence[bytes],
        behind: SideStream,
    ) -> Mark:
        """Empties the seat, writes its page tables and copies rows below `length` to it.

        A sequence that fits its hot buffer becomes resident whole. Of another the rows at
        `warm_positions` are loaded: for each index group little-endian int32, in any order; what is
        no position below `length` is ignored, and so are groups that do not exist.

        No step that uses the seat may be in flight. The fill runs behind the work of `behind` (the
        backups: of the seat's last owner, and of the sequence's own rows).
        """
        cache = self._cache
        pages = np.asarray(host_pages, dtype=np.int64)
        tables = np.full((2, cache.page_table_SP.shape[1]), -1, dtype=np.int64)
        tables[0, : len(pages)] = pages
        tables[1, : len(index_pages)] = index_pages
        is_resident = length <= cache.hot_rows
        positions = [] if is_resident else self._warm(warm_positions, length)
        parts = [self._host_slots(np.arange(length), pages)] if is_resident else []
        if positions:
            parts = self._plan(seat, positions, pages)
        with self._side.beside(behind):
            table_2P, *sent = self._upload([tables.reshape(-1), *parts])
            cache.empty_seat(seat, *table_2P.view(2, -1))
            if is_resident:
                self._load_whole(seat, *sent)
            elif positions:
                self._load_some(*sent)
        return self._side.mark()

    def _warm(self, warm_positions: Sequence[bytes], length: int) -> list[Integers]:
        """Distinct positions of each index group."""
        found = []
        for raw, _ in zip(warm_positions, self._cache.layers_of_group, strict=False):
            given = np.sort(np.frombuffer(raw, dtype="<i4", count=len(raw) // 4))
            keep = (given >= 0) & (given < length)
            keep[1:] &= given[1:] != given[:-1]  # np.unique takes ten times as long
            found.append(given[keep][: self._cache.hot_rows].astype(np.int64))
        return found if any(len(each) for each in found) else []

    def _host_slots(self, positions: Integers, pages: Integers) -> Integers:
        size = self._cache.geometry.page_size
        return pages[positions // size] * size + positions % size

    def _plan(self, seat: int, positions: list[Integers], pages: Integers) -> list[Integers]:
        """Rows to copy, of all layers' rows in one list; then what the hot tables say of them."""
        cache = self._cache
        num_host, num_device = self._host_rows.shape[1], cache.rows.shape[1]
        _, num_seats, hot_rows = cache.position_of_slot_GSH.shape
        num_positions = cache.slot_of_position_GSC.shape[2]
        sources, targets, slot_at, position_at, slots = [], [], [], [], []
        for group, warm in enumerate(positions):
            slot = np.arange(len(warm))
            host_slots = self._host_slots(warm, pages)
            for layer in cache.layers_of_group[group]:
                sources.append(layer * num_host + host_slots)
                targets.append(layer * num_device + seat * cache.seat_rows + slot)
            row = group * num_seats + seat
            slot_at.append(row * hot_rows + slot)
            position_at.append(row * num_positions + warm)
            slots.append(slot)
        columns = (sources, targets, slot_at, positions, position_at, slots)
        return [np.concatenate(column) for column in columns]

    def _upload(self, parts: list[Integers]) -> list[Tensor]:
        """All parts in one copy."""
        joined = torch.from_numpy(np.concatenate(parts))
        if self._cache.rows.is_cuda:
            joined = joined.pin_memory().to(self._cache.rows.device, non_blocking=True)
        lengths = [len(part) for part in parts]
        return list(joined.split(lengths))  # type: ignore[no-untyped-call]

    def _load_whole(self, seat: int, host_slots_T: Tensor) -> None:
        cache, count = self._cache, host_slots_T.numel()
        slots_T = torch.arange(count, device=host_slots_T.device)
        copy_rows(self._host_rows, cache.rows, host_slots_T, slots_T + seat * cache.seat_rows)
        cache.position_of_slot_GSH[:, seat, :count] = slots_T
        cache.slot_of_position_GSC[:, seat, :count] = slots_T

    def _load_some(
        self,
        sources_T: Tensor,
        targets_T: Tensor,
        slot_at_N: Tensor,
        positions_N: Tensor,
        position_at_N: Tensor,
        slots_N: Tensor,
    ) -> None:
        cache = self._cache
        row_bytes = self._host_rows.shape[2]
        copy_rows(
            self._host_rows.view(1, -1, row_bytes),
            cache.rows.view(1, -1, row_bytes),
            sources_T,
            targets_T,
        )
        cache.position_of_slot_GSH.view(-1)[slot_at_N] = positions_N.to(torch.int32)
        cache.slot_of_position_GSC.view(-1)[position_at_N] = slots_N.to(torch.int32)
