"""The front's HTTP surface: readiness, limits, errors, disconnects, faults of nodes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
from helpers.front import (
    MODEL,
    PAIR,
    TWO_PAIRS,
    ByteTokenizer,
    FakeControl,
    RunningFront,
    Step,
    bring_up,
    letters,
    make_config,
    output,
    tokens_of,
)

from tidepool.common import wire
from tidepool.common.errors import ConfigError, InvariantError, RequestError
from tidepool.deploy.front import call_response, service
from tidepool.deploy.front.no_tokenizer import NoTokenizer
from tidepool.deploy.front.server import FrontServer, ThreadedServer, listen
from tidepool.deploy.front.slots import Slots


def slow(submit, decode_id):
    return output(submit, decode_id, delay_s=0.02)


def hanging(submit, decode_id):
    """One token, then nothing."""
    return [Step(decode_id, tokens_of(submit, 0, [97]))]


def body(**fields) -> dict:
    return {"model": "toy", "prompt": "abc", "max_tokens": 4, **fields}


@pytest.fixture(scope="module")
def front():
    with RunningFront(front={"max_body_bytes": 4096}) as front:
        yield front
        front.assert_idle()


@pytest.fixture(scope="module")
def http(front):
    with httpx.Client(base_url=front.url, timeout=10) as http:
        yield http


def error_of(response: httpx.Response) -> dict:
    answer = response.json()
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    return answer["error"]


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b'{"prompt": "\\ud800"}', None),
        (b"[" * 4000, None),
        (b'{"prompt": "a", "seed": 1' + b"0" * 3000 + b"}", "seed"),
        (json.dumps(body(seed=2**63)).encode(), "seed"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b"{}", "prompt"),
        (json.dumps(body(prompt="")).encode(), "prompt"),
        (json.dumps(body(prompt=[])).encode(), "prompt"),
        (json.dumps(body(prompt=[[]])).encode(), "prompt"),
        (json.dumps(body(prompt=[1, MODEL.vocab_size])).encode(), "prompt"),
        (json.dumps(body(prompt=[-1])).encode(), "prompt"),
        (json.dumps(body(prompt=[10**18])).encode(), "prompt"),
        (json.dumps(body(prompt=["a"] * 800)).encode(), "prompt"),
        (json.dumps(body(prompt=["a", 1])).encode(), "prompt"),
        (json.dumps(body(max_tokens=0)).encode(), "max_tokens"),
        (json.dumps(body(max_tokens=-3)).encode(), "max_tokens"),
        (json.dumps(body(max_tokens=True)).encode(), "max_tokens"),
        (json.dumps(body(max_tokens="4")).encode(), "max_tokens"),
        (json.dumps(body(n=9)).encode(), "n"),
        (json.dumps(body(temperature=-1)).encode(), "temperature"),
        (json.dumps(body(top_p=0)).encode(), "top_p"),
        (json.dumps(body(min_p=2)).encode(), "min_p"),
        (json.dumps(body(echo=True)).encode(), "echo"),
        (json.dumps(body(stop=["a"] * 17)).encode(), "stop"),
        (json.dumps(body(stop=[""])).encode(), "stop"),
        (json.dumps(body(stop_token_ids=[MODEL.vocab_size])).encode(), "stop_token_ids"),
        (json.dumps(body(min_tokens=5)).encode(), "min_tokens"),
        (json.dumps(body(logprobs=21)).encode(), "logprobs"),
        (json.dumps(body(best_of=4)).encode(), "best_of"),
        (json.dumps(body(stream_options={})).encode(), "stream_options"),
        (json.dumps(body(presence_penalty=1)).encode(), "presence_penalty"),
        (json.dumps(body(logit_bias={"1": 2})).encode(), "logit_bias"),
    ],
)
def test_a_bad_body_is_400_and_names_the_field(http, content, param):
    response = http.post("/v1/completions", content=content)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"chat_template_kwargs": {"refuse": 1}}, "messages"),
    ],
)
def test_a_bad_chat_is_400_and_names_the_field(http, fields, param):
    chat = {"model": "toy", "messages": [{"role": "user", "content": "x"}], **fields}
    response = http.post("/v1/chat/completions", json=chat)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_an_over_long_prompt_is_400_with_the_limit(http):
    response = http.post("/v1/completions", json=body(prompt="a" * 600))
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 512 tokens" in error["message"]
    response = http.post("/v1/completions", json=body(prompt="a" * 500, max_tokens=13))
    assert error_of(response)["code"] == "context_length_exceeded"


def test_unknown_fields_are_ignored(http):
    assert http.post("/v1/completions", json=body(whatever=[1])).status_code == 200


def test_unknown_routes_and_methods_have_the_same_shape(http):
    assert error_of(http.get("/v2"))["code"] == "not_found"
    response = http.get("/v1/completions")
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_a_large_body_is_413_by_its_header(http):
    response = http.post("/v1/completions", content=b"x" * 5000)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


def test_a_large_body_is_413_without_a_header(http):
    def pieces():
        for _ in range(100):
            yield b" " * 100

    response = http.post("/v1/completions", content=pieces())
    assert response.status_code == 413


def test_health_cluster_and_metrics_of_a_ready_cluster(http):
    assert http.get("/health").json() == {"status": "ok", "missing": []}
    view = http.get("/cluster").json()
    assert view["is_ready"] and view["model"] == "toy"
    assert [n["state"] for n in view["nodes"]] == ["up", "up"]
    http.post("/v1/completions", json=body())
    text = http.get("/metrics").text
    assert 'tidepool_http_requests_total{route="/v1/completions",status="200"}' in text
    assert "tidepool_ttft_seconds_bucket" in text
    assert 'tidepool_node_up{node="decode-0",role="decode"} 1.0' in text


def test_unknown_paths_share_one_label(http):
    for name in ("a", "b", "c"):
        http.get(f"/{name}")
    text = http.get("/metrics").text
    assert 'route="other",status="404"' in text
    assert 'route="/a"' not in text


def test_without_nodes_nothing_is_ready_and_requests_get_503():
    with RunningFront(infos=[], front={"node_wait_s": 0.2}) as front:
        health = httpx.get(f"{front.url}/health")
        assert health.status_code == 503
        assert health.json()["missing"] == ["prefill", "decode"]
        for stream in (False, True):
            response = httpx.post(f"{front.url}/v1/completions", json=body(stream=stream))
            assert (response.status_code, error_of(response)["code"]) == (503, "no_node")
            assert int(response.headers["retry-after"]) >= 1


def test_health_says_which_role_is_missing():
    with RunningFront(infos=PAIR) as front:
        front.control.down("decode-0")
        front.wait_for(lambda: front.service.missing_roles == ["decode"])
        assert httpx.get(f"{front.url}/health").json()["missing"] == ["decode"]


def test_one_request_more_than_the_limit_is_429():
    with RunningFront(hanging, front={"max_requests": 2, "stall_s": 5}) as front:
        with httpx.stream(
            "POST", f"{front.url}/v1/completions", json=body(n=2, stream=True)
        ) as one:
            assert one.status_code == 200
            response = httpx.post(f"{front.url}/v1/completions", json=body())
            assert (response.status_code, error_of(response)["code"]) == (
                429,
                "rate_limit_exceeded",
            )
            assert response.headers["retry-after"] == "1"
        front.assert_idle()
        response = httpx.post(f"{front.url}/v1/completions", json=body(n=3))
        assert (response.status_code, error_of(response)["code"]) == (400, "too_many_choices")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_on_both_nodes(stream):
    with RunningFront(hanging, front={"stall_s": 30}) as front:
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream(
                "POST",
                f"{front.url}/v1/completions",
                json=body(stream=stream),
                timeout=0.3,
            ) as response,
        ):
            next(response.iter_bytes())
        front.wait_for(lambda: len(front.control.messages(wire.Cancel)) == 2)
        assert {n for n, _ in front.control.messages(wire.Cancel)} == {"prefill-0", "decode-0"}
        front.assert_idle()
        assert "tidepool_client_disconnects_total 1.0" in httpx.get(f"{front.url}/metrics").text


def test_a_client_that_leaves_inside_its_body_frees_its_slot():
    with RunningFront() as front:
        address = ("127.0.0.1", int(front.url.rsplit(":", 1)[1]))
        with socket.create_connection(address) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
            front.wait_for(lambda: front.service.slots.num_used == 1)
        front.assert_idle()


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_stream_goes_on_when_a_node_dies(victim):
    with RunningFront(slow, infos=TWO_PAIRS) as front:
        stream = {"stream": True, "max_tokens": 30, "seed": 3}
        with httpx.stream("POST", f"{front.url}/v1/completions", json=body(**stream)) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: {"))
            first = json.loads(next(lines)[6:])["choices"][0]["text"]
            (_, submit), *_ = front.control.messages(wire.Submit)
            front.control.down(submit.decode_id.replace("decode", victim))
            rest = [json.loads(line[6:])["choices"][0] for line in lines]
        assert first + "".join(c["text"] for c in rest) == bytes(letters(3, 3, 30)).decode()
        assert rest[-1]["finish_reason"] == "length"
        assert len(front.control.messages(wire.Submit)) == (2 if victim == "decode" else 1)
        front.assert_idle()


def test_a_silent_cluster_ends_in_a_typed_error():
    settings = {"stall_s": 0.2, "node_wait_s": 0.2, "max_attempts": 2}
    with RunningFront(hanging, front=settings, transfer={"deadline_s": 0.1}) as front:
        response = httpx.post(f"{front.url}/v1/completions", json=body(), timeout=10)
        assert (response.status_code, error_of(response)["code"]) == (503, "stall")
        front.assert_idle()


def test_a_long_wait_for_the_first_token_keeps_the_connection_alive(monkeypatch):
    monkeypatch.setattr(service, "KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(call_response, "COMMIT_S", 0.1)
    settings = {"stall_s": 0.3, "max_attempts": 1}
    with RunningFront(
        lambda submit, decode_id: [], front=settings, transfer={"deadline_s": 0.1}
    ) as front:
        response = httpx.post(f"{front.url}/v1/completions", json=body(stream=True))
        assert response.status_code == 200
        assert response.text.startswith(": waiting\n\n")
        (event,) = [line for line in response.text.splitlines() if line.startswith("data: ")]
        assert json.loads(event[6:])["error"]["code"] == "stall"
        front.assert_idle()


def test_draining_refuses_new_calls_and_waits_for_running_ones():
    with RunningFront(slow) as front:
        answers = []

        def call() -> None:
            url = f"{front.url}/v1/completions"
            answers.append(httpx.post(url, json=body(max_tokens=20)).status_code)

        caller = threading.Thread(target=call)
        caller.start()
        front.wait_for(lambda: front.service.num_live == 1)
        drained = []
        drainer = threading.Thread(target=lambda: drained.append(front.drain(5.0)))
        drainer.start()
        front.wait_for(lambda: front.service.slots.is_closed)
        response = httpx.post(f"{front.url}/v1/completions", json=body())
        assert (response.status_code, error_of(response)["code"]) == (503, "draining")
        assert httpx.get(f"{front.url}/health").json()["status"] == "draining"
        caller.join(5)
        drainer.join(5)
        assert (answers, drained) == ([200], [True])


def test_stopping_ends_running_calls_with_an_error():
    with RunningFront(hanging, front={"stall_s": 30}) as front:
        answers = []

        def call() -> None:
            answers.append(httpx.post(f"{front.url}/v1/completions", json=body()))

        caller = threading.Thread(target=call)
        caller.start()
        front.wait_for(lambda: front.service.num_live == 1)
    caller.join(5)
    assert (answers[0].status_code, error_of(answers[0])["code"]) == (503, "shutting_down")


def test_the_loop_answers_while_a_text_is_tokenized():
    class SlowTokenizer(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            time.sleep(1.5)
            return super().encode(text)

    control = FakeControl()
    server = FrontServer(make_config(), SlowTokenizer(), MODEL, control)
    threaded = ThreadedServer(server)
    url = threaded.start()
    control.start_thread()
    threaded.update_nodes(PAIR)
    bring_up(control, PAIR)
    try:
        caller = threading.Thread(
            target=lambda: httpx.post(f"{url}/v1/completions", json=body(), timeout=10)
        )
        caller.start()
        time.sleep(0.1)
        begin_s = time.monotonic()
        assert httpx.get(f"{url}/health").status_code == 200
        assert time.monotonic() - begin_s < 1.0
        caller.join(5)
    finally:
        threaded.stop()


def test_without_a_tokenizer_token_ids_still_work():
    control = FakeControl()
    server = FrontServer(make_config(), NoTokenizer("no tokenizer.json"), MODEL, control)
    threaded = ThreadedServer(server)
    url = threaded.start()
    control.start_thread()
    threaded.update_nodes(PAIR)
    bring_up(control, PAIR)
    try:
        response = httpx.post(f"{url}/v1/completions", json=body())
        assert (response.status_code, error_of(response)["code"]) == (400, "no_tokenizer")
        ids = body(prompt=[97, 98, 99], return_token_ids=True, seed=1)
        choice = httpx.post(f"{url}/v1/completions", json=ids).json()["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("", letters(1, 3, 4))
    finally:
        threaded.stop()


def test_a_port_in_use_is_a_config_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = FrontServer(
            make_config(front={"port": port}), ByteTokenizer(), MODEL, FakeControl()
        )
        threaded = ThreadedServer(server)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            threaded.start()
        threaded.stop()


def front_of_two(number: int, port: int) -> ThreadedServer:
    config = make_config(front={"port": port}, cluster={"fronts": 2})
    front_id = f"front-{number}"
    return ThreadedServer(
        FrontServer(config, ByteTokenizer(), MODEL, FakeControl(), front_id=front_id)
    )


def who_answers(port: int) -> str:
    return str(httpx.get(f"http://127.0.0.1:{port}/cluster").json()["front"]["front_id"])


def test_fronts_share_a_port_and_each_has_one_of_its_own():
    first = front_of_two(0, 0)
    port = int(first.start().rsplit(":", 1)[1])
    second = front_of_two(1, port)
    second.start()
    assert {who_answers(port) for _ in range(64)} == {"front-0", "front-1"}
    assert [who_answers(port + 1), who_answers(port + 2)] == ["front-0", "front-1"]
    first.stop()
    assert {who_answers(port) for _ in range(16)} == {"front-1"}
    second.stop()


def test_a_front_whose_own_port_is_taken_serves_at_the_shared_one():
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with socket.create_server(("127.0.0.1", port + 1)):
        front = front_of_two(0, port)
        front.start()
        assert who_answers(port) == "front-0"
        front.stop()


def test_connections_say_they_are_tcp_so_that_asyncio_sets_nodelay():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


def test_a_slot_is_released_once():
    slots = Slots(2)
    slot = slots.admit()
    slot.grow(2)
    with pytest.raises(RequestError) as caught:
        slots.admit()
    assert caught.value.status == 429
    slot.release()
    assert slots.num_used == 0
    with pytest.raises(InvariantError):
        slot.release()
