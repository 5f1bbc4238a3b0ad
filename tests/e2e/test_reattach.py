"""A decode process is killed under many streams; its next one goes on with them, or nobody notices why not.

How long clients wait is measured (benchmarks/recovery.py, benchmarks/results), not asserted.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from e2e.test_kill import MODEL, STREAM_TIMEOUT_S, Stream
from helpers.clusters import (
    assert_settles_empty,
    audits,
    complete,
    demo,
    kill,
    lasting,
    running,
    wait_until,
)
from helpers.keepers import keepers_of

from tidepool.deploy.cluster import Cluster
from tidepool.deploy.demo.data import make_prompt
from tidepool.deploy.keeping import keeper_path
from tidepool.hostpool.keeper_link import KeeperLink

NUM_STREAMS = 8
NUM_TOKENS = lasting(300)
SETTINGS: dict[str, Any] = {
    "kv.layout": "mla_fp32",
    "kv.index_layout": "index_fp32",
    "decode.seats": NUM_STREAMS - 2,
    "decode.park_after_tokens": 16,
    "decode.reattach_wait_s": 60.0,
    "prefill.chunk_tokens": 512,
}
"""Exact bytes, so that who shares a batch cannot decide a near tie; some streams are parked."""
PROMPTS = [make_prompt(200 + 40 * number, seed=number).token_ids for number in range(NUM_STREAMS)]


@contextmanager
def reattaching(name: str) -> Iterator[Cluster]:
    """A running cluster; behind it there is no keeper, no socket of one, nothing in shared memory."""
    memory_before = set(Path("/dev/shm").glob("*tidepool*"))
    with running(demo({**SETTINGS, "cluster.name": name})) as cluster:
        path = keeper_path(cluster.run_id, "decode-0")
        assert len(keepers_of(path)) == 1
        yield cluster
    wait_until(lambda: not keepers_of(path), 20.0, "the keeper's end")
    assert not path.exists()
    assert set(Path("/dev/shm").glob("*tidepool*")) <= memory_before


def answers(cluster: Cluster) -> list[list[int]]:
    """What the streams get when nobody is killed."""
    streams = started(cluster)
    for stream in streams:
        stream.join(STREAM_TIMEOUT_S)
        assert stream.error is None and len(stream.tokens) == NUM_TOKENS
    return [stream.tokens for stream in streams]


def started(cluster: Cluster) -> list[Stream]:
    """Streams of all prompts, each with tokens."""
    streams = [Stream(cluster.url, prompt, NUM_TOKENS) for prompt in PROMPTS]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.started.wait(STREAM_TIMEOUT_S)
    return streams


def assert_all_are(streams: list[Stream], expected: list[list[int]]) -> None:
    for stream, tokens in zip(streams, expected, strict=True):
        stream.join(STREAM_TIMEOUT_S)
        assert not stream.is_alive(), "a stream hangs"
        assert stream.failure is None, stream.failure
        assert stream.error is None, stream.error
        assert stream.tokens == tokens


def prefilled(cluster: Cluster) -> float:
    return float(audits(cluster)["prefill-0"]["prefill_tokens"])


def audits_or_none(cluster: Cluster) -> dict[str, Any]:
    """decode's counters, {} while it is not there."""
    try:
        answer = ray.get(cluster.nodes["decode-0"].info.remote(), timeout=10.0)
    except ray.exceptions.RayError:
        return {}
    return dict(answer["stats"])


def test_every_stream_goes_on_with_its_tokens_and_nothing_is_prefilled_again() -> None:
    with reattaching("reattach") as cluster:
        expected = answers(cluster)
        streams = started(cluster)
        before = prefilled(cluster)
        for number in range(2):
            kill(cluster, "decode-0")
            if number == 0:
                wait_until(
                    lambda: audits_or_none(cluster).get("reattached_requests", 0) > 0,
                    60.0,
                    "the next process",
                )
                time.sleep(0.2)
        assert_all_are(streams, expected)
        assert prefilled(cluster) == before
        wait_until(lambda: bool(audits_or_none(cluster)), 60.0, "the last process")
        stats = audits(cluster)["decode-0"]
        assert stats["reattach_dropped"] == 0
        assert 0 < stats["reattached_requests"] <= NUM_STREAMS
        assert_settles_empty(cluster)


def test_logprobs_stop_strings_and_usage_are_right_across_a_kill() -> None:
    prompt = make_prompt(300, seed=31)
    body = {"model": MODEL, "max_tokens": lasting(200), "ignore_eos": True, "logprobs": 2}
    with reattaching("reattach-logprobs") as cluster:
        calm = complete(cluster, prompt.token_ids, **body)
        stop = calm["choices"][0]["text"][-6:]
        expected = complete(cluster, prompt.token_ids, **body, stop=[stop])
        stream = Stream(cluster.url, prompt.token_ids, lasting(200))
        result: dict[str, Any] = {}
        stream._read = lambda: result.update(  # type: ignore[method-assign]
            complete(cluster, prompt.token_ids, **body, stop=[stop])
        )
        stream.start()
        wait_until(lambda: audits(cluster)["decode-0"]["journal_live"] > 0, 30.0, "the first token")
        time.sleep(0.3)
        kill(cluster, "decode-0")
        stream.join(STREAM_TIMEOUT_S)
        assert result["usage"] == expected["usage"]
        assert result["choices"] == expected["choices"]
        assert_settles_empty(cluster)


def test_without_its_keeper_a_killed_node_loses_time_and_no_stream() -> None:
    with reattaching("reattach-keeper") as cluster:
        expected = answers(cluster)
        streams = started(cluster)
        before = prefilled(cluster)
        node = ray.get(cluster.nodes["decode-0"].info.remote(), timeout=10.0)["pid"]
        for pid in (*keepers_of(keeper_path(cluster.run_id, "decode-0")), node):
            os.kill(pid, signal.SIGKILL)  # at once: the node would have another keeper soon
        assert_all_are(streams, expected)
        assert prefilled(cluster) > before
        assert audits(cluster)["decode-0"]["reattached_requests"] == 0
        assert_settles_empty(cluster)


def test_a_keeper_that_took_the_place_of_another_keeps_every_stream() -> None:
    """A prefill node on the same machine had the memory of the first one, and gives it back."""
    with reattaching("reattach-replaced") as cluster:
        expected = answers(cluster)
        streams = started(cluster)
        before = prefilled(cluster)
        (first,) = keepers_of(keeper_path(cluster.run_id, "decode-0"))
        os.kill(first, signal.SIGKILL)
        wait_until(
            lambda: audits_or_none(cluster).get("keeper_restarts", 0) == 1, 20.0, "another keeper"
        )
        kill(cluster, "decode-0")
        assert_all_are(streams, expected)
        assert prefilled(cluster) == before
        wait_until(
            lambda: audits_or_none(cluster).get("pages_kept_from_guests", 1) == 0,
            20.0,
            "the guest's word",
        )
        assert audits(cluster)["decode-0"]["reattached_requests"] > 0
        assert_settles_empty(cluster)


def test_memory_that_was_found_wrong_is_not_gone_on_from() -> None:
    with reattaching("reattach-spoiled") as cluster:
        expected = answers(cluster)
        streams = started(cluster)
        link = KeeperLink(keeper_path(cluster.run_id, "decode-0"))
        link.borrow().spoil()
        link.give_back()
        link.close()
        kill(cluster, "decode-0")
        assert_all_are(streams, expected)
        stats = audits(cluster)["decode-0"]
        assert stats["reattached_requests"] == 0
        assert_settles_empty(cluster)
