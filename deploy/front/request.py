"""The life of one request at the front: attempts, received tokens, and why it ended.

Pure: every event returns the messages to send. The dispatcher calls it on the asyncio loop. What
always holds: `tokens` grows one index at a time and never changes behind; at most one attempt
runs; an ended request has either a finish reason or an error and sends nothing any more.

| state   | event                             | next                                    |
|---------|-----------------------------------|-----------------------------------------|
| WAITING | a route is found: `submit`        | RUNNING                                 |
| WAITING | its wait is over                  | ENDED (503)                             |
| RUNNING | Finish, and all its tokens are in | ENDED                                   |
| RUNNING | node lost, failure, silence, gap  | WAITING, or ENDED after `max_attempts`  |
| RUNNING | decode is restarted               | RUNNING, if its next process has it     |
| any     | `stop`, `fail`                    | ENDED                                   |

A new attempt gets the prompt plus the tokens received so far and what is left of the limits.
Sampling is keyed by (seed, position), so it continues as the lost one would have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import msgspec

from ...common import wire
from ...common.errors import InvariantError, RequestError
from ...transfer.session import Broken
from .attempt import Attempt, Bounds
from .nodes import NodeInfo
from .ports import ModelLimits
from .router import Route

RETRY_PAUSE_S = 0.2
"""Pause before a node that failed a request is asked again; times the number of attempts."""

HANDOFF_FAILED = "handoff_failed"
"""Code of the error with which either end of a hand-off reports that it did not come about."""

LossKind = Literal["node_lost", "node_error", "stall", "gap", "bad_token"]
_LOSS_OF_FAULT: dict[str, LossKind] = {"cut": "node_lost", "gap": "gap", "stall": "stall"}
EndReason = Literal["stop", "length"]


class RequestState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


_LEGAL = {
    RequestState.WAITING: {RequestState.RUNNING, RequestState.ENDED},
    RequestState.RUNNING: {RequestState.WAITING, RequestState.ENDED},
    RequestState.ENDED: set[RequestState](),
}


@dataclass(frozen=True, slots=True)
class Send:
    """A message to hand to the control plane."""

    node_id: str
    message: wire.Submit | wire.Resume | wire.Cancel


class FrontRequest:
    """One prompt and its one output.

    Attributes:
        tokens: output tokens received so far, over all attempts.
        attempts: attempts submitted so far.
        avoid: nodes that failed this request; used again only if there is no other.
        losses: why each lost attempt was lost.
        finish_reason: "stop" or "length" once it ended well.
        error: what the client is told if it ended badly.
        first_token_s, last_token_s: when tokens came, for the metrics.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: tuple[int, ...],
        sampling: wire.Sampling,
        *,
        front_id: str,
        model: ModelLimits,
        bounds: Bounds,
        now_s: float,
        notify: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self.tokens: list[wire.OutputToken] = []
        self.attempts = 0
        self.avoid: set[str] = set()
        self.losses: list[LossKind] = []
        self.finish_reason: EndReason | None = None
        self.error: RequestError | None = None
        self.created_s = now_s
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.state = RequestState.WAITING
        self._front_id = front_id
        self._model = model
        self._bounds = bounds
        self._notify = notify
        self._attempt: Attempt | None = None
        self._waiting_since_s = now_s
        self._last_failure: RequestError | None = None

    @property
    def is_ended(self) -> bool:
        return self.state is RequestState.ENDED

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Nodes it occupies now."""
        return tuple(node.node_id for node in self._attempt.nodes) if self._attempt else ()

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt length of the next attempt."""
        return len(self.prompt_token_ids) + len(self.tokens)

    @property
    def num_total_tokens(self) -> int:
        """Longest the sequence can become."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens

    def may_use(self, route: Route, now_s: float) -> bool:
        """False while a node that failed the request is given a pause."""
        pause = RETRY_PAUSE_S * self.attempts if route.uses(self.avoid) else 0.0
        return now_s - self._waiting_since_s >= pause

    def submit(self, route: Route, now_s: float) -> list[Send]:
        """Starts the next attempt on `route`."""
        self._advance(RequestState.RUNNING)
        self.attempts += 1
        self._attempt = Attempt(self.attempts, route, heard_s=now_s, token_s=now_s)
        done = len(self.tokens)
        sampling = msgspec.structs.replace(
            self.sampling,
            max_tokens=self.sampling.max_tokens - done,
            min_tokens=max(0, self.sampling.min_tokens - done),
        )
        message = wire.Submit(
            request_id=self.request_id,
            attempt=self.attempts,
            prompt_token_ids=self.prompt_token_ids + tuple(t.token_id for t in self.tokens),
            sampling=sampling,
            front_id=self._front_id,
            decode_id="" if route.is_unified else route.decode.node_id,
            decode_address="" if route.is_unified else route.decode.address,
        )
        return [Send(route.prefill.node_id, message)]

    def expects(self, message: wire.Tokens | wire.Finish, node_id: str, epoch: int) -> bool:
        """Whether a message of that incarnation is for the running attempt.

        Tokens come from decode alone; the end of an attempt from any node it still needs.
        """
        running = self._attempt
        if running is None or running.number != message.attempt:
            return False
        if isinstance(message, wire.Finish):
            return running.needs(node_id, epoch)
        decode = running.route.decode
        return (decode.node_id, decode.epoch) == (node_id, epoch)

    def on_tokens(self, message: wire.Tokens, now_s: float) -> list[Send]:
        """Takes output tokens of the running attempt (see `expects`)."""
        attempt = self._running()
        fresh = attempt.merge(message, now_s)[: self.sampling.max_tokens - len(self.tokens)]
        bad = [t.token_id for t in fresh if not 0 <= t.token_id < self._model.vocab_size]
        if bad:
            decode_id = attempt.route.decode.node_id
            return self._lose("bad_token", f"{decode_id} sent token {bad[0]}", now_s, {decode_id})
        if fresh:
            self._take(fresh, now_s)
        if attempt.is_complete or len(self.tokens) >= self.sampling.max_tokens:
            return self._settle()
        return self._ask(now_s)

    def on_finish(self, message: wire.Finish, now_s: float) -> list[Send]:
        """The running attempt ended at its node (see `expects`)."""
        attempt = self._running()
        if message.reason in ("error", "cancelled"):
            return self._fail_attempt(message, now_s)
        attempt.end(message, now_s)
        return self._settle() if attempt.is_complete else self._ask(now_s)

    def on_lost(self, node_id: str, epoch: int, reason: str, now_s: float) -> list[Send]:
        """An incarnation is gone; the attempt is lost if it still needed it."""
        if self._attempt is None or not self._attempt.needs(node_id, epoch):
            return []
        return self._lose("node_lost", f"{node_id} is gone: {reason}", now_s, {node_id})

    def on_cut(self, node_id: str, epoch: int, reason: str, now_s: float) -> list[Send]:
        """The session with an incarnation is gone; it may live. Decode gets `reconnect_s` to come
        back, because it keeps what it has sent, and if its process seems to be gone and not its
        machine, the next one gets `reattach_s`; a prefill node may have missed the Submit."""
        attempt = self._attempt
        if attempt is None or attempt.next_index == 0:
            return self.on_lost(node_id, epoch, reason, now_s)
        if attempt.needs(node_id, epoch):
            is_killed = isinstance(reason, Broken) and attempt.route.decode.role == "decode"
            reattach_s = self._bounds.reattach_s if is_killed else 0.0
            attempt.cut(max(self._bounds.reconnect_s, reattach_s), now_s)
        return []

    def on_replaced(self, old_epoch: int, info: NodeInfo, now_s: float) -> list[Send]:
        """An incarnation has a successor. One of decode may have the attempt: it is asked."""
        attempt = self._attempt
        if attempt is None or not attempt.needs(info.node_id, old_epoch):
            return []
        reattach_s = self._bounds.reattach_s if info.role == "decode" else 0.0
        if attempt.next_index == 0 or not reattach_s:
            reason = f"restarted (epoch {old_epoch} is now {info.epoch})"
            return self.on_lost(info.node_id, old_epoch, reason, now_s)
        attempt.follow(info, reattach_s, now_s)
        return []

    def on_back(self, node_id: str, epoch: int, now_s: float) -> list[Send]:
        """The session with that incarnation is up again: it repeats what was lost."""
        attempt = self._attempt
        if attempt is None or attempt.cut_since_s is None or not attempt.needs(node_id, epoch):
            return []
        attempt.end_cut(now_s)
        return self._resume(now_s)

    def on_unsent(self, reason: str, now_s: float) -> None:
        """The control plane did not take the Submit: the attempt has not begun anywhere."""
        self._lose("node_lost", reason, now_s, set())

    def on_tick(self, now_s: float) -> list[Send]:
        """Keeps every wait bounded; called several times a second."""
        if self.state is RequestState.WAITING:
            bounds = self._bounds
            wait_s = bounds.recovery_wait_s if self.attempts else bounds.node_wait_s
            if now_s - self._waiting_since_s > wait_s:
                self._finish_with(self._last_failure or _no_node())
            return []
        if self._attempt is None:
            return []
        fault = self._attempt.fault(self._bounds, now_s)
        if fault is None:
            return self._ask(now_s)
        kind: LossKind = _LOSS_OF_FAULT[fault]
        decode_id = self._attempt.route.decode.node_id
        return self._lose(kind, f"no tokens from {decode_id} ({fault})", now_s, set(self.node_ids))

    def stop(self) -> list[Send]:
        """The output is complete for the front: a stop string was found."""
        sends = self._cancels("stop string")
        self.finish_reason = "stop"
        self._end()
        return sends

    def fail(self, error: RequestError) -> list[Send]:
        """Ends the request from outside: the client is gone, or the front stops."""
        sends = self._cancels(error.code)
        self._finish_with(error)
        return sends

    def _running(self) -> Attempt:
        if self._attempt is None:
            raise InvariantError(f"request {self.request_id}: no attempt runs")
        return self._attempt

    def _take(self, fresh: tuple[wire.OutputToken, ...], now_s: float) -> None:
        self.tokens.extend(fresh)
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self._notify()

    def _ask(self, now_s: float) -> list[Send]:
        return self._resume(now_s) if self._running().should_ask(self._bounds, now_s) else []

    def _resume(self, now_s: float) -> list[Send]:
        attempt = self._running()
        attempt.asked_s = now_s
        message = wire.Resume(self.request_id, attempt.number, attempt.next_index, self._front_id)
        return [Send(attempt.route.decode.node_id, message)]

    def _settle(self) -> list[Send]:
        """All tokens of the attempt are in: the request ends well."""
        finish = self._running().finish
        told = finish.reason if finish is not None else None
        if told in ("stop", "length"):
            self.finish_reason = "stop" if told == "stop" else "length"
        else:
            self.finish_reason = self._own_reason() or "length"
        self._end()
        return []

    def _own_reason(self) -> EndReason | None:
        """What the tokens themselves say: complete, and why; None if more would have come."""
        last = self.tokens[-1].token_id if self.tokens else None
        ends = () if self.sampling.ignore_eos else self._model.eos_token_ids
        is_long_enough = len(self.tokens) > self.sampling.min_tokens
        if is_long_enough and (last in ends or last in self.sampling.stop_token_ids):
            return "stop"
        return "length" if len(self.tokens) >= self.sampling.max_tokens else None

    def _fail_attempt(self, message: wire.Finish, now_s: float) -> list[Send]:
        attempt = self._running()
        detail = message.detail or f"the attempt ended: {message.reason}"
        if message.reason == "cancelled":
            return self._lose("node_error", detail, now_s, set(self.node_ids))
        error = RequestError(
            detail,
            status=message.status if 400 <= message.status < 600 else 500,
            code=message.code or "node_error",
            retry_after_s=1.0 if message.status in (429, 503) else None,
        )
        if message.code == wire.UNKNOWN_ATTEMPT:
            return self._lose("node_lost", detail, now_s, set(), error)
        if not message.can_retry:
            sends = self._cancels(error.code)
            self._finish_with(error)
            return sends
        # A hand-off that failed does not say at which end.
        is_pair = message.code == HANDOFF_FAILED
        avoid = set(self.node_ids) if is_pair else {attempt.nodes[0].node_id}
        return self._lose("node_error", detail, now_s, avoid, error)

    def _lose(
        self,
        kind: LossKind,
        detail: str,
        now_s: float,
        avoid: set[str],
        error: RequestError | None = None,
    ) -> list[Send]:
        """The running attempt is lost: another one, unless the output is complete or too many."""
        sends = self._cancels(detail)
        self.losses.append(kind)
        self.avoid |= avoid
        self._last_failure = error or RequestError(
            f"the request was lost {self.attempts} times; last: {detail}",
            status=503,
            code=kind,
            retry_after_s=1.0,
        )
        own_reason = self._own_reason()
        if own_reason is not None:
            self.finish_reason = own_reason
            self._end()
        elif self.attempts >= self._bounds.max_attempts:
            self._finish_with(self._last_failure)
        else:
            self._advance(RequestState.WAITING)
            self._attempt = None
            self._waiting_since_s = now_s
        return sends

    def _cancels(self, reason: str) -> list[Send]:
        """Cancel for both nodes of the running attempt."""
        attempt = self._attempt
        if attempt is None:
            return []
        node_ids = dict.fromkeys((attempt.route.prefill.node_id, attempt.route.decode.node_id))
        message = wire.Cancel(self.request_id, attempt.number, reason)
        return [Send(node_id, message) for node_id in node_ids]

    def _finish_with(self, error: RequestError) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self._advance(RequestState.ENDED)
        self._attempt = None
        self._notify()

    def _advance(self, state: RequestState) -> None:
        if state not in _LEGAL[self.state]:
            raise InvariantError(f"request {self.request_id}: {self.state} -> {state}")
        self.state = state


def _no_node() -> RequestError:
    return RequestError(
        "no node is available for this request; try again later",
        status=503,
        code="no_node",
        retry_after_s=1.0,
    )
