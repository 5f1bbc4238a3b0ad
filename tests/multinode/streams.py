"""Clients: streamed completions in threads, with the times at which their tokens came."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from multinode.ray_cluster import RayCluster
from tidepool.deploy.demo.data import make_prompt

MODEL = "tidepool-demo"
STREAM_TIMEOUT_S = 120.0
STOP_CHARACTERS = 6
LOGPROB_TOLERANCE = 0.01
MAX_FLIPS = 0.05
"""Other batches add in another order, and rows are stored in bf16: without any fault the values of
the same tokens differ by up to 2e-3 along 240 tokens, and by up to 0.07 at one of them, where two
positions tie at the edge of the top-k. A wrong row or position would show at every token."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and how many tokens are asked for, greedily. `stop`: a stop string."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop: str = ""

    def body(self, *, stream: bool) -> dict[str, Any]:
        return {
            "model": MODEL,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
            **({"stop": [self.stop]} if self.stop else {}),
            **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """All that a client is told of a request."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str | None
    usage: tuple[int, int]
    """Prompt and completion tokens."""


def question(num_tokens: int, seed: int, max_tokens: int) -> Question:
    return Question(tuple(make_prompt(num_tokens, seed=seed).token_ids), max_tokens)


def with_stop(asked: Question, answer: Answer) -> Question:
    """The same, ended by a stop string about two thirds through its answer."""
    text = answer.text
    begins = range(2 * len(text) // 3, len(text) - STOP_CHARACTERS)
    begin = next(i for i in begins if text.find(text[i : i + STOP_CHARACTERS]) == i)
    return replace(asked, stop=text[begin : begin + STOP_CHARACTERS])


class Stream(threading.Thread):
    """One streamed completion. Ends by itself, or by `close` at the next token.

    Attributes:
        tokens, logprobs, text: output so far.
        finish_reason, usage: set once it ended well.
        times_s: when each piece of output came (monotonic clock); the first entry is the request.
        error: the typed error it ended with, or what HTTP said.
    """

    def __init__(self, cluster: RayCluster, asked: Question) -> None:
        super().__init__(daemon=True)
        self.question = asked
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.usage = (0, 0)
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
        return self.finish_reason is not None

    @property
    def answer(self) -> Answer:
        """What has come so far."""
        logprobs = tuple(self.logprobs)
        return Answer(tuple(self.tokens), logprobs, self.text, self.finish_reason, self.usage)

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
        if event.get("usage"):
            self.usage = _usage(event)
        for choice in event["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason
            if choice["token_ids"]:
                self.tokens += choice["token_ids"]
                self.logprobs += choice["logprobs"]["token_logprobs"]
                self.times_s.append(time.monotonic())
                self.has_begun.set()


def _usage(body: dict[str, Any]) -> tuple[int, int]:
    return (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])


class Answers:
    """The right answers to questions, asked once while nothing is broken."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._known: dict[Question, Answer] = {}

    def of(self, asked: Question) -> Answer:
        if asked not in self._known:
            with self._cluster.network.client_side():
                url = f"{self._cluster.url}/v1/completions"
                body = asked.body(stream=False)
                response = httpx.post(url, json=body, timeout=STREAM_TIMEOUT_S)
            assert response.status_code == httpx.codes.OK, response.text
            self._known[asked] = _answer_of(response.json())
        return self._known[asked]


def _answer_of(body: dict[str, Any]) -> Answer:
    (choice,) = body["choices"]
    return Answer(
        tuple(choice["token_ids"]),
        tuple(choice["logprobs"]["token_logprobs"]),
        choice["text"],
        choice["finish_reason"],
        _usage(body),
    )


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
    """Every stream has only what is right, and all of it or a typed error; how many failed."""
    for stream in streams:
        expected, got = answers.of(stream.question), stream.answer
        count = len(got.tokens)
        assert got.tokens == expected.tokens[:count], f"a token of {count} is wrong"
        assert len(got.logprobs) == count
        pairs = zip(got.logprobs, expected.logprobs, strict=False)
        flips = [abs(a - b) for a, b in pairs if abs(a - b) > LOGPROB_TOLERANCE]
        assert len(flips) <= MAX_FLIPS * count, f"log-probabilities are off by {flips} of {count}"
        assert expected.text.startswith(got.text)
        if stream.is_complete:
            assert stream.error is None
            assert replace(got, logprobs=()) == replace(expected, logprobs=())
        else:
            assert stream.error is not None, f"ended silently after {count} tokens"
            assert stream.error.get("code"), stream.error
    return sum(not stream.is_complete for stream in streams)
