"""How long streams are silent when their decode process is killed: with and without re-attaching.

    python benchmarks/reattach.py --streams 4 --prompt-tokens 1500 --reattach on

Starts a local cluster of the demo model, streams once undisturbed and once with a kill -9 of the
decode actor, compares the tokens, and prints one line of JSON. `gap_s`: the longest silence of each
stream around the kill.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from e2e.test_kill import Stream
from helpers.clusters import audits, kill, running

from tidepool.deploy.cluster import Cluster
from tidepool.deploy.demo.data import make_prompt
from tidepool.deploy.demo.run import demo_config

NUM_TOKENS = 140
TIMEOUT_S = 300.0
POOL_TOKENS = 65536


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


def start(cluster: Cluster, prompts: list[list[int]]) -> list[TimedStream]:
    """Streams that all have tokens."""
    streams = [TimedStream(cluster.url, prompt, NUM_TOKENS) for prompt in prompts]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.started.wait(TIMEOUT_S)
    return streams


def measure(num_streams: int, prompt_tokens: int, *, reattach: bool) -> dict[str, Any]:
    prompts = [make_prompt(prompt_tokens, seed=50 + n).token_ids for n in range(num_streams)]
    settings = {
        "cluster.name": "reattach-benchmark",
        "kv.layout": "mla_fp32",
        "kv.index_layout": "index_fp32",
        "decode.seats": num_streams,
        "decode.reattach": reattach,
        "decode.reattach_wait_s": 60.0,
        "decode.host_tokens": POOL_TOKENS,
        "decode.index_tokens": POOL_TOKENS,
        "prefill.pool_tokens": POOL_TOKENS,
    }
    with running(demo_config(settings)) as cluster:
        calm = start(cluster, prompts)
        for stream in calm:
            stream.join(TIMEOUT_S)
        streams = start(cluster, prompts)
        before = audits(cluster)["prefill-0"]["prefill_tokens"]
        load = os.getloadavg()[0]
        killed_s = time.time()
        kill(cluster, "decode-0")
        for stream in streams:
            stream.join(TIMEOUT_S)
        gaps_s = [
            max(
                (b - a for a, b in zip(s.times, s.times[1:], strict=False) if b > killed_s),
                default=0.0,
            )
            for s in streams
        ]
        return {
            "reattach": reattach,
            "streams": num_streams,
            "prompt_tokens": prompt_tokens,
            "load": round(load, 1),
            "gap_s": [round(gap, 2) for gap in sorted(gaps_s)],
            "equal": [s.tokens for s in streams] == [s.tokens for s in calm],
            "prefilled_again": audits(cluster)["prefill-0"]["prefill_tokens"] - before,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--reattach", choices=["on", "off"], default="on")
    arguments = parser.parse_args()
    is_on = arguments.reattach == "on"
    print(json.dumps(measure(arguments.streams, arguments.prompt_tokens, reattach=is_on)))


if __name__ == "__main__":
    main()
