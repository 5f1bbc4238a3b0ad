"""Engines without processes: a unified node stepped by hand, with every pool poisoned and checked.

    node = UnifiedHarness(path, **{"decode.hot_rows": 16, "kv.page_size": 4})
    tokens = node.generate([prompt], max_tokens=32)

Freed pages are overwritten with NaN bytes and all invariants are checked after every step, so that
a read of freed or stale memory shows.
"""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from tidepool.common.clock import FakeClock
from tidepool.common.config import Config, resolve
from tidepool.common.wire import Cancel, Finish, Message, OutputToken, Sampling, Submit, Tokens
from tidepool.decode_node import build as decode_build
from tidepool.deploy.unified import LocalHandoff
from tidepool.model.runtime import load_runtime
from tidepool.prefill_node import build as prefill_build

EXACT = {
    "kv.layout": "mla_fp32",
    "kv.index_layout": "index_fp32",
    "kv.page_size": 16,
    "model.dtype": "float32",
    "model.device": "cpu",
    "model.strict_norm_eps": True,
    "prefill.pool_tokens": 2048,
    "decode.host_tokens": 4096,
    "decode.index_tokens": 4096,
    "decode.seats": 4,
    "decode.hot_rows": 0,
}
"""Everything in fp32, norms as transformers has them, the whole context resident."""


def exact_config(path: Path | str, **overrides: Any) -> Config:
    return resolve(None, {"model.path": str(path), **EXACT, **overrides}).config


class UnifiedHarness:
    """A unified node's two engines on the test's own thread."""

    def __init__(self, path: Path | str, **overrides: Any) -> None:
        self.config = exact_config(path, **overrides)
        runtime = load_runtime(self.config)
        self.runtime = runtime
        self.clock = FakeClock()
        self.inbox: deque[object] = deque()
        self.pool = prefill_build.build_pool(self.config, runtime.geometry, runtime.device)
        self.decode = decode_build.build_engine(
            self.config,
            runtime.model,
            runtime.geometry,
            runtime.device,
            send=self._send,
            clock=self.clock,
        )
        self.handoff = LocalHandoff(self.decode, self.pool, self.inbox.append)
        self.prefill = prefill_build.build_engine(
            self.config,
            runtime.model,
            runtime.geometry,
            self.pool,
            handoff=self.handoff,
            send=self._send,
        )
        coordinator = self.decode.coordinator
        self.pool.pages.on_free = self.pool.poison
        coordinator.host.pages.on_free = coordinator.host.poison
        coordinator.index.pages.on_free = coordinator.index.poison
        self.tokens: dict[tuple[str, int], list[OutputToken]] = defaultdict(list)
        self.finishes: dict[tuple[str, int], Finish] = {}

    def submit(self, request_id: str, prompt: list[int], **sampling: Any) -> None:
        options = {"temperature": 0.0, **sampling}
        self.inbox.append(
            Submit(
                request_id=request_id,
                attempt=0,
                prompt_token_ids=tuple(prompt),
                sampling=Sampling(**options),
                front_id="front-0",
            )
        )

    def cancel(self, request_id: str) -> None:
        self.inbox.append(Cancel(request_id, 0, "test"))

    def step(self) -> bool:
        """One turn of the step loop."""
        self.clock.advance(0.01)
        engines = (self.prefill, self.handoff, self.decode)
        while self.inbox:
            event = self.inbox.popleft()
            for engine in engines:
                if engine.handle(event):
                    break
        busy = [engine.step() for engine in engines]
        self.prefill.check_invariants()
        self.decode.check_invariants()
        return any(busy) or bool(self.inbox)

    def run(self, max_steps: int = 100_000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(max_steps):
            if not self.step() and self.prefill.is_idle and self.decode.is_idle:
                return
        raise AssertionError(f"not idle after {max_steps} steps")

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
        """Runs all prompts together; returns the output token ids of each."""
        for number, prompt in enumerate(prompts):
            self.submit(f"r{number}-{len(self.finishes)}", prompt, **sampling)
        before = len(self.finishes)
        ids = [f"r{number}-{before}" for number in range(len(prompts))]
        self.run()
        return [self.output(request_id) for request_id in ids]

    def output(self, request_id: str) -> list[int]:
        return [token.token_id for token in self.tokens[(request_id, 0)]]

    def finish(self, request_id: str) -> Finish:
        return self.finishes[(request_id, 0)]

    def assert_empty(self) -> None:
        """Every pool is as full as at the start."""
        coordinator = self.decode.coordinator
        for pages in (self.pool.pages, coordinator.host.pages, coordinator.index.pages):
            assert pages.num_free == pages.num_total
        assert coordinator.seats.num_free == coordinator.seats.num_seats
        assert coordinator.admission.num_admitted == 0

    def _send(self, node_id: str, message: Message) -> None:
        assert node_id == "front-0"
        if isinstance(message, Tokens):
            output = self.tokens[(message.request_id, message.attempt)]
            assert message.first_index == len(output)
            output.extend(message.tokens)
        elif isinstance(message, Finish):
            key = (message.request_id, message.attempt)
            assert key not in self.finishes, f"{key} ended twice"
            self.finishes[key] = message
