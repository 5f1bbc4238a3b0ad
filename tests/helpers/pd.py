"""One prefill and one decode node in this process, over real ZMQ and a real transport, without Ray.

    with pd_pair(config) as pair:
        tokens = pair.generate([prompt], max_tokens=32)

The test plays the front: it submits to prefill and gathers what decode sends.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tidepool.common import wire
from tidepool.common.config import Config
from tidepool.decode_node.node import build_node as build_decode
from tidepool.deploy.cluster_secret import forget, with_local_secret
from tidepool.prefill_node.node import build_node as build_prefill
from tidepool.transfer.control import ControlLoop
from tidepool.transfer.curve import cluster_keys
from tidepool.transfer.node import Node
from tidepool.transfer.session import Peer

HOST = "127.0.0.1"
TIMEOUT_S = 60.0


class FrontStub:
    """A front's side of the control plane: gathers tokens and ends, and waits for them.

    Within one session nothing may be missing and nothing comes twice. What was on its way when a
    session ended is lost, and asked for again, as a front does (deploy/front/attempt.py).

    Args:
        ask: sends (request id, next index) to decode as Resume.
    """

    def __init__(self, ask: Callable[[str, int], None]) -> None:
        self._ask = ask
        self._num_sessions: Counter[tuple[str, int]] = Counter()
        """Of each incarnation of a node."""
        self._whole_in: dict[str, tuple[str, int, int]] = {}
        """The session in which a request's last token came with nothing missing before it."""
        self._asked: set[str] = set()
        self.changed = threading.Condition()
        self.up: set[str] = set()
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.logprobs: dict[str, list[wire.TokenLogprob | None]] = defaultdict(list)
        self.finishes: dict[str, wire.Finish] = {}
        self._ended: set[tuple[str, wire.Role]] = set()

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        with self.changed:
            if isinstance(message, wire.Tokens):
                self._extend(peer, message)
            elif isinstance(message, wire.Finish) and not self._is_ahead(
                peer, message.request_id, message.num_tokens
            ):
                self._finish(peer, message)
            self.changed.notify_all()
        return True

    def _extend(self, peer: Peer, message: wire.Tokens) -> None:
        request_id = message.request_id
        if self._is_ahead(peer, request_id, message.first_index):
            return
        output = self.tokens[request_id]
        num_known = len(output) - message.first_index
        assert not num_known or request_id in self._asked, f"{request_id}: tokens came twice"
        fresh = message.tokens[num_known:]
        output.extend(token.token_id for token in fresh)
        self.logprobs[request_id] += [token.logprob for token in fresh]
        self._whole_in[request_id] = self._session(peer)

    def _session(self, peer: Peer) -> tuple[str, int, int]:
        return peer.node_id, peer.epoch, self._num_sessions[peer.node_id, peer.epoch]

    def _is_ahead(self, peer: Peer, request_id: str, num_tokens: int) -> bool:
        """Whether tokens before this many are missing: then they are asked for, and all behind."""
        num_received = len(self.tokens[request_id])
        if num_tokens <= num_received:
            return False
        whole_in = self._whole_in.get(request_id, (peer.node_id, peer.epoch, 1))
        assert whole_in != self._session(peer), f"{request_id}: tokens are missing in a session"
        self._asked.add(request_id)
        self._ask(request_id, num_received)
        return True

    def _finish(self, peer: Peer, message: wire.Finish) -> None:
        """Each node ends a request once; as for a front, decode's word counts once it has it.

        Where a session breaks between the last chunk and CommitAck, decode runs the request while
        prefill cannot know that and calls it failed.
        """
        ended = (message.request_id, peer.role)
        if message.request_id in self._asked and self.finishes.get(message.request_id) == message:
            return  # it comes again with the tokens that were asked for
        assert ended not in self._ended, f"{message.request_id} ended twice on {peer.node_id}"
        self._ended.add(ended)
        is_doubt = peer.role == "prefill" and message.can_retry
        other = self.finishes.get(message.request_id)
        # Of two ends one must be prefill's doubt: nobody else may end what has ended.
        was_doubt = peer.role == "decode" and other is not None and other.can_retry
        assert other is None or is_doubt or was_doubt, f"{message.request_id} ended twice"
        if not (is_doubt and (self.tokens[message.request_id] or other is not None)):
            self.finishes[message.request_id] = message

    def on_peer_up(self, peer: Peer) -> None:
        with self.changed:
            self.up.add(peer.node_id)
            self._num_sessions[peer.node_id, peer.epoch] += 1
            for request_id, (node_id, epoch, _) in self._whole_in.items():
                is_open = request_id not in self.finishes
                if is_open and (node_id, epoch) == (peer.node_id, peer.epoch):
                    self._asked.add(request_id)
                    self._ask(request_id, len(self.tokens[request_id]))
            self.changed.notify_all()

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        with self.changed:
            self.up.discard(peer.node_id)

    def on_tick(self, now_s: float) -> None:
        return


