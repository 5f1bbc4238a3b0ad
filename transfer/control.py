"""The control plane's sockets: one I/O thread, one ROUTER, one DEALER for each peer we connect to.

Only this file and its curve.py import zmq. A *session* is what lies between two hellos: it is up on both ends or
goes down on both, whoever of them notices first; inside it messages arrive in order and without
gaps, because anything that would lose one (a full queue, a broken connection) ends it. ZMQ's own
reconnecting is off: each try is a fresh DEALER that says Hello first.

| thread | may call                                                                           |
|--------|------------------------------------------------------------------------------------|
| any    | connect, disconnect, send, post, set_load, set_data_address, fence, refusal, peer,  |
|        | peers, stop, stats                                                                 |
| I/O    | everything in Handler, and what was posted                                         |

Always holds: a handler hears on_peer_up and on_peer_down in turn for each node, messages only in
between, and never a message from or for another incarnation. No peer and no frame stops the loop;
an InvariantError or an unforeseen exception of a handler does, and `on_fatal` hears of it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq

from ..common import wire
from ..common.clock import Clock, MonotonicClock
from ..common.config import TransferSection
from ..common.errors import InvariantError, PeerError, ProtocolError, TidepoolError
from .curve import ClusterKeys, Gate
from .own_sockets import NUM_PROBES, PROBE_INTERVAL_S, SILENT_S
from .session import Broken, ControlStats, Handler, LogLimiter, Peer, identity_of, refuse_hello

_LOGGER = logging.getLogger(__name__)

MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_SESSIONS = 4096
_MESSAGES_A_TURN = 256
"""Messages read from one socket before the others get their turn."""
_FIRST_RETRY_S = 0.05
_MAX_RETRY_S = 1.0
_REFUSED_RETRY_S = 0.2
"""Largest pause after a connection was refused: the machine lives, and a process may come back."""
_POST_WAIT_S = 5.0
"""How long a thread waits for room in the command queue before it gets a PeerError."""
_GOODBYE_LINGER_MS = 50


@dataclass(slots=True, eq=False)
class _Link:
    """The DEALER to one peer: ours to create, close and try again."""

    node_id: str
    address: str
    socket: zmq.Socket[bytes] | None = None
    monitor: zmq.Socket[bytes] | None = None
    """Tells when the connection of `socket` has failed or is gone."""
    is_hello_sent: bool = False
    due_s: float = 0.0
    """Without a socket: when to try again. Before the hello is answered: when to give up."""
    backoff_s: float = _FIRST_RETRY_S
    epoch: int = 0
    """Of whoever answered last at this address; 0: nobody yet."""


@dataclass(slots=True, eq=False)
class _Session:
    """A live session over a link, or (link None) over the ROUTER."""

    peer: Peer
    identity: bytes
    link: _Link | None
    last_heard_s: float
    next_ping_s: float
    doom: str = ""
    """Why it must end; ended at the next turn, so that no handler is called inside another."""


class ControlLoop:
    """See the module. `node_id` must be unique, `epoch` must grow with each start of the node."""

    def __init__(
        self,
        node_id: str,
        role: wire.Role,
        epoch: int,
        *,
        bind_host: str = "127.0.0.1",
        bind_port: int = 0,
        layout_hash: str = "",
        layout_text: str = "",
        data_address: str = "",
        regions: tuple[wire.Region, ...] = (),
        shared: wire.SharedMemory | None = None,
        config: TransferSection | None = None,
        clock: Clock | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
        keys: ClusterKeys | None = None,
    ) -> None:
        """Binds the ROUTER to a port of `bind_host`; PeerError if it cannot.

        `bind_port`: taken if it is free, so that peers of the process before find this one at once.
        `keys`: of the cluster (curve.cluster_keys); None: connections are neither proven nor
        encrypted.
        `on_fatal` is called once, on the I/O thread, with what stopped the loop.
        """
        self.clock: Clock = clock or MonotonicClock()
        self.stats = ControlStats()
        self.hello = wire.Hello(
            protocol_version=wire.PROTOCOL_VERSION,
            node_id=node_id,
            role=role,
            epoch=epoch,
            layout_hash=layout_hash,
            layout_text=layout_text,
            data_address=data_address,
            regions=regions,
            shared=shared,
        )
        self._config = config or TransferSection()
        self._on_fatal = on_fatal
        self._load = wire.Load()
        self._log = LogLimiter(_LOGGER, self.clock)
        self._links: dict[str, _Link] = {}
        self._sessions: dict[str, _Session] = {}
        self._by_identity: dict[bytes, _Session] = {}
        self._oldest_epoch: dict[str, int] = {}
        """Incarnations below this are dead."""
        self._refusals: dict[str, str] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._is_awake = False
        self._is_stopping = False
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name=f"control-{node_id}", daemon=True)
        self._handler: Handler | None = None
        self._tick_s = min(self._config.heartbeat_interval_s, self._config.resend_interval_s) / 4
        self._next_tick_s = 0.0
        self._last_turn_s = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, MAX_SESSIONS + 16)
        self._poller = zmq.Poller()
        self._gate = Gate(self._context, keys)
        self._router = self._bind(bind_host, bind_port)
        for each in self._gate.sockets:
            self._poller.register(each, zmq.POLLIN)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._poller.register(self._wake_receiver.fileno(), zmq.POLLIN)

    # ---- any thread ----

    @property
    def node_id(self) -> str:
        return self.hello.node_id

    @property
    def epoch(self) -> int:
        return self.hello.epoch

    @property
    def address(self) -> str:
        """Where peers connect: "tcp://host:port"."""
        return self._address

    def start(self, handler: Handler) -> None:
        """Starts the I/O thread; `handler` hears everything from now on."""
        self._handler = handler
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Says Goodbye to all peers and ends the thread; PeerError if it does not end in time.

        Posted calls that have not run are dropped. May be called twice.
        """
        if self._thread.ident is None:
            self._close_sockets()
            return
        self._is_stopping = True
        self._wake()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise PeerError(f"the control loop of {self.node_id} is still busy after {timeout_s} s")

    def connect(self, node_id: str, address: str) -> None:
        """Keeps a session with the node at `address` up, trying again until disconnect.

        Does nothing if that address is already being tried; another address replaces it. Only one
        of two nodes connects to the other.
        """
        self.post(lambda: self._connect(node_id, address))

    def disconnect(self, node_id: str) -> None:
        """Ends the session, if any, and tries no more."""
        self.post(lambda: self._disconnect(node_id, "disconnected"))

    def send(self, node_id: str, message: wire.AnyMessage) -> None:
        """Sends to the live incarnation of `node_id`; dropped and counted if there is none.

        In order with other sends and posts of the same thread. PeerError if the loop is so far
        behind that its queue stays full.
        """
        if threading.current_thread() is self._thread:
            self._send(node_id, message)
        else:
            self.post(lambda: self._send(node_id, message))

    def post(self, call: Callable[[], None]) -> None:
        """Runs `call` on the I/O thread, later; errors are treated like a handler's.

        PeerError if the queue stays full; after the loop has ended calls are dropped.
        """
        if threading.current_thread() is not self._thread:
            self._wait_for_room()
        if self._has_ended:
            return
        self._commands.append(call)
        self._wake()

    def set_load(self, load: wire.Load) -> None:
        """What the next Pings carry."""
        self._load = load

    def fence(self, node_id: str, epoch: int) -> None:
        """That incarnation and all before it are dead: their sessions end and cannot come back.

        Its address is tried no more; connect again when the node is back.
        """
        self.post(lambda: self._fence(node_id, epoch))

    def set_data_address(self, data_address: str) -> None:
        """From now on peers are told this address; sessions with nodes end and begin anew.

        On the I/O thread it happens at once, elsewhere soon.
        """
        if threading.current_thread() is self._thread:
            self._set_data_address(data_address)
        else:
            self.post(lambda: self._set_data_address(data_address))

    def refusal(self, node_id: str) -> str | None:
        return self._refusals.get(node_id)

    def peer(self, node_id: str) -> Peer | None:
        """The live incarnation of a node."""
        session = self._sessions.get(node_id)
        return session.peer if session else None

    def peers(self) -> list[Peer]:
        return [session.peer for session in list(self._sessions.values())]

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def _wake(self) -> None:
        if not self._is_awake:
            self._is_awake = True
            with contextlib.suppress(OSError):  # full of unread wake-ups, or closed
                self._wake_sender.send(b"w")

    def _wait_for_room(self) -> None:
        if len(self._commands) < self._config.max_queued_messages:
            return
        pause = threading.Event()
        waited_s = 0.0
        while len(self._commands) >= self._config.max_queued_messages:
            if self._has_ended:
                return
            if waited_s >= _POST_WAIT_S:
                raise PeerError(f"the control loop of {self.node_id} does not keep up")
            pause.wait(0.005)
            waited_s += 0.005

    # ---- the loop ----

    def _run(self) -> None:
        fatal: Exception | None = None
        try:
            self._last_turn_s = self.clock.now()
            while not self._is_stopping:
                self._turn()
            self._say_goodbye()
        except Exception as error:
            fatal = error
            _LOGGER.critical("the control loop of %s stops", self.node_id, exc_info=error)
        finally:
            self._close_sockets()
        if fatal is not None and self._on_fatal is not None:
            self._on_fatal(fatal)

    def _turn(self) -> None:
        wait_s = max(0.0, self._next_tick_s - self.clock.now())
        ready = dict(self._poller.poll(int(min(wait_s, self._tick_s) * 1000) + 1))
        if ready.pop(self._wake_receiver.fileno(), None):
            self._drain_wakeups()
        self._run_commands()
        if sum(ready.pop(each, 0) for each in self._gate.sockets):
            self._count_strangers()
        if ready.pop(self._router, None):
            self._read_router()
        for link in list(self._links.values()):
            events = ready.get(link.socket, 0) if link.socket is not None else 0
            if events & zmq.POLLOUT and not link.is_hello_sent:
                self._say_hello(link)
            if events & zmq.POLLIN:
                self._read_link(link)
            if link.monitor is not None and ready.get(link.monitor, 0):
                self._on_failed_connection(link)
        self._end_doomed()
        now_s = self.clock.now()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + self._tick_s
            self._keep_time(now_s)

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_receiver.recv(4096)

    def _count_strangers(self) -> None:
        count = self._gate.turn(self.clock.now())
        if count > self.stats.num_unauthenticated:
            self.stats.num_unauthenticated = count
            self._log.warning(
                "strangers", f"{count} connections closed so far: no secret, another, or no ZMQ"
            )

    def _run_commands(self) -> None:
        self._is_awake = False
        for _ in range(len(self._commands)):
            self._guard(self._commands.popleft())

    def _guard(self, call: Callable[[], object]) -> object:
        """Runs code of a handler: what it raises on purpose must not stop the loop."""
        try:
            return call()
        except InvariantError:
            raise
        except TidepoolError as error:
            self.stats.num_handler_errors += 1
            self._log.warning(type(error).__name__, str(error))
            return True

    def _keep_time(self, now_s: float) -> None:
        config = self._config
        if now_s - self._last_turn_s > config.heartbeat_timeout_s / 2:
            # We were the one who slept: what the peers sent meanwhile may still be on its way.
            for session in self._sessions.values():
                session.last_heard_s = now_s
        self._last_turn_s = now_s
        for session in list(self._sessions.values()):
            if now_s - session.last_heard_s > config.heartbeat_timeout_s:
                silence_s = now_s - session.last_heard_s
                self._end(session, f"{session.peer.node_id} has been silent for {silence_s:.1f} s")
            elif now_s >= session.next_ping_s:
                session.next_ping_s = now_s + config.heartbeat_interval_s
                self._transmit(session, wire.Ping(load=self._load))
        for link in list(self._links.values()):
            self._tend(link, now_s)
        self._guard(lambda: self._handled().on_tick(now_s))

    def _handled(self) -> Handler:
        if self._handler is None:
            raise InvariantError("the control loop runs without a handler")
        return self._handler

    # ---- links: the sessions we open ----

    def _connect(self, node_id: str, address: str) -> None:
        link = self._links.get(node_id)
        if link is not None and link.address == address:
            return
        if link is not None:
            self._disconnect(node_id, f"{node_id} has moved to {address}")
        self._refusals.pop(node_id, None)
        self._links[node_id] = link = _Link(node_id, address)
        self._tend(link, self.clock.now())

    def _disconnect(self, node_id: str, reason: str) -> None:
        session = self._sessions.get(node_id)
        if session is not None:
            self._end(session, reason)
        link = self._links.pop(node_id, None)
        if link is not None:
            self._close_link(link)

    def _tend(self, link: _Link, now_s: float) -> None:
        """Opens, or gives up, a link whose time has come."""
        session = self._sessions.get(link.node_id)
        if (session is not None and session.link is link) or now_s < link.due_s:
            return
        if link.socket is not None:
            self._retry_later(link)
            return
        link.is_hello_sent = False
        link.due_s = now_s + self._config.heartbeat_timeout_s
        link.socket = self._new_socket(zmq.DEALER)
        link.socket.set(zmq.IDENTITY, identity_of(self.node_id, self.epoch))
        link.socket.set(zmq.IMMEDIATE, 1)
        link.socket.set(zmq.RECONNECT_IVL, -1)
        link.monitor = link.socket.get_monitor_socket(zmq.EVENT_CLOSED)
        self._poller.register(link.monitor, zmq.POLLIN)
        self._gate.equip(link.socket)
        try:
            link.socket.connect(link.address)
        except zmq.ZMQError as error:
            self._refuse(link.node_id, f"cannot connect to {link.address}: {error.strerror}")
            self._retry_later(link)
            return
        self._poller.register(link.socket, zmq.POLLIN | zmq.POLLOUT)

    def _on_failed_connection(self, link: _Link) -> None:
        """Before the hello: nobody listens there, or the handshake failed. Soon once more."""
        session = self._sessions.get(link.node_id)
        if session is not None and session.link is link:
            self._close_monitor(link)  # a session ends by its own rules
            return
        self._retry_later(link)
        link.due_s = min(link.due_s, self.clock.now() + _REFUSED_RETRY_S)

    def _say_hello(self, link: _Link) -> None:
        assert link.socket is not None
        try:
            link.socket.send(self._envelope(0, self.hello), zmq.NOBLOCK)
        except zmq.ZMQError:
            return  # not writable after all; the link's deadline covers it
        link.is_hello_sent = True
        self._poller.modify(link.socket, zmq.POLLIN)

    def _retry_later(self, link: _Link) -> None:
        self._close_link(link)
        link.due_s = self.clock.now() + link.backoff_s
        link.backoff_s = min(2 * link.backoff_s, _MAX_RETRY_S)

    def _close_link(self, link: _Link) -> None:
        if link.socket is None:
            return
        self._close_monitor(link)
        if link.socket in self._poller:
            self._poller.unregister(link.socket)
        link.socket.close()
        link.socket = None

    def _close_monitor(self, link: _Link) -> None:
        if link.monitor is not None and link.socket is not None:
            self._poller.unregister(link.monitor)
            link.socket.disable_monitor()
            link.monitor.close()
            link.monitor = None

    def _read_link(self, link: _Link) -> None:
        for _ in range(_MESSAGES_A_TURN):
            if link.socket is None:
                return
            try:
                parts = link.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_link_frame(link, parts)

    def _on_link_frame(self, link: _Link, parts: list[bytes]) -> None:
        session = self._sessions.get(link.node_id)
        try:
            envelope = self._decode(parts)
        except ProtocolError as error:
            self._malformed(link.node_id, str(error))
            return
        if session is not None and session.link is link:
            self._on_envelope(session, envelope)
        elif isinstance(envelope.body, wire.Goodbye):
            self._refuse(link.node_id, envelope.body.reason)
            self._retry_later(link)
        elif isinstance(envelope.body, wire.Hello):
            self._on_answer(link, envelope, envelope.body)
        else:
            self._malformed(link.node_id, f"{type(envelope.body).__name__} before hello")

    def _on_answer(self, link: _Link, envelope: wire.Envelope, hello: wire.Hello) -> None:
        """The ROUTER side has answered our hello."""
        reason = self._judge(envelope, hello)
        if hello.node_id != link.node_id:
            reason = f"{hello.node_id} answers at the address of {link.node_id}"
        elif link.node_id in self._sessions:
            reason = f"{link.node_id} is connected to us already"
        if reason is not None:
            self._refuse(link.node_id, reason)
            assert link.socket is not None
            self._try_send(link.socket, [self._envelope(hello.epoch, wire.Goodbye(reason))])
            self._retry_later(link)
            return
        link.backoff_s = _FIRST_RETRY_S
        link.epoch = hello.epoch
        self._begin(hello, identity_of(hello.node_id, hello.epoch), link)

    # ---- the ROUTER: the sessions that others open ----

    def _read_router(self) -> None:
        for _ in range(_MESSAGES_A_TURN):
            try:
                identity, *parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_router_frame(identity, parts)

    def _on_router_frame(self, identity: bytes, parts: list[bytes]) -> None:
        session = self._by_identity.get(identity)
        try:
            envelope = self._decode(parts)
        except ProtocolError as error:
            self._malformed(session.peer.node_id if session else "a stranger", str(error))
            if session is None:
                self._dismiss(identity, str(error))
            return
        if isinstance(envelope.body, wire.Hello):
            self._on_hello(identity, envelope, envelope.body)
        elif session is not None:
            self._on_envelope(session, envelope)
        elif not isinstance(envelope.body, wire.Goodbye):
            self.stats.num_malformed += 1
            self._dismiss(identity, "hello first")

    def _on_hello(self, identity: bytes, envelope: wire.Envelope, hello: wire.Hello) -> None:
        reason = self._judge(envelope, hello)
        if identity != identity_of(hello.node_id, hello.epoch):
            reason = "the hello is not from the node whose connection it came on"
        old = self._sessions.get(hello.node_id)
        if old is not None and old.link is not None:
            reason = f"{self.node_id} is the one that connects to {hello.node_id}"
        elif old is None and len(self._by_identity) >= MAX_SESSIONS:
            reason = f"{self.node_id} has {MAX_SESSIONS} sessions already"
        if reason is not None:
            self._refuse(hello.node_id, reason)
            self._dismiss(identity, reason)
            return
        if old is not None:
            new = "again" if old.peer.epoch == hello.epoch else f"as epoch {hello.epoch}"
            self._end(old, f"{hello.node_id} has said hello {new}", tell=False)
        self._begin(hello, identity, None)

    def _dismiss(self, identity: bytes, reason: str) -> None:
        self._try_send(self._router, [identity, self._envelope(0, wire.Goodbye(reason))])

    # ---- sessions ----

    def _judge(self, envelope: wire.Envelope, hello: wire.Hello) -> str | None:
        """Why a hello is refused, or None."""
        if (envelope.sender, envelope.sender_epoch) != (hello.node_id, hello.epoch):
            return f"the hello of {hello.node_id} was sent by {envelope.sender}"
        if envelope.receiver_epoch not in (0, self.epoch):
            return f"the hello is for epoch {envelope.receiver_epoch} of {self.node_id}"
        oldest = self._oldest_epoch.get(hello.node_id, hello.epoch)
        if hello.epoch < oldest:
            return f"epoch {hello.epoch} of {hello.node_id} is dead; the oldest alive is {oldest}"
        return refuse_hello(self.hello, hello)

    def _begin(self, hello: wire.Hello, identity: bytes, link: _Link | None) -> None:
        now_s = self.clock.now()
        peer = Peer(hello.node_id, hello.epoch, hello.role, hello)
        session = _Session(peer, identity, link, last_heard_s=now_s, next_ping_s=now_s)
        self._oldest_epoch[hello.node_id] = hello.epoch
        self._refusals.pop(hello.node_id, None)
        self._sessions[hello.node_id] = session
        if link is None:
            self._by_identity[identity] = session
            self._transmit(session, self.hello)
        _LOGGER.info("%s is up (epoch %d)", peer.node_id, peer.epoch)
        self._guard(lambda: self._handled().on_peer_up(peer))

    def _end(self, session: _Session, reason: str, *, tell: bool = True) -> None:
        node_id = session.peer.node_id
        if self._sessions.get(node_id) is not session:
            return
        if tell:
            self._try_send_to(session, wire.Goodbye(reason))
        del self._sessions[node_id]
        self._by_identity.pop(session.identity, None)
        if session.link is not None:
            self._retry_later(session.link)
        _LOGGER.info("%s is down (epoch %d): %s", node_id, session.peer.epoch, reason)
        self._guard(lambda: self._handled().on_peer_down(session.peer, reason))

    def _end_doomed(self) -> None:
        for session in [each for each in self._sessions.values() if each.doom]:
            self._end(session, session.doom, tell=False)

    def _fence(self, node_id: str, epoch: int) -> None:
        self._oldest_epoch[node_id] = max(epoch + 1, self._oldest_epoch.get(node_id, 0))
        reason = f"epoch {epoch} of {node_id} is fenced"
        session, link = self._sessions.get(node_id), self._links.get(node_id)
        if link is not None and 0 < link.epoch <= epoch:
            self._disconnect(node_id, reason)
        elif session is not None and session.peer.epoch <= epoch:
            self._end(session, reason)

    def _set_data_address(self, data_address: str) -> None:
        self.hello = msgspec.structs.replace(self.hello, data_address=data_address)
        for session in list(self._sessions.values()):
            if session.peer.role != "front":
                self._end(session, f"{self.node_id} has a new data address")

    def _on_envelope(self, session: _Session, envelope: wire.Envelope) -> None:
        peer, body = session.peer, envelope.body
        mine = 0 if isinstance(body, wire.Goodbye) and not envelope.receiver_epoch else self.epoch
        expected = (peer.node_id, peer.epoch, mine)
        if (envelope.sender, envelope.sender_epoch, envelope.receiver_epoch) != expected:
            self.stats.num_wrong_epoch += 1
            return
        session.last_heard_s = self.clock.now()
        self.stats.num_received += 1
        if isinstance(body, wire.Goodbye):
            self._end(session, f"{peer.node_id} said goodbye: {body.reason}", tell=False)
        elif isinstance(body, wire.Hello):
            self._malformed(peer.node_id, "a second hello in a session")
        elif isinstance(body, wire.Fence) and peer.role != "front":
            self._malformed(peer.node_id, f"a fence from a {peer.role} node")
        else:
            if isinstance(body, wire.Fence):
                self._fence(body.node_id, body.epoch)
            is_taken = self._guard(lambda: self._handled().on_message(peer, body))
            if not is_taken and not isinstance(body, wire.Ping):
                self.stats.num_unhandled += 1

    def _send(self, node_id: str, message: wire.AnyMessage) -> None:
        session = self._sessions.get(node_id)
        if session is None or session.doom:
            self.stats.num_no_session += 1
        else:
            self._transmit(session, message)

    def _transmit(self, session: _Session, message: wire.AnyMessage) -> None:
        """Sends, or dooms the session: a gap inside a session must not be."""
        try:
            is_sent = self._try_send_to(session, message)
        except (OverflowError, TypeError, ValueError) as error:
            self.stats.num_unsendable += 1
            self._log.warning(session.peer.node_id, f"cannot encode {message!r:.200}: {error}")
            return
        if is_sent:
            self.stats.num_sent += 1
        else:
            session.doom = Broken(f"{session.peer.node_id} takes no more messages")

    def _try_send_to(self, session: _Session, message: wire.AnyMessage) -> bool:
        frame = self._envelope(session.peer.epoch, message)
        if session.link is None:
            return self._try_send(self._router, [session.identity, frame])
        return session.link.socket is not None and self._try_send(session.link.socket, [frame])

    def _try_send(self, target: zmq.Socket[bytes], parts: list[bytes]) -> bool:
        """False if the queue is full or the peer is not connected (any more)."""
        try:
            target.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _envelope(self, receiver_epoch: int, message: wire.AnyMessage) -> bytes:
        return wire.encode(wire.Envelope(self.node_id, self.epoch, receiver_epoch, message))

    def _decode(self, parts: list[bytes]) -> wire.Envelope:
        if len(parts) != 1:
            raise ProtocolError(f"a message has one frame, not {len(parts)}")
        return wire.decode(parts[0])

    def _malformed(self, subject: str, text: str) -> None:
        self.stats.num_malformed += 1
        self._log.warning(subject, text)

    def _refuse(self, node_id: str, reason: str) -> None:
        self.stats.num_refused += 1
        if len(self._refusals) >= MAX_SESSIONS:
            self._refusals.clear()
        self._refusals[node_id] = reason
        self._log.warning(node_id, f"refused: {reason}")

    # ---- sockets ----

    def _new_socket(self, kind: int) -> zmq.Socket[bytes]:
        fresh = self._context.socket(kind)
        fresh.set(zmq.LINGER, 0)
        fresh.set(zmq.SNDHWM, self._config.max_queued_messages)
        fresh.set(zmq.RCVHWM, self._config.max_queued_messages)
        fresh.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        fresh.set(zmq.TCP_KEEPALIVE, 1)
        fresh.set(zmq.TCP_KEEPALIVE_IDLE, SILENT_S)
        fresh.set(zmq.TCP_KEEPALIVE_INTVL, PROBE_INTERVAL_S)
        fresh.set(zmq.TCP_KEEPALIVE_CNT, NUM_PROBES)
        fresh.set(zmq.TCP_MAXRT, 1000 * (SILENT_S + NUM_PROBES * PROBE_INTERVAL_S))
        return fresh

    def _bind(self, bind_host: str, bind_port: int) -> zmq.Socket[bytes]:
        router = self._new_socket(zmq.ROUTER)
        router.set(zmq.ROUTER_HANDOVER, 1)
        router.set(zmq.ROUTER_MANDATORY, 1)
        self._gate.guard(router)
        try:
            port = _bind_to(router, bind_host, bind_port)
        except (zmq.ZMQError, zmq.ZMQBindError) as error:
            router.close()
            self._gate.close()
            self._context.term()
            raise PeerError(f"cannot listen on {bind_host}: {error}") from error
        self._address = f"tcp://{bind_host}:{port}"
        self._poller.register(router, zmq.POLLIN)
        return router

    def _say_goodbye(self) -> None:
        for session in list(self._sessions.values()):
            self._try_send_to(session, wire.Goodbye(f"{self.node_id} stops"))

    def _close_sockets(self) -> None:
        self._has_ended = True
        self._sessions = {}
        self._by_identity = {}
        self._commands.clear()
        for link in self._links.values():
            if link.socket is not None:
                self._close_monitor(link)
                link.socket.close(linger=_GOODBYE_LINGER_MS)
        self._links = {}
        if not self._router.closed:
            self._router.close(linger=_GOODBYE_LINGER_MS)
        self._gate.close()
        self._context.term()
        self._wake_receiver.close()
        self._wake_sender.close()


def _bind_to(router: zmq.Socket[bytes], host: str, port: int) -> int:
    """Binds to `port` if that is free, or else to any; returns which."""
    if port:
        with contextlib.suppress(zmq.ZMQError):
            router.bind(f"tcp://{host}:{port}")
            return port
    return int(router.bind_to_random_port(f"tcp://{host}"))
