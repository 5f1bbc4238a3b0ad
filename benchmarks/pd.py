"""Does prefill and decode apart beat the same number of unified nodes, and where?

    python benchmarks/pd.py --pairs 1 --out benchmarks/results                        (demo model, CPU)
    python benchmarks/pd.py --pairs 1 --model deepseek-v3.2 --gpus 2 --out benchmarks/results  (random weights)
    python benchmarks/pd.py --arrangements fed --model deepseek-v3.2 --gpus 1   (decode's pauses alone)

Starts `--pairs` prefill and as many decode nodes (real control loops, transport, engines; no Ray, no
HTTP), each a process, with a GPU of its own where there are GPUs; then twice as many unified nodes.
Both get the same requests at the same moments (Poisson arrivals, seeded): mixes of long prompts with
short outputs, of the reverse, and of both, at each rate. `fed`: decode nodes whose prompts come from
a prefill node that only sleeps.

* TTFT, split by what the nodes note: queue (to the offer), prefill (to the commit), transfer (to
  READY on decode), first decode (from there to the second token).
* Gaps between tokens at the front, p50 and p99: all of them, and without the first of each request,
  which is its first decode. p99 also against the p50 of a node that decodes one request with nothing
  else to do.
* Steady: the gaps of `--steady` long streams, first with nothing else to do, then while prompts with
  few output tokens arrive: what arriving prompts cost those who run.
* What the decode engines say of their steps (decode_node/step_times.py), with the longest gaps.
* Goodput: requests a second within the SLO (--slo-ttft, --slo-itl: the first token, and the mean gap).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tidepool.benchmarks.pd_nodes import Cluster, Seen
from tidepool.common.config import Config, resolve

STEADY_IDLE_S = 1.5


@dataclass(frozen=True)
class Shape:
    """Lengths of a kind of request."""

    prompt: int
    output: int


Mix = list[tuple[str, Shape]]


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def quantiles_ms(values: list[float]) -> dict[str, float]:
    return {f"p{p}": percentile(values, p / 100) * 1e3 for p in (50, 99)}


def split_of(good: list[Seen]) -> dict[str, float]:
    """Medians of the parts of TTFT, and of what follows to the second token; milliseconds."""
    parts: dict[str, list[float]] = {}
    for each in good:
        notes = each.notes
        if notes.keys() >= {"offered", "committed", "ready"}:
            marks = [each.sent_s, notes["offered"], notes["committed"], notes["ready"]]
            marks += each.token_s[1:2]
            names = ("queue", "prefill", "transfer", "first_decode")
            for name, (begin_s, end_s) in zip(names, itertools.pairwise(marks), strict=False):
                parts.setdefault(name, []).append(end_s - begin_s)
    return {name: statistics.median(values) * 1e3 for name, values in parts.items()}


def summary(seen: list[Seen], idle_itl_s: float, slo: tuple[float, float]) -> dict[str, Any]:
    good = [each for each in seen if not each.error and each.token_s]
    begin_s = min(each.sent_s for each in seen)
    span_s = max(each.token_s[-1] for each in good) - begin_s
    ttft = [each.token_s[0] - each.sent_s for each in good]
    gaps = [gap for each in good for gap in each.gaps]
    running = [gap for each in good for gap in each.gaps[1:]]
    within = sum(
        each.token_s[0] - each.sent_s <= slo[0]
        and (each.token_s[-1] - each.token_s[0]) / max(1, len(each.token_s) - 1) <= slo[1]
        for each in good
    )
    return {
        "requests": len(seen),
        "failed": [each.error for each in seen if each.error][:3],
        "output_tokens_s": sum(len(each.token_s) for each in good) / span_s,
        "requests_s": len(good) / span_s,
        "ttft_ms": quantiles_ms(ttft),
        "ttft_split_ms": split_of(good),
        "itl_ms": quantiles_ms(gaps),
        "itl_p99_of_idle": percentile(gaps, 0.99) / idle_itl_s,
        "running_itl_ms": quantiles_ms(running),
        "running_itl_p99_of_idle": percentile(running, 0.99) / idle_itl_s,
        "goodput_s": within / span_s,
    }


def prompts(shapes: Iterator[Shape], vocab: int, chance: random.Random) -> list[tuple[int, ...]]:
    """Drawn before the clock runs: the front's process has one interpreter for all it does."""
    return [tuple(chance.randrange(2, vocab) for _ in range(shape.prompt)) for shape in shapes]


