"""What happens to a lease on the decode side, and what it asks for. See inbound.py.

Messages of prefill are events too; those here are local. The importer makes the events and executes
the actions, on the I/O thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common import wire
from .events import ImportEvent

# ---- events that are not messages ----


@dataclass(frozen=True, slots=True)
class Verified:
    sequence: int
    tries: int
    is_good: bool


@dataclass(frozen=True, slots=True)
class ImportCancelled:
    """Our own node gives the request up."""

    reason: str


@dataclass(frozen=True, slots=True)
class WriterUp:
    """The session with the writer is up again, same incarnation."""


@dataclass(frozen=True, slots=True)
class WriterDown:
    reason: str


@dataclass(frozen=True, slots=True)
class WriterFenced:
    """The writer's incarnation is dead, or what it writes to is closed: it can never write again."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeaseTick:
    pass


Event = (
    Verified
    | ImportCancelled
    | WriterUp
    | WriterDown
    | WriterFenced
    | LeaseTick
    | wire.Offer
    | wire.Chunk
    | wire.Commit
    | wire.Cancel
    | wire.Drained
)


# ---- actions ----


@dataclass(frozen=True, slots=True)
class Reply:
    message: wire.AnyMessage


@dataclass(frozen=True, slots=True)
class StartVerify:
    """Hash the pages of a chunk and compare."""

    chunk: wire.Chunk


@dataclass(frozen=True, slots=True)
class Tell:
    event: ImportEvent


Action = Reply | StartVerify | Tell
