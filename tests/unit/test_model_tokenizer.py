"""Tokenizers and chat templates: offline, sandboxed, and every refusal a 400."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
from helpers.tiny_models import session_checkpoint
from helpers.tiny_tokenizer import SPECIALS, write_tokenizer

from tidepool.common.errors import CheckpointError, RequestError
from tidepool.model.tokenizer import Tokenizer, load_tokenizer

GLM = "GlmMoeDsaForCausalLM"
V32 = "DeepseekV32ForCausalLM"
TEMPLATE = """{{ bos_token }}
{%- for m in messages -%}
<|{{ m.role }}|>{{ m.content }}
{%- for call in m.tool_calls or [] -%}
{%- for k, v in call.function.arguments.items() -%}[{{ k }}={{ v | tojson }}]{%- endfor -%}
{%- endfor -%}
{%- endfor -%}
{%- if tools -%}tools={{ tools | length }}{%- endif -%}
{%- if add_generation_prompt -%}<|assistant|>{{ '' if enable_thinking else '</think>' }}{%- endif -%}
"""
USER = [{"role": "user", "content": "hi"}]


def tokenizer_with(tmp_path, template: str | None = TEMPLATE, architecture: str = GLM) -> Tokenizer:
    loaded = load_tokenizer(write_tokenizer(tmp_path / "t", chat_template=template), architecture)
    assert loaded.reason == ""
    return loaded.tokenizer


def refusal(tokenizer: Tokenizer, messages: object, **kwargs: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        tokenizer.render_chat(messages, **kwargs)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(("kind", "architecture"), [("v32", V32), ("glm5", GLM)])
def test_a_checkpoint_directory_with_a_tokenizer_round_trips_text(
    tmp_path_factory, tmp_path, kind, architecture
):
    path = tmp_path / "checkpoint"
    shutil.copytree(session_checkpoint(tmp_path_factory, kind), path)
    tokenizer = load_tokenizer(write_tokenizer(path), architecture).tokenizer
    text = "na\u00efve \u4f60\u597d \U0001f30a\n\t "
    ids = tokenizer.encode(text)
    assert ids == [256, *text.encode()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_special_tokens=False) == list(text.encode())


def test_special_tokens_written_in_a_text_count_as_such(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    assert tokenizer.encode("a<eos>", add_special_tokens=False) == [97, 257]
    assert tokenizer.decode([97, 257, 98, 100_000]) == "ab"


def test_text_that_is_not_unicode_is_a_400(tmp_path):
    with pytest.raises(RequestError, match="Unicode"):
        tokenizer_with(tmp_path).encode("\ud800")


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    loaded = load_tokenizer(tmp_path, GLM)
    assert loaded.tokenizer is None
    assert "no tokenizer.json" in loaded.reason


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "1.0"}', "\x00"])
def test_a_broken_tokenizer_is_a_checkpoint_error(tmp_path, text):
    path = write_tokenizer(tmp_path / "t")
    (path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        load_tokenizer(path, GLM)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    path = write_tokenizer(tmp_path / "t")
    witness = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass T: pass\n")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with contextlib.suppress(CheckpointError):
        load_tokenizer(path, GLM)
    assert not witness.exists()


def test_the_template_is_rendered_with_its_arguments(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    assert tokenizer.render_text(USER) == "<bos><|user|>hi<|assistant|></think>"
    assert tokenizer.render_chat(USER)[:2] == [256, 258]
    text = tokenizer.render_text(USER, [{"type": "function"}], {"enable_thinking": True})
    assert text == "<bos><|user|>hitools=1<|assistant|>"


def test_a_template_in_the_tokenizer_config_works_too(tmp_path):
    path = write_tokenizer(tmp_path / "t")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    for template, expected in (("old", ["old", "old"]), (named, ["plain", "tools"])):
        settings["chat_template"] = template
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(path, GLM).tokenizer
        assert [tokenizer.render_text(USER, tools) for tools in (None, [{}])] == expected


def test_tool_call_arguments_reach_the_template_as_an_object(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    for arguments in ('{"city": "Oslo", "days": 2}', {"city": "Oslo", "days": 2}):
        call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
        messages = [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}]
        assert '[city="Oslo"][days=2]' in tokenizer.render_text(messages)
        assert call["function"]["arguments"] == arguments


def test_text_parts_become_one_string(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = tokenizer_with(tmp_path).render_text([{"role": "user", "content": parts}])
    assert text.startswith("<bos><|user|>ab<")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        ["hi"],
        [{"content": "no role"}],
        [{"role": 3}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "assistant", "tool_calls": 1}],
        [{"role": "assistant", "tool_calls": [1]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
    ],
)
def test_malformed_messages_are_a_400(tmp_path, messages):
    refusal(tokenizer_with(tmp_path), messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{% include 'config.json' %}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_a_400(tmp_path, template):
    error = refusal(tokenizer_with(tmp_path, template), USER)
    assert error.code == "chat_template_error"


def test_a_client_cannot_replace_the_template_or_the_messages(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    for name in ("chat_template", "messages", "tools", "add_generation_prompt", "tokenize"):
        assert name in str(refusal(tokenizer, USER, kwargs={name: "x"}))


def test_a_template_that_does_not_compile_is_a_checkpoint_error(tmp_path):
    path = write_tokenizer(tmp_path / "t", chat_template="{% if %}")
    with pytest.raises(CheckpointError, match="does not compile"):
        load_tokenizer(path, GLM)


def test_generation_blocks_and_loop_controls_are_understood(tmp_path):
    template = (
        "{% for i in [1, 2, 3] %}{% if i == 3 %}{% break %}{% endif %}"
        "{% generation %}<{{ i }}>{% endgeneration %}{% endfor %}"
    )
    assert tokenizer_with(tmp_path, template).render_text(USER) == "<1><2>"


def test_without_a_template_glm_refuses_chat_and_v32_has_its_own_encoder(tmp_path):
    glm = tokenizer_with(tmp_path, None)
    assert not glm.has_chat
    assert refusal(glm, USER).code == "no_chat_template"
    assert glm.encode("still works")
    v32 = tokenizer_with(tmp_path, None, V32)
    assert v32.has_chat
    assert v32.render_text(USER).endswith("</think>")
    assert v32.render_text(USER, kwargs={"thinking": True}).endswith("<think>")


def test_specials_of_the_test_tokenizer_are_single_tokens(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    ids = tokenizer.encode("".join(SPECIALS), add_special_tokens=False)
    assert ids == list(range(256, 256 + len(SPECIALS)))
