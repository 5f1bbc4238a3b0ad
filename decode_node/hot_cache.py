"""The hot cache: a seat's rows on the device and the tables that say which position is where.

Owned by the coordinator, used by the decode context on the step thread. Device rows of seat s, in
every layer (R = ring rows = two pages, H = hot rows):

    s * (H + R) ............... + H ............... + H + R
    | hot slots: any position   | ring: newest rows, position p at H + p % R |

Tables are kept once per index group (an indexer layer and the layers that share its top-k): all
layers of a group hold the same positions in the same slots. `resolve` plans a step for a group,
`copy` executes the plan for one layer of it.

A sequence that fits its hot buffer is resident whole, position p in slot p, and never misses;
`hot_rows` >= the longest context therefore is the resident baseline, with no second code path.

Always holds after a step: a position is in at most one slot; slot -> position and position -> slot
agree; a miss can only be for a position under `durable_len`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import InvariantError
from ..common.layouts import KvGeometry
from ..kernels.copy_rows import copy_rows
from ..kernels.resolve import resolve
from ..kernels.swap_in import load_cache_to_device_buffer
from .hot_counters import HotCacheStats, HotCounters

RING_PAGES = 2


class HotCache:
    """Shapes: L layers, G index groups, S seats, H hot rows, R ring rows, P pages a sequence.

    Args:
        geometry: layouts, page size, number of layers and of index groups.
        group_of_layer: for each layer the index group whose top-k it uses.
        num_seats: S.
        hot_rows: H; at least the model's index_topk.
        max_context: longest sequence, in tokens.
        topk: selected rows a token.
        device: where the rows live.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        group_of_layer: tuple[int, ...],
        *,
        num_seats: int,
        hot_rows: int,
        max_context: int,
        topk: int,
        device: torch.device,
    ) -> None:
        self.geometry = geometry
        self.hot_rows = hot_rows
        self.ring_rows = RING_PAGES * geometry.page_size
        self.seat_rows = hot_rows + self.ring_rows
        self.topk = topk
        self._group_of_layer = group_of_layer
        self._layers_of_group = [
            [layer for layer, group in enumerate(group_of_layer) if group == index]
            for index in range(geometry.num_index_layers)
        ]
        self._counters = HotCounters(
            [len(layers) for layers in self._layers_of_group],
            topk=topk,
            row_bytes=geometry.row.row_bytes,
            device=device,
        )
        groups, pages = geometry.num_index_layers, geometry.num_pages(max_context)

        def table(*shape: int, fill: int) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        self.rows = torch.empty(
            (geometry.num_layers, num_seats * self.seat_rows, geometry.row.row_bytes),
            dtype=torch.uint8,
            device=device,
        )
        self.page_table_SP = table(num_seats, pages, fill=-1)
        self.ring_start_S = table(num_seats, fill=0)
        self.position_of_slot_GSH = table(groups, num_seats, hot_rows, fill=-1)
        self.slot_of_position_GSC = table(groups, num_seats, pages * geometry.page_size, fill=-1)
        self._last_use_GSH = table(groups, num_seats, hot_rows, fill=0)
        self._step_1 = table(1, fill=0)
        self._plan: _Plan | None = None

    @property
    def stats(self) -> HotCacheStats:
        """Any thread may read it; see hot_counters.py."""
        return self._counters.stats

    def take_seat(self, seat: int, host_pages: list[int]) -> None:
        """Empties the seat's tables and writes its host page table."""
        self.position_of_slot_GSH[:, seat] = -1
        self.slot_of_position_GSC[:, seat] = -1
        self._last_use_GSH[:, seat] = 0
        self.page_table_SP[seat] = -1
        self.page_table_SP[seat, : len(host_pages)] = torch.tensor(
            host_pages, dtype=torch.int32, device=self.page_table_SP.device
        )

    def preload(self, seat: int, group: int | None, positions: Tensor, host_rows: Tensor) -> None:
        """Copies rows host -> hot slots before the seat's first step.

        Args:
            group: the index group whose layers and tables are meant; None: all.
            positions: int64 [n], distinct, n <= H; the i-th goes to slot i.
            host_rows: uint8 [L, slots, row_bytes] of the host pool.
        """
        num_rows = positions.numel()
        if num_rows == 0:
            return
        page_size = self.geometry.page_size
        groups = range(self.geometry.num_index_layers) if group is None else (group,)
        pages = self.page_table_SP[seat].to(torch.int64)[positions // page_size]
        host_slots = pages * page_size + positions % page_size
        device_rows = seat * self.seat_rows + torch.arange(num_rows, device=positions.device)
        slots = torch.arange(num_rows, dtype=torch.int32, device=positions.device)
        for index in groups:
            for layer in self._layers_of_group[index]:
                copy_rows(
                    host_rows[layer : layer + 1],
                    self.rows[layer : layer + 1],
                    host_slots,
                    device_rows,
                )
            self.position_of_slot_GSH[index, seat, :num_rows] = positions.to(torch.int32)
            self.slot_of_position_GSC[index, seat, positions] = slots

    def begin_step(self, seats_B: Tensor, positions_B: Tensor, ring_starts: Tensor) -> Tensor:
        """Prepares the tables for one new row a sequence.

        Args:
            seats_B, positions_B: int64 [B]; the row at `positions_B` is about to be stored.
            ring_starts: int32 [B], oldest position the seat's ring will have.

        Returns int64 [2, B]: device rows to store each new row in: its ring row, and its hot slot
        while the sequence is resident whole (-1: none).
        """
        self._step_1 += 1
        self.ring_start_S[seats_B] = ring_starts
        base_B = seats_B * self.seat_rows
        ring_B = base_B + self.hot_rows + positions_B % self.ring_rows
        is_whole_B = positions_B < self.hot_rows
        hot_B = torch.where(is_whole_B, base_B + positions_B, -1)
        # Written for all rows, with what stands there where the sequence is not resident whole: to
        # pick those that are would mean to wait for the device.
        slots_B = positions_B.clamp(max=self.hot_rows - 1)
        for table, at_B, value in (
            (self.position_of_slot_GSH, slots_B, positions_B.to(torch.int32)),
            (self.slot_of_position_GSC, positions_B, positions_B.to(torch.int32)),
            (self._last_use_GSH, slots_B, self._step_1),
        ):
            table[:, seats_B, at_B] = torch.where(is_whole_B, value, table[:, seats_B, at_B])
        self._counters.begin_step(positions_B + 1)
        return torch.stack((ring_B, hot_B))

    def end_step(self) -> None:
        """Counts the step; the last thing of it."""
        self._counters.end_step()

    def resolve(self, group: int, topk_idx_BK: Tensor, lens_B: Tensor, seats_B: Tensor) -> Tensor:
        """Plans the group's step; returns fault flags int32 [B] (see kernels/resolve.py).

        Args:
            topk_idx_BK: int32, selected positions, -1 = none.
            lens_B: sequence lengths, the newest token included.
            seats_B: seat of each batch row, -1 = padded.
        """
        plan = _Plan.empty(group, topk_idx_BK, self._counters.num_misses_of(group))
        fault_B = torch.zeros(topk_idx_BK.shape[0], dtype=torch.int32, device=topk_idx_BK.device)
        resolve(
            topk_idx_BK,
            lens_B,
            seats_B,
            self.page_table_SP,
            self.ring_start_S,
            self.position_of_slot_GSH[group],
            self.slot_of_position_GSC[group],
            self._last_use_GSH[group],
            self._step_1,
            plan.hot_idx_BK,
            plan.miss_host_slot_BK,
            plan.miss_device_row_BK,
            plan.num_misses_B,
            fault_B,
            self.geometry.page_size,
            self.ring_rows,
        )
        self._plan = plan
        return fault_B

    def copy(self, layer: int, host_rows: Tensor) -> Tensor:
        """Swaps in one layer's misses of the newest plan; returns `hot_idx_BK` for attention."""
        plan = self._plan
        if plan is None or plan.group != self._group_of_layer[layer]:
            raise InvariantError(f"layer {layer} has no plan of its index group")
        load_cache_to_device_buffer(
            host_rows[layer],
            self.rows[layer],
            plan.miss_host_slot_BK,
            plan.miss_device_row_BK,
            plan.num_misses_B,
        )
        return plan.hot_idx_BK

    def ring_rows_of(self, seat: int, first: int, end: int) -> Tensor:
        """Device rows (int64) of positions [first, end) in the seat's ring."""
        positions = torch.arange(first, end, device=self.rows.device)
        return seat * self.seat_rows + self.hot_rows + positions % self.ring_rows

    def num_resident(self) -> int:
        """Rows that hot slots hold now, over all seats, in the first index group."""
        return int((self.position_of_slot_GSH[0] >= 0).sum())

    def check_invariants(self) -> None:
        """Raises InvariantError unless both tables of every seat say the same."""
        G, S, _ = self.position_of_slot_GSH.shape
        for group in range(G):
            for seat in range(S):
                position_of_slot = self.position_of_slot_GSH[group, seat].to(torch.int64)
                slot_of_position = self.slot_of_position_GSC[group, seat].to(torch.int64)
                slots = torch.nonzero(position_of_slot >= 0).flatten()
                positions = torch.nonzero(slot_of_position >= 0).flatten()
                if not torch.equal(slot_of_position[position_of_slot[slots]], slots):
                    raise InvariantError(
                        f"group {group} seat {seat}: a slot's position points away"
                    )
                if positions.numel() != slots.numel():
                    raise InvariantError(f"group {group} seat {seat}: a position is resident twice")


@dataclass(slots=True)
class _Plan:
    """Result of `resolve` for one group; see kernels/resolve.py for the tensors."""

    group: int
    hot_idx_BK: Tensor
    miss_host_slot_BK: Tensor
    miss_device_row_BK: Tensor
    num_misses_B: Tensor

    @classmethod
    def empty(cls, group: int, topk_idx_BK: Tensor, num_misses_B: Tensor) -> _Plan:
        def like(dtype: torch.dtype) -> Tensor:
            return torch.full_like(topk_idx_BK, -1, dtype=dtype)

        return cls(group, like(torch.int32), like(torch.int64), like(torch.int64), num_misses_B)
