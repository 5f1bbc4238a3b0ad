"""Triton side of filter_tokens: the best 1,024 tokens are sorted, the rest is summed up.

Launches: select_topk finds the candidates; the weights of each chunk of a row are added up; a
program a row sorts its candidates and applies the filters to them. Where they leave the last
candidate in (or its equals could be behind), that program searches the whole row instead: by
bisection over the bits of the logits, some 70 times over the row, without a sort and for that row
alone. Both ways are exact.

Launched on torch's current stream, without a synchronisation; candidates and sums live in memory of
torch's caching allocator (fixed inside a captured graph).

Tokens are ordered by `depth`: the bits of best - logit, which order as the numbers do, since they
are not negative. Suffixes: B rows, V vocabulary or tokens of a chunk, C candidates, S chunks of a
row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cuda_select_topk import select_topk
from .triton_sample_tokens import CHUNK, dense, load_chunk

NUM_CANDIDATES = 1024
_INFINITY = tl.constexpr(0x7F800000)
_LAST_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _depth(logit, best):
    return (logit - best).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _weight(depth, temperature):
    value = -depth.to(tl.float32, bitcast=True)
    return tl.exp(value.to(tl.float64) / temperature)


@triton.jit
def _sums_kernel(
    logits,
    banned,
    num_banned,
    best,
    temperature,
    min_p,
    part_sum,
    logits_stride,
    banned_stride,
    num_banned_stride,
    temperature_stride,
    min_p_stride,
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
):
    """Sum of a chunk's weights that are not below min_p."""
    chunk = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    num = tl.load(num_banned + b * num_banned_stride).to(tl.int32)
    _, logit_V = load_chunk(
        logits + b * logits_stride, banned + b * banned_stride, num, chunk, vocab, CHUNK
    )
    t = tl.maximum(tl.load(temperature + b * temperature_stride), 1e-5)
    weight_V = _weight(_depth(logit_V, tl.load(best + b)), t)
    weight_V = tl.where(weight_V >= tl.load(min_p + b * min_p_stride), weight_V, 0.0)
    tl.store(part_sum + b * num_chunks + chunk, tl.sum(weight_V, 0))


