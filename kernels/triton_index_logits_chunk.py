"""Triton side of index_logits_chunk, for FP8 keys (layout index_k).

Launched on torch's current stream, without a synchronisation; queries are prepared into memory of
torch's caching allocator. An e4m3 key is exact in float16, and a query head times a power of two is
too (bfloat16 queries: for values down to 2**-26 of the head's largest), so the products are those
of the reference; sums are float32 on the tensor cores. The power goes into the head's weight:
relu(2**n * x) = 2**n * relu(x). A key's scale is positive and multiplies its score at the end.
Queries that are rounded pass through e4m3 on the way to float16.

Keys in float32 (index_fp32, for exact tests) are scored by torch ops on the device instead. What
differs from the reference: pages out of range are hidden and do not raise.

Suffixes: T tokens of a chunk or positions of a tile, I indexer heads, D key width, P pages, X bytes
of a page, C positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_index_logits import blocks_of, dense, e4m3_power, keys_fp32

TILE = 128
"""Positions of a program."""
_CHUNK_TOKENS = 16
"""Tokens of a program: its keys are loaded once."""
_FP32_BLOCK_BYTES = 64 << 20


@triton.jit
def _power_of_head(query_ID):
    """float32 [I, 1]: a power of two that brings each head's largest value near 2**12."""
    amax_I1 = tl.max(tl.abs(query_ID), 1, keep_dims=True)
    # The exponent bits alone: 2**floor(log2(amax)).
    floor_I1 = (amax_I1.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(floor_I1, 1e-30), 1e30) * (1.0 / 4096.0)


