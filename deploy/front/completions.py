"""Answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...common import wire
from .choice import Call, Choice, ChoiceDelta
from .logprobs import completion_logprobs
from .openai_responses import Completion, CompletionChoice, CompletionLogprobs
from .ports import Tokenizer
from .render import is_worth_sending, usage_of


class CompletionRenderer:
    """Renders one call; see render.Renderer."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self.call = call
        self._tokenizer = tokenizer
        self._offsets = [0] * len(call.choices)
        self._started: set[int] = set()

    def opening(self) -> list[Completion]:
        return []

    def chunk(self, delta: ChoiceDelta) -> Completion | None:
        if not is_worth_sending(self.call, delta):
            return None
        fields: dict[str, Any] = {}
        if self.call.return_token_ids:
            fields["token_ids"] = [token.token_id for token in delta.tokens]
            if delta.index not in self._started:
                fields["prompt_token_ids"] = self._prompt(delta.index)
        self._started.add(delta.index)
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=self._logprobs(delta.index, delta.tokens),
            finish_reason=delta.finish_reason,
            **fields,
        )
        return self._body([choice], usage=None) if self.call.include_usage else self._body([choice])

    def usage_chunk(self) -> Completion:
        return self._body([], usage=usage_of(self.call))

    def whole(self) -> Completion:
        return self._body([self._whole(c) for c in self.call.choices], usage=usage_of(self.call))

    def _whole(self, choice: Choice) -> CompletionChoice:
        fields: dict[str, Any] = {}
        if self.call.return_token_ids:
            fields["token_ids"] = [token.token_id for token in choice.tokens]
            fields["prompt_token_ids"] = self._prompt(choice.index)
        return CompletionChoice(
            index=choice.index,
            text=choice.text.text,
            logprobs=self._logprobs(choice.index, choice.tokens),
            finish_reason=choice.finish_reason,
            **fields,
        )

    def _prompt(self, index: int) -> list[int]:
        return list(self.call.choices[index].prompt_token_ids)

    def _logprobs(
        self, index: int, tokens: Sequence[wire.OutputToken]
    ) -> CompletionLogprobs | None:
        if self.call.num_top < 0:
            return None
        found = completion_logprobs(
            tokens, self.call.num_top, self._tokenizer, self._offsets[index]
        )
        self._offsets[index] += sum(len(text) for text in found.tokens)
        return found

    def _body(self, choices: list[CompletionChoice], **fields: Any) -> Completion:
        call = self.call
        return Completion(
            id=call.call_id,
            object="text_completion",
            created=call.created,
            model=call.model,
            choices=choices,
            **fields,
        )
