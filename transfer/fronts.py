"""What fronts ask of a node, on its way from the I/O thread to the step thread's inbox.

One of the handlers of a node's control loop; it also keeps the load that fronts route by. A front whose session is down keeps its requests for
`grace_s` (it may be a short partition); a front that came back as another process, or not at all,
has nobody listening: FrontGone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..common import wire
from ..common.clock import Clock
from .session import Peer


@dataclass(frozen=True, slots=True)
class FrontGone:
    """The process that was this front will never read again: its requests may end."""

    front_id: str


class FrontHandler:
    """Implements session.Handler; I/O thread only.

    Args:
        post_event: puts an event into the step loop's inbox; thread-safe.
        tell_load: called at every tick; sets what the node's Pings carry.
        grace_s: seconds a silent front keeps its requests.
    """

    def __init__(
        self,
        post_event: Callable[[object], None],
        tell_load: Callable[[], None],
        clock: Clock,
        *,
        grace_s: float,
    ) -> None:
        self._post_event = post_event
        self._tell_load = tell_load
        self._clock = clock
        self._grace_s = grace_s
        self._epochs: dict[str, int] = {}
        self._down_since_s: dict[str, float] = {}

    def expect(self, front_id: str) -> None:
        """A front that has requests here and is not up yet; called before the loop runs."""
        self._down_since_s[front_id] = self._clock.now()

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        if peer.role != "front":
            return False
        if not isinstance(message, (wire.Submit, wire.Cancel, wire.Resume)):
            return False
        self._post_event(message)
        return True

    def on_peer_up(self, peer: Peer) -> None:
        if peer.role != "front":
            return
        if self._epochs.get(peer.node_id, peer.epoch) != peer.epoch:
            self._post_event(FrontGone(peer.node_id))
        self._epochs[peer.node_id] = peer.epoch
        self._down_since_s.pop(peer.node_id, None)

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        if peer.role == "front":
            self._down_since_s[peer.node_id] = self._clock.now()

    def on_tick(self, now_s: float) -> None:
        self._tell_load()
        for front_id, since_s in list(self._down_since_s.items()):
            if now_s - since_s >= self._grace_s:
                del self._down_since_s[front_id]
                self._epochs.pop(front_id, None)
                self._post_event(FrontGone(front_id))
