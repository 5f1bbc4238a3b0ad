"""DeepSeek-V3.2's conversation format against hand-written prompts of its published rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.common.errors import RequestError
from tidepool.model.chat import normalize_messages
from tidepool.model.chat_deepseek_v32 import encode_conversation

BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
DSML = "\uff5cDSML\uff5c"

SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: object) -> dict:
    return {"role": "assistant", "content": content, **fields}


def call(arguments: str, name: str = "weather") -> dict:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def encode(*messages: dict, **options: object) -> str:
    return encode_conversation(normalize_messages(list(messages)), **options)


def test_one_turn_in_both_modes():
    assert encode(SYSTEM, user("Hi")) == f"{BOS}Be brief.{USER}Hi{ASSISTANT}</think>"
    assert encode(user("Hi"), is_thinking=True) == f"{BOS}{USER}Hi{ASSISTANT}<think>"


def test_old_reasoning_is_dropped_and_only_the_last_turn_thinks():
    turns = [user("A"), assistant("B", reasoning_content="because"), user("C")]
    expected = f"{BOS}{USER}A{ASSISTANT}</think>B{EOS}{USER}C{ASSISTANT}"
    assert encode(*turns, is_thinking=True) == expected + "<think>"
    assert encode(*turns) == expected + "</think>"


def test_tool_calls_are_dsml_and_results_close_with_the_last_one():
    calls = [call('{"city": "Oslo", "days": 2}'), call('{"at": ["x", {"y": null}]}')]
    turns = [
        user("?"),
        assistant("", reasoning_content="look", tool_calls=calls),
        {"role": "tool", "content": "cold"},
        {"role": "tool", "content": "warm"},
    ]
    body = (
        f"\n\n<{DSML}function_calls>\n"
        f'<{DSML}invoke name="weather">\n'
        f'<{DSML}parameter name="city" string="true">Oslo</{DSML}parameter>\n'
        f'<{DSML}parameter name="days" string="false">2</{DSML}parameter>\n'
        f"</{DSML}invoke>\n"
        f'<{DSML}invoke name="weather">\n'
        f'<{DSML}parameter name="at" string="false">["x", {{"y": null}}]</{DSML}parameter>\n'
        f"</{DSML}invoke>\n"
        f"</{DSML}function_calls>{EOS}"
        "\n\n<function_results>\n<result>cold</result>\n<result>warm</result>\n"
        "</function_results>\n\n"
    )
    assert encode(*turns) == f"{BOS}{USER}?{ASSISTANT}</think>{body}</think>"
    thinking = f"{BOS}{USER}?{ASSISTANT}<think>look</think>{body}<think>"
    assert encode(*turns, is_thinking=True) == thinking


def test_results_before_a_newer_turn_do_not_think():
    turns = [
        user("?"),
        assistant("", tool_calls=[call("{}")]),
        {"role": "tool", "content": "cold"},
        assistant("It is cold."),
        user("Thanks"),
    ]
    text = encode(*turns, is_thinking=True)
    assert "</function_results>\n\n</think>It is cold." in text
    assert text.count("<think>") == 1
    assert text.endswith(f"{USER}Thanks{ASSISTANT}<think>")


def test_tools_stand_behind_the_system_text_or_alone():
    with_system = encode(SYSTEM, user("Hi"), tools=[WEATHER, WEATHER])
    alone = encode(user("Hi"), tools=[WEATHER])
    assert with_system.startswith(f"{BOS}Be brief.\n\n## Tools\nYou have access")
    assert alone.startswith(f"{BOS}\n\n## Tools\nYou have access")
    schema = '{"name": "weather", "parameters": {"type": "object", "properties": {}}}'
    assert f"<functions>\n{schema}\n{schema}\n</functions>\n{USER}Hi" in with_system
    assert f'<{DSML}invoke name="$FUNCTION_NAME">' in alone
    assert "DSML_" not in alone


def test_a_response_format_is_a_schema_to_adhere_to():
    lead = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}
    text = encode(SYSTEM, user("Hi"), response_format=schema)
    assert text.startswith(f'{BOS}Be brief.{lead}{{"type": "array"}}{USER}')
    text = encode(user("Hi"), response_format={"type": "json_object"})
    assert text.startswith(f'{BOS}{lead}{{"type": "object"}}{USER}')
    assert encode(user("Hi"), response_format={"type": "text"}) == encode(user("Hi"))


def test_a_developer_turn_names_the_users_message():
    text = encode({"role": "developer", "content": "Do it"})
    assert text == f"{BOS}{USER}\n\n# The user's message is: Do it{ASSISTANT}</think>"


def test_other_scripts_stand_unescaped():
    tool = {"function": {"name": "w", "description": "\u4f60"}}
    assert '"description": "\u4f60"' in encode(user("\u4f60"), tools=[tool])


@pytest.mark.parametrize(
    "messages",
    [
        [SYSTEM],
        [user("a"), assistant("b")],
        [user("a"), {"role": "critic", "content": "b"}, user("c")],
        [{"role": "tool", "content": "x"}],
        [user("a"), {"role": "tool", "content": "x"}],
        [
            user("a"),
            assistant("", tool_calls=[call("{}")]),
            *[{"role": "tool", "content": "x"}] * 2,
        ],
        [user("a"), assistant("", tool_calls=[call("{}")] * 2), {"role": "tool", "content": "x"}],
    ],
)
def test_conversations_without_a_place_in_the_format_are_a_400(messages):
    with pytest.raises(RequestError) as caught:
        encode(*messages)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "options",
    [
        {"tools": {"x": 1}},
        {"tools": ["x"]},
        {"tools": [{"function": "x"}]},
        {"response_format": ["text"]},
        {"response_format": {"type": "grammar"}},
        {"response_format": {"type": "json_schema"}},
    ],
)
def test_malformed_tools_and_response_formats_are_a_400(options):
    with pytest.raises(RequestError):
        encode(user("a"), **options)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "x"])},
        optional={
            "content": st.text(max_size=5) | JSON_VALUES,
            "reasoning_content": JSON_VALUES,
            "tool_calls": JSON_VALUES
            | st.lists(
                st.fixed_dictionaries(
                    {
                        "function": st.fixed_dictionaries(
                            {"name": st.text(), "arguments": JSON_VALUES}
                        )
                    }
                )
            ),
        },
    ),
    max_size=5,
)


@given(messages=MESSAGES | JSON_VALUES, tools=JSON_VALUES, form=JSON_VALUES, think=st.booleans())
@settings(max_examples=300, deadline=None)
def test_hostile_conversations_are_refused_or_encoded(messages, tools, form, think):
    try:
        text = encode_conversation(
            normalize_messages(messages), tools=tools, response_format=form, is_thinking=think
        )
        assert text.startswith(BOS)
    except RequestError as error:
        assert error.status == 400
