"""What the service needs of a renderer, and what both renderers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel

from .choice import Call, ChoiceDelta
from .openai_responses import Usage


class Renderer(Protocol):
    """Turns a call's deltas into the bodies of one route."""

    call: Call

    def opening(self) -> Sequence[BaseModel]:
        """Chunks that begin a stream."""

    def chunk(self, delta: ChoiceDelta) -> BaseModel | None:
        """The chunk of a delta; None if it has nothing to show."""

    def usage_chunk(self) -> BaseModel:
        """The chunk behind the last one, with the usage alone."""

    def whole(self) -> BaseModel:
        """The answer that is not streamed; every choice has ended."""


def usage_of(call: Call) -> Usage:
    return Usage(
        prompt_tokens=call.num_prompt_tokens,
        completion_tokens=call.num_output_tokens,
        total_tokens=call.num_prompt_tokens + call.num_output_tokens,
    )


def is_worth_sending(call: Call, delta: ChoiceDelta) -> bool:
    """False if the delta's tokens gave no text yet and nobody asked for the tokens."""
    wants_tokens = call.return_token_ids or call.num_top >= 0
    return bool(delta.text or delta.finish_reason or (wants_tokens and delta.tokens))


def encode(body: BaseModel) -> bytes:
    return body.model_dump_json(exclude_unset=True).encode()
