"""Bugs that peers have (docs/peer_bugs.md), asked of a prefill and a decode node over real sockets.

Only what no other test asks; the table names every test.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.engines import exact_config
from helpers.pd import Pair, pd_pair
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.common import wire

SEED = VETTED_SEEDS["glm52"][0]
HOT = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm52", SEED)


@pytest.fixture
def silent_address() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


def submit_to(pair: Pair, request_id: str, decode_id: str, address: str) -> None:
    pair.control.send(
        pair.prefill.control.node_id,
        wire.Submit(
            request_id=request_id,
            attempt=0,
            prompt_token_ids=tuple(prompt(0, 40)),
            sampling=wire.Sampling(max_tokens=4, temperature=0.0),
            front_id=pair.control.node_id,
            decode_id=decode_id,
            decode_address=address,
        ),
    )


def test_a_peer_that_takes_connections_and_says_nothing_holds_up_nobody(
    path: Path, silent_address: str
) -> None:
    with pd_pair(exact_config(path, **HOT, **{"prefill.max_active": 8})) as pair:
        for number in range(3):
            submit_to(pair, f"lost{number}", f"silent-{number}", silent_address)
        requests = [prompt(number, 40) for number in range(4)]
        assert [len(tokens) for tokens in pair.generate(requests, max_tokens=6)] == [6] * 4
        assert not pair.front.finishes.keys() & {"lost0", "lost1", "lost2"}, "they still wait"
        for number in range(3):
            pair.cancel(f"lost{number}")
        pair.assert_settles_empty()


def test_nodes_that_were_idle_for_many_heartbeats_serve_at_once(path: Path) -> None:
    with pd_pair(exact_config(path, **HOT)) as pair:
        (expected,) = pair.generate([prompt(0, 60)], max_tokens=8)
        time.sleep(4.0)
        assert pair.generate([prompt(0, 60)], max_tokens=8) == [expected]
        pair.assert_settles_empty()


def test_a_burst_beyond_every_pool_ends_each_request_with_its_own_tokens(path: Path) -> None:
    settings = {
        **HOT,
        "decode.seats": 2,
        "decode.host_tokens": 256,
        "prefill.pool_tokens": 256,
        "prefill.max_active": 4,
    }
    requests = [prompt(number, 20 + number) for number in range(40)]
    with pd_pair(exact_config(path, **settings)) as pair:
        alone = [pair.generate([request], max_tokens=3)[0] for request in requests[:6]]
        assert pair.generate(requests, max_tokens=3)[:6] == alone
        pair.assert_settles_empty()
