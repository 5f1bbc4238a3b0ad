"""Mooncake's transfer engine behind the Transport interface. Only this file imports mooncake.

What the engine does, found by experiment with 0.3.13.post1 over TCP:

* A batch call answers at its first failure while other items stay queued, so every write is
  submitted by itself and waited for to its own end.
* `transfer_submit_write` answers 0 when it cannot reach the peer's handshake: nothing was sent.
  Otherwise an id, to be checked until it answers something else than 0, and never again.
* Check answers 1 only after the target has applied the bytes. -1 and -2 do not say whether bytes
  that are in kernel buffers will still land: FAILED_UNKNOWN.
* The first submit to a peer performs the handshake, which can block: `open` does it beforehand.
* A connection on which nothing is in flight is not looked at: when its peer is gone it stays open, in
  CLOSE_WAIT or, where no FIN came, ESTABLISHED, until something is written on it. `abandon` shuts
  such connections down, then submits a byte for each, which fails before anything is sent.
* Unregistering memory refuses writes that begin later; of one that is under way all the rest lands.
  It ends with its connection: `renew` unregisters, then cuts the connections, then waits until the
  engine has closed them. Destroying the engine is a fence too, but stops every Python thread for
  about a second, so that old engines are kept, with nothing registered, and only the oldest of many
  is destroyed.

Where the wheel has scatter tickets (0.3.14), these are used: they do know whether they are drained.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from ..common.errors import InvariantError, TransferError
from .own_sockets import (
    connections_to,
    cut_connections,
    listening_ports,
    notice_lost_peers,
    shut_down,
    still_open,
)
from .transport import (
    Channel,
    Ticket,
    TicketStatus,
    Transport,
    Write,
    Writes,
    as_writes,
    check_new_range,
)

ENVIRONMENT_DEFAULTS = {
    "MC_LOG_LEVEL": "WARNING",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "2",
    "MC_TCP_STATUS_TIMEOUT_SEC": "2",
    "MC_TRANSFER_TIMEOUT": "5",
    "MC_TE_METADATA_REFRESH_INTERVAL_SECONDS": "2",
}
"""Set before the engine is imported, unless the user has set them. The progress and status timeouts
must stay under the transfer timeout; a stale descriptor of a restarted peer must be refreshed."""

_PENDING, _DONE = 0, 1
_MAX_STARTS = 16
_MAX_RETIRED = 8
"""Engines kept after `renew`; each has nine threads that sleep."""
_CUT_TIMEOUT_S = 5.0
_MAX_IDLE_WRITES = 2
"""Behind so many that had no connection closed, the rest is another engine's, or busy and about to fail."""
_NOWHERE = 0
"""A target that nobody registers: a write to it changes nothing, whoever should get it."""
_DATA_PORT = "/"
"""In a data address, between what the engine calls a peer and the port its connections go to."""


def _register(engine: Any, address: int, num_bytes: int) -> None:
    code = engine.register_memory(address, num_bytes)
    if code != 0:
        raise TransferError(
            f"cannot register {num_bytes} bytes at {address:#x}: code {code}", is_drained=True
        )


def _silence(engine: Any, ranges: Sequence[tuple[int, int]], ports: frozenset[int]) -> bool:
    """Ends what peers can write through an engine; False if that cannot be told."""
    codes = [engine.unregister_memory(address) for address, _ in ranges]
    is_known = len(ports) > 1  # the handshake's port and the data port
    return is_known and not any(codes) and cut_connections(ports, _CUT_TIMEOUT_S)


def _resolve(peer: str) -> frozenset[str]:
    """The IP addresses of "host:port"; may block. Empty if there are none."""
    host, _, port = peer.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError:
        return frozenset()
    return frozenset(str(each[4][0]) for each in found)


class _Ticket(Ticket):
    """Ids of single writes (`pending`), or one scatter ticket."""

    __slots__ = ("failure", "pending", "scatter", "status")

    def __init__(self, pending: list[int], scatter: Any = None) -> None:
        self.pending = pending
        self.scatter = scatter
        self.failure: TicketStatus | None = None
        self.status = TicketStatus.PENDING


