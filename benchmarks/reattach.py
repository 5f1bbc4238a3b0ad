"""How long streams are silent when their decode process is killed: with and without re-attaching.

    python benchmarks/reattach.py --streams 4 --prompt-tokens 1500 --reattach on
    python benchmarks/reattach.py --device cuda --streams 16 --output-tokens 1000 --kills 3

Starts a local cluster of the demo model, streams once undisturbed and once with a kill -9 of the
decode actor, compares the tokens, and prints one line of JSON a kill. `gap_s`: the longest silence of
each stream around the kill. `stages_s`: seconds from the kill to the end of the killed process, to the
stages of the next one's start (common/stages.py) and to its first and last stream's next token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import ray

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.clusters import audits, kill, running
from helpers.streams import Stream

from tidepool.deploy.cluster import Cluster
from tidepool.deploy.demo.data import make_prompt
from tidepool.deploy.demo.run import EXACT_ON_GPU, demo_config

TIMEOUT_S = 300.0
POOL_TOKENS = 65536
EXACT = {"kv.layout": "mla_fp32", "kv.index_layout": "index_fp32"}
ON_DEVICE = {"cpu": {**EXACT, "model.device": "cpu"}, "cuda": EXACT_ON_GPU}


class TimedStream(Stream):
    """Notes when each event came."""

    def _read(self) -> None:
        self.times: list[float] = []
        with httpx.stream("POST", self._url, json=self._body, timeout=TIMEOUT_S) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    self.tokens += event["choices"][0]["token_ids"] or []
                    self.times.append(time.time())
                    self.started.set()


def start(cluster: Cluster, prompts: list[list[int]], num_tokens: int) -> list[TimedStream]:
    """Streams that all have tokens."""
    streams = [TimedStream(cluster.url, prompt, num_tokens) for prompt in prompts]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.started.wait(TIMEOUT_S)
    return streams


class Watch(threading.Thread):
    """Notes when a process has ended."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._path = Path(f"/proc/{pid}")
        self.ended_s = 0.0

    def run(self) -> None:
        while self._path.exists():
            time.sleep(0.005)
        self.ended_s = time.time()


def measure(arguments: argparse.Namespace) -> None:
    count, num_tokens = arguments.streams, arguments.output_tokens
    prompts = [make_prompt(arguments.prompt_tokens, seed=50 + n).token_ids for n in range(count)]
    settings = {
        **ON_DEVICE[arguments.device],
        "cluster.name": "reattach-benchmark",
        "decode.seats": count,
        "decode.reattach": arguments.reattach == "on",
        "decode.reattach_wait_s": 60.0,
        "decode.host_tokens": POOL_TOKENS,
        "decode.index_tokens": POOL_TOKENS,
        "prefill.pool_tokens": POOL_TOKENS,
    }
    with running(demo_config(settings)) as cluster:
        calm = start(cluster, prompts, num_tokens)
        for stream in calm:
            stream.join(TIMEOUT_S)
        for _ in range(arguments.kills):
            line = kill_once(cluster, prompts, num_tokens, [stream.tokens for stream in calm])
            print(json.dumps({**vars(arguments), **line}), flush=True)


def kill_once(
    cluster: Cluster, prompts: list[list[int]], num_tokens: int, expected: list[list[int]]
) -> dict[str, Any]:
    streams = start(cluster, prompts, num_tokens)
    before = audits(cluster)["prefill-0"]["prefill_tokens"]
    load = os.getloadavg()[0]
    decode = cluster.nodes["decode-0"]
    watch = Watch(ray.get(decode.info.remote())["pid"])
    watch.start()
    killed_s = time.time()
    kill(cluster, "decode-0")
    for stream in streams:
        stream.join(TIMEOUT_S)
    gaps = [
        max(
            ((b - a, b) for a, b in zip(s.times, s.times[1:], strict=False) if b > killed_s),
            default=(0.0, killed_s),
        )
        for s in streams
    ]
    stages_s = {
        "ended": watch.ended_s,
        **ray.get(decode.stages.remote()),
        "first stream": min(at for _, at in gaps),
        "last stream": max(at for _, at in gaps),
    }
    audit = audits(cluster)
    return {
        "load": round(load, 1),
        "gap_s": [round(gap, 2) for gap, _ in sorted(gaps)],
        "equal": sum(s.tokens == tokens for s, tokens in zip(streams, expected, strict=True)),
        "running_at_kill": sum(s.times[-1] > killed_s for s in streams),
        "prefilled_again": audit["prefill-0"]["prefill_tokens"] - before,
        "reattached": audit["decode-0"].get("reattached_requests"),
        "replayed_rows": audit["decode-0"].get("reattach_replayed_rows"),
        "reattach_ms": round(audit["decode-0"].get("reattach_ms", 0.0), 1),
        "stages_s": {name: round(at - killed_s, 2) for name, at in stages_s.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(ON_DEVICE), default="cpu")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--output-tokens", type=int, default=140)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--reattach", choices=["on", "off"], default="on")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
