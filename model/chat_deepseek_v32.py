"""Writes a conversation as DeepSeek-V3.2 was trained to read it; its repository has no template.

Called by Tokenizer.render_text with normalised messages. The format (the fixed strings below are
part of it) is that of encoding/encoding_dsv32.py in the model's repository; the code is ours.

   <bos> system [tools] [response format]
   <User> text <Assistant> then <think>, or </think> where no thinking is to follow
   [reasoning </think>] text [tool calls] <eos>        (reasoning: behind the last user turn only)
   <function_results> one <result> a tool call </function_results> then <think> or </think>
"""

from __future__ import annotations

import json
from typing import Any

from ..common.errors import RequestError
from .chat import Conversation

_BAR = "\uff5c"
_SPACE = "\u2581"
BOS = f"<{_BAR}begin{_SPACE}of{_SPACE}sentence{_BAR}>"
EOS = f"<{_BAR}end{_SPACE}of{_SPACE}sentence{_BAR}>"
USER = f"<{_BAR}User{_BAR}>"
ASSISTANT = f"<{_BAR}Assistant{_BAR}>"
DSML = f"{_BAR}DSML{_BAR}"
THINK = "<think>"
END_THINK = "</think>"

_TOOLS_TEXT = """## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<DSML_function_calls>" block like the following as part of \
your reply to the user:
<DSML_function_calls>
<DSML_invoke name="$FUNCTION_NAME">
<DSML_parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</DSML_parameter>
...
</DSML_invoke>
<DSML_invoke name="$FUNCTION_NAME2">
...
</DSML_invoke>
</DSML_function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:
<DSML_function_calls>
...
</DSML_function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
""".replace("DSML_", DSML)

_TURN_ROLES = ("user", "developer")


def encode_conversation(
    messages: Conversation,
    *,
    tools: list[dict[str, Any]] | None = None,
    response_format: dict[str, Any] | None = None,
    is_thinking: bool = False,
) -> str:
    """Prompt text. RequestError 400 where the format has no place for a message.

    Tools and response format go behind the first message if it is from the system, else behind an
    empty system message.
    """
    _check_end(messages)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    last_turn = max(
        (i for i, message in enumerate(messages) if message["role"] in _TURN_ROLES), default=-1
    )
    parts = [BOS, messages[0].get("content") or "", _extras(tools, response_format)]
    for index, message in enumerate(messages[1:], start=1):
        opens_thinking = is_thinking and index >= last_turn
        match message["role"]:
            case "system":
                parts.append(message.get("content") or "")
            case "user" | "developer":
                parts.append(_user(message, opens_thinking))
            case "assistant":
                parts.append(_assistant(message, is_thinking and index > last_turn))
            case "tool":
                parts.append(_result(messages, index, opens_thinking))
            case role:
                raise RequestError(f"unknown role {role!r:.40}", param=f"messages[{index}]")
    return "".join(parts)


def _check_end(messages: Conversation) -> None:
    """The answer begins behind a turn of the user or the results of tools, and nowhere else."""
    role = messages[-1]["role"]
    if role not in (*_TURN_ROLES, "tool"):
        raise RequestError(
            f"the last message must be from user or tool, not {role!r:.40}", param="messages"
        )


def _extras(tools: list[dict[str, Any]] | None, response_format: dict[str, Any] | None) -> str:
    text = ""
    if tools is not None and not isinstance(tools, list):
        raise RequestError("tools must be a list", param="tools")
    if tools:
        schemas = "\n".join(_to_json(_function(tool)) for tool in tools)
        text += f"\n\n{_TOOLS_TEXT}{schemas}\n</functions>\n"
    schema = _schema(response_format)
    if schema is not None:
        text += (
            "\n\n## Response Format:\n\n"
            f"You MUST strictly adhere to the following schema to reply:\n{_to_json(schema)}"
        )
    return text


def _function(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise RequestError("each tool must hold a function", param="tools")
    return function


def _schema(response_format: dict[str, Any] | None) -> Any:
    """JSON schema of OpenAI's response_format; None for plain text."""
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return schema
        case _:
            raise RequestError("response_format is not understood", param="response_format")


def _user(message: dict[str, Any], opens_thinking: bool) -> str:
    text = message.get("content") or ""
    if message["role"] == "developer":
        text = f"\n\n# The user's message is: {text}"
    return f"{USER}{text}{ASSISTANT}{THINK if opens_thinking else END_THINK}"


def _assistant(message: dict[str, Any], keeps_reasoning: bool) -> str:
    """Reasoning older than the last user turn is dropped."""
    reasoning = f"{message.get('reasoning_content') or ''}{END_THINK}" if keeps_reasoning else ""
    calls = message.get("tool_calls") or []
    return f"{reasoning}{message.get('content') or ''}{_calls(calls)}{EOS}"


def _calls(calls: list[dict[str, Any]]) -> str:
    if not calls:
        return ""
    invokes = "\n".join(_invoke(call["function"]) for call in calls)
    return f"\n\n<{DSML}function_calls>\n{invokes}\n</{DSML}function_calls>"


def _invoke(function: dict[str, Any]) -> str:
    """Strings stand as they are, everything else as JSON; the attribute says which."""
    parameters = "\n".join(
        f'<{DSML}parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _to_json(value)}</{DSML}parameter>"
        for name, value in function["arguments"].items()
    )
    return f'<{DSML}invoke name="{function["name"]}">\n{parameters}\n</{DSML}invoke>'


def _result(messages: Conversation, index: int, opens_thinking: bool) -> str:
    """One tool result; the first of a block opens it, the one for the last call closes it."""
    caller = index - 1
    while caller >= 0 and messages[caller]["role"] == "tool":
        caller -= 1
    calls = messages[caller].get("tool_calls") or [] if caller >= 0 else []
    order = index - caller
    is_last = index + 1 == len(messages) or messages[index + 1]["role"] != "tool"
    if order > len(calls) or (is_last and order != len(calls)):
        raise RequestError(
            f"{len(calls)} tool calls need as many results, not {order}", param=f"messages[{index}]"
        )
    text = f"\n<result>{messages[index].get('content') or ''}</result>"
    if order == 1:
        text = f"\n\n<function_results>{text}"
    if order == len(calls):
        text += f"\n</function_results>\n\n{THINK if opens_thinking else END_THINK}"
    return text


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