class Pair:
    """The two nodes and the stub front."""

    def __init__(self, prefill: Node, decode: Node, control: ControlLoop, front: FrontStub) -> None:
        self.prefill = prefill
        self.decode = decode
        self.control = control
        self.front = front
        self._count = 0

    def submit(self, request_id: str, prompt: list[int], **sampling: Any) -> None:
        """Greedy unless `sampling` says otherwise."""
        self.control.send(
            self.prefill.control.node_id,
            wire.Submit(
                request_id=request_id,
                attempt=0,
                prompt_token_ids=tuple(prompt),
                sampling=wire.Sampling(**{"temperature": 0.0, **sampling}),
                front_id=self.control.node_id,
                decode_id=self.decode.control.node_id,
                decode_address=self.decode.control.address,
            ),
        )

    def cancel(self, request_id: str) -> None:
        for node in (self.prefill, self.decode):
            self.control.send(node.control.node_id, wire.Cancel(request_id, 0, "test"))

    def wait(self, request_ids: list[str], timeout_s: float = TIMEOUT_S) -> None:
        with self.front.changed:
            done = self.front.changed.wait_for(
                lambda: all(request_id in self.front.finishes for request_id in request_ids),
                timeout_s,
            )
        missing = [r for r in request_ids if r not in self.front.finishes]
        assert done, f"{missing} did not end in {timeout_s} s"

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
        ids = []
        for prompt in prompts:
            ids.append(f"p{self._count}")
            self._count += 1
            self.submit(ids[-1], prompt, **sampling)
        self.wait(ids)
        failed = [self.front.finishes[r] for r in ids if self.front.finishes[r].reason == "error"]
        assert not failed, failed
        return [self.front.tokens[request_id] for request_id in ids]

    def stats(self) -> dict[str, float]:
        return {**self.prefill.audit()["stats"], **self.decode.audit()["stats"]}

    def assert_settles_empty(self) -> None:
        """All pools are as full as at the start, soon."""
        deadline_s = time.monotonic() + TIMEOUT_S / 4
        pools = ("device_pages", "host_pages", "index_pages", "seats")
        while True:
            stats = self.stats()
            held = {p: stats[f"{p}_total"] - stats[f"{p}_free"] for p in pools}
            if not any(held.values()):
                return
            assert time.monotonic() < deadline_s, f"still held: {held}"
            time.sleep(0.02)


@contextmanager
def pd_pair(config: Config) -> Iterator[Pair]:
    fatal: list[BaseException] = []
    config, secret = with_local_secret(config)
    prefill = build_prefill(config, node_id="prefill-0", bind_host=HOST, on_fatal=fatal.append)
    decode = build_decode(config, node_id="decode-0", bind_host=HOST, on_fatal=fatal.append)
    control = ControlLoop(
        "front-0",
        "front",
        time.time_ns(),
        bind_host=HOST,
        config=config.transfer,
        keys=cluster_keys(config.cluster),
    )
    front = FrontStub(
        lambda request_id, next_index: control.send(
            decode.control.node_id, wire.Resume(request_id, 0, next_index, control.node_id)
        )
    )
    try:
        prefill.start()
        decode.start()
        control.start(front)
        for node in (prefill, decode):
            control.connect(node.control.node_id, node.control.address)
        with front.changed:
            assert front.changed.wait_for(lambda: len(front.up) == 2, TIMEOUT_S / 4)
        yield Pair(prefill, decode, control, front)
    finally:
        control.stop()
        prefill.stop()
        decode.stop()
        forget(secret)
    assert not fatal, fatal
