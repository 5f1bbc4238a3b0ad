"""Indexer scores, exact top-k and sparse attention against formulas written out in Python."""

from __future__ import annotations

import math

import pytest
import torch

from tidepool.common.errors import KernelError
from tidepool.kernels import index_logits as module
from tidepool.kernels.index_logits import index_logits, index_logits_chunk
from tidepool.kernels.select_topk import select_topk
from tidepool.kernels.sparse_mla import sparse_mla
from tidepool.kernels.store_index_keys import store_index_keys, unpack_index_pages
from tidepool.kernels.store_rows import pack_rows, unpack_rows

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def int32(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_pages(num_pages: int, page_size: int, width: int, layout: str) -> torch.Tensor:
    page_bytes = page_size * (width + 4 if layout == "index_k" else 4 * width)
    pages = torch.zeros(num_pages, page_bytes, dtype=torch.uint8)
    keys = torch.randn(num_pages * page_size, width)
    store_index_keys(keys, torch.arange(len(keys)), pages, page_size, layout)
    return pages


def expected_score(query, weight, key) -> torch.Tensor:
    return (weight * torch.relu(query.double() @ key.double())).sum()


@pytest.mark.parametrize("layout", ["index_k", "index_fp32"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("length_dtype", [torch.int32, torch.int64])
def test_scores_are_the_formula_and_minus_infinity_behind(layout, page_size, length_dtype) -> None:
    pages = make_pages(12, page_size, 8, layout)
    keys = unpack_index_pages(pages, page_size, layout, 8)
    table = torch.stack([torch.randperm(12)[:5] for _ in range(3)]).int()
    lengths = torch.tensor([0, 3 * page_size - (page_size > 1), 5 * page_size], dtype=length_dtype)
    query, weight = torch.randn(3, 4, 8), torch.randn(3, 4)
    scores = torch.full((3, 5 * page_size + 2), NAN)
    index_logits(query, weight, pages, table, lengths, scores, page_size, layout)
    for row, length in enumerate(lengths.tolist()):
        assert (scores[row, length:] == -INF).all()
        for position in range(length):
            key = keys[table[row, position // page_size], position % page_size]
            expected = expected_score(query[row], weight[row], key)
            assert scores[row, position].item() == pytest.approx(expected.item(), abs=1e-4)


def test_positions_on_a_hole_score_minus_infinity() -> None:
    pages = make_pages(3, 4, 8, "index_k")
    table = int32([[0, -1, 2]])
    scores = torch.zeros(1, 12)
    query, weight = torch.randn(1, 2, 8), torch.rand(1, 2)
    index_logits(query, weight, pages, table, int32([11]), scores, 4, "index_k")
    assert (scores[0, 4:8] == -INF).all()
    assert scores[0, :4].isfinite().all() and scores[0, 8:11].isfinite().all()
    chunk = torch.zeros(1, 12)
    index_logits_chunk(query, weight, pages, table[0], 10, chunk, 4, "index_k")
    assert torch.allclose(chunk, scores)


@pytest.mark.parametrize("block_bytes", [1, 4000, 1 << 20])
@pytest.mark.parametrize("first", [0, 5, 17])
@pytest.mark.parametrize("layout", ["index_k", "index_fp32"])
def test_a_chunk_scores_as_its_tokens_one_by_one(layout, first, block_bytes, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_BLOCK_BYTES", block_bytes)
    num_tokens, page_size = 13, 4
    pages = make_pages(9, page_size, 8, layout)
    table = torch.randperm(9)[:8].int()
    query, weight = torch.randn(num_tokens, 4, 8).bfloat16(), torch.randn(num_tokens, 4)
    wide = torch.full((num_tokens, 40), NAN)
    scores = wide[:, 3:36]
    index_logits_chunk(query, weight, pages, table, first, scores, page_size, layout)
    single = torch.empty(num_tokens, 33)
    index_logits(
        query,
        weight,
        pages,
        table.expand(num_tokens, -1).contiguous(),
        torch.arange(first + 1, first + 1 + num_tokens),
        single,
        page_size,
        layout,
    )
    assert torch.allclose(scores, single, atol=1e-5)
    assert torch.equal(scores == -INF, single == -INF)
    assert wide[:, :3].isnan().all() and wide[:, 36:].isnan().all()


def test_scores_that_do_not_fit_are_refused() -> None:
    pages = make_pages(3, 4, 8, "index_k")
    query, weight, table = torch.randn(1, 2, 8), torch.rand(1, 2), int32([[0, 1, 2]])
    with pytest.raises(KernelError, match="length 13"):
        index_logits(query, weight, pages, table, int32([13]), torch.zeros(1, 20), 4, "index_k")
    with pytest.raises(KernelError, match="length 9"):
        index_logits(query, weight, pages, table, int32([9]), torch.zeros(1, 8), 4, "index_k")
    with pytest.raises(KernelError, match="12 to 13"):
        index_logits_chunk(query, weight, pages, table[0], 12, torch.zeros(1, 20), 4, "index_k")
    with pytest.raises(KernelError, match="page_table"):
        index_logits(query, weight, pages, table + 1, int32([9]), torch.zeros(1, 12), 4, "index_k")


def expected_topk(scores: list[float], length: int, k: int) -> list[int]:
    def rank(position: int) -> tuple[bool, float, int]:
        score = scores[position]
        return math.isnan(score), 0.0 if math.isnan(score) else -score, position

    best = sorted(sorted(range(length), key=rank)[:k])
    return best + [-1] * (k - len(best))


def topk(scores: torch.Tensor, lengths: torch.Tensor, k: int) -> list[list[int]]:
    out = torch.full((scores.shape[0], k), 77, dtype=torch.int32)
    select_topk(scores, lengths, out)
    return out.tolist()


def test_lowest_positions_win_ties_and_are_written_in_order() -> None:
    scores = torch.tensor([[0.0, 5.0, 0.0, -1.0, 0.0, 7.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert topk(scores, int32([6, 6]), 3) == [[0, 1, 5], [0, 1, 2]]
    assert topk(scores, int32([6, 2]), 4) == [[0, 1, 2, 5], [0, 1, -1, -1]]


def test_minus_zero_ties_with_zero() -> None:
    assert topk(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), int32([4]), 2) == [[0, 1]]


def test_nan_ranks_below_minus_infinity_and_behind_the_length_nothing_counts() -> None:
    scores = torch.tensor([[NAN, -INF, NAN, INF, -INF, 9.0], [NAN] * 6])
    assert topk(scores, int32([6, 6]), 3) == [[1, 3, 5], [0, 1, 2]]
    assert topk(scores, int32([5, 6]), 4) == [[0, 1, 3, 4], [0, 1, 2, 3]]
    assert topk(torch.tensor([[1.0, NAN, INF, INF]]), int32([2]), 3) == [[0, 1, -1]]


def test_rows_no_longer_than_k_select_everything() -> None:
    scores = torch.full((3, 5), NAN)
    assert topk(scores, torch.tensor([0, 5, 2]), 7) == [
        [-1] * 7,
        [0, 1, 2, 3, 4, -1, -1],
        [0, 1, -1, -1, -1, -1, -1],
    ]
    assert topk(scores[:0], int32([]), 7) == []
    assert topk(scores, int32([5, 5, 5]), 0) == [[], [], []]


@pytest.mark.parametrize("seed", range(60))
def test_selection_is_the_sorted_model_on_scores_with_many_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, width = 7, int(torch.randint(1, 60, (), generator=generator))
    k = int(torch.randint(1, 24, (), generator=generator))
    scores = torch.randint(-3, 4, (rows, width), generator=generator).float()
    special = torch.tensor([NAN, INF, -INF, -0.0])
    mask = torch.rand(rows, width, generator=generator) < 0.2 * (seed % 3)
    pick = torch.randint(0, 4, (rows, width), generator=generator)
    scores = torch.where(mask, special[pick], scores)
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    actual = topk(scores, lengths if seed % 2 else lengths.int(), k)
    for row, length in enumerate(lengths.tolist()):
        assert actual[row] == expected_topk(scores[row].tolist(), length, k)


def test_selection_on_random_scores_is_the_set_of_torch_topk() -> None:
    scores = torch.randn(32, 2000)
    actual = topk(scores, torch.full((32,), 2000), 100)
    assert actual == scores.topk(100).indices.sort(1).values.tolist()


def test_selection_does_not_change_the_scores() -> None:
    scores = torch.randn(4, 50)
    before = scores.clone()
    topk(scores, int32([50, 30, 50, 50]), 10)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("length", [-1, 6])
def test_lengths_outside_the_row_are_refused(length: int) -> None:
    with pytest.raises(KernelError, match="expected 0 to 5"):
        topk(torch.zeros(1, 5), int32([length]), 2)


def expected_attention(q_latent, q_rope, latent, rope, idx, scale) -> torch.Tensor:
    chosen = [i for i in idx.tolist() if i >= 0]
    if not chosen:
        return torch.zeros(q_latent.shape, dtype=torch.float64)
    keys, rotated = latent[chosen].double(), rope[chosen].double()
    logits = scale * (q_latent.double() @ keys.T + q_rope.double() @ rotated.T)
    return logits.softmax(-1) @ keys


@pytest.mark.parametrize("layout", ["mla_bf16", "mla_fp8", "mla_fp32"])
def test_attention_is_softmax_over_the_selected_rows(layout: str) -> None:
    rows = pack_rows(torch.randn(40, 128), torch.randn(40, 16), layout)
    latent, rope = unpack_rows(rows, layout, 128)
    q_latent, q_rope = torch.randn(6, 3, 128), torch.randn(6, 3, 16)
    idx = torch.randint(0, 40, (6, 9), dtype=torch.int32)
    idx[1, 3:7] = -1
    idx[2] = -1
    idx[3, :8] = -1
    idx[4, 0] = idx[4, 1]
    idx[:, 7:] = -1
    idx[3, 7] = 5
    out = torch.full((6, 3, 128), NAN)
    sparse_mla(q_latent, q_rope, rows, idx, 0.2, layout, out)
    for token in range(6):
        expected = expected_attention(q_latent[token], q_rope[token], latent, rope, idx[token], 0.2)
        assert torch.allclose(out[token].double(), expected, atol=1e-5)
    assert not out[2].any()


@pytest.mark.parametrize("layout", ["mla_bf16", "mla_fp8", "mla_fp32"])
def test_many_tokens_are_attended_in_blocks(layout: str) -> None:
    guard = torch.full((9, 1), 0xFF, dtype=torch.uint8)
    rows = pack_rows(torch.randn(64, 512), torch.randn(64, 64), layout)
    rows = torch.cat([guard.expand(9, rows.shape[1]), rows])
    q_latent, q_rope = torch.randn(70, 2, 512), torch.randn(70, 2, 64)
    idx = torch.randint(9, 73, (70, 128), dtype=torch.int32)
    idx[torch.rand(70, 128) < 0.1] = -1
    out = torch.empty(70, 2, 512)
    sparse_mla(q_latent, q_rope, rows, idx, 0.05, layout, out)
    latent, rope = unpack_rows(rows, layout, 512)
    for token in (0, 13, 14, 69):
        expected = expected_attention(
            q_latent[token], q_rope[token], latent, rope, idx[token], 0.05
        )
        assert torch.allclose(out[token].double(), expected, atol=1e-5)


@pytest.mark.parametrize("layout", ["mla_bf16", "mla_fp8", "mla_fp32"])
def test_a_poisoned_row_that_is_not_selected_is_never_seen(layout: str) -> None:
    rows = pack_rows(torch.randn(8, 128), torch.randn(8, 16), layout)
    rows[0] = rows[7] = 0xFF
    idx = int32([[1, -1, 2], [-1, -1, -1], [3, 4, 5]])
    out = torch.empty(3, 2, 128, dtype=torch.bfloat16)
    sparse_mla(torch.randn(3, 2, 128), torch.randn(3, 2, 16), rows, idx, 0.1, layout, out)
    assert out.isfinite().all()
    idx[0, 1] = 7
    sparse_mla(torch.randn(3, 2, 128), torch.randn(3, 2, 16), rows, idx, 0.1, layout, out)
    assert out[0].isnan().all() and out[1:].isfinite().all()


def test_attention_over_nothing_is_zero() -> None:
    rows = torch.full((4, 24), 0xFF, dtype=torch.uint8)
    for k in (0, 3):
        out = torch.full((2, 1, 8), NAN)
        idx = torch.full((2, k), -1, dtype=torch.int32)
        sparse_mla(torch.ones(2, 1, 8), torch.ones(2, 1, 4), rows, idx, 1.0, "mla_bf16", out)
        assert not out.any()


def test_rows_outside_the_pool_are_refused() -> None:
    rows = torch.zeros(4, 24, dtype=torch.uint8)
    out = torch.zeros(1, 1, 8)
    query = torch.ones(1, 1, 8), torch.ones(1, 1, 4)
    for bad in (-2, 4):
        with pytest.raises(KernelError, match=str(bad)):
            sparse_mla(*query, rows, int32([[bad, 0]]), 1.0, "mla_bf16", out)
    with pytest.raises(KernelError, match="out_BHC"):
        sparse_mla(*query, rows, int32([[0]]), 1.0, "mla_bf16", out[..., :7])
