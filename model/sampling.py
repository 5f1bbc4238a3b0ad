"""Chooses output tokens from logits: temperature, top-k, top-p, min-p, seed, log-probabilities.

Called by a node's step thread behind `Model.logits`, on the logits' device and stream. A row's token
depends on its logits, its parameters, its seed and its position alone: not on the batch, the node
or the attempt. There is no generator state: one uniform a row comes from hashing (seed, position).

Filters are vLLM's, in vLLM's order: temperature, min-p, top-k (ties with the k-th stay), top-p over
what is left. Probabilities are float64 and the inverse CDF runs in order of token id, so that
rounding in the logits moves a boundary by as much and never re-orders candidates.

Shape suffixes: B rows, V vocabulary, N banned entries.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.wire import Sampling, TokenLogprob

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM."""

# splitmix64 (Steele, Lea and Flood, 2014); constants as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Parameters of the rows of one step, on the device; flags say what the host knows of them."""

    temperature_B: Tensor
    """float64"""
    top_p_B: Tensor
    """float64"""
    top_k_B: Tensor
    """int64; the vocabulary's size or more: off"""
    min_p_B: Tensor
    """float64"""
    seed_B: Tensor
    position_B: Tensor
    is_all_greedy: bool
    is_filtered: bool

    @classmethod
    def build(
        cls, rows: Sequence[tuple[Sampling, int]], device: torch.device | str = "cpu"
    ) -> SamplingBatch:
        """From (parameters, position of the token to be chosen) a row."""
        samplings = [sampling for sampling, _ in rows]

        def floats(name: str) -> Tensor:
            values = [getattr(sampling, name) for sampling in samplings]
            return torch.tensor(values, dtype=torch.float64, device=device)

        def integers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            temperature_B=floats("temperature"),
            top_p_B=floats("top_p"),
            top_k_B=integers([s.top_k if s.top_k > 0 else 1 << 31 for s in samplings]),
            min_p_B=floats("min_p"),
            seed_B=integers([_signed(sampling.seed) for sampling in samplings]),
            position_B=integers([position for _, position in rows]),
            is_all_greedy=all(s.temperature < GREEDY_BELOW for s in samplings),
            is_filtered=any(s.top_k > 0 or s.top_p < 1 or s.min_p > 0 for s in samplings),
        )


def sample(
    logits_BV: Tensor, batch: SamplingBatch, *, banned: Sequence[Collection[int]] = ()
) -> Tensor:
    """Chooses one token a row; int64 [B] on the logits' device.

    `logits_BV` float32, unchanged. `banned`: for each row the ids that must not be chosen (ids
    outside the vocabulary count for nothing), or empty. A row without a finite best logit (NaN from
    bad bytes, everything banned) gives -1: there is no token to choose, and the caller fails that
    request alone.
    """
    if any(banned):
        logits_BV = _mask(logits_BV, banned)
    best_B1 = logits_BV.amax(-1, keepdim=True)
    token_B = _lowest_best(logits_BV, best_B1)
    if not batch.is_all_greedy:
        is_greedy_B = batch.temperature_B < GREEDY_BELOW
        token_B = torch.where(is_greedy_B, token_B, _draw(logits_BV, best_B1, batch))
    return token_B.masked_fill(~best_B1[:, 0].isfinite(), -1)


