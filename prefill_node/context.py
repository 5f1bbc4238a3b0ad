"""One prefill step's attention context: chunks of several prompts over the paged device pool.

Built by the engine for each step on the step thread. Dense work runs over all tokens at once;
indexer scores are per prompt, blockwise, and attention gathers each token's selected rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.layouts import KvGeometry
from ..hostpool.device_pool import DevicePool
from ..kernels.index_logits import index_logits_chunk
from ..kernels.select_topk import select_topk
from ..kernels.sparse_mla import attend
from ..kernels.store_index_keys import store_index_keys
from ..kernels.store_rows import store_rows

MAX_SCORE_BYTES = 64 * 1024 * 1024
"""Scores of one block of queries; bounds the temporaries of long contexts."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A chunk of one prompt: tokens at positions [first, first + count)."""

    pages: list[int]
    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


class PrefillContext:
    """Implements model.context.AttentionContext for one prefill step.

    Args:
        pool: the node's device pool.
        segments: chunks, in the order of the step's flattened tokens.
        topk: selected rows a token.
    """

    def __init__(
        self, pool: DevicePool, geometry: KvGeometry, segments: list[Segment], topk: int
    ) -> None:
        self._pool = pool
        self._geometry = geometry
        self._segments = segments
        self._topk = topk
        self._device = pool.rows.device
        self._page_tables = [
            torch.tensor(segment.pages, dtype=torch.int32, device=self._device)
            for segment in segments
        ]
        self._slots_T = torch.cat(
            [
                self._slots(table, torch.arange(segment.first, segment.end, device=self._device))
                for table, segment in zip(self._page_tables, segments, strict=True)
            ]
        )
        self._row_idx_TK = torch.empty(0)
        self.last_positions: list[list[Tensor]] = [[] for _ in segments]
        """For each segment and index group: positions its last token selected, -1 = none."""

    def store_kv(self, layer: int, latent_TC: Tensor, rope_key_TR: Tensor) -> None:
        rows = self._pool.rows[layer]
        store_rows(latent_TC, rope_key_TR, self._slots_T, rows, self._geometry.row.name)

    def store_index_keys(self, index_layer: int, key_TD: Tensor) -> None:
        geometry = self._geometry
        pages = self._pool.index[index_layer]
        store_index_keys(key_TD, self._slots_T, pages, geometry.page_size, geometry.index.name)

    def select(self, index_layer: int, query_TID: Tensor, weight_TI: Tensor) -> None:
        parts, token = [], 0
        for number, segment in enumerate(self._segments):
            end = token + segment.count
            positions_TK = self._select_segment(
                index_layer, number, query_TID[token:end], weight_TI[token:end]
            )
            self.last_positions[number].append(positions_TK[-1])
            parts.append(self._slots_of(number, positions_TK))
            token = end
        self._row_idx_TK = torch.cat(parts)

    def attend(self, layer: int, q_latent_THC: Tensor, q_rope_THR: Tensor, scale: float) -> Tensor:
        return attend(
            q_latent_THC,
            q_rope_THR,
            self._pool.rows[layer],
            self._row_idx_TK,
            scale,
            self._geometry.row.name,
        )

    def _select_segment(
        self, index_layer: int, number: int, query_TID: Tensor, weight_TI: Tensor
    ) -> Tensor:
        """Positions each token of the segment selects, int32 [T, K], -1 = none."""
        segment = self._segments[number]
        topk_idx_TK = torch.empty(
            (segment.count, self._topk), dtype=torch.int32, device=self._device
        )
        block = max(1, MAX_SCORE_BYTES // (4 * segment.end))
        for start in range(0, segment.count, block):
            stop = min(start + block, segment.count)
            first = segment.first + start
            width = segment.first + stop
            lens_T = torch.arange(first + 1, width + 1, device=self._device)
            scores_TC = torch.zeros((stop - start, width), device=self._device)
            # With no more positions than selected rows every order of scores selects the same.
            if width > self._topk:
                index_logits_chunk(
                    query_TID[start:stop],
                    weight_TI[start:stop],
                    self._pool.index[index_layer],
                    self._page_tables[number],
                    first,
                    scores_TC,
                    self._geometry.page_size,
                    self._geometry.index.name,
                )
            select_topk(scores_TC, lens_T, topk_idx_TK[start:stop])
        return topk_idx_TK

    def _slots_of(self, number: int, positions_TK: Tensor) -> Tensor:
        """Device slots of selected positions, int32, -1 stays -1."""
        slots = self._slots(self._page_tables[number], positions_TK.clamp_min(0))
        return torch.where(positions_TK < 0, -1, slots).to(torch.int32)

    def _slots(self, page_table: Tensor, positions: Tensor) -> Tensor:
        page_size = self._geometry.page_size
        pages = page_table[positions // page_size].to(torch.int64)
        return pages * page_size + positions % page_size
