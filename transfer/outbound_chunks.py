"""One chunk of a transfer on the prefill side: what it holds, and how far it has come. See outbound.py."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..common import wire
from .jobs import PageSource
from .outbound_events import StartWrite
from .pages import LayerSpan


class ChunkState(enum.Enum):
    WAITING = "waiting for a grant"
    WRITING = "being written"
    SENT = "written, not acknowledged"
    ACKED = "verified"


@dataclass(slots=True)
class Chunk:
    sequence: int
    first_page: int
    source_pages: tuple[int, ...]
    layers: LayerSpan
    source: PageSource | None
    state: ChunkState = ChunkState.WAITING
    tries: int = 0
    checksums: tuple[int, ...] = ()
    sent_s: float = 0.0

    @property
    def was_announced(self) -> bool:
        """Written once at least: what is written again was announced before."""
        return self.state in (ChunkState.SENT, ChunkState.ACKED) or self.tries > 1

    def start_write(self) -> StartWrite:
        """One more try begins."""
        self.state = ChunkState.WRITING
        self.tries += 1
        return StartWrite(
            self.sequence,
            self.tries,
            self.first_page,
            self.source_pages,
            self.layers,
            self.source,
        )

    def announcement(self, lease_id: int, now_s: float) -> wire.Chunk:
        """What decode is told now."""
        self.sent_s = now_s
        return wire.Chunk(
            lease_id=lease_id,
            sequence=self.sequence,
            tries=self.tries,
            first_page=self.first_page,
            num_pages=len(self.source_pages),
            first_layer=self.layers.first,
            num_layers=self.layers.num_layers,
            checksums=self.checksums,
        )