@triton.jit
def _count_and_sum(
    logits, banned, num_banned, best, vocab, t, floor, depth_k, limit, CHUNK: tl.constexpr
):
    """(tokens at most `limit` deep; weight above `limit` of those within depth_k and min_p)."""
    count = 0
    total = tl.zeros((), tl.float64)
    for chunk in range((vocab + CHUNK - 1) // CHUNK):
        id_V, logit_V = load_chunk(logits, banned, num_banned, chunk, vocab, CHUNK)
        depth_V = _depth(logit_V, best)
        weight_V = _weight(depth_V, t)
        is_in_V = (depth_V < limit) & (depth_V <= depth_k) & (weight_V >= floor)
        count += tl.sum(((depth_V <= limit) & (id_V < vocab)).to(tl.int32), 0)
        total += tl.sum(tl.where(is_in_V, weight_V, 0.0), 0)
    return count, total


@triton.jit
def _search_row(logits, banned, num_banned, best, vocab, t, k, p, floor, CHUNK: tl.constexpr):
    """(depth of the last kept token, its id) by bisection over the whole row."""
    low, high = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + _INFINITY
    if k < vocab:
        while low < high:  # the smallest depth that holds k tokens
            middle = low + (high - low) // 2
            count, _ = _count_and_sum(
                logits, banned, num_banned, best, vocab, t, floor, _INFINITY, middle, CHUNK
            )
            if count >= k:
                high = middle
            else:
                low = middle + 1
    depth_k = high
    low, high = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + _INFINITY
    while low < high:  # the largest depth whose weight min_p leaves
        middle = low + (high - low + 1) // 2
        if _weight(middle, t) >= floor:
            low = middle
        else:
            high = middle - 1
    depth = tl.minimum(depth_k, low)
    last_id = vocab
    if p < 1:
        _, total = _count_and_sum(
            logits, banned, num_banned, best, vocab, t, floor, depth_k, _INFINITY, CHUNK
        )
        low, high = tl.zeros((), tl.int32), depth
        while low < high:  # the largest depth with less than the share in front of it
            middle = low + (high - low + 1) // 2
            _, before = _count_and_sum(
                logits, banned, num_banned, best, vocab, t, floor, depth_k, middle, CHUNK
            )
            if before < p * total:
                low = middle
            else:
                high = middle - 1
        depth = low
        _, before = _count_and_sum(
            logits, banned, num_banned, best, vocab, t, floor, depth_k, depth, CHUNK
        )
        last_id = tl.full((), -1, tl.int32)
        rank = 0
        for chunk in range((vocab + CHUNK - 1) // CHUNK):  # its equals, by id
            id_V, logit_V = load_chunk(logits, banned, num_banned, chunk, vocab, CHUNK)
            is_tied_V = (_depth(logit_V, best) == depth) & (id_V < vocab)
            rank_V = rank + tl.cumsum(is_tied_V.to(tl.int32), 0) - 1
            is_in_V = before + rank_V.to(tl.float64) * _weight(depth, t) < p * total
            is_in_V = is_in_V | ((depth == 0) & (rank_V == 0))
            last_id = tl.maximum(last_id, tl.max(tl.where(is_tied_V & is_in_V, id_V, -1), 0))
            rank += tl.sum(is_tied_V.to(tl.int32), 0)
    return depth, last_id


@triton.jit
def _filter_kernel(
    logits,
    banned,
    num_banned,
    best,
    temperature,
    top_k,
    top_p,
    min_p,
    candidates,
    part_sum,
    last_value,
    last_id,
    logits_stride,
    banned_stride,
    num_banned_stride,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    logits += b * logits_stride
    banned += b * banned_stride
    num = tl.load(num_banned + b * num_banned_stride).to(tl.int32)
    highest = tl.load(best + b)
    t = tl.maximum(tl.load(temperature + b * temperature_stride), 1e-5)
    k = tl.minimum(tl.load(top_k + b * top_k_stride), vocab).to(tl.int32)
    p = tl.load(top_p + b * top_p_stride)
    floor = tl.load(min_p + b * min_p_stride)
    is_finite = tl.abs(highest) < float("inf")
    if is_finite & ((k < vocab) | (p < 1) | (floor > 0)):
        c_C = tl.arange(0, C)
        id_C = tl.load(candidates + b * C + c_C)
        is_in_C = id_C >= 0
        depth_C = _depth(tl.load(logits + id_C, mask=is_in_C, other=float("-inf")), highest)
        for n in range(num):
            is_in_C = is_in_C & (id_C != tl.load(banned + n))
        count = tl.sum(is_in_C.to(tl.int32), 0)
        key_C = (depth_C.to(tl.int64) << 32) | id_C.to(tl.int64)
        key_C = tl.sort(tl.where(is_in_C, key_C, _LAST_KEY))
        depth_C = (key_C >> 32).to(tl.int32)
        id_C = (key_C & 0xFFFFFFFF).to(tl.int32)
        weight_C = _weight(depth_C, t)
        is_kept_C = (c_C < count) & (weight_C >= floor)
        is_k_in = k <= count
        depth_k = tl.sum(tl.where(c_C == k - 1, depth_C, 0), 0)
        is_kept_C = is_kept_C & ((depth_C <= depth_k) | (not is_k_in))
        num_kept = tl.sum(is_kept_C.to(tl.int32), 0)
        # Nothing behind the candidates can be among what top-k and min-p leave.
        is_closed = num_kept < count
        weight_C = tl.where(c_C < count, weight_C, 0.0)
        cdf_C = tl.cumsum(tl.where(is_kept_C, weight_C, 0.0), 0)
        s_S = tl.arange(0, S)
        sum_S = tl.load(part_sum + b * num_chunks + s_S, mask=s_S < num_chunks, other=0.0)
        total = tl.where(is_closed, tl.sum(tl.where(is_kept_C, weight_C, 0.0), 0), tl.sum(sum_S, 0))
        if p < 1:
            is_kept_C = is_kept_C & (cdf_C - weight_C < p * total)
            num_kept = tl.sum(is_kept_C.to(tl.int32), 0)
            # With top-k off the sum over the row is the total, and top-p may end inside.
            is_closed = is_closed | ((k == vocab) & (num_kept < count))
        is_closed = is_closed | (vocab <= C)
        last = tl.maximum(num_kept, 1) - 1
        depth = tl.sum(tl.where(c_C == last, depth_C, 0), 0)
        end = tl.sum(tl.where(c_C == last, id_C, 0), 0)
        if not is_closed:
            depth, end = _search_row(logits, banned, num, highest, vocab, t, k, p, floor, CHUNK)
        tl.store(last_value + b, -depth.to(tl.float32, bitcast=True))
        tl.store(last_id + b, end.to(tl.int64))
    else:
        tl.store(last_value + b, float("-inf"))
        tl.store(last_id + b, vocab.to(tl.int64))


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
    """tidepool::filter_tokens on CUDA; arguments of kernels/sample_tokens.py."""
    batch, vocab = logits_BV.shape
    if not batch:
        return
    device = logits_BV.device
    candidates = torch.empty((batch, NUM_CANDIDATES), dtype=torch.int32, device=device)
    lengths = torch.full((batch,), vocab, dtype=torch.int32, device=device)
    select_topk(logits_BV, lengths, candidates)
    launch(
        candidates,
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


def launch(
    candidates_BC: Tensor,
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
    """As `filter_tokens`, with the candidates: ids int32 [B, C], a power of two, -1 for none."""
    batch, vocab = logits_BV.shape
    logits_BV, banned_BN, best_B = dense(logits_BV), dense(banned_BN), best_B.contiguous()
    num_chunks = triton.cdiv(vocab, CHUNK)
    part_sum = torch.empty((batch, num_chunks), dtype=torch.float64, device=logits_BV.device)
    rows = (logits_BV, banned_BN, num_banned_B, best_B, temperature_B)
    strides = tuple(tensor.stride(0) for tensor in (*rows[:3], temperature_B))
    _sums_kernel[(num_chunks, batch)](
        *rows, min_p_B, part_sum, *strides, min_p_B.stride(0), vocab, num_chunks, CHUNK=CHUNK
    )
    last_value, last_id = last_value_B.contiguous(), last_id_B.contiguous()
    _filter_kernel[(batch,)](
        *rows,
        top_k_B,
        top_p_B,
        min_p_B,
        candidates_BC,
        part_sum,
        last_value,
        last_id,
        *strides,
        top_k_B.stride(0),
        top_p_B.stride(0),
        min_p_B.stride(0),
        vocab,
        num_chunks,
        CHUNK=CHUNK,
        C=candidates_BC.shape[1],
        S=triton.next_power_of_2(num_chunks),
        num_warps=8,
    )
    if last_value is not last_value_B:
        last_value_B.copy_(last_value)
    if last_id is not last_id_B:
        last_id_B.copy_(last_id)
