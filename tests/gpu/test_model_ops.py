"""The model's ops on a GPU against the references: experts, block-scaled FP8, norms, rotation."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from helpers.gpu import capture, relative_error
from torch import Tensor

from tidepool.kernels import fp8, norms
from tidepool.kernels.block_fp8 import block_fp8_linear, dequantize_blocks
from tidepool.kernels.rotate import rotate, rotate_into
from tidepool.kernels.routed_experts import route_experts, routed_experts

pytestmark = pytest.mark.gpu


def random_fp8(*shape: int) -> tuple[Tensor, Tensor]:
    """Matrices of normal values and their block scales, which differ."""
    blocks = [-(-size // 128) for size in shape[-2:]]
    values = (torch.randn(shape) * 60).to(torch.float8_e4m3fn)
    return values, (0.5 + torch.rand(*shape[:-2], *blocks)) * shape[-1] ** -0.5 / 60


def through_fp8(x: Tensor) -> Tensor:
    """What activations are after they have been quantised a token and 128 values."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    payload, scale = fp8.quantize(padded)
    return (payload.float() * scale).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize(
    ("num_groups", "top_groups", "experts", "top_experts", "norm"),
    [(8, 4, 256, 8, True), (1, 1, 256, 8, True), (3, 1, 12, 2, True), (1, 1, 6, 6, False)],
)
@pytest.mark.parametrize("tokens", [1, 33, 512])
def test_routing_chooses_and_weighs_as_the_reference_does(
    num_groups: int, top_groups: int, experts: int, top_experts: int, norm: bool, tokens: int
) -> None:
    logits, bias = torch.randn(tokens, experts), torch.randn(experts) / 5
    found = []
    for device in ("cpu", "cuda"):
        weight = torch.empty(tokens, top_experts, device=device)
        expert = torch.empty(tokens, top_experts, dtype=torch.int64, device=device)
        arguments = (num_groups, top_groups, norm, 2.5, weight, expert)
        route_experts(logits.to(device), bias.to(device), *arguments)
        found.append((weight.cpu(), expert.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert torch.equal(found[1][1], found[0][1])


def test_routing_of_a_nan_stays_inside_the_experts_and_in_its_row() -> None:
    logits = torch.randn(3, 16, device="cuda")
    logits[1] = float("nan")
    weight = torch.empty(3, 4, device="cuda")
    expert = torch.empty(3, 4, dtype=torch.int64, device="cuda")
    route_experts(logits, torch.zeros(16, device="cuda"), 4, 2, True, 1.0, weight, expert)
    assert ((expert >= 0) & (expert < 16)).all()
    assert weight.isnan().any(1).tolist() == [False, True, False]


@dataclass(frozen=True)
class ExpertsCase:
    tokens: int
    experts: int = 8
    top_experts: int = 2
    width: int = 256
    inner: int = 128
    dtype: torch.dtype = torch.bfloat16


EXPERT_CASES = [
    *(ExpertsCase(tokens) for tokens in (0, 1, 2, 17, 100, 700)),
    ExpertsCase(5000),
    ExpertsCase(64, experts=256, top_experts=8),
    ExpertsCase(512, experts=256, top_experts=8),
    ExpertsCase(9, experts=5, top_experts=3, width=200, inner=48),
    ExpertsCase(31, width=64, inner=32, dtype=torch.float32),
    ExpertsCase(300, experts=3, top_experts=1, width=144, inner=80, dtype=torch.float32),
]


@pytest.mark.parametrize("case", EXPERT_CASES, ids=str)
def test_experts_equal_the_loop_over_them(case: ExpertsCase) -> None:
    x = torch.randn(case.tokens, case.width).to(case.dtype)
    weight = torch.rand(case.tokens, case.top_experts)
    choice = torch.rand(case.tokens, case.experts)
    choice[:, case.experts - 2] = -1  # an expert that nobody chooses
    expert = choice.topk(case.top_experts, dim=-1).indices
    gate_up = torch.randn(case.experts, 2 * case.inner, case.width) * case.width**-0.5
    down = torch.randn(case.experts, case.width, case.inner) * case.inner**-0.5
    gate_up, down = gate_up.to(case.dtype), down.to(case.dtype)
    gate_up[case.experts - 2], down[case.experts - 2] = float("nan"), float("nan")
    arguments = (x, weight, expert, gate_up, None, down, None, torch.randn_like(x))
    want = torch.empty_like(x)
    routed_experts(*arguments, want)
    have = torch.full_like(x, float("nan"), device="cuda")
    routed_experts(*(a if a is None else a.cuda() for a in arguments), have)
    assert relative_error(have, want) < (1e-5 if case.dtype == torch.float32 else 6e-3)
    again = torch.empty_like(have)
    routed_experts(*(a if a is None else a.cuda() for a in arguments), again)
    assert torch.equal(again, have)


@pytest.mark.parametrize("tokens", [1, 2, 16, 40, 129, 603])
@pytest.mark.parametrize(("out", "width"), [(576, 7168), (1536, 1024), (4224, 200), (8192, 128)])
def test_block_scaled_products_are_those_of_the_quantised_activations(
    tokens: int, out: int, width: int
) -> None:
    x = torch.randn(tokens, width).bfloat16() * 3
    weight, scale = random_fp8(out, width)
    want = through_fp8(x) @ dequantize_blocks(weight, scale, (128, 128)).t()
    have = torch.full((tokens, out), float("nan"), dtype=torch.bfloat16, device="cuda")
    block_fp8_linear(x.cuda(), weight.cuda(), scale.cuda(), have)
    assert relative_error(have, want) < 4e-3
    exact = torch.empty(tokens, out, dtype=torch.bfloat16)
    block_fp8_linear(x, weight, scale, exact)
    assert relative_error(have, exact.float()) < 0.04


def test_a_nan_activation_spoils_its_own_row_alone() -> None:
    x = torch.randn(20, 256).bfloat16().cuda()
    x[7, 200] = float("nan")
    weight, scale = random_fp8(256, 256)
    out = torch.empty_like(x)
    block_fp8_linear(x, weight.cuda(), scale.cuda(), out)
    assert out.isnan().all(1).nonzero().flatten().tolist() == [7]
    assert int(out.isnan().any(1).sum()) == 1


@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (40, 8), (512, 8), (1100, 4)])
def test_fp8_experts_are_near_the_exact_ones(tokens: int, experts: int) -> None:
    width, inner = 512, 256
    x = torch.randn(tokens, width).bfloat16()
    weight = torch.rand(tokens, 2)
    expert = torch.rand(tokens, experts).topk(2, dim=-1).indices
    gate_up, down = random_fp8(experts, 2 * inner, width), random_fp8(experts, width, inner)
    arguments = (x, weight, expert, *gate_up, *down, torch.zeros_like(x))
    want, have = torch.empty_like(x), torch.empty_like(x, device="cuda")
    routed_experts(*arguments, want)
    routed_experts(*(a.cuda() for a in arguments), have)
    assert relative_error(have, want.float()) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 7168), (65, 512), (3, 130), (0, 64)])
