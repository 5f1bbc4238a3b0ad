"""Whatever a client sends, the front answers below 500 and in OpenAI's shape, and nothing is left.

Bodies come from the OpenAPI document (schemathesis: right and wrong ones) and, wilder, from
Hypothesis. The fake cluster behind the front answers at once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import hypothesis.strategies as st
import pytest
import schemathesis
from helpers.front import MODEL, PAIR, ByteTokenizer, FakeControl, bring_up, make_config
from schemathesis import GenerationMode

from tidepool.deploy.front.app import create_app
from tidepool.deploy.front.openai_requests import ChatBody, CompletionBody
from tidepool.deploy.front.service import FrontService

ROUTES = ("/v1/completions", "/v1/chat/completions")
QUIET = [
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.filter_too_much,
    hypothesis.HealthCheck.data_too_large,
    hypothesis.HealthCheck.function_scoped_fixture,
]


class Bench:
    """A front without sockets: requests go through ASGI, on a loop of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.control = FakeControl()
        config = make_config(front={"max_body_bytes": 65536})
        self.service = FrontService(config, ByteTokenizer(), MODEL, self.control)
        self.app = create_app(self.service)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://front")
        self.loop.run_until_complete(self._start())

    async def _start(self) -> None:
        await self.service.start()
        self.control.start_thread()
        self.service.update_nodes(PAIR)
        bring_up(self.control, PAIR)
        await asyncio.sleep(0.05)
        assert not self.service.missing_roles

    def post(self, route: str, content: bytes, headers: dict[str, str] | None = None) -> Any:
        """Posts a body and checks what holds for every answer."""
        sending = self.http.post(route, content=content, headers=headers)
        response = self.loop.run_until_complete(asyncio.wait_for(sending, 20))
        check(response)
        assert self.service.slots.num_used == 0
        assert self.service.num_live == 0
        return response

    def close(self) -> None:
        self.loop.run_until_complete(self.http.aclose())
        self.loop.run_until_complete(self.service.stop())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and len(error["message"]) < 1000
    else:
        assert b'data: {"error"' not in response.content


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def schema(bench: Bench) -> Any:
    loaded = schemathesis.openapi.from_dict(bench.app.openapi())
    loaded.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    return loaded


FITTING = {
    "model": "toy",
    "prompt": "abc",
    "messages": [{"role": "user", "content": "abc"}],
    "max_tokens": 2,
    "max_completion_tokens": 2,
    "min_tokens": 1,
    "stop_token_ids": [7],
    "stream_options": None,
    "best_of": None,
    "top_logprobs": None,
}


@pytest.mark.parametrize("route", ROUTES)
def test_bodies_from_the_openapi_document(bench, schema, route):
    operation = schema[route]["POST"]

    seen: list[int] = []

    @hypothesis.settings(
        max_examples=100, deadline=None, suppress_health_check=QUIET, database=None
    )
    @hypothesis.given(case=operation.as_strategy())
    def run(case: Any) -> None:
        sent = case.body
        if isinstance(sent, dict):  # also as a body that may get past the model's own limits
            fitting = {**sent, **FITTING}
            seen.append(bench.post(route, json.dumps(fitting).encode()).status_code)
        is_text = isinstance(sent, str | bytes)
        content = str(sent).encode(errors="replace") if is_text else json.dumps(sent).encode()
        seen.append(bench.post(route, content).status_code)

    run()
    assert {200, 400} <= set(seen)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, "", "\x00", "a" * 3000])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted({*CompletionBody.model_fields, *ChatBody.model_fields}))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": JSON},
        optional={"tool_calls": JSON, "name": JSON},
    ),
    min_size=1,
    max_size=3,
)
PROMPTS = st.text(max_size=20) | st.lists(st.integers(-1, 300), max_size=5) | JSON


@pytest.mark.parametrize("route", ROUTES)
def test_bodies_with_wild_values_in_known_fields(bench, route):
    @hypothesis.settings(
        max_examples=150, deadline=None, suppress_health_check=QUIET, database=None
    )
    @hypothesis.given(
        fields=st.dictionaries(FIELDS, JSON, max_size=3), prompt=PROMPTS, messages=MESSAGES
    )
    def run(fields: dict[str, Any], prompt: Any, messages: Any) -> None:
        body = {"prompt": prompt, "messages": messages, "max_tokens": 2, **fields}
        bench.post(route, json.dumps(body, ensure_ascii=True).encode())

    run()


@pytest.mark.parametrize("route", ROUTES)
def test_bytes_that_are_no_json(bench, route):
    @hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=QUIET, database=None)
    @hypothesis.given(content=st.binary(max_size=200), prefix=st.sampled_from([b"", b'{"prompt":']))
    def run(content: bytes, prefix: bytes) -> None:
        bench.post(route, prefix + content)

    run()


DEEP = 20_000


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "content",
    [
        b"[" * DEEP,
        b'{"a":' * DEEP,
        b'{"prompt":' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"prompt":"a","messages":' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"messages":[{"role":"user","content":"a","x":' + b"[" * 150 + b"]" * 150 + b"}]}",
        b'{"messages":[{"role":"user","content":"a"}],"tools":[{"a":' * 1 + b"[" * 9 + b"]" * 9,
        b'{"prompt":"\\ud83d","messages":[{"role":"user","content":"\\udc00"}]}',
        b'{"prompt":"' + b"\xed\xa0\x80" + b'"}',
        b'{"prompt":"a","seed":' + b"9" * 60_000 + b"}",
        b'{"prompt":"a","temperature":1e' + b"9" * 1000 + b"}",
        b'{"prompt":[' + b"1," * 30_000 + b"1]}",
        b'{"prompt":"' + b"a" * 70_000 + b'"}',
        b'{"prompt":' + json.dumps(["a"] * 1000).encode() + b"}",
        b'{"messages":[' + b"1," * 30_000 + b"1]}",
        b'{"prompt":"a","prompt":5,"messages":7}',
    ],
    ids=range(15),
)
def test_hostile_bodies_are_answered(bench, route, content):
    """200 where the hostile part is a field that is ignored."""
    assert bench.post(route, content).status_code in (200, 400, 413)


@pytest.mark.parametrize("value", ["-1", "x", "99999999999999999999", "9" * 5000, "1e3"])
def test_a_strange_content_length_is_no_fault(bench, value):
    bench.post("/v1/completions", b"{}", headers={"content-length": value})
