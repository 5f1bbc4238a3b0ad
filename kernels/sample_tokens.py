"""Choosing one token a row from logits: the best one, what filters leave, and a seeded draw.

`best_tokens` for every row; for steps with sampled rows `draw_tokens` behind it, and between them
`filter_tokens` where a row has top-k, top-p or min-p. What a filter leaves is a prefix of the
tokens ordered by logit (equal ones by id), so it is told by its last token.

Weights are exp((logit - best) / temperature) in float64, logit - best in float32. The draw is the
inverse CDF in order of token id: rounding in the logits moves a boundary by as much and never
re-orders candidates. A row's result does not depend on the other rows. Filters are vLLM's, in
vLLM's order: temperature, min-p, top-k (ties with the k-th stay), top-p over what is left.

Suffixes: B rows, V vocabulary, N banned ids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda
from .registry import FLOAT32, INT64, Arguments, cpu_op, implement

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, as in vLLM."""
_FLOAT64 = (torch.float64,)

# splitmix64 (Steele, Lea and Flood, 2014); constants as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def best_tokens(
    logits_BV: Tensor, banned_BN: Tensor, num_banned_B: Tensor, best_B: Tensor, token_B: Tensor
) -> None:
    """The best logit of each row and the lowest id that has it.

    Args:
        logits_BV: float32 [B, V].
        banned_BN: int64 [B, N], ids below V that must not be chosen.
        num_banned_B: int64 [B], how many ids of `banned_BN` count, from the left.
        best_B: float32 [B]; written, NaN where the row holds a NaN.
        token_B: int64 [B]; written, -1 where the best logit is not finite.
    """
    arguments = _logits("best_tokens", logits_BV, banned_BN, num_banned_B)
    arguments.check("best_B", best_B, FLOAT32, "B")
    arguments.check("token_B", token_B, INT64, "B")
    _best_op(logits_BV, banned_BN, num_banned_B, best_B, token_B)


def filter_tokens(
    logits_BV: Tensor,
    banned_BN: Tensor,
    num_banned_B: Tensor,
    best_B: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    last_value_B: Tensor,
    last_id_B: Tensor,
) -> None:
    """The last token of each row that the filters leave, ordered by logit, then by id.

    Args:
        logits_BV, banned_BN, num_banned_B, best_B: of `best_tokens`.
        temperature_B, top_p_B, min_p_B: float64 [B]; 1 and 0 switch the last two off.
        top_k_B: int64 [B], at least 1; V or more: off.
        last_value_B: float32 [B]; written: its logit minus the best one.
        last_id_B: int64 [B]; written: its id.

    Rows whose best logit is not finite get any values.
    """
    arguments = _logits("filter_tokens", logits_BV, banned_BN, num_banned_B)
    arguments.check("best_B", best_B, FLOAT32, "B")
    arguments.check("temperature_B", temperature_B, _FLOAT64, "B")
    arguments.check("top_k_B", top_k_B, INT64, "B")
    arguments.check("top_p_B", top_p_B, _FLOAT64, "B")
    arguments.check("min_p_B", min_p_B, _FLOAT64, "B")
    arguments.check("last_value_B", last_value_B, FLOAT32, "B")
    arguments.check("last_id_B", last_id_B, INT64, "B")
    _filter_op(
        logits_BV,
        banned_BN,
        num_banned_B,
        best_B,
        temperature_B,
        top_k_B,
        top_p_B,
        min_p_B,
        last_value_B,
        last_id_B,
    )


def draw_tokens(
    logits_BV: Tensor,
    banned_BN: Tensor,
    num_banned_B: Tensor,
    best_B: Tensor,
    temperature_B: Tensor,
    seed_B: Tensor,
    position_B: Tensor,
    last_value_B: Tensor | None,
    last_id_B: Tensor | None,
    token_B: Tensor,
) -> None:
    """Draws a token for each row that is not greedy, by its seed and position.

    Args:
        logits_BV, banned_BN, num_banned_B, best_B: of `best_tokens`.
        temperature_B: float64 [B]; rows below GREEDY_BELOW keep their token.
        seed_B, position_B: int64 [B], see `uniforms`.
        last_value_B, last_id_B: of `filter_tokens`; None: nothing is filtered.
        token_B: int64 [B], of `best_tokens`; written, but for greedy rows and those at -1.
    """
    arguments = _logits("draw_tokens", logits_BV, banned_BN, num_banned_B)
    arguments.check("best_B", best_B, FLOAT32, "B")
    arguments.check("temperature_B", temperature_B, _FLOAT64, "B")
    arguments.check("seed_B", seed_B, INT64, "B")
    arguments.check("position_B", position_B, INT64, "B")
    if last_value_B is not None and last_id_B is not None:
        arguments.check("last_value_B", last_value_B, FLOAT32, "B")
        arguments.check("last_id_B", last_id_B, INT64, "B")
    arguments.check("token_B", token_B, INT64, "B")
    _draw_op(
        logits_BV,
        banned_BN,
        num_banned_B,
        best_B,
        temperature_B,
        seed_B,
        position_B,
        last_value_B,
        last_id_B,
        token_B,
    )


def _logits(op: str, logits_BV: Tensor, banned_BN: Tensor, num_banned_B: Tensor) -> Arguments:
    arguments = Arguments(op)
    arguments.check("logits_BV", logits_BV, FLOAT32, "B", None)
    arguments.check("banned_BN", banned_BN, INT64, "B", None)
    arguments.check("num_banned_B", num_banned_B, INT64, "B")
    return arguments


