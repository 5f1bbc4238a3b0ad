"""One decode step's attention context: one new token a sequence, KV behind the hot cache.

Built by the step runner on the step thread, once a step or once a captured graph; the model's
layers call it in order. For each index group: store the new indexer key, score the whole context
from the index pool, select, plan against the hot cache and start to swap in the misses; then for
each layer of the group: wait for its rows on the device, attend over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..hostpool.index_pool import IndexPool
from ..hostpool.pool import HostPool
from ..kernels.index_scores import IndexScores
from ..kernels.select_topk import select_topk
from ..kernels.sparse_mla import attend
from ..kernels.store_index_keys import store_index_keys
from ..kernels.store_rows import store_rows
from .hot_cache import HotCache


@dataclass(frozen=True, slots=True)
class StepBatch:
    """B rows, one token each; views of the step's fixed buffers (step_buffers.py).

    Attributes:
        token_ids_B: int64, tokens fed.
        positions_B: int64, where they stand.
        lens_B: int64, length of each sequence, the new token included; 0: a padded row.
        seats_B: int64; -1: a padded row.
        index_slots_B: int64, slot in the index pool of each new indexer key.
        index_table_BP: int32, index pages of each sequence, -1 behind its end.
        store_rows_2B: int64 [2, B], device rows for the new KV rows (ring, hot slot or -1).
        scores_BC: float32, indexer scores; C is at least the longest length.
        topk_idx_BK: int32, selected positions.
    """

    token_ids_B: Tensor
    positions_B: Tensor
    lens_B: Tensor
    seats_B: Tensor
    index_slots_B: Tensor
    index_table_BP: Tensor
    store_rows_2B: Tensor
    scores_BC: Tensor
    topk_idx_BK: Tensor


class DecodeContext:
    """Implements model.context.AttentionContext for one decode step."""

    def __init__(self, cache: HotCache, host: HostPool, index: IndexPool, batch: StepBatch) -> None:
        self._cache = cache
        self._host = host
        self._index = index
        self._batch = batch
        self._layout = cache.geometry.row
        self._scores = IndexScores(
            batch.lens_B, batch.scores_BC, cache.geometry.page_size, cache.geometry.index.name
        )
        self._scores_BC = batch.scores_BC
        """Of the newest selection; kept until the next, as the swap-in's stream may still read it."""

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
        self._select(index_layer, query_TID, weight_TI)
        self._cache.swap_in(
            index_layer,
            batch.topk_idx_BK,
            batch.lens_B,
            batch.seats_B,
            self._host.rows,
            self._scores_BC,
        )

    def attend(self, layer: int, q_latent_THC: Tensor, q_rope_THR: Tensor, scale: float) -> Tensor:
        hot_idx_BK = self._cache.hot_idx(layer, q_latent_THC.shape[0])
        return attend(
            q_latent_THC, q_rope_THR, self._cache.rows[layer], hot_idx_BK, scale, self._layout.name
        )

    def _select(self, index_layer: int, query_BID: Tensor, weight_BI: Tensor) -> None:
        """Writes `topk_idx_BK`."""
        batch = self._batch
        topk = batch.topk_idx_BK.shape[1]
        # With no more positions than selected rows every order of scores selects the same.
        if batch.scores_BC.shape[1] <= topk:
            every_K = torch.arange(topk, dtype=torch.int32, device=query_BID.device)
            batch.topk_idx_BK.copy_(torch.where(every_K < batch.lens_B[:, None], every_K, -1))
            return
        self._scores_BC = self._scores(
            query_BID, weight_BI, self._index.data[index_layer], batch.index_table_BP
        )
        select_topk(self._scores_BC, batch.lens_B, batch.topk_idx_BK)
