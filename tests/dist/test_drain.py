"""Nodes that drain: what they have ends or goes on elsewhere, and they take nothing new."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.engines import exact_config
from helpers.pd import Pair, pd_pair
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.transfer.node import Node

SEED = VETTED_SEEDS["glm52"][0]
SETTINGS = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4, "prefill.chunk_tokens": 16}
LONG_S = 60.0


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm52", SEED)


@pytest.fixture
def pair(path: Path) -> Iterator[Pair]:
    with pd_pair(exact_config(path, **SETTINGS)) as pair:
        yield pair


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.005)


def node_of(pair: Pair, role: str) -> Node:
    return {"prefill": pair.prefill, "decode": pair.decode}[role]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_draining_node_ends_what_it_has_and_takes_nothing_new(pair: Pair, role: str) -> None:
    pair.submit("running", prompt(0, 60), max_tokens=60)
    wait_for(lambda: pair.front.tokens["running"])
    assert node_of(pair, role).drain(LONG_S)
    pair.submit("late", prompt(1, 20), max_tokens=4)
    pair.wait(["running", "late"])
    assert pair.front.finishes["running"].reason == "length"
    late = pair.front.finishes["late"]
    assert (late.reason, late.status, late.can_retry) == ("error", 503, True)
    pair.assert_settles_empty()


def test_what_a_decode_node_cannot_end_in_time_goes_on_elsewhere(pair: Pair) -> None:
    (expected,) = pair.generate([prompt(0, 60)], max_tokens=200)
    pair.submit("long", prompt(0, 60), max_tokens=200)
    wait_for(lambda: pair.front.tokens["long"])
    assert not pair.decode.drain(0.01)
    pair.wait(["long"])
    finish, tokens = pair.front.finishes["long"], pair.front.tokens["long"]
    assert (finish.code, finish.can_retry) == ("draining", True)
    assert finish.num_tokens == len(tokens) < 200
    assert tokens == expected[: len(tokens)]
    pair.assert_settles_empty()


def test_what_a_prefill_node_cannot_end_in_time_goes_on_elsewhere(pair: Pair) -> None:
    names = [f"r{number}" for number in range(6)]
    for name in names:
        pair.submit(name, prompt(0, 96), max_tokens=2)
    wait_for(lambda: pair.prefill.info()["stats"]["prefill_active"])
    pair.prefill.drain(0.001)
    pair.wait(names)
    finishes = [pair.front.finishes[name] for name in names]
    assert all(each.reason == "length" or each.can_retry for each in finishes)
    assert any(each.can_retry for each in finishes)
    pair.assert_settles_empty()


def test_a_node_that_must_hurry_waits_for_nobody(pair: Pair) -> None:
    hurry = threading.Event()
    ended = threading.Event()
    pair.submit("long", prompt(0, 60), max_tokens=1500)
    wait_for(lambda: pair.front.tokens["long"])

    def drain() -> None:
        assert not pair.decode.drain(LONG_S, hurry)
        ended.set()

    thread = threading.Thread(target=drain)
    thread.start()
    assert not ended.wait(0.1)
    hurry.set()
    pair.wait(["long"])
    thread.join(20.0)
    assert ended.is_set()
    assert pair.front.finishes["long"].code == "draining"


def test_the_last_words_of_a_drained_node_arrive_before_it_stops(pair: Pair) -> None:
    for number in range(4):
        pair.submit(f"r{number}", prompt(number, 30), max_tokens=12)
    wait_for(lambda: pair.front.tokens["r3"])
    pair.decode.drain(LONG_S)
    pair.decode.stop()
    pair.wait([f"r{number}" for number in range(4)], 10.0)
    assert {finish.reason for finish in pair.front.finishes.values()} == {"length"}
