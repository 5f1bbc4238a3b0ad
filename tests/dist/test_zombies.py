"""A process that was replaced and lives on: it serves no token, writes no page, and its successor
does not notice it. Epochs of sessions are what keeps it out; real nodes, sockets and transports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.engines import exact_config
from helpers.pd import HOST, Pair, pd_pair
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.common import wire
from tidepool.common.config import Config
from tidepool.decode_node.node import build_node as build_decode
from tidepool.prefill_node.node import build_node as build_prefill
from tidepool.transfer.node import Node

SEED = VETTED_SEEDS["glm52"][0]
SETTINGS = {
    "decode.hot_rows": INDEX_TOPK,
    "kv.page_size": 4,
    "prefill.chunk_tokens": 16,
    "cluster.authentication": "off",  # a process made here later would have another secret
    "transfer.front_grace_s": 2.5,
    "transfer.deadline_s": 8.0,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path: Path = session_checkpoint(tmp_path_factory, "glm52", SEED)
    return exact_config(path, **SETTINGS)


@pytest.fixture
def pair(config: Config) -> Iterator[Pair]:
    with pd_pair(config) as pair:
        yield pair


@contextmanager
def successor(
    pair: Pair, build: Callable[..., Node], node_id: str, config: Config
) -> Iterator[Node]:
    """A newer process of a node; the front and everybody who is told its address meet it."""
    fatal: list[BaseException] = []
    node = build(config, node_id=node_id, bind_host=HOST, on_fatal=fatal.append)
    node.start()
    try:
        pair.control.connect(node_id, node.control.address)
        wait_for(lambda: epoch_at_the_front(pair, node_id) == node.control.epoch)
        yield node
    finally:
        node.stop()
    assert not fatal, fatal


def epoch_at_the_front(pair: Pair, node_id: str) -> int | None:
    peer = pair.control.peer(node_id)
    return peer.epoch if peer else None


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 40.0
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.01)


def test_a_replaced_prefill_process_gets_no_page_and_hurts_nobody(
    pair: Pair, config: Config
) -> None:
    (expected,) = pair.generate([prompt(0, 60)], max_tokens=8)
    zombie = pair.prefill
    with successor(pair, build_prefill, "prefill-0", config) as new:
        assert pair.generate([prompt(0, 60)], max_tokens=8) == [expected]
        address = pair.decode.control.address
        sampling = wire.Sampling(max_tokens=8, temperature=0.0)
        late = wire.Submit(
            "late", 0, tuple(prompt(1, 60)), sampling, "front-0", "decode-0", address
        )
        zombie._step_loop.post(late)
        wait_for(lambda: "is dead" in (zombie.control.refusal("decode-0") or ""))
        assert pair.generate([prompt(0, 60)], max_tokens=8) == [expected]
        wait_for(lambda: all(engine.is_idle for engine in zombie._engines))
        assert "late" not in pair.front.tokens and "late" not in pair.front.finishes
        stats = {**new.audit()["stats"], **pair.decode.audit()["stats"]}
        assert stats["open_leases"] == stats["host_pages_quarantined"] == 0
        assert stats["host_pages_free"] == stats["host_pages_total"]


def test_a_replaced_decode_process_serves_no_token_and_gets_no_prompt(
    pair: Pair, config: Config
) -> None:
    (expected,) = pair.generate([prompt(0, 60)], max_tokens=8)
    zombie = pair.decode
    pair.submit("long", prompt(0, 60), max_tokens=3000)
    wait_for(lambda: pair.front.tokens["long"])
    with successor(pair, build_decode, "decode-0", config) as new:
        heard = len(pair.front.tokens["long"])
        written = zombie.info()["stats"]["bytes_received"]
        pair.decode = new
        assert pair.generate([prompt(0, 60)], max_tokens=8) == [expected]
        assert zombie.info()["stats"]["bytes_received"] == written
        assert new.info()["stats"]["bytes_received"] > 0
        wait_for(lambda: zombie._engines[0].is_idle)  # its front is gone for front_grace_s
        assert len(pair.front.tokens["long"]) == heard
        assert "long" not in pair.front.finishes
        stats = zombie.audit()["stats"]
        assert stats["host_pages_free"] == stats["host_pages_total"]
    pair.decode = zombie
