"""The decode side of the hand-off: all leases of a node, on the I/O thread of its loop.

The step thread answers OfferArrived with grant, defer or refuse (thread-safe) and gets events
through `post_event`. For each grant exactly one of ImportReady and ImportFailed comes, and exactly
one LeaseEnded, which is the only permission to take the lease's pages back from the writer.

A key that was granted or refused is remembered for a while: an Offer for it that arrives late is
answered from memory and never becomes a second lease.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from ..common import wire
from ..common.config import TransferSection
from ..common.errors import InvariantError, ProtocolError
from .events import ImportEvent, ImportFailed, Key, LeaseEnded, OfferArrived
from .inbound import Inbound, InboundState
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
from .jobs import VerifyJob
from .pages import LayerSpan, expand, layer_parts
from .session import Control, Peer

MAX_REMEMBERED_KEYS = 65536
MAX_REMEMBERED_LEASES = 4096
PROOF_WAIT_S = 1.5
"""A node that restarts on its machine proves within about a second that its last process is dead."""


class VerifyMover(Protocol):
    """What the importer uses of `mover.Mover`."""

    def verify(self, job: VerifyJob) -> None: ...


class _Lease:
    """A machine, its writer and its pages."""

    def __init__(
        self, machine: Inbound, peer: Peer, pages: dict[str, list[int]], *, is_shared: bool
    ) -> None:
        self.machine = machine
        self.peer = peer
        self.pages = pages
        self.was_ready = False
        self.is_shared = is_shared
        """Its writer copies into memory that it maps: only its word or its death ends the lease."""
        self.orphan_since_s: float | None = None
        """When its writer was replaced; it ends with the proof that it is dead, or `end_all`."""


class Importer:
    """See the module.

    Args:
        control: the node's control loop.
        mover: the node's mover.
        regions: own memory, as in this node's Hello.
        has_checksums: whether chunks must carry checksums, and are verified.
        post_event: gets each event; thread-safe, never blocks.
        end_reach: asked, with a reason, to end what writers can still reach that were replaced
            `proof_wait_s` ago without a proof of their death, and then to call `end_all`; asked
            again and again until it has. None: their leases wait for a Fence.
    """

    def __init__(
        self,
        control: Control,
        mover: VerifyMover,
        regions: Sequence[wire.Region],
        config: TransferSection,
        *,
        has_checksums: bool,
        post_event: Callable[[ImportEvent], None],
        end_reach: Callable[[str], object] | None = None,
        proof_wait_s: float = PROOF_WAIT_S,
    ) -> None:
        self._end_reach = end_reach
        self._proof_wait_s = proof_wait_s
        self._control = control
        self._mover = mover
        self._regions = {region.name: region for region in regions}
        self._config = config
        self._has_checksums = has_checksums
        self._post_event = post_event
        self._lease_ids = itertools.count(1)
        self._undecided: dict[Key, Peer | None] = {}
        """Offers posted to the node, whose answer is under way; None: withdrawn since."""
        self._shared: set[Key] = set()
        """Those of them that will be copied into shared memory."""
        self._leases: dict[int, _Lease] = {}
        self._by_key: dict[Key, _Lease] = {}
        self._past: OrderedDict[Key, wire.Refuse] = OrderedDict()
        self._ended: OrderedDict[int, _Lease] = OrderedDict()

    # ---- any thread ----

    def grant(
        self,
        key: Key,
        kv_runs: Sequence[wire.PageRun],
        index_runs: Sequence[wire.PageRun],
        num_pages: int,
    ) -> int:
        """Grants an offer these pages, in order of position; returns the lease's id.

        `num_pages`: pages of the prompt; the runs hold at least so many. If the offer is gone by
        now, ImportFailed and LeaseEnded follow at once.
        """
        lease_id = next(self._lease_ids)
        grant = wire.Grant(
            request_id=key[0],
            attempt=key[1],
            lease_id=lease_id,
            kv_runs=tuple(kv_runs),
            index_runs=tuple(index_runs),
        )
        self._control.post(lambda: self._grant(grant, num_pages))
        return lease_id

    def defer(self, key: Key, retry_after_s: float) -> None:
        """Full now; prefill offers again after that time."""
        self._control.post(lambda: self._defer(key, retry_after_s))

    def refuse(self, key: Key, reason: str, status: int, code: str) -> None:
        """Never; `status` and `code` become the client's error."""
        self._control.post(lambda: self._refuse(wire.Refuse(*key, reason, status, code)))

    def cancel(self, key: Key, reason: str) -> None:
        """Gives up an import that is not ready; ImportFailed follows. Else ignored."""
        self._control.post(lambda: self._cancel(key, reason))

    def fence(self, node_id: str, epoch: int) -> None:
        """That prefill incarnation is proven dead: its leases end."""
        self._control.post(lambda: self._fence(node_id, epoch))

    def end_all(self, reason: str) -> None:
        """Nobody can write any more through the data address all leases were granted under.

        Leases whose writers copy into shared memory go on: no address leads there. I/O thread only; no grant may follow before peers have been told another address.
        """
        for lease in list(self._leases.values()):
            if not lease.is_shared:
                self._advance(lease, WriterFenced(reason))

    @property
    def num_receiving(self) -> int:
        """Leases that a live writer writes to; any thread."""
        leases = self._leases.copy().values()
        return sum(lease.machine.state is InboundState.RECEIVING for lease in leases)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    # ---- I/O thread: commands ----

    def _grant(self, grant: wire.Grant, num_pages: int) -> None:
        key = (grant.request_id, grant.attempt)
        counts = {sum(run.count for run in grant.kv_runs)}
        if "index" in self._regions:
            counts.add(sum(run.count for run in grant.index_runs))
        if len(counts) != 1 or min(counts) < num_pages or num_pages < 1:
            raise InvariantError(f"{key}: a grant of {counts} pages for {num_pages}")
        if key not in self._undecided:
            raise InvariantError(f"{key} is granted without an offer, or twice")
        peer = self._undecided.pop(key)
        is_shared = key in self._shared
        self._shared.discard(key)
        if peer is None:
            reason = "the offer was withdrawn, or its node is gone"
            self._post_event(ImportFailed(key, grant.lease_id, reason))
            self._post_event(LeaseEnded(grant.lease_id))
            return
        pages = {"kv": expand(grant.kv_runs), "index": expand(grant.index_runs)}
        machine = Inbound(
            grant,
            num_pages,
            sum(region.num_layers for region in self._regions.values()),
            self._has_checksums and not is_shared,
            self._config,
            self._control.clock,
        )
        lease = _Lease(machine, peer, pages, is_shared=is_shared)
        self._leases[grant.lease_id] = self._by_key[key] = lease
        for action in machine.begin():
            self._execute(lease, action)

    def _defer(self, key: Key, retry_after_s: float) -> None:
        peer = self._undecided.pop(key, None)
        self._shared.discard(key)
        if peer is not None:
            self._control.send(peer.node_id, wire.Defer(*key, retry_after_s))

    def _refuse(self, refuse: wire.Refuse) -> None:
        key = (refuse.request_id, refuse.attempt)
        peer = self._undecided.pop(key, None)
        self._shared.discard(key)
        if peer is not None:
            self._remember(key, refuse)
            self._control.send(peer.node_id, refuse)

    def _cancel(self, key: Key, reason: str) -> None:
        lease = self._by_key.get(key)
        if lease is not None:
            self._advance(lease, ImportCancelled(reason))

    def _fence(self, node_id: str, epoch: int) -> None:
        for lease in list(self._leases.values()):
            if (lease.peer.node_id, lease.peer.epoch) == (node_id, epoch):
                reason = f"epoch {lease.peer.epoch} of {node_id} is dead"
                self._advance(lease, WriterFenced(reason))

    def _orphan(self, node_id: str, epoch: int) -> None:
        """Older incarnations are replaced, which is no proof that they are dead."""
        for lease in list(self._leases.values()):
            is_older = lease.peer.node_id == node_id and lease.peer.epoch < epoch
            if is_older and lease.orphan_since_s is None:
                lease.orphan_since_s = self._control.clock.now()
                self._advance(lease, WriterDown(f"{node_id} was replaced by epoch {epoch}"))

    def _remember(self, key: Key, refuse: wire.Refuse) -> None:
        self._past[key] = refuse
        if len(self._past) > MAX_REMEMBERED_KEYS:
            self._past.popitem(last=False)

    def _remember_lease(self, lease: _Lease) -> None:
        lease.pages = {}
        self._ended[lease.machine.lease_id] = lease
        if len(self._ended) > MAX_REMEMBERED_LEASES:
            self._ended.popitem(last=False)

    # ---- I/O thread: Handler ----

    def on_peer_up(self, peer: Peer) -> None:
        self._orphan(peer.node_id, peer.epoch)
        for lease in self._of(peer):
            self._advance(lease, WriterUp())

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        for key, offerer in self._undecided.items():
            if offerer == peer:
                self._undecided[key] = None
        for lease in self._of(peer):
            self._advance(lease, WriterDown(reason))

    def on_tick(self, now_s: float) -> None:
        num_orphans = 0
        for lease in list(self._leases.values()):
            since_s = lease.orphan_since_s
            is_orphan = since_s is not None and now_s - since_s >= self._proof_wait_s
            num_orphans += is_orphan and not lease.is_shared
            self._advance(lease, LeaseTick())
        if num_orphans and self._end_reach is not None:
            self._end_reach(f"writers of {num_orphans} leases were replaced, and may be alive")

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        if peer.role == "front":
            if isinstance(message, wire.Fence):
                self._fence(message.node_id, message.epoch)
                return True
            return False
        if isinstance(message, wire.Offer):
            self._on_offer(peer, message)
        elif isinstance(message, wire.Cancel):
            self._on_cancel(peer, message)
        elif isinstance(message, (wire.Chunk, wire.Commit, wire.Drained)):
            self._on_lease_message(peer, message)
        else:
            return False
        return True

    def _on_offer(self, peer: Peer, offer: wire.Offer) -> None:
        key = (offer.request_id, offer.attempt)
        lease = self._by_key.get(key)
        if lease is not None:
            self._check_writer(lease, peer)
            self._advance(lease, offer)
        elif key in self._past:
            self._control.send(peer.node_id, self._past[key])
        else:
            is_new = key not in self._undecided
            self._undecided[key] = peer
            (self._shared.add if offer.is_shared else self._shared.discard)(key)
            if is_new:
                self._post_event(OfferArrived(peer, offer))

    def _on_cancel(self, peer: Peer, cancel: wire.Cancel) -> None:
        key = (cancel.request_id, cancel.attempt)
        if self._undecided.get(key) == peer:
            self._undecided[key] = None
        lease = self._by_key.get(key)
        if lease is not None:
            self._check_writer(lease, peer)
            self._advance(lease, cancel)

    def _on_lease_message(
        self, peer: Peer, message: wire.Chunk | wire.Commit | wire.Drained
    ) -> None:
        lease = self._leases.get(message.lease_id)
        if lease is not None:
            self._check_writer(lease, peer)
            self._advance(lease, message)
        elif isinstance(message, wire.Drained):
            self._control.send(peer.node_id, wire.DrainedAck(message.lease_id))
        elif message.lease_id in self._ended:
            self._answer_late(peer, self._ended[message.lease_id], message)

    def _answer_late(self, peer: Peer, lease: _Lease, message: wire.Chunk | wire.Commit) -> None:
        """The lease was fenced under a writer that lives: it hears how it ended."""
        self._check_writer(lease, peer)
        lease_id = lease.machine.lease_id
        if not lease.was_ready:
            cancel = wire.Cancel(*lease.machine.key, "the lease was fenced", lease_id)
            self._control.send(peer.node_id, cancel)
        elif isinstance(message, wire.Commit):
            self._control.send(peer.node_id, wire.CommitAck(lease_id))

    def _check_writer(self, lease: _Lease, peer: Peer) -> None:
        if (lease.peer.node_id, lease.peer.epoch) != (peer.node_id, peer.epoch):
            raise ProtocolError(
                f"{peer.node_id} (epoch {peer.epoch}) speaks of lease {lease.machine.lease_id}, "
                f"which is of {lease.peer.node_id} (epoch {lease.peer.epoch})"
            )

    def _of(self, peer: Peer) -> list[_Lease]:
        return [
            lease
            for lease in self._leases.values()
            if (lease.peer.node_id, lease.peer.epoch) == (peer.node_id, peer.epoch)
        ]

    # ---- I/O thread: actions ----

    def _advance(self, lease: _Lease, event: Event) -> None:
        actions = lease.machine.advance(event)
        key = lease.machine.key
        lease.was_ready |= lease.machine.state is InboundState.READY
        if lease.machine.state is InboundState.ENDED and self._by_key.get(key) is lease:
            del self._by_key[key]
            del self._leases[lease.machine.lease_id]
            self._remember(key, wire.Refuse(*key, "this attempt has ended here", 409, "ended"))
            self._remember_lease(lease)
        for action in actions:
            self._execute(lease, action)

    def _execute(self, lease: _Lease, action: Action) -> None:
        if isinstance(action, Reply):
            self._control.send(lease.peer.node_id, action.message)
        elif isinstance(action, StartVerify):
            self._start_verify(lease, action)
        elif isinstance(action, Tell):
            self._post_event(action.event)

    def _start_verify(self, lease: _Lease, action: StartVerify) -> None:
        chunk = action.chunk
        first, end = chunk.first_page, chunk.first_page + chunk.num_pages
        parts = layer_parts(
            [(region, lease.pages[name][first:end]) for name, region in self._regions.items()],
            LayerSpan(chunk.first_layer, chunk.num_layers),
        )
        on_end = partial(self._on_verify_end, lease, chunk.sequence, chunk.tries)
        self._mover.verify(
            VerifyJob(
                owner=(lease.machine.lease_id, "verify"),
                parts=parts,
                expected=chunk.checksums,
                on_end=on_end,
            )
        )

    def _on_verify_end(self, lease: _Lease, sequence: int, tries: int, is_good: bool) -> None:
        self._advance(lease, Verified(sequence, tries, is_good))
