"""Triton side of best_tokens and draw_tokens: two launches each, whatever the vocabulary.

The first launch gives every chunk of a row to a program of its own, the second joins a row's
chunks in their order; how a row is cut depends on the vocabulary alone, and so does its result.
Launched on torch's current stream, without a synchronisation; the chunks' results live in memory
of torch's caching allocator (fixed inside a captured graph).

Suffixes: B rows, V vocabulary or tokens of a chunk, S chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sample_tokens import GREEDY_BELOW

CHUNK = 4096
"""Tokens of a program."""
_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def load_chunk(logits, banned, num_banned, chunk, vocab, CHUNK: tl.constexpr):
    """A chunk's ids int32 [V] and logits float32 [V], -inf at banned ids and behind the end."""
    id_V = chunk * CHUNK + tl.arange(0, CHUNK)
    logit_V = tl.load(logits + id_V, mask=id_V < vocab, other=float("-inf"))
    for n in range(num_banned):
        logit_V = tl.where(id_V == tl.load(banned + n), float("-inf"), logit_V)
    return id_V, logit_V


@triton.jit
def _best_of(value, token_id, no_id):
    """(largest value, the lowest id that has it); (NaN, any) if a value is NaN."""
    is_number = tl.abs(value) <= float("inf")
    best = tl.max(tl.where(is_number, value, float("-inf")), 0)
    lowest = tl.min(tl.where(value == best, token_id, no_id), 0)
    has_nan = tl.min(is_number.to(tl.int32), 0) == 0
    return tl.where(has_nan, float("nan"), best), lowest


