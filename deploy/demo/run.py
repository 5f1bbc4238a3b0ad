"""`tidepool demo`: one prefill node, one decode node, one long question, and what it cost.

Starts a local cluster over the demo model that ships with the project, asks for one record in an
8,000-token prompt, streams the answer, prints a table, and stops all that it started.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from ...common.config import Config, resolve
from ..cluster import start
from .data import Prompt, make_prompt

CHECKPOINT = Path(__file__).with_name("checkpoint")
PROMPT_TOKENS = 8000
HOT_ROWS = 256
TIMEOUT_S = 300.0
SETTINGS: dict[str, Any] = {
    "model.path": str(CHECKPOINT),
    "model.name": "tidepool-demo",
    "model.threads": 1,
    "decode.hot_rows": HOT_ROWS,
    "decode.seats": 4,
    "decode.host_tokens": 32768,
    "decode.index_tokens": 32768,
    "prefill.pool_tokens": 16384,
    "cluster.name": "demo",
    "front.port": 0,
}
EXACT_ON_GPU: dict[str, Any] = {
    "model.device": "cuda",
    "model.dtype": "float32",
    "kv.layout": "mla_fp32",
    "kv.index_layout": "index_fp32",
    "cluster.gpus_per_node": 0.1,
}
"""Ten nodes may share a GPU, and who shares a batch decides no token: for tests and benchmarks."""


@dataclass(slots=True)
class Answer:
    """What came back, and when (seconds)."""

    text: str
    ttft_s: float
    tpot_s: float
    num_tokens: int


def demo_config(overrides: dict[str, Any] | None = None) -> Config:
    """The demo's configuration; `overrides` (dotted names) win."""
    return resolve(None, {**SETTINGS, **(overrides or {})}).config


def main(overrides: dict[str, Any] | None = None, seed: int | None = None) -> int:
    """Runs the demo; returns 0 if the answer is right, else 1."""
    console = Console(highlight=False)
    config = demo_config(overrides)
    prompt = make_prompt(PROMPT_TOKENS, seed=int(time.time()) if seed is None else seed)
    console.print("starting a local Ray, one prefill node, one decode node and the front ...")
    cluster = start(config, log_to_driver=False)
    try:
        num_records = prompt.text.count("]=")
        console.print(
            f"asking {cluster.url} for the record [b]\\[{prompt.key}][/b], one of {num_records} "
            f"in a prompt of {prompt.num_tokens} tokens:"
        )
        answer = ask(cluster.url, config.model.name, prompt, console)
        nodes = _nodes(cluster.url)
    finally:
        cluster.stop()
    is_right = prompt.is_answered_by(answer.text)
    console.print(_table(prompt, answer, nodes, is_right))
    return 0 if is_right else 1


def ask(url: str, model: str, prompt: Prompt, console: Console) -> Answer:
    """Streams one completion and prints it as it comes."""
    body = {
        "model": model,
        "prompt": prompt.text,
        "max_tokens": 16,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    pieces: list[str] = []
    times: list[float] = []
    num_tokens = 0
    begin = time.perf_counter()
    console.print("  answer: ", end="")
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=TIMEOUT_S) as response:
        if response.status_code != httpx.codes.OK:
            response.read()
            raise RuntimeError(f"the front answered {response.status_code}: {response.text}")
        for event in _events(response):
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                times.append(time.perf_counter())
                pieces.append(choice["text"])
                console.print(choice["text"].replace("[", "\\["), end="")
    console.print()
    ttft_s = times[0] - begin
    tpot_s = (times[-1] - times[0]) / max(1, num_tokens - 1)
    return Answer("".join(pieces), ttft_s, tpot_s, num_tokens)


def _events(response: httpx.Response) -> Any:
    """The JSON objects of a server-sent event stream."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _nodes(url: str) -> dict[str, dict[str, Any]]:
    """Counters by node id; waits for the pollers to have seen the finished request."""
    deadline_s = time.monotonic() + 10.0
    while True:
        view = httpx.get(f"{url}/cluster", timeout=10.0).json()
        nodes = {node["node_id"]: node.get("stats") or {} for node in view["nodes"]}
        decode = nodes.get("decode-0", {})
        is_settled = decode.get("output_tokens", 0) > 1 and decode.get("bytes_received", 0) > 0
        if is_settled or time.monotonic() > deadline_s:
            return nodes
        time.sleep(0.2)


def _table(
    prompt: Prompt, answer: Answer, nodes: dict[str, dict[str, Any]], is_right: bool
) -> Table:
    decode = nodes.get("decode-0", {})
    hits, misses = decode.get("hot_hits", 0), decode.get("hot_misses", 0)
    verdict = "[green]right[/green]" if is_right else f"[red]wrong[/red], it is {prompt.answer}"
    table = Table(show_header=False, title="tidepool demo")
    rows = {
        "answer": verdict,
        "time to first token": f"{answer.ttft_s:.2f} s",
        "time per output token": f"{answer.tpot_s * 1e3:.1f} ms",
        "KV bytes moved": f"{decode.get('bytes_received', 0) / 1e6:.1f} MB",
        "pages on the host": f"{decode.get('host_pages_peak', 0):.0f}",
        "rows in the hot buffer": f"{decode.get('hot_rows_per_seat', 0):.0f}",
        "hit rate": f"{hits / max(1, hits + misses):.1%}",
        "rows swapped in": f"{decode.get('rows_swapped_in', 0):.0f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
