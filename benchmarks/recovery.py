"""How long do clients wait when a process, a host or a link fails? Needs root.

    python benchmarks/recovery.py --injections 10 --out docs/reports

Runs the cluster of tests/multinode (five hosts as network namespaces, Ray and Mooncake TCP between
them, demo model) under streams, injects one fault at a time, waits until everything is whole again,
and repeats. Writes <date>-recovery.json with every figure and <date>-recovery.md beside the goals.
Every answer is compared with the right tokens; a wrong one ends the run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from multinode.faults import Faults
from multinode.hosts import wait_for
from multinode.ray_cluster import RayCluster, multinode_cluster, num_quarantined
from multinode.streams import Answers, join, question, start_streams, wait_for_tokens
from multinode.traffic import LONG_PROMPT, Traffic

ROLES = ["head", "front-0", "prefill-0", "decode-0", "prefill-1 decode-1"]
SETTINGS = {"prefill.chunk_tokens": 256, "decode.seats": 16, "front.recovery_wait_s": 60.0}
NUM_STREAMS = 16
NUM_PROMPTS = 2
PROMPT_TOKENS = 150
PARTITION_S = 6.0
READY_TIMEOUT_S = 120.0


@dataclass
class Row:
    """All injections of one fault; times in seconds.

    Attributes:
        gaps_s: for each injection and stream, the longest silence behind the injection.
        ttfts_s: of the prompts that were on their way.
        restored_s: until all nodes were up and all pools settled, for each injection.
    """

    fault: str
    goal: str
    injections: int = 0
    requests: int = 0
    failed: int = 0
    gaps_s: list[list[float]] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    restored_s: list[float] = field(default_factory=list)
    quarantined_pages: int = 0
    notes: list[str] = field(default_factory=list)


class Bench:
    """One cluster, one fault after the other."""

    def __init__(self, cluster: RayCluster, seed: int) -> None:
        self.cluster = cluster
        self.answers = Answers(cluster)
        self.rng = random.Random(seed)
        self.rows: dict[str, Row] = {}

    def inject(
        self, fault: str, goal: str, act: Callable[[Faults], None], *, heal: Any = None
    ) -> None:
        """One injection under traffic; `heal(faults)` runs once the clients are served."""
        row = self.rows.setdefault(fault, Row(fault, goal))
        faults = Faults(self.cluster)
        before = self._quarantined()
        traffic = Traffic(
            self.cluster,
            self.answers,
            num_streams=NUM_STREAMS,
            num_prompts=NUM_PROMPTS,
            prompt_tokens=PROMPT_TOKENS,
        )
        # A prompt on its way is caught at a random point of its life.
        traffic.begin(head_start_s=self.rng.uniform(0.0, 2.5))
        since_s = time.monotonic()
        act(faults)
        outcome = traffic.end(since_s)
        if heal is not None:
            heal(faults)
        row.injections += 1
        row.requests += NUM_STREAMS + NUM_PROMPTS
        row.failed += outcome.num_failed
        row.gaps_s.append([round(gap, 3) for gap in outcome.gaps_s])
        row.ttfts_s += [round(ttft, 3) for ttft in outcome.ttfts_s]
        row.notes += traffic.errors
        restoring_s = time.monotonic()
        self.cluster.wait_until_ready(READY_TIMEOUT_S)
        self.cluster.assert_settles()
        row.restored_s.append(round(time.monotonic() - restoring_s, 3))
        row.quarantined_pages += max(0, self._quarantined() - before)
        worst = max(outcome.gaps_s, default=0.0)
        print(
            f"{fault}: {row.injections}: worst gap {worst:.2f} s, first tokens {row.ttfts_s[-2:]}"
        )

    def _quarantined(self) -> int:
        return sum(num_quarantined(stats) for stats in self.cluster.audits().values())

    # ---- faults ----

    def no_fault(self) -> None:
        self.inject("none", "", lambda faults: None)

    def prefill_killed(self) -> None:
        goal = "all complete; added <= 2 s + its prefill"
        self.inject("prefill actor killed", goal, lambda faults: faults.kill_actor("prefill-0"))

    def prefill_off(self) -> None:
        host = self.cluster.where("prefill-0")
        goal = "all complete; added <= 4 s + its prefill"
        off = lambda faults: faults.power_off(host)  # noqa: E731
        self.inject("prefill host powered off", goal, off, heal=lambda faults: faults.boot(host))

    def prefill_partitioned(self) -> None:
        goal = "no request fails (6 s, heals); added <= 4 s + its prefill"
        self.inject("prefill host partitioned 6 s", goal, self._partition("prefill-0"))

    def decode_killed(self) -> None:
        goal = "all continue; gap <= 5 s + process start"
        self.inject("decode actor killed", goal, lambda faults: faults.kill_actor("decode-0"))

    def decode_off(self) -> None:
        host = self.cluster.where("decode-0")
        goal = "all continue elsewhere; gap <= 6 s + prefill"
        off = lambda faults: faults.power_off(host)  # noqa: E731
        self.inject("decode host powered off", goal, off, heal=lambda faults: faults.boot(host))

    def decode_partitioned(self) -> None:
        goal = "no request fails (6 s, heals)"
        self.inject("decode host partitioned 6 s", goal, self._partition("decode-0"))

    def connections_reset(self) -> None:
        host = self.cluster.where("decode-0")
        goal = "no request fails"
        self.inject("decode connections reset", goal, lambda faults: faults.reset_connections(host))

    def head_restarted(self) -> None:
        head = self.cluster.network.hosts[0]

        def restart(faults: Faults) -> None:
            faults.power_off(head)
            time.sleep(3.0)
            faults.boot(head)

        goal = "running streams unhurt; new requests <= 10 s after it is back"
        self.inject("head node restarted", goal, restart)

    def front_killed(self) -> None:
        """Streams end with a reset; the figure is the time until a request is served again."""
        row = self.rows.setdefault(
            "front killed",
            Row("front killed", "clients get a reset; nothing leaks; next works at once"),
        )
        faults = Faults(self.cluster)
        streams = start_streams(self.cluster, [question(PROMPT_TOKENS, 50, 400)] * NUM_STREAMS)
        wait_for_tokens(streams)
        faults.kill_front()
        begin_s = time.monotonic()
        wait_for(self._is_served, READY_TIMEOUT_S, "the front")
        back_s = time.monotonic() - begin_s
        join(streams)
        row.injections += 1
        row.requests += NUM_STREAMS
        row.failed += sum(stream.error is not None for stream in streams)
        row.gaps_s.append([round(back_s, 3)])
        restoring_s = time.monotonic()
        self.cluster.wait_until_ready(READY_TIMEOUT_S)
        self.cluster.assert_settles()
        row.restored_s.append(round(time.monotonic() - restoring_s, 3))
        print(f"front killed: {row.injections}: served again after {back_s:.2f} s")

    def disconnects(self, count: int) -> None:
        """Clients leave at random moments; afterwards pools, sockets and threads are as before."""
        row = self.rows.setdefault(
            "client disconnects", Row("client disconnects", "nothing more than before, 1,000 times")
        )
        self._leave(20)
        self.cluster.assert_settles()
        before = self._census()
        while row.injections < count:
            self._leave(min(20, count - row.injections))
            row.injections += min(20, count - row.injections)
            row.requests = row.injections
        self.cluster.assert_settles()

        def is_back() -> bool:
            now = self._census()
            return all(
                each <= old
                for name in before
                for each, old in zip(now[name], before[name], strict=True)
            )

        wait_for(is_back, 60.0, "sockets and threads")
        row.notes.append(f"(sockets, threads) before {before}, after {self._census()}")
        print(row.notes[-1])

    def _leave(self, count: int) -> None:
        rng = self.rng
        asked = [question(rng.choice((150, 400, 900)), rng.randrange(8), 60) for _ in range(count)]
        streams = start_streams(self.cluster, asked)
        for stream in rng.sample(streams, count):
            time.sleep(rng.uniform(0.0, 0.1))
            stream.close()
        join(streams)

    def _census(self) -> dict[str, tuple[int, int]]:
        """Sockets and threads of every process."""
        pids = {node_id: self.cluster.pid(node_id) for node_id in self.cluster.node_ids}
        pids["front-0"] = self.cluster.front_pid()
        return {
            name: self.cluster.where(name).sockets_and_threads(pid) for name, pid in pids.items()
        }

    def _partition(self, node_id: str) -> Callable[[Faults], None]:
        def partition(faults: Faults) -> None:
            with faults.link_down(self.cluster.where(node_id)):
                time.sleep(PARTITION_S)

        return partition

    def _is_served(self) -> bool:
        body = question(PROMPT_TOKENS, 50, 1).body(stream=False)
        with self.cluster.network.client_side():
            try:
                url = f"{self.cluster.url}/v1/completions"
                return httpx.post(url, json=body, timeout=10.0).status_code == httpx.codes.OK
            except httpx.HTTPError:
                return False


# ---- the report ----


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; the largest value where there are too few for the share."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def summary(row: Row, normal_ttft_s: float) -> dict[str, Any]:
    worst = [max(gaps) for gaps in row.gaps_s if gaps]
    added = [ttft - normal_ttft_s for ttft in row.ttfts_s]

    def both(values: Sequence[float]) -> list[float] | None:
        if not values:
            return None
        return [round(statistics.median(values), 2), round(percentile(values, 0.99), 2)]

    return {
        "worst_gap_p50_p99_s": both(worst),
        "added_ttft_p50_p99_s": both(added),
        "restored_p50_p99_s": both(row.restored_s),
    }


def markdown(rows: Sequence[Row], facts: dict[str, Any], normal_ttft_s: float) -> str:
    lines = [
        f"# Recovery, {facts['date']}",
        "",
        f"{facts['machine']}; Python {facts['python']}, "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        + f"; commit {facts['commit']}.",
        "",
        f"Command: `{facts['command']}`. Five hosts as network namespaces on one machine; demo model on "
        f"its CPU; Mooncake over TCP. While {NUM_STREAMS} streams decode ({PROMPT_TOKENS} to "
        f"{2 * PROMPT_TOKENS} prompt tokens) and {NUM_PROMPTS} prompts of {LONG_PROMPT} tokens are on "
        f"their way, one fault is injected; a decode node has {SETTINGS['decode.seats']} seats. All answers were compared with the right tokens: none was "
        "wrong. *Gap*: the longest silence of the worst stream of an injection. *Added*: time to the "
        "first token of the prompts on their way, less its median without a fault "
        f"({normal_ttft_s:.2f} s, which is what a prefill costs under this load). With fewer than 100 "
        "values p99 is the largest. *Restored*: from the last answer until all nodes are up and all "
        "pools settled. *Quarantined*: pages kept back because a writer's end is not proven.",
        "",
        "| fault | goal | injections | requests | failed | gap p50 / p99 (s) | added p50 / p99 (s) "
        "| restored p50 / p99 (s) | quarantined pages |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = summary(row, normal_ttft_s)
        cells = [" / ".join(map(str, each)) if each else "" for each in figures.values()]
        lines.append(
            f"| {row.fault} | {row.goal} | {row.injections} | {row.requests} | {row.failed} | "
            + " | ".join(cells)
            + f" | {row.quarantined_pages} |"
        )
    notes = {row.fault: sorted(set(row.notes)) for row in rows if row.notes}
    lines += ["", *(f"* {fault}: {'; '.join(texts)}" for fault, texts in notes.items()), ""]
    return "\n".join(lines)


def facts_of(command: str) -> dict[str, Any]:
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = ("ray", "torch", "pyzmq", "mooncake-transfer-engine-non-cuda")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, load average {os.getloadavg()[0]:.0f} before the start, "
        f"Linux {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
        "commit": commit.stdout.strip(),
        "command": command,
    }


def write(bench: Bench, out: Path, facts: dict[str, Any]) -> None:
    rows = list(bench.rows.values())
    normal = bench.rows.get("none")
    normal_ttft_s = statistics.median(normal.ttfts_s) if normal and normal.ttfts_s else 0.0
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{facts['date']}-recovery"
    figures = [asdict(row) | summary(row, normal_ttft_s) for row in rows]
    path.with_suffix(".json").write_text(json.dumps({**facts, "rows": figures}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(rows, facts, normal_ttft_s))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--injections", type=int, default=30, help="of each fault")
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument(
        "--minutes", type=float, default=120.0, help="begin no round after this time"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/reports"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # hosts are removed
    facts = facts_of("python " + " ".join(["benchmarks/recovery.py", *sys.argv[1:]]))
    deadline_s = time.monotonic() + 60 * options.minutes
    with multinode_cluster(ROLES, SETTINGS) as cluster:
        bench = Bench(cluster, options.seed)
        bench.no_fault()  # the first one warms up
        bench.rows.clear()
        kinds = [
            bench.no_fault,
            bench.prefill_killed,
            bench.prefill_off,
            bench.prefill_partitioned,
            bench.decode_killed,
            bench.decode_off,
            bench.decode_partitioned,
            bench.connections_reset,
            bench.head_restarted,
            bench.front_killed,
        ]
        for number in range(options.injections):
            if time.monotonic() >= deadline_s:
                print(f"time is over after {number} rounds")
                break
            for kind in kinds:
                kind()
            write(bench, options.out, facts)
        if options.disconnects:
            bench.disconnects(options.disconnects)
        write(bench, options.out, facts)


if __name__ == "__main__":
    main()