@triton.jit
def _best_chunks_kernel(
    logits,
    banned,
    num_banned,
    part_value,
    part_id,
    logits_stride,
    banned_stride,
    num_banned_stride,
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    num = tl.load(num_banned + b * num_banned_stride).to(tl.int32)
    id_V, logit_V = load_chunk(
        logits + b * logits_stride, banned + b * banned_stride, num, chunk, vocab, CHUNK
    )
    best, lowest = _best_of(logit_V, id_V, vocab)
    tl.store(part_value + b * num_chunks + chunk, best)
    tl.store(part_id + b * num_chunks + chunk, lowest)


@triton.jit
def _best_rows_kernel(
    part_value, part_id, best, token, best_stride, token_stride, vocab, num_chunks, S: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    s_S = tl.arange(0, S)
    is_in_S = s_S < num_chunks
    value_S = tl.load(part_value + b * num_chunks + s_S, mask=is_in_S, other=float("-inf"))
    id_S = tl.load(part_id + b * num_chunks + s_S, mask=is_in_S, other=vocab)
    value, token_id = _best_of(value_S, id_S, vocab)
    tl.store(best + b * best_stride, value)
    # A comparison with NaN is false.
    is_finite = tl.abs(value) < float("inf")
    tl.store(token + b * token_stride, tl.where(is_finite, token_id, -1).to(tl.int64))


@triton.jit
def _weights(logit_V, id_V, best, temperature, last_value, last_id, IS_FILTERED: tl.constexpr):
    """float64 weights of a chunk, 0 where filtered."""
    value_V = logit_V - best
    weight_V = tl.exp(value_V.to(tl.float64) / temperature)
    if IS_FILTERED:
        is_kept_V = (value_V > last_value) | ((value_V == last_value) & (id_V <= last_id))
        weight_V = tl.where(is_kept_V, weight_V, 0.0)
    return weight_V


@triton.jit
def _draw_chunks_kernel(
    logits,
    banned,
    num_banned,
    best,
    temperature,
    last_value,
    last_id,
    token,
    part_sum,
    logits_stride,
    banned_stride,
    num_banned_stride,
    temperature_stride,
    token_stride,
    vocab,
    num_chunks,
    IS_FILTERED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    t = tl.load(temperature + b * temperature_stride)
    if (t >= _GREEDY_BELOW) & (tl.load(token + b * token_stride) >= 0):
        num = tl.load(num_banned + b * num_banned_stride).to(tl.int32)
        id_V, logit_V = load_chunk(
            logits + b * logits_stride, banned + b * banned_stride, num, chunk, vocab, CHUNK
        )
        value, token_id = 0.0, 0
        if IS_FILTERED:
            value, token_id = tl.load(last_value + b), tl.load(last_id + b).to(tl.int32)
        weight_V = _weights(logit_V, id_V, tl.load(best + b), t, value, token_id, IS_FILTERED)
        tl.store(part_sum + b * num_chunks + chunk, tl.sum(weight_V, 0))


@triton.jit
def _splitmix64(state):
    state = state + _GAMMA
    state = (state ^ (state >> 30)) * _MIX_1
    state = (state ^ (state >> 27)) * _MIX_2
    return state ^ (state >> 31)


@triton.jit
def _draw_rows_kernel(
    logits,
    banned,
    num_banned,
    best,
    temperature,
    seed,
    position,
    last_value,
    last_id,
    token,
    part_sum,
    logits_stride,
    banned_stride,
    num_banned_stride,
    temperature_stride,
    seed_stride,
    position_stride,
    token_stride,
    vocab,
    num_chunks,
    IS_FILTERED: tl.constexpr,
    CHUNK: tl.constexpr,
    S: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + b * temperature_stride)
    if (t >= _GREEDY_BELOW) & (tl.load(token + b * token_stride) >= 0):
        mixed = _splitmix64(tl.load(seed + b * seed_stride).to(tl.uint64))
        mixed = _splitmix64(mixed + tl.load(position + b * position_stride).to(tl.uint64))
        uniform = (mixed >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)
        s_S = tl.arange(0, S)
        sum_S = tl.load(part_sum + b * num_chunks + s_S, mask=s_S < num_chunks, other=0.0)
        cdf_S = tl.cumsum(sum_S, 0)
        threshold = uniform * tl.sum(tl.where(s_S == S - 1, cdf_S, 0.0), 0)
        # Rounding may put the threshold on the total: then the last chunk with any weight is meant.
        last = tl.max(tl.where(sum_S > 0, s_S, 0), 0)
        chunk = tl.minimum(tl.min(tl.where(cdf_S > threshold, s_S, S), 0), last)
        before = tl.sum(tl.where(s_S == chunk, cdf_S - sum_S, 0.0), 0)
        num = tl.load(num_banned + b * num_banned_stride).to(tl.int32)
        id_V, logit_V = load_chunk(
            logits + b * logits_stride, banned + b * banned_stride, num, chunk, vocab, CHUNK
        )
        value, token_id = 0.0, 0
        if IS_FILTERED:
            value, token_id = tl.load(last_value + b), tl.load(last_id + b).to(tl.int32)
        weight_V = _weights(logit_V, id_V, tl.load(best + b), t, value, token_id, IS_FILTERED)
        cdf_V = before + tl.cumsum(weight_V, 0)
        last = tl.max(tl.where(weight_V > 0, id_V, 0), 0)
        drawn = tl.min(tl.where((cdf_V > threshold) & (weight_V > 0), id_V, vocab), 0)
        tl.store(token + b * token_stride, tl.minimum(drawn, last).to(tl.int64))


def best_tokens(
    logits_BV: Tensor, banned_BN: Tensor, num_banned_B: Tensor, best_B: Tensor, token_B: Tensor
) -> None:
    """tidepool::best_tokens on CUDA; arguments of kernels/sample_tokens.py."""
    batch, vocab = logits_BV.shape
    if not batch:
        return
    logits_BV, banned_BN = dense(logits_BV), dense(banned_BN)
    num_chunks = triton.cdiv(vocab, CHUNK)
    part_value = torch.empty((batch, num_chunks), dtype=torch.float32, device=logits_BV.device)
    part_id = torch.empty((batch, num_chunks), dtype=torch.int32, device=logits_BV.device)
    _best_chunks_kernel[(num_chunks, batch)](
        logits_BV,
        banned_BN,
        num_banned_B,
        part_value,
        part_id,
        logits_BV.stride(0),
        banned_BN.stride(0),
        num_banned_B.stride(0),
        vocab,
        num_chunks,
        CHUNK=CHUNK,
    )
    _best_rows_kernel[(batch,)](
        part_value,
        part_id,
        best_B,
        token_B,
        best_B.stride(0),
        token_B.stride(0),
        vocab,
        num_chunks,
        S=triton.next_power_of_2(num_chunks),
        num_warps=1,
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
    """tidepool::draw_tokens on CUDA; arguments of kernels/sample_tokens.py."""
    batch, vocab = logits_BV.shape
    if not batch:
        return
    logits_BV, banned_BN, best_B = dense(logits_BV), dense(banned_BN), best_B.contiguous()
    is_filtered = last_value_B is not None and last_id_B is not None
    last_value_B = best_B if last_value_B is None else last_value_B.contiguous()
    last_id_B = token_B if last_id_B is None else last_id_B.contiguous()
    num_chunks = triton.cdiv(vocab, CHUNK)
    part_sum = torch.empty((batch, num_chunks), dtype=torch.float64, device=logits_BV.device)
    rows = (logits_BV, banned_BN, num_banned_B, best_B, temperature_B)
    strides = tuple(tensor.stride(0) for tensor in (*rows[:3], temperature_B))
    _draw_chunks_kernel[(num_chunks, batch)](
        *rows,
        last_value_B,
        last_id_B,
        token_B,
        part_sum,
        *strides,
        token_B.stride(0),
        vocab,
        num_chunks,
        IS_FILTERED=is_filtered,
        CHUNK=CHUNK,
    )
    _draw_rows_kernel[(batch,)](
        *rows,
        seed_B,
        position_B,
        last_value_B,
        last_id_B,
        token_B,
        part_sum,
        *strides,
        seed_B.stride(0),
        position_B.stride(0),
        token_B.stride(0),
        vocab,
        num_chunks,
        IS_FILTERED=is_filtered,
        CHUNK=CHUNK,
        S=triton.next_power_of_2(num_chunks),
    )


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