def uniforms(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """One float64 in [0, 1) a row from (seed, position), int64 [B] each: splitmix64, top 53 bits.

    The seed is mixed before the position joins it, so that seeds 1, 2, ... share no stream.
    """
    mixed_B = _splitmix64(_splitmix64(seed_B) + position_B)
    return _shift_right(mixed_B, 11).double() * 2.0**-53


def _best_tokens(
    logits_BV: Tensor, banned_BN: Tensor, num_banned_B: Tensor, best_B: Tensor, token_B: Tensor
) -> None:
    logits_BV = _without_banned(logits_BV, banned_BN, num_banned_B)
    best_B.copy_(logits_BV.amax(-1))
    vocab = logits_BV.shape[1]
    ids_V = torch.arange(vocab, device=logits_BV.device)
    # torch.argmax promises no order among equals.
    lowest_B = torch.where(logits_BV == best_B[:, None], ids_V, vocab).amin(-1)
    token_B.copy_(lowest_B.masked_fill(~best_B.isfinite(), -1))


def _filter_tokens(
    logits_BV: Tensor,
    banned_BN: Tensor,
    num_banned_B: Tensor,
    best_B: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    last_value_B: Tensor,
    last_id_B: Tensor,
) -> None:
    value_BV = _without_banned(logits_BV, banned_BN, num_banned_B) - best_B[:, None]
    value_BV, order_BV = value_BV.sort(dim=-1, descending=True, stable=True)
    weight_BV = _weights(value_BV, temperature_B)
    # The best weight is 1, so min_p compares with the weights themselves.
    kept_BV = weight_BV >= min_p_B[:, None]
    last_B1 = (top_k_B.clamp(max=weight_BV.shape[1]) - 1)[:, None]
    kept_BV &= value_BV >= value_BV.gather(1, last_B1)
    cdf_BV = (weight_BV * kept_BV).cumsum(-1)
    before_BV = cdf_BV - weight_BV
    top_p_B1 = top_p_B[:, None]
    kept_BV &= (before_BV < top_p_B1 * cdf_BV[:, -1:]) | (top_p_B1 >= 1)
    last_B1 = (kept_BV.sum(-1, keepdim=True) - 1).clamp(min=0)
    last_value_B.copy_(value_BV.gather(1, last_B1)[:, 0])
    last_id_B.copy_(order_BV.gather(1, last_B1)[:, 0])


def _draw_tokens(
    logits_BV: Tensor,
    banned_BN: Tensor,
    num_banned_B: Tensor,
    best_B: Tensor,
    temperature_B: Tensor,
    seed_B: Tensor,
    position_B: Tensor,
    last_value_B: Tensor | None,
    last_id_B: Tensor | None,
    token_B: Tensor,
) -> None:
    value_BV = _without_banned(logits_BV, banned_BN, num_banned_B) - best_B[:, None]
    weight_BV = _weights(value_BV, temperature_B)
    if last_value_B is not None and last_id_B is not None:
        ids_V = torch.arange(value_BV.shape[1], device=value_BV.device)
        is_tied_BV = (value_BV == last_value_B[:, None]) & (ids_V <= last_id_B[:, None])
        weight_BV = weight_BV * ((value_BV > last_value_B[:, None]) | is_tied_BV)
    cdf_BV = weight_BV.cumsum(-1)
    threshold_B1 = uniforms(seed_B, position_B)[:, None] * cdf_BV[:, -1:]
    drawn_B = torch.searchsorted(cdf_BV, threshold_B1, right=True)[:, 0]
    # Rounding may put the threshold on the total: then the last token with any weight is meant.
    last_B = torch.searchsorted(cdf_BV, cdf_BV[:, -1:].contiguous())[:, 0]
    is_fixed_B = (temperature_B < GREEDY_BELOW) | (token_B < 0)
    token_B.copy_(torch.where(is_fixed_B, token_B, torch.minimum(drawn_B, last_B)))


_best_op = cpu_op(mutates=("best_B", "token_B"))(_best_tokens)
_filter_op = cpu_op(mutates=("last_value_B", "last_id_B"))(_filter_tokens)
_draw_op = cpu_op(mutates=("token_B",))(_draw_tokens)
implement("best_tokens", cuda.best_tokens, "CUDA")
implement("filter_tokens", cuda.filter_tokens, "CUDA")
implement("draw_tokens", cuda.draw_tokens, "CUDA")


def _weights(value_BV: Tensor, temperature_B: Tensor) -> Tensor:
    return (value_BV.double() / temperature_B.clamp(min=GREEDY_BELOW)[:, None]).exp()


def _without_banned(logits_BV: Tensor, banned_BN: Tensor, num_banned_B: Tensor) -> Tensor:
    """-inf at banned ids; a copy, unless there is no room for any."""
    vocab, width = logits_BV.shape[1], banned_BN.shape[1]
    if not width:
        return logits_BV
    lane_N = torch.arange(width, device=banned_BN.device)
    target_BN = torch.where(lane_N < num_banned_B[:, None], banned_BN, vocab)
    return F.pad(logits_BV, (0, 1)).scatter_(1, target_BN, float("-inf"))[:, :vocab]


def _splitmix64(state_B: Tensor) -> Tensor:
    """One step; int64 products wrap as unsigned ones do."""
    state_B = state_B + _GAMMA
    state_B = (state_B ^ _shift_right(state_B, 30)) * _MIX_1
    state_B = (state_B ^ _shift_right(state_B, 27)) * _MIX_2
    return state_B ^ _shift_right(state_B, 31)


def _shift_right(value_B: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own repeats the sign."""
    return (value_B >> bits) & ((1 << (64 - bits)) - 1)
