"""One output of an HTTP call, and the call as a whole: from tokens to text for the client.

A call has one choice for each (prompt, n). Runs on the asyncio loop; the service drives it, the
renderers (completions.py, chat.py) turn its deltas into OpenAI's shapes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from ...common import wire
from .request import EndReason, FrontRequest
from .text import OutputText


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What is new of one choice. `finish_reason` is set in its last delta only."""

    index: int
    text: str
    tokens: tuple[wire.OutputToken, ...]
    finish_reason: EndReason | None


@dataclass(slots=True)
class Choice:
    """One output.

    Attributes:
        tokens: what the client gets; ends with the token that completed a stop string.
        text: the same as text.
    """

    index: int
    request: FrontRequest
    text: OutputText
    tokens: list[wire.OutputToken] = field(default_factory=list)
    finish_reason: EndReason | None = None

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    @property
    def is_open(self) -> bool:
        return self.finish_reason is None

    def advance(self) -> ChoiceDelta | None:
        """Returns what has come since the last time, None if nothing.

        Raises the request's error behind the last of its tokens.
        A delta with a finish reason while the request still runs means that a stop string was
        found: the caller stops the request.
        """
        fresh, text = self._take_tokens()
        request = self.request
        if self.text.is_stopped:
            self.finish_reason = "stop"
        elif request.error is not None:
            if not fresh:
                raise request.error
        elif request.is_ended:
            text += self.text.finish()
            self.finish_reason = "stop" if self.text.is_stopped else request.finish_reason
        elif not fresh:
            return None
        return ChoiceDelta(self.index, text, fresh, self.finish_reason)

    def _take_tokens(self) -> tuple[tuple[wire.OutputToken, ...], str]:
        start = len(self.tokens)
        pieces = []
        for token in self.request.tokens[start:]:
            self.tokens.append(token)
            pieces.append(self.text.push(token.token_id))
            if self.text.is_stopped:
                break
        return tuple(self.tokens[start:]), "".join(pieces)


@dataclass(slots=True)
class Call:
    """One HTTP call: its choices, and what of them the client wants to see.

    Attributes:
        prompts: the prompts, each once; choice i belongs to prompt i // n.
        num_top: log-probabilities wanted: -1 none, 0 of the token itself, k also of the k best.
        changed: set whenever a request of the call has something new.
    """

    call_id: str
    created: int
    model: str
    prompts: list[tuple[int, ...]]
    choices: list[Choice]
    num_top: int
    is_stream: bool
    include_usage: bool
    return_token_ids: bool
    changed: asyncio.Event

    @property
    def open_choices(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.is_open]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)
