"""Stands in for the tokenizer of a checkpoint that has none: token ids go in and come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ...common.errors import RequestError


class NoTokenizer:
    """Refuses text (400) and turns every output into empty text. It is its own decoder."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def encode(self, text: str) -> list[int]:
        self._refuse("prompt")

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> list[int]:
        self._refuse("messages")

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""

    def decoder(self) -> NoTokenizer:
        return self

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def _refuse(self, param: str) -> NoReturn:
        raise RequestError(
            f"text is not possible: {self._reason}; send token ids to /v1/completions",
            code="no_tokenizer",
            param=param,
        )
