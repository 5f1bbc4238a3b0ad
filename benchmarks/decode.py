"""What a decode step costs, and what the hot cache buys: tokens a second, resident against hot.

    python benchmarks/decode.py --out report.json [--model glm-5.2] [--suite memory,fits,swap]

One GPU, the decode engine as it serves (scheduler, graphs, results a step late), a model of real
layer shapes with few layers and random weights, sequences whose KV is in place already. Random
weights select without locality, so the top-k comes from a trace: a window over a random permutation
of the positions that moves by `misses` a step. The model's own indexer runs all the same; only its
choice is replaced.

    resident    hot buffers as long as the context: nothing is planned, nothing moves
    hot         `--hot-rows` rows a seat
    serial      hot, but nothing runs beside the swap-in: what it costs when it is not hidden
    no-copy     hot, but missing rows are not copied: the price of the swap is the difference

Figures a point: step time (median of wall time over windows of steps), tokens a second, the part of
a step in which the device does nothing, host time a step, rows missed, and the least a step can take
(benchmarks/decode_points.py). Suite "memory" ends with a table of equal GPU memory: sequences that fit
and tokens a second, hot against resident.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidepool.benchmarks.decode_points import (
    GROWTH,
    Point,
    add_arguments,
    cut_config,
    kv_of,
    least_us,
    points,
    seat_bytes,
)
from tidepool.common.clock import MonotonicClock
from tidepool.common.layouts import KvGeometry
from tidepool.common.wire import OutputToken, Sampling
from tidepool.decode_node.admission import Admission
from tidepool.decode_node.context import DecodeContext
from tidepool.decode_node.coordinator import HiSparseCoordinator
from tidepool.decode_node.engine import DecodeEngine
from tidepool.decode_node.hot_cache import HotCache
from tidepool.decode_node.sequence import SequenceState
from tidepool.decode_node.step_runner import StepRunner
from tidepool.hostpool.index_pool import IndexPool
from tidepool.hostpool.memory import adopt_host
from tidepool.hostpool.pool import HostPool
from tidepool.hostpool.seats import SeatPool
from tidepool.hostpool.side_stream import SideStream
from tidepool.kernels.resolve import resolve
from tidepool.kernels.store_rows import pack_rows
from tidepool.model.model import Model

TRACE_STEPS = 512
WARM_STEPS, WINDOWS, WINDOW_STEPS = 24, 5, 20


class TracedContext(DecodeContext):
    """Selects as the model does, then takes the trace's choice."""

    trace_TK: Tensor
    step_1: Tensor

    def _select(self, index_layer: int, query_BID: Tensor, weight_BI: Tensor) -> None:
        super()._select(index_layer, query_BID, weight_BI)
        batch = self._batch
        shift_B = batch.seats_B.clamp(min=0) * 7
        trace_BK = self.trace_TK[(self.step_1 + shift_B) % TRACE_STEPS]
        batch.topk_idx_BK.copy_(torch.where(batch.lens_B[:, None] > 0, trace_BK, -1))


class UncopiedCache(HotCache):
    """Plans, and leaves the missing rows where they are."""

    def _plan_and_copy(
        self,
        group: int,
        topk_idx_BK: Tensor,
        lens_B: Tensor,
        seats_B: Tensor,
        host_rows: Tensor,
        scores_BC: Tensor | None,
    ) -> None:
        batch, plan = topk_idx_BK.shape[0], self._plan
        resolve(
            topk_idx_BK,
            lens_B,
            seats_B,
            self.page_table_SP,
            self.ring_start_S,
            self.position_of_slot_GSH[group],
            self.slot_of_position_GSC[group],
            self.last_use_GSH[group],
            self.step_1,
            plan.hot_idx_SK[:batch],
            plan.miss_host_slot_SK[:batch],
            plan.miss_device_row_SK[:batch],
            self._counters.num_misses_GS[group, :batch],
            self._fault_GS[group, :batch],
            self.geometry.page_size,
            self.ring_rows,
            scores_BC=scores_BC,
        )
        for layer in self.layers_of_group[group]:
            self._copied_L[layer] = self._side.mark()


class HostRows:
    """Pinned host memory that all points use in turn, as large as the largest needs; filled once."""

    def __init__(self, kv: KvGeometry, found: list[Point], *, pin: bool) -> None:
        sizes = [HostPool.bytes_needed(kv, host_pages(kv, point)) for point in found]
        # Not allocate_host: a small virtual machine's memory may grow only as it is used.
        data = torch.frombuffer(mmap.mmap(-1, max(sizes)), dtype=torch.uint8)
        self._memory = adopt_host(data, max(sizes), pin=pin)
        fill_rows(self._memory.data.view(-1, kv.row.row_bytes), kv)

    def pool(self, kv: KvGeometry, point: Point) -> HostPool:
        pages = host_pages(kv, point)
        return HostPool(kv, pages, memory=self._memory.data[: HostPool.bytes_needed(kv, pages)])

    def close(self) -> None:
        self._memory.close()


