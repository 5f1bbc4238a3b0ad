"""An AttentionContext for one sequence that keeps everything in plain float32 tensors.

The exact yardstick: no pages, no encoding, stable top-k (lowest position wins a tie). Rows are
appended pass by pass, so a prompt may come in chunks and decode token by token.

    context = DenseContext(model.config)
    hidden = run(model, token_ids, context, chunk=7)
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidepool.model.config import ModelConfig
from tidepool.model.model import Model


class DenseContext:
    """Implements tidepool.model.context.AttentionContext."""

    def __init__(self, config: ModelConfig) -> None:
        self._top_k = config.index_topk
        self._latent: dict[int, Tensor] = {}
        self._rope: dict[int, Tensor] = {}
        self._index: dict[int, Tensor] = {}
        self._selected_TC = torch.empty(0)
        self.selections: list[tuple[int, Tensor]] = []
        """(index layer, bool [T, positions]) of each select, in call order."""

    def store_kv(self, layer: int, latent_TC: Tensor, rope_key_TR: Tensor) -> None:
        _append(self._latent, layer, latent_TC)
        _append(self._rope, layer, rope_key_TR)

    def store_index_keys(self, index_layer: int, key_TD: Tensor) -> None:
        _append(self._index, index_layer, key_TD)

    def select(self, index_layer: int, query_TID: Tensor, weight_TI: Tensor) -> None:
        key_CD = self._index[index_layer]
        score_TIC = torch.einsum("tid,cd->tic", query_TID.float(), key_CD).relu()
        score_TC = torch.einsum("ti,tic->tc", weight_TI, score_TIC)
        num_tokens, num_positions = score_TC.shape
        query_position = torch.arange(num_positions - num_tokens, num_positions)
        is_visible_TC = torch.arange(num_positions) <= query_position[:, None]
        score_TC = score_TC.masked_fill(~is_visible_TC, float("-inf"))
        best = score_TC.sort(dim=-1, descending=True, stable=True).indices[:, : self._top_k]
        selected = torch.zeros_like(is_visible_TC).scatter_(1, best, True)
        self._selected_TC = selected & is_visible_TC
        self.selections.append((index_layer, self._selected_TC))

    def attend(self, layer: int, q_latent_THC: Tensor, q_rope_THR: Tensor, scale: float) -> Tensor:
        latent, rope = self._latent[layer], self._rope[layer]
        logits = torch.einsum("thc,pc->thp", q_latent_THC.float(), latent)
        logits = scale * (logits + torch.einsum("thr,pr->thp", q_rope_THR.float(), rope))
        logits = logits.masked_fill(~self._selected_TC[:, None], float("-inf"))
        out = torch.einsum("thp,pc->thc", logits.softmax(-1), latent)
        return out.to(q_latent_THC.dtype)


def _append(store: dict[int, Tensor], key: int, rows: Tensor) -> None:
    rows = rows.float().clone()
    store[key] = torch.cat([store[key], rows]) if key in store else rows


def run(
    model: Model,
    token_ids: list[int],
    context: DenseContext,
    *,
    chunk: int | None = None,
    first_position: int = 0,
) -> Tensor:
    """Passes of at most `chunk` tokens; logits of every token, float32 [T, V]."""
    ids = torch.tensor(token_ids)
    positions = torch.arange(first_position, first_position + len(token_ids))
    step = chunk or len(token_ids)
    return torch.cat(
        [
            model.logits(model.forward(part, where, context))
            for part, where in zip(ids.split(step), positions.split(step), strict=True)
        ]
    )


def greedy(
    model: Model, token_ids: list[int], num_tokens: int, *, chunk: int | None = None
) -> list[int]:
    """Greedy continuation, one token a pass behind the prompt."""
    context = DenseContext(model.config)
    logits = run(model, token_ids, context, chunk=chunk)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < num_tokens:
        position = len(token_ids) + len(tokens) - 1
        logits = run(model, tokens[-1:], context, first_position=position)
        tokens.append(int(logits[-1].argmax()))
    return tokens
