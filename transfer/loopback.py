"""A transport inside one process: bytes move by memmove when the writer polls.

For tests (with faults injected) and for nodes that share a process. All transports of a process
find each other by `data_address`.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import threading
from collections.abc import Callable, Sequence

from ..common.errors import InvariantError, TransferError
from .transport import Channel, Ticket, TicketStatus, Transport, Write, check_new_range


class Fault(enum.Enum):
    """What happens to one write instead of a copy."""

    FAIL_DRAINED = "fails, and does not land"
    FAIL_UNKNOWN = "fails, and lands when the test calls land_late"
    HANG = "never ends, and lands when the test calls land_late"
    CORRUPT = "is done, with its first byte changed"


class _LoopbackTicket(Ticket):
    __slots__ = ("channel", "status", "writes")

    def __init__(self, channel: Channel, writes: Sequence[Write]) -> None:
        self.channel = channel
        self.writes = writes
        self.status = TicketStatus.PENDING


_names = itertools.count()
_transports: dict[str, LoopbackTransport] = {}
_lock = threading.Lock()


class LoopbackTransport(Transport):
    """See `Transport`.

    Args:
        choose_fault: called on the mover's thread for each write; None copies it.
    """

    def __init__(self, choose_fault: Callable[[Write], Fault | None] | None = None) -> None:
        self._address = f"loopback:{next(_names)}"
        self._ranges: list[tuple[int, int]] = []
        self._choose_fault = choose_fault or (lambda write: None)
        self._late: list[tuple[Channel, Write]] = []
        self._has_submitted = False
        with _lock:
            _transports[self._address] = self

    @property
    def data_address(self) -> str:
        return self._address

    def register(self, address: int, num_bytes: int) -> None:
        check_new_range(self._ranges, address, num_bytes)
        self._ranges.append((address, num_bytes))

    def open(self, peer_data_address: str) -> Channel:
        if peer_data_address not in _transports:
            raise TransferError(f"no transport at {peer_data_address!r}", is_drained=True)
        return Channel(peer_data_address)

    def submit(self, channel: Channel, writes: Sequence[Write]) -> Ticket:
        self._has_submitted = True
        return _LoopbackTicket(channel, list(writes))

    def poll(self, ticket: Ticket) -> TicketStatus:
        assert isinstance(ticket, _LoopbackTicket)
        if ticket.status is TicketStatus.PENDING and ticket.writes:
            ends = {self._execute(ticket.channel, write) for write in ticket.writes}
            ticket.writes = []
            for status in (TicketStatus.PENDING, TicketStatus.FAILED_UNKNOWN):
                if status in ends:
                    ticket.status = status
                    return status
            is_good = ends == {TicketStatus.DONE}
            ticket.status = TicketStatus.DONE if is_good else TicketStatus.FAILED_DRAINED
        return ticket.status

    def land_late(self) -> int:
        """Executes the writes that failed unknown or hang, with what their sources hold now."""
        late, self._late = self._late, []
        for channel, write in late:
            self._copy(channel, write)
        return len(late)

    def renew(self) -> None:
        if self._has_submitted:
            raise InvariantError("a transport that writes cannot be renewed")
        with _lock:
            _transports.pop(self._address, None)
            self._address = f"loopback:{next(_names)}"
            _transports[self._address] = self

    def close(self) -> None:
        with _lock:
            _transports.pop(self._address, None)

    def _execute(self, channel: Channel, write: Write) -> TicketStatus:
        fault = self._choose_fault(write)
        if fault is Fault.FAIL_DRAINED:
            return TicketStatus.FAILED_DRAINED
        if fault in (Fault.FAIL_UNKNOWN, Fault.HANG):
            self._late.append((channel, write))
            is_hanging = fault is Fault.HANG
            return TicketStatus.PENDING if is_hanging else TicketStatus.FAILED_UNKNOWN
        status = self._copy(channel, write)
        if fault is Fault.CORRUPT and status is TicketStatus.DONE:
            ctypes.c_ubyte.from_address(write.target).value ^= 0xFF
        return status

    def _copy(self, channel: Channel, write: Write) -> TicketStatus:
        with _lock:
            peer = _transports.get(channel.peer_data_address)
            if peer is None:
                return TicketStatus.FAILED_UNKNOWN
            if not peer.holds(write.target, write.num_bytes):
                return TicketStatus.FAILED_DRAINED
            ctypes.memmove(write.target, write.source, write.num_bytes)
        return TicketStatus.DONE

    def holds(self, address: int, num_bytes: int) -> bool:
        """Whether the range lies inside one registered range."""
        return any(
            start <= address and address + num_bytes <= start + size for start, size in self._ranges
        )
