"""Real clusters on a local Ray, and what end-to-end tests ask of them.

    with running(config) as cluster:
        client = cluster.client()

The cluster is stopped, and Ray with it, whatever happens in between.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import ray

from tidepool.common.config import Config
from tidepool.deploy.cluster import Cluster, start
from tidepool.deploy.demo.run import EXACT_ON_GPU, demo_config

READY_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 20.0
_ON_DEVICE: dict[str, dict[str, Any]] = {
    "cpu": {"model.device": "cpu"},
    # A process on a GPU takes longer to come than a new request waits by default.
    "cuda": {**EXACT_ON_GPU, "front.node_wait_s": 60.0},
}
_TOKENS_ON_CUDA = 4
_device = "cpu"


def use_device(name: str) -> None:
    """Where clusters of tests compute from now on: pytest's option --device."""
    global _device  # noqa: PLW0603
    _device = name


def device_settings() -> dict[str, Any]:
    """What the chosen device adds to a configuration."""
    return dict(_ON_DEVICE[_device])


def demo(settings: dict[str, Any] | None = None) -> Config:
    """The demo's configuration on the chosen device; `settings` (dotted names) win."""
    return demo_config({**device_settings(), **(settings or {})})


def lasting(num_tokens: int) -> int:
    """Output tokens of a stream that is to go on for as long as so many do on a CPU."""
    return num_tokens * (_TOKENS_ON_CUDA if _device == "cuda" else 1)


@contextmanager
def running(config: Config) -> Iterator[Cluster]:
    """A started cluster whose front says it is healthy."""
    cluster = start(config, log_to_driver=False)
    try:
        wait_until(lambda: is_healthy(cluster), READY_TIMEOUT_S, "the front to be healthy")
        yield cluster
    finally:
        cluster.stop()


def is_healthy(cluster: Cluster) -> bool:
    return httpx.get(f"{cluster.url}/health", timeout=5.0).status_code == httpx.codes.OK


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Polls until `condition` holds; returns the seconds it took, AssertionError after too many."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)
    return time.monotonic() - begin


def complete(cluster: Cluster, prompt: Any, **body: Any) -> dict[str, Any]:
    """One greedy completion, not streamed; AssertionError unless it is answered 200."""
    payload = {"prompt": prompt, "temperature": 0, "return_token_ids": True, **body}
    response = httpx.post(f"{cluster.url}/v1/completions", json=payload, timeout=120.0)
    assert response.status_code == httpx.codes.OK, response.text
    return dict(response.json())


def token_ids(answer: dict[str, Any]) -> list[int]:
    """Output token ids of a completion's first choice."""
    return list(answer["choices"][0]["token_ids"])


def audits(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Checks every invariant of every node; its counters by node id."""
    ids = list(cluster.nodes)
    answers = ray.get([cluster.nodes[node_id].audit.remote() for node_id in ids], timeout=30.0)
    return {node_id: answer["stats"] for node_id, answer in zip(ids, answers, strict=True)}


def is_empty(stats: dict[str, Any]) -> bool:
    """Every pool of a node is as full as at its start."""
    return all(
        stats[f"{pool}_free"] == stats[f"{pool}_total"]
        for pool in ("host_pages", "index_pages", "seats", "device_pages")
        if f"{pool}_free" in stats
    )


def assert_settles_empty(cluster: Cluster) -> None:
    """All pools of all nodes are empty soon: nothing leaks."""
    wait_until(
        lambda: all(is_empty(stats) for stats in audits(cluster).values()),
        SETTLE_TIMEOUT_S,
        f"empty pools: {audits(cluster)}",
    )


def kill(cluster: Cluster, node_id: str) -> None:
    """kill -9 of a node's process."""
    info = ray.get(cluster.nodes[node_id].info.remote(), timeout=10.0)
    os.kill(info["pid"], signal.SIGKILL)
