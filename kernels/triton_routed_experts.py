"""Triton side of routed_experts: grouped products over (token, expert) pairs sorted by expert.

Launches: the pairs of each expert are listed, padded to whole tiles (the counts stay on the
device); gate, up and SwiGLU; down; the weighted sum of a token's K results. The grid covers the
largest number of tiles that the pairs can need, and programs behind the real one end at once. With
FP8 weights, activations are quantised before the first product and in the epilogue that makes the
second one's input.

Launched on torch's current stream, without a synchronisation. Intermediate results live in memory
of torch's caching allocator (fixed inside a captured graph). A pair's result does not depend on
the place in its tile.

Suffixes: T tokens, M hidden width, F expert width, E experts, K experts of a token; in the kernels
R rows (pairs) of a tile, N columns and K reduction steps of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_block_fp8 import quantize_rows, scaled_fp8

MAX_TOKENS = 4096
"""Tokens of a pass: bounds the intermediate results (of DeepSeek-V3.2 in bfloat16: 600 MB)."""
_LIST_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of the products: rows, columns, reduction step, warps, pipeline stages."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_pairs"])
def _list_pairs_kernel(
    experts,
    pairs,
    block_expert,
    num_blocks,
    num_pairs,
    num_experts,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program e: lists the pairs of expert e, in order, where its tiles begin; -1 in the padding."""
    e = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    e_E = tl.arange(0, EXPERTS)
    count_E = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, num_pairs, CHUNK):
        is_pair = start + lane < num_pairs
        expert = tl.load(experts + start + lane, mask=is_pair, other=0).to(tl.int32)
        count_E += tl.histogram(expert, EXPERTS, mask=is_pair)
    blocks_E = (count_E + ROWS - 1) // ROWS
    first = tl.sum(tl.where(e_E < e, blocks_E, 0), 0)
    blocks = tl.sum(tl.where(e_E == e, blocks_E, 0), 0)
    if e == num_experts - 1:
        tl.store(num_blocks, first + blocks)
    count = 0
    if blocks > 0:
        for start in range(0, num_pairs, CHUNK):
            is_pair = start + lane < num_pairs
            expert = tl.load(experts + start + lane, mask=is_pair, other=-1).to(tl.int32)
            is_mine = (expert == e).to(tl.int32)
            place = first * ROWS + count + tl.cumsum(is_mine, 0) - 1
            tl.store(pairs + place, start + lane, mask=is_mine > 0)
            count += tl.sum(is_mine, 0)
        r_R = tl.arange(0, ROWS)
        last = (first + blocks - 1) * ROWS + r_R
        tl.store(pairs + last, tl.full((ROWS,), -1, tl.int32), mask=last >= first * ROWS + count)
        for block in range(first, first + blocks):
            tl.store(block_expert + block, e)


