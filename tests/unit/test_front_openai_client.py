"""The openai client, as it comes, against a front on a real port."""

from __future__ import annotations

import openai
import pytest
from helpers.front import EOS, RunningFront, Step, finish_of, letters, output, tokens_of


def scripted(submit, decode_id):
    """The prompt's first byte chooses what happens."""
    kind = chr(submit.prompt_token_ids[0])
    if kind == "E":  # ends by itself
        steps = [Step(decode_id, tokens_of(submit, 0, [*b"done", EOS]))]
        return [*steps, Step(decode_id, finish_of(submit, 5, "stop"))]
    if kind == "F":  # fails behind the second token
        error = finish_of(submit, 2, "error", status=500, code="kv_fault", detail="bad rows")
        return [Step(decode_id, tokens_of(submit, 0, [97, 98])), Step(decode_id, error)]
    if kind == "M":  # full
        full = finish_of(submit, 0, "error", status=429, code="pool_full", detail="pool is full")
        return [Step("prefill-0", full)]
    return output(submit, decode_id)


@pytest.fixture(scope="module")
def front():
    with RunningFront(scripted) as front:
        yield front
        front.assert_idle()


@pytest.fixture(scope="module")
def client(front):
    with openai.OpenAI(base_url=f"{front.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def text(seed: int, prompt: int, count: int) -> str:
    return bytes(letters(seed, prompt, count)).decode()


def test_a_completion(client):
    answer = client.completions.create(model="toy", prompt="abc", max_tokens=6, seed=3)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (text(3, 3, 6), "length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)
    assert answer.usage.total_tokens == 9
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")


def test_a_completion_has_16_tokens_unless_told(client):
    answer = client.completions.create(model="toy", prompt="abc")
    assert answer.usage.completion_tokens == 16


def test_a_streamed_completion_is_the_same(client):
    chunks = list(
        client.completions.create(
            model="toy",
            prompt="abc",
            max_tokens=6,
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == text(3, 3, 6)
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 6


@pytest.mark.parametrize(
    "prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]], ids=["text", "texts", "ids", "lists"]
)
def test_every_form_of_a_prompt_gives_the_same(client, prompt):
    answer = client.completions.create(model="toy", prompt=prompt, max_tokens=4, seed=1)
    assert answer.choices[0].text == text(1, 3, 4)


def test_choices_are_numbered_by_prompt_then_n(client):
    answer = client.completions.create(
        model="toy", prompt=["abc", "abcd"], n=2, max_tokens=4, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == text(1, 3, 4)
    assert answer.choices[2].text == text(1, 4, 4)
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage.prompt_tokens == 7
    assert answer.usage.completion_tokens == 16


def test_a_stream_of_several_choices_names_each(client):
    texts = {0: "", 1: ""}
    stream = client.completions.create(
        model="toy", prompt="abc", n=2, max_tokens=5, seed=1, stream=True
    )
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts[0] == text(1, 3, 5)
    assert len(texts[1]) == 5


def test_eos_is_a_stop_without_text(client):
    answer = client.completions.create(model="toy", prompt="E", max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("done", "stop")
    assert answer.usage.completion_tokens == 5


def test_a_stop_string_ends_the_output_and_cancels_the_rest(client, front):
    whole = text(4, 3, 40)
    answer = client.completions.create(
        model="toy", prompt="abc", max_tokens=40, seed=4, stop=[whole[7:10], "never"]
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[:7], "stop")
    assert answer.usage.completion_tokens == 10
    front.assert_idle()


def test_completion_logprobs(client):
    answer = client.completions.create(model="toy", prompt="abc", max_tokens=3, seed=3, logprobs=2)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.token_logprobs == [-0.5] * 3
    assert found.text_offset == [0, 1, 2]
    assert found.top_logprobs[0]["a"] == -1.0 and found.top_logprobs[0]["b"] == -2.0
    assert found.tokens[1] in found.top_logprobs[1]


def test_streamed_logprobs_have_running_offsets(client):
    stream = client.completions.create(
        model="toy", prompt="abc", max_tokens=4, seed=3, logprobs=0, stream=True
    )
    offsets = [offset for chunk in stream for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == [0, 1, 2, 3]


MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
CHAT_PROMPT = len("<system>be<user>hi<assistant>")


def test_a_chat(client):
    answer = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_completion_tokens=5, seed=2
    )
    (choice,) = answer.choices
    assert choice.message.content == text(2, CHAT_PROMPT, 5)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert answer.usage.prompt_tokens == CHAT_PROMPT


def test_a_chat_without_a_limit_may_fill_the_context(client):
    answer = client.chat.completions.create(model="toy", messages=MESSAGES)
    assert answer.usage.total_tokens == 512


def test_a_streamed_chat(client):
    chunks = list(
        client.chat.completions.create(
            model="toy",
            messages=MESSAGES,
            max_tokens=5,
            seed=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(d.delta.content or "" for d in deltas) == text(2, CHAT_PROMPT, 5)
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
    assert chunks[-1].usage.total_tokens == CHAT_PROMPT + 5


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=2, seed=2, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == list(text(2, CHAT_PROMPT, 2))
    assert content[0].bytes == list(content[0].token.encode())
    assert [top.logprob for top in content[0].top_logprobs] == [-1.0, -2.0, -3.0]


def test_chat_logprobs_without_top(client):
    answer = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=2, logprobs=True
    )
    assert answer.choices[0].logprobs.content[0].top_logprobs == []


def test_tools_reach_the_template_and_none_keeps_them_out(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    seen = [
        client.chat.completions.create(
            model="toy", messages=MESSAGES, max_tokens=1, tools=[tool], tool_choice=choice
        ).usage.prompt_tokens
        for choice in ("auto", "none")
    ]
    assert seen == [CHAT_PROMPT + 1, CHAT_PROMPT]


def test_content_parts_are_joined(client):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    answer = client.chat.completions.create(
        model="toy", messages=[{"role": "user", "content": parts}], max_tokens=1
    )
    assert answer.usage.prompt_tokens == len("<user>h\ni<assistant>")


def test_token_ids_on_request(client):
    body = {"return_token_ids": True}
    answer = client.completions.create(
        model="toy", prompt="abc", max_tokens=3, seed=3, extra_body=body
    )
    choice = answer.choices[0].model_dump()
    assert choice["token_ids"] == letters(3, 3, 3)
    assert choice["prompt_token_ids"] == [97, 98, 99]
    stream = client.chat.completions.create(
        model="toy", messages=MESSAGES, max_tokens=3, seed=3, stream=True, extra_body=body
    )
    chunks = [chunk.model_dump() for chunk in stream]
    assert len(chunks[0]["prompt_token_ids"]) == CHAT_PROMPT
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids") or []]
    assert ids == letters(3, CHAT_PROMPT, 3)


def test_the_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("toy", "model")
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_an_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_cluster_is_429_also_for_streams(client, stream):
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="toy", prompt="M", stream=stream)
    assert caught.value.code == "pool_full"
    assert caught.value.response.headers["retry-after"] == "1"


def test_a_failure_in_the_middle_of_a_stream_is_an_error_event(client, front):
    stream = client.completions.create(model="toy", prompt="F", stream=True)
    texts = []
    with pytest.raises(openai.APIError, match="bad rows") as caught:
        for chunk in stream:
            texts.append(chunk.choices[0].text)
    assert "".join(texts) in ("", "ab")
    assert caught.value.code == "kv_fault"
    front.assert_idle()


def test_a_failure_without_stream_is_its_status(client):
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="toy", prompt="F")
    assert caught.value.code == "kv_fault"
