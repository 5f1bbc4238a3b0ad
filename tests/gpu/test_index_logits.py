"""Indexer scores of decode on a GPU: each kernel against the reference, and DeepGEMM's wheel against both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tidepool.common.layouts import IndexLayout
from tidepool.kernels import cuda_index_logits, deepgemm, index_choice
from tidepool.kernels.index_logits import index_logits
from tidepool.kernels.index_scores import IndexScores
from tidepool.kernels.store_index_keys import store_index_keys

pytestmark = pytest.mark.gpu

INF = float("inf")


@pytest.fixture(autouse=True)
def _fixed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    index_choice.use("auto", "auto", torch.device("cuda"))
    torch.cuda.synchronize()


@dataclass(frozen=True)
class Case:
    heads: int = 64
    page_size: int = 64
    lengths: tuple[int, ...] = (300, 0, 1, 64, 65)
    columns: int = 300
    is_wide: bool = True  # int64 lengths


def many(count: int, longest: int) -> tuple[int, ...]:
    drawn = torch.randint(0, longest + 1, (count,), generator=torch.Generator().manual_seed(count))
    return tuple(drawn.tolist())


CASES = [
    Case(),
    Case(heads=5, is_wide=False),
    Case(heads=32, page_size=16, columns=333, lengths=(333, 17, 16)),
    Case(heads=33, page_size=128, columns=1000, lengths=(999, 127, 128)),
    Case(lengths=many(150, 900), columns=901, is_wide=False),
    Case(heads=32, lengths=many(512, 200), columns=230),
    Case(lengths=(20000, 19999, 5), columns=20001),
    Case(lengths=(70001,), columns=70016),
]


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    weight: Tensor
    pages: Tensor
    table: Tensor
    lengths: Tensor

    def on_gpu(self) -> tuple[Tensor, ...]:
        return tuple(
            t.cuda() for t in (self.query, self.weight, self.pages, self.table, self.lengths)
        )


def inputs_of(case: Case, *, with_hole: bool = True) -> Inputs:
    """Keys of very different sizes; two pages of NaN that no table names; strided queries."""
    batch = len(case.lengths)
    per_row = -(-case.columns // case.page_size) + 1
    num_pages = batch * per_row + 2
    page_bytes = IndexLayout("index_k", 128).page_bytes(case.page_size)
    pages = torch.empty(num_pages, page_bytes, dtype=torch.uint8)
    num_slots = num_pages * case.page_size
    keys = torch.randn(num_slots, 128) * torch.rand(num_slots, 1).exp2()
    store_index_keys(keys, torch.arange(num_slots), pages, case.page_size, "index_k")
    pages[-2:] = 0xFF
    table = torch.randperm(num_pages - 2).view(batch, per_row).to(torch.int32)
    if with_hole:
        table[0, 1] = -1
    query = torch.randn(batch, case.heads + 1, 128) * torch.randn(batch, case.heads + 1, 1).exp()
    return Inputs(
        query.bfloat16()[:, 1:],
        torch.randn(batch, case.heads),
        pages,
        table,
        torch.tensor(case.lengths, dtype=torch.int64 if case.is_wide else torch.int32),
    )


def relative_error(have: Tensor, want: Tensor) -> float:
    """Of the finite values; infinities must stand at the same places."""
    have, want = have.cpu().double(), want.double()
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(have), finite)
    assert bool((have[~finite] == -INF).all())
    return float((have[finite] - want[finite]).norm() / want[finite].norm().clamp(min=1e-30))


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "cuda") for case in CASES), *((case, "triton") for case in CASES[:3])],
    ids=str,
)
def test_scores_are_the_references(case: Case, backend: index_choice.Backend, rounds: bool) -> None:
    index_choice.use(backend, "auto", torch.device("cuda"))
    inputs = inputs_of(case)
    want = torch.full((len(case.lengths), case.columns), 7.0)
    have = torch.full((len(case.lengths) + 2, case.columns), 7.0, device="cuda")
    on_cpu = (inputs.query, inputs.weight, inputs.pages, inputs.table, inputs.lengths)
    rest = (case.page_size, "index_k")
    index_logits(*on_cpu, want, *rest, rounds_queries=rounds)
    index_logits(*inputs.on_gpu(), have[1:-1], *rest, rounds_queries=rounds)
    assert relative_error(have[1:-1], want) < 5e-4
    assert bool((have[0] == 7).all()) and bool((have[-1] == 7).all())
    other = torch.empty_like(want)
    index_logits(*on_cpu, other, *rest, rounds_queries=not rounds)
    assert relative_error(other, want) > 5e-3


def test_the_cuda_kernel_gives_the_same_bits_each_time() -> None:
    case = Case(lengths=many(40, 5000), columns=5003)
    arguments = inputs_of(case).on_gpu()
    assert cuda_index_logits.can_take(*arguments[:4], torch.empty(40, 9).cuda(), 64, "index_k")
    want = torch.empty(40, 5003, device="cuda")
    cuda_index_logits.launch(*arguments, want, 64, False)
    for _ in range(3):
        have = torch.full_like(want, 7.0)
        cuda_index_logits.launch(*arguments, have, 64, False)
        assert torch.equal(have, want)


def test_zero_queries_score_zero_and_a_row_of_no_length_is_hidden() -> None:
    inputs = inputs_of(Case(lengths=(90, 0), columns=100), with_hole=False)
    arguments = list(inputs.on_gpu())
    arguments[0] = torch.zeros_like(arguments[0])
    for rounds in (False, True):
        have = torch.full((2, 100), 7.0, device="cuda")
        index_logits(*arguments, have, 64, "index_k", rounds_queries=rounds)
        assert not have[0, :90].any()
        assert bool((have[0, 90:] == -INF).all()) and bool((have[1] == -INF).all())


@pytest.mark.parametrize("heads", [32, 64])
def test_deepgemm_gives_our_scores_of_rounded_queries_also_in_graphs(heads: int) -> None:
    if reason := deepgemm.missing():
        pytest.skip(reason)
    case = Case(heads=heads, lengths=many(20, 3000), columns=3001)
    arguments = inputs_of(case, with_hole=False).on_gpu()
    lengths = arguments[4]
    lengths[3] = 0
    columns = torch.arange(case.columns, device="cuda")
    buffer = torch.empty(20, case.columns, device="cuda")
    index_choice.use("deepgemm", "auto", torch.device("cuda"))

    def step() -> tuple[Tensor, Tensor]:
        scores = IndexScores(lengths, buffer, 64, "index_k")
        return scores(*arguments[:4]).clone(), scores(-arguments[0], *arguments[1:4])

    def check(have: tuple[Tensor, Tensor]) -> None:
        for query, found in zip((arguments[0], -arguments[0]), have, strict=True):
            want = torch.empty_like(buffer)
            rest = (*arguments[1:], want, 64, "index_k")
            index_logits(query, *rest, rounds_queries=True)
            seen = torch.where(columns < lengths[:, None], found, -INF)
            assert relative_error(seen, want.cpu()) < 1e-3

    check(step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        have = step()
    for shift in (0, 7, 1900):
        lengths.copy_((torch.tensor(case.lengths, device="cuda") + shift) % 3001)
        graph.replay()
        check(have)
