"""A cluster without nodes: a control plane that plays prefill and decode by a script.

`FakeControl` answers each Submit with what `script` returns; tokens are a pure function of (seed,
position), so a re-submitted request must continue exactly. Steps are played by `play` (in the
caller's thread) or, after `start_thread`, by a thread of its own, as the I/O thread would.
"""

from __future__ import annotations

import codecs
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidepool.common import wire
from tidepool.common.config import Config, parse
from tidepool.common.errors import RequestError
from tidepool.deploy.front.nodes import NodeInfo
from tidepool.deploy.front.ports import ModelLimits
from tidepool.deploy.front.server import FrontServer, ThreadedServer

EOS = 256
VOCAB = 260
MAX_CONTEXT = 512
MODEL = ModelLimits("toy", VOCAB, MAX_CONTEXT, (EOS,))


def node(node_id: str, role: str, epoch: int = 1, max_context: int = MAX_CONTEXT) -> NodeInfo:
    return NodeInfo(
        node_id, role, epoch, f"tcp://fake/{node_id}", max_context, "host", 7, {"hot_hits": 3}
    )


PAIR = [node("prefill-0", "prefill"), node("decode-0", "decode")]
TWO_PAIRS = [*PAIR, node("prefill-1", "prefill"), node("decode-1", "decode")]


def make_config(**sections: dict[str, Any]) -> Config:
    front = {
        "port": 0,
        "node_wait_s": 0.5,
        "recovery_wait_s": 2.0,
        "stall_s": 1.0,
        **sections.pop("front", {}),
    }
    transfer = {"resend_interval_s": 0.1, "deadline_s": 2.0, **sections.pop("transfer", {})}
    decode = {"reattach_wait_s": 0.6, **sections.pop("decode", {})}
    return parse({"front": front, "transfer": transfer, "decode": decode, **sections})


class ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """Tokens are bytes; 256 is the end."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")

    def decoder(self) -> ByteDecoder:
        return ByteDecoder()

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> list[int]:
        if "refuse" in kwargs:
            raise RequestError("the template refuses", code="template_error", param="messages")
        text = "".join(f"<{m['role']}>{m.get('content') or ''}" for m in messages)
        return self.encode(("T" if tools else "") + text + "<assistant>")


def letter(seed: int, position: int) -> int:
    """The token the fake model gives at a position of the sequence."""
    return ord("a") + (seed + 7 * position) % 26


def letters(seed: int, prompt: int, count: int) -> list[int]:
    return [letter(seed, prompt + i) for i in range(count)]


@dataclass(frozen=True)
class FakePeer:
    node_id: str
    epoch: int


@dataclass
class Step:
    """One thing a node does: a message from `sender`, or an action of the fake."""

    sender: str = ""
    message: Any = None
    action: Callable[[], None] | None = None
    delay_s: float = 0.0


def output(submit: wire.Submit, decode_id: str, *, delay_s: float = 0.0) -> list[Step]:
    """All tokens of an attempt, one a message, then Finish."""
    steps = []
    sampling = submit.sampling
    for index, token_id in enumerate(
        letters(sampling.seed, len(submit.prompt_token_ids), sampling.max_tokens)
    ):
        steps.append(Step(decode_id, tokens_of(submit, index, [token_id]), delay_s=delay_s))
    steps.append(Step(decode_id, finish_of(submit, sampling.max_tokens)))
    return steps


def tokens_of(submit: wire.Submit, first_index: int, ids: Sequence[int]) -> wire.Tokens:
    wants = submit.sampling.logprobs
    best = tuple(range(97, 97 + max(0, wants)))
    found = wire.TokenLogprob(-0.5, best, tuple(-1.0 - i for i in range(len(best))))
    tokens = tuple(wire.OutputToken(i, found if wants >= 0 else None) for i in ids)
    return wire.Tokens(submit.request_id, submit.attempt, first_index, tokens)


def finish_of(
    submit: wire.Submit, num_tokens: int, reason: str = "length", **fields: Any
) -> wire.Finish:
    return wire.Finish(submit.request_id, submit.attempt, reason, num_tokens, **fields)


Script = Callable[[wire.Submit, str], list[Step]]


@dataclass
class FakeControl:
    """See the module. `script(submit, decode_id)` says what happens after a Submit."""

    script: Script = output
    handler: Any = None
    sent: list[tuple[str, Any]] = field(default_factory=list)
    live: dict[str, int] = field(default_factory=dict)
    connected: dict[str, str] = field(default_factory=dict)
    fenced: list[tuple[str, int]] = field(default_factory=list)
    steps: deque[Step] = field(default_factory=deque)
    cancelled: set[tuple[str, int]] = field(default_factory=set)
    _wake: queue.Queue[bool] = field(default_factory=queue.Queue)
    _thread: threading.Thread | None = None

    def start(self, handler: Any) -> None:
        self.handler = handler

    def start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._wake.put(False)
            self._thread.join(timeout_s)
            self._thread = None

    def connect(self, node_id: str, address: str) -> None:
        self.connected[node_id] = address

    def disconnect(self, node_id: str) -> None:
        self.connected.pop(node_id, None)

    def fence(self, node_id: str, epoch: int) -> None:
        self.fenced.append((node_id, epoch))

    def send(self, node_id: str, message: Any) -> None:
        self.sent.append((node_id, message))
        if isinstance(message, wire.Cancel):
            self.cancelled.add((message.request_id, message.attempt))
        if isinstance(message, wire.Submit) and node_id in self.live:
            self.steps.extend(self.script(message, message.decode_id or node_id))
            self._wake.put(True)

    def up(self, node_id: str, epoch: int = 1) -> None:
        self.live[node_id] = epoch
        self.handler.on_peer_up(FakePeer(node_id, epoch))

    def down(self, node_id: str, reason: str = "silent") -> None:
        epoch = self.live.pop(node_id)
        self.handler.on_peer_down(FakePeer(node_id, epoch), reason)

    def say(self, node_id: str, message: Any) -> None:
        if node_id in self.live:
            self.handler.on_message(FakePeer(node_id, self.live[node_id]), message)

    def messages(self, kind: type) -> list[tuple[str, Any]]:
        return [(node_id, message) for node_id, message in self.sent if isinstance(message, kind)]

    def play(self, count: int = 1_000_000) -> None:
        """Plays up to `count` steps in this thread."""
        while self.steps and count:
            step = self.steps.popleft()
            count -= 1
            if step.delay_s:
                time.sleep(step.delay_s)
            if step.action is not None:
                step.action()
            elif (step.message.request_id, step.message.attempt) not in self.cancelled:
                self.say(step.sender, step.message)

    def _run(self) -> None:
        while self._wake.get():
            self.play()


def bring_up(control: FakeControl, infos: list[NodeInfo]) -> None:
    for info in infos:
        control.up(info.node_id, info.epoch)


class RunningFront:
    """A whole front over the fake cluster, on a real port; a context manager."""

    def __init__(self, script: Script = output, infos: list[NodeInfo] = PAIR, **sections: Any):
        self.control = FakeControl(script)
        patient = {"stall_s": 10.0, "node_wait_s": 5.0, **sections.pop("front", {})}
        server = FrontServer(
            make_config(front=patient, **sections), ByteTokenizer(), MODEL, self.control
        )
        self.service = server.service
        self._threaded = ThreadedServer(server)
        self._infos = infos

    def __enter__(self) -> RunningFront:
        self.url = self._threaded.start()
        self.control.start_thread()
        self.update_nodes(self._infos)
        bring_up(self.control, self._infos)
        self.wait_for(lambda: not self.service.missing_roles or not self._infos)
        return self

    def __exit__(self, *_: object) -> None:
        self._threaded.stop()

    def update_nodes(self, infos: list[NodeInfo]) -> None:
        self._threaded.update_nodes(infos)

    def drain(self, timeout_s: float) -> bool:
        return self._threaded.drain(timeout_s)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "the condition never came true"
            time.sleep(0.005)

    def assert_idle(self) -> None:
        """Nothing of any call is left."""
        self.wait_for(lambda: self.service.slots.num_used == 0)
        self.wait_for(lambda: self.service.num_live == 0)
        assert all(node.in_flight == 0 for node in self.service.nodes)
