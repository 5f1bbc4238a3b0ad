"""Conversations: checked and put into one form, and rendered by a checkpoint's Jinja template.

The template comes with the checkpoint and is not trusted: it runs in Jinja's immutable sandbox and
sees plain data only. What a client sends is data to it, never source. Whatever goes wrong inside is
the request's fault: RequestError 400.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..common.errors import CheckpointError, RequestError

Conversation = list[dict[str, Any]]

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "chat_template", "tokenize"})


def normalize_messages(messages: Any) -> Conversation:
    """Copies messages into the form templates expect; RequestError names the one that is wrong.

    Text parts become one string; tool-call arguments, JSON text in OpenAI's form, become objects
    (GLM's template walks through them).
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a non-empty list", param="messages")
    return [_normalize(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalize(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be an object with a role", param=where)
    message = dict(message)
    if "content" in message:
        message["content"] = _text(message["content"], f"{where}.content")
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise RequestError(f"{where}.tool_calls must be a list", param=where)
        message["tool_calls"] = [
            _normalize_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    return message


def _text(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [
        part["text"] if part.get("type") == "text" else None
        for part in parts
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    ]
    if len(texts) != len(parts) or None in texts:
        raise RequestError(f"{where} must be text or a list of text parts", param=where)
    return "".join(text for text in texts if text is not None)


def _normalize_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} must hold a function with a name", param=where)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"{where}.function.arguments is not JSON: {error}", param=where
            ) from error
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.function.arguments must be a JSON object", param=where)
    return {**call, "function": {**function, "arguments": arguments}}


class ChatTemplate:
    """A compiled template, and the one to use with tools where the checkpoint has two."""

    def __init__(
        self, source: str, tools_source: str | None, special_tokens: Mapping[str, Any]
    ) -> None:
        environment = _environment()
        try:
            self._default = environment.from_string(source)
            self._with_tools = environment.from_string(tools_source) if tools_source else None
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._special_tokens = {
            name: token for name, token in special_tokens.items() if isinstance(token, str)
        }

    def render(
        self, messages: Conversation, tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any]
    ) -> str:
        """Prompt text up to the generation prompt; `kwargs` are the client's template arguments."""
        reserved = sorted(_RESERVED & kwargs.keys())
        if reserved:
            raise RequestError(
                f"chat_template_kwargs must not set {', '.join(reserved)}",
                param="chat_template_kwargs",
            )
        template = (self._with_tools if tools else None) or self._default
        values = {
            **self._special_tokens,
            **kwargs,
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": True,
        }
        try:
            return template.render(values)
        except Exception as error:  # foreign code over client data may raise anything
            raise RequestError(
                f"the model's chat template refuses this conversation: {error}",
                code="chat_template_error",
                param="messages",
            ) from error


class _Generation(jinja2.ext.Extension):
    """The `generation` block by which templates mark training targets; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own protocol

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment templates on the hub are written for (transformers 5)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own tojson escapes HTML, which no prompt wants."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
