"""What runs while a fault is injected: streams that decode, and prompts on their way.

traffic = Traffic(cluster, answers)
traffic.begin()
... inject ...
outcome = traffic.end(since_s=...)
"""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from multinode.hosts import wait_for
from multinode.ray_cluster import RayCluster
from multinode.streams import (
    Answers,
    Stream,
    check,
    join,
    question,
    start_streams,
    wait_for_tokens,
    with_stop,
)

NUM_PROMPTS = 4
OUTPUT_TOKENS = 240
LONG_PROMPT = 1200
LONG_OUTPUT = 4
MAX_STAY_S = 3.0
"""Longer than most requests of clients that leave take, shorter than some."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What clients saw, seconds.

    Attributes:
        gaps_s: for each stream that the injection hit, the longest silence that ended after it.
        went_on_s: for each stream, how long after the injection its last token came; 0: it had ended.
        ttfts_s: of the prompts on their way.
        num_failed: requests that ended with a typed error.
    """

    gaps_s: tuple[float, ...]
    went_on_s: tuple[float, ...]
    ttfts_s: tuple[float, ...]
    num_failed: int


class Traffic:
    """See the module. Everything is greedy, so every token is known (`answers`)."""

    def __init__(
        self,
        cluster: RayCluster,
        answers: Answers,
        *,
        num_streams: int = 8,
        num_prompts: int = 2,
        prompt_tokens: int = 300,
        output_tokens: int = OUTPUT_TOKENS,
    ) -> None:
        self._cluster = cluster
        self._answers = answers
        lengths = [prompt_tokens * (3 + i) // 3 for i in range(NUM_PROMPTS)]
        short = [question(length, 50, output_tokens) for length in lengths]
        short[-1] = with_stop(short[-1], answers.of(short[-1]))
        self._questions = [short[i % NUM_PROMPTS] for i in range(num_streams)]
        self._long = [question(LONG_PROMPT, 90 + i, LONG_OUTPUT) for i in range(num_prompts)]
        self._decoding: list[Stream] = []
        self._prefilling: list[Stream] = []
        for asked in (*short, *self._long):
            answers.of(asked)

    def begin(self, head_start_s: float = 0.3) -> None:
        """All streams have tokens; the prompts were sent `head_start_s` ago."""
        self._decoding = start_streams(self._cluster, self._questions)
        wait_for_tokens(self._decoding)
        self._prefilling = start_streams(self._cluster, self._long)
        time.sleep(head_start_s)

    def end(self, since_s: float) -> Outcome:
        """Waits for the end of all; AssertionError if one hangs or has anything wrong (`check`)."""
        streams = [*self._decoding, *self._prefilling]
        join(streams)
        num_failed = check(streams, self._answers)
        went_on_s = [max(0.0, max(each.times_s, default=0.0) - since_s) for each in self._decoding]
        return Outcome(
            tuple(
                stream.longest_gap_s(since_s)
                for stream, went_on in zip(self._decoding, went_on_s, strict=True)
                if went_on > 0 or stream.error is not None
            ),
            tuple(went_on_s),
            tuple(each.ttft_s for each in self._prefilling if len(each.times_s) > 1),
            num_failed,
        )

    @property
    def errors(self) -> list[str]:
        """What failed requests were told."""
        streams = (*self._decoding, *self._prefilling)
        return [str(stream.error) for stream in streams if stream.error is not None]


def come_and_go(cluster: RayCluster, rng: random.Random, count: int) -> None:
    """`count` clients at once, each of which hangs up at a random moment: inside its body, in the
    queue, in prefill, in the hand-off, between tokens; by a reset or by a close."""
    leaving: list[tuple[float, socket.socket]] = []
    with cluster.network.client_side():
        for _ in range(count):
            client = socket.create_connection(cluster.front_address, timeout=10.0)
            request = _request(rng)
            client.sendall(request[: len(request) // 2] if rng.random() < 0.1 else request)
            if rng.random() < 0.5:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaving.append((time.monotonic() + rng.uniform(0.0, MAX_STAY_S), client))
        for due_s, client in sorted(leaving, key=lambda each: each[0]):
            time.sleep(max(0.0, due_s - time.monotonic()))
            client.close()


def _request(rng: random.Random) -> bytes:
    """A completion of 150 to 900 prompt tokens and 60 output tokens, streamed or not."""
    asked = question(rng.choice((150, 400, 900)), rng.randrange(8), 60)
    body = json.dumps(asked.body(stream=rng.random() < 0.5)).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: front\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def assert_nothing_grows(cluster: RayCluster, act: Callable[[], None], tries: int = 3) -> str:
    """Sockets and threads of every process are no more after `act` than before it.

    What grows once (a pool, a first meeting of two nodes) does not grow again, a leak does: only
    growth in each of `tries` runs is an error. Returns both counts of the last run.
    """
    for number in range(tries):
        before = cluster.census()
        act()
        cluster.assert_settles()
        try:
            wait_for(lambda b=before: _is_within(cluster.census(), b), 20.0, "sockets and threads")
        except AssertionError as error:
            after = cluster.census()
            if number == tries - 1:
                raise AssertionError(f"(sockets, threads) were {before}, are {after}") from error
        else:
            return f"(sockets, threads) before {before}, after {cluster.census()}"
    raise AssertionError("no try was made")


Census = dict[str, tuple[int, int]]


def _is_within(now: Census, before: Census) -> bool:
    return all(
        each <= old for name in before for each, old in zip(now[name], before[name], strict=True)
    )
