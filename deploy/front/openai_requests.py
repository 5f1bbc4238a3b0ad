"""Bodies of requests in OpenAI's shape, with the additions that vLLM has, and their checks.

`parse` is called by the app, on a worker thread for large bodies. Known fields of a wrong type or
value are errors that name the field; values we cannot honour are refused, never ignored; unknown
fields are ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ...common.errors import RequestError

MAX_PROMPTS = 128
MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 4096
DEFAULT_COMPLETION_TOKENS = 16

_ONLY = {
    "response_format": '{"type": "text"}',
    "tool_choice": '"none" or "auto"',
    "echo": "false",
    "suffix": "no suffix",
    "logit_bias": "an empty logit_bias",
    "presence_penalty": "0",
    "frequency_penalty": "0",
    "repetition_penalty": "1",
    "include_stop_str_in_output": "false",
}
"""Fields whose other values we cannot honour."""

Prompts = list[str] | list[list[int]]


def _fault(code: str, message: str) -> PydanticCustomError:
    return PydanticCustomError(code, message)  # type: ignore[arg-type]


def _normal_prompts(value: object) -> Prompts:
    """Text, texts, token ids or lists of token ids; by hand, so that a bad item costs one error."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise _fault("prompt", "must be a text, a list of texts, token ids or lists of token ids")
    if all(type(item) is int for item in value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise _fault("prompt", f"at most {MAX_PROMPTS} prompts a request, not {len(value)}")
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and all(type(i) is int for i in item) for item in value):
        return value
    raise _fault("prompt", "must be a text, a list of texts, token ids or lists of token ids")


def _normal_stop(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise _fault("stop", f"must be a text or a list of at most {MAX_STOPS} texts")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise _fault("stop", f"a stop text has 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


_TOKEN_IDS_SCHEMA: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        {**_TOKEN_IDS_SCHEMA, "minItems": 1},
        {"type": "array", "items": _TOKEN_IDS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
_STOP_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOP_SCHEMA: dict[str, Any] = {
    "anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": MAX_STOPS}]
}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    include_usage: bool | None = None


class SamplingBody(_Body):
    """What completions and chat share."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[list[str], BeforeValidator(_normal_stop), WithJsonSchema(_STOP_SCHEMA)] = []
    stop_token_ids: list[int] | None = Field(
        None, max_length=MAX_STOP_TOKEN_IDS, json_schema_extra={"items": {"minimum": 0}}
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=2**31)
    return_token_ids: bool | None = None
    user: str | None = None
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    repetition_penalty: float | None = Field(None, ge=1, le=1)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    include_stop_str_in_output: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _fault("stream_options", "stream_options needs stream = true")
        return self


class CompletionBody(SamplingBody):
    """Body of POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_normal_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise _fault("best_of", "best_of is supported only if it equals n")
        return self


class Message(BaseModel):
    """One message; further fields reach the chat template."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise _fault("content", f"a message of role {self.role} needs content")
        for part in self.content if isinstance(self.content, list) else ():
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise _fault("content", "only text parts are supported: {type: text, text: ...}")
        return self

    def for_template(self) -> dict[str, Any]:
        """As a chat template takes it: content as one text."""
        message = self.model_dump()
        if isinstance(self.content, list):
            message["content"] = "\n".join(part["text"] for part in self.content)
        return message


class ResponseFormat(_Body):
    type: Literal["text"]


class ChatBody(SamplingBody):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = Field(None, max_length=512, fail_fast=True)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _fault("top_logprobs", "top_logprobs needs logprobs = true")
        return self

    @property
    def active_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools


BodyT = TypeVar("BodyT", bound=SamplingBody)


def parse(body: bytes, shape: type[BodyT]) -> BodyT:
    """Reads a JSON body; raises RequestError (400) that names the first bad field."""
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not usable JSON: {error}", code="invalid_json") from error


def _request_error(error: ValidationError) -> RequestError:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    first = faults[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"]) or _param_of(first["type"])
    known = param.partition(".")[0] if param else "the body"
    message = f"{param or 'the body'}: {first['msg']}"
    if known in _ONLY:
        message = f"{param}: only {_ONLY[known]} is supported"
    if first["type"] == "missing":
        message = f"{param}: this field is required"
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return RequestError(message[:500], code=code, param=param and (param[:100] or known))


def _param_of(fault_type: str) -> str | None:
    """Checks over several fields name the field by their type."""
    return fault_type if fault_type in ("stream_options", "best_of", "top_logprobs") else None


def schema_components() -> dict[str, Any]:
    """JSON schemas of the bodies, for the OpenAPI document."""
    components: dict[str, Any] = {}
    for shape in (CompletionBody, ChatBody):
        schema = shape.model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(schema.pop("$defs", {}))
        components[shape.__name__] = schema
    json.dumps(components)
    return components
