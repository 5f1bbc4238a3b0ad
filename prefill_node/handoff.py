"""What a prefill engine needs of whoever takes its KV: over the wire or in the same process.

`transfer.exporter.Exporter` implements it for a remote decode node (through prefill_node/node.py),
`deploy.unified.LocalHandoff` for the unified role. Commands come from the step thread; the answers
below arrive as events in the same thread's inbox.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..common.wire import AnyMessage, OutputToken
from .job import Job, RequestKey


class Handoff(Protocol):
    def offer(self, job: Job) -> None:
        """Asks decode for room. Answer: HandoffGranted, or HandoffFailed and HandoffReleased."""

    def pages_ready(self, job: Job, first_page: int, pages: list[int]) -> None:
        """Device pages `pages` hold the prompt's pages from `first_page` on; final, in order."""

    def commit(self, job: Job, first_token: OutputToken, warm_positions: tuple[bytes, ...]) -> None:
        """All pages were given; the prompt's first output token and last top-k per index group."""

    def cancel(self, job: Job, reason: str, *, is_told: bool) -> None:
        """Stop; HandoffReleased follows when nothing reads the pages any more.

        `is_told`: the front has been told how the request ended, and must hear of no other end.
        """


@dataclass(frozen=True, slots=True)
class HandoffGranted:
    key: RequestKey


@dataclass(frozen=True, slots=True)
class HandoffFailed:
    """The request cannot go on; HandoffReleased follows. `can_retry`: elsewhere or later it may."""

    key: RequestKey
    reason: str
    status: int
    code: str
    can_retry: bool


@dataclass(frozen=True, slots=True)
class HandoffReleased:
    """Exactly once for each offer, at its end: the source pages may be used again.

    `is_quarantined`: a late write may still read them, so they stay out of use until
    HandoffUnquarantined.
    """

    key: RequestKey
    is_quarantined: bool


@dataclass(frozen=True, slots=True)
class HandoffUnquarantined:
    """Whoever a late write was meant for is dead: the source pages may be used again."""

    key: RequestKey


class Send(Protocol):
    """Delivers a message to the live incarnation of a node, or drops it; any thread."""

    def __call__(self, node_id: str, message: AnyMessage) -> None: ...