@triton.jit
def _load_keys(
    pages,
    table,
    t_T,
    is_in_T,
    num_pages,
    PAGE_BYTES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys float16 [T, D] as stored, scales float32 [T], and which positions have a page."""
    page_T = tl.load(table + t_T // PAGE_SIZE, mask=is_in_T, other=-1)
    has_page_T = (page_T >= 0) & (page_T < num_pages)
    base_T = pages + tl.where(has_page_T, page_T, 0).to(tl.int64) * PAGE_BYTES
    offset_T = t_T % PAGE_SIZE
    d_D = tl.arange(0, BLOCK_D)
    mask_TD = has_page_T[:, None]
    if D != BLOCK_D:
        mask_TD = mask_TD & (d_D < D)[None, :]
    bytes_TD = tl.load(
        base_T[:, None] + (offset_T * D)[:, None] + d_D[None, :], mask=mask_TD, other=0
    )
    scale_at_T = (base_T + PAGE_SIZE * D).to(tl.pointer_type(tl.float32)) + offset_T
    scale_T = tl.load(scale_at_T, mask=has_page_T, other=0.0)
    return bytes_TD.to(tl.float8e4nv, bitcast=True).to(tl.float16), scale_T, has_page_T


@triton.jit
def _scores(key_TD, query_ID, weight_I, scale_T):
    logits_TI = tl.dot(key_TD, tl.trans(query_ID))
    return tl.sum(tl.maximum(logits_TI, 0.0) * weight_I[None, :], 1) * scale_T


@triton.jit
def _prepare_queries_kernel(
    query,
    weight,
    query_out,
    weight_out,
    query_stride_t,
    query_stride_i,
    weight_stride_t,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """One token: heads divided by a power of two [BLOCK_I, BLOCK_D], weights times it [BLOCK_I].

    Heads become query_out's dtype, float16 or e4m3; ROUNDS: through e4m3.
    """
    t = tl.program_id(0).to(tl.int64)
    i_I = tl.arange(0, BLOCK_I)
    d_D = tl.arange(0, BLOCK_D)
    query_ID = tl.load(
        query + t * query_stride_t + i_I[:, None] * query_stride_i + d_D[None, :],
        mask=(i_I < NUM_HEADS)[:, None] & (d_D < D)[None, :],
        other=0.0,
    ).to(tl.float32)
    query_out += t * BLOCK_I * BLOCK_D
    query_at_ID = query_out + i_I[:, None] * BLOCK_D + d_D[None, :]
    if ROUNDS:
        power_I1 = e4m3_power(query_ID, 1e-4)
        rounded_ID = (query_ID / power_I1).to(tl.float8e4nv)
        tl.store(query_at_ID, rounded_ID.to(query_out.dtype.element_ty))
    else:
        power_I1 = _power_of_head(query_ID)
        tl.store(query_at_ID, (query_ID / power_I1).to(tl.float16))
    weight_I = tl.load(weight + t * weight_stride_t + i_I, mask=i_I < NUM_HEADS, other=0.0)
    tl.store(weight_out + t * BLOCK_I + i_I, weight_I * tl.reshape(power_I1, (BLOCK_I,)))


@triton.jit
def _index_logits_chunk_kernel(
    query,
    weight,
    pages,
    page_table,
    scores,
    score_stride_t,
    num_tokens,
    first_position,
    num_columns,
    num_pages,
    PAGE_BYTES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program: TOKENS tokens against one tile of positions."""
    token = tl.program_id(1) * TOKENS
    last = tl.minimum(token + TOKENS, num_tokens)
    start = tl.program_id(0) * TILE
    t_T = start + tl.arange(0, TILE)
    scores += token.to(tl.int64) * score_stride_t
    if start >= first_position + last:
        for _ in range(token, last):
            none_T = tl.full((TILE,), float("-inf"), tl.float32)
            tl.store(scores + t_T, none_T, mask=t_T < num_columns)
            scores += score_stride_t
    else:
        key_TD, scale_T, has_page_T = _load_keys(
            pages,
            page_table,
            t_T,
            t_T < first_position + last,
            num_pages,
            PAGE_BYTES,
            PAGE_SIZE,
            D,
            BLOCK_D,
        )
        i_I = tl.arange(0, BLOCK_I)
        d_D = tl.arange(0, BLOCK_D)
        query += token.to(tl.int64) * BLOCK_I * BLOCK_D
        weight += token.to(tl.int64) * BLOCK_I
        for t in range(token, last):
            query_ID = tl.load(query + i_I[:, None] * BLOCK_D + d_D[None, :])
            score_T = _scores(key_TD, query_ID, tl.load(weight + i_I), scale_T)
            is_seen_T = has_page_T & (t_T <= first_position + t)
            score_T = tl.where(is_seen_T, score_T, float("-inf"))
            tl.store(scores + t_T, score_T, mask=t_T < num_columns)
            query += BLOCK_I * BLOCK_D
            weight += BLOCK_I
            scores += score_stride_t


def index_logits_chunk(
    query_TID: Tensor,
    weight_TI: Tensor,
    pages_PX: Tensor,
    page_table_P: Tensor,
    first_position: int,
    scores_TC: Tensor,
    page_size: int,
    layout: str,
    rounds_queries: bool,
) -> None:
    """tidepool::index_logits_chunk on CUDA; arguments of kernels/index_logits.py."""
    num_tokens, num_heads, width = query_TID.shape
    num_columns = scores_TC.shape[1]
    if not num_tokens or not num_columns:
        return
    if layout != "index_k":
        _chunk_fp32(
            query_TID, weight_TI, pages_PX, page_table_P, first_position, scores_TC, page_size
        )
        return
    blocks = blocks_of(num_heads, width)
    prepared_TID, prepared_TI = prepare_queries(
        query_TID, weight_TI, torch.float16, rounds_queries=rounds_queries
    )
    grid = (-(-num_columns // TILE), -(-num_tokens // _CHUNK_TOKENS))
    _index_logits_chunk_kernel[grid](
        prepared_TID,
        prepared_TI,
        pages_PX,
        page_table_P.contiguous(),
        scores_TC,
        scores_TC.stride(0),
        num_tokens,
        first_position,
        num_columns,
        pages_PX.shape[0],
        PAGE_BYTES=pages_PX.stride(0),
        PAGE_SIZE=page_size,
        D=width,
        TILE=TILE,
        TOKENS=_CHUNK_TOKENS,
        **blocks,
    )


def prepare_queries(
    query_TID: Tensor, weight_TI: Tensor, dtype: torch.dtype, *, rounds_queries: bool
) -> tuple[Tensor, Tensor]:
    """Heads over a power of two, padded [T, BLOCK_I, BLOCK_D] of `dtype`; weights times it."""
    query_TID, weight_TI = dense(query_TID), dense(weight_TI)
    num_tokens, num_heads, width = query_TID.shape
    blocks = blocks_of(num_heads, width)
    shape = (num_tokens, blocks["BLOCK_I"], blocks["BLOCK_D"])
    prepared_TID = torch.empty(shape, dtype=dtype, device=query_TID.device)
    prepared_TI = torch.empty(shape[:2], dtype=torch.float32, device=query_TID.device)
    _prepare_queries_kernel[(num_tokens,)](
        query_TID,
        weight_TI,
        prepared_TID,
        prepared_TI,
        query_TID.stride(0),
        query_TID.stride(1),
        weight_TI.stride(0),
        NUM_HEADS=num_heads,
        D=width,
        ROUNDS=rounds_queries,
        **blocks,
    )
    return prepared_TID, prepared_TI


def _chunk_fp32(
    query_TID: Tensor,
    weight_TI: Tensor,
    pages_PX: Tensor,
    page_table_P: Tensor,
    first_position: int,
    scores_TC: Tensor,
    page_size: int,
) -> None:
    num_tokens, num_heads, width = query_TID.shape
    end = first_position + num_tokens
    scores_TC[:, end:] = float("-inf")
    table_P = page_table_P[: -(-end // page_size)]
    keys_CD, has_page_C = keys_fp32(pages_PX, table_P, page_size, width)
    keys_DC, has_page_C = keys_CD[:end].t(), has_page_C[:end]
    t_C = torch.arange(end, device=scores_TC.device)
    step = max(1, _FP32_BLOCK_BYTES // (4 * num_heads * end))
    for start in range(0, num_tokens, step):
        rows = slice(start, min(start + step, num_tokens))
        logits_TIC = (query_TID[rows].float() @ keys_DC).relu_()
        scores = torch.bmm(weight_TI[rows, None], logits_TIC).squeeze(1)
        seen_T = torch.arange(first_position + start, first_position + rows.stop, device=t_C.device)
        is_seen_TC = has_page_C & (t_C <= seen_T[:, None])
        scores_TC[rows, :end] = torch.where(is_seen_TC, scores, float("-inf"))
