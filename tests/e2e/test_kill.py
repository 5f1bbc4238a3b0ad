"""kill -9 of a node while requests stream: the rest of the answer comes, and nothing hangs.

How long clients wait for it is measured by benchmarks/recovery.py, not asserted.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest
import ray
from helpers.clusters import (
    assert_settles_empty,
    complete,
    demo,
    is_healthy,
    kill,
    lasting,
    running,
    token_ids,
    wait_until,
)
from helpers.streams import STREAM_TIMEOUT_S, Stream

from tidepool.deploy.demo.data import make_prompt

MODEL = "tidepool-demo"
NUM_TOKENS = lasting(400)


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_killed_node_loses_no_stream(victim: str) -> None:
    prompt = make_prompt(600, seed=21).token_ids
    long_prompt = make_prompt(3000, seed=22).token_ids
    settings = {"cluster.name": f"kill-{victim}", "prefill.chunk_tokens": 128}
    with running(demo(settings)) as cluster:
        expected = token_ids(
            complete(cluster, prompt, model=MODEL, max_tokens=NUM_TOKENS, ignore_eos=True)
        )
        streams = [Stream(cluster.url, prompt, NUM_TOKENS) for _ in range(2)]
        for stream in streams:
            stream.start()
        for stream in streams:
            assert stream.started.wait(30.0)
        prefilling = Stream(cluster.url, long_prompt, 4)
        prefilling.start()
        time.sleep(0.3)
        kill(cluster, victim)
        for stream in (*streams, prefilling):
            stream.join(STREAM_TIMEOUT_S)
            assert not stream.is_alive(), "a stream hangs"
            assert (stream.failure, stream.error) == (None, None)
        assert [stream.tokens for stream in streams] == [expected, expected]
        assert len(prefilling.tokens) == 4
        again = token_ids(complete(cluster, prompt, model=MODEL, max_tokens=20, ignore_eos=True))
        assert again == expected[:20]
        assert_settles_empty(cluster)


def test_a_killed_front_comes_back_at_its_port_and_nothing_leaks() -> None:
    prompt = make_prompt(600, seed=23).token_ids
    with running(demo({"cluster.name": "kill-front"})) as cluster:
        stream = Stream(cluster.url, prompt, lasting(2000))
        stream.start()
        assert stream.started.wait(30.0)
        url = cluster.url
        os.kill(
            ray.get(cluster.fronts.actors["front-0"].pid.remote(), timeout=10.0), signal.SIGKILL
        )
        stream.join(10.0)
        assert isinstance(stream.failure, httpx.HTTPError), "the client gets a reset"

        def is_back() -> bool:
            cluster.keep_fronts()
            try:
                return is_healthy(cluster)
            except httpx.HTTPError:
                return False

        wait_until(is_back, 40.0, "the front to be back")
        assert cluster.url == url
        assert complete(cluster, prompt, model=MODEL, max_tokens=5, ignore_eos=True)["choices"]
        assert_settles_empty(cluster)


def test_the_next_request_works_at_once_when_one_of_two_fronts_is_killed() -> None:
    prompt = make_prompt(300, seed=24).token_ids
    with running(demo({"cluster.name": "two-fronts", "cluster.fronts": 2})) as cluster:
        expected = token_ids(
            complete(cluster, prompt, model=MODEL, max_tokens=NUM_TOKENS // 2, ignore_eos=True)
        )
        streams = [Stream(cluster.url, prompt, NUM_TOKENS // 2) for _ in range(6)]
        for stream in streams:
            stream.start()
        for stream in streams:
            assert stream.started.wait(60.0)
        pid = ray.get(cluster.fronts.actors["front-0"].pid.remote(), timeout=10.0)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10.0, "the front's end")
        for _ in range(8):
            answer = complete(cluster, prompt, model=MODEL, max_tokens=3, ignore_eos=True)
            assert token_ids(answer) == expected[:3]
        for stream in streams:
            stream.join(STREAM_TIMEOUT_S)
            assert stream.failure is not None or stream.tokens == expected
        assert_settles_empty(cluster)
