"""One request on decode: its state, its lengths and what it holds.

    RESERVED -> RECEIVING -> READY -> RUNNING <-> PARKED
    RESERVED -> STAGING   -> READY                            (unified role: a local prefill)
    RESERVED -> READY                                         (re-attached: its KV was here)
    any state before the end -> FINISHED | FAILED

Positions and who has their rows (`kv_len` rows exist or are being computed):

    0 ......... durable_len ......... backup_len ......... kv_len
    | host page   | on its way there,   | ring of the seat   | not computed yet
      (final bytes)  and in the ring      (newest rows)

Output token i stands at position num_prompt_tokens + i; the newest one has no row yet. A step feeds
position `kv_len` and its result is known a step later, so up to two steps of a sequence may be in
flight. A sequence that ends meanwhile keeps its pages and its seat until none is.

READY and PARKED hold host and index pages and no seat; RUNNING holds a seat too.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..common.errors import InvariantError
from ..common.wire import OutputToken, Sampling
from ..hostpool.pages import PageLease
from ..hostpool.side_stream import Mark

RequestKey = tuple[str, int]
"""(request_id, attempt)."""


class SequenceState(enum.Enum):
    RESERVED = "reserved"
    RECEIVING = "receiving"
    STAGING = "staging"
    READY = "ready"
    RUNNING = "running"
    PARKED = "parked"
    FINISHED = "finished"
    FAILED = "failed"


_ENDS = (SequenceState.FINISHED, SequenceState.FAILED)

TRANSITIONS: dict[SequenceState, tuple[SequenceState, ...]] = {
    SequenceState.RESERVED: (
        SequenceState.RECEIVING,
        SequenceState.STAGING,
        SequenceState.READY,
        *_ENDS,
    ),
    SequenceState.RECEIVING: (SequenceState.READY, *_ENDS),
    SequenceState.STAGING: (SequenceState.READY, *_ENDS),
    SequenceState.READY: (SequenceState.RUNNING, *_ENDS),
    SequenceState.RUNNING: (SequenceState.PARKED, *_ENDS),
    SequenceState.PARKED: (SequenceState.RUNNING, *_ENDS),
    SequenceState.FINISHED: (),
    SequenceState.FAILED: (),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """Only the step thread touches it.

    Attributes:
        host_lease, index_lease: pages in order of position, growth to max_tokens included.
        kv_len: positions fed to the model, steps in flight included.
        in_flight: steps launched for it whose results are not known.
        durable_len: positions below it are final in host pages.
        backup_len: positions below it are final there or on their way, in the order of the stream.
        seat: hot buffer it holds, while RUNNING.
        admit_len: `durable_len` when it took its seat; the ring has nothing older.
        warm_positions: per index group, rows to load when it takes its first seat; see wire.Commit.
        filling: passes when its seat's hot buffer is filled; no step of it before.
    """

    key: RequestKey
    front_id: str
    sampling: Sampling
    num_prompt_tokens: int
    host_lease: PageLease
    index_lease: PageLease
    arrival_s: float
    state: SequenceState = SequenceState.RESERVED
    lease_id: int | None = None
    output: list[OutputToken] = field(default_factory=list)
    kv_len: int = 0
    in_flight: int = 0
    durable_len: int = 0
    backup_len: int = 0
    seat: int | None = None
    admit_len: int = 0
    tokens_since_seated: int = 0
    waiting_since_s: float = 0.0
    warm_positions: tuple[bytes, ...] = ()
    filling: Mark | None = None

    def advance(self, state: SequenceState) -> None:
        """Goes to `state`; InvariantError if the table does not allow it."""
        if state not in TRANSITIONS[self.state]:
            raise InvariantError(f"{self.key}: {self.state.name} -> {state.name} is not legal")
        self.state = state

    @property
    def hisparse_staging(self) -> bool:
        """A local prefill whose rows are on their way from device pages to host pages."""
        return self.state is SequenceState.STAGING

    @property
    def next_index(self) -> int:
        """Index of the output token that the next step feeds; it may still be in flight."""
        return self.kv_len - self.num_prompt_tokens

    @property
    def can_step(self) -> bool:
        """Whether one more token is wanted than those known and those in flight."""
        return not self.has_ended and self.next_index + 1 < self.sampling.max_tokens

    @property
    def num_remaining(self) -> int:
        """Output tokens it may still produce."""
        return self.sampling.max_tokens - len(self.output)

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDS
