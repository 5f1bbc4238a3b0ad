"""How many kernels does an indexer call launch, and how long does it take on this GPU?

    python benchmarks/indexer.py

One indexer of DeepSeek-V3.2's shape (hidden 7168, query latent 1536, 64 heads of 128, rope 64),
random bfloat16 weights, without the context's ops (keys stored, scores, selection), which
benchmarks/gpu_ops.py times. Launches and their time come from torch.profiler, the time of a call
from replays of a CUDA graph of 10 calls.

* eager gates, rope through a copy: what the indexer's seed started from
* compiled gates: torch.compile(dynamic=True), one kernel behind the product
* rope in place: rotates a slice of queries and keys where they lie
"""

from __future__ import annotations

import argparse
from unittest.mock import patch

import torch
from gpu_ops import time_us
from torch import Tensor

from tidepool.model import indexer
from tidepool.model.rope import Rope, RopeConfig, apply_rope_

HIDDEN, LATENT, HEADS, WIDTH, ROPE = 7168, 1536, 64, 128, 64


class NoContext:
    """Takes what the indexer hands over and does nothing."""

    def store_index_keys(self, index_layer: int, key_TD: Tensor) -> None: ...

    def select(self, index_layer: int, query_TID: Tensor, weight_TI: Tensor) -> None: ...


def rope_through_a_copy(x: Tensor, cos_TF: Tensor, sin_TF: Tensor, *, interleaved: bool) -> Tensor:
    copy = x.clone()
    apply_rope_(copy, cos_TF, sin_TF, interleaved=interleaved)
    return x.copy_(copy)


def make_indexer(*, compiled_gates: bool) -> indexer.Indexer:
    def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, device="cuda") * shape[-1] ** -0.5).to(dtype)

    return indexer.Indexer(
        number=0,
        num_heads=HEADS,
        rope_dim=ROPE,
        is_interleaved=False,
        compiled_gates=compiled_gates,
        query_weight=weight(HEADS * WIDTH, LATENT),
        key_weight_DM=weight(WIDTH, HIDDEN),
        key_norm_weight_D=torch.ones(WIDTH, device="cuda"),
        key_norm_bias_D=torch.zeros(WIDTH, device="cuda"),
        gate_weight_IM=weight(HEADS, HIDDEN, dtype=torch.float32),
    )


def measure(num_tokens: int, *, compiled_gates: bool, in_place: bool) -> dict[str, float]:
    """Launches, microseconds of their kernels, microseconds of a call."""
    number = make_indexer(compiled_gates=compiled_gates)
    x = torch.randn(num_tokens, HIDDEN, device="cuda").bfloat16()
    latent = torch.randn(num_tokens, LATENT, device="cuda").bfloat16()
    rope = Rope(RopeConfig(), ROPE, torch.device("cuda"))
    angles = rope.angles(torch.arange(num_tokens, device="cuda"))
    context = NoContext()
    rotate = apply_rope_ if in_place else rope_through_a_copy
    with torch.inference_mode(), patch.object(indexer, "apply_rope_", rotate):

        def call() -> None:
            number(x, latent, *angles, context)  # type: ignore[arg-type]

        for _ in range(3):
            call()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type.name == "CUDA"]
        us, _ = time_us([call] * 10)
    return {
        "launches": len(kernels),
        "kernel_us": sum(event.device_time_total for event in kernels),
        "call_us": us,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    for num_tokens in (1, 32, 64):
        for compiled_gates, in_place in ((False, False), (False, True), (True, True)):
            found = measure(num_tokens, compiled_gates=compiled_gates, in_place=in_place)
            name = f"{'compiled' if compiled_gates else 'eager'} gates, rope "
            name += "in place" if in_place else "through a copy"
            figures = "  ".join(f"{key} {value:.1f}" for key, value in found.items())
            print(f"{num_tokens:3d} tokens, {name:40s} {figures}", flush=True)


if __name__ == "__main__":
    main()