def logprobs(logits_BV: Tensor, token_B: Tensor, top_n: Sequence[int]) -> list[TokenLogprob | None]:
    """Log-probabilities of the chosen tokens from raw logits, as wire types; waits for the device.

    `top_n`: for each row -1 (None comes back), 0 (the chosen token's) or the number of best tokens
    to name, best first, lowest id first on ties.
    """
    wanted = [row for row, count in enumerate(top_n) if count >= 0]
    results: list[TokenLogprob | None] = [None] * len(top_n)
    if not wanted:
        return results
    logprob_BV = logits_BV[wanted].float().log_softmax(-1)
    chosen = logprob_BV.gather(1, token_B[wanted].clamp(min=0)[:, None])[:, 0].tolist()
    width = min(max(top_n), logits_BV.shape[1])
    best = logprob_BV.topk(width, dim=-1) if width else None
    for index, row in enumerate(wanted):
        pairs: list[tuple[float, int]] = []
        if best is not None:
            values, ids = best.values[index].tolist(), best.indices[index].tolist()
            pairs = sorted(zip(values, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
        pairs = pairs[: top_n[row]]
        results[row] = TokenLogprob(
            logprob=chosen[index],
            top_ids=tuple(token_id for _, token_id in pairs),
            top_logprobs=tuple(value for value, _ in pairs),
        )
    return results


def uniforms(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """One float64 in [0, 1) a row from (seed, position), int64 [B] each: splitmix64, top 53 bits.

    The seed is mixed before the position joins it, so that seeds 1, 2, ... share no stream.
    """
    mixed_B = _splitmix64(_splitmix64(seed_B) + position_B)
    return _shift_right(mixed_B, 11).double() * 2.0**-53


def _draw(logits_BV: Tensor, best_B1: Tensor, batch: SamplingBatch) -> Tensor:
    """Inverse CDF over the filtered probabilities, in order of token id."""
    temperature_B1 = batch.temperature_B.clamp(min=GREEDY_BELOW)[:, None]
    weight_BV = ((logits_BV - best_B1).double() / temperature_B1).exp()
    if batch.is_filtered:
        weight_BV = weight_BV * _kept(weight_BV, batch)
    cdf_BV = weight_BV.cumsum(-1)
    threshold_B1 = uniforms(batch.seed_B, batch.position_B)[:, None] * cdf_BV[:, -1:]
    token_B = torch.searchsorted(cdf_BV, threshold_B1, right=True)[:, 0]
    # Rounding may put the threshold on the total: then the last token with any weight is meant.
    last_B = torch.searchsorted(cdf_BV, cdf_BV[:, -1:].contiguous())[:, 0]
    return torch.minimum(token_B, last_B)


def _kept(weight_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """Boolean [B, V]: what min-p, top-k and top-p leave. The best token always stays."""
    sorted_BV, order_BV = weight_BV.sort(dim=-1, descending=True, stable=True)
    # The best weight is 1, so min_p compares with the weights themselves.
    kept_BV = sorted_BV >= batch.min_p_B[:, None]
    last_B1 = (batch.top_k_B.clamp(max=weight_BV.shape[1]) - 1)[:, None]
    kept_BV &= sorted_BV >= sorted_BV.gather(1, last_B1)
    cdf_BV = (sorted_BV * kept_BV).cumsum(-1)
    before_BV = cdf_BV - sorted_BV
    top_p_B1 = batch.top_p_B[:, None]
    kept_BV &= (before_BV < top_p_B1 * cdf_BV[:, -1:]) | (top_p_B1 >= 1)
    kept_BV[:, 0] = True
    return torch.zeros_like(kept_BV).scatter_(1, order_BV, kept_BV)


def _lowest_best(logits_BV: Tensor, best_B1: Tensor) -> Tensor:
    """The lowest id among equals; torch.argmax promises none."""
    vocab = logits_BV.shape[1]
    ids_V = torch.arange(vocab, device=logits_BV.device)
    return torch.where(logits_BV == best_B1, ids_V, vocab).amin(-1)


def _mask(logits_BV: Tensor, banned: Sequence[Collection[int]]) -> Tensor:
    """A copy with -inf at banned ids."""
    vocab = logits_BV.shape[1]
    pairs = [(row, i) for row, ids in enumerate(banned) for i in ids if 0 <= i < vocab]
    index_N2 = torch.tensor(pairs, dtype=torch.int64, device=logits_BV.device).view(-1, 2)
    out_BV = logits_BV.clone()
    out_BV[index_N2[:, 0], index_N2[:, 1]] = float("-inf")
    return out_BV


def _splitmix64(state_B: Tensor) -> Tensor:
    """One step; int64 products wrap as unsigned ones do."""
    state_B = state_B + _GAMMA
    state_B = (state_B ^ _shift_right(state_B, 30)) * _MIX_1
    state_B = (state_B ^ _shift_right(state_B, 27)) * _MIX_2
    return state_B ^ _shift_right(state_B, 31)


def _shift_right(value_B: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own repeats the sign."""
    return (value_B >> bits) & ((1 << (64 - bits)) - 1)


def _signed(seed: int) -> int:
    """The seed's low 64 bits as a signed integer."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
