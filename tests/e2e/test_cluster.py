"""A real cluster on Ray answers like OpenAI's API, counts what it does, and leaks nothing."""

from __future__ import annotations

import json
import time

import httpx
import openai
import pytest
from helpers.clusters import assert_settles_empty, audits, complete, lasting, wait_until

from tidepool.deploy.cluster import Cluster
from tidepool.deploy.demo.data import make_prompt

MODEL = "tidepool-demo"


@pytest.fixture
def client(demo_cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo_cluster.url}/v1", api_key="none", max_retries=0)


def test_a_streamed_completion_finds_the_record(client: openai.OpenAI) -> None:
    prompt = make_prompt(1500, seed=11)
    with client.completions.create(
        model=MODEL, prompt=prompt.text, max_tokens=12, temperature=0, stream=True
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == prompt.completion
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_a_chat_finds_the_record_streamed_or_not(client: openai.OpenAI) -> None:
    prompt = make_prompt(1200, seed=12, form="chat")
    answer = client.chat.completions.create(
        model=MODEL, messages=prompt.messages, max_tokens=20, temperature=0, logprobs=True
    )
    assert answer.choices[0].message.content == prompt.completion
    assert answer.usage.prompt_tokens == 1200
    assert answer.usage.completion_tokens == len(prompt.completion) + 1  # and eos
    assert all(entry.logprob <= 0 for entry in answer.choices[0].logprobs.content)
    with client.chat.completions.create(
        model=MODEL, messages=prompt.messages, max_tokens=20, temperature=0, stream=True
    ) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == prompt.completion


def test_sampling_is_repeatable_by_seed(demo_cluster: Cluster) -> None:
    def sample(seed: int) -> list[int]:
        body = {"temperature": 1.0, "seed": seed, "max_tokens": 24, "ignore_eos": True}
        answer = complete(demo_cluster, "In the beginning", model=MODEL, **body)
        return list(answer["choices"][0]["token_ids"])

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    prompt = make_prompt(800, seed=13)
    answer = client.completions.create(
        model=MODEL, prompt=prompt.text, max_tokens=12, temperature=0, stop=[prompt.answer[3:]]
    )
    assert answer.choices[0].text == prompt.answer[:3]
    assert answer.choices[0].finish_reason == "stop"


def test_errors_have_openais_shape(demo_cluster: Cluster, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 40000, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
    assert "16384" in str(caught.value)
    response = httpx.post(f"{demo_cluster.url}/v1/completions", content=b"{not json")
    assert response.status_code == 400
    assert set(response.json()["error"]) >= {"message", "type", "param", "code"}


def test_a_client_that_disconnects_frees_both_sides(demo_cluster: Cluster) -> None:
    prompt = make_prompt(4000, seed=14)
    body = {"model": MODEL, "prompt": prompt.text, "max_tokens": lasting(2000), "ignore_eos": True}
    for read_some in (False, True):
        with httpx.stream(
            "POST", f"{demo_cluster.url}/v1/completions", json={**body, "stream": True}, timeout=60
        ) as response:
            if read_some:
                next(response.iter_lines())
            else:
                time.sleep(0.3)
        assert_settles_empty(demo_cluster)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{demo_cluster.url}/v1/completions", json=body, timeout=1.0)
    assert_settles_empty(demo_cluster)


def test_metrics_and_cluster_view_tell_what_happened(demo_cluster: Cluster) -> None:
    complete(demo_cluster, make_prompt(900, seed=15).text, model=MODEL, max_tokens=8)
    stats = audits(demo_cluster)["decode-0"]
    assert stats["bytes_received"] > 0
    assert stats["hot_misses"] > 0

    def view() -> dict[str, dict[str, float]]:
        nodes = httpx.get(f"{demo_cluster.url}/cluster").json()["nodes"]
        return {node["node_id"]: node["stats"] for node in nodes}

    wait_until(lambda: view()["decode-0"]["hot_misses"] >= stats["hot_misses"], 10, "the poller")
    metrics = httpx.get(f"{demo_cluster.url}/metrics").text
    for name in (
        "tidepool_node_hot_misses_total",
        "tidepool_node_bytes_received_total",
        "tidepool_node_host_pages_free",
        "tidepool_node_prefill_queued",
    ):
        assert name in metrics, metrics
    assert "ttft" in metrics or "time_to_first_token" in metrics


def test_the_last_event_of_a_stream_is_done(demo_cluster: Cluster) -> None:
    body = {"model": MODEL, "prompt": "In the", "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{demo_cluster.url}/v1/completions", json=body) as response:
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["choices"] for line in events[:-1])


def test_nothing_is_left_when_all_requests_have_ended(demo_cluster: Cluster) -> None:
    assert_settles_empty(demo_cluster)
