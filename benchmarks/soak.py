"""Does an overloaded cluster lose, corrupt or leak anything?

    python benchmarks/soak.py --minutes 10 --out benchmarks/results
    python benchmarks/soak.py --minutes 5 --device cuda

Keeps three times as many requests in flight as the decode node admits, for the given time: prompts
of different lengths, streams and not, one in eight hung up at a random moment. Every answer is
compared with the same request's answer on a unified node that ran it alone; requests end before the
first token that another order of the same sums could change. Prints and writes what was answered,
refused (429 with Retry-After) and wrong, how often sequences were parked, the ledger at the end, and
each process's memory over time, on the host and on the device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import ray
import torch

from tidepool.common.wire import OutputToken, Sampling
from tidepool.deploy.cluster import Cluster, start
from tidepool.deploy.demo.data import make_prompt
from tidepool.deploy.demo.run import EXACT_ON_GPU, demo_config
from tidepool.deploy.local import LocalNode

NUM_CASES = 24
MAX_ADMITTED = 8
OVERLOAD = 3
MIN_MARGIN = 0.01
"""Log-probability by which a token must win to count as the answer in every batch."""
ON_DEVICE: dict[str, dict[str, Any]] = {"cpu": {"model.device": "cpu"}, "cuda": EXACT_ON_GPU}
SETTINGS: dict[str, Any] = {
    "cluster.name": "soak",
    "decode.max_requests": MAX_ADMITTED,
    "decode.seats": 3,
    "decode.park_after_tokens": 8,
    "decode.host_tokens": 8192,
    "decode.index_tokens": 8192,
    "prefill.max_queued": 6,
    "transfer.max_defer_s": 5.0,
}


@dataclass(frozen=True)
class Case:
    token_ids: list[int]
    max_tokens: int
    expected: list[int]


@dataclass
class Tally:
    """What happened.

    Attributes:
        memory_mb: (seconds, resident megabytes by process) samples; " GPU" behind a process's name:
            what it holds on the device.
        retry_after_s: of each 429.
    """

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory_mb: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    retry_after_s: list[float] = field(default_factory=list)


def make_cases(device: str) -> list[Case]:
    """Requests of 16 to 1,200 tokens and what a unified node answers to each alone."""
    rng = random.Random(1)
    node = LocalNode(demo_config({**ON_DEVICE[device], "decode.hot_rows": 0}))
    cases = []
    for number in range(NUM_CASES):
        length = int(2 ** rng.uniform(4, 10.2))
        tokens = make_prompt(max(length, 128), seed=number, num_records=1).token_ids[-length:]
        max_tokens = rng.randint(1, 48)
        sampling = Sampling(max_tokens, temperature=0.0, ignore_eos=True, logprobs=2)
        node.submit(str(number), tokens, sampling)
        node.run()
        sure = number_of_sure(node.tokens[str(number)])
        cases.append(Case(tokens, sure, node.output(str(number))[:sure]))
    node.close()
    return [case for case in cases if case.max_tokens]


def number_of_sure(output: Sequence[OutputToken]) -> int:
    """Tokens before the first that won by less than MIN_MARGIN."""
    for number, token in enumerate(output):
        assert token.logprob is not None
        best, second = token.logprob.top_logprobs[:2]
        if best - second < MIN_MARGIN:
            return number
    return len(output)


async def one(
    client: httpx.AsyncClient, url: str, case: Case, rng: random.Random, tally: Tally
) -> str:
    """Runs a request to its end; returns how it ended, "wrong: ..." if its tokens differ."""
    body = {
        "prompt": case.token_ids,
        "max_tokens": case.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if rng.random() < 1 / 8:
        try:
            await client.post(url, json=body, timeout=rng.uniform(0.01, 3.0))
        except httpx.TimeoutException:
            return "hung up"
        return "answered before it hung up"
    response = await client.post(url, json=body)
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        wait_s = float(response.headers["retry-after"])
        tally.retry_after_s.append(wait_s)
        await asyncio.sleep(min(wait_s, 2.0) * rng.uniform(0.5, 1.0))
        return "429"
    if response.status_code != httpx.codes.OK:
        return f"wrong: status {response.status_code}: {response.text[:200]}"
    tokens = response.json()["choices"][0]["token_ids"]
    return "right" if tokens == case.expected else f"wrong: {tokens} is not {case.expected}"


async def load(cluster: Cluster, cases: list[Case], minutes: float, tally: Tally) -> None:
    stop_s = time.monotonic() + 60 * minutes
    limits = httpx.Limits(max_connections=OVERLOAD * MAX_ADMITTED + 4)

    async def worker(number: int, client: httpx.AsyncClient) -> None:
        rng = random.Random(number)
        while time.monotonic() < stop_s:
            end = await one(client, f"{cluster.url}/v1/completions", rng.choice(cases), rng, tally)
            tally.ends[end.split(":")[0]] += 1
            if end.startswith("wrong"):
                tally.wrong.append(end)

    async def watch() -> None:
        begin_s = time.monotonic()
        while time.monotonic() < stop_s:
            sample = await asyncio.to_thread(memory_of, cluster)
            tally.memory_mb.append((round(time.monotonic() - begin_s), sample))
            await asyncio.sleep(10)

    async with httpx.AsyncClient(timeout=300.0, limits=limits) as client:
        workers = (worker(number, client) for number in range(OVERLOAD * MAX_ADMITTED))
        await asyncio.gather(watch(), *workers)


def memory_of(cluster: Cluster) -> dict[str, float]:
    """Megabytes of each node's process and front."""
    pids = {
        node_id: ray.get(actor.info.remote())["pid"] for node_id, actor in cluster.nodes.items()
    }
    for front_id, actor in cluster.fronts.actors.items():
        pids[front_id] = ray.get(actor.pid.remote())
    on_device = _device_mb()
    return {
        **{name: _rss_mb(pid) for name, pid in pids.items()},
        **{f"{name} GPU": on_device[pid] for name, pid in pids.items() if pid in on_device},
    }


