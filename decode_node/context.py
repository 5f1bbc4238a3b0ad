"""One decode step's attention context: one new token a sequence, KV behind the hot cache.

Built by the engine for each step on the step thread; the model's layers call it in order. For each
index group: store the new indexer key, score the whole context from the index pool, select, resolve
against the hot cache; then for each layer of the group: swap in the misses, attend over hot rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..hostpool.index_pool import IndexPool
from ..hostpool.pool import HostPool
from ..kernels.index_logits import index_logits
from ..kernels.select_topk import select_topk
from ..kernels.sparse_mla import sparse_mla
from ..kernels.store_index_keys import store_index_keys
from ..kernels.store_rows import store_rows
from .hot_cache import HotCache


@dataclass(frozen=True, slots=True)
class StepBatch:
    """B sequences, one token each.

    Attributes:
        token_ids_B: int64, tokens fed.
        positions_B: int64, where they stand.
        seats_B: int64.
        index_slots_B: int64, slot in the index pool of each new indexer key.
        index_table_BP: int32, index pages of each sequence, -1 behind its end.
        store_rows_2B: int64 [2, B], device rows for the new KV rows (ring, hot slot or -1).
        max_len: length of the longest sequence, the new token included.
    """

    token_ids_B: Tensor
    positions_B: Tensor
    seats_B: Tensor
    index_slots_B: Tensor
    index_table_BP: Tensor
    store_rows_2B: Tensor
    max_len: int


class DecodeContext:
    """Implements model.context.AttentionContext for one decode step."""

    def __init__(self, cache: HotCache, host: HostPool, index: IndexPool, batch: StepBatch) -> None:
        self._cache = cache
        self._host = host
        self._index = index
        self._batch = batch
        self._layout = cache.geometry.row
        self._lens_B = batch.positions_B + 1
        self._max_len = batch.max_len
        self.fault_B = torch.zeros_like(batch.positions_B, dtype=torch.int32)

    def store_kv(self, layer: int, latent_TC: Tensor, rope_key_TR: Tensor) -> None:
        for rows_B in self._batch.store_rows_2B:
            store_rows(latent_TC, rope_key_TR, rows_B, self._cache.rows[layer], self._layout.name)

    def store_index_keys(self, index_layer: int, key_TD: Tensor) -> None:
        geometry = self._cache.geometry
        store_index_keys(
            key_TD,
            self._batch.index_slots_B,
            self._index.data[index_layer],
            geometry.page_size,
            geometry.index.name,
        )

    def select(self, index_layer: int, query_TID: Tensor, weight_TI: Tensor) -> None:
        batch = self._batch
        num_rows = query_TID.shape[0]
        topk_idx_BK = torch.empty(
            (num_rows, self._cache.topk), dtype=torch.int32, device=query_TID.device
        )
        scores_BC = torch.zeros((num_rows, self._max_len), device=query_TID.device)
        # With no more positions than selected rows every order of scores selects the same.
        if self._max_len > self._cache.topk:
            geometry = self._cache.geometry
            index_logits(
                query_TID,
                weight_TI,
                self._index.data[index_layer],
                batch.index_table_BP,
                self._lens_B,
                scores_BC,
                geometry.page_size,
                geometry.index.name,
            )
        select_topk(scores_BC, self._lens_B, topk_idx_BK)
        self.fault_B |= self._cache.resolve(index_layer, topk_idx_BK, self._lens_B, batch.seats_B)

    def attend(self, layer: int, q_latent_THC: Tensor, q_rope_THR: Tensor, scale: float) -> Tensor:
        hot_idx_BK = self._cache.copy(layer, self._host.rows)
        out_THC = torch.empty_like(q_latent_THC)
        sparse_mla(
            q_latent_THC,
            q_rope_THR,
            self._cache.rows[layer],
            hot_idx_BK,
            scale,
            self._layout.name,
            out_THC,
        )
        return out_THC
