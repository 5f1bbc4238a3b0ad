"""What a peer is, who hears about it, and the rules of the first message. No sockets here.

`control.ControlLoop` implements `Control`; `exporter` and `importer` need no more than that, so
tests drive them with a fake. Everything in `Handler` is called on the I/O thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..common import wire
from ..common.clock import Clock

MAX_NODE_ID_BYTES = 200
"""A ZMQ identity has at most 255 bytes, and carries the epoch too."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One incarnation of a node with which a session is up."""

    node_id: str
    epoch: int
    role: wire.Role
    hello: wire.Hello


class Broken(str):
    """Why a session ended: its connection was closed from the other end.

    So that machine lives, and the process may be gone for good; after silence neither is known.
    """

    __slots__ = ()


class Handler(Protocol):
    """Hears what happens on a control loop; all calls are on its I/O thread and must not block.

    A TidepoolError raised in here is logged and counted; an InvariantError, or any other exception,
    stops the loop.
    """

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        """Takes a message of a live session; False if it is none of this handler's business."""
        ...

    def on_peer_up(self, peer: Peer) -> None: ...

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        """Called once for each on_peer_up. Messages sent meanwhile may be lost, both ways."""
        ...

    def on_tick(self, now_s: float) -> None:
        """Called a few times in each `resend_interval_s`."""
        ...


class CompositeHandler:
    """Several handlers on one loop: each hears everything, in order."""

    def __init__(self, handlers: Sequence[Handler]) -> None:
        self._handlers = tuple(handlers)

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        taken = [handler.on_message(peer, message) for handler in self._handlers]
        return any(taken)

    def on_peer_up(self, peer: Peer) -> None:
        for handler in self._handlers:
            handler.on_peer_up(peer)

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        for handler in self._handlers:
            handler.on_peer_down(peer, reason)

    def on_tick(self, now_s: float) -> None:
        for handler in self._handlers:
            handler.on_tick(now_s)


class Control(Protocol):
    """What exporter and importer use of a control loop. Thread-safe, never waits for a peer."""

    @property
    def clock(self) -> Clock: ...

    def connect(self, node_id: str, address: str) -> None: ...

    def send(self, node_id: str, message: wire.AnyMessage) -> None: ...

    def post(self, call: Callable[[], None]) -> None: ...

    def refusal(self, node_id: str) -> str | None:
        """Why the last attempt to meet this peer was refused; None if it was not."""
        ...


@dataclass(slots=True)
class ControlStats:
    """Counters of a loop. Written by its I/O thread, read by any."""

    num_sent: int = 0
    num_received: int = 0
    num_no_session: int = 0
    """Sends dropped because no session with that node was up."""
    num_wrong_epoch: int = 0
    """Messages from or for another incarnation, dropped."""
    num_malformed: int = 0
    """Frames that do not decode, come before a hello, or break the order of a session."""
    num_refused: int = 0
    """Hellos refused, ours or theirs."""
    num_unauthenticated: int = 0
    """Connections closed before a message: without the cluster's secret, or no ZMQ at all."""
    num_unsendable: int = 0
    """Messages that cannot be encoded."""
    num_unhandled: int = 0
    """Messages that no handler took."""
    num_handler_errors: int = 0


def identity_of(node_id: str, epoch: int) -> bytes:
    """The ZMQ identity of an incarnation."""
    return f"{node_id}|{epoch}".encode()


def refuse_hello(mine: wire.Hello, theirs: wire.Hello) -> str | None:
    """The sentence that refuses a peer, naming both values; None if the two may talk.

    A front holds no KV, so its layout is not compared.
    """
    if mine.protocol_version != theirs.protocol_version:
        return (
            f"{mine.node_id} speaks protocol version {mine.protocol_version}, "
            f"{theirs.node_id} speaks {theirs.protocol_version}"
        )
    if not theirs.node_id or len(theirs.node_id.encode()) > MAX_NODE_ID_BYTES:
        return f"a node id has 1 to {MAX_NODE_ID_BYTES} bytes, not {len(theirs.node_id.encode())}"
    if theirs.node_id == mine.node_id:
        return f"both ends are called {mine.node_id}"
    if "front" in (mine.role, theirs.role) or mine.layout_hash == theirs.layout_hash:
        return None
    return (
        f"{mine.node_id} has the layout {mine.layout_hash} [{mine.layout_text}], "
        f"{theirs.node_id} has {theirs.layout_hash} [{theirs.layout_text}]"
    )


@dataclass(slots=True)
class LogLimiter:
    """At most one line a second for each subject, however hostile the peer."""

    logger: logging.Logger
    clock: Clock
    _last_s: dict[str, float] = field(default_factory=dict)

    def warning(self, subject: str, text: str) -> None:
        now_s = self.clock.now()
        if now_s - self._last_s.get(subject, -1e9) < 1.0:
            return
        if len(self._last_s) >= 1024:
            self._last_s.clear()
        self._last_s[subject] = now_s
        self.logger.warning("%s: %s", subject, text)
