"""The CUDA side of the ops against the torch references, on the same inputs.

Bytes and positions must be equal; scores and attention agree to the precision of their inputs.
Guard rows around everything written must keep their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tidepool.common.errors import KernelError
from tidepool.common.layouts import IndexLayout, RowLayout
from tidepool.hostpool.memory import allocate_host
from tidepool.kernels.copy_rows import copy_rows
from tidepool.kernels.index_logits import index_logits, index_logits_chunk
from tidepool.kernels.select_topk import select_topk
from tidepool.kernels.sparse_mla import sparse_mla
from tidepool.kernels.store_index_keys import store_index_keys
from tidepool.kernels.store_rows import store_rows

pytestmark = pytest.mark.gpu

GUARD = 0xA5


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()


def relative_error(have: Tensor, want: Tensor) -> float:
    """Of the finite values; infinities must stand at the same places."""
    have, want = have.cpu().double(), want.double()
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(have), finite)
    return float((have[finite] - want[finite]).norm() / want[finite].norm().clamp(min=1e-30))


# store_rows


@dataclass(frozen=True)
class StoreCase:
    layout: str
    latent: int = 512
    rope: int = 64
    dtype: torch.dtype = torch.float32
    slots: tuple[int, ...] = (3, -1, 0, 9, 5)


STORE_CASES = [
    *(StoreCase(layout) for layout in ("mla_bf16", "mla_fp8", "mla_fp32")),
    *(StoreCase(layout, dtype=torch.bfloat16) for layout in ("mla_bf16", "mla_fp8", "mla_fp32")),
    StoreCase("mla_fp8", dtype=torch.float16),
    StoreCase("mla_bf16", latent=32, rope=16),
    StoreCase("mla_fp8", latent=128, rope=6),
    StoreCase("mla_bf16", slots=()),
    StoreCase("mla_bf16", slots=(-1, -1)),
    StoreCase("mla_fp8", slots=tuple(range(10))[::-1]),
]


@pytest.mark.parametrize("case", STORE_CASES, ids=str)
def test_rows_are_stored_bit_for_bit_as_the_reference_does(case: StoreCase) -> None:
    row = RowLayout(case.layout, case.latent, case.rope)  # type: ignore[arg-type]
    count = len(case.slots)
    both = torch.randn(count, case.rope + case.latent).to(case.dtype) * 3
    latent, rope = both[:, case.rope :], both[:, : case.rope]  # strided, as the model's are
    if count:
        latent[0, : case.latent // 2] = 0
    slots = torch.tensor(case.slots, dtype=torch.int64)
    want = torch.full((10, row.row_bytes), GUARD, dtype=torch.uint8)
    have = want.cuda()
    store_rows(latent, rope, slots, want, case.layout)
    device_both = both.cuda()
    store_rows(
        device_both[:, case.rope :], device_both[:, : case.rope], slots.cuda(), have, case.layout
    )
    assert torch.equal(have.cpu(), want)


def test_a_nan_makes_its_whole_fp8_block_nan_and_no_other() -> None:
    latent, rope = torch.randn(1, 512), torch.randn(1, 64)
    latent[0, 130] = float("nan")
    want = torch.zeros(1, 656, dtype=torch.uint8)
    have = want.cuda()
    slots = torch.zeros(1, dtype=torch.int64)
    store_rows(latent, rope, slots, want, "mla_fp8")
    store_rows(latent.cuda(), rope.cuda(), slots.cuda(), have, "mla_fp8")
    scales = have[0, 512:528].clone().view(torch.float32).cpu()
    assert scales.isnan().tolist() == [False, True, False, False]
    other = torch.cat([torch.arange(128), torch.arange(256, 516), torch.arange(520, 656)])
    assert torch.equal(have.cpu()[0, other], want[0, other])


@pytest.mark.parametrize("layout", ["index_k", "index_fp32"])
@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_index_keys_are_stored_bit_for_bit(layout: str, page_size: int, dtype: torch.dtype) -> None:
    index = IndexLayout(layout, 128)  # type: ignore[arg-type]
    num_slots = 6 * page_size
    slots = torch.randperm(num_slots)[: max(1, num_slots - 3)]
    slots[0] = -1
    keys = (torch.randn(slots.numel(), 140) * 2).to(dtype)
    want = torch.full((6, index.page_bytes(page_size)), GUARD, dtype=torch.uint8)
    have = want.cuda()
    store_index_keys(keys[:, 12:], slots, want, page_size, layout)
    store_index_keys(keys.cuda()[:, 12:], slots.cuda(), have, page_size, layout)
    assert torch.equal(have.cpu(), want)


# copy_rows


@pytest.mark.parametrize("row_bytes", [1152, 656, 8448, 584, 37, 4, 1])
@pytest.mark.parametrize("direction", ["to host", "to device", "on device"])
def test_rows_are_copied_between_pools_and_guard_rows_keep_their_bytes(
    row_bytes: int, direction: str
) -> None:
    layers, num_rows = 3, 70
    memory = allocate_host(layers * num_rows * row_bytes, pin=True)
    try:
        host = memory.data.view(layers, num_rows, row_bytes)
        device = torch.randint(0, 256, (layers, num_rows, row_bytes), dtype=torch.uint8).cuda()
        host.copy_(torch.randint(0, 256, host.shape, dtype=torch.uint8))
        other = torch.full_like(device, GUARD)
        source, target = {
            "to host": (device, host),
            "to device": (host, device),
            "on device": (device, other),
        }[direction]
        source_rows = torch.randperm(num_rows)[:50]
        target_rows = torch.randperm(num_rows)[:50]
        source_rows[3], target_rows[7] = -1, -1
        want = target.cpu().clone()
        copy_rows(source.cpu().clone(), want, source_rows, target_rows)
        copy_rows(source, target, source_rows.cuda(), target_rows.cuda())
        torch.cuda.synchronize()
        assert torch.equal(target.cpu(), want)
    finally:
        torch.cuda.synchronize()
        memory.close()


def test_copy_rows_takes_views_rows_on_the_cpu_and_nothing_at_all() -> None:
    source = torch.randint(0, 256, (4, 9, 64), dtype=torch.uint8).cuda()
    target = torch.full((4, 9, 64), GUARD, dtype=torch.uint8, device="cuda")
    rows = torch.tensor([8, 0, 3])
    copy_rows(source[1:3, :, 4:44], target[2:4, :, 8:48], rows, rows.flip(0))
    want = torch.full_like(target, GUARD)
    want[2:4, rows.flip(0).cuda(), 8:48] = source[1:3, rows.cuda(), 4:44]
    assert torch.equal(target, want)
    copy_rows(source, target, rows[:0], rows[:0])
    assert torch.equal(target, want)


def test_pageable_host_rows_are_refused() -> None:
    rows = torch.zeros(1, dtype=torch.int64)
    device = torch.zeros(1, 1, 64, dtype=torch.uint8, device="cuda")
    with pytest.raises(KernelError, match="pageable"):
        copy_rows(torch.zeros(1, 1, 64, dtype=torch.uint8), device, rows, rows)


# select_topk


@dataclass(frozen=True)
class SelectCase:
    lengths: tuple[int, ...]
    columns: int
    topk: int = 128
    kind: str = "random"
    is_wide: bool = True  # int64 lengths


SELECT_CASES = [
    SelectCase((1000, 128, 129, 0, 1), 1000),
    SelectCase((5000, 4999, 4097), 5001, topk=2048),
    SelectCase((5000, 300, 129), 5000, kind="zeros"),
    SelectCase((9000, 8000), 9000, topk=2048, kind="few values"),
    SelectCase((9000, 8000), 9000, topk=2048, kind="special"),
    SelectCase((65536,), 65536, topk=2048, is_wide=False),
    SelectCase((65536,) * 3 + (2049,), 65536, topk=2048, kind="few values"),
    SelectCase((65536,) * 40, 65536, topk=2048, is_wide=False),
    SelectCase((131072,) * 4, 131072, topk=2048, kind="few values"),
    SelectCase((1 << 20,), 1 << 20, topk=2048),
    SelectCase(((1 << 20) - 7,) * 5, 1 << 20, topk=2048, kind="few values"),
    SelectCase(tuple(range(3000, 3300)), 3300, topk=64),
    SelectCase((200, 100), 200, topk=1),
    SelectCase((7, 0), 16, topk=16),
]


def scores_of(case: SelectCase) -> Tensor:
    shape = (len(case.lengths), case.columns)
    if case.kind == "zeros":
        return torch.where(torch.rand(shape) < 0.01, torch.randn(shape), torch.zeros(shape))
    if case.kind == "few values":
        return torch.randint(-3, 4, shape) * 0.25 * -0.0 + torch.randint(-3, 4, shape).float()
    scores = torch.randn(shape)
    if case.kind == "special":
        scores[:, ::5] = float("nan")
        scores[:, 1::5] = float("-inf")
        scores[:, 2::5] = -0.0
        scores[:, 3::5] = 0.0
        scores[:, 4::500] = float("inf")
    return scores


@pytest.mark.parametrize("case", SELECT_CASES, ids=str)
def test_the_selected_set_and_its_order_are_those_of_the_reference(case: SelectCase) -> None:
    scores = scores_of(case)
    lengths = torch.tensor(case.lengths, dtype=torch.int64 if case.is_wide else torch.int32)
    want = torch.full((len(case.lengths), case.topk), 77, dtype=torch.int32)
    have = want.cuda()
    select_topk(scores, lengths, want)
    for _ in range(3):
        have.fill_(77)
        select_topk(scores.cuda(), lengths.cuda(), have)
        assert torch.equal(have.cpu(), want)


def test_select_topk_reads_strided_scores_and_writes_inside_its_rows() -> None:
    scores = torch.randn(6, 5003)
    lengths = torch.tensor([5000, 17, 0, 4000, 2048, 300])
    want = torch.full((6, 256), -5, dtype=torch.int32)
    have = torch.full((6, 300), -7, dtype=torch.int32, device="cuda")
    select_topk(scores[:, 3:], lengths, want)
    select_topk(scores.cuda()[:, 3:], lengths.cuda(), have[:, 20:276])
    assert torch.equal(have[:, 20:276].cpu(), want)
    assert bool((have[:, :20] == -7).all()) and bool((have[:, 276:] == -7).all())


# index_logits


@dataclass(frozen=True)
class LogitsCase:
    heads: int = 64
    width: int = 128
    page_size: int = 64
    lengths: tuple[int, ...] = (300, 0, 1, 64, 65)
    columns: int = 300
    dtype: torch.dtype = torch.bfloat16
    layout: str = "index_k"


LOGITS_CASES = [
    LogitsCase(),
    LogitsCase(dtype=torch.float32),
    LogitsCase(heads=16, page_size=16, columns=333, lengths=(333, 17, 16)),
    LogitsCase(heads=32, width=32, page_size=4, lengths=(77,), columns=90),
    LogitsCase(page_size=1, lengths=(129, 128), columns=129),
    LogitsCase(layout="index_fp32", dtype=torch.float32),
    LogitsCase(layout="index_fp32", heads=32, width=32, page_size=4, lengths=(77, 3), columns=90),
    LogitsCase(lengths=(20000, 19999, 5), columns=20001),
]


def pages_of(case: LogitsCase) -> tuple[Tensor, Tensor]:
    """Filled pages, two of them NaN, and a page table [B, pages] that avoids these and has a hole."""
    batch = len(case.lengths)
    per_row = -(-case.columns // case.page_size) + 1
    index = IndexLayout(case.layout, case.width)  # type: ignore[arg-type]
    num_pages = batch * per_row + 2
    pages = torch.empty(num_pages, index.page_bytes(case.page_size), dtype=torch.uint8)
    num_slots = num_pages * case.page_size
    keys = torch.randn(num_slots, case.width)
    store_index_keys(keys, torch.arange(num_slots), pages, case.page_size, case.layout)
    pages[-2:] = 0xFF
    table = torch.randperm(num_pages - 2).view(batch, per_row).to(torch.int32)
    if per_row > 2:
        table[0, 1] = -1
    return pages, table


def tolerance_of(case: LogitsCase) -> float:
    """FP8 tensor cores add up with about 14 bits; float32 queries are rounded to 8 bits."""
    if case.layout == "index_fp32":
        return 1e-5
    return 4e-3 if case.dtype == torch.float32 else 5e-4


@pytest.mark.parametrize("case", LOGITS_CASES, ids=str)
def test_index_logits_agree_and_are_minus_infinity_where_nothing_is_seen(case: LogitsCase) -> None:
    pages, table = pages_of(case)
    batch = len(case.lengths)
    query = (torch.randn(batch, case.heads + 1, case.width)).to(case.dtype)[:, 1:]
    weight = torch.randn(batch, case.heads)
    lengths = torch.tensor(case.lengths)
    want = torch.full((batch, case.columns), 7.0)
    have = torch.full((batch + 2, case.columns), 7.0, device="cuda")
    arguments = (query, weight, pages, table, lengths)
    index_logits(*arguments, want, case.page_size, case.layout)
    index_logits(*(a.cuda() for a in arguments), have[1:-1], case.page_size, case.layout)
    assert relative_error(have[1:-1], want) < tolerance_of(case)
    assert bool((have[0] == 7).all()) and bool((have[-1] == 7).all())


@pytest.mark.parametrize("case", LOGITS_CASES, ids=str)
def test_index_logits_of_a_chunk_agree(case: LogitsCase) -> None:
    pages, table = pages_of(case)
    num_tokens = min(37, case.columns - 5)
    first = case.columns - 5 - num_tokens
    query = torch.randn(num_tokens, case.heads, case.width).to(case.dtype)
    weight = torch.randn(num_tokens, case.heads)
    want = torch.full((num_tokens, case.columns), 7.0)
    have = torch.full((num_tokens + 2, case.columns), 7.0, device="cuda")
    index_logits_chunk(query, weight, pages, table[0], first, want, case.page_size, case.layout)
    index_logits_chunk(
        query.cuda(),
        weight.cuda(),
        pages.cuda(),
        table[0].cuda(),
        first,
        have[1:-1],
        case.page_size,
        case.layout,
    )
    assert relative_error(have[1:-1], want) < tolerance_of(case)
    assert bool((have[0] == 7).all()) and bool((have[-1] == 7).all())


# Graphs


def test_the_decode_ops_run_inside_a_captured_graph() -> None:
    batch, columns, topk = 2, 4096, 256
    case = LogitsCase(lengths=(4000, 3000), columns=columns)
    pages, table = (tensor.cuda() for tensor in pages_of(case))
    table[0, 1] = 0
    query = torch.randn(batch, 64, 128, device="cuda").bfloat16()
    weight = torch.randn(batch, 64, device="cuda")
    lengths = torch.tensor(case.lengths, device="cuda")
    scores = torch.empty(batch, columns, device="cuda")
    topk_idx = torch.empty(batch, topk, dtype=torch.int32, device="cuda")
    rows = torch.zeros(columns, 1152, dtype=torch.uint8, device="cuda")
    q_latent = torch.randn(batch, 64, 512, device="cuda").bfloat16()
    q_rope = torch.randn(batch, 64, 64, device="cuda").bfloat16()
    out = torch.empty_like(q_latent)
    latent, rope = q_latent[:, 0], q_rope[:, 0]

    def step() -> None:
        store_rows(latent, rope, topk_idx[:, 0].to(torch.int64), rows, "mla_bf16")
        index_logits(query, weight, pages, table, lengths, scores, 64, "index_k")
        select_topk(scores, lengths, topk_idx)
        sparse_mla(q_latent, q_rope, rows, topk_idx, 0.05, "mla_bf16", out)

    step()
    step()
    torch.cuda.synchronize()
    want = topk_idx.clone(), out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    topk_idx.zero_()
    out.zero_()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(topk_idx, want[0])
    assert relative_error(out.float(), want[1].float().cpu()) < 1e-2