@triton.jit(do_not_specialize=["max_blocks"])
def _gate_up_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    pairs,
    block_expert,
    num_blocks,
    hidden,
    hidden_scale,
    x_stride,
    num_k,
    num_n,
    max_blocks,
    TOP_EXPERTS: tl.constexpr,
    IS_FP8: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """silu(x gate) * (x up) for one tile of pairs and columns; FP8: COLUMNS and STEP are 128."""
    block = tl.program_id(0) % max_blocks
    tile = tl.program_id(0) // max_blocks
    if block < tl.load(num_blocks):
        e = tl.load(block_expert + block).to(tl.int64)
        pair_R = tl.load(pairs + block * ROWS + tl.arange(0, ROWS))
        is_row_R = pair_R >= 0
        token_R = tl.where(is_row_R, pair_R, 0).to(tl.int64) // TOP_EXPERTS
        n_N = tile * COLUMNS + tl.arange(0, COLUMNS)
        k_K = tl.arange(0, STEP)
        num_q = (num_k + 127) // 128
        x_RK = x + token_R[:, None] * x_stride + k_K[None, :]
        weight += e * 2 * num_n * num_k
        gate_NK = weight + n_N[:, None].to(tl.int64) * num_k + k_K[None, :]
        up_NK = gate_NK + num_n.to(tl.int64) * num_k
        gate_scale = weight_scale + (e * 2 * (num_n // 128) + tile) * num_q
        up_scale = gate_scale + num_n // 128 * num_q
        gate_RN = tl.zeros((ROWS, COLUMNS), tl.float32)
        up_RN = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, num_k, STEP):
            is_in_K = k + k_K < num_k
            a_RK = tl.load(x_RK + k, mask=is_row_R[:, None] & is_in_K[None, :], other=0.0)
            is_weight_NK = (n_N < num_n)[:, None] & is_in_K[None, :]
            g_NK = tl.load(gate_NK + k, mask=is_weight_NK, other=0.0)
            u_NK = tl.load(up_NK + k, mask=is_weight_NK, other=0.0)
            if IS_FP8:
                q = k // 128
                scale_R = tl.load(x_scale + token_R * num_q + q, mask=is_row_R, other=0.0)
                gate_R1 = (scale_R * tl.load(gate_scale + q))[:, None]
                up_R1 = (scale_R * tl.load(up_scale + q))[:, None]
                gate_RN += tl.dot(a_RK, tl.trans(g_NK)) * gate_R1
                up_RN += tl.dot(a_RK, tl.trans(u_NK)) * up_R1
            else:
                gate_RN = tl.dot(a_RK, tl.trans(g_NK), gate_RN, input_precision=PRECISION)
                up_RN = tl.dot(a_RK, tl.trans(u_NK), up_RN, input_precision=PRECISION)
        hidden_RN = gate_RN / (1.0 + tl.exp(-gate_RN)) * up_RN
        row_R = tl.where(is_row_R, pair_R, 0).to(tl.int64)
        if IS_FP8:
            hidden_RN, scale_R = scaled_fp8(hidden_RN)
            tl.store(hidden_scale + row_R * (num_n // 128) + tile, scale_R, mask=is_row_R)
        tl.store(
            hidden + row_R[:, None] * num_n + n_N[None, :],
            hidden_RN.to(hidden.dtype.element_ty),
            mask=is_row_R[:, None] & (n_N < num_n)[None, :],
        )


@triton.jit(do_not_specialize=["max_blocks"])
def _down_kernel(
    hidden,
    hidden_scale,
    weight,
    weight_scale,
    pairs,
    block_expert,
    num_blocks,
    out,
    num_k,
    num_n,
    max_blocks,
    IS_FP8: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """hidden @ down.T for one tile of pairs and columns; FP8: STEP is 128, COLUMNS divide it."""
    block = tl.program_id(0) % max_blocks
    tile = tl.program_id(0) // max_blocks
    if block < tl.load(num_blocks):
        e = tl.load(block_expert + block).to(tl.int64)
        pair_R = tl.load(pairs + block * ROWS + tl.arange(0, ROWS))
        is_row_R = pair_R >= 0
        row_R = tl.where(is_row_R, pair_R, 0).to(tl.int64)
        n_N = tile * COLUMNS + tl.arange(0, COLUMNS)
        k_K = tl.arange(0, STEP)
        num_q = (num_k + 127) // 128
        hidden_RK = hidden + row_R[:, None] * num_k + k_K[None, :]
        weight_NK = weight + e * num_n * num_k + n_N[:, None].to(tl.int64) * num_k + k_K[None, :]
        block_scale = weight_scale + (e * ((num_n + 127) // 128) + tile * COLUMNS // 128) * num_q
        sum_RN = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, num_k, STEP):
            is_in_K = k + k_K < num_k
            a_RK = tl.load(hidden_RK + k, mask=is_row_R[:, None] & is_in_K[None, :], other=0.0)
            is_weight_NK = (n_N < num_n)[:, None] & is_in_K[None, :]
            w_NK = tl.load(weight_NK + k, mask=is_weight_NK, other=0.0)
            if IS_FP8:
                q = k // 128
                scale_R = tl.load(hidden_scale + row_R * num_q + q, mask=is_row_R, other=0.0)
                scale_R *= tl.load(block_scale + q)
                sum_RN += tl.dot(a_RK, tl.trans(w_NK)) * scale_R[:, None]
            else:
                sum_RN = tl.dot(a_RK, tl.trans(w_NK), sum_RN, input_precision=PRECISION)
        tl.store(
            out + row_R[:, None] * num_n + n_N[None, :],
            sum_RN.to(out.dtype.element_ty),
            mask=is_row_R[:, None] & (n_N < num_n)[None, :],
        )


@triton.jit
def _sum_kernel(
    result,
    weights,
    shared,
    out,
    shared_stride,
    out_stride,
    num_m,
    TOP_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    m_M = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in_M = m_M < num_m
    sum_M = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_EXPERTS):
        row = t * TOP_EXPERTS + k
        value_M = tl.load(result + row * num_m + m_M, mask=is_in_M, other=0.0)
        sum_M += value_M.to(tl.float32) * tl.load(weights + row)
    sum_M += tl.load(shared + t * shared_stride + m_M, mask=is_in_M, other=0.0).to(tl.float32)
    tl.store(out + t * out_stride + m_M, sum_M.to(out.dtype.element_ty), mask=is_in_M)


def routed_experts(
    x_TM: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EFM: Tensor,
    gate_up_scale_EPQ: Tensor | None,
    down_EMF: Tensor,
    down_scale_EPQ: Tensor | None,
    shared_TM: Tensor,
    out_TM: Tensor,
) -> None:
    """tidepool::routed_experts on CUDA; arguments of kernels/routed_experts.py."""
    matrices = (gate_up_EFM, gate_up_scale_EPQ, down_EMF, down_scale_EPQ)
    for start in range(0, x_TM.shape[0], MAX_TOKENS):
        rows = slice(start, start + MAX_TOKENS)
        launch(
            None,
            x_TM[rows],
            weight_TK[rows],
            expert_TK[rows],
            *matrices,
            shared_TM[rows],
            out_TM[rows],
        )


def launch(
    tiles: tuple[Tiles, Tiles] | None,
    x_TM: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_EFM: Tensor,
    gate_up_scale_EPQ: Tensor | None,
    down_EMF: Tensor,
    down_scale_EPQ: Tensor | None,
    shared_TM: Tensor,
    out_TM: Tensor,
) -> None:
    """As `routed_experts`, for at most MAX_TOKENS; `tiles` of the two products, None: chosen."""
    top_experts = expert_TK.shape[1]
    num_experts, num_pairs = gate_up_EFM.shape[0], expert_TK.numel()
    width, inner = x_TM.shape[1], down_EMF.shape[2]
    gate_up, down = tiles or choose_tiles(num_pairs, num_experts, gate_up_EFM.dtype)
    pairs, block_expert, num_blocks = _list_pairs(expert_TK, num_experts, gate_up.rows)
    max_blocks = block_expert.shape[0]
    is_fp8 = gate_up_scale_EPQ is not None
    x, x_scale = quantize_rows(x_TM) if is_fp8 else (_dense(x_TM), x_TM)
    dtype = gate_up_EFM.dtype if is_fp8 else x_TM.dtype
    hidden = torch.empty((num_pairs, inner), dtype=dtype, device=x_TM.device)
    num_scales = inner // 128 if is_fp8 else 0
    hidden_scale = torch.empty((num_pairs, num_scales), dtype=torch.float32, device=x_TM.device)
    listed = (pairs, block_expert, num_blocks)
    precision = "ieee" if x_TM.dtype == torch.float32 else None
    options = {"IS_FP8": is_fp8, "PRECISION": precision}
    _gate_up_kernel[(max_blocks * triton.cdiv(inner, gate_up.columns),)](
        x,
        x_scale,
        gate_up_EFM,
        gate_up_scale_EPQ if is_fp8 else gate_up_EFM,
        *listed,
        hidden,
        hidden_scale,
        x.stride(0),
        width,
        inner,
        max_blocks,
        TOP_EXPERTS=top_experts,
        **options,
        **_shape(gate_up),
    )
    result = torch.empty((num_pairs, width), dtype=x_TM.dtype, device=x_TM.device)
    _down_kernel[(max_blocks * triton.cdiv(width, down.columns),)](
        hidden,
        hidden_scale,
        down_EMF,
        down_scale_EPQ if is_fp8 else down_EMF,
        *listed,
        result,
        inner,
        width,
        max_blocks,
        **options,
        **_shape(down),
    )
    shared_TM = _dense(shared_TM)
    block = min(1024, triton.next_power_of_2(width))
    _sum_kernel[(x_TM.shape[0], triton.cdiv(width, block))](
        result,
        weight_TK.contiguous(),
        shared_TM,
        out_TM,
        shared_TM.stride(0),
        out_TM.stride(0),
        width,
        TOP_EXPERTS=top_experts,
        BLOCK=block,
    )


def choose_tiles(num_pairs: int, num_experts: int, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """Of gate_up and down: rows by the mean number of pairs an expert has."""
    mean = num_pairs / num_experts
    if dtype == torch.float32:
        tiles = Tiles(16, 32, 32, 4, 2)
        return tiles, tiles
    rows = 16 if mean <= 8 else 32 if mean <= 24 else 64 if mean <= 64 else 128
    is_small = rows <= 32
    if dtype == torch.float8_e4m3fn:
        if mean > 256:
            tiles = Tiles(128, 128, 128, 8, 3)
        else:
            tiles = Tiles(min(rows, 64), 128, 128, 4 if is_small else 8, 4)
        return tiles, tiles
    if rows == 16:
        return Tiles(16, 32, 128, 4, 5), Tiles(16, 64, 128, 4, 5)
    if is_small:
        return Tiles(rows, 64, 128, 4, 3), Tiles(rows, 128, 128, 4, 3)
    warps = 4 if rows == 64 else 8
    return Tiles(rows, 128, 64, 8, 3), Tiles(rows, 128, 64, warps, 4)


def _list_pairs(expert_TK: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs int32 [blocks * rows], their expert int32 [blocks], number of blocks int32 [1])."""
    num_pairs, device = expert_TK.numel(), expert_TK.device
    max_blocks = min(num_pairs, num_pairs // rows + num_experts)
    pairs = torch.empty(max_blocks * rows, dtype=torch.int32, device=device)
    block_expert = torch.empty(max_blocks, dtype=torch.int32, device=device)
    num_blocks = torch.empty(1, dtype=torch.int32, device=device)
    _list_pairs_kernel[(num_experts,)](
        expert_TK.contiguous(),
        pairs,
        block_expert,
        num_blocks,
        num_pairs,
        num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        ROWS=rows,
        CHUNK=_LIST_CHUNK,
    )
    return pairs, block_expert, num_blocks


def _shape(tiles: Tiles) -> dict[str, int]:
    return {
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "STEP": tiles.step,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
