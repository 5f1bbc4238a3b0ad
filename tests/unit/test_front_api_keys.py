"""API keys of the front: who gets in, what the others see, and `tidepool status`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import typer
from helpers.front import RunningFront, make_config
from helpers.secret_file import secret_file

from tidepool.common.errors import ConfigError, PeerError
from tidepool.deploy.commands.status import fetch_cluster, status
from tidepool.deploy.front.api_keys import KeyRing
from tidepool.deploy.front.server import FrontServer

KEYS = ("sk-alice-0123456789", "sk-bob-9876543210ab")
BODY = {"model": "toy", "prompt": "abc", "max_tokens": 4}
GUARDED = ["/v1/models", "/v1/models/toy", "/metrics", "/cluster", "/openapi.json", "/nowhere"]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFront]:
    path = secret_file(tmp_path_factory.mktemp("keys"), "\n".join(KEYS))
    with RunningFront(front={"api_keys_file": path}) as front:
        yield front
        front.assert_idle()


@pytest.fixture(scope="module")
def http(front: RunningFront) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=front.url, timeout=10) as http:
        yield http


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def is_refusal(response: httpx.Response) -> bool:
    error = response.json()["error"]
    return (
        response.status_code == 401
        and set(error) == {"message", "type", "param", "code"}
        and error["code"] == "invalid_api_key"
        and error["type"] == "invalid_request_error"
        and response.headers["www-authenticate"] == "Bearer"
    )


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_every_path(http: httpx.Client, key: str) -> None:
    for path in GUARDED:
        assert http.get(path, headers=bearer(key)).status_code != 401
    answer = http.post("/v1/completions", json=BODY, headers=bearer(key))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        bearer("sk-alice-012345678"),
        bearer("sk-alice-01234567890"),
        bearer("SK-ALICE-0123456789"),
        bearer("\n".join(KEYS).replace("\n", " ")),
        {"authorization": KEYS[0]},
        {"authorization": f"Basic {KEYS[0]}"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": KEYS[0]},
    ],
)
def test_without_a_key_every_path_but_health_is_401(http: httpx.Client, headers: dict) -> None:
    for path in GUARDED:
        assert is_refusal(http.get(path, headers=headers)), path
    assert is_refusal(http.post("/v1/completions", json=BODY, headers=headers))
    assert http.get("/health", headers=headers).status_code == 200


def test_a_refused_body_is_not_read(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield bytes(65536)

    try:
        response = http.post("/v1/completions", content=endless())
    except httpx.TransportError:
        return  # the connection was closed under the upload
    assert is_refusal(response)
    assert response.headers["connection"] == "close"


def test_the_openai_client_gets_in_with_a_key_and_an_authentication_error_without(
    front: RunningFront,
) -> None:
    good = openai.OpenAI(base_url=f"{front.url}/v1", api_key=KEYS[1], max_retries=0)
    assert good.models.list().data
    bad = openai.OpenAI(base_url=f"{front.url}/v1", api_key="sk-nobody-00000000", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        bad.completions.create(**BODY)
    assert caught.value.code == "invalid_api_key"


def test_refusals_are_counted_by_status(http: httpx.Client) -> None:
    http.get("/v1/models")
    metrics = http.get("/metrics", headers=bearer(KEYS[0])).text
    assert 'tidepool_http_requests_total{route="other",status="401"}' in metrics
    assert not any(key in metrics for key in KEYS)


def test_status_takes_a_key(front: RunningFront, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PeerError, match="needs an API key"):
        fetch_cluster(front.url)
    with pytest.raises(PeerError, match="needs another API key"):
        fetch_cluster(front.url, "sk-nobody-00000000")
    with pytest.raises(typer.Exit):
        status(front.url, False, KEYS[0])
    assert "decode" in capsys.readouterr().out


def test_a_front_without_a_file_of_keys_is_open(front: RunningFront) -> None:
    with RunningFront() as other:
        assert httpx.get(f"{other.url}/cluster").status_code == 200


def test_a_front_with_an_unusable_file_of_keys_does_not_start(tmp_path: Path) -> None:
    path = secret_file(tmp_path, KEYS[0], mode=0o644)
    with pytest.raises(ConfigError, match="open to others"):
        FrontServer(make_config(front={"api_keys_file": path}), *[None] * 3)  # type: ignore[list-item]


def test_a_ring_of_keys_does_not_show_them() -> None:
    ring = KeyRing(KEYS)
    assert ring.fits(KEYS[0].encode())
    assert not ring.fits(b"")
    assert not any(key in repr(vars(ring)) for key in KEYS)