class _Closing(Ticket):
    """Writes that make the engine see that connections are shut down, one at a time."""

    __slots__ = ("connections", "is_shut_down", "num_idle", "number", "peer")

    def __init__(self, peer: str, connections: frozenset[int]) -> None:
        self.peer = peer
        self.connections = connections
        self.is_shut_down = False
        self.num_idle = 0
        self.number = 0


class MooncakeTransport(Transport):
    """See `Transport`. One engine; its threads end with `close`.

    Args:
        host: interface and name under which peers reach the engine.
        protocol: "tcp" or "rdma".
        retired_ports: of engines that `renew` replaced; shared by transports that one peer address
            names, since none of them may take such a port again.
    """

    def __init__(
        self, host: str, protocol: str = "tcp", *, retired_ports: set[int] | None = None
    ) -> None:
        """Starts the engine; TransferError if it is not installed or does not start."""
        for name, value in ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        try:
            from mooncake.engine import TransferEngine  # noqa: PLC0415
        except ImportError as error:
            raise TransferError(f"cannot load the transfer engine: {error}") from error
        self._make_engine = TransferEngine
        self._host = host
        self._protocol = protocol
        self._ranges: list[tuple[int, int]] = []
        self._retired: list[Any] = []
        self._retired_ports = set() if retired_ports is None else retired_ports
        self._has_submitted = False
        self._opened: dict[str, tuple[frozenset[str], int]] = {}
        """Addresses of hosts, and the port, that connections to each open peer go to."""
        self._engine: Any = None
        self._engine, self._ports = self._start()
        self._has_scatter = hasattr(self._engine, "submit_scatter_write")

    def _start(self) -> tuple[Any, frozenset[int]]:
        """A new engine with all ranges registered, and the ports it listens on."""
        before = listening_ports()
        engine = self._make_engine()
        code = engine.initialize(self._host, "P2PHANDSHAKE", self._protocol, "")
        if code != 0:
            raise TransferError(
                f"the {self._protocol} engine does not start on {self._host}: code {code}",
                is_drained=True,
            )
        for address, num_bytes in self._ranges:
            _register(engine, address, num_bytes)
        ports = frozenset({engine.get_rpc_port()} | (listening_ports() - before))
        notice_lost_peers(ports)
        return engine, ports

    @property
    def data_address(self) -> str:
        """What the engine calls itself, and the port of its data where that is known."""
        rpc_port = self._running().get_rpc_port()
        others = self._ports - {rpc_port}
        suffix = f"{_DATA_PORT}{min(others)}" if len(others) == 1 else ""
        return f"{self._host}:{rpc_port}{suffix}"

    def register(self, address: int, num_bytes: int) -> None:
        check_new_range(self._ranges, address, num_bytes)
        _register(self._running(), address, num_bytes)
        self._ranges.append((address, num_bytes))

    def open(self, peer_data_address: str) -> Channel:
        peer, _, data_port = peer_data_address.partition(_DATA_PORT)
        code = self._running().send_probe(peer)
        if code != 0:
            raise TransferError(
                f"{peer_data_address} does not answer a probe: code {code}", is_drained=True
            )
        if data_port.isdecimal():
            self._opened[peer_data_address] = (_resolve(peer), int(data_port))
        return Channel(peer_data_address)

    def abandon(self, peer_data_address: str) -> Ticket | None:
        """See `Transport`. Does nothing where another open peer is reached at the same place."""
        place = self._opened.pop(peer_data_address, None)
        if place is None or not self._ranges:
            return None
        hosts, port = place
        if any(port == each[1] and hosts & each[0] for each in list(self._opened.values())):
            return None
        connections = connections_to(hosts, port)
        peer = peer_data_address.partition(_DATA_PORT)[0]
        return _Closing(peer, connections) if connections else None

    def submit(self, channel: Channel, writes: Sequence[Write]) -> Ticket:
        engine = self._running()
        self._has_submitted = True
        peer = channel.peer_data_address.partition(_DATA_PORT)[0]
        if self._has_scatter:
            return _Ticket([], self._submit_scatter(peer, as_writes(writes)))
        ticket = _Ticket([])
        for write in writes:
            number = engine.transfer_submit_write(peer, write.source, write.target, write.num_bytes)
            if number in (0, -1):
                ticket.failure = TicketStatus.FAILED_DRAINED
                break
            ticket.pending.append(number)
        return ticket

    def poll(self, ticket: Ticket) -> TicketStatus:
        if isinstance(ticket, _Closing):
            return self._poll_closing(ticket)
        assert isinstance(ticket, _Ticket)
        if ticket.status is TicketStatus.PENDING:
            is_scatter = ticket.scatter is not None
            ticket.status = self._poll_scatter(ticket) if is_scatter else self._poll_each(ticket)
        return ticket.status

    def renew(self) -> None:
        if self._has_submitted:
            raise InvariantError("a transport that writes cannot be renewed")
        old, old_ports = self._running(), self._ports
        self._engine, self._ports = self._start_on_fresh_ports()
        self._retired_ports |= old_ports
        if _silence(old, self._ranges, old_ports):
            self._retired.append(old)
            del self._retired[:-_MAX_RETIRED]
            return
        del old  # the last reference
        if old_ports & listening_ports():
            raise TransferError(f"the old engine still listens on {sorted(old_ports)}")

    def _start_on_fresh_ports(self) -> tuple[Any, frozenset[int]]:
        """A peer that has not heard tries the old ports for ever: they are not used again."""
        rejected: list[Any] = []
        for _ in range(_MAX_STARTS):
            engine, ports = self._start()
            if not ports & self._retired_ports:
                return engine, ports
            rejected.append(engine)  # kept for now, so that its ports are not given out again
        raise TransferError(f"no fresh ports in {_MAX_STARTS} starts of the engine")

    def close(self) -> None:
        """Takes up to a second: the engine waits for its threads."""
        engine, self._engine = self._engine, None
        if engine is not None:
            for address, _ in self._ranges:
                engine.unregister_memory(address)
            self._ranges = []
            self._retired.clear()

    def _running(self) -> Any:
        if self._engine is None:
            raise TransferError("the transfer engine is closed", is_drained=True)
        return self._engine

    def _poll_closing(self, ticket: _Closing) -> TicketStatus:
        engine = self._running()
        if not ticket.is_shut_down:
            ticket.is_shut_down = True
            shut_down(ticket.connections)
        if ticket.number:
            if engine.transfer_check_status(ticket.number) == _PENDING:
                return TicketStatus.PENDING
            rest = still_open(ticket.connections)
            ticket.num_idle += len(rest) == len(ticket.connections)
            ticket.connections = rest
        if not ticket.connections or ticket.num_idle >= _MAX_IDLE_WRITES:
            return TicketStatus.DONE
        number = engine.transfer_submit_write(ticket.peer, self._ranges[0][0], _NOWHERE, 1)
        ticket.number = 0 if number == -1 else number
        return TicketStatus.PENDING if ticket.number else TicketStatus.DONE

    def _poll_each(self, ticket: _Ticket) -> TicketStatus:
        check = self._running().transfer_check_status
        still_pending = []
        for number in ticket.pending:
            code = check(number)
            if code == _PENDING:
                still_pending.append(number)
            elif code != _DONE:
                ticket.failure = TicketStatus.FAILED_UNKNOWN
        ticket.pending = still_pending
        if still_pending:
            return TicketStatus.PENDING
        return ticket.failure or TicketStatus.DONE

    def _submit_scatter(self, peer: str, writes: Writes) -> Any:
        sources, targets, sizes = writes.rows.T.tolist()
        no_offsets = [[0]] * len(writes)
        lengths = [[size] for size in sizes]
        return self._running().submit_scatter_write(
            peer, sources, sizes, targets, sizes, no_offsets, no_offsets, lengths
        )

    def _poll_scatter(self, ticket: _Ticket) -> TicketStatus:
        """COMPLETION_UNKNOWN means that something is in flight still; the mover has a deadline."""
        name = ticket.scatter.drain(0).name
        if name == "COMPLETED":
            return TicketStatus.DONE
        return TicketStatus.FAILED_DRAINED if name == "FAILED_DRAINED" else TicketStatus.PENDING
