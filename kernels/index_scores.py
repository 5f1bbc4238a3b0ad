"""The scores of one decode step's sequences: by the op index_logits, or by DeepGEMM.

A step's context makes one and calls it for every index layer, on the step's stream. Through the op
scores stand in the step's own buffer; DeepGEMM's are where its wheel put them, and no copy is made.
"""

from __future__ import annotations

from torch import Tensor

from . import deepgemm, index_choice
from .index_logits import index_logits


class IndexScores:
    """Args:
    lengths_B: int32 or int64, as of index_logits.
    scores_BC: float32, the buffer for scores.
    page_size: tokens a page of keys.
    layout: name of an IndexLayout.
    """

    def __init__(self, lengths_B: Tensor, scores_BC: Tensor, page_size: int, layout: str) -> None:
        self._lengths_B = lengths_B
        self._scores_BC = scores_BC
        self._page_size = page_size
        self._layout = layout
        self._schedule: deepgemm.Schedule | None = None

    def __call__(
        self, query_BID: Tensor, weight_BI: Tensor, pages_PX: Tensor, page_table_BP: Tensor
    ) -> Tensor:
        """Scores float32 [B, C] of one layer's keys, valid until the next call.

        Behind a row's length they are -inf (the op) or anything (DeepGEMM).
        """
        if index_choice.wants_deepgemm(len(self._lengths_B)) and deepgemm.can_take(
            query_BID, pages_PX, self._page_size, self._layout
        ):
            if self._schedule is None:
                self._schedule = deepgemm.make_schedule(self._lengths_B)
            columns = self._scores_BC.shape[1]
            return deepgemm.index_scores(
                self._schedule, query_BID, weight_BI, pages_PX, page_table_BP, columns
            )
        index_logits(
            query_BID,
            weight_BI,
            pages_PX,
            page_table_BP,
            self._lengths_B,
            self._scores_BC,
            self._page_size,
            self._layout,
        )
        return self._scores_BC
