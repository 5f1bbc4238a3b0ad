"""How long does swap-in take, and how far is that from the link?

    python benchmarks/swap_in.py --out benchmarks/results [--variants] [--replacement] [--peer plugin.py]

Every point is timed as CUDA-graph replays: a graph holds CALLS calls in a row, each with a top-k of
its own, a window over a random permutation of the sequence's positions that moves by `misses` a
call, so that every call misses exactly that many rows a request. Between replays the top-k are
rewritten. A point's time is the median over replays of (replay / CALLS). Beside it, in the same run:

* flat: a plain gather of the same missed rows, sorted by address within a request; the best of
  several grid sizes. No kernel that moves these rows this way is faster.
* alone: one launch between two events on a busy queue (the events cost about 2 us).
* link: the largest copy engine transfer of the run, GB/s.
* by score (--replacement, in a report of its own): with random index scores to choose victims by.
  No position comes back into the window, so that it misses as often as LRU.

A peer: a Python file with `make(bench: Bench) -> Callable[[int], None]`; the callable enqueues call
number i of a graph (`bench.topk_CBK[i]` on `bench.seats_B`) without synchronising, and keeps its own
tables. It runs in the same process, on the same host rows. A function `check()` of the callable, if it
has one, is called after the timing and raises if the rows it brought are not those asked for.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tidepool.kernels import cuda_swap_in, jit
from tidepool.kernels.cuda_swap_in import Tuning

CALLS = 16
REPLAYS = 6
TOPK, HOT_ROWS, RING_ROWS, CONTEXT = 2048, 4096, 128, 65536
FLAT_GRIDS = (16, 64)
TABLE = (
    (1, 64), (1, 256), (1, 2048), (8, 64), (8, 137), (8, 256), (32, 16), (32, 64), (32, 137),
    (32, 256), (64, 64), (64, 137), (64, 256), (128, 16), (128, 64), (256, 16), (256, 64),
)  # fmt: skip
NOTHING_MISSING = (1, 8, 32, 64, 128, 256)


@dataclass(frozen=True)
class Point:
    batch: int
    misses: int
    row_bytes: int
    placement: str
    """contiguous: one run a request; random: every row at a random slot of the pool."""


class Bench:
    """The tensors of one point; `topk_CBK[i]` and `step_C[i]` belong to call i of the graph."""

    def __init__(self, point: Point, host: torch.Tensor) -> None:
        self.point = point
        batch, row_bytes = point.batch, point.row_bytes
        room = host.numel() // (batch * row_bytes) // 64 * 64
        self.context = min(CONTEXT, room)
        num_rows = batch * self.context
        self.host_rows_NX = host[: num_rows * row_bytes].view(num_rows, row_bytes)
        self.is_scattered = point.placement == "random"
        self.page_size = 64 if point.placement == "contiguous" else 1
        pages = torch.arange(num_rows // self.page_size, device="cuda", dtype=torch.int32)
        if point.placement == "random":
            pages = torch.randperm(num_rows, device="cuda", dtype=torch.int32)
        self.page_table_SP = pages.view(batch, -1)
        self.device_rows_MX = torch.empty(
            (batch * (HOT_ROWS + RING_ROWS), row_bytes), dtype=torch.uint8, device="cuda"
        )
        self.seats_B = torch.arange(batch, device="cuda")
        self.seq_lens_B = torch.full((batch,), self.context, device="cuda")
        self.ring_start_S = self._ints(batch, fill=self.context)
        self.position_of_slot_SH = self._ints(batch, HOT_ROWS, fill=-1)
        self.slot_of_position_SC = self._ints(batch, self.context, fill=-1)
        self.last_use_SH = self._ints(batch, HOT_ROWS, fill=0)
        self.topk_CBK = self._ints(CALLS, batch, TOPK, fill=-1)
        self.step_C = torch.arange(1, CALLS + 1, device="cuda", dtype=torch.int32)
        self.hot_idx_BK = self._ints(batch, TOPK, fill=-1)
        self.miss_host_slot_BK = torch.full((batch, TOPK), -1, device="cuda")
        self.miss_device_row_BK = torch.full((batch, TOPK), -1, device="cuda")
        self.num_misses_B = self._ints(batch, fill=0)
        self.fault_B = self._ints(batch, fill=0)
        self.order_BC = torch.rand(batch, self.context, device="cuda").argsort(1).int()
        self.offset = TOPK
        self.scores_BC: torch.Tensor | None = None
        self.has_random_ages = False
        """Victims lie anywhere in the buffer, also under LRU: rows that came together leave apart."""

    @staticmethod
    def _ints(*shape: int, fill: int) -> torch.Tensor:
        return torch.full(shape, fill, dtype=torch.int32, device="cuda")

    def reset(self) -> None:
        self.position_of_slot_SH.fill_(-1)
        self.slot_of_position_SC.fill_(-1)
        self.last_use_SH.fill_(0)
        self.offset = 0

    def window(self, first: int, count: int) -> torch.Tensor:
        """Positions [B, count] at `first` of each request's permutation, ascending."""
        at = (first + torch.arange(count, device="cuda")) % self.context
        return self.order_BC[:, at].sort(1).values

    def advance(self) -> None:
        """Writes the next CALLS windows and steps."""
        for call in range(CALLS):
            self.offset += self.point.misses
            self.topk_CBK[call] = self.window(self.offset, TOPK)
        self.step_C += CALLS

    def missed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Host slots and device rows int64 [CALLS, B * misses] of the calls that are written."""
        misses, batch = self.point.misses, self.point.batch
        source = []
        for call in range(CALLS):
            first = self.offset - (CALLS - 1 - call) * misses + TOPK - misses
            position = self.window(first, misses).long()
            page = self.page_table_SP.gather(1, position // self.page_size).long()
            slot = page * self.page_size + position % self.page_size
            source.append(slot.sort(1).values.flatten())
        rows = torch.arange(batch, device="cuda")[:, None] * (HOT_ROWS + RING_ROWS)
        target = (rows + torch.arange(misses, device="cuda")).flatten()
        return torch.stack(source), target

    def arguments(self, call: int) -> tuple[torch.Tensor, ...]:
        return (
            self.topk_CBK[call], self.seq_lens_B, self.seats_B, self.page_table_SP,
            self.ring_start_S, self.position_of_slot_SH, self.slot_of_position_SC,
            self.last_use_SH, self.step_C[call : call + 1], self.hot_idx_BK,
            self.miss_host_slot_BK, self.miss_device_row_BK, self.num_misses_B, self.fault_B,
        )  # fmt: skip


def fused(bench: Bench, tuning: Tuning) -> Callable[[int], None]:
    def call(i: int) -> None:
        cuda_swap_in.launch_swap_in(
            tuning, *bench.arguments(i), bench.host_rows_NX, bench.device_rows_MX,
            bench.page_size, RING_ROWS, bench.is_scattered, scores_BC=bench.scores_BC,
        )  # fmt: skip

    return call


def two_launches(bench: Bench, tuning: Tuning) -> Callable[[int], None]:
    def call(i: int) -> None:
        cuda_swap_in.launch_resolve(
            tuning, *bench.arguments(i), bench.page_size, RING_ROWS, bench.is_scattered,
            scores_BC=bench.scores_BC,
        )  # fmt: skip
        copy_only(bench, tuning)(i)

    return call


def copy_only(bench: Bench, tuning: Tuning) -> Callable[[int], None]:
    def call(i: int) -> None:
        cuda_swap_in.launch_copy(
            tuning, bench.host_rows_NX, bench.device_rows_MX, bench.miss_host_slot_BK,
            bench.miss_device_row_BK, bench.num_misses_B, bench.is_scattered,
        )  # fmt: skip

    return call


def time_graph(call: Callable[[int], None], before: Callable[[], None]) -> list[float]:
    """us a call of each replay of a graph of CALLS calls; `before` runs before each replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i)
    times = []
    for _ in range(REPLAYS):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return times[1:]


