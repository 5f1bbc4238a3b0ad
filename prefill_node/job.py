"""One prompt on the prefill node: its state, its lengths and its pages.

    QUEUED -> OFFERED -> COMPUTING -> SENT -> RELEASED
    any state before the end -> CANCELLED -> RELEASED

Pages are held from OFFERED until the hand-off says that nothing reads them any more (RELEASED).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..common.errors import InvariantError
from ..common.wire import Submit
from ..hostpool.pages import PageLease

RequestKey = tuple[str, int]
"""(request_id, attempt)."""


class JobState(enum.Enum):
    QUEUED = "queued"
    OFFERED = "offered"
    COMPUTING = "computing"
    SENT = "sent"
    CANCELLED = "cancelled"
    RELEASED = "released"


TRANSITIONS: dict[JobState, tuple[JobState, ...]] = {
    JobState.QUEUED: (JobState.OFFERED, JobState.RELEASED),
    JobState.OFFERED: (JobState.COMPUTING, JobState.CANCELLED, JobState.RELEASED),
    JobState.COMPUTING: (JobState.SENT, JobState.CANCELLED),
    JobState.SENT: (JobState.CANCELLED, JobState.RELEASED),
    JobState.CANCELLED: (JobState.RELEASED,),
    JobState.RELEASED: (),
}


@dataclass(slots=True, eq=False)
class Job:
    """Only the step thread touches it.

    Attributes:
        lease: device pages of the prompt, in order of position; None while QUEUED.
        computed_len: positions whose rows are on the device.
        sent_pages: pages handed to the hand-off.
    """

    submit: Submit
    state: JobState = JobState.QUEUED
    lease: PageLease | None = None
    computed_len: int = 0
    sent_pages: int = 0

    @property
    def key(self) -> RequestKey:
        return (self.submit.request_id, self.submit.attempt)

    @property
    def num_tokens(self) -> int:
        return len(self.submit.prompt_token_ids)

    @property
    def num_left(self) -> int:
        """Prompt tokens still to compute."""
        return self.num_tokens - self.computed_len

    @property
    def pages(self) -> list[int]:
        if self.lease is None:
            raise InvariantError(f"{self.key} is {self.state.name} and holds no pages")
        return self.lease.pages

    def advance(self, state: JobState) -> None:
        """Goes to `state`; InvariantError if the table does not allow it."""
        if state not in TRANSITIONS[self.state]:
            raise InvariantError(f"{self.key}: {self.state.name} -> {state.name} is not legal")
        self.state = state
