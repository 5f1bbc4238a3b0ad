"""A streamed completion in a thread, for tests over a real cluster."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

STREAM_TIMEOUT_S = 120.0


class Stream(threading.Thread):
    """One greedy streamed completion: its token ids and its end.

    Attributes:
        error: the typed error it ended with.
        failure: what broke its connection.
        started: set with its first token.
    """

    def __init__(self, url: str, prompt: list[int], max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._url = f"{url}/v1/completions"
        self._body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        self.max_tokens = max_tokens
        self.tokens: list[int] = []
        self.error: dict[str, Any] | None = None
        self.failure: Exception | None = None
        self.started = threading.Event()

    def run(self) -> None:
        try:
            self._read()
        except httpx.HTTPError as error:
            self.failure = error

    def _read(self) -> None:
        timeout_s = STREAM_TIMEOUT_S
        with httpx.stream("POST", self._url, json=self._body, timeout=timeout_s) as response:
            if response.status_code != httpx.codes.OK:
                self.error = dict(json.loads(response.read())["error"])
                return
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.error = event["error"]
                    return
                self.tokens += event["choices"][0]["token_ids"] or []
                self.started.set()
