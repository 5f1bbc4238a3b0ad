"""Who may open a control connection: CURVE keys made from the cluster's secret, and the gate.

Every node derives the same two key pairs from the secret: one for sockets that accept, one for
sockets that connect. A connection is encrypted and both ends prove the secret before the first
message; whoever cannot is disconnected by the sockets' own threads and never reaches the loop,
which only counts it. Owned by a ControlLoop; all calls but the constructor on its I/O thread.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from ..common.config import ClusterSection
from ..common.errors import ConfigError
from ..common.secret_files import read_cluster_secret

HANDSHAKE_TIMEOUT_MS = 3000
"""A connection that has not shown who it is by then is closed."""
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_MONITOR_ADDRESS = "inproc://handshakes"
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_EVENTS_A_TURN = 1024


@dataclass(frozen=True, slots=True)
class ClusterKeys:
    """Z85 text of both key pairs; what is secret is not in the repr."""

    server_public: bytes
    client_public: bytes
    server_secret: bytes = field(repr=False)
    client_secret: bytes = field(repr=False)


def derive_keys(secret: bytes) -> ClusterKeys:
    """The key pairs of a secret: Curve25519 scalars by BLAKE2b, one purpose each."""
    if not zmq.has("curve"):
        raise ConfigError(
            "cluster.authentication: this build of ZeroMQ has no CURVE; install another, or set "
            'it to "off"'
        )

    def scalar(purpose: bytes) -> bytes:
        digest = hashlib.blake2b(secret, digest_size=32, person=purpose).digest()
        return bytes(z85.encode(digest))

    server, client = scalar(b"tidepool accepts"), scalar(b"tidepool connect")
    return ClusterKeys(
        server_public=zmq.curve_public(server),
        client_public=zmq.curve_public(client),
        server_secret=server,
        client_secret=client,
    )


def cluster_keys(config: ClusterSection) -> ClusterKeys | None:
    """The keys a configuration means; None only where authentication is off by its own setting.

    ConfigError if there is no secret, or its file is unusable.
    """
    if config.authentication == "off":
        return None
    if not config.secret_file:
        raise ConfigError(
            "cluster.secret_file: names no file, so peers cannot be told from strangers; name one, "
            'or set cluster.authentication to "off"'
        )
    return derive_keys(read_cluster_secret(config.secret_file))


class Gate:
    """Puts the keys on sockets, answers for who may connect, counts who was turned away.

    Args:
        keys: None: anybody may connect; connections that are no ZMQ are still counted.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: ClusterKeys | None) -> None:
        self._keys = keys
        self._context = context
        self._judge: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._open: dict[int, float] = {}
        """File descriptors of accepted connections: since when."""
        self._num_accepted = self._num_succeeded = self._num_refused = 0
        if keys is not None:
            self._allowed = z85.decode(keys.client_public)
            self._judge = context.socket(zmq.REP)
            self._judge.set(zmq.LINGER, 0)
            self._judge.bind(_ZAP_ADDRESS)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """What the loop polls; any of them readable: call `turn`."""
        return [each for each in (self._judge, self._monitor) if each is not None]

    def guard(self, router: zmq.Socket[bytes]) -> None:
        """Makes an accepting socket ask for the client key; before it is bound."""
        router.set(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
        if self._keys is not None:
            router.set(zmq.CURVE_SERVER, 1)
            router.set(zmq.CURVE_SECRETKEY, self._keys.server_secret)
            router.set(zmq.ZAP_DOMAIN, b"tidepool")
        router.monitor(_MONITOR_ADDRESS, _EVENTS)
        self._monitor = self._context.socket(zmq.PAIR)
        self._monitor.set(zmq.LINGER, 0)
        self._monitor.set(zmq.RCVHWM, 0)  # a full queue here would stop the sockets' thread
        self._monitor.connect(_MONITOR_ADDRESS)

    def equip(self, dealer: zmq.Socket[bytes]) -> None:
        """Gives a connecting socket the client key, and the server key it must find."""
        if self._keys is not None:
            dealer.set(zmq.CURVE_SERVERKEY, self._keys.server_public)
            dealer.set(zmq.CURVE_PUBLICKEY, self._keys.client_public)
            dealer.set(zmq.CURVE_SECRETKEY, self._keys.client_secret)

    def turn(self, now_s: float) -> int:
        """Answers who waits to be let in; returns how many connections were refused so far.

        Not every refusal has an event of its own, so those are counted that were accepted, did not
        succeed, and are closed or older than a handshake may be. Never too many; members that have
        just come hide as many strangers for a few seconds.
        """
        if self._judge is not None:
            self._answer(self._judge)
        if self._monitor is not None:
            self._read_events(self._monitor, now_s)
        young_s = now_s - 2 * HANDSHAKE_TIMEOUT_MS / 1000
        num_young = sum(accepted_s > young_s for accepted_s in self._open.values())
        refused = self._num_accepted - self._num_succeeded - num_young
        self._num_refused = max(self._num_refused, refused)
        return self._num_refused

    def close(self) -> None:
        for each in self.sockets:
            each.close()
        self._judge = self._monitor = None

    def _answer(self, judge: zmq.Socket[bytes]) -> None:
        """The ZAP protocol (rfc.zeromq.org/spec/27): one request, one answer."""
        for _ in range(_EVENTS_A_TURN):
            try:
                parts = judge.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            is_known = len(parts) == 7 and parts[5] == b"CURVE" and parts[6] == self._allowed
            code, text = (b"200", b"OK") if is_known else (b"400", b"not of this cluster")
            request_id = parts[1] if len(parts) > 1 else b""
            judge.send_multipart([b"1.0", request_id, code, text, b"", b""], zmq.NOBLOCK)

    def _read_events(self, monitor: zmq.Socket[bytes], now_s: float) -> None:
        for _ in range(_EVENTS_A_TURN):
            try:
                event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._num_accepted += 1
                self._open[event["value"]] = now_s
            elif event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._num_succeeded += 1
            else:
                self._open.pop(event["value"], None)
