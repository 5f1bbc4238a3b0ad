"""A unified node without processes or sockets, stepped by its caller: for scripts and tests.

node = LocalNode(config)
node.submit("r", prompt, Sampling(max_tokens=32, temperature=0.0))
node.run()
tokens = node.output("r")
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import torch

from ..common.clock import FakeClock
from ..common.config import Config
from ..common.errors import InvariantError
from ..common.wire import AnyMessage, Cancel, Finish, OutputToken, Sampling, Submit, Tokens
from ..decode_node import build as decode_build
from ..decode_node.journal import SequenceLog
from ..hostpool.segment import SharedSegment
from ..model.runtime import Runtime, load_runtime
from ..prefill_node import build as prefill_build
from .unified import LocalHandoff

FRONT_ID = "front-0"
STEP_S = 0.01
"""What a step counts for on the node's clock, which only orders arrivals here."""


class LocalNode:
    """Prefill engine, hand-off and decode engine on the caller's thread.

    Args:
        segment, journal: of a decode engine whose memory outlives it (decode_node/kept.py).

    Attributes:
        tokens, finishes: what a front would have been sent, by request id.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime | None = None,
        *,
        segment: SharedSegment | None = None,
        journal: SequenceLog | None = None,
    ) -> None:
        self.runtime = runtime or load_runtime(config)
        self.inbox: deque[object] = deque()
        self.clock = FakeClock()
        geometry, device = self.runtime.geometry, self.runtime.device
        self.pool = prefill_build.build_pool(config, geometry, device)
        coordinator = decode_build.build_coordinator(
            config, self.runtime.model.config, geometry, device, segment
        )
        self.decode = decode_build.build_engine(
            config,
            self.runtime.model,
            coordinator,
            send=self._send,
            clock=self.clock,
            journal=journal,
        )
        self.handoff = LocalHandoff(self.decode, self.pool, self.inbox.append)
        self.prefill = prefill_build.build_engine(
            config,
            self.runtime.model,
            geometry,
            self.pool,
            handoff=self.handoff,
            send=self._send,
        )
        self.tokens: dict[str, list[OutputToken]] = defaultdict(list)
        self.finishes: dict[str, Finish] = {}

    def submit(self, request_id: str, prompt: Sequence[int], sampling: Sampling) -> None:
        self.inbox.append(Submit(request_id, 0, tuple(prompt), sampling, FRONT_ID))

    def cancel(self, request_id: str) -> None:
        self.inbox.append(Cancel(request_id, 0, "cancelled by the caller"))

    def step(self) -> bool:
        """One turn of the step loop; False if there was nothing to do."""
        self.clock.advance(STEP_S)
        engines = (self.prefill, self.handoff, self.decode)
        while self.inbox:
            event = self.inbox.popleft()
            any(engine.handle(event) for engine in engines)
        busy = [engine.step() for engine in engines]
        return any(busy) or bool(self.inbox)

    def run(self, max_steps: int = 1_000_000) -> None:
        """Steps until every request has ended; InvariantError after `max_steps`."""
        for _ in range(max_steps):
            if not self.step() and self.prefill.is_idle and self.decode.is_idle:
                return
        raise InvariantError(f"requests are left after {max_steps} steps")

    def close(self) -> None:
        """Unpins the host pool; nothing may run any more. Needed on a GPU only."""
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
        self.decode.coordinator.host.close()

    def output(self, request_id: str) -> list[int]:
        """Output token ids."""
        return [token.token_id for token in self.tokens[request_id]]

    def check_invariants(self) -> None:
        self.prefill.check_invariants()
        self.decode.check_invariants()

    def _send(self, node_id: str, message: AnyMessage) -> None:
        if isinstance(message, Tokens):
            output = self.tokens[message.request_id]
            if message.first_index != len(output):
                raise InvariantError(
                    f"{message.request_id}: token {message.first_index} is not next"
                )
            output.extend(message.tokens)
        elif isinstance(message, Finish):
            if message.request_id in self.finishes:
                raise InvariantError(f"{message.request_id} ended twice")
            self.finishes[message.request_id] = message