def arrive(
    cluster: Cluster, mix: Mix, number: int, rate: float, made: list[tuple[int, ...]]
) -> None:
    chance = random.Random(7)
    due_s = time.monotonic()
    for at in range(number):
        due_s += chance.expovariate(rate)
        time.sleep(max(0.0, due_s - time.monotonic()))
        kind, shape = mix[at % len(mix)]
        cluster.submit(kind, made[at], shape.output)


def run_mix(cluster: Cluster, mix: Mix, number: int, rate: float, vocab: int) -> list[Seen]:
    shapes = (mix[at % len(mix)][1] for at in range(number))
    arrive(cluster, mix, number, rate, prompts(shapes, vocab, random.Random(8)))
    return cluster.take()


def run_steady(
    cluster: Cluster, streams: Mix, mix: Mix, number: int, rate: float, vocab: int
) -> dict[str, Any]:
    """Gaps of `streams`: alone, and while `number` requests of `mix` arrive."""
    chance = random.Random(9)
    made = prompts((shape for _, shape in streams), vocab, chance)
    arriving = prompts((mix[at % len(mix)][1] for at in range(number)), vocab, chance)
    keys = [
        cluster.submit("steady", tokens, shape.output)
        for tokens, (_, shape) in zip(made, streams, strict=True)
    ]
    steady = [cluster.front.seen[key] for key in keys]
    while not all(len(each.token_s) > 8 or each.is_over for each in steady):
        time.sleep(0.01)
    idle_from_s = time.monotonic()
    time.sleep(STEADY_IDLE_S)
    loaded_from_s = time.monotonic()
    arrive(cluster, mix, number, rate, arriving)
    arrivals = [each for each in cluster.front.seen.values() if each.kind != "steady"]
    while not all(each.is_over for each in arrivals):
        time.sleep(0.01)
    end_s = min(time.monotonic(), *(each.token_s[-1] for each in steady))
    errors = [each.error for each in cluster.take() if each.error]
    idle = gaps_within(steady, idle_from_s, loaded_from_s)
    loaded = gaps_within(steady, loaded_from_s, end_s)
    idle_p50 = percentile(idle, 0.5)
    return {
        "streams": len(streams),
        "arrivals": number,
        "failed": errors[:3],
        "idle_ms": quantiles_ms(idle),
        "loaded_ms": quantiles_ms(loaded),
        "loaded_gaps": len(loaded),
        "p99_of_idle_p50": percentile(loaded, 0.99) / idle_p50,
        "p99_of_idle_p99": percentile(loaded, 0.99) / percentile(idle, 0.99),
        "steps": cluster.steps,
    }


def gaps_within(seen: list[Seen], begin_s: float, end_s: float) -> list[float]:
    return [
        b - a
        for each in seen
        for a, b in itertools.pairwise(each.token_s)
        if begin_s <= a and b <= end_s
    ]


def measure(cluster: Cluster, arguments: argparse.Namespace) -> dict[str, Any]:
    roles = cluster.roles
    long, short = Shape(*arguments.long), Shape(*arguments.short)
    mixes: dict[str, Mix] = {
        "long prompts": [("long", long)],
        "long outputs": [("short", short)],
        "both": [("long", long), ("short", short)],
    }
    name = "+".join(roles)
    found: dict[str, Any] = {"nodes": roles}
    vocab, slo = arguments.vocab, (arguments.slo_ttft, arguments.slo_itl)
    try:
        for _ in range(2):  # kernels are built, graphs captured, the peer's memory mapped
            run_mix(cluster, mixes["both"], 4 * len(roles), 50.0, vocab)
        alone = run_mix(cluster, mixes["long outputs"], 1, 100.0, vocab)[0].gaps
        idle_itl_s = statistics.median(alone)
        found["idle_itl_ms"] = idle_itl_s * 1e3
        print(json.dumps({"nodes": name, "idle_itl_ms": idle_itl_s * 1e3}), flush=True)
        for rate, (mix_name, mix) in itertools.product(arguments.rates, mixes.items()):
            if mix_name.replace(" ", "-") not in arguments.mixes:
                continue
            total = rate * arguments.pairs
            seen = run_mix(cluster, mix, arguments.requests * arguments.pairs, total, vocab)
            line = {"mix": mix_name, "rate": total, **summary(seen, idle_itl_s, slo)}
            line["steps"] = cluster.steps
            found[f"{mix_name} at {total}"] = line
            print(json.dumps({"nodes": name, **line}), flush=True)
        if arguments.steady:
            kinds = [long, short] * arguments.steady * arguments.pairs
            streams = [
                ("steady", Shape(shape.prompt, arguments.steady_output))
                for shape in kinds[: arguments.steady * arguments.pairs]
            ]
            total = arguments.steady_rate * arguments.pairs
            mix = [("arriving", Shape(long.prompt, 4)), ("arriving", Shape(short.prompt, 4))]
            number = arguments.steady_arrivals * arguments.pairs
            line = run_steady(cluster, streams, mix, number, total, vocab)
            found["steady"] = line
            print(json.dumps({"nodes": name, "steady": line}), flush=True)
    finally:
        cluster.stop()
    return found


