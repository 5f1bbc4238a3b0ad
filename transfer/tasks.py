"""What the mover keeps of a job that it was given and that has not ended. Its thread owns all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .checksum import Hashing
from .jobs import VerifyJob, WriteJob
from .transport import Ticket, TicketStatus


@dataclass(slots=True, eq=False)
class Flight:
    """A batch under way."""

    ticket: Ticket
    num_writes: int
    deadline_s: float


@dataclass(slots=True, eq=False)
class Writing:
    """A write job that is queued or has begun."""

    job: WriteJob
    staged: Callable[[], bool] | None = None
    """Asks whether the bytes are there; None once they are."""
    hashing: Hashing | None = None
    num_submitted: int = 0
    flights: list[Flight] = field(default_factory=list)
    failure: TicketStatus | None = None
    reason: str = ""

    @property
    def is_submitted(self) -> bool:
        return self.failure is not None or self.num_submitted == len(self.job.writes)

    @property
    def is_hashed(self) -> bool:
        if self.failure is not None or not self.job.parts:
            return True
        return self.hashing is not None and self.hashing.is_done

    def check_staged(self) -> bool:
        if self.staged is not None and self.staged():
            self.staged = None
        return self.staged is None

    def fail(self, status: TicketStatus, reason: str) -> None:
        if self.failure is not TicketStatus.FAILED_UNKNOWN:
            self.failure, self.reason = status, reason


@dataclass(slots=True, eq=False)
class Verifying:
    job: VerifyJob
    hashing: Hashing | None = None
