"""Triton side of route_experts: one launch, a program a token.

On torch's current stream; no allocation, no synchronisation. Equal choices: the lowest expert, and
the lowest group, win.

Suffixes: T tokens, E experts, G groups, X experts of a group, K chosen experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.errors import KernelError


@triton.jit
def _lowest_best(value, index, AXIS: tl.constexpr, NONE: tl.constexpr):
    """(largest value, lowest index that has it) along an axis, which stays."""
    best = tl.max(value, AXIS, keep_dims=True)
    return best, tl.min(tl.where(value == best, index, NONE), AXIS, keep_dims=True)


@triton.jit
def _route_kernel(
    logits,
    bias,
    weights,
    experts,
    logits_stride,
    scaling_factor,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_EXPERTS: tl.constexpr,
    NORM_WEIGHTS: tl.constexpr,
    G: tl.constexpr,
    X: tl.constexpr,
    K: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    g_G1 = tl.arange(0, G)[:, None]
    x_1X = tl.arange(0, X)[None, :]
    e_GX = g_G1 * GROUP_SIZE + x_1X
    is_in_GX = (g_G1 < NUM_GROUPS) & (x_1X < GROUP_SIZE)
    logit_GX = tl.load(logits + t * logits_stride + e_GX, mask=is_in_GX, other=0.0)
    score_GX = 1.0 / (1.0 + tl.exp(-logit_GX))
    choice_GX = score_GX + tl.load(bias + e_GX, mask=is_in_GX, other=0.0)
    # NaN ranks below every number, and padding below NaN: an expert is always found.
    choice_GX = tl.where(tl.abs(choice_GX) < 3e38, choice_GX, -2e38)
    choice_GX = tl.where(is_in_GX, choice_GX, -3e38)
    if NUM_GROUPS > 1:
        best_G1, place_G1 = _lowest_best(choice_GX, x_1X, 1, X)
        second_G1 = tl.max(tl.where(x_1X == place_G1, -3e38, choice_GX), 1, keep_dims=True)
        # Halves, so that sums of the markers above stay finite.
        group_G1 = tl.where(g_G1 < NUM_GROUPS, best_G1 * 0.5 + second_G1 * 0.5, float("-inf"))
        is_kept_G1 = g_G1 < 0
        for _ in tl.static_range(TOP_GROUPS):
            _, group = _lowest_best(group_G1, g_G1, 0, G)
            is_kept_G1 = is_kept_G1 | (g_G1 == group)
            group_G1 = tl.where(g_G1 == group, float("-inf"), group_G1)
        choice_GX = tl.where(is_kept_G1 & is_in_GX, choice_GX, float("-inf"))
    k_K = tl.arange(0, K)
    expert_K = tl.zeros((K,), tl.int32)
    weight_K = tl.zeros((K,), tl.float32)
    for k in tl.static_range(TOP_EXPERTS):
        best = tl.max(tl.max(choice_GX, 1), 0)
        expert = tl.min(tl.min(tl.where(choice_GX == best, e_GX, G * X), 1), 0)
        is_it_GX = (e_GX == expert) & is_in_GX
        weight = tl.sum(tl.sum(tl.where(is_it_GX, score_GX, 0.0), 1), 0)
        choice_GX = tl.where(is_it_GX, float("-inf"), choice_GX)
        expert_K = tl.where(k_K == k, expert, expert_K)
        weight_K = tl.where(k_K == k, weight, weight_K)
    if NORM_WEIGHTS:
        weight_K = weight_K / (tl.sum(weight_K, 0) + 1e-20)
    is_out_K = k_K < TOP_EXPERTS
    tl.store(weights + t * TOP_EXPERTS + k_K, weight_K * scaling_factor, mask=is_out_K)
    tl.store(experts + t * TOP_EXPERTS + k_K, expert_K.to(tl.int64), mask=is_out_K)


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
    """tidepool::route_experts on CUDA; arguments of kernels/routed_experts.py."""
    num_tokens, num_experts = logits_TE.shape
    if not num_tokens:
        return
    if not (weight_TK.is_contiguous() and expert_TK.is_contiguous()):
        raise KernelError("route_experts: weight_TK and expert_TK must be contiguous")
    if logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    group_size, top_experts = num_experts // num_groups, expert_TK.shape[1]
    _route_kernel[(num_tokens,)](
        logits_TE,
        bias_E.contiguous(),
        weight_TK,
        expert_TK,
        logits_TE.stride(0),
        scaling_factor,
        NUM_GROUPS=num_groups,
        GROUP_SIZE=group_size,
        TOP_GROUPS=top_groups,
        TOP_EXPERTS=top_experts,
        NORM_WEIGHTS=norm_weights,
        G=triton.next_power_of_2(num_groups),
        X=triton.next_power_of_2(group_size),
        K=triton.next_power_of_2(top_experts),
        num_warps=1,
    )