def host_pages(kv: KvGeometry, point: Point) -> int:
    return point.batch * kv.num_pages(point.context + GROWTH)


def fill_rows(rows_NX: Tensor, kv: KvGeometry) -> None:
    """Bytes that decode to numbers: the same random rows over and over."""
    row = kv.row
    block = pack_rows(torch.randn(4096, row.latent_dim), torch.randn(4096, row.rope_dim), row.name)
    block = block.to(rows_NX.device)
    for first in range(0, rows_NX.shape[0], 4096):
        part = rows_NX[first : first + 4096]
        part.copy_(block[: part.shape[0]])


def fill_keys(index: IndexPool) -> None:
    """Random keys, one scale."""
    geometry = index.geometry
    if geometry.index.name != "index_k":
        index.data.zero_()
        return
    key_bytes = geometry.page_size * geometry.index.head_dim
    for pages in index.data:
        pages[:, :key_bytes] = torch.randint(
            0, 0x60, (pages.shape[0], key_bytes), dtype=torch.uint8, device=pages.device
        )
        scales = torch.full((pages.shape[0], geometry.page_size), 0.02, device=pages.device)
        pages[:, key_bytes:] = scales.view(torch.uint8)


class Bench:
    """One point's pools and engine."""

    def __init__(
        self, model: Model, kv: KvGeometry, point: Point, host_rows: HostRows, *, use_graphs: bool
    ) -> None:
        self.model, self.point = model, point
        device, config = model.device, model.config
        length = point.context + GROWTH
        host = host_rows.pool(kv, point)
        index = IndexPool(kv, host_pages(kv, point), device)
        make_cache = UncopiedCache if point.mode == "no-copy" else HotCache
        cache = make_cache(
            kv,
            config.index_layer_of,
            num_seats=point.batch,
            hot_rows=length if point.mode == "resident" else point.hot_rows,
            max_context=length,
            topk=config.index_topk,
            device=device,
        )
        fill_keys(index)
        for rows_NX in cache.rows:
            fill_rows(rows_NX, kv)
        admission = Admission(
            host.pages,
            index.pages,
            page_size=kv.page_size,
            max_context=length,
            max_requests=point.batch,
        )
        seats = SeatPool(point.batch)
        coordinator = HiSparseCoordinator(host, index, seats, cache, admission, warm_start=False)
        self.cache = cache
        if point.mode == "serial":
            cache._side = SideStream(torch.device("cpu"))
        self._set_trace()
        runner = StepRunner(
            model,
            cache,
            host,
            index,
            max_batch=point.batch,
            max_context=length,
            use_graphs=use_graphs,
            make_context=TracedContext,
            batches=[point.batch],
            contexts=[length],
        )
        runner.prepare()
        self.engine = DecodeEngine(
            model,
            coordinator,
            runner,
            send=lambda *_: None,
            clock=MonotonicClock(),
            park_after_tokens=1 << 30,
            is_overlapped=device.type == "cuda",
        )
        sampling = Sampling(max_tokens=GROWTH, temperature=0.0, ignore_eos=True)
        for number in range(point.batch):
            sequence = self.engine.try_admit((str(number), 0), "front", point.context, sampling)
            assert sequence is not None
            sequence.advance(SequenceState.RECEIVING)
            self.engine.make_ready(sequence, OutputToken(number + 1), ())

    def _set_trace(self) -> None:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(self.point.context, generator=generator)
        topk = self.model.config.index_topk
        at_TK = torch.arange(TRACE_STEPS)[:, None] * self.point.misses + torch.arange(topk)
        trace_TK = order[at_TK % order.numel()].sort(1).values.to(torch.int32)
        TracedContext.trace_TK = trace_TK.to(self.model.device)
        TracedContext.step_1 = self.cache.step_1

    def run(self) -> dict[str, Any]:
        for _ in range(WARM_STEPS):
            self.engine.step()
        self._settle()
        misses, windows, host_s = self.cache.stats.misses, [], 0.0
        for _ in range(WINDOWS):
            start_s = time.perf_counter()
            for _ in range(WINDOW_STEPS):
                self.engine.step()
            self._settle()
            windows.append((time.perf_counter() - start_s) / WINDOW_STEPS)
        missed = self.cache.stats.misses - misses
        step_s = statistics.median(windows)
        device_s, launches = self._device_time()
        for _ in range(3):
            host_s += self._host_time() / 3
        steps = WINDOWS * WINDOW_STEPS
        groups = self.cache.geometry.num_index_layers
        return {
            **asdict(self.point),
            "step_us": round(step_s * 1e6, 1),
            "step_us_spread": [round(s * 1e6, 1) for s in sorted(windows)],
            "tokens_s": round(self.point.batch / step_s, 1),
            "device_us": round(device_s * 1e6, 1),
            "device_idle": round(max(0.0, 1 - device_s / step_s), 4),
            "host_us": round(host_s * 1e6, 1),
            "kernels": launches,
            "missed_per_row": round(missed / steps / groups / self.point.batch, 1),
            "failed": self.engine.num_failed,
        }

    def _settle(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def _host_time(self) -> float:
        """Seconds a call of `step` takes when the device has long been done."""
        self._settle()
        start_s = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - start_s

    def _device_time(self) -> tuple[float, int]:
        """Seconds in which the device works in one step, and kernels and copies in it."""
        if self.model.device.type != "cuda":
            return 0.0, 0
        self._settle()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(4):
                self.engine.step()
            self._settle()
        self.kernels = {
            event.key[:90]: round(event.self_device_time_total / 4, 1)
            for event in profile.key_averages()
        }
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        busy_us, until = 0.0, 0.0
        for start, end in spans:
            busy_us += max(0.0, end - max(start, until))
            until = max(until, end)
        return busy_us / 4 / 1e6, round(len(spans) / 4)


def measure(
    model: Model, kv: KvGeometry, point: Point, host_rows: HostRows, args: argparse.Namespace
) -> dict[str, Any]:
    bench = Bench(model, kv, point, host_rows, use_graphs=not args.no_graphs)
    result = bench.run()
    result["seat_mb"] = round(seat_bytes(kv, point) / 1e6, 1)
    result["least_us"] = least_us(model.config, kv, point, is_fp8=args.weights == "fp8")
    if args.profile:
        shares = sorted(bench.kernels.items(), key=lambda share: -share[1])
        print("\n".join(f"{us:10.1f} us  {name}" for name, us in shares[:24]), flush=True)
    del bench
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def equal_memory(results: list[dict[str, Any]]) -> str:
    """A line for each number of resident sequences: what their memory holds, and decodes, hot."""
    lines = [
        "| context | resident | hot | tokens/s | without the copy | limit, copy hidden or not |"
    ]
    lines.append("|" + "---|" * 6)
    modes: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for result in results:
        if result["suite"] == "memory" and "error" not in result:
            key = result["context"], result["resident_batch"]
            modes.setdefault(key, {})[result["mode"]] = result
    for (context, batch), found in modes.items():
        if found.keys() < {"resident", "hot", "no-copy"}:
            continue
        resident, hot, no_copy = (found[mode] for mode in ("resident", "hot", "no-copy"))
        gain, gain_no_copy = (r["tokens_s"] / resident["tokens_s"] for r in (hot, no_copy))
        alone_us, least = resident["least_us"]["total"], hot["least_us"]
        seats = hot["batch"] / batch
        limits = " to ".join(
            f"{seats * alone_us / least[name]:.2f}" for name in ("in_the_open", "total")
        )
        lines.append(
            f"| {context} | {batch}: {resident['step_us']:.0f} us | {hot['batch']}: "
            f"{hot['step_us']:.0f} us | {gain:.2f}x | {gain_no_copy:.2f}x | {limits}x |"
        )
    return "\n".join(lines)


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    config = cut_config(args)
    model = Model.random(
        config,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        fp8_weights=args.weights == "fp8",
    )
    kv, found = kv_of(config, args.layout), points(args)
    host_rows = HostRows(kv, found, pin=model.device.type == "cuda")
    results = []
    for point in found:
        try:
            results.append(measure(model, kv, point, host_rows, args))
        except (RuntimeError, AssertionError) as error:
            message = f"{type(error).__name__}: {error}"[:400]
            results.append(asdict(point) | {"error": message})
        print(json.dumps(results[-1]), flush=True)
    host_rows.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true", help="print each kernel's share")
    parser.add_argument("--no-graphs", action="store_true")
    args = parser.parse_args()
    results = measure_all(args)
    if "memory" in args.suite.split(","):
        print(equal_memory(results))
    if args.out:
        about = {
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "torch": torch.__version__,
        }
        if args.device == "cuda":
            about["device"] = torch.cuda.get_device_name()
        about["commit"] = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        args.out.write_text(json.dumps({"about": about, "points": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
