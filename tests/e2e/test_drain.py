"""SIGTERM of real processes: of a node, of a front, of the command that runs the cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import ray
from helpers.clusters import (
    assert_settles_empty,
    complete,
    demo,
    device_settings,
    lasting,
    running,
    token_ids,
    wait_until,
)
from helpers.streams import STREAM_TIMEOUT_S, Stream

from tidepool.deploy.cluster import Cluster
from tidepool.deploy.demo.data import make_prompt
from tidepool.deploy.demo.run import CHECKPOINT

PROMPT = make_prompt(300, seed=31).token_ids
NUM_TOKENS = lasting(400)
SETTINGS = {
    "cluster.name": "drain",
    "cluster.decode": 2,
    "cluster.fronts": 2,
    "cluster.cpus_per_node": 0.5,
    "cluster.drain_s": 2.0,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running(demo(SETTINGS)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[int]:
    return token_ids(complete(cluster, PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True))


def start_streams(url: str, lengths: list[int]) -> list[Stream]:
    streams = [Stream(url, PROMPT, length) for length in lengths]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.started.wait(60.0)
    return streams


def assert_complete(streams: list[Stream], expected: list[int]) -> None:
    for stream in streams:
        stream.join(STREAM_TIMEOUT_S)
        assert not stream.is_alive(), "a stream hangs"
        assert (stream.failure, stream.error) == (None, None)
        assert stream.tokens == expected[: stream.max_tokens]


def ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("node_id", ["decode-0", "prefill-0"])
def test_no_stream_is_lost_when_a_node_is_told_to_stop(
    cluster: Cluster, expected: list[int], node_id: str
) -> None:
    streams = start_streams(cluster.url, [20, NUM_TOKENS, NUM_TOKENS, NUM_TOKENS])
    waiting = Stream(cluster.url, PROMPT, 8)
    pid = ray.get(cluster.nodes[node_id].info.remote(), timeout=10.0)["pid"]
    os.kill(pid, signal.SIGTERM)
    waiting.start()
    assert_complete([*streams, waiting], expected)
    wait_until(lambda: ended(pid), 60.0, "the node's end")
    wait_until(lambda: is_up(cluster, node_id, pid), 60.0, "the node's successor")
    assert_settles_empty(cluster)


def is_up(cluster: Cluster, node_id: str, old_pid: int) -> bool:
    """A front sees a successor of the process."""
    nodes = httpx.get(f"{cluster.url}/cluster", timeout=10.0).json()["nodes"]
    states = {node["node_id"]: (node["state"], node["pid"]) for node in nodes}
    return states[node_id][0] == "up" and states[node_id][1] != old_pid


def test_a_front_that_is_told_to_stop_serves_its_streams_out(
    cluster: Cluster, expected: list[int]
) -> None:
    streams = start_streams(cluster.url, [30] * 6)
    pid = ray.get(cluster.fronts.actors["front-0"].pid.remote(), timeout=10.0)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: ended(pid), 60.0, "the front's end")
    assert_complete(streams, expected)
    for _ in range(6):
        answer = complete(cluster, PROMPT, max_tokens=2, ignore_eos=True)
        assert token_ids(answer) == expected[:2]
    cluster.keep_fronts()
    assert_settles_empty(cluster)


# ---- tidepool serve ----


@contextmanager
def served(drain_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`tidepool serve` in a process of its own, and its URL."""
    settings = {
        **device_settings(),
        "front.drain_s": drain_s,
        "cluster.name": "served",
        "decode.seats": 4,
    }
    command = [sys.executable, "-m", "tidepool.deploy", "serve", "--model", str(CHECKPOINT)]
    command += ["--port", "0"]
    for name, value in {**settings, "model.threads": 1, "decode.host_tokens": 16384}.items():
        command += ["--set", f"{name}={value}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    lines: list[str] = []
    url = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if " at http" in line:
                url.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert url.wait(120.0), lines
        found = re.search(r"http://[\d.:]+", "".join(lines))
        assert found is not None
        yield process, found[0]
    finally:
        process.kill()
        process.wait(10.0)
        reader.join(10.0)
        if process.stdout is not None:
            process.stdout.close()


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def test_serve_drains_on_sigterm_and_leaves_nothing_behind() -> None:
    before = shared_memory()
    with served(drain_s=120.0) as (process, url):
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200, 60.0, "health")
        (pid,) = {
            node["pid"]
            for node in httpx.get(f"{url}/cluster").json()["nodes"]
            if node["node_id"] == "decode-0"
        }
        streams = start_streams(url, [lasting(200)] * 2)
        process.send_signal(signal.SIGTERM)
        for stream in streams:
            stream.join(STREAM_TIMEOUT_S)
            assert (stream.failure, stream.error, len(stream.tokens)) == (None, None, lasting(200))
        assert process.wait(60.0) == 0
        wait_until(lambda: ended(pid), 30.0, "the node's end")
    assert shared_memory() - before == set()


def test_a_second_sigterm_hurries_serve() -> None:
    before = shared_memory()
    with served(drain_s=600.0) as (process, url):
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200, 60.0, "health")
        (stream,) = start_streams(url, [lasting(2000)])
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health").json()["status"] == "draining", 30.0, "drain")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60.0) == 0
        stream.join(STREAM_TIMEOUT_S)
        assert stream.error is not None or stream.failure is not None
    assert shared_memory() - before == set()
