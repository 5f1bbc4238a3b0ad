"""Runs the requests of a front: finds routes, carries messages between requests and nodes.

Runs on the front's asyncio loop; `Handover` brings the control plane's events there from its I/O
thread, in order. `tick` is called several times a second and bounds every wait. An error inside
one request ends that request and no other.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable

from ...common import wire
from ...common.clock import Clock
from ...common.errors import PeerError, RequestError
from .metrics import FrontMetrics
from .nodes import NodeDirectory, NodeInfo
from .ports import Control, Peer
from .request import FrontRequest, RequestState, Send
from .router import pick

_LOGGER = logging.getLogger("tidepool.front")


class Dispatcher:
    """All live requests of this front and the nodes they run on."""

    def __init__(self, control: Control, clock: Clock, metrics: FrontMetrics) -> None:
        self.nodes = NodeDirectory(control, self._on_lost, self._on_cut, self._on_replaced)
        self._control = control
        self._clock = clock
        self._metrics = metrics
        self._requests: dict[str, FrontRequest] = {}
        self._occupied: dict[str, tuple[str, ...]] = {}

    @property
    def num_live(self) -> int:
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests that have no node yet, or none any more."""
        return sum(r.state is RequestState.WAITING for r in self._requests.values())

    def submit(self, request: FrontRequest) -> None:
        self._requests[request.request_id] = request
        self._try_route(request)

    def stop(self, request: FrontRequest) -> None:
        """Ends a request whose output is complete because of a stop string."""
        if not request.is_ended:
            self._apply(request, lambda now_s: request.stop())

    def release(self, request: FrontRequest, error: RequestError) -> None:
        """Forgets a request; if it still runs it is cancelled on its nodes. May be called twice."""
        if not request.is_ended:
            self._fail(request, error)
        self._requests.pop(request.request_id, None)

    def fail_all(self, error: RequestError) -> None:
        """Ends every request: the front stops."""
        for request in list(self._requests.values()):
            if not request.is_ended:
                self._fail(request, error)

    def update_nodes(self, infos: list[NodeInfo]) -> None:
        self.nodes.update(infos)
        self._route_waiting()

    def on_message(self, peer: Peer, message: object) -> None:
        if isinstance(message, wire.Ping):
            self.nodes.ping(peer.node_id, peer.epoch, message.load)
        elif isinstance(message, wire.Tokens):
            self._on_tokens(peer, message)
        elif isinstance(message, wire.Finish):
            request = self._expecting(peer, message)
            if request is not None:
                self._apply(request, lambda now_s: request.on_finish(message, now_s))
                self._try_route(request)

    def on_peer_up(self, peer: Peer) -> None:
        self.nodes.peer_up(peer.node_id, peer.epoch)
        self._on_back(peer.node_id, peer.epoch)
        self._route_waiting()

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        self.nodes.peer_down(peer.node_id, peer.epoch, reason)
        self._route_waiting()

    def tick(self) -> None:
        for request in list(self._requests.values()):
            if not request.is_ended:
                self._apply(request, request.on_tick)
        self._route_waiting()

    def _fail(self, request: FrontRequest, error: RequestError) -> None:
        self._apply(request, lambda now_s: request.fail(error))

    def _on_tokens(self, peer: Peer, message: wire.Tokens) -> None:
        request = self._expecting(peer, message)
        if request is None:
            reason = "the front no longer waits for it"
            cancel = wire.Cancel(message.request_id, message.attempt, reason)
            self._control.send(peer.node_id, cancel)
            self._metrics.stale_messages.inc()
            return
        self._apply(request, lambda now_s: request.on_tokens(message, now_s))
        self._try_route(request)

    def _expecting(self, peer: Peer, message: wire.Tokens | wire.Finish) -> FrontRequest | None:
        request = self._requests.get(message.request_id)
        if request is None or not request.expects(message, peer.node_id, peer.epoch):
            return None
        return request

    def _on_lost(self, node_id: str, epoch: int, reason: str) -> None:
        self._tell_running(lambda each: functools.partial(each.on_lost, node_id, epoch, reason))

    def _on_cut(self, node_id: str, epoch: int, reason: str) -> None:
        self._tell_running(lambda each: functools.partial(each.on_cut, node_id, epoch, reason))

    def _on_replaced(self, old_epoch: int, info: NodeInfo) -> None:
        self._tell_running(lambda each: functools.partial(each.on_replaced, old_epoch, info))

    def _on_back(self, node_id: str, epoch: int) -> None:
        self._tell_running(lambda each: functools.partial(each.on_back, node_id, epoch))

    def _tell_running(
        self, event_of: Callable[[FrontRequest], Callable[[float], list[Send]]]
    ) -> None:
        for request in list(self._requests.values()):
            if request.state is RequestState.RUNNING:
                self._apply(request, event_of(request))

    def _route_waiting(self) -> None:
        for request in list(self._requests.values()):
            self._try_route(request)

    def _try_route(self, request: FrontRequest) -> None:
        """Submits a waiting request if a node can take it now."""
        if request.state is not RequestState.WAITING:
            return
        route = pick(self.nodes, request.num_prompt_tokens, request.num_total_tokens, request.avoid)
        if route is not None and request.may_use(route, self._clock.now()):
            self._metrics.attempts.inc()
            self._apply(request, lambda now_s: request.submit(route, now_s))

    def _apply(self, request: FrontRequest, event: Callable[[float], list[Send]]) -> None:
        """Runs one event of a request, sends what it asks for, keeps the nodes' counts."""
        num_losses = len(request.losses)
        try:
            sends = event(self._clock.now())
        except Exception:
            # Outermost loop of the front: our own fault ends this request, the others go on.
            _LOGGER.exception("request %s failed at the front", request.request_id)
            sends = request.fail(_internal_error()) if not request.is_ended else []
        for send in sends:
            self._send(request, send)
        for kind in request.losses[num_losses:]:
            self._metrics.losses.labels(kind).inc()
            _LOGGER.warning(
                "request %s lost attempt %d: %s", request.request_id, request.attempts, kind
            )
        self._count_nodes(request)

    def _send(self, request: FrontRequest, send: Send) -> None:
        try:
            self._control.send(send.node_id, send.message)
        except PeerError as error:  # the control plane does not keep up
            _LOGGER.error("cannot send to %s: %s", send.node_id, error)
            if isinstance(send.message, wire.Submit):
                request.on_unsent(str(error), self._clock.now())

    def _count_nodes(self, request: FrontRequest) -> None:
        before = self._occupied.get(request.request_id, ())
        after = request.node_ids
        if before == after:
            return
        for node_id in set(after) - set(before):
            self.nodes.acquire(node_id)
        if after:
            self._occupied[request.request_id] = after
        else:
            del self._occupied[request.request_id]
        for node_id in set(before) - set(after):
            self.nodes.release(node_id)


