"""Indexer scores of queries against paged keys: for decode (a token of each of B sequences) and for
a chunk of one sequence's prompt.

score[t] = sum_i weight[i] * relu(query[i] . key[t]), in float32. The weights already hold the scale
(model/context.py). Weights may be negative and relu gives exact zeros, so exact ties are common;
select_topk decides them. Source: DeepSeek-V3.2's lightning indexer.

Queries of FP8 keys may be rounded to e4m3 with a power of two a head and token, as DeepSeek's own
inference does (rounds_queries; a node's choice, see index_choice.py). Keys in float32 keep theirs.

Suffixes: B batch rows, T tokens of a chunk, I indexer heads, D key width, P pages, X bytes of a page,
C positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import KernelError
from . import cuda, fp8, index_choice
from .registry import BYTES, FLOAT32, FLOATS, INT32, INTS, Arguments, cpu_op, implement
from .row_bytes import check_range
from .store_index_keys import index_layout, unpack_index_pages

MAX_BLOCK_BYTES = 64 << 20
"""Bound of the temporaries of a chunk."""


def index_logits(
    query_BID: Tensor,
    weight_BI: Tensor,
    pages_PX: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    scores_BC: Tensor,
    page_size: int,
    layout: str,
    *,
    rounds_queries: bool | None = None,
) -> None:
    """Scores of all positions of B sequences.

    Args:
        query_BID: float32, bfloat16 or float16 [B, I, D].
        weight_BI: float32 [B, I].
        pages_PX: uint8 [P, page bytes], indexer keys of one layer.
        page_table_BP: int32 [B, pages of a sequence]; -1 = hole, its positions score -inf.
        lengths_B: int32 or int64 [B], visible positions; 0 for a padded row.
        scores_BC: float32 [B, C], C >= every length; written whole, -inf from the length on.
        page_size: tokens a page.
        layout: name of an IndexLayout.
        rounds_queries: score with queries rounded to e4m3; None: the node's choice.

    Raises KernelError on mismatching tensors, or lengths beyond C or the table.
    """
    index = index_layout(layout, query_BID.shape[-1])
    arguments = Arguments("index_logits")
    arguments.check("query_BID", query_BID, FLOATS, "B", "I", "D")
    arguments.check("weight_BI", weight_BI, FLOAT32, "B", "I")
    arguments.check("pages_PX", pages_PX, BYTES, None, index.page_bytes(page_size))
    arguments.check("page_table_BP", page_table_BP, INT32, "B", None)
    arguments.check("lengths_B", lengths_B, INTS, "B")
    arguments.check("scores_BC", scores_BC, FLOAT32, "B", None)
    rounds = index_choice.rounds_queries(layout, rounds_queries)
    _op(
        query_BID,
        weight_BI,
        pages_PX,
        page_table_BP,
        lengths_B,
        scores_BC,
        page_size,
        layout,
        rounds,
    )


def index_logits_chunk(
    query_TID: Tensor,
    weight_TI: Tensor,
    pages_PX: Tensor,
    page_table_P: Tensor,
    first_position: int,
    scores_TC: Tensor,
    page_size: int,
    layout: str,
    *,
    rounds_queries: bool | None = None,
) -> None:
    """Scores of T consecutive tokens of one sequence; token t sees positions <= first_position + t.

    Args:
        query_TID: float32, bfloat16 or float16 [T, I, D].
        weight_TI: float32 [T, I].
        pages_PX: uint8 [P, page bytes], indexer keys of one layer, the chunk's own included.
        page_table_P: int32 [pages of the sequence]; -1 = hole, its positions score -inf.
        first_position: position of token 0.
        scores_TC: float32 [T, C], C >= first_position + T; written whole, -inf where not visible.
        page_size: tokens a page.
        layout: name of an IndexLayout.
        rounds_queries: score with queries rounded to e4m3; None: the node's choice.

    Raises KernelError on mismatching tensors, or positions beyond C or the table.
    """
    index = index_layout(layout, query_TID.shape[-1])
    arguments = Arguments("index_logits_chunk")
    arguments.check("query_TID", query_TID, FLOATS, "T", "I", "D")
    arguments.check("weight_TI", weight_TI, FLOAT32, "T", "I")
    arguments.check("pages_PX", pages_PX, BYTES, None, index.page_bytes(page_size))
    arguments.check("page_table_P", page_table_P, INT32, None)
    arguments.check("scores_TC", scores_TC, FLOAT32, "T", None)
    end = first_position + query_TID.shape[0]
    room = min(scores_TC.shape[1], page_table_P.shape[0] * page_size)
    if first_position < 0 or end > room:
        raise KernelError(
            f"index_logits_chunk: positions {first_position} to {end} do not fit into {room}"
        )
    rounds = index_choice.rounds_queries(layout, rounds_queries)
    _chunk_op(
        query_TID,
        weight_TI,
        pages_PX,
        page_table_P,
        first_position,
        scores_TC,
        page_size,
        layout,
        rounds,
    )


def _index_logits(
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
    room = min(scores_BC.shape[1], page_table_BP.shape[1] * page_size)
    query_BID = _as_scored(query_BID, rounds_queries)
    for row, length in enumerate(lengths_B.tolist()):
        if length > room:
            raise KernelError(f"index_logits: length {length} of row {row} exceeds {room}")
        scores_BC[row, max(length, 0) :] = float("-inf")
        if length <= 0:
            continue
        table = page_table_BP[row, : -(-length // page_size)]
        keys = _gather_keys(pages_PX, table, page_size, layout, query_BID.shape[-1])[:length]
        logits = torch.mm(query_BID[row], keys.t()).relu_()
        scores_BC[row, :length] = torch.mm(weight_BI[row : row + 1], logits)[0]
        _hide_holes(scores_BC[row, :length], table, page_size)


def _index_logits_chunk(
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
    num_tokens, num_heads, width = query_TID.shape
    if not num_tokens:
        return
    end = first_position + num_tokens
    table = page_table_P[: -(-end // page_size)]
    keys_DC = _gather_keys(pages_PX, table, page_size, layout, width)[:end].t()
    query_TID = _as_scored(query_TID, rounds_queries)
    block = max(1, min(num_tokens, MAX_BLOCK_BYTES // (4 * num_heads * end)))
    space = torch.empty(block * num_heads * end)
    scores_TC[:, end:] = float("-inf")
    for start in range(0, num_tokens, block):
        stop = min(start + block, num_tokens)
        visible = first_position + stop
        rows = (stop - start) * num_heads
        logits = space[: rows * visible].view(rows, visible)
        torch.mm(query_TID[start:stop].view(rows, width), keys_DC[:, :visible], out=logits).relu_()
        scores_TC[start:stop, :visible] = torch.bmm(
            weight_TI[start:stop, None], logits.view(-1, num_heads, visible)
        ).squeeze(1)
        scores_TC[start:stop, visible:end] = float("-inf")
        # Inside the block, later tokens' positions form a triangle above the diagonal.
        corner = scores_TC[start:stop, first_position + start : visible]
        corner.masked_fill_(torch.ones(corner.shape, dtype=torch.bool).triu_(1), float("-inf"))
    _hide_holes(scores_TC[:, :end], table, page_size)


_op = cpu_op(mutates=("scores_BC",))(_index_logits)
_chunk_op = cpu_op(mutates=("scores_TC",))(_index_logits_chunk)
implement("index_logits", cuda.index_logits, "CUDA")
implement("index_logits_chunk", cuda.index_logits_chunk, "CUDA")


def _as_scored(query: Tensor, rounds_queries: bool) -> Tensor:
    """float32, contiguous; rounded to e4m3 by heads, and back."""
    query = query.float().contiguous()
    if not rounds_queries:
        return query
    payload, exponent = fp8.quantize_ue8m0(query)
    return fp8.decode(payload, fp8.scale_of_ue8m0(exponent))


def _gather_keys(
    pages_PX: Tensor, table: Tensor, page_size: int, layout: str, width: int
) -> Tensor:
    """float32 [tokens of the table, D]; those of holes are some page's keys."""
    if check_range("index_logits", "page_table", table, pages_PX.shape[0]) < 0:
        table = table.clamp(min=0)
    gathered = pages_PX.index_select(0, table)
    return unpack_index_pages(gathered, page_size, layout, width).view(-1, width)


def _hide_holes(scores: Tensor, table: Tensor, page_size: int) -> None:
    """Sets positions of pages that the table lacks to -inf, in place."""
    holes = table < 0
    if holes.any():
        hidden = holes.repeat_interleave(page_size)[: scores.shape[-1]]
        scores.masked_fill_(hidden, float("-inf"))
