"""A front built from a checkpoint talks to nodes over real control sockets."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.front import finish_of, letters, make_config, tokens_of
from helpers.secret_file import secret_file

from tidepool.common import wire
from tidepool.common.config import Config
from tidepool.deploy.front.nodes import NodeInfo
from tidepool.deploy.front.server import ThreadedServer, build_server
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.curve import cluster_keys
from tidepool.transfer.session import Peer

CHECKPOINT = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "checkpoint"


class FakeNode:
    """A control loop that plays a unified node: tokens are letters, a few at a time."""

    def __init__(self, node_id: str, epoch: int, config: Config, *, stop_after: int = 999) -> None:
        keys = cluster_keys(config.cluster)
        self.control = ControlLoop(node_id, "unified", epoch, config=config.transfer, keys=keys)
        self.cancelled = threading.Event()
        self.fences: list[wire.Fence] = []
        self.info = NodeInfo(node_id, "unified", epoch, self.control.address, 8192)
        self._stop_after = stop_after
        self.control.start(self)

    def on_message(self, peer: Peer, message: Any) -> bool:
        if isinstance(message, wire.Submit):
            self._answer(message)
        elif isinstance(message, wire.Cancel):
            self.cancelled.set()
        elif isinstance(message, wire.Fence):
            self.fences.append(message)
        return True

    def _answer(self, submit: wire.Submit) -> None:
        wanted = submit.sampling.max_tokens
        ids = letters(submit.sampling.seed, len(submit.prompt_token_ids), wanted)
        for index in range(0, min(wanted, self._stop_after), 3):
            self.control.send(submit.front_id, tokens_of(submit, index, ids[index : index + 3]))
        if wanted <= self._stop_after:
            self.control.send(submit.front_id, finish_of(submit, wanted))

    def on_peer_up(self, peer: Peer) -> None: ...

    def on_peer_down(self, peer: Peer, reason: str) -> None: ...

    def on_tick(self, now_s: float) -> None: ...


@pytest.fixture
def config(tmp_path: Path) -> Config:
    fast = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 0.5, "resend_interval_s": 0.1}
    return make_config(
        front={"node_wait_s": 5.0},
        transfer=fast,
        model={"path": str(CHECKPOINT), "name": "demo"},
        cluster={"secret_file": secret_file(tmp_path)},
    )


@pytest.fixture
def server(config: Config) -> Iterator[tuple[ThreadedServer, str]]:
    server = ThreadedServer(build_server(config, node_id="front-0", epoch=1, bind_host="127.0.0.1"))
    url = server.start()
    yield server, url
    server.stop()


def ask(url: str, max_tokens: int = 10) -> httpx.Response:
    body = {
        "model": "demo",
        "prompt": [1, 2, 3],
        "max_tokens": max_tokens,
        "seed": 4,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return httpx.post(f"{url}/v1/completions", json=body, timeout=20)


def test_a_request_goes_over_real_sockets(server, config):
    threaded, url = server
    node = FakeNode("unified-0", 1, config)
    try:
        threaded.update_nodes([node.info])
        answer = ask(url)
        assert answer.json()["choices"][0]["token_ids"] == letters(4, 3, 10)
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        assert httpx.post(f"{url}/v1/chat/completions", json=chat).status_code == 200
    finally:
        node.control.stop()


def test_a_dead_node_is_replaced_and_fenced(server, config):
    threaded, url = server
    first = FakeNode("unified-0", 1, config, stop_after=4)
    other = FakeNode("unified-1", 1, config, stop_after=0)
    second: list[FakeNode] = []

    def restart() -> None:
        first.control.stop()
        second.append(FakeNode("unified-0", 2, config))
        proven = dataclasses.replace(second[0].info, dead_epochs=(1,))
        threaded.update_nodes([proven, other.info])

    try:
        threaded.update_nodes([first.info])
        timer = threading.Timer(0.5, restart)
        timer.start()
        answer = ask(url)
        timer.join(5)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["token_ids"] == letters(4, 3, 10)
        for _ in range(100):
            if other.fences:
                break
            threading.Event().wait(0.05)
        assert other.fences[0] == wire.Fence("unified-0", 1)
    finally:
        for node in (first, other, *second):
            node.control.stop()
