"""What do the model's own launches take on this GPU: sampling, experts, projections, a whole step?

    python benchmarks/model_ops.py --json out.json

Each figure is the median over replays of a CUDA graph that makes the call, a call: device time, launch
gaps between kernels included, Python excluded. Beside experts and projections stands the floor: weights
read once at 4.3 TB/s (device-to-device copy, read plus written), or products at 700 (bf16) and 1,200
TFLOP/s (FP8), whichever is more. Weights rotate over more memory than the L2 holds. A step is
`Model.forward` and `Model.logits` with attention left out: DeepSeek-V3.2's and GLM-5's shapes, one
dense and three mixture layers, 16 experts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tidepool.common.wire import Sampling
from tidepool.kernels.block_fp8 import block_fp8_linear
from tidepool.kernels.routed_experts import routed_experts
from tidepool.model.model import Model
from tidepool.model.output import OutputBuffers
from tidepool.model.random_weights import published_config
from tidepool.model.sampling import SamplingBuffers, SamplingRow, kind_of, sample_into

VOCAB = 129_280
HIDDEN, INNER, EXPERTS, TOP_EXPERTS = 7168, 2048, 32, 8
COPY_BYTES_A_US = 4.3e6
FLOP_A_US = {"bf16": 700e6, "fp8": 1200e6}
PROJECTIONS = ((2112, 7168), (24576, 1536), (7168, 16384), (36864, 7168))
REPLAYS = 20
Call = Callable[[], None]
Figures = dict[str, float]


def time_us(calls: list[Call]) -> float:
    """Median microseconds a call of a graph of all calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def bench_sampling(batch: int) -> Figures:
    logits = torch.randn(batch, VOCAB, device="cuda") * 3
    buffers, output = (make(batch, VOCAB, "cuda") for make in (SamplingBuffers, OutputBuffers))
    token_B = output.token_B
    figures: Figures = {}
    for fields in ({"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}):
        parameters = Sampling(max_tokens=1, **fields)
        buffers.fill([SamplingRow(parameters, row) for row in range(batch)])
        kind = kind_of([parameters])
        name = kind if kind != "filtered" else "+".join(fields)
        figures[name] = time_us([partial(sample_into, logits, buffers, kind, token_B)])
    figures["logprobs"] = time_us([partial(output.write_logprobs, logits, token_B)])
    return figures


def random_fp8(*shape: int) -> tuple[Tensor, Tensor]:
    values = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 60)
    blocks = [-(-size // 128) for size in shape[-2:]]
    scale = torch.rand(*shape[:-2], *blocks, device="cuda") * 1e-3
    return values.to(torch.float8_e4m3fn), scale


def bench_experts(dtype: str) -> dict[str, Figures]:
    shapes = ((EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
    if dtype == "fp8":
        matrices = [part for shape in shapes for part in random_fp8(*shape)]
    else:
        plain = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        matrices = [part for weight in plain for part in (weight.normal_(0, 0.02), None)]
    expert_bytes = 3 * INNER * HIDDEN * (1 if dtype == "fp8" else 2)
    results = {}
    for tokens in (1, 4, 16, 64, 128, 512, 4096):
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        weight = torch.rand(tokens, TOP_EXPERTS, device="cuda")
        expert = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_EXPERTS, dim=-1).indices
        shared, out = torch.zeros_like(x), torch.empty_like(x)
        arguments = (x, weight, expert, *matrices, shared, out)
        flop = tokens * TOP_EXPERTS * 6 * INNER * HIDDEN
        read_us = int(expert.unique().numel()) * expert_bytes / COPY_BYTES_A_US
        results[f"experts {dtype} {tokens}"] = {
            "us": time_us([partial(routed_experts, *arguments)]),
            "floor": max(read_us, flop / FLOP_A_US[dtype]),
        }
    return results


def bench_projection(rows: int, width: int) -> dict[str, Figures]:
    count = max(2, 150_000_000 // (rows * width))
    scaled = [random_fp8(rows, width) for _ in range(count)]
    plain = [torch.randn(rows, width, device="cuda").bfloat16() for _ in range(count)]
    results = {}
    for tokens in (1, 16, 64, 256, 4096):
        x = torch.randn(tokens, width, device="cuda").bfloat16()
        out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")
        calls = [partial(block_fp8_linear, x, *weight, out) for weight in scaled]
        flop = 2 * tokens * rows * width
        results[f"projection {rows} x {width} {tokens}"] = {
            "fp8": time_us(calls),
            "fp8 floor": max(rows * width / COPY_BYTES_A_US, flop / FLOP_A_US["fp8"]),
            "bf16": time_us([partial(torch.nn.functional.linear, x, w) for w in plain]),
        }
    return results


class NoAttention:
    """Attention that answers with the queries."""

    def store_kv(self, layer: int, latent_TC: Tensor, rope_key_TR: Tensor) -> None:
        """Nothing is kept."""

    def store_index_keys(self, index_layer: int, key_TD: Tensor) -> None:
        """Nothing is kept."""

    def select(self, index_layer: int, query_TID: Tensor, weight_TI: Tensor) -> None:
        """Nothing is selected."""

    def attend(self, layer: int, q_latent_THC: Tensor, q_rope_THR: Tensor, scale: float) -> Tensor:
        return q_latent_THC


def num_launches(call: Call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in profile.key_averages() if e.device_type.name == "CUDA")


@torch.inference_mode()
def bench_step(name: str, *, fp8_weights: bool) -> dict[str, Figures]:
    config = published_config(name, num_layers=4, num_dense_layers=1, num_experts=16)
    before = torch.cuda.memory_allocated()
    model = Model.random(config, dtype=torch.bfloat16, device="cuda", fp8_weights=fp8_weights)
    weight_gb = (torch.cuda.memory_allocated() - before) / 1e9
    results = {}
    for batch in (1, 16, 64):
        ids = torch.randint(0, config.vocab_size, (batch,), device="cuda")
        hidden = model.forward(ids, ids, NoAttention())

        def step(ids: Tensor = ids) -> None:
            model.logits(model.forward(ids, ids, NoAttention()))

        results[f"step {name} {'fp8' if fp8_weights else 'bf16'} {batch}"] = {
            "us": time_us([step]),
            "output layer": time_us([partial(model.logits, hidden)]),
            "launches": num_launches(step),
            "GB of weights": weight_gb,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Figures] = {}

    def add(found: dict[str, Figures]) -> None:
        results.update(found)
        for name, figures in found.items():
            line = "  ".join(f"{key} {value:.1f}" for key, value in figures.items())
            print(f"{name:34s} {line}", flush=True)
        torch.cuda.empty_cache()

    for batch in (1, 16, 64, 256):
        add({f"sampling {batch}": bench_sampling(batch)})
    for dtype in ("bf16", "fp8"):
        add(bench_experts(dtype))
    for rows, width in PROJECTIONS:
        add(bench_projection(rows, width))
    for name in ("deepseek-v3.2", "glm-5"):
        for fp8_weights in (False, True):
            add(bench_step(name, fp8_weights=fp8_weights))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
