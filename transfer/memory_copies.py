"""Transports that copy instead of sending: into peers' memory that this process has mapped.

`MemoryTransport` copies, `RoutedTransport` is one transport made of it and of one for the wire. What
was said of writes holds: a copy that began may end late if its process is stopped, and only its own
word (the ticket) or its process's death proves that it has ended. Cutting connections or moving to a
new data address does not, so leases written this way never end by a forced fence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from ..common.errors import InvariantError
from .shared_paths import PREFIX
from .transport import Channel, Ticket, TicketStatus, Transport, Write, check_new_range

Block = tuple[int, int, int]
"""(source address, target address, bytes)."""

Copy = Callable[[Sequence[Block]], Callable[[], bool]]
"""Starts copies; returns what tells, without waiting, whether they have ended."""

HOST_BATCH_BYTES = 4 * 1024 * 1024
"""Copied by the mover's thread in one go: about a millisecond."""
DEVICE_BATCH_BYTES = 256 * 1024 * 1024
"""Given to a device at once."""


def copy_on_host(blocks: Sequence[Block]) -> Callable[[], bool]:
    """A Copy that has ended when it returns. Both sides in host memory; the GIL is not held."""
    for source, target, num_bytes in blocks:
        ctypes.memmove(target, source, num_bytes)
    return lambda: True


class _Copying(Ticket):
    __slots__ = ("is_done",)

    def __init__(self, is_done: Callable[[], bool]) -> None:
        self.is_done = is_done


class MemoryTransport(Transport):
    """See the module; `batch_bytes` are given to `copy` at a time."""

    def __init__(self, copy: Copy = copy_on_host, batch_bytes: int = HOST_BATCH_BYTES) -> None:
        self._copy = copy
        self._batch_bytes = batch_bytes
        self._ranges: list[tuple[int, int]] = []

    @property
    def data_address(self) -> str:
        return ""

    def register(self, address: int, num_bytes: int) -> None:
        check_new_range(self._ranges, address, num_bytes)
        self._ranges.append((address, num_bytes))

    def open(self, peer_data_address: str) -> Channel:
        return Channel(peer_data_address, self._batch_bytes, is_limited=False)

    def submit(self, channel: Channel, writes: Sequence[Write]) -> Ticket:
        return _Copying(self._copy(writes))

    def poll(self, ticket: Ticket) -> TicketStatus:
        assert isinstance(ticket, _Copying)
        return TicketStatus.DONE if ticket.is_done() else TicketStatus.PENDING

    def renew(self) -> None:
        raise InvariantError("a transport that only copies out cannot be fenced by its peer")

    def close(self) -> None:
        """Nothing is open."""


class RoutedTransport(Transport):
    """`memory` for addresses that begin with PREFIX, `wire` for all else."""

    def __init__(self, wire: Transport, memory: MemoryTransport) -> None:
        self._wire = wire
        self._memory = memory

    @property
    def data_address(self) -> str:
        return self._wire.data_address

    def register(self, address: int, num_bytes: int) -> None:
        self._wire.register(address, num_bytes)

    def open(self, peer_data_address: str) -> Channel:
        is_mapped = peer_data_address.startswith(PREFIX)
        return (self._memory if is_mapped else self._wire).open(peer_data_address)

    def submit(self, channel: Channel, writes: Sequence[Write]) -> Ticket:
        is_mapped = channel.peer_data_address.startswith(PREFIX)
        return (self._memory if is_mapped else self._wire).submit(channel, writes)

    def poll(self, ticket: Ticket) -> TicketStatus:
        return (self._memory if isinstance(ticket, _Copying) else self._wire).poll(ticket)

    def abandon(self, peer_data_address: str) -> Ticket | None:
        is_mapped = peer_data_address.startswith(PREFIX)
        return (self._memory if is_mapped else self._wire).abandon(peer_data_address)

    def renew(self) -> None:
        self._wire.renew()

    def close(self) -> None:
        self._wire.close()