class Handover:
    """Carries the control plane's events from its I/O thread to the asyncio loop, in order.

    It is the Handler given to the control plane. One wake-up of the loop takes all that has
    gathered; after the loop has closed events are dropped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, dispatcher: Dispatcher) -> None:
        self._loop = loop
        self._dispatcher = dispatcher
        self._lock = threading.Lock()
        self._events: list[Callable[[], None]] = []

    def on_message(self, peer: Peer, message: wire.AnyMessage) -> bool:
        if not isinstance(message, wire.Ping | wire.Tokens | wire.Finish):
            return False
        self._put(lambda: self._dispatcher.on_message(peer, message))
        return True

    def on_peer_up(self, peer: Peer) -> None:
        self._put(lambda: self._dispatcher.on_peer_up(peer))

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        self._put(lambda: self._dispatcher.on_peer_down(peer, reason))

    def on_tick(self, now_s: float) -> None:
        """Nothing: the front has its own timer, on its own loop."""

    def _put(self, event: Callable[[], None]) -> None:
        with self._lock:
            self._events.append(event)
            is_first = len(self._events) == 1
        if not is_first:
            return
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            self._events.clear()  # the loop is closed

    def _drain(self) -> None:
        with self._lock:
            events, self._events = self._events, []
        for event in events:
            try:
                event()
            except Exception:  # outermost loop: the events behind it must still be heard
                _LOGGER.exception("an event of the control plane failed at the front")


def _internal_error() -> RequestError:
    return RequestError("internal error at the front", status=500, code="internal_error")
