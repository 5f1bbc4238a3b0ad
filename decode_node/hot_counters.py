"""Counts of the hot cache, kept where the rows are, so that counting never waits for the device.

Written by the hot cache on the step thread, read by any thread. On a GPU, what is read is a copy on
its way through pinned memory: as of the last step or the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HotCacheStats:
    """Counted over the life of the node, once per index group and selected row."""

    hits: int = 0
    misses: int = 0
    rows_swapped_in: int = 0
    bytes_swapped_in: int = 0


class HotCounters:
    """Args: `layers_of_group`, how many layers share each index group's plan; `row_bytes` of a row.

    Attributes:
        num_misses_GS: int32, misses of each group and batch row of a step, written by `swap_in` and
            counted at the step's end.
    """

    def __init__(
        self,
        layers_of_group: list[int],
        *,
        num_seats: int,
        topk: int,
        row_bytes: int,
        device: torch.device,
    ) -> None:
        self._layers_G = torch.tensor(layers_of_group, dtype=torch.int64, device=device)
        self._topk = topk
        self._row_bytes = row_bytes
        self._totals_3 = torch.zeros(3, dtype=torch.int64, device=device)
        self._published_3 = self._totals_3
        if device.type == "cuda":
            self._published_3 = torch.zeros(3, dtype=torch.int64, pin_memory=True)
        groups = len(layers_of_group)
        self.num_misses_GS = torch.zeros((groups, num_seats), dtype=torch.int32, device=device)

    def end_step(self, lens_B: Tensor) -> None:
        """Adds a step of B sequences of these lengths (int64; 0: padded)."""
        misses_G = self.num_misses_GS[:, : lens_B.shape[0]].sum(1)
        num_selected = lens_B.clamp(max=self._topk).sum() * misses_G.shape[0]
        self._totals_3 += torch.stack(
            (num_selected, misses_G.sum(), (misses_G * self._layers_G).sum())
        )
        if self._published_3 is not self._totals_3:
            self._published_3.copy_(self._totals_3, non_blocking=True)

    @property
    def stats(self) -> HotCacheStats:
        selected, misses, rows = self._published_3.tolist()
        return HotCacheStats(selected - misses, misses, rows, rows * self._row_bytes)
