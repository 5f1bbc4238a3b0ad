"""One lease on the decode side: a pure state machine.

    RECEIVING -> READY -> ENDED
    RECEIVING -> FAILED -> ENDED        RECEIVING -> ENDED

| state     | meaning                                                                          |
|-----------|----------------------------------------------------------------------------------|
| RECEIVING | granted; pages are written, announced, verified                                  |
| READY     | every page verified and committed: the request runs; the writer is not done yet  |
| FAILED    | the prompt will not arrive; waiting for Drained or a fence                       |
| ENDED     | nobody can write any more; forgotten by the importer                             |

The importer feeds it events and executes the actions, on the I/O thread. Always holds: LeaseEnded
is posted once, after Drained or a fence and nothing else, never by time; before it exactly one of
ImportReady and ImportFailed; ImportReady only if verified chunks cover every page of the prompt.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from ..common import wire
from ..common.clock import Clock
from ..common.config import TransferSection
from ..common.errors import InvariantError, ProtocolError
from .events import ImportEvent, ImportFailed, ImportReady, Key, LeaseEnded, LeaseQuarantined
from .inbound_events import (
    Action,
    Event,
    ImportCancelled,
    LeaseTick,
    Reply,
    StartVerify,
    Tell,
    Verified,
    WriterDown,
    WriterFenced,
    WriterUp,
)

MAX_RESEND_INTERVALS = 16
"""What stays unanswered is sent again at doubling intervals, up to so many resend intervals."""


class InboundState(enum.Enum):
    RECEIVING = "receiving"
    READY = "ready"
    FAILED = "failed"
    ENDED = "ended"


@dataclass(slots=True)
class _Arrival:
    """What is known of one chunk: its newest announcement, and the verdict (None: not yet)."""

    chunk: wire.Chunk
    is_good: bool | None = None


@dataclass(slots=True)
class Inbound:
    """See the module. `advance` is the only way to change it.

    Attributes:
        num_pages: pages of the prompt, all of which must arrive.
        num_layers: of all regions together, in each of which they must.
        has_checksums: whether a chunk must carry one a layer; else nothing is verified.
    """

    grant: wire.Grant
    num_pages: int
    num_layers: int
    has_checksums: bool
    config: TransferSection
    clock: Clock
    state: InboundState = InboundState.RECEIVING
    arrivals: dict[int, _Arrival] = field(default_factory=dict)
    is_quarantined: bool = False
    _is_writer_up: bool = True
    _commit: wire.Commit | None = None
    _reason: str = ""
    _num_resends: int = 0
    _next_send_s: float = 0.0
    _actions: list[Action] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.grant.request_id, self.grant.attempt

    @property
    def lease_id(self) -> int:
        return self.grant.lease_id

    def advance(self, event: Event) -> list[Action]:
        """Takes one event and returns what to do, in order.

        Raises InvariantError for a local event that is illegal in this state, ProtocolError for a
        message that the peer must not send now (nothing has changed then).
        """
        handle = _TRANSITIONS.get((self.state, type(event)))
        if handle is None:
            where = f"{type(event).__name__} in state {self.state.value} of lease {self.lease_id}"
            if isinstance(event, wire.Message):
                raise ProtocolError(f"prefill sent {where}")
            raise InvariantError(where)
        handle(self, event)
        actions, self._actions = self._actions, []
        return actions

    def begin(self) -> list[Action]:
        """The first actions: the Grant itself."""
        self._reply(self.grant)
        self._back_off(self.clock.now())
        actions, self._actions = self._actions, []
        return actions

    # ---- receiving ----

    def _on_offer(self, offer: wire.Offer) -> None:
        self._reply(self.grant)

    def _on_chunk(self, chunk: wire.Chunk) -> None:
        known = self.arrivals.get(chunk.sequence)
        if known is not None and chunk.tries <= known.chunk.tries:
            if chunk.tries == known.chunk.tries and known.is_good is not None:
                self._acknowledge(known)
            return
        if known is not None and known.is_good:
            self._acknowledge(known)
            return
        self._check(chunk)
        self.arrivals[chunk.sequence] = arrival = _Arrival(chunk)
        if self.has_checksums:
            self._actions.append(StartVerify(chunk))
        else:
            self._decide(arrival, True)

    def _check(self, chunk: wire.Chunk) -> None:
        """Raises ProtocolError for a chunk that cannot belong to this lease."""
        end, end_layer = chunk.first_page + chunk.num_pages, chunk.first_layer + chunk.num_layers
        is_inside = 0 <= chunk.first_page < end <= self.num_pages
        is_inside = is_inside and 0 <= chunk.first_layer < end_layer <= self.num_layers
        max_chunks = self.num_pages * self.num_layers
        if not is_inside or not 0 <= chunk.sequence < max_chunks or chunk.tries < 1:
            raise ProtocolError(
                f"lease {self.lease_id}: chunk {chunk.sequence}, try {chunk.tries} has pages "
                f"[{chunk.first_page}, {end}) of {self.num_pages} in layers "
                f"[{chunk.first_layer}, {end_layer}) of {self.num_layers}"
            )
        if self.has_checksums and len(chunk.checksums) != chunk.num_layers:
            raise ProtocolError(
                f"lease {self.lease_id}: {len(chunk.checksums)} checksums for "
                f"{chunk.num_layers} layers"
            )

    def _on_verified(self, event: Verified) -> None:
        arrival = self.arrivals[event.sequence]
        if arrival.chunk.tries == event.tries and arrival.is_good is None:
            self._decide(arrival, event.is_good)

    def _decide(self, arrival: _Arrival, is_good: bool) -> None:
        arrival.is_good = is_good
        self._acknowledge(arrival)
        self._finish_if_complete()

    def _acknowledge(self, arrival: _Arrival) -> None:
        self._reply(
            wire.ChunkAck(
                lease_id=self.lease_id,
                sequence=arrival.chunk.sequence,
                tries=arrival.chunk.tries,
                ok=bool(arrival.is_good),
            )
        )

    def _on_commit(self, commit: wire.Commit) -> None:
        if self._commit is not None and commit != self._commit:
            raise ProtocolError(f"lease {self.lease_id}: two different commits")
        self._commit = commit
        self._finish_if_complete()

    def _finish_if_complete(self) -> None:
        commit = self._commit
        if commit is None or len(self.arrivals) < commit.num_chunks:
            return
        if not all(arrival.is_good for arrival in self.arrivals.values()):
            return
        fault = self._coverage_fault(commit)
        if fault:
            self._fail(fault)
            return
        self.state = InboundState.READY
        self._reply_commit_ack()
        self._tell(ImportReady(self.key, self.lease_id, commit.first_token, commit.warm_positions))

    def _coverage_fault(self, commit: wire.Commit) -> str:
        """Why verified chunks are not exactly the prompt's pages; empty if they are.

        In order they must be: the layers of the first pages, from 0 to the last, then those of the
        next pages.
        """
        next_page, next_layer, num_pages = 0, 0, 0
        for sequence in range(len(self.arrivals)):
            arrival = self.arrivals.get(sequence)
            chunk = None if arrival is None else arrival.chunk
            if chunk is None or (chunk.first_page, chunk.first_layer) != (next_page, next_layer):
                return f"chunk {sequence} does not begin at page {next_page}, layer {next_layer}"
            if next_layer and chunk.num_pages != num_pages:
                return f"chunk {sequence} has {chunk.num_pages} pages, not {num_pages}"
            num_pages = chunk.num_pages
            next_layer += chunk.num_layers
            if next_layer == self.num_layers:
                next_page, next_layer = next_page + num_pages, 0
        if len(self.arrivals) != commit.num_chunks or (next_page, next_layer) != (
            self.num_pages,
            0,
        ):
            return (
                f"{len(self.arrivals)} of {commit.num_chunks} chunks hold {next_page} "
                f"of {self.num_pages} pages and {next_layer} layers of the next"
            )
        return ""

    # ---- ends ----

    def _on_cancel(self, cancel: wire.Cancel) -> None:
        self._fail(f"prefill cancelled: {cancel.reason}", is_told=True)

    def _on_own_cancel(self, event: ImportCancelled) -> None:
        self._fail(event.reason)

    def _fail(self, reason: str, *, is_told: bool = False) -> None:
        self.state = InboundState.FAILED
        self._reason = reason
        self._tell(ImportFailed(self.key, self.lease_id, reason))
        self._quarantine()
        self._num_resends = 0
        if not is_told:
            self._reply_cancel()
        self._back_off(self.clock.now())

    def _quarantine(self) -> None:
        if not self.is_quarantined:
            self.is_quarantined = True
            self._tell(LeaseQuarantined(self.lease_id))

    def _on_drained_early(self, drained: wire.Drained) -> None:
        reason = self._reason or "prefill gave the request up"
        self._tell(ImportFailed(self.key, self.lease_id, reason))
        self._on_drained(drained)

    def _on_drained(self, drained: wire.Drained) -> None:
        self._reply(wire.DrainedAck(self.lease_id))
        self._end_lease()

    def _on_fenced_early(self, event: WriterFenced) -> None:
        self._tell(ImportFailed(self.key, self.lease_id, event.reason))
        self._end_lease()

    def _on_fenced(self, event: WriterFenced) -> None:
        self._end_lease()

    def _end_lease(self) -> None:
        self.state = InboundState.ENDED
        self._tell(LeaseEnded(self.lease_id))

    # ---- session and time ----

    def _on_down(self, event: WriterDown) -> None:
        self._is_writer_up = False
        if self.state is InboundState.RECEIVING:
            self._fail(event.reason)
        else:
            self._quarantine()

    def _on_up(self, event: WriterUp) -> None:
        self._is_writer_up = True
        self._num_resends = 0
        self._resend()

    def _on_tick(self, event: LeaseTick) -> None:
        if self._is_writer_up and self.clock.now() >= self._next_send_s:
            self._resend()

    def _resend(self) -> None:
        """Asks again: prefill answers a Grant or Cancel that it does not know with Drained."""
        if self.state is InboundState.FAILED:
            self._reply_cancel()
        elif self.state is InboundState.RECEIVING and not self.arrivals:
            self._reply(self.grant)
        self._back_off(self.clock.now())

    def _back_off(self, now_s: float) -> None:
        num_intervals = min(2**self._num_resends, MAX_RESEND_INTERVALS)
        self._num_resends = min(self._num_resends + 1, MAX_RESEND_INTERVALS)
        self._next_send_s = now_s + num_intervals * self.config.resend_interval_s

    # ---- answers ----

    def _resend_cancel(self, event: Event) -> None:
        self._reply_cancel()

    def _resend_chunk_ack(self, chunk: wire.Chunk) -> None:
        arrival = self.arrivals.get(chunk.sequence)
        if arrival is not None:
            self._acknowledge(arrival)

    def _resend_commit_ack(self, commit: wire.Commit) -> None:
        self._reply_commit_ack()

    def _reply_commit_ack(self) -> None:
        self._reply(wire.CommitAck(self.lease_id))

    def _reply_cancel(self) -> None:
        request_id, attempt = self.key
        self._reply(wire.Cancel(request_id, attempt, self._reason, self.lease_id))

    def _reply(self, message: wire.AnyMessage) -> None:
        if self._is_writer_up:
            self._actions.append(Reply(message))

    def _tell(self, event: ImportEvent) -> None:
        self._actions.append(Tell(event))

    def _ignore(self, event: Event) -> None:
        """A duplicate, or news that no longer matters."""


def _transitions() -> dict[tuple[InboundState, type], Callable[[Inbound, object], None]]:
    """The one table: what each event does in each state. What is missing is illegal."""
    receiving, ready, failed, ended = InboundState
    ignore = Inbound._ignore
    table: dict[tuple[InboundState, type], object] = {}

    def on(event: type, handle: object, *states: InboundState) -> None:
        for state in states:
            table[state, event] = handle

    on(Verified, Inbound._on_verified, receiving)
    on(Verified, ignore, ready, failed, ended)
    on(ImportCancelled, Inbound._on_own_cancel, receiving)
    on(ImportCancelled, ignore, ready, failed, ended)
    on(WriterUp, Inbound._on_up, receiving, ready, failed)
    on(WriterDown, Inbound._on_down, receiving, ready, failed)
    on(WriterFenced, Inbound._on_fenced_early, receiving)
    on(WriterFenced, Inbound._on_fenced, ready, failed)
    on(LeaseTick, Inbound._on_tick, receiving, ready, failed)
    on(wire.Offer, Inbound._on_offer, receiving)
    on(wire.Offer, ignore, ready)
    on(wire.Offer, Inbound._resend_cancel, failed)
    on(wire.Chunk, Inbound._on_chunk, receiving)
    on(wire.Chunk, Inbound._resend_chunk_ack, ready)
    on(wire.Chunk, Inbound._resend_cancel, failed)
    on(wire.Commit, Inbound._on_commit, receiving)
    on(wire.Commit, Inbound._resend_commit_ack, ready)
    on(wire.Commit, Inbound._resend_cancel, failed)
    on(wire.Cancel, Inbound._on_cancel, receiving)
    on(wire.Cancel, ignore, ready, failed)
    on(wire.Drained, Inbound._on_drained_early, receiving)
    on(wire.Drained, Inbound._on_drained, ready, failed)
    return table  # type: ignore[return-value]


_TRANSITIONS = _transitions()
