"""Every attention backend against the reference, on the same inputs, and inside CUDA graphs.

Guard rows around what is written keep their bytes; rows that are not selected are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from torch import Tensor

from tidepool.common.layouts import RowLayout
from tidepool.kernels import flashmla
from tidepool.kernels.sparse_mla import attend, sparse_mla
from tidepool.kernels.store_rows import store_rows

pytestmark = pytest.mark.gpu


def use(backend: str) -> None:
    """Imported late: it imports Triton, which hosts without a GPU lack."""
    import_module("tidepool.kernels.attention").use(backend)


def use_or_skip(backend: str) -> None:
    """Makes attention go to `backend`; skips where its wheel is not installed."""
    if backend == "flashmla_sparse" and flashmla.missing():
        pytest.skip(flashmla.missing())
    use(backend)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()
    use("auto")


def relative_error(have: Tensor, want: Tensor) -> float:
    have, want = have.cpu().double(), want.double()
    assert bool(torch.isfinite(have).all())
    return float((have - want).norm() / want.norm().clamp(min=1e-30))


@dataclass(frozen=True)
class MlaCase:
    layout: str = "mla_bf16"
    batch: int = 3
    heads: int = 128
    topk: int = 2048
    latent: int = 512
    rope: int = 64
    pattern: str = "random"
    dtype: torch.dtype = torch.bfloat16


MLA_CASES = [
    MlaCase(),
    MlaCase(batch=1),
    MlaCase(batch=8, heads=64),
    MlaCase(batch=80, topk=256),
    MlaCase(batch=200, heads=16, topk=128),
    MlaCase(heads=8, topk=100),
    MlaCase(heads=4, topk=128, dtype=torch.float32),
    MlaCase(heads=20, topk=33),
    MlaCase(pattern="holes"),
    MlaCase(pattern="none"),
    MlaCase(pattern="duplicates", topk=200),
    MlaCase(pattern="short", topk=2048),
    MlaCase(batch=600, heads=8, topk=384, pattern="short"),
    MlaCase("mla_fp8"),
    MlaCase("mla_fp8", batch=1),
    MlaCase("mla_fp8", batch=600, heads=8, topk=384, pattern="prefix"),
    MlaCase("mla_fp8", pattern="none"),
    MlaCase("mla_fp8", pattern="holes"),
    MlaCase("mla_fp8", batch=5, heads=64, topk=130, pattern="duplicates"),
    MlaCase("mla_fp8", heads=8, pattern="holes", topk=300),
    MlaCase("mla_fp8", batch=70, heads=64, topk=200),
    MlaCase("mla_fp32", heads=4, topk=130, pattern="holes", dtype=torch.float32),
    MlaCase(latent=32, rope=16, heads=4, topk=16),
    MlaCase(topk=0),
]


def row_idx_of(case: MlaCase, num_rows: int) -> Tensor:
    idx = torch.randint(1, num_rows, (case.batch, case.topk), dtype=torch.int32)
    if case.pattern == "holes":
        idx[torch.rand(idx.shape) < 0.5] = -1
        idx[0] = -1
    elif case.pattern == "none":
        idx.fill_(-1)
    elif case.pattern == "duplicates":
        idx[:] = idx[:, :1]
        idx[:, ::2] = 1
    elif case.pattern == "prefix":
        idx[torch.arange(case.topk) > torch.arange(case.batch)[:, None]] = -1
    elif case.pattern == "short":
        idx[:, 70:] = -1
    return idx


@pytest.mark.parametrize("backend", ["auto", "cuda", "flashmla_sparse", "triton", "reference"])
@pytest.mark.parametrize("case", MLA_CASES, ids=str)
def test_sparse_mla_agrees_and_reads_no_other_row(case: MlaCase, backend: str) -> None:
    use_or_skip(backend)
    num_rows = 3008
    row = RowLayout(case.layout, case.latent, case.rope)  # type: ignore[arg-type]
    rows = torch.empty(num_rows, row.row_bytes, dtype=torch.uint8)
    values = torch.randn(num_rows, case.latent), torch.randn(num_rows, case.rope)
    store_rows(*values, torch.arange(num_rows), rows, case.layout)
    rows[0] = 0xFF
    idx = row_idx_of(case, num_rows)
    latent = torch.randn(case.heads, case.batch, case.latent).to(case.dtype).transpose(0, 1)
    both = torch.randn(case.batch, case.heads, case.rope + 24).to(case.dtype)
    rope = both[..., 24:]
    want = torch.full((case.batch, case.heads, case.latent), 7.0)
    have = torch.full((case.batch + 2, case.heads, case.latent), 7.0, device="cuda").to(case.dtype)
    sparse_mla(latent, rope, rows, idx, 0.06, case.layout, want)
    sparse_mla(
        latent.cuda(), both.cuda()[..., 24:], rows.cuda(), idx.cuda(), 0.06, case.layout, have[1:-1]
    )
    tolerance = 1e-5 if case.layout == "mla_fp32" else 1e-2
    assert relative_error(have[1:-1], want) < tolerance
    assert bool((have[0] == 7).all()) and bool((have[-1] == 7).all())


@pytest.mark.parametrize("layout", ["mla_bf16", "mla_fp8"])
@pytest.mark.parametrize("backend", ["cuda", "flashmla_sparse", "triton"])
def test_attention_in_a_graph_sees_new_inputs_at_each_replay(backend: str, layout: str) -> None:
    use_or_skip(backend)
    row = RowLayout(layout, 512, 64)  # type: ignore[arg-type]
    rows = torch.empty(1024, row.row_bytes, dtype=torch.uint8, device="cuda")
    slots = torch.arange(1024, device="cuda")
    idx = torch.randint(0, 1024, (3, 256), dtype=torch.int32, device="cuda")
    q = torch.randn(3, 64, 576, device="cuda").bfloat16()
    out = torch.empty(3, 64, 512, dtype=torch.bfloat16, device="cuda")

    def call() -> None:
        sparse_mla(q[..., :512], q[..., 512:], rows, idx, 0.05, layout, out)

    def fill() -> Tensor:
        store_rows(torch.randn(1024, 512).cuda(), torch.randn(1024, 64).cuda(), slots, rows, layout)
        q.copy_(torch.randn(q.shape))
        idx.copy_(torch.randint(0, 1024, idx.shape, dtype=torch.int32))
        want = torch.empty(out.shape)
        both = q.cpu()
        sparse_mla(both[..., :512], both[..., 512:], rows.cpu(), idx.cpu(), 0.05, layout, want)
        return want

    fill()
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for _ in range(3):
        want = fill()
        out.fill_(7)
        graph.replay()
        assert relative_error(out.float(), want) < 1e-2


@pytest.mark.parametrize("layout", ["mla_bf16", "mla_fp8"])
@pytest.mark.parametrize("backend", ["auto", "cuda", "flashmla_sparse", "triton"])
def test_what_attend_returns_in_a_graph_follows_its_inputs(backend: str, layout: str) -> None:
    use_or_skip(backend)
    row = RowLayout(layout, 512, 64)  # type: ignore[arg-type]
    rows = torch.empty(1024, row.row_bytes, dtype=torch.uint8, device="cuda")
    values = torch.randn(1024, 576, device="cuda")
    store_rows(values[:, :512], values[:, 512:], torch.arange(1024, device="cuda"), rows, layout)
    idx = torch.randint(0, 1024, (70, 256), dtype=torch.int32, device="cuda")
    q = torch.randn(70, 64, 576, device="cuda").bfloat16()
    arguments = (q[..., :512], q[..., 512:], rows, idx, 0.05, layout)
    attend(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        have = attend(*arguments)
    want = torch.empty(70, 64, 512, device="cuda").bfloat16()
    launch_reference = import_module("tidepool.kernels.triton_sparse_mla").launch_reference
    for _ in range(3):
        q.copy_(torch.randn(q.shape))
        idx.copy_(torch.randint(0, 1024, idx.shape, dtype=torch.int32))
        graph.replay()
        launch_reference(*arguments, want)
        assert relative_error(have, want.cpu()) < 1e-2


def mixed_idx(batch: int, topk: int, num_rows: int) -> Tensor:
    """Selections of every kind in turn: plain, with holes, one row again and again, few, none."""
    idx = torch.randint(1, num_rows, (batch, topk), dtype=torch.int32, device="cuda")
    kind = torch.arange(batch, device="cuda")[:, None] % 5
    k = torch.arange(topk, device="cuda")[None, :]
    hole = torch.rand(batch, topk, device="cuda") < 0.4
    idx = torch.where((kind == 1) & hole, -1, idx)
    idx = torch.where(kind == 2, idx[:, :1], idx)
    return torch.where(((kind == 3) & (k > 40)) | (kind == 4), -1, idx).int()


BATCHES = (
    1,
    2,
    3,
    5,
    8,
    13,
    17,
    24,
    31,
    32,
    33,
    35,
    40,
    48,
    63,
    64,
    65,
    66,
    67,
    100,
    129,
    200,
    511,
)


@pytest.mark.parametrize("layout", ["mla_bf16", "mla_fp8"])
@pytest.mark.parametrize(
    ("heads", "topk"),
    [(128, 2048), (128, 330), (64, 2048), (64, 100), (8, 64), (192, 200), (20, 1)],
)
def test_however_tiles_are_dealt_to_lanes_the_result_is_the_reference(
    heads: int, topk: int, layout: str
) -> None:
    module = import_module("tidepool.kernels.cuda_sparse_mla")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for sm_90")
    reference = import_module("tidepool.kernels.triton_sparse_mla").launch_reference
    device = torch.device("cuda", torch.cuda.current_device())
    row = RowLayout(layout, 512, 64)  # type: ignore[arg-type]
    rows = torch.empty(6000, row.row_bytes, dtype=torch.uint8, device="cuda")
    values = torch.randn(6000, 576, device="cuda")
    store_rows(values[:, :512], values[:, 512:], torch.arange(6000, device="cuda"), rows, layout)
    rows[0] = 0xFF  # NaN, never selected
    num_tiles = -(-topk // 64)
    for batch in BATCHES:
        q = torch.randn(batch, heads, 576, device="cuda").bfloat16()
        tensors = (q[..., :512], q[..., 512:], rows, mixed_idx(batch, topk, 6000), 0.06, layout)
        want = torch.empty(batch, heads, 512, device="cuda").bfloat16()
        reference(*tensors, want)
        lanes = module.num_processors(device) // -(-heads // 64)
        plans = {*module.plans_of(batch, num_tiles, lanes), module.Plan(batch, trims=True)}
        for plan in plans:
            if plan.cluster > 1 and not module.max_clusters(plan.cluster, device):
                continue
            have = torch.full((batch + 2, heads, 512), 7.0, device="cuda").bfloat16()
            have[1:-1] = float("nan")
            module.launch(plan, *tensors, have[1:-1])
            difference = have[1:-1].float() - want.float()
            assert float(difference.norm() / want.float().norm()) < 1e-2, (batch, plan)
            assert bool((have[0] == 7).all()) and bool((have[-1] == 7).all())
            assert bool((have[1:-1][4::5] == 0).all()), (batch, plan)