def _device_mb() -> dict[int, float]:
    """Megabytes by pid on this machine's GPUs; {} without one."""
    command = [
        "nvidia-smi",
        "--query-compute-apps=pid,used_memory",
        "--format=csv,noheader,nounits",
    ]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    rows = [line.split(",") for line in text.splitlines()]
    return {int(pid): float(used) for pid, used in rows if used.strip().isdigit()}


def _rss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def settle(cluster: Cluster, timeout_s: float = 30.0) -> dict[str, dict[str, float]]:
    """Counters of each node once all pools are empty, or after the time-out as they are."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        stats = {
            node_id: ray.get(actor.audit.remote())["stats"]
            for node_id, actor in cluster.nodes.items()
        }
        held = [
            each[f"{pool}_total"] - each[f"{pool}_free"]
            for each in stats.values()
            for pool in ("host_pages", "index_pages", "device_pages", "seats")
            if f"{pool}_free" in each
        ]
        if not any(held) or time.monotonic() > deadline_s:
            return stats
        time.sleep(0.2)


def report(
    tally: Tally, stats: dict[str, Any], minutes: float, device: str, commit: str, path: Path
) -> None:
    decode, prefill = stats["decode-0"], stats["prefill-0"]
    held = {
        "host pages": decode["host_pages_total"] - decode["host_pages_free"],
        "index pages": decode["index_pages_total"] - decode["index_pages_free"],
        "seats": decode["seats_total"] - decode["seats_free"],
        "prefill pages": prefill["device_pages_total"] - prefill["device_pages_free"],
    }
    first, last = tally.memory_mb[len(tally.memory_mb) // 3], tally.memory_mb[-1]
    kind = {"cpu": "cpu", "cuda": "gpu"}[device]
    waits_s = sorted(tally.retry_after_s) or [0.0]
    lines = [
        f"# Soak at {OVERLOAD}x capacity, {date.today()}",
        "",
        f"`python benchmarks/soak.py --minutes {minutes:g} --device {device}`, commit {commit}, "
        f"{machine(device)}.",
        "",
        "| what | figure |",
        "|---|---|",
        *(f"| requests: {name} | {count} |" for name, count in sorted(tally.ends.items())),
        f"| Retry-After, s: least, median, most | {waits_s[0]:g}, {waits_s[len(waits_s) // 2]:g}, "
        f"{waits_s[-1]:g} |",
        f"| parks | {decode['parks']:.0f} |",
        *(f"| {name} held at the end | {count:.0f} |" for name, count in held.items()),
        *(
            f"| {name}: MB after {first[0]} s, {last[0]} s | "
            f"{first[1][name]:.0f}, {last[1][name]:.0f} |"
            for name in last[1]
            if name in first[1]
        ),
        "",
    ]
    path.mkdir(parents=True, exist_ok=True)
    stem = path / f"{date.today()}-soak-{kind}"
    stem.with_suffix(".md").write_text("\n".join(lines))
    stem.with_suffix(".json").write_text(json.dumps({**vars(tally), **stats}))
    print("\n".join(lines))


def machine(device: str) -> str:
    if device == "cuda":
        return f"{platform.machine()}, {torch.cuda.get_device_name()}"
    return f"{platform.machine()}, CPU only"


def commit_of_tree() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", choices=list(ON_DEVICE), default="cpu")
    parser.add_argument("--commit", default=commit_of_tree(), help="of a tree without its .git")
    arguments = parser.parse_args()
    device = arguments.device
    cases = make_cases(device)
    print("cases, tokens asked for:", [case.max_tokens for case in cases], flush=True)
    cluster = start(demo_config({**ON_DEVICE[device], **SETTINGS}), log_to_driver=False)
    tally = Tally()
    try:
        asyncio.run(load(cluster, cases, arguments.minutes, tally))
        stats = settle(cluster)
    finally:
        cluster.stop()
    report(tally, stats, arguments.minutes, device, arguments.commit, arguments.out)
    for line in tally.wrong[:10]:
        print(line)


if __name__ == "__main__":
    main()
