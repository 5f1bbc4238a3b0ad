"""The memory of a decode step, allocated once: uploads, what the layers read and write, results.

Owned by the step runner, step thread only. A step's views always begin where the buffers begin, so
that their addresses depend on its batch size and context alone: what a CUDA graph needs. Uploads and
results go through pinned memory that takes turns, since a step may still be in flight while the next
one is prepared.

Suffixes: B batch rows, S seats (the most rows of a step), C positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .context import StepBatch
from .coordinator import SeatRow
from .hot_cache import HotCache

NUM_TURNS = 2
"""Steps under way at a time: one in flight, one being prepared."""


class StepBuffers:
    """Args:
    cache: whose tables the step reads; its device and its top-k.
    max_batch, max_context: bounds of a step.
    vocab_size: V.

    Attributes:
        next_token_S1: int64 [S + 1], token last chosen for each seat; the last entry takes what
            padded rows choose.
        logits_SV: float32.
        fault_S: int32, fault flags of each row.
    """

    def __init__(
        self, cache: HotCache, *, max_batch: int, max_context: int, vocab_size: int
    ) -> None:
        device = cache.rows.device
        self._page_size = cache.geometry.page_size
        self._topk = cache.topk

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._input = integers(5 * max_batch)
        self._uploads = [
            torch.zeros(5 * max_batch, dtype=torch.int64, pin_memory=device.type == "cuda")
            for _ in range(NUM_TURNS)
        ]
        self._rows = integers(5 * max_batch)
        self._store_rows = integers(2 * max_batch)
        pages = -(-max_context // self._page_size)
        self._index_table = integers(max_batch * pages, dtype=torch.int32)
        self._topk_idx = integers(max_batch * cache.topk, dtype=torch.int32)
        self._scores = torch.empty(max_batch * max_context, device=device)
        self.next_token_S1 = integers(cache.page_table_SP.shape[0] + 1)
        self.logits_SV = torch.zeros((max_batch, vocab_size), device=device)
        self.fault_S = integers(max_batch, dtype=torch.int32)

    def input(self, batch: int) -> Tensor:
        """int64 [5, B], see `begin_step` in kernels/begin_step.py."""
        return self._input[: 5 * batch].view(5, batch)

    def upload(self, rows: list[SeatRow], batch: int, step: int) -> None:
        """Sends the rows of a step, padded up to `batch`, on their way to `input`."""
        staged = self._uploads[step % NUM_TURNS][: 5 * batch]
        num_padded = batch - len(rows)
        columns = (
            [row.seat for row in rows] + [-1] * num_padded,
            [row.position for row in rows] + [0] * num_padded,
            [row.ring_start for row in rows] + [0] * num_padded,
            [row.token_id for row in rows] + [0] * num_padded,
            [step] * batch,
        )
        staged.copy_(torch.tensor(columns, dtype=torch.int64).flatten())
        self._input[: 5 * batch].copy_(staged, non_blocking=True)

    def step(self, batch: int, context: int) -> StepBatch:
        """Views for `batch` rows of at most `context` positions."""
        rows = self._rows[: 5 * batch].view(5, batch)
        pages = -(-context // self._page_size)
        return StepBatch(
            token_ids_B=rows[0],
            positions_B=rows[1],
            lens_B=rows[2],
            seats_B=rows[3],
            index_slots_B=rows[4],
            index_table_BP=self._index_table[: batch * pages].view(batch, pages),
            store_rows_2B=self._store_rows[: 2 * batch].view(2, batch),
            scores_BC=self._scores[: batch * context].view(batch, context),
            topk_idx_BK=self._topk_idx[: batch * self._topk].view(batch, self._topk),
        )
