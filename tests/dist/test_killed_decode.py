"""A process that decodes is killed with SIGKILL at any moment; what it left is gone on from."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.kept import Life
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.common.wire import OutputToken

SEED = VETTED_SEEDS["glm5"][0]
SETTINGS: dict[str, Any] = {
    "decode.hot_rows": INDEX_TOPK,
    "kv.page_size": 4,
    "decode.seats": 3,
    "decode.max_requests": 6,
    "decode.park_after_tokens": 3,
    "decode.host_tokens": 1024,
    "decode.index_tokens": 1024,
    "decode.max_context": 256,
}
REQUESTS: dict[str, dict[str, Any]] = {
    f"r{number}": {
        "prompt": prompt(number, 10 + 13 * number),
        "max_tokens": 40,
        "temperature": 0.9 if number % 2 else 0.0,
        "seed": number,
    }
    for number in range(5)
}
CHILD = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from helpers.kept import Life
from tidepool.common.wire import Tokens
arguments = json.loads(sys.argv[2])
life = Life(arguments["path"], descriptor=arguments["descriptor"], **arguments["settings"])
def send(node_id, message):
    if isinstance(message, Tokens):
        line = [message.request_id, message.first_index, [t.token_id for t in message.tokens]]
        os.write(1, (json.dumps(line) + chr(10)).encode())
life.node.decode._send = send
for name, request in arguments["requests"].items():
    life.ask(name, request.pop("prompt"), **request)
life.run_until_killed(2**40)
"""


def run_and_kill(path: Path, life: Life, num_lines: int) -> dict[str, list[int]]:
    """Decodes in another process until it has sent so many tokens; returns what it has sent."""
    descriptor = life.segment.descriptor
    arguments = {
        "path": str(path),
        "descriptor": descriptor,
        "settings": SETTINGS,
        "requests": REQUESTS,
    }
    tests = str(Path(__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, tests, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        pass_fds=(descriptor,),
        cwd="/",
    )
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(num_lines)]
    child.kill()
    lines += child.stdout.readlines()  # sent before it died
    child.stdout.close()
    child.wait(10.0)
    sent: dict[str, list[int]] = {}
    for line in lines:
        if line.endswith(b"\n"):
            name, first_index, token_ids = json.loads(line)
            output = sent.setdefault(name, [])
            assert len(output) == first_index
            output += token_ids
    return sent


def ask_all(life: Life) -> None:
    for name, request in REQUESTS.items():
        sampling = {key: value for key, value in request.items() if key != "prompt"}
        life.ask(name, request["prompt"], **sampling)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm5", SEED)


@pytest.fixture(scope="module")
def truth(path: Path) -> dict[str, list[int]]:
    calm = Life(path, **SETTINGS)
    ask_all(calm)
    assert not calm.run_until_killed(2**40)
    return {name: tokens for name, (tokens, _) in calm.outcome().items()}


@pytest.mark.parametrize("number", range(4))
def test_a_process_that_is_killed_at_any_moment_is_gone_on_from(
    path: Path, truth: dict[str, list[int]], number: int
) -> None:
    life = Life(path, **SETTINGS)
    sent = run_and_kill(path, life, random.Random(number).randrange(1, 150))
    for name, token_ids in sent.items():
        life.node.tokens[name] = [OutputToken(token_id) for token_id in token_ids]
        assert token_ids == truth[name][: len(token_ids)]
    ask_all(life)
    life.node.inbox.clear()
    records = life.records()
    for name, token_ids in sent.items():
        known = [token.token_id for token in records[name].output]
        assert known[: len(token_ids)] == token_ids, "a token was sent before it was noted"
    life = life.next()
    life.ask_again()
    assert not life.run_until_killed(2**40)
    assert {name: tokens for name, (tokens, _) in life.outcome().items()} == truth
    pages = life.node.decode.coordinator.host.pages
    assert pages.num_free == pages.num_total
