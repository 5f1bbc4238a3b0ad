"""Bodies of answers in OpenAI's shape; serialised with `exclude_unset`, so nulls are set on purpose.

Built by completions.py and chat.py. `token_ids` and `prompt_token_ids` are vLLM's additions.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ...common.errors import RequestError

FinishReason = Literal["stop", "length"]


class _Answer(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="null")


class Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(_Answer):
    """Answer of /v1/completions, whole or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    content: list[ChatLogprob]
    refusal: None


class ChatMessage(_Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


class ChatCompletion(_Answer):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ChatDelta(_Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatCompletionChunk(_Answer):
    """One chunk of a streamed /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class ErrorDetail(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """Every answer that is not a success."""

    error: ErrorDetail


_TYPES = {404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: RequestError) -> dict[str, Any]:
    """Returns {"error": {...}} in OpenAI's shape."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    detail = ErrorDetail(
        message=str(error),
        type=_TYPES.get(error.status, kind),
        param=error.param,
        code=error.code,
    )
    return ErrorBody(error=detail).model_dump()
