"""What the mover is asked to do, and how it answers. Made by exporter and importer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from .checksum import Segment
from .transport import TicketStatus, Writes

Part = Sequence[Segment]
"""Bytes that are hashed to one value, in this order: a chunk's pages in one layer."""

Plan = Callable[[], tuple[Writes, Sequence[Part]]]
"""Which writes a job is, and which parts are hashed."""

Stage = Callable[[], Callable[[], bool]]
"""Starts what must happen before a job's bytes may be read, without waiting for it; what it returns
tells, without waiting, whether it has happened. Both are called on the mover's thread."""


class PageSource(Protocol):
    """Pages that a device is still computing, or that lie where the transport cannot read.

    Both calls start something, and return what tells without waiting whether it has ended; they are
    made on the mover's thread.
    """

    def stage(self, pages: Sequence[int], layers: Mapping[str, range]) -> Callable[[], bool]:
        """The pages' bytes in these layers (by region name) are final in the exporter's regions."""
        ...

    def settle(self) -> Callable[[], bool]:
        """The pages' bytes are final where they are computed: in the exporter's direct regions."""
        ...


@dataclass(frozen=True, slots=True)
class WriteResult:
    """How a write job ended. `checksums`: one a part, empty unless DONE with hashing asked for."""

    status: TicketStatus
    checksums: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class WriteJob:
    """Execute writes, and hash parts (none: no checksums) while they are under way.

    `plan` says which; it is called once, on the mover's thread, when the job's turn has come, so
    that the first of many jobs begins before the others are planned. The sources must not change
    before `on_end` is called. `stage`: started as soon as the job is queued; the job ends only
    after it has, also when it is cancelled.
    """

    owner: Hashable
    peer_data_address: str
    plan: Plan
    on_end: Callable[[WriteResult], None]
    stage: Stage | None = None

    @cached_property
    def _planned(self) -> tuple[Writes, Sequence[Part]]:
        return self.plan()

    @property
    def writes(self) -> Writes:
        return self._planned[0]

    @property
    def parts(self) -> Sequence[Part]:
        return self._planned[1]


@dataclass(frozen=True, slots=True)
class VerifyJob:
    """Hash `parts` and compare with `expected`; ends with whether all are equal."""

    owner: Hashable
    parts: Sequence[Part]
    expected: Sequence[int]
    on_end: Callable[[bool], None]
