"""How long do clients wait when a process, a host or a link fails? Needs root.

    nice -n -10 python benchmarks/recovery.py --injections 30 --out benchmarks/results
    python benchmarks/recovery.py --faults decode_killed,disconnects

Runs the cluster of tests/multinode (five hosts as network namespaces, Ray and Mooncake TCP between
them, demo model) under streams, injects one fault at a time, waits until everything is whole again,
and repeats. Every answer is compared with the right one: tokens, log-probabilities, text, stop
strings, usage; a wrong one ends the run. Writes the report (recovery_report.py) after each round.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from multinode.faults import Faults
from multinode.hosts import wait_for
from multinode.ray_cluster import RayCluster, multinode_cluster, num_quarantined
from multinode.streams import Answers, check, join, question, start_streams, wait_for_tokens
from multinode.traffic import LONG_PROMPT, Traffic, assert_nothing_grows, come_and_go
from recovery_report import Row, facts_of, load, write

ROLES = ["head", "front-0 front-1", "prefill-0", "decode-0", "prefill-1 decode-1"]
SETTINGS = {"prefill.chunk_tokens": 256, "decode.seats": 16, "front.recovery_wait_s": 60.0}
NUM_STREAMS = 16
NUM_PROMPTS = 2
PROMPT_TOKENS = 150
OUTPUT_TOKENS = 110
NUM_LEAVING = 20
PARTITION_S = 6.0
HEAD_DOWN_S = 3.0
GOLDEN_RATIO = 0.618034
"""Multiples of it are spread evenly over [0, 1), however many there are."""
READY_TIMEOUT_S = 120.0
SETTING = (
    "Five hosts as network namespaces on one machine; two prefill and two decode nodes, two fronts; "
    f"demo model on its CPU; Mooncake over TCP. While {NUM_STREAMS} streams decode ({PROMPT_TOKENS} "
    f"to {2 * PROMPT_TOKENS} prompt tokens, {OUTPUT_TOKENS} output tokens) and {NUM_PROMPTS} prompts of "
    f"{LONG_PROMPT} tokens are on their way, one fault is injected; the injections of a fault are "
    "spread evenly over the life of such a prompt, from the queue to the first token, or, where the "
    "fault is decode's or the head's, over the life of the streams. A decode node "
    f"has {SETTINGS['decode.seats']} seats. All answers were compared with the right ones (tokens, "
    "log-probabilities, text, stop strings, finish reasons, usage): none was wrong."
)


class Bench:
    """One cluster, one fault after the other."""

    def __init__(self, cluster: RayCluster, seed: int) -> None:
        self.cluster = cluster
        self.answers = Answers(cluster)
        self.rng = random.Random(seed)
        self.rows: dict[str, Row] = {}
        self._prompt_life_s = self._stream_life_s = 2.5

    def inject(
        self,
        fault: str,
        goal: str,
        act: Callable[[Faults], None],
        *,
        heal: Callable[[Faults], None] | None = None,
        measures_service: bool = False,
        hits_streams: bool = False,
    ) -> None:
        """One injection under traffic; `heal(faults)` runs once the clients are served.

        Its moment lies in the life of the prompts, or, where it `hits_streams`, of the streams.
        """
        row = self.rows.setdefault(fault, Row(fault, goal))
        faults = Faults(self.cluster)
        before = self._quarantined()
        traffic = self._traffic()
        share = row.injections * GOLDEN_RATIO % 1.0
        life_s = self._stream_life_s if hits_streams else self._prompt_life_s
        traffic.begin(head_start_s=share * life_s)
        since_s = time.monotonic()
        act(faults)
        if measures_service:
            row.served_s.append(self._time_to_service())
        outcome = traffic.end(since_s)
        if heal is not None:
            heal(faults)
        row.requests += NUM_STREAMS + NUM_PROMPTS
        row.failed += outcome.num_failed
        row.gaps_s.append([round(gap, 3) for gap in outcome.gaps_s])
        row.went_on_s.append([round(each, 3) for each in outcome.went_on_s])
        row.ttfts_s += [round(ttft, 3) for ttft in outcome.ttfts_s]
        row.notes += traffic.errors
        self._restore(row)
        row.quarantined_pages += max(0, self._quarantined() - before)
        worst = max(outcome.gaps_s, default=0.0)
        print(
            f"{fault} {row.injections}: {len(outcome.gaps_s)} streams, worst gap {worst:.2f} s, "
            f"first tokens {row.ttfts_s[-2:]}"
        )

    def _traffic(self) -> Traffic:
        return Traffic(
            self.cluster,
            self.answers,
            num_streams=NUM_STREAMS,
            num_prompts=NUM_PROMPTS,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=OUTPUT_TOKENS,
        )

    def _restore(self, row: Row) -> None:
        """Waits until the cluster is whole; the next fault hits a whole one."""
        begin_s = time.monotonic()
        self.cluster.wait_until_ready(READY_TIMEOUT_S)
        self.cluster.assert_settles()
        row.restored_s.append(round(time.monotonic() - begin_s, 3))
        row.injections += 1

    def _quarantined(self) -> int:
        return sum(num_quarantined(stats) for stats in self.cluster.audits().values())

    def _time_to_service(self) -> float:
        """Until a new request, tried again after each failure, is answered."""
        begin_s = time.monotonic()
        wait_for(self._is_served, READY_TIMEOUT_S, "a new request")
        return round(time.monotonic() - begin_s, 3)

    def _is_served(self) -> bool:
        body = question(PROMPT_TOKENS, 50, 1).body(stream=False)
        with self.cluster.network.client_side():
            try:
                url = f"{self.cluster.url}/v1/completions"
                return httpx.post(url, json=body, timeout=10.0).status_code == httpx.codes.OK
            except httpx.HTTPError:
                return False

    # ---- faults ----

    def no_fault(self) -> None:
        row = self.rows.setdefault("none", Row("none", ""))
        starts_s = row.injections * GOLDEN_RATIO % 1.0 * self._prompt_life_s
        self.inject("none", "", lambda faults: None, measures_service=True)
        self._prompt_life_s = statistics.median(row.ttfts_s)
        if all(row.went_on_s[-1]):
            self._stream_life_s = starts_s + min(row.went_on_s[-1])

    def prefill_killed(self) -> None:
        goal = "all complete; added <= 2 s + its prefill"
        self.inject("prefill actor killed", goal, lambda faults: faults.kill_actor("prefill-0"))

    def prefill_off(self) -> None:
        goal = "all complete; added <= 4 s + its prefill"
        self._power_off("prefill", goal)

    def prefill_partitioned(self) -> None:
        goal = "no request fails (6 s, heals); added <= 4 s + its prefill"
        self.inject("prefill host partitioned 6 s", goal, self._partition("prefill-0"))

    def decode_killed(self) -> None:
        goal = "all continue; gap <= 5 s + process start"
        self.inject(
            "decode actor killed",
            goal,
            lambda faults: faults.kill_actor("decode-0"),
            hits_streams=True,
        )

    def decode_off(self) -> None:
        self._power_off("decode", "all continue elsewhere; gap <= 6 s + prefill")

    def decode_partitioned(self) -> None:
        goal = "no request fails (6 s, heals)"
        self.inject(
            "decode host partitioned 6 s", goal, self._partition("decode-0"), hits_streams=True
        )

    def connections_reset(self) -> None:
        host = self.cluster.where("decode-0")
        goal = "no request fails"
        self.inject(
            "decode connections reset",
            goal,
            lambda faults: faults.reset_connections(host),
            hits_streams=True,
        )

    def head_restarted(self) -> None:
        head = self.cluster.network.hosts[0]

        def restart(faults: Faults) -> None:
            faults.power_off(head)
            time.sleep(HEAD_DOWN_S)
            faults.boot(head)

        goal = "running streams unhurt; new requests <= 10 s after it is back"
        self.inject("head node restarted", goal, restart, measures_service=True, hits_streams=True)

    def front_killed(self) -> None:
        """Streams of the front end with a reset, those of the other go on; new ones work."""
        goal = "clients get a reset; nothing leaks; next works at once"
        row = self.rows.setdefault("front killed", Row("front killed", goal))
        faults = Faults(self.cluster)
        asked = question(PROMPT_TOKENS, 50, OUTPUT_TOKENS)
        self.answers.of(asked)
        streams = start_streams(self.cluster, [asked] * NUM_STREAMS)
        wait_for_tokens(streams)
        since_s = time.monotonic()
        faults.kill_front("front-0")
        row.served_s.append(round(time.monotonic() - since_s + self._time_to_service(), 3))
        join(streams)
        ended = check(streams, self.answers)
        resets = [each for each in streams if each.error and each.error["code"] == "connection"]
        row.requests += NUM_STREAMS
        row.resets += len(resets)
        row.failed += ended - len(resets)
        lived = [each for each in streams if each.error is None]
        row.gaps_s.append([round(each.longest_gap_s(since_s), 3) for each in lived])
        wait_for(lambda: len(self.cluster.front_pids()) == 2, READY_TIMEOUT_S, "the front")
        self._restore(row)
        print(f"front killed {row.injections}: served after {row.served_s[-1]:.2f} s")

    def disconnects(self, count: int) -> None:
        """Clients leave at random moments; afterwards pools, sockets and threads are as before."""
        name = "client disconnects"
        row = self.rows[name] = Row(name, "nothing more than before, 1,000 times")

        def leave() -> None:
            for _ in range(-(-count // NUM_LEAVING)):
                come_and_go(self.cluster, self.rng, NUM_LEAVING)
                row.injections += NUM_LEAVING
            row.requests = row.injections

        come_and_go(self.cluster, self.rng, NUM_LEAVING)
        self.cluster.assert_settles()
        row.notes.append(assert_nothing_grows(self.cluster, leave))
        print(row.notes[-1])

    def _power_off(self, role: str, goal: str) -> None:
        host = self.cluster.where(f"{role}-0")
        self.inject(
            f"{role} host powered off",
            goal,
            lambda faults: faults.power_off(host),
            heal=lambda faults: faults.boot(host),
            hits_streams=role == "decode",
        )

    def _partition(self, node_id: str) -> Callable[[Faults], None]:
        def partition(faults: Faults) -> None:
            with faults.link_down(self.cluster.where(node_id)):
                time.sleep(PARTITION_S)

        return partition


FAULTS = (
    "no_fault",
    "prefill_killed",
    "prefill_off",
    "prefill_partitioned",
    "decode_killed",
    "decode_off",
    "decode_partitioned",
    "connections_reset",
    "head_restarted",
    "front_killed",
    "disconnects",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--injections", type=int, default=30, help="of each fault")
    parser.add_argument("--disconnects", type=int, default=1000)
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"of {', '.join(FAULTS)}")
    parser.add_argument(
        "--minutes", type=float, default=180.0, help="begin no round after this time"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    names = options.faults.split(",")
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # hosts are removed
    facts = facts_of("python " + " ".join(["benchmarks/recovery.py", *sys.argv[1:]]))
    deadline_s = time.monotonic() + 60 * options.minutes
    with multinode_cluster(ROLES, SETTINGS) as cluster:
        bench = Bench(cluster, options.seed)
        bench.no_fault()  # the first one warms up
        known = load(options.out, facts)
        bench.rows = {row.fault: row for row in known.values() if row.commit == facts["commit"]}
        for number in range(options.injections):
            if time.monotonic() >= deadline_s:
                print(f"time is over after {number} rounds")
                break
            for name in names:
                if name != "disconnects" and (name != "no_fault" or number % 5 == 0):
                    getattr(bench, name)()
            write(list(bench.rows.values()), options.out, facts, SETTING)
        if "disconnects" in names:
            bench.disconnects(options.disconnects)
        write(list(bench.rows.values()), options.out, facts, SETTING)


if __name__ == "__main__":
    main()
