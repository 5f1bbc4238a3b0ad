"""Answers of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...common import wire
from .choice import Call, Choice, ChoiceDelta
from .logprobs import chat_logprobs
from .openai_responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
)
from .ports import Tokenizer
from .render import is_worth_sending, usage_of


class ChatRenderer:
    """Renders one call; see render.Renderer."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self.call = call
        self._tokenizer = tokenizer

    def opening(self) -> list[ChatCompletionChunk]:
        chunks = []
        for choice in self.call.choices:
            first = ChatChunkChoice(
                index=choice.index,
                delta=ChatDelta(role="assistant", content=""),
                logprobs=None,
                finish_reason=None,
            )
            chunks.append(self._chunk([first], **self._prompt_ids()))
        return chunks

    def chunk(self, delta: ChoiceDelta) -> ChatCompletionChunk | None:
        if not is_worth_sending(self.call, delta):
            return None
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(content=delta.text) if delta.text else ChatDelta(),
            logprobs=self._logprobs(delta.tokens) if delta.tokens else None,
            finish_reason=delta.finish_reason,
            **self._token_ids(delta.tokens),
        )
        return self._chunk([choice])

    def usage_chunk(self) -> ChatCompletionChunk:
        return self._chunk([], usage=usage_of(self.call))

    def whole(self) -> ChatCompletion:
        call = self.call
        return ChatCompletion(
            id=call.call_id,
            object="chat.completion",
            created=call.created,
            model=call.model,
            choices=[self._whole(choice) for choice in call.choices],
            usage=usage_of(call),
            **self._prompt_ids(),
        )

    def _whole(self, choice: Choice) -> ChatChoice:
        return ChatChoice(
            index=choice.index,
            message=ChatMessage(role="assistant", content=choice.text.text, refusal=None),
            logprobs=self._logprobs(choice.tokens),
            finish_reason=choice.finish_reason or "stop",
            **self._token_ids(choice.tokens),
        )

    def _prompt_ids(self) -> dict[str, Any]:
        call = self.call
        return {"prompt_token_ids": list(call.prompts[0])} if call.return_token_ids else {}

    def _token_ids(self, tokens: Sequence[wire.OutputToken]) -> dict[str, Any]:
        if not self.call.return_token_ids:
            return {}
        return {"token_ids": [token.token_id for token in tokens]}

    def _logprobs(self, tokens: Sequence[wire.OutputToken]) -> ChatLogprobs | None:
        if self.call.num_top < 0:
            return None
        return chat_logprobs(tokens, self.call.num_top, self._tokenizer)

    def _chunk(self, choices: list[ChatChunkChoice], **fields: Any) -> ChatCompletionChunk:
        call = self.call
        if call.include_usage:
            fields.setdefault("usage", None)
        return ChatCompletionChunk(
            id=call.call_id,
            object="chat.completion.chunk",
            created=call.created,
            model=call.model,
            choices=choices,
            **fields,
        )
