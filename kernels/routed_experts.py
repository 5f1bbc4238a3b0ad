"""The routed part of a mixture of experts: which experts, and what they and the shared ones give.

`route_experts` chooses by score + bias and weighs by the score; `routed_experts` runs each token
through its experts and adds the shared expert's result. Source: DeepSeek-V3 (arXiv:2412.19437,
section 2.1.2); transformers 5.23, DeepseekV32TopkRouter.

Suffixes: T tokens, M hidden width, F expert width, E experts, G groups, K chosen experts, P and Q
128x128 blocks of a matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda
from .block_fp8 import dequantize_blocks
from .registry import FLOAT32, FLOATS, INT64, Arguments, cpu_op, implement

WEIGHTS = (*FLOATS, torch.float8_e4m3fn)


def route_experts(
    logits_TE: Tensor,
    bias_E: Tensor,
    num_groups: int,
    top_groups: int,
    norm_weights: bool,
    scaling_factor: float,
    weight_TK: Tensor,
    expert_TK: Tensor,
) -> None:
    """Chooses K experts a token.

    Args:
        logits_TE: float32 [T, E]; scores are their sigmoids.
        bias_E: float32 [E]: decides who is chosen, never how much it counts.
        num_groups: experts stand in that many equal groups; only the best `top_groups`, by the sum
            of their two best choices, are eligible.
        norm_weights: whether a token's weights are scaled to sum to 1 before `scaling_factor`.
        weight_TK: float32 [T, K]; written.
        expert_TK: int64 [T, K]; written, in [0, E) also where logits are NaN.
    """
    arguments = Arguments("route_experts")
    arguments.check("logits_TE", logits_TE, FLOAT32, "T", "E")
    arguments.check("bias_E", bias_E, FLOAT32, "E")
    arguments.check("weight_TK", weight_TK, FLOAT32, "T", "K")
    arguments.check("expert_TK", expert_TK, INT64, "T", "K")
    _route_op(
        logits_TE,
        bias_E,
        num_groups,
        top_groups,
        norm_weights,
        scaling_factor,
        weight_TK,
        expert_TK,
    )


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
    """out[t] = shared[t] + sum over k of weight[t, k] * down(silu(gate x[t]) * up x[t]).

    The sum runs in float32, over k in order. Weights of experts that no token chose are not read.

    Args:
        x_TM: float32, bfloat16 or float16 [T, M].
        weight_TK: float32 [T, K].
        expert_TK: int64 [T, K], in [0, E).
        gate_up_EFM: [E, 2F, M], gate rows, then up rows; dtype of `x_TM`, or float8_e4m3fn.
        gate_up_scale_EPQ: float32 [E, 2F / 128, ceil(M / 128)] for FP8, where F must be a
            multiple of 128; else None.
        down_EMF: [E, M, F], dtype of `gate_up_EFM`.
        down_scale_EPQ: float32 [E, ceil(M / 128), F / 128] for FP8; else None.
        shared_TM, out_TM: as `x_TM`; `out_TM` is written and overlaps no input.

    On CUDA, activations meet FP8 weights as FP8 (block_fp8.py) and the products are rounded to
    `x_TM`'s dtype before they are weighed. There a row's result depends on the size of the batch
    (tiles are chosen by it), not on what stands in the other rows.
    """
    arguments = Arguments("routed_experts", twoF=gate_up_EFM.shape[1], F=gate_up_EFM.shape[1] // 2)
    arguments.check("x_TM", x_TM, FLOATS, "T", "M")
    kind = (x_TM.dtype,)
    arguments.check("weight_TK", weight_TK, FLOAT32, "T", "K")
    arguments.check("expert_TK", expert_TK, INT64, "T", "K")
    matrix = (torch.float8_e4m3fn,) if gate_up_scale_EPQ is not None else kind
    arguments.check("gate_up_EFM", gate_up_EFM, matrix, "E", "twoF", "M")
    arguments.check("down_EMF", down_EMF, matrix, "E", "M", "F")
    if gate_up_scale_EPQ is not None and down_scale_EPQ is not None:
        inner, outer = arguments.sizes["F"] // 128, -(-arguments.sizes["M"] // 128)
        arguments.check("gate_up_scale_EPQ", gate_up_scale_EPQ, FLOAT32, "E", 2 * inner, outer)
        arguments.check("down_scale_EPQ", down_scale_EPQ, FLOAT32, "E", outer, inner)
    arguments.check("shared_TM", shared_TM, kind, "T", "M")
    arguments.check("out_TM", out_TM, kind, "T", "M")
    _experts_op(
        x_TM,
        weight_TK,
        expert_TK,
        gate_up_EFM,
        gate_up_scale_EPQ,
        down_EMF,
        down_scale_EPQ,
        shared_TM,
        out_TM,
    )


def _route_experts(
    logits_TE: Tensor,
    bias_E: Tensor,
    num_groups: int,
    top_groups: int,
    norm_weights: bool,
    scaling_factor: float,
    weight_TK: Tensor,
    expert_TK: Tensor,
) -> None:
    score_TE = logits_TE.sigmoid()
    choice_TE = score_TE + bias_E
    if num_groups > 1:
        choice_TE = _keep_best_groups(choice_TE, num_groups, top_groups)
    chosen_TK = choice_TE.topk(expert_TK.shape[1], dim=-1).indices
    chosen_weight_TK = score_TE.gather(1, chosen_TK)
    if norm_weights:
        chosen_weight_TK = chosen_weight_TK / (chosen_weight_TK.sum(-1, keepdim=True) + 1e-20)
    expert_TK.copy_(chosen_TK)
    weight_TK.copy_(chosen_weight_TK * scaling_factor)


def _keep_best_groups(choice_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """-inf outside the best groups; a group counts the sum of its two best choices."""
    choice_TGX = choice_TE.unflatten(-1, (num_groups, -1))
    group_TG = choice_TGX.topk(2, dim=-1).values.sum(-1)
    kept_TK = group_TG.topk(top_groups, dim=-1).indices
    is_out_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept_TK, False)
    return choice_TGX.masked_fill(is_out_TG[..., None], float("-inf")).flatten(1)


def _routed_experts(
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
    """Loops over the experts that have tokens."""
    sum_TM = torch.zeros(x_TM.shape, dtype=torch.float32, device=x_TM.device)
    num_experts, top_experts = gate_up_EFM.shape[0], expert_TK.shape[1]
    flat_expert = expert_TK.flatten()
    order = flat_expert.argsort(stable=True)
    counts = torch.bincount(flat_expert, minlength=num_experts).tolist()
    weight = weight_TK.flatten()
    end = 0
    for expert, count in enumerate(counts):
        start, end = end, end + count
        if not count:
            continue
        picks = order[start:end]
        tokens = picks // top_experts
        gate_up_FM = _matrix(gate_up_EFM, gate_up_scale_EPQ, expert, x_TM.dtype)
        down_MF = _matrix(down_EMF, down_scale_EPQ, expert, x_TM.dtype)
        gate, up = F.linear(x_TM[tokens], gate_up_FM).chunk(2, dim=-1)
        result = F.linear(F.silu(gate) * up, down_MF)
        sum_TM.index_add_(0, tokens, result.float() * weight[picks, None])
    out_TM.copy_(sum_TM + shared_TM)


def _matrix(
    weight_EOI: Tensor, scale_EPQ: Tensor | None, expert: int, dtype: torch.dtype
) -> Tensor:
    if scale_EPQ is None:
        return weight_EOI[expert]
    return dequantize_blocks(weight_EOI[expert], scale_EPQ[expert], (128, 128)).to(dtype)


_route_op = cpu_op(mutates=("weight_TK", "expert_TK"))(_route_experts)
_experts_op = cpu_op(mutates=("out_TM",))(_routed_experts)
implement("route_experts", cuda.route_experts, "CUDA")
implement("routed_experts", cuda.routed_experts, "CUDA")
