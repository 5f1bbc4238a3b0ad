"""What moves bytes: the interface that loopback and Mooncake implement, and that the mover uses.

Only the mover's thread calls `submit`, `poll` and `abandon`; `open` and `renew` may block and run on threads of
their own; `register` and `close` are called at start and stop. A write is one contiguous copy from local to
remote registered memory. A batch is not atomic: when it fails, any part of it may have landed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from ..common.errors import TransferError


class Write(NamedTuple):
    """Copy `num_bytes` from the local address `source` to the peer's address `target`."""

    source: int
    target: int
    num_bytes: int


class Writes(Sequence[Write]):
    """Many writes in one array: planned, cut and handed on without a Python object for each.

    `rows`: int64 [writes, 3]: source, target, bytes. Read it, do not change it.
    """

    __slots__ = ("rows",)

    def __init__(self, writes: Sequence[Write] | NDArray[np.int64]) -> None:
        self.rows: NDArray[np.int64] = np.asarray(writes, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, key: int) -> Write: ...

    @overload
    def __getitem__(self, key: slice) -> Writes: ...

    def __getitem__(self, key: int | slice) -> Write | Writes:
        if isinstance(key, slice):
            return Writes(self.rows[key])
        return Write(*self.rows[key].tolist())

    def __iter__(self) -> Iterator[Write]:
        return map(Write._make, self.rows.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.rows, dtype=dtype, copy=copy)

    def head(self, max_writes: int, max_bytes: int) -> Writes:
        """The first writes: as many as it takes to reach `max_bytes`, at most `max_writes`."""
        rows = self.rows[:max_writes]
        num_whole = int(np.searchsorted(rows[:, 2].cumsum(), max_bytes))
        return Writes(rows[: num_whole + 1])

    @property
    def num_bytes(self) -> int:
        return int(self.rows[:, 2].sum())


def as_writes(writes: Sequence[Write]) -> Writes:
    """`writes` as one array; itself if it is one."""
    return writes if isinstance(writes, Writes) else Writes(writes)


BATCH_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Channel:
    """A way to one peer.

    Attributes:
        batch_bytes: writes are submitted together up to so many bytes: one ticket, one look at it.
        is_limited: whether writes in flight count against `max_writes_in_flight`.
        num_lanes: ways that batches take in turn; so many times the limit may be in flight.
    """

    peer_data_address: str
    batch_bytes: int = BATCH_BYTES
    is_limited: bool = True
    num_lanes: int = 1


class Ticket:
    """One submitted batch; each transport has its own kind."""

    __slots__ = ()


class TicketStatus(enum.Enum):
    PENDING = "pending"
    DONE = "done"
    """Every byte is applied at the target."""
    FAILED_DRAINED = "failed, drained"
    """Failed, and nothing of the batch can land any more, nor is its source read any more."""
    FAILED_UNKNOWN = "failed, unknown"
    """Failed, and parts may still land: both sides' pages must be kept out of use."""


class Transport(Protocol):
    @property
    def data_address(self) -> str:
        """Where peers reach this transport; goes into Hello. Without a comma, but for StripedTransport."""
        ...

    def register(self, address: int, num_bytes: int) -> None:
        """Makes memory readable for own writes and writable for peers'.

        TransferError if the range is empty, or overlaps one that is registered.
        """
        ...

    def open(self, peer_data_address: str) -> Channel:
        """Prepares writing to a peer; may block for seconds. TransferError if it does not answer."""
        ...

    def submit(self, channel: Channel, writes: Sequence[Write]) -> Ticket:
        """Starts a batch and returns at once; failures show in `poll`."""
        ...

    def poll(self, ticket: Ticket) -> TicketStatus:
        """Never blocks. May be called again after the end, with the same answer."""
        ...

    def abandon(self, peer_data_address: str) -> Ticket | None:
        """The peer that was there is dead or has moved: frees what is held for it, never blocks.

        What is in flight to it fails. Poll the ticket, if there is one, to its end, whatever that is.
        """
        return None

    def renew(self) -> None:
        """Moves to a new data address, with everything registered, and closes the old one.

        When it returns, nothing that peers have submitted or will submit for the old address can
        land any more, whatever state they are in. For transports that only receive: InvariantError
        after the first `submit`. Blocks for a second or two. TransferError if it fails: then bytes
        may still land, and it can be tried again.
        """
        ...

    def close(self) -> None:
        """Frees everything; peers' writes fail from now on. May be called twice."""
        ...


def check_new_range(registered: Sequence[tuple[int, int]], address: int, num_bytes: int) -> None:
    """Raises TransferError unless [address, +num_bytes) is not empty and overlaps none.

    `registered`: (address, num_bytes) of each range.
    """
    if num_bytes <= 0 or address <= 0:
        raise TransferError(f"cannot register {num_bytes} bytes at {address:#x}", is_drained=True)
    for start, size in registered:
        if address < start + size and start < address + num_bytes:
            raise TransferError(
                f"[{address:#x}, +{num_bytes}) overlaps [{start:#x}, +{size}), which is registered",
                is_drained=True,
            )
