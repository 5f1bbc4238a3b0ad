"""One transfer on the prefill side: a pure state machine.

    OFFERED -> GRANTED -> STREAMING -> COMMITTED -> DRAINED -> CLOSED
       any before DRAINED -> CANCELLED -> DRAINED, QUARANTINED or CLOSED

| state       | meaning                                                                        |
|-------------|--------------------------------------------------------------------------------|
| OFFERED     | no lease: nothing may be written                                               |
| GRANTED     | pages known, none written yet                                                  |
| STREAMING   | chunks are written, acknowledged, written again                                |
| COMMITTED   | all chunks written once, Commit sent; chunks may still be written again        |
| CANCELLED   | no new write starts; what is in flight is waited for                           |
| DRAINED     | nothing in flight, never a write again; Drained is sent until acknowledged     |
| QUARANTINED | a write may still land: Drained must never be sent; the lease waits for a fence|
| CLOSED      | forgotten by the exporter                                                      |

The exporter feeds it events and executes the actions, on the I/O thread. Always holds: a write
starts only in GRANTED, STREAMING or COMMITTED; Drained is sent only with nothing in flight and no
write of unknown outcome; one of Refused, Failed, Done is posted once, then Released once.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from ..common import wire
from ..common.clock import Clock
from ..common.config import TransferSection
from ..common.errors import InvariantError, ProtocolError
from .events import (
    ExportDone,
    ExportEvent,
    ExportFailed,
    ExportGranted,
    ExportRefused,
    ExportReleased,
    ExportRequest,
    ExportUnquarantined,
)
from .outbound_chunks import Chunk, ChunkState
from .outbound_events import (
    Action,
    CancelRequested,
    CommitReady,
    Event,
    PagesReady,
    PeerDown,
    PeerReplaced,
    PeerUp,
    Post,
    Send,
    StopWrites,
    TargetFenced,
    Tick,
    WriteEnded,
)
from .transport import TicketStatus


class OutboundState(enum.Enum):
    OFFERED = "offered"
    GRANTED = "granted"
    STREAMING = "streaming"
    COMMITTED = "committed"
    CANCELLED = "cancelled"
    DRAINED = "drained"
    QUARANTINED = "quarantined"
    CLOSED = "closed"


@dataclass(slots=True)
class Outbound:
    """See the module. `advance` is the only way to change it."""

    request: ExportRequest
    config: TransferSection
    clock: Clock
    state: OutboundState = OutboundState.OFFERED
    lease_id: int = 0
    num_leased_pages: int = 0
    num_pages: int = 0
    """Pages given by pages_ready so far."""
    chunks: list[Chunk] = field(default_factory=list)
    num_in_flight: int = 0
    has_unknown: bool = False
    is_shared: bool = False
    """Written through memory that both processes map; set before the offer, then fixed."""
    _is_fenced: bool = False
    """Nothing that was or will be written under the lease can land."""
    _is_peer_up: bool = False
    _is_cancel_heard: bool = False
    _has_ended: bool = False
    _has_released: bool = False
    _reason: str = ""
    _commit: CommitReady | None = None
    _next_send_s: float = 0.0
    _deadline_s: float = 0.0
    _actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._deadline_s = self.clock.now() + self.config.deadline_s

    def advance(self, event: Event) -> list[Action]:
        """Takes one event and returns what to do, in order.

        Raises InvariantError for a local event that is illegal in this state, ProtocolError for a
        message that the peer must not send now (nothing has changed then).
        """
        handle = _TRANSITIONS.get((self.state, type(event)))
        if handle is None:
            where = f"{type(event).__name__} in state {self.state.value} of {self.request.key}"
            if isinstance(event, wire.Message):
                raise ProtocolError(f"{self.request.decode_id} sent {where}")
            raise InvariantError(where)
        handle(self, event)
        actions, self._actions = self._actions, []
        return actions

    # ---- towards the grant ----

    def _on_grant(self, grant: wire.Grant) -> None:
        self.state = OutboundState.GRANTED
        self.lease_id = grant.lease_id
        self.num_leased_pages = sum(run.count for run in grant.kv_runs)
        self._post(ExportGranted(self.request.key))
        self._write_waiting()

    def _on_defer(self, defer: wire.Defer) -> None:
        if self.clock.now() >= self._deadline_s - self.config.deadline_s + self.config.max_defer_s:
            full = f"{self.request.decode_id} has been full for {self.config.max_defer_s} s"
            self._end(ExportRefused(self.request.key, full, 429, "overloaded"))
            self._settle(OutboundState.CLOSED)
            return
        is_sane = 0 <= defer.retry_after_s <= self.config.deadline_s
        wait_s = defer.retry_after_s if is_sane else self.config.resend_interval_s
        self._next_send_s = self.clock.now() + wait_s

    def _on_refuse(self, refuse: wire.Refuse) -> None:
        self._end(ExportRefused(self.request.key, refuse.reason, refuse.status, refuse.code))
        self._settle(OutboundState.CLOSED)

    def _send_offer(self) -> None:
        request = self.request
        self._send(
            wire.Offer(
                request_id=request.request_id,
                attempt=request.attempt,
                num_prompt_tokens=request.num_prompt_tokens,
                sampling=request.sampling,
                front_id=request.front_id,
                is_shared=self.is_shared,
            )
        )

    # ---- chunks ----

    def _buffer_pages(self, event: PagesReady) -> None:
        if event.first_page != self.num_pages or not event.source_pages or self._commit:
            raise InvariantError(
                f"{self.request.key}: {len(event.source_pages)} pages at {event.first_page} "
                f"after {self.num_pages} pages" + (" and the commit" if self._commit else "")
            )
        self.num_pages += len(event.source_pages)
        for layers in event.pieces:
            self.chunks.append(
                Chunk(len(self.chunks), event.first_page, event.source_pages, layers, event.source)
            )

    def _on_pages(self, event: PagesReady) -> None:
        self._buffer_pages(event)
        self._write_waiting()

    def _write_waiting(self) -> None:
        if self.num_pages > self.num_leased_pages:
            self._fail(f"{self.num_pages} pages do not fit a lease of {self.num_leased_pages}")
            return
        for chunk in self.chunks:
            if chunk.state is ChunkState.WAITING:
                self.state = OutboundState.STREAMING
                self._write(chunk)

    def _write(self, chunk: Chunk) -> None:
        self.num_in_flight += 1
        self._actions.append(chunk.start_write())

    def _on_write_ended(self, event: WriteEnded) -> None:
        self.num_in_flight -= 1
        chunk = self.chunks[event.sequence]
        if event.result.status is not TicketStatus.DONE:
            self.has_unknown |= event.result.status is TicketStatus.FAILED_UNKNOWN
            self._fail(event.result.reason or event.result.status.value)
            return
        chunk.state = ChunkState.SENT
        chunk.checksums = event.result.checksums
        self._send_chunk(chunk)
        self._commit_if_written()

    def _send_chunk(self, chunk: Chunk) -> None:
        self._send(chunk.announcement(self.lease_id, self.clock.now()))

    def _on_chunk_ack(self, ack: wire.ChunkAck) -> None:
        if not 0 <= ack.sequence < len(self.chunks):
            raise ProtocolError(f"{self.request.key}: no chunk {ack.sequence}")
        chunk = self.chunks[ack.sequence]
        if chunk.state is not ChunkState.SENT or ack.tries != chunk.tries:
            return  # a duplicate
        if ack.ok:
            chunk.state = ChunkState.ACKED
        elif chunk.tries < self.config.max_chunk_tries:
            self._write(chunk)
        else:
            self._fail(f"chunk {chunk.sequence} arrived wrong {chunk.tries} times")

    # ---- the commit ----

    def _buffer_commit(self, event: CommitReady) -> None:
        if self._commit is not None or not self.chunks:
            raise InvariantError(f"{self.request.key}: second commit, or one without pages")
        self._commit = event

    def _on_commit(self, event: CommitReady) -> None:
        self._buffer_commit(event)
        self._commit_if_written()

    def _commit_if_written(self) -> None:
        if self.state is not OutboundState.STREAMING or self._commit is None:
            return
        if all(chunk.was_announced for chunk in self.chunks):
            self.state = OutboundState.COMMITTED
            self._send_commit()

    def _send_commit(self) -> None:
        assert self._commit is not None
        self._send(
            wire.Commit(
                lease_id=self.lease_id,
                num_chunks=len(self.chunks),
                first_token=self._commit.first_token,
                warm_positions=self._commit.warm_positions,
            )
        )

    def _on_commit_ack(self, ack: wire.CommitAck) -> None:
        if self.num_in_flight:
            raise ProtocolError(f"{self.request.key}: CommitAck while a chunk is written again")
        self._end(ExportDone(self.request.key))
        self._drain()

    # ---- ends ----

    def _on_cancel(self, event: CancelRequested | wire.Cancel) -> None:
        if isinstance(event, CancelRequested):
            self._fail(event.reason)
            return
        self._is_cancel_heard = True
        self.lease_id = self.lease_id or event.lease_id
        self._fail(f"{self.request.decode_id} cancelled: {event.reason}")

    def _fail(self, reason: str) -> None:
        """No new write from here on; the rest follows once nothing is in flight."""
        if self.state is not OutboundState.CANCELLED:
            self.state = OutboundState.CANCELLED
            self._reason = reason
            self._end(ExportFailed(self.request.key, reason))
            if not self._is_cancel_heard:
                self._send_cancel()
            if self.num_in_flight:
                self._actions.append(StopWrites())
        if not self.num_in_flight:
            self._drain()

    def _on_write_ended_late(self, event: WriteEnded) -> None:
        self.num_in_flight -= 1
        self.has_unknown |= event.result.status is TicketStatus.FAILED_UNKNOWN
        if not self.num_in_flight:
            self._drain()

    def _drain(self) -> None:
        """Nothing is in flight and nothing will be: what follows depends on what is known."""
        if not self.lease_id:
            self._settle(OutboundState.CLOSED)
        elif self.has_unknown and not self._is_fenced:
            self._settle(OutboundState.QUARANTINED)
        else:
            self._settle(OutboundState.DRAINED)
            self._send_drained()

    def _on_replaced(self, event: PeerReplaced) -> None:
        """The lease died with its node: nothing is owed to it any more."""
        self.lease_id = 0
        self._fail(event.reason)

    def _on_replaced_late(self, event: PeerReplaced) -> None:
        self.lease_id = 0

    def _close(self, event: Event) -> None:
        self.state = OutboundState.CLOSED

    def _on_quarantine_over(self, event: PeerReplaced | TargetFenced) -> None:
        """Whatever is still on its way is meant for a process or an address that is gone."""
        self.state = OutboundState.CLOSED
        self._post(ExportUnquarantined(self.request.key))

    def _on_fenced_streaming(self, event: TargetFenced) -> None:
        self._is_fenced = True
        self._fail(event.reason)

    def _on_fenced(self, event: TargetFenced) -> None:
        """Decode may have taken the request before: it answers a Commit with how the lease ended."""
        self._is_fenced = True

    def _on_cancel_heard(self, event: wire.Cancel) -> None:
        self._is_cancel_heard = True

    def _resend_drained(self, event: Event) -> None:
        self._send_drained()

    def _send_drained(self) -> None:
        self._send(
            wire.Drained(
                lease_id=self.lease_id,
                request_id=self.request.request_id,
                attempt=self.request.attempt,
            )
        )

    def _send_cancel(self) -> None:
        self._send(
            wire.Cancel(
                request_id=self.request.request_id,
                attempt=self.request.attempt,
                reason=self._reason,
                lease_id=self.lease_id,
            )
        )

    # ---- session and time ----

    def _on_up(self, event: PeerUp) -> None:
        self._is_peer_up = True
        self._next_send_s = self.clock.now()
        self._resend(self.clock.now())

    def _on_down(self, event: PeerDown) -> None:
        self._is_peer_up = False

    def _on_down_streaming(self, event: PeerDown) -> None:
        self._is_peer_up = False
        self._fail(event.reason)

    def _on_tick(self, event: Tick) -> None:
        now_s = self.clock.now()
        if now_s >= self._deadline_s and not self._has_ended:
            self._fail(f"not handed over within {self.config.deadline_s} s")
        else:
            self._resend(now_s)

    def _resend(self, now_s: float) -> None:
        """Sends again what has not been answered."""
        if not self._is_peer_up or now_s < self._next_send_s:
            return
        self._next_send_s = now_s + self.config.resend_interval_s
        if self.state is OutboundState.OFFERED:
            self._send_offer()
        elif self.state in (OutboundState.STREAMING, OutboundState.COMMITTED):
            for chunk in self.chunks:
                is_old = now_s - chunk.sent_s >= self.config.resend_interval_s
                if chunk.state is ChunkState.SENT and is_old:
                    self._send_chunk(chunk)
            if self.state is OutboundState.COMMITTED:
                self._send_commit()
        elif self.state is OutboundState.DRAINED:
            self._send_drained()
        elif not self._is_cancel_heard and self.state is not OutboundState.GRANTED:
            self._send_cancel()

    # ---- actions ----

    def _send(self, message: wire.AnyMessage) -> None:
        if self._is_peer_up:
            self._actions.append(Send(message))

    def _post(self, event: ExportEvent) -> None:
        self._actions.append(Post(event))

    def _end(self, event: ExportEvent) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._post(event)

    def _settle(self, state: OutboundState) -> None:
        """Nothing reads the source pages any more, or nobody can tell."""
        self.state = state
        self._next_send_s = self.clock.now() + self.config.resend_interval_s
        if not self._has_released:
            self._has_released = True
            self._post(ExportReleased(self.request.key, state is OutboundState.QUARANTINED))

    def _ignore(self, event: Event) -> None:
        """A duplicate, or an answer that no longer matters."""


def _transitions() -> dict[tuple[OutboundState, type], Callable[[Outbound, object], None]]:
    """The one table: what each event does in each state. What is missing is illegal."""
    offered, granted, streaming, committed, cancelled, drained, quarantined, closed = OutboundState
    leased = (granted, streaming, committed)
    late = (cancelled, drained, quarantined)
    ignore = Outbound._ignore
    table: dict[tuple[OutboundState, type], object] = {}

    def on(event: type, handle: object, *states: OutboundState) -> None:
        for state in states:
            table[state, event] = handle

    on(PagesReady, Outbound._buffer_pages, offered)
    on(PagesReady, Outbound._on_pages, granted, streaming)
    on(CommitReady, Outbound._buffer_commit, offered)
    on(CommitReady, Outbound._on_commit, streaming)
    on(CancelRequested, Outbound._on_cancel, offered, *leased)
    for command in (PagesReady, CommitReady, CancelRequested):
        on(command, ignore, *late, closed)  # the node has not heard yet
    on(WriteEnded, Outbound._on_write_ended, streaming, committed)
    on(WriteEnded, Outbound._on_write_ended_late, cancelled)
    on(Tick, Outbound._on_tick, offered, *leased, *late)
    on(PeerUp, Outbound._on_up, offered, *leased, *late)
    on(PeerDown, Outbound._on_down, offered, committed, *late)
    on(PeerDown, Outbound._on_down_streaming, granted, streaming)
    on(PeerReplaced, ignore, offered)
    on(PeerReplaced, Outbound._on_replaced, *leased)
    on(PeerReplaced, Outbound._on_replaced_late, cancelled)
    on(PeerReplaced, Outbound._close, drained)
    on(PeerReplaced, Outbound._on_quarantine_over, quarantined)
    on(TargetFenced, Outbound._on_fenced_streaming, granted, streaming)
    on(TargetFenced, Outbound._on_fenced, committed, cancelled, drained)
    on(TargetFenced, Outbound._on_quarantine_over, quarantined)
    on(wire.Grant, Outbound._on_grant, offered)
    on(wire.Grant, ignore, *leased, cancelled, quarantined)
    on(wire.Grant, Outbound._resend_drained, drained)
    on(wire.Defer, Outbound._on_defer, offered)
    on(wire.Refuse, Outbound._on_refuse, offered)
    on(wire.Defer, ignore, *leased, *late)
    on(wire.Refuse, ignore, *leased, *late)
    on(wire.ChunkAck, Outbound._on_chunk_ack, streaming, committed)
    on(wire.ChunkAck, ignore, *late)
    on(wire.CommitAck, Outbound._on_commit_ack, committed)
    on(wire.CommitAck, ignore, *late)
    on(wire.Cancel, Outbound._on_cancel, offered, *leased)
    on(wire.Cancel, Outbound._on_cancel_heard, cancelled, quarantined)
    on(wire.Cancel, Outbound._resend_drained, drained)
    on(wire.DrainedAck, Outbound._close, drained)
    return table  # type: ignore[return-value]


_TRANSITIONS = _transitions()
