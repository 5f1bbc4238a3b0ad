"""Clients: streamed completions in threads, with the times at which their tokens came."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from multinode.ray_cluster import RayCluster
from tidepool.deploy.demo.data import make_prompt

MODEL = "tidepool-demo"
STREAM_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and how many tokens are asked for, greedily."""

    prompt: tuple[int, ...]
    max_tokens: int

    def body(self, *, stream: bool) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": stream,
        }


def question(num_tokens: int, seed: int, max_tokens: int) -> Question:
    return Question(tuple(make_prompt(num_tokens, seed=seed).token_ids), max_tokens)


class Stream(threading.Thread):
    """One streamed completion. Ends by itself, or by `close` at the next token.

    Attributes:
        tokens: output token ids so far.
        times_s: when each piece of output came (monotonic clock); the first entry is the request.
        error: the typed error it ended with, or what HTTP said.
    """

    def __init__(self, cluster: RayCluster, asked: Question) -> None:
        super().__init__(daemon=True)
        self.question = asked
        self.tokens: list[int] = []
        self.times_s: list[float] = []
        self.error: dict[str, Any] | None = None
        self.has_begun = threading.Event()
        self._cluster = cluster
        self._is_closed = threading.Event()

    def close(self) -> None:
        """The client goes away."""
        self._is_closed.set()

    @property
    def is_complete(self) -> bool:
        return len(self.tokens) == self.question.max_tokens

    @property
    def ttft_s(self) -> float:
        """From the request to its first token."""
        return self.times_s[1] - self.times_s[0]

    def longest_gap_s(self, since_s: float = 0.0) -> float:
        """The longest silence that ended after `since_s`."""
        gaps = zip(self.times_s, self.times_s[1:], strict=False)
        return max((end - begin for begin, end in gaps if end >= since_s), default=0.0)

    def run(self) -> None:
        with self._cluster.network.client_side():
            try:
                self._read()
            except httpx.HTTPError as error:
                self.error = {"code": "connection", "message": repr(error)}

    def _read(self) -> None:
        self.times_s.append(time.monotonic())
        request = ("POST", f"{self._cluster.url}/v1/completions")
        body = self.question.body(stream=True)
        with httpx.stream(*request, json=body, timeout=STREAM_TIMEOUT_S) as response:
            if response.status_code != httpx.codes.OK:
                self.error = dict(json.loads(response.read())["error"])
                return
            for line in response.iter_lines():
                if self._is_closed.is_set():
                    return
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = dict(event["error"])
            return
        fresh = event["choices"][0]["token_ids"] or []
        if fresh:
            self.tokens += fresh
            self.times_s.append(time.monotonic())
            self.has_begun.set()


class Answers:
    """The right tokens of questions, asked once while nothing is broken."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._known: dict[Question, list[int]] = {}

    def of(self, asked: Question) -> list[int]:
        if asked not in self._known:
            with self._cluster.network.client_side():
                answer = httpx.post(
                    f"{self._cluster.url}/v1/completions",
                    json=asked.body(stream=False),
                    timeout=STREAM_TIMEOUT_S,
                )
            assert answer.status_code == httpx.codes.OK, answer.text
            self._known[asked] = list(answer.json()["choices"][0]["token_ids"])
        return self._known[asked]


def start_streams(cluster: RayCluster, questions: Sequence[Question]) -> list[Stream]:
    """Starts a stream for each question."""
    streams = [Stream(cluster, asked) for asked in questions]
    for stream in streams:
        stream.start()
    return streams


def wait_for_tokens(streams: Sequence[Stream], timeout_s: float = 60.0) -> None:
    """Until every stream has its first token."""
    deadline_s = time.monotonic() + timeout_s
    for stream in streams:
        is_begun = stream.has_begun.wait(max(0.0, deadline_s - time.monotonic()))
        assert is_begun, f"no token in {timeout_s} s: {stream.error}"


def join(streams: Sequence[Stream], timeout_s: float = 120.0) -> None:
    """Until every stream has ended; AssertionError if one hangs."""
    deadline_s = time.monotonic() + timeout_s
    for stream in streams:
        stream.join(max(0.0, deadline_s - time.monotonic()))
        assert not stream.is_alive(), f"a stream hangs after {len(stream.tokens)} tokens"


def check(streams: Sequence[Stream], answers: Answers) -> int:
    """Every stream has only right tokens, and all of them or a typed error; returns how many failed."""
    num_failed = 0
    for stream in streams:
        expected = answers.of(stream.question)
        got = stream.tokens
        first_wrong = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None
        )
        assert first_wrong is None, f"token {first_wrong} of {len(got)} is wrong"
        if stream.is_complete:
            assert stream.error is None
        else:
            assert stream.error is not None, f"ended silently after {len(got)} tokens"
            assert stream.error.get("code"), stream.error
            num_failed += 1
    return num_failed
