"""What the indexer is trained on: its softmax should look like the attention it selects for.

Target of a query is the mean attention over the heads of the indexer's layer and of the layers that share its top-k;
the loss is the KL divergence from softmax(index score) to it, over all earlier keys (warm-up) or over the selected ones
(sparse phase). It is taken at sampled queries only: half of them at records, questions and answers, which are few.
Called by train.py; inputs are detached, so nothing but indexer weights gets a gradient.
"""

import torch
from torch import Tensor

from . import train_model as tm

SPECIAL_WEIGHT = 8.0


def sample_rows(special_BT: Tensor, num_rows: int) -> Tensor:
    """Positions [B, num_rows] of the sampled queries, without repetition."""
    return torch.multinomial(1.0 + SPECIAL_WEIGHT * special_BT.float(), num_rows)


def index_groups() -> list[list[int]]:
    """Layers by index group: a layer with an indexer, then those that share its top-k."""
    groups: list[list[int]] = []
    for layer, kind in enumerate(tm.INDEXER_TYPES):
        if kind == "full":
            groups.append([])
        groups[-1].append(layer)
    return groups


def index_loss(states: list[tm.LayerState], rows_BS: Tensor, length: int) -> Tensor:
    """Mean KL over groups and sampled rows; differentiable in the indexers' weights."""
    losses = [_group_loss([states[i] for i in group], rows_BS, length) for group in index_groups()]
    return torch.stack(losses).mean()


def _group_loss(states: list[tm.LayerState], rows_BS: Tensor, length: int) -> Tensor:
    lead = states[0]
    num_sequences, num_rows = rows_BS.shape
    allowed = _allowed_rows(lead, rows_BS, length)
    target = torch.stack([_attention(s, rows_BS, allowed, length) for s in states]).mean(0)
    flat = (
        rows_BS + torch.arange(num_sequences, device=rows_BS.device)[:, None] * length
    ).flatten()
    w = lead.weights
    picked = (t[flat] for t in (lead.q_latent_NR, lead.normed_ND, lead.cos, lead.sin))
    iq, head_weights = tm.index_queries(*picked, w)
    ik = tm.index_keys(lead.normed_ND, lead.cos, lead.sin, w)
    shape = (num_sequences, num_rows)
    scores = tm.index_scores(
        iq.unflatten(0, shape),
        ik.unflatten(0, (num_sequences, length)),
        head_weights.unflatten(0, shape),
    )
    log_q = scores.masked_fill(~allowed, -torch.inf).log_softmax(-1).masked_fill(~allowed, 0.0)
    return (torch.special.xlogy(target, target) - target * log_q).sum(-1).mean()


def _allowed_rows(state: tm.LayerState, rows_BS: Tensor, length: int) -> Tensor:
    """Keys that each sampled query may see, bool [B, S, T]."""
    if state.allowed is None:
        return rows_BS[..., None] >= torch.arange(length, device=rows_BS.device)
    return state.allowed.gather(1, rows_BS[..., None].expand(-1, -1, length))


@torch.no_grad()
def _attention(state: tm.LayerState, rows_BS: Tensor, allowed: Tensor, length: int) -> Tensor:
    """Attention of the sampled queries averaged over heads, fp32 [B, S, T]."""
    shape = (rows_BS.shape[0], length)
    q, k = (t.unflatten(0, shape).transpose(1, 2) for t in (state.q_NAQ, state.k_NAQ))
    index = rows_BS[:, None, :, None].expand(-1, tm.NUM_HEADS, -1, tm.QK_DIM)
    logits = (q.gather(2, index) @ k.transpose(2, 3)).float() * tm.QK_DIM**-0.5
    return logits.masked_fill_(~allowed[:, None], -torch.inf).softmax(-1).mean(1)
