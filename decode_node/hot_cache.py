"""The hot cache: a seat's rows on the device and the tables that say which position is where.

Owned by the coordinator, used by the decode context on the step thread. Device rows of seat s, in
every layer (R = ring rows = two pages, H = hot rows):

    s * (H + R) ............... + H ............... + H + R
    | hot slots: any position   | ring: newest rows, position p at H + p % R |

Tables are kept once per index group (an indexer layer and the layers that share its top-k): all
layers of a group hold the same positions in the same slots. `swap_in` plans a step for a group and
starts the copies of all its layers on a stream of their own; `hot_idx` is where a layer's attention
waits for them. Between the two the layer computes its queries.

A sequence that fits its hot buffer is resident whole, position p in slot p, and never misses. Where
`hot_rows` >= the longest context that is true of all, and nothing is planned or copied: the resident
baseline.

Buffers of a step are allocated once, for as many rows as there are seats: a step can be captured in
a CUDA graph.

Always holds after a step: a position is in at most one slot; slot -> position and position -> slot
agree; a miss can only be for a position under `durable_len`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import InvariantError
from ..common.layouts import KvGeometry
from ..hostpool.side_stream import Mark, SideStream
from ..kernels.swap_in import load_cache_to_device_buffer, swap_in
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
        by_score: rows make room by the index scores of the step, not by how long they were unused.
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
        by_score: bool = True,
    ) -> None:
        self.geometry = geometry
        self.hot_rows = hot_rows
        self.ring_rows = RING_PAGES * geometry.page_size
        self.seat_rows = hot_rows + self.ring_rows
        self.topk = topk
        self._by_score = by_score
        self._group_of_layer = group_of_layer
        self.layers_of_group = [
            [layer for layer, group in enumerate(group_of_layer) if group == index]
            for index in range(geometry.num_index_layers)
        ]
        self._counters = HotCounters(
            [len(layers) for layers in self.layers_of_group],
            num_seats=num_seats,
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
        self.index_table_SP = table(num_seats, pages, fill=-1)
        self.ring_start_S = table(num_seats, fill=0)
        self.position_of_slot_GSH = table(groups, num_seats, hot_rows, fill=-1)
        self.slot_of_position_GSC = table(groups, num_seats, pages * geometry.page_size, fill=-1)
        self.last_use_GSH = table(groups, num_seats, hot_rows, fill=0)
        self.step_1 = table(1, fill=0)
        self.is_resident = hot_rows >= max_context
        self._fault_GS = table(groups, num_seats, fill=0)
        self._plan = _Plan.empty(num_seats, topk, device)
        self._group: int | None = None
        self._side = SideStream(device, is_urgent=True)
        self._copied_L: list[Mark] = [self._side.mark()] * geometry.num_layers

    @property
    def stats(self) -> HotCacheStats:
        """Any thread may read it; see hot_counters.py."""
        return self._counters.stats

    def empty_seat(self, seat: int, host_pages_P: Tensor, index_pages_P: Tensor) -> None:
        """Empties the seat's tables and writes its page tables (-1 behind the last page)."""
        self.position_of_slot_GSH[:, seat] = -1
        self.slot_of_position_GSC[:, seat] = -1
        self.last_use_GSH[:, seat] = 0
        self.page_table_SP[seat] = host_pages_P
        self.index_table_SP[seat] = index_pages_P

    def swap_in(
        self,
        group: int,
        topk_idx_BK: Tensor,
        lens_B: Tensor,
        seats_B: Tensor,
        host_rows: Tensor,
        scores_BC: Tensor,
    ) -> None:
        """Plans the group's step and starts the copies of its layers' missing rows.

        Args:
            topk_idx_BK: int32, selected positions, -1 = none; not changed before `hot_idx`.
            lens_B: int64, sequence lengths, the newest token included.
            seats_B: int64, seat of each batch row, -1 = padded.
            host_rows: uint8 [L, slots, row_bytes] of the host pool.
            scores_BC: float32, what the selection was made by; not changed before `hot_idx`.

        Faults (kernels/resolve.py) are gathered for `end_step`.
        """
        self._group = group
        if self.is_resident:
            base_B1 = (seats_B * self.seat_rows).to(torch.int32)[:, None]
            hot_idx_BK = self._plan.hot_idx_SK[: topk_idx_BK.shape[0]]
            hot_idx_BK.copy_(torch.where(topk_idx_BK >= 0, topk_idx_BK + base_B1, -1))
            return
        with self._side.fork():
            scores = scores_BC if self._by_score else None
            self._plan_and_copy(group, topk_idx_BK, lens_B, seats_B, host_rows, scores)

    def _plan_and_copy(
        self,
        group: int,
        topk_idx_BK: Tensor,
        lens_B: Tensor,
        seats_B: Tensor,
        host_rows: Tensor,
        scores_BC: Tensor | None,
    ) -> None:
        batch = topk_idx_BK.shape[0]
        first, *others = self.layers_of_group[group]
        plan, num_misses_B = self._plan, self._counters.num_misses_GS[group, :batch]
        misses = (plan.miss_host_slot_SK[:batch], plan.miss_device_row_SK[:batch], num_misses_B)
        tensors = (
            topk_idx_BK,
            lens_B,
            seats_B,
            self.page_table_SP,
            self.ring_start_S,
            self.position_of_slot_GSH[group],
            self.slot_of_position_GSC[group],
            self.last_use_GSH[group],
            self.step_1,
            plan.hot_idx_SK[:batch],
            *misses,
            self._fault_GS[group, :batch],
        )
        sizes = (self.geometry.page_size, self.ring_rows)
        rows = (host_rows[first], self.rows[first])
        swap_in(*tensors, *rows, *sizes, scores_BC=scores_BC)
        self._copied_L[first] = self._side.mark()
        for layer in others:
            load_cache_to_device_buffer(host_rows[layer], self.rows[layer], *misses)
            self._copied_L[layer] = self._side.mark()

    def hot_idx(self, layer: int, batch: int) -> Tensor:
        """Device rows of the newest selection, int32 [B, K]; work behind it finds the layer's rows."""
        if self._group_of_layer[layer] != self._group:
            raise InvariantError(f"layer {layer} has no plan of its index group")
        if not self.is_resident:
            self._copied_L[layer].join()
        return self._plan.hot_idx_SK[:batch]

    def end_step(self, lens_B: Tensor) -> Tensor:
        """Counts the step; returns each row's fault flags, int32 [B] (the gravest group's)."""
        self._counters.end_step(lens_B)
        return self._fault_GS[:, : lens_B.shape[0]].amax(0)

    def ring_rows_of(self, seat: int, first: int, end: int) -> Tensor:
        """Device rows (int64, on the CPU) of positions [first, end) in the seat's ring."""
        positions = torch.arange(first, end)
        return seat * self.seat_rows + self.hot_rows + positions % self.ring_rows

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


@dataclass(frozen=True, slots=True)
class _Plan:
    """Result of `swap_in` for the newest group; see kernels/resolve.py for the tensors."""

    hot_idx_SK: Tensor
    miss_host_slot_SK: Tensor
    miss_device_row_SK: Tensor

    @classmethod
    def empty(cls, num_seats: int, topk: int, device: torch.device) -> _Plan:
        def table(dtype: torch.dtype) -> Tensor:
            return torch.full((num_seats, topk), -1, dtype=dtype, device=device)

        return cls(table(torch.int32), table(torch.int64), table(torch.int64))