def configuration(arguments: argparse.Namespace) -> Config:
    steady = max(arguments.long[0], arguments.short[0]) + arguments.steady_output
    most = max(sum(arguments.long), sum(arguments.short), steady) + 64
    settings: dict[str, Any] = {
        "cluster.authentication": "off",
        "decode.seats": 16,
        "decode.max_requests": 64,
        "decode.host_tokens": 64 * most,
        "decode.index_tokens": 64 * most,
        "prefill.pool_tokens": 8 * most,
        "decode.max_context": most,
    }
    if arguments.model == "demo":
        from tidepool.deploy.demo.run import demo_config  # noqa: PLC0415

        settings |= {"decode.seats": 8} | arguments.set
        return demo_config(settings)
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text("{}")
    settings |= {"model.path": str(folder), "prefill.chunk_tokens": 4096, "decode.hot_rows": 4096}
    return resolve(None, settings | arguments.set).config


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--model", default="demo", help="demo, or a name of random_weights.py")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=200)
    shape = {"type": int, "nargs": 2, "metavar": ("PROMPT", "OUTPUT")}
    parser.add_argument("--long", default=[1500, 8], **shape)
    parser.add_argument("--short", default=[100, 64], **shape)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[2.0], help="requests a second and pair"
    )
    parser.add_argument("--requests", type=int, default=24, help="of a mix, and pair")
    names = ["long-prompts", "long-outputs", "both"]
    parser.add_argument("--mixes", nargs="*", default=names, choices=names)
    parser.add_argument("--steady", type=int, default=0, help="long streams a pair")
    parser.add_argument("--steady-output", type=int, default=64)
    parser.add_argument("--steady-rate", type=float, default=4.0)
    parser.add_argument("--steady-arrivals", type=int, default=16)
    parser.add_argument("--slo-ttft", type=float, default=2.0)
    parser.add_argument("--slo-itl", type=float, default=0.05)
    parser.add_argument(
        "--arrangements", nargs="+", choices=("pd", "unified", "fed"), default=["pd", "unified"]
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--out", type=Path)
    found = parser.parse_args(arguments)
    found.set = dict(each.split("=", 1) for each in found.set)
    return found


def main() -> None:
    arguments = parse()
    config = configuration(arguments)
    decodes = ["decode"] * arguments.pairs
    roles_of = {
        "pd": ["prefill"] * arguments.pairs + decodes,
        "unified": ["unified"] * (2 * arguments.pairs),
        "fed": ["feeder"] * arguments.pairs + decodes,
    }
    found: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(arguments).items()}}
    # All start at once, which takes most of the time; idle nodes compute nothing.
    with ThreadPoolExecutor() as pool:
        clusters = list(
            pool.map(
                lambda name: Cluster(roles_of[name], config, arguments.model, arguments.gpus),
                arguments.arrangements,
            )
        )
    for name, cluster in zip(arguments.arrangements, clusters, strict=True):
        found[name] = measure(cluster, arguments)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        place = "gpu" if arguments.gpus else "cpu"
        path = arguments.out / f"{date.today()}-pd-{arguments.pairs}-{place}.json"
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