def test_norms_and_swiglu_are_the_references(dtype: torch.dtype, tokens: int, width: int) -> None:
    x = torch.randn(tokens, width + 8).to(dtype)[:, 4 : 4 + width] * 3  # strided rows
    weight, bias = torch.randn(width), torch.randn(width)
    found = []
    for device in ("cpu", "cuda"):
        rows, scale = x.to(device), weight.to(dtype).to(device)
        total = (x * 0.3 + 1).to(device)
        outs = [torch.full_like(total, float("nan")) for _ in range(3)]
        gated = torch.full((tokens, width // 2), float("nan"), dtype=dtype, device=device)
        norms.rms_norm(rows, scale, 1e-6, outs[0])
        norms.add_rms_norm(total, rows, scale, 1e-6, outs[1])
        norms.layer_norm(rows, weight.to(device), bias.to(device), 1e-6, outs[2])
        norms.swiglu(rows, gated)
        found.append((*outs, total, gated))
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    for have, want in zip(found[1], found[0], strict=True):
        assert relative_error(have, want) < tolerance
    assert torch.equal(found[1][3].cpu(), found[0][3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "rope"), [(1, 128, 64), (33, 1, 16), (5, 7, 6)])
def test_rotation_is_the_references_and_touches_nothing_else(
    dtype: torch.dtype, is_interleaved: bool, tokens: int, heads: int, rope: int
) -> None:
    whole = torch.randn(tokens, heads, rope + 20).to(dtype)
    angle = torch.randn(tokens, rope // 2) * 9
    found = []
    for device in ("cpu", "cuda"):
        x = whole.to(device, copy=True)
        rotate(x[..., 20:], angle.cos().to(device), angle.sin().to(device), is_interleaved)
        found.append(x.cpu())
        beside = torch.full_like(whole, 7.0, device=device)
        source = whole.to(device, copy=True)
        cos, sin = angle.cos().to(device), angle.sin().to(device)
        rotate_into(source[..., 20:], cos, sin, is_interleaved, beside[..., 20:])
        assert torch.equal(beside[..., 20:].cpu(), found[-1][..., 20:])
        assert torch.equal(source.cpu(), whole) and bool((beside[..., :20] == 7).all())
    assert torch.equal(found[1][..., :20], whole[..., :20])
    assert relative_error(found[1], found[0]) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("tokens", [1, 5, 8, 16, 33, 40, 64, 300])
@pytest.mark.parametrize("width", [128, 200, 7168])
def test_quantised_rows_are_the_references_bit_for_bit(tokens: int, width: int) -> None:
    x = (torch.randn(tokens, width) * 10 ** (torch.rand(tokens, 1) * 6 - 3)).bfloat16()
    x[torch.rand(x.shape) < 0.3] = 0
    quantize_rows = import_module("tidepool.kernels.triton_block_fp8").quantize_rows
    padded = torch.nn.functional.pad(x.float(), (0, -width % 128)).unflatten(-1, (-1, 128))
    want, want_scale = fp8.quantize(padded)
    have, have_scale = quantize_rows(x.cuda())
    want = want.flatten(-2)[:, :width]
    assert torch.equal(have.cpu().view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(have_scale.cpu().flatten(), want_scale.flatten())


@pytest.mark.parametrize("tokens", [1, 8, 16, 33, 64])
@pytest.mark.parametrize(("out", "width"), [(2112, 7168), (7168, 2048), (128, 7168), (8192, 1536)])
def test_products_in_a_graph_follow_their_inputs(tokens: int, out: int, width: int) -> None:
    """A product starts beside its quantisation: it must not read what the last replay left."""
    weight, scale = (part.cuda() for part in random_fp8(out, width))
    exact = dequantize_blocks(weight, scale, (128, 128)).t()
    x = torch.randn(tokens, width, device="cuda").bfloat16()
    results = [torch.empty(tokens, out, device="cuda").bfloat16() for _ in range(6)]
    rounds = [torch.empty_like(x) for _ in results]

    def run() -> None:
        for number, result in enumerate(results):
            torch.mul(x, number + 1, out=rounds[number])
            block_fp8_linear(rounds[number], weight, scale, result)

    graph = capture(run)
    for _ in range(4):
        x.copy_(torch.randn(x.shape))
        graph.replay()
        want = through_fp8(x.cpu()).cuda() @ exact
        for number, result in enumerate(results):
            assert relative_error(result, want * (number + 1)) < 0.03
