"""One run of a request on one route: merges what decode sends into tokens without gap or repeat.

Owned by FrontRequest (request.py). Tokens carry a running index within the attempt: known ones are
dropped, a jump ahead opens a gap which only `Tokens` from the missing index closes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...common import wire
from ...common.config import Config
from .nodes import NodeInfo
from .router import Route


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long and how often; from the config.

    Attributes:
        first_token_s: silence allowed before an attempt's first token (queue, prefill, hand-off).
        stall_s: silence allowed behind it.
        progress_s: time without a new token allowed to a node that does answer.
        gap_s: time in which missing tokens must arrive.
        probe_s: silence after which decode is asked to repeat what may have been lost.
        resend_interval_s: pause between two questions for missing tokens.
        reconnect_s: time a decode node whose session broke has to come back with its requests.
        reattach_s: the same for the next process of one that was killed; 0: it cannot go on with them.
    """

    max_attempts: int
    node_wait_s: float
    recovery_wait_s: float
    first_token_s: float
    stall_s: float
    progress_s: float
    gap_s: float
    probe_s: float
    resend_interval_s: float
    reconnect_s: float
    reattach_s: float

    @classmethod
    def of(cls, config: Config) -> Bounds:
        front, transfer = config.front, config.transfer
        return cls(
            max_attempts=front.max_attempts,
            node_wait_s=front.node_wait_s,
            recovery_wait_s=front.recovery_wait_s,
            first_token_s=transfer.deadline_s + front.stall_s,
            stall_s=front.stall_s,
            progress_s=10 * front.stall_s,
            gap_s=6 * transfer.resend_interval_s,
            probe_s=4 * transfer.resend_interval_s,
            resend_interval_s=transfer.resend_interval_s,
            reconnect_s=transfer.heartbeat_timeout_s / 2,
            reattach_s=config.decode.reattach_wait_s if config.decode.reattach else 0.0,
        )


@dataclass(slots=True)
class Attempt:
    """State of one run.

    Attributes:
        number: counts from 1.
        next_index: tokens received; index of the next one.
        heard_s: when decode last sent anything for it (at first: when it was submitted).
        token_s: when the last new token came.
        finish: the end decode told, perhaps ahead of the last tokens.
        gap_since_s: since when tokens are known to be missing; None if none are.
        cut_since_s: since when there is no session with decode; None while there is one.
        cut_for_s: how long that may last.
    """

    number: int
    route: Route
    heard_s: float
    token_s: float
    next_index: int = 0
    finish: wire.Finish | None = None
    gap_since_s: float | None = None
    cut_since_s: float | None = None
    cut_for_s: float = 0.0
    asked_s: float = float("-inf")

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """Nodes it needs now: prefill has done its part once decode sends tokens."""
        if self.next_index > 0 or self.route.is_unified:
            return (self.route.decode,)
        return (self.route.prefill, self.route.decode)

    def needs(self, node_id: str, epoch: int) -> bool:
        return any(node.node_id == node_id and node.epoch == epoch for node in self.nodes)

    def cut(self, for_s: float, now_s: float) -> None:
        """There is no session with decode, and there may be none for so long."""
        self.cut_since_s = now_s
        self.cut_for_s = for_s

    def end_cut(self, now_s: float) -> None:
        """A session is up again; what was missing before must come from now on."""
        self.cut_since_s = None
        if self.gap_since_s is not None:
            self.gap_since_s = now_s

    def follow(self, decode: NodeInfo, for_s: float, now_s: float) -> None:
        """Decode has another process, which may go on with this attempt."""
        self.route = Route(self.route.prefill, decode)
        self.cut(for_s, now_s)

    def merge(self, message: wire.Tokens, now_s: float) -> tuple[wire.OutputToken, ...]:
        """Returns the tokens of `message` that are new and next in line."""
        self.heard_s = now_s
        known = self.next_index - message.first_index
        fresh = message.tokens[known:] if known >= 0 else ()
        if fresh:
            self.next_index += len(fresh)
            self.token_s = now_s
        self._note_gap(message.first_index if known < 0 else 0, now_s)
        return fresh

    def end(self, finish: wire.Finish, now_s: float) -> None:
        """Notes that decode ended the attempt after `finish.num_tokens` tokens."""
        self.heard_s = now_s
        self.finish = finish
        self._note_gap(finish.num_tokens, now_s)

    @property
    def is_complete(self) -> bool:
        return self.finish is not None and self.next_index >= self.finish.num_tokens

    def should_ask(self, bounds: Bounds, now_s: float) -> bool:
        """Whether decode should be asked (again) for tokens from `next_index`."""
        if self.gap_since_s is not None:
            return now_s - self.asked_s >= bounds.resend_interval_s
        if self.next_index == 0:
            return False
        return now_s - max(self.heard_s, self.asked_s) >= bounds.probe_s

    def fault(self, bounds: Bounds, now_s: float) -> str | None:
        """Returns which bound is broken: "cut", "gap", "stall", or None."""
        if self.cut_since_s is not None:
            return "cut" if now_s - self.cut_since_s > self.cut_for_s else None
        if self.gap_since_s is not None and now_s - self.gap_since_s > bounds.gap_s:
            return "gap"
        silence = bounds.stall_s if self.next_index else bounds.first_token_s
        if now_s - self.heard_s > silence or now_s - self.token_s > bounds.progress_s + silence:
            return "stall"
        return None

    def _note_gap(self, first_seen: int, now_s: float) -> None:
        """Tokens from `next_index` up to `first_seen` are known to exist and not here."""
        expected = max(first_seen, self.finish.num_tokens if self.finish else 0)
        if expected <= self.next_index:
            self.gap_since_s = None
        elif self.gap_since_s is None:
            self.gap_since_s = now_s
