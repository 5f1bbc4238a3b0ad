"""Triton side of index_logits, for FP8 keys (layout index_k), and which kernel scores on a GPU.

Larger calls that csrc/index_logits.cu is written for go there (cuda_index_logits.py); a node may choose
either by name.

Launched on torch's current stream, without a synchronisation. Keys go to the tensor cores as they are
stored. A query head, divided by a power of two, is the nearest e4m3 number (queries that are rounded)
or the sum of two, the nearest and what it leaves: exact for bfloat16 queries down to 2**-9 of the
head's largest value, and within 2**-17 of that below. The power goes into the head's weight:
relu(2**n * x) = 2**n * relu(x). A key's scale is positive and multiplies its score at the end. FP8
tensor cores add up with about 14 bits.

Keys in float32 (index_fp32, for exact tests) are scored by torch ops on the device instead, which
allocate their temporaries. What differs from the references: lengths and pages out of range are
clamped and hidden and do not raise.

Suffixes: B batch rows, T tokens of a chunk or positions of a tile, I indexer heads, D key width, P
pages, X bytes of a page, C positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cuda_index_logits, index_choice
from .cuda_library import num_processors
from .store_index_keys import index_layout, unpack_index_pages

BLOCK_T = 128
"""Positions of a tile."""
_PROGRAMS_A_PROCESSOR = 4
"""Programs of index_logits that are resident together."""
_FP32_BLOCK_BYTES = 64 << 20


@triton.jit
def e4m3_power(query_ID, floor):
    """float32 [I, 1]: 2**ceil(log2(amax / 448)) of each head, amax at least `floor`: ue8m0's scale."""
    amax_I1 = tl.maximum(tl.max(tl.abs(query_ID), 1, keep_dims=True), floor)
    # By the bits of 448 = 1.75 * 2**8: a mantissa above 1.75 counts up to the next power.
    bits_I1 = (amax_I1.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000
    return tl.minimum(bits_I1.to(tl.float32, bitcast=True), 1e30) * (1.0 / 256.0)


@triton.jit
def _split_query(query_ID, ROUNDS: tl.constexpr):
    """float32 heads as high and low e4m3 [I, D] and the power of two they were divided by [I, 1]."""
    power_I1 = e4m3_power(query_ID, 1e-4 if ROUNDS else 1e-30)
    query_ID = query_ID / power_I1
    high_ID = query_ID.to(tl.float8e4nv)
    low_ID = (query_ID - high_ID.to(tl.float32)).to(tl.float8e4nv)
    return high_ID, low_ID, power_I1


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
    """Keys e4m3 [T, D] as stored, scales float32 [T], and which positions have a page."""
    page_T = tl.load(table + t_T // PAGE_SIZE, mask=is_in_T, other=-1)
    has_page_T = (page_T >= 0) & (page_T < num_pages)
    base_T = pages + tl.where(has_page_T, page_T, 0).to(tl.int64) * PAGE_BYTES
    offset_T = t_T % PAGE_SIZE
    d_D = tl.arange(0, BLOCK_D)
    mask_TD = has_page_T[:, None]
    if D != BLOCK_D:
        mask_TD = mask_TD & (d_D < D)[None, :]
    key_TD = tl.load(
        base_T[:, None] + (offset_T * D)[:, None] + d_D[None, :], mask=mask_TD, other=0.0
    )
    scale_at_T = (base_T + PAGE_SIZE * D).to(tl.pointer_type(tl.float32)) + offset_T
    scale_T = tl.load(scale_at_T, mask=has_page_T, other=0.0)
    return key_TD, scale_T, has_page_T


@triton.jit
def _scores(key_TD, high_ID, low_ID, weight_I, scale_T, ROUNDS: tl.constexpr):
    if ROUNDS:
        logits_TI = tl.dot(key_TD, tl.trans(high_ID))
    else:
        logits_TI = tl.dot(key_TD, tl.trans(low_ID))
        logits_TI = tl.dot(key_TD, tl.trans(high_ID), logits_TI)
    return tl.sum(tl.maximum(logits_TI, 0.0) * weight_I[None, :], 1) * scale_T


@triton.jit
def _index_logits_kernel(
    query,
    weight,
    pages,
    page_table,
    lengths,
    scores,
    query_stride_b,
    query_stride_i,
    weight_stride_b,
    table_stride_b,
    score_stride_b,
    num_columns,
    num_positions,
    num_pages,
    tiles,
    PAGE_BYTES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROUNDS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program: `tiles` tiles of TILE positions of one batch row."""
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * tiles * TILE
    length = tl.load(lengths + b).to(tl.int32)
    length = tl.minimum(tl.minimum(length, num_columns), num_positions)
    end = tl.minimum(first + tiles * TILE, num_columns)
    scores += b * score_stride_b
    table = page_table + b * table_stride_b
    lane_T = tl.arange(0, TILE)
    key_end = tl.maximum(tl.minimum(end, length), first)
    if first < length:
        i_I = tl.arange(0, BLOCK_I)
        d_D = tl.arange(0, BLOCK_D)
        query_ID = tl.load(
            query + b * query_stride_b + i_I[:, None] * query_stride_i + d_D[None, :],
            mask=(i_I < NUM_HEADS)[:, None] & (d_D < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        high_ID, low_ID, power_I1 = _split_query(query_ID, ROUNDS)
        weight_I = tl.load(weight + b * weight_stride_b + i_I, mask=i_I < NUM_HEADS, other=0.0)
        weight_I = weight_I * tl.reshape(power_I1, (BLOCK_I,))
        for start in tl.range(first, key_end, TILE, num_stages=STAGES):
            t_T = start + lane_T
            is_in_T = t_T < length
            key_TD, scale_T, has_page_T = _load_keys(
                pages, table, t_T, is_in_T, num_pages, PAGE_BYTES, PAGE_SIZE, D, BLOCK_D
            )
            score_T = _scores(key_TD, high_ID, low_ID, weight_I, scale_T, ROUNDS)
            score_T = tl.where(has_page_T, score_T, float("-inf"))
            tl.store(scores + t_T, score_T, mask=t_T < num_columns)
    behind = first + (key_end - first + TILE - 1) // TILE * TILE
    for start in range(behind, end, TILE):
        t_T = start + lane_T
        tl.store(scores + t_T, tl.full((TILE,), float("-inf"), tl.float32), mask=t_T < num_columns)


def index_logits(
    query_BID: Tensor,
    weight_BI: Tensor,
    pages_PX: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    scores_BC: Tensor,
    page_size: int,
    layout: str,
    rounds_queries: bool,
) -> None:
    """tidepool::index_logits on CUDA; arguments of kernels/index_logits.py."""
    tensors = (query_BID, weight_BI, pages_PX, page_table_BP)
    backend = index_choice.backend()
    is_large = scores_BC.numel() >= cuda_index_logits.MIN_POSITIONS
    wants_cuda = is_large if backend in ("auto", "deepgemm") else backend == "cuda"
    if wants_cuda and cuda_index_logits.can_take(*tensors, scores_BC, page_size, layout):
        cuda_index_logits.launch(*tensors, lengths_B, scores_BC, page_size, rounds_queries)
        return
    launch(None, *tensors, lengths_B, scores_BC, page_size, layout, rounds_queries)


def launch(
    tuning: dict[str, int] | None,
    query_BID: Tensor,
    weight_BI: Tensor,
    pages_PX: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    scores_BC: Tensor,
    page_size: int,
    layout: str,
    rounds_queries: bool,
) -> None:
    """As `index_logits`, in Triton; tuning {"TILE", "STAGES", "num_warps", "tiles"}, None: chosen."""
    batch, num_heads, width = query_BID.shape
    num_columns = scores_BC.shape[1]
    if not batch or not num_columns:
        return
    if layout != "index_k":
        _index_logits_fp32(
            query_BID, weight_BI, pages_PX, page_table_BP, lengths_B, scores_BC, page_size
        )
        return
    tuning = {"TILE": BLOCK_T, "STAGES": 2, "num_warps": 4, **(tuning or {})}
    num_tiles = -(-num_columns // tuning["TILE"])
    tiles = tuning.pop("tiles", 0) or choose_tiles(num_tiles, batch, query_BID.device)
    pages_PX = pages_PX.view(torch.float8_e4m3fn)
    query_BID, weight_BI, page_table_BP = (
        dense(query_BID),
        dense(weight_BI),
        dense(page_table_BP),
    )
    _index_logits_kernel[(-(-num_tiles // tiles), batch)](
        query_BID,
        weight_BI,
        pages_PX,
        page_table_BP,
        lengths_B.contiguous(),
        scores_BC,
        query_BID.stride(0),
        query_BID.stride(1),
        weight_BI.stride(0),
        page_table_BP.stride(0),
        scores_BC.stride(0),
        num_columns,
        page_table_BP.shape[1] * page_size,
        pages_PX.shape[0],
        tiles,
        PAGE_BYTES=pages_PX.stride(0),
        PAGE_SIZE=page_size,
        NUM_HEADS=num_heads,
        D=width,
        ROUNDS=rounds_queries,
        **blocks_of(num_heads, width),
        **tuning,
    )


def choose_tiles(num_tiles: int, batch: int, device: torch.device) -> int:
    """Tiles of a program: each row in equal parts, all of them resident at once if they can be."""
    parts = max(1, min(num_tiles, _PROGRAMS_A_PROCESSOR * num_processors(device) // batch))
    return -(-num_tiles // parts)


def blocks_of(num_heads: int, width: int) -> dict[str, int]:
    """Padded to what a matrix product takes."""
    return {
        "BLOCK_I": max(16, triton.next_power_of_2(num_heads)),
        "BLOCK_D": max(32, triton.next_power_of_2(width)),
    }


def dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def keys_fp32(pages_PX: Tensor, table: Tensor, page_size: int, width: int) -> tuple[Tensor, Tensor]:
    """(keys float32 [..., tokens, D], has a page bool [..., tokens]) of a page table [..., pages]."""
    index_layout("index_fp32", width)
    has_page = (table >= 0) & (table < pages_PX.shape[0])
    picked = pages_PX[torch.where(has_page, table, 0).to(torch.int64).flatten()]
    keys = unpack_index_pages(picked, page_size, "index_fp32", width)
    return keys.view(*table.shape[:-1], -1, width), has_page.repeat_interleave(page_size, -1)


def _index_logits_fp32(
    query_BID: Tensor,
    weight_BI: Tensor,
    pages_PX: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    scores_BC: Tensor,
    page_size: int,
) -> None:
    width = query_BID.shape[-1]
    room = min(scores_BC.shape[1], page_table_BP.shape[1] * page_size)
    scores_BC[:, room:] = float("-inf")
    if not room:
        return
    step = max(1, _FP32_BLOCK_BYTES // (4 * room * (width + query_BID.shape[1])))
    table_BP = page_table_BP[:, : -(-room // page_size)]
    for start in range(0, query_BID.shape[0], step):
        rows = slice(start, start + step)
        keys_BCD, has_page_BC = keys_fp32(pages_PX, table_BP[rows], page_size, width)
        logits_BIC = torch.bmm(query_BID[rows].float(), keys_BCD[:, :room].transpose(1, 2)).relu_()
        scores = torch.bmm(weight_BI[rows, None], logits_BIC).squeeze(1)
        t_C = torch.arange(room, device=scores.device)
        is_seen_BC = has_page_BC[:, :room] & (t_C < lengths_B[rows, None])
        scores_BC[rows, :room] = torch.where(is_seen_BC, scores, float("-inf"))
