"""What happens to a transfer on the prefill side, and what it asks for. See outbound.py.

Messages of decode are events too; those here are local. The exporter makes the events and executes
the actions, on the I/O thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common import wire
from .events import ExportEvent
from .jobs import PageSource, WriteResult
from .pages import LayerSpan

# ---- events that are not messages ----


@dataclass(frozen=True, slots=True)
class PagesReady:
    """`pieces`: the layers that are written, announced and verified together, in order."""

    first_page: int
    source_pages: tuple[int, ...]
    pieces: tuple[LayerSpan, ...]
    source: PageSource | None = None
    """What makes them final; None: they are."""


@dataclass(frozen=True, slots=True)
class CommitReady:
    first_token: wire.OutputToken
    warm_positions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class CancelRequested:
    reason: str


@dataclass(frozen=True, slots=True)
class WriteEnded:
    sequence: int
    tries: int
    result: WriteResult


@dataclass(frozen=True, slots=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A session with decode is up: the first, or the same incarnation again."""


@dataclass(frozen=True, slots=True)
class PeerDown:
    reason: str


@dataclass(frozen=True, slots=True)
class PeerReplaced:
    """The incarnation that granted the lease is dead."""

    reason: str


@dataclass(frozen=True, slots=True)
class TargetFenced:
    """Decode lives, and has closed the address that the lease was granted under."""

    reason: str


Event = (
    PagesReady
    | CommitReady
    | CancelRequested
    | WriteEnded
    | Tick
    | PeerUp
    | PeerDown
    | PeerReplaced
    | TargetFenced
    | wire.Grant
    | wire.Defer
    | wire.Refuse
    | wire.ChunkAck
    | wire.CommitAck
    | wire.Cancel
    | wire.DrainedAck
)


# ---- actions ----


@dataclass(frozen=True, slots=True)
class Send:
    message: wire.AnyMessage


@dataclass(frozen=True, slots=True)
class StartWrite:
    """Write these source pages over the lease's pages from `first_page` on, in some layers."""

    sequence: int
    tries: int
    first_page: int
    source_pages: tuple[int, ...]
    layers: LayerSpan
    source: PageSource | None = None


@dataclass(frozen=True, slots=True)
class StopWrites:
    """Submit no more; those in flight still end with WriteEnded."""


@dataclass(frozen=True, slots=True)
class Post:
    event: ExportEvent


Action = Send | StartWrite | StopWrites | Post
