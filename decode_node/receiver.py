"""Prompts that arrive over the wire: the importer's events to the decode engine and back.

Runs on the step thread, beside the engine in the step loop; the importer's own state lives on the
I/O thread. While a lease is open, its pages have a second owner, the remote writer: whatever
happens to the request, they are free only when the importer says that the lease has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..common.errors import RequestError
from ..common.layouts import KvGeometry
from ..common.wire import PageRun
from ..hostpool.mirror import HostMirror
from ..hostpool.pages import OwnerKind
from ..transfer.events import (
    ImportFailed,
    ImportReady,
    LeaseEnded,
    LeaseQuarantined,
    OfferArrived,
)
from ..transfer.fencing import DataFence
from ..transfer.importer import Importer
from .engine import DecodeEngine
from .sequence import Sequence, SequenceState

RETRY_AFTER_S = 0.05
"""When a prefill that was deferred asks again."""


class Receiver:
    """The step loop's engine for the importer's events.

    Args:
        importer: the protocol's side of every lease.
        engine: who admits and runs the requests.
        geometry: sizes, for the count of bytes received.
        index: the index pool's mirror; a ready prompt's keys go from it to the device.
        fence: forced when more than `max_quarantine_share` of the host pages are in quarantine.
    """

    def __init__(
        self,
        importer: Importer,
        engine: DecodeEngine,
        geometry: KvGeometry,
        index: HostMirror,
        *,
        fence: DataFence,
        max_quarantine_share: float,
    ) -> None:
        self._fence = fence
        self._max_quarantine_share = max_quarantine_share
        self._index = index
        self._importer = importer
        self._engine = engine
        self._geometry = geometry
        self._open: dict[int, Sequence] = {}
        self._shared: set[int] = set()
        """Leases whose writers copy into this node's memory: no fence but their death ends them."""
        self._num_beyond_reach = 0
        """Pages in quarantine under such leases."""
        self._arriving: list[tuple[Callable[[], bool], Sequence, ImportReady]] = []
        self.bytes_received = 0
        engine.on_release = self._released
        engine.extra_stats = self._stats

    def handle(self, event: object) -> bool:
        match event:
            case OfferArrived():
                self._offered(event)
            case ImportReady():
                self._ready(event)
            case ImportFailed():
                error = RequestError(
                    f"the hand-off failed: {event.reason}", status=503, code="handoff_failed"
                )
                self._engine.fail(event.key, error, can_retry=True)
            case LeaseQuarantined():
                sequence = self._open[event.lease_id]
                self._engine.coordinator.quarantine(sequence)
                if event.lease_id in self._shared:
                    self._num_beyond_reach += sequence.host_lease.num_pages
            case LeaseEnded():
                self._end_shared(event.lease_id)
                self._engine.coordinator.end_remote_lease(self._open.pop(event.lease_id))
            case _:
                return False
        return True

    def step(self) -> bool:
        """Sends on what has arrived.

        If too many pages wait for writers that are lost, the node ends their reach itself.
        """
        pages = self._engine.coordinator.host.pages
        num_within_reach = pages.num_quarantined - self._num_beyond_reach
        if num_within_reach > self._max_quarantine_share * pages.num_total:
            share = f"{pages.num_quarantined} of {pages.num_total} pages"
            self._fence.request(f"{share} are in quarantine")
        self._make_ready()
        return bool(self._arriving)

    def _offered(self, event: OfferArrived) -> None:
        offer = event.offer
        key = (offer.request_id, offer.attempt)
        try:
            sequence = self._engine.try_admit(
                key, offer.front_id, offer.num_prompt_tokens, offer.sampling
            )
        except RequestError as error:
            self._importer.refuse(key, str(error), error.status, error.code)
            return
        if sequence is None:
            self._importer.defer(key, RETRY_AFTER_S)
            return
        self._pre_alloc(sequence)
        if offer.is_shared and sequence.lease_id is not None:
            self._shared.add(sequence.lease_id)

    def _end_shared(self, lease_id: int) -> None:
        if lease_id in self._shared:
            self._shared.remove(lease_id)
            lease = self._open[lease_id].host_lease
            self._num_beyond_reach -= lease.num_pages if lease.is_quarantined else 0

    def _pre_alloc(self, sequence: Sequence) -> None:
        """Grants the prompt's whole pages before prefill computes: promised and held in one turn."""
        num_pages = self._geometry.num_pages(sequence.num_prompt_tokens)
        for lease in (sequence.host_lease, sequence.index_lease):
            lease.hold(OwnerKind.REMOTE_WRITER)
        lease_id = self._importer.grant(
            sequence.key,
            first_pages(sequence.host_lease.runs, num_pages),
            first_pages(sequence.index_lease.runs, num_pages),
            num_pages,
        )
        sequence.lease_id = lease_id
        sequence.advance(SequenceState.RECEIVING)
        self._open[lease_id] = sequence

    def _ready(self, event: ImportReady) -> None:
        sequence = self._engine.find(event.key)
        if sequence is None:
            return
        geometry = self._geometry
        page_bytes = (
            geometry.num_layers * geometry.kv_page_bytes
            + geometry.num_index_layers * geometry.index_page_bytes
        )
        num_pages = geometry.num_pages(sequence.num_prompt_tokens)
        self.bytes_received += num_pages * page_bytes
        has_keys = self._index.start_to_device(sequence.index_lease.pages[:num_pages])
        self._arriving.append((has_keys, sequence, event))
        self._make_ready()

    def _make_ready(self) -> None:
        """Prompts whose indexer keys are on the device may decode; no step waits for those copies."""
        still_arriving = []
        for has_keys, sequence, event in self._arriving:
            if sequence.has_ended:
                continue
            if has_keys():
                self._engine.make_ready(sequence, event.first_token, event.warm_positions)
            else:
                still_arriving.append((has_keys, sequence, event))
        self._arriving = still_arriving

    def _released(self, sequence: Sequence) -> None:
        """A request ended; if its KV is still on its way, prefill is told to stop."""
        if sequence.lease_id in self._open and not sequence.output:
            self._importer.cancel(sequence.key, "the request ended on decode")

    def _stats(self) -> dict[str, float]:
        return {
            "bytes_received": self.bytes_received,
            "open_leases": len(self._open),
            "shared_leases": len(self._shared),
            "quarantined_beyond_reach": self._num_beyond_reach,
            "data_fences": self._fence.num_fences,
            "data_fences_failed": self._fence.num_failed,
            "last_data_fence_ms": self._fence.last_ms,
        }


def first_pages(runs: Iterable[PageRun], num_pages: int) -> tuple[PageRun, ...]:
    """The first `num_pages` pages of `runs`, as runs."""
    taken: list[PageRun] = []
    for run in runs:
        if num_pages <= 0:
            break
        count = min(run.count, num_pages)
        taken.append(PageRun(run.first, count))
        num_pages -= count
    return tuple(taken)