def time_alone(call: Callable[[int], None]) -> float:
    """us of one launch between two events, the queue kept busy before; median over CALLS."""
    times = []
    for i in range(CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(400_000)
        start.record()
        call(i)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


def warm_up(bench: Bench, call: Callable[[int], None]) -> None:
    """Fills all hot slots: two windows side by side, then the point's own."""
    bench.reset()
    for first in (0, TOPK):
        bench.step_C += 1
        bench.topk_CBK[0] = bench.window(first, TOPK)
        call(0)
    bench.offset = TOPK
    if bench.has_random_ages:
        bench.step_C += HOT_ROWS
        bench.last_use_SH[:] = torch.rand_like(bench.last_use_SH, dtype=torch.float32).argsort(1)
    torch.cuda.synchronize()


def time_ours(bench: Bench, make: Callable[..., Any], tuning: Tuning) -> dict[str, float]:
    call = make(bench, tuning)
    warm_up(bench, call)
    times = time_graph(call, bench.advance)
    found = bench.num_misses_B.unique().tolist()
    if found != [bench.point.misses] or int(bench.fault_B.max()):
        raise AssertionError(f"{bench.point}: missed {found}, faults {bench.fault_B.unique()}")
    bench.advance()
    alone = time_alone(call)
    return {
        "us": statistics.median(times),
        "spread_us": max(times) - min(times),
        "alone_us": alone,
    }


def time_flat(bench: Bench, library: ctypes.CDLL) -> dict[str, float]:
    if not bench.point.misses:
        return {"us": 0.0, "alone_us": 0.0, "grid": 0}
    bench.advance()
    source, target = bench.missed()
    rows = cuda_swap_in._plain_rows("flat", bench.host_rows_NX, bench.device_rows_MX)
    best: dict[str, float] = {}
    for grid in FLAT_GRIDS:

        def call(i: int, grid: int = grid) -> None:
            code = library.flat_gather(
                ctypes.c_void_p(source[i].data_ptr()), ctypes.c_void_p(target.data_ptr()),
                target.numel(), ctypes.byref(rows), grid, cuda_swap_in._stream(target.device),
            )  # fmt: skip
            assert code == 0, code

        def next_rows() -> None:
            bench.advance()
            source.copy_(bench.missed()[0])

        us = statistics.median(time_graph(call, next_rows))
        if not best or us < best["us"]:
            best = {"us": us, "grid": grid, "alone_us": time_alone(call)}
    return best


def measure_link(host: torch.Tensor) -> dict[str, float]:
    size = min(host.numel(), 1 << 30)
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    best = 0.0
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(host[:size], non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        best = max(best, size / start.elapsed_time(end) / 1e6)
    return {"h2d_gb_s": best}


VARIANTS: dict[str, tuple[Callable[..., Any], Tuning]] = {
    "default": (fused, Tuning()),
    **{
        f"fused, {'eager' if eager else 'not eager'}": (fused, Tuning(is_eager=eager))
        for eager in (False, True)
    },
    **{f"fused, {n} CTAs a row": (fused, Tuning(num_ranks=n)) for n in (1, 2, 4, 8, 16)},
    "fused, unsorted": (fused, Tuning(num_ranks=1, sort_misses=False)),
    "fused, sorted, 4 warps copy": (
        fused,
        Tuning(num_ranks=1, sort_misses=True, copy_warps=4),
    ),
    "two": (two_launches, Tuning()),
    "two, not set up early": (two_launches, Tuning(is_dependent=False)),
    "two, sliced": (two_launches, Tuning(sort_misses=True, is_sliced=True)),
    "two, not sliced": (two_launches, Tuning(is_sliced=False)),
}
VARIANT_POINTS = (
    (1, 0, "contiguous"), (1, 64, "contiguous"), (8, 64, "contiguous"), (32, 0, "contiguous"),
    (32, 16, "random"), (32, 137, "random"), (64, 137, "contiguous"), (64, 137, "random"),
    (256, 64, "contiguous"), (256, 64, "random"),
)  # fmt: skip


def time_orders(bench: Bench, library: ctypes.CDLL) -> dict[str, float]:
    """us of the plain gather with 64 CTAs, by the order of its list and the spread of its targets."""
    batch, misses = bench.point.batch, bench.point.misses
    bench.advance()
    source_C, target = (part.clone() for part in bench.missed())
    spread = torch.arange(batch, device="cuda")[:, None] * (HOT_ROWS + RING_ROWS)
    spread = spread + torch.rand(batch, HOT_ROWS, device="cuda").argsort(1)[:, :misses]
    orders = {
        "by request": lambda x: x,
        "by request, spread targets": lambda x: x,
        "unsorted": lambda x: x[:, torch.randperm(x.shape[1], device="cuda")],
        "sweeps side by side": lambda x: x.view(CALLS, batch, misses).mT.flatten(1),
        "globally sorted": lambda x: x.sort(1).values,
    }
    rows = cuda_swap_in._plain_rows("flat", bench.host_rows_NX, bench.device_rows_MX)
    results = {}
    for name, order in orders.items():
        chosen = spread.flatten() if "spread" in name else target
        source = torch.empty_like(source_C)

        def call(i: int, source: torch.Tensor = source, chosen: torch.Tensor = chosen) -> None:
            library.flat_gather(
                ctypes.c_void_p(source[i].data_ptr()), ctypes.c_void_p(chosen.data_ptr()),
                chosen.numel(), ctypes.byref(rows), 64, cuda_swap_in._stream(chosen.device),
            )  # fmt: skip

        def before(source: torch.Tensor = source, order: Any = order) -> None:
            bench.advance()
            source.copy_(order(bench.missed()[0]))

        results[f"flat {name}"] = statistics.median(time_graph(call, before))
    return results


def all_points() -> list[Point]:
    points = [Point(batch, 0, 656, "contiguous") for batch in NOTHING_MISSING]
    for row_bytes in (1152, 656):
        for placement in ("contiguous", "random"):
            points += [Point(batch, misses, row_bytes, placement) for batch, misses in TABLE]
    return points


def run_table(host: torch.Tensor, flat: ctypes.CDLL, peer: Any, deadline: float) -> list[dict]:
    results = []
    for point in all_points():
        if time.monotonic() > deadline:
            break
        bench = Bench(point, host)
        result = asdict(point) | {"context": bench.context}
        result["ours"] = time_ours(bench, fused, Tuning())
        result["two"] = time_ours(bench, two_launches, Tuning())
        result["flat"] = time_flat(bench, flat)
        if peer is not None:
            call = peer.make(bench)
            warm_up(bench, call)
            result["peer"] = {"us": statistics.median(time_graph(call, bench.advance))}
            if hasattr(call, "check"):
                call.check()
        results.append(result)
        print(line_of(result), flush=True)
    return results


def line_of(result: dict[str, Any]) -> str:
    ours, flat = result["ours"]["us"], result["flat"]["us"]
    limit = limit_of(result)
    verdict = "" if limit is None else f" limit {limit:6.1f} {'ok' if ours <= limit else 'MISS'}"
    return (
        f"{result['row_bytes']:5} {result['placement']:10} batch {result['batch']:3} "
        f"misses {result['misses']:4}: {ours:7.2f} us (alone {result['ours']['alone_us']:6.1f}), "
        f"two {result['two']['us']:7.2f}, flat {flat:7.2f} "
        f"(alone {result['flat']['alone_us']:6.1f}){verdict}"
        + (f" peer {result['peer']['us']:7.2f}" if "peer" in result else "")
    )


def geometric_mean(points: list[dict[str, Any]]) -> float:
    """Of peer / ours over the points that have both."""
    both = [point for point in points if "peer" in point]
    return statistics.geometric_mean(point["peer"]["us"] / point["ours"]["us"] for point in both)


def limit_of(result: dict[str, Any]) -> float | None:
    """The target of issue 3 in us, None where there is none."""
    if result["misses"]:
        return 1.08 * result["flat"]["us"] + 5
    return {32: 6.0, 256: 10.0}.get(next(n for n in (32, 255, 256) if result["batch"] <= n))


def run_variants(host: torch.Tensor, library: ctypes.CDLL, deadline: float) -> list[dict[str, Any]]:
    results = []
    for batch, misses, placement in VARIANT_POINTS:
        if time.monotonic() > deadline:
            break
        bench = Bench(Point(batch, misses, 1152, placement), host)
        result: dict[str, Any] = asdict(bench.point)
        for name, (make, tuning) in VARIANTS.items():
            if tuning.num_ranks and tuning.num_ranks * batch > 512:
                continue
            result[name] = time_ours(bench, make, tuning)["us"]
        if misses:
            result |= time_orders(bench, library)
        results.append(result)
        print(json.dumps(result), flush=True)
    return results


REPLACEMENT_POINTS = (
    (1, 0), (32, 0), (256, 0), (1, 64), (1, 256), (8, 137), (32, 16), (32, 137), (64, 137),
    (128, 64), (256, 64),
)  # fmt: skip
REPLACEMENT_WAYS = {
    "swap_in": fused,
    "resolve": lambda bench, tuning: (
        lambda i: cuda_swap_in.launch_resolve(
            tuning,
            *bench.arguments(i),
            bench.page_size,
            RING_ROWS,
            False,
            scores_BC=bench.scores_BC,
        )
    ),
}


def run_replacement(host: torch.Tensor, deadline: float) -> list[dict[str, Any]]:
    """us of swap_in and of resolve alone with LRU and with victims by score, rows of 1152 bytes."""
    results = []
    for batch, misses in REPLACEMENT_POINTS:
        if time.monotonic() > deadline:
            break
        bench = Bench(Point(batch, misses, 1152, "contiguous"), host)
        bench.has_random_ages = True
        result: dict[str, Any] = asdict(bench.point)
        scores_BC = torch.randn(batch, bench.context, device="cuda")
        for way, make in REPLACEMENT_WAYS.items():
            for name, scores in (("LRU", None), ("by score", scores_BC)):
                bench.scores_BC = scores
                result[f"{way}, {name}"] = time_ours(bench, make, Tuning())["us"]
        results.append(result)
        print(json.dumps(result), flush=True)
    return results


def write_replacement_report(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{report['date']}-replacement-kernel"
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    names = [f"{way}, {name}" for way in REPLACEMENT_WAYS for name in ("LRU", "by score")]
    lines = ["| batch | misses | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
    for point in report["replacement"]:
        cells = " | ".join(f"{point[name]:.2f}" for name in names)
        lines.append(f"| {point['batch']} | {point['misses']} | {cells} |")
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{report['date']}-{report['name']}"
    (folder / f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# Swap-in, {report['date']}",
        "",
        f"Commit {report['commit']}, {report['device']}, CUDA {report['cuda']}, torch "
        f"{report['torch']}, Python {report['python']}.",
        f"Command: `{report['command']}`. {CALLS} calls a graph, median of {REPLAYS - 1} replays.",
        f"Top-k {TOPK}, hot rows {HOT_ROWS}, context {CONTEXT} or what {report['host_gib']} GiB of "
        "host rows hold.",
        f"Link: {report['link']['h2d_gb_s']:.1f} GB/s copy engine. An empty kernel in a graph: "
        f"{report['empty_us']:.2f} us.",
        "",
        "Times in us a call. ours: one fused launch; two: resolve, then copy; flat: the floor.",
        "",
        "| row | slots | batch | misses | ours | spread | two | flat | limit | met | ours GB/s | "
        "ours alone | flat alone | peer |",
        "|" + "---|" * 14,
    ]
    for result in report["points"]:
        limit, ours = limit_of(result), result["ours"]["us"]
        peer = f"{result['peer']['us']:.2f}" if "peer" in result else ""
        moved = result["batch"] * result["misses"] * result["row_bytes"] / ours / 1000
        lines.append(
            f"| {result['row_bytes']} | {result['placement']} | {result['batch']} | "
            f"{result['misses']} | {ours:.2f} | {result['ours']['spread_us']:.2f} | "
            f"{result['two']['us']:.2f} | {result['flat']['us']:.2f} | "
            f"{'' if limit is None else f'{limit:.1f}'} | "
            f"{'' if limit is None else 'yes' if ours <= limit else 'no'} | {moved:.1f} | "
            f"{result['ours']['alone_us']:.1f} | {result['flat']['alone_us']:.1f} | "
            f"{peer} |"
        )
    if any("peer" in point for point in report["points"]):
        missing = [point for point in report["points"] if point["misses"]]
        lines += [
            "",
            f"Geometric mean of peer / ours: {geometric_mean(report['points']):.2f} over all "
            f"{len(report['points'])} points, {geometric_mean(missing):.2f} where rows are missing.",
        ]
    (folder / f"{stem}.md").write_text("\n".join(lines + variant_lines(report)) + "\n")


def variant_lines(report: dict[str, Any]) -> list[str]:
    """The table of ways to launch and of orders of the plain gather, one column a point."""
    columns = report["variants"]
    if not columns:
        return []
    fields = {"batch", "misses", "row_bytes", "placement"}
    names = dict.fromkeys(name for column in columns for name in column if name not in fields)
    heads = [f"{c['batch']} x {c['misses']} {c['placement']}" for c in columns]
    lines = [
        "",
        f"## Ways to launch, rows of {columns[0]['row_bytes']} bytes, us a call",
        "",
        "| | " + " | ".join(heads) + " |",
        "|" + "---|" * (len(heads) + 1),
    ]
    for name in names:
        cells = [f"{column[name]:.1f}" if name in column else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _commit() -> str:
    result = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    return result.stdout.strip() or "unknown"


def _load_peer(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--host-gib", type=float, default=6.0)
    parser.add_argument("--variants", action="store_true", help="also compare ways to launch")
    parser.add_argument("--replacement", action="store_true", help="only: LRU against by score")
    parser.add_argument("--peer", type=Path, help="plugin file, see above")
    parser.add_argument("--name", default="swap-in", help="of the report's files, behind the date")
    parser.add_argument("--commit", default=None, help="what to print as the commit")
    parser.add_argument("--limit-s", type=float, default=600.0, help="stop early after this long")
    args = parser.parse_args()
    deadline = time.monotonic() + args.limit_s
    host = torch.empty(int(args.host_gib * 2**30), dtype=torch.uint8, pin_memory=True)
    capability = torch.cuda.get_device_capability()
    cuda_swap_in.load(torch.device("cuda", torch.cuda.current_device()))
    source = Path(__file__).with_name("flat_gather.cu")
    flat = jit.load(jit.Library("flat_gather", source, capability))
    stream = torch.device("cuda")
    empty_us = statistics.median(
        time_graph(lambda i: flat.empty(cuda_swap_in._stream(stream)), lambda: None)
    )
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "name": args.name,
        "commit": args.commit or _commit(),
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "python benchmarks/swap_in.py"
        + (" --variants" if args.variants else "")
        + (" --peer PLUGIN" if args.peer else ""),
        "host_gib": args.host_gib,
        "link": measure_link(host),
        "empty_us": empty_us,
    }
    print(json.dumps(report), flush=True)
    if args.replacement:
        report["command"] += " --replacement"
        report["replacement"] = run_replacement(host, deadline)
        write_replacement_report(args.out, report)
        return
    report["variants"] = run_variants(host, flat, deadline) if args.variants else []
    peer = None if args.peer is None else _load_peer(args.peer)
    report["points"] = run_table(host, flat, peer, deadline)
    write_report(args.out, report)


if __name__ == "__main__":
    main()
