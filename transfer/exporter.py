"""The prefill side of the hand-off: all transfers of a node, on the I/O thread of its loop.

The step thread gives commands (thread-safe, they return at once) and gets events through
`post_event`. For each offer exactly one of ExportRefused, ExportFailed and ExportDone comes, then
exactly one ExportReleased. The exporter is a Handler: it takes messages of decode nodes about
leases; a Grant or Cancel for a lease under which it has never written and never will is answered
with Drained, so that no lease on decode waits for a transfer that is forgotten here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from ..common import wire
from ..common.config import TransferSection
from ..common.errors import InvariantError, ProtocolError
from .events import ExportEvent, ExportRequest, Key
from .jobs import PageSource, Stage, WriteJob, WriteResult
from .outbound import Outbound, OutboundState
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
    StartWrite,
    StopWrites,
    TargetFenced,
    Tick,
    WriteEnded,
)
from .pages import (
    check_regions,
    check_runs,
    expand,
    layers_in,
    plan_span,
    slices,
)
from .session import Control, Peer
from .shared_paths import SharedPath, SharedPaths
from .transport import TicketStatus

LeaseName = tuple[str, int, int]
"""(decode node, its epoch, lease id)."""


class WriteMover(Protocol):
    """What the exporter uses of `mover.Mover`."""

    def write(self, job: WriteJob) -> None: ...

    def cancel(self, owner: object) -> None: ...

    def forget(self, peer_data_address: str) -> None: ...

    def abandon(self, peer_data_address: str) -> None: ...


class _Transfer:
    """A machine and what it is bound to once granted."""

    def __init__(self, machine: Outbound) -> None:
        self.machine = machine
        self.peer: Peer | None = None
        self.lease: LeaseName | None = None
        self.path: SharedPath | None = None
        self.decided_for = 0
        """The epoch of decode for which `path` was chosen, for good."""
        self.target_pages: dict[str, list[int]] = {}


class Exporter:
    """See the module.

    Args:
        control: the node's control loop.
        mover: the node's mover.
        regions: own memory, by name: "kv", and "index" if the model has index layers. A page id
            means the same page in both.
        has_checksums: whether pages are hashed before they are written.
        post_event: gets each event; thread-safe, never blocks.
        paths: to memory of peers on the same machine; None: everything goes over the wire.
        direct_regions: where pages are computed, for copies that need no staging; default: `regions`.
    """

    def __init__(
        self,
        control: Control,
        mover: WriteMover,
        regions: Sequence[wire.Region],
        config: TransferSection,
        *,
        has_checksums: bool,
        post_event: Callable[[ExportEvent], None],
        paths: SharedPaths | None = None,
        direct_regions: Sequence[wire.Region] | None = None,
    ) -> None:
        self._paths = paths
        direct = regions if direct_regions is None else direct_regions
        self._direct_regions: dict[str, wire.Region] = {region.name: region for region in direct}
        self._control = control
        self._mover = mover
        self._regions: dict[str, wire.Region] = {region.name: region for region in regions}
        self._config = config
        self._has_checksums = has_checksums
        self._post_event = post_event
        self._transfers: dict[Key, _Transfer] = {}
        self._by_lease: dict[LeaseName, _Transfer] = {}
        self._up: dict[str, Peer] = {}
        self._last: dict[str, Peer] = {}
        """Each decode node as it was met last, until that incarnation is fenced."""

    # ---- any thread ----

    def offer(self, request: ExportRequest) -> None:
        """Asks decode for room, again and again until it answers or `deadline_s` is over."""
        self._control.post(lambda: self._offer(request))

    def pages_ready(
        self,
        key: Key,
        first_page: int,
        source_pages: Sequence[int],
        source: PageSource | None = None,
    ) -> None:
        """Prompt pages from `first_page` on are in these source pages; in order, no gaps.

        They are final, or `source` makes them so. May be called before the grant. Ignored once the
        transfer has failed.
        """
        regions = list(self._regions.values())
        pieces = slices(regions, len(source_pages), self._config.max_chunk_bytes)
        event = PagesReady(first_page, tuple(source_pages), tuple(pieces), source)
        self._control.post(lambda: self._command(key, event))

    def commit(
        self,
        key: Key,
        first_token: wire.OutputToken,
        warm_positions: tuple[bytes, ...] = (),
    ) -> None:
        """All pages of the prompt were given."""
        event = CommitReady(first_token, warm_positions)
        self._control.post(lambda: self._command(key, event))

    def cancel(self, key: Key, reason: str) -> None:
        """Gives the attempt up; unknown keys are ignored."""
        self._control.post(lambda: self._command(key, CancelRequested(reason)))

    def fence(self, node_id: str, epoch: int) -> None:
        """That decode incarnation is dead."""
        self._control.post(lambda: self._fence(node_id, epoch))

    @property
    def num_transfers(self) -> int:
        """Transfers that are not closed; those drained but not acknowledged count."""
        return len(self._transfers)

    # ---- I/O thread: commands ----

    def _offer(self, request: ExportRequest) -> None:
        if request.key in self._transfers:
            raise InvariantError(f"{request.key} is offered twice")
        transfer = _Transfer(Outbound(request, self._config, self._control.clock))
        self._transfers[request.key] = transfer
        self._control.connect(request.decode_id, request.decode_address)
        peer = self._up.get(request.decode_id)
        if peer is not None:
            self._choose_path(transfer, peer)
            self._advance(transfer, PeerUp())

    def _choose_path(self, transfer: _Transfer, peer: Peer) -> None:
        """Before the first offer to an incarnation, and never again for it."""
        is_open = transfer.machine.state is OutboundState.OFFERED
        if self._paths is not None and is_open and transfer.decided_for != peer.epoch:
            transfer.decided_for = peer.epoch
            transfer.path = self._paths.find(peer.node_id, peer.epoch)
            transfer.machine.is_shared = transfer.path is not None

    def _command(self, key: Key, event: Event) -> None:
        transfer = self._transfers.get(key)
        if transfer is not None:
            self._advance(transfer, event)

    def _fence(self, node_id: str, epoch: int) -> None:
        """Also for incarnations that are replaced by a newer one."""
        for transfer in list(self._transfers.values()):
            peer = transfer.peer
            if peer is not None and peer.node_id == node_id and peer.epoch <= epoch:
                self._advance(transfer, PeerReplaced(f"epoch {peer.epoch} of {node_id} is dead"))
        last = self._last.get(node_id)
        if last is not None and last.epoch <= epoch:
            del self._last[node_id]
            self._abandon(last)

    def _see_data_address(self, peer: Peer) -> None:
        """A decode node that tells another address has closed the one before."""
        for transfer in self._with(peer.node_id):
            old = transfer.peer
            if transfer.path is not None:
                continue  # a copy is not stopped by closing an address
            if old is not None and old.hello.data_address != peer.hello.data_address:
                self._advance(transfer, TargetFenced(f"{peer.node_id} has a new data address"))
        last = self._last.get(peer.node_id)
        if last is not None and last.hello.data_address != peer.hello.data_address:
            self._abandon(last)
        self._last[peer.node_id] = peer

    def _abandon(self, last: Peer) -> None:
        """Behind the machines: what is in flight there fails now."""
        if last.hello.data_address:
            self._mover.abandon(last.hello.data_address)

    # ---- I/O thread: Handler ----

    def on_peer_up(self, peer: Peer) -> None:
        self._up[peer.node_id] = peer
        if self._paths is not None:
            self._paths.meet(peer)
        self._fence(peer.node_id, peer.epoch - 1)
        self._see_data_address(peer)
        for transfer in self._with(peer.node_id):
            self._choose_path(transfer, peer)
            self._advance(transfer, PeerUp())

    def on_peer_down(self, peer: Peer, reason: str) -> None:
        self._up.pop(peer.node_id, None)
        self._mover.forget(peer.hello.data_address)
        for transfer in self._with(peer.node_id):
            self._advance(transfer, PeerDown(reason))

    def on_tick(self, now_s: float) -> None:
        for transfer in list(self._transfers.values()):
            refusal = self._control.refusal(transfer.machine.request.decode_id)
            is_waiting = transfer.machine.state is OutboundState.OFFERED
            if refusal is not None and is_waiting:
                self._advance(transfer, CancelRequested(refusal))
            else:
                self._advance(transfer, Tick())
        if self._paths is not None:
            live = {(peer.node_id, peer.epoch) for peer in self._up.values()}
            used = {
                each.path
                for each in self._transfers.values()
                if each.path is not None and each.machine.state is not OutboundState.OFFERED
            }
            self._paths.close_unused(live, used)

    def on_message(self, peer: Peer, message: wire.Message) -> bool:
        if peer.role == "front":
            if isinstance(message, wire.Fence):
                self._fence(message.node_id, message.epoch)
                return True
            return False
        if isinstance(message, wire.Grant):
            self._on_grant(peer, message)
        elif isinstance(message, wire.Cancel):
            self._on_cancel(peer, message)
        elif isinstance(message, (wire.Defer, wire.Refuse)):
            transfer = self._transfers.get((message.request_id, message.attempt))
            if transfer is not None and transfer.machine.request.decode_id == peer.node_id:
                self._advance(transfer, message)
        elif isinstance(message, (wire.ChunkAck, wire.CommitAck, wire.DrainedAck)):
            transfer = self._by_lease.get((peer.node_id, peer.epoch, message.lease_id))
            if transfer is not None:
                self._advance(transfer, message)
        else:
            return False
        return True

    def _on_grant(self, peer: Peer, grant: wire.Grant) -> None:
        transfer = self._find(peer, (grant.request_id, grant.attempt), grant.lease_id)
        if transfer is None:
            self._disown(peer, grant.lease_id, (grant.request_id, grant.attempt))
        elif transfer.machine.state is not OutboundState.OFFERED:
            self._advance(transfer, grant)
        elif transfer.path is not None and not transfer.path.is_open:
            self._disown(peer, grant.lease_id, transfer.machine.request.key)
            self._advance(transfer, CancelRequested(f"the memory of {peer.node_id} was unmapped"))
        else:
            try:
                transfer.target_pages = self._target_pages(peer, grant)
            except ProtocolError as error:
                self._disown(peer, grant.lease_id, transfer.machine.request.key)
                self._advance(transfer, CancelRequested(f"unusable grant: {error}"))
                raise
            self._bind(transfer, peer, grant.lease_id)
            self._advance(transfer, grant)

    def _on_cancel(self, peer: Peer, cancel: wire.Cancel) -> None:
        key = (cancel.request_id, cancel.attempt)
        transfer = self._find(peer, key, cancel.lease_id)
        if transfer is not None:
            if transfer.peer is None and cancel.lease_id:
                self._bind(transfer, peer, cancel.lease_id)
            self._advance(transfer, cancel)
        elif cancel.lease_id:
            self._disown(peer, cancel.lease_id, key)

    def _find(self, peer: Peer, key: Key, lease_id: int) -> _Transfer | None:
        """The transfer that holds this lease, or waits for one from this peer."""
        holder = self._by_lease.get((peer.node_id, peer.epoch, lease_id))
        if holder is not None:
            return holder
        transfer = self._transfers.get(key)
        if transfer is None or transfer.machine.request.decode_id != peer.node_id:
            return None
        return transfer if transfer.peer is None else None

    def _bind(self, transfer: _Transfer, peer: Peer, lease_id: int) -> None:
        transfer.peer = peer
        transfer.lease = (peer.node_id, peer.epoch, lease_id)
        self._by_lease[transfer.lease] = transfer

    def _disown(self, peer: Peer, lease_id: int, key: Key) -> None:
        """Nothing was and nothing will be written under this lease."""
        request_id, attempt = key
        self._control.send(peer.node_id, wire.Drained(lease_id, request_id, attempt))

    def _target_pages(self, peer: Peer, grant: wire.Grant) -> dict[str, list[int]]:
        """The granted pages by region; ProtocolError if they cannot be the peer's."""
        theirs = {region.name: region for region in peer.hello.regions}
        check_regions(list(self._regions.values()), list(theirs.values()))
        pages: dict[str, list[int]] = {}
        for name, runs in (("kv", grant.kv_runs), ("index", grant.index_runs)):
            if name in theirs:
                check_runs(runs, theirs[name])
                pages[name] = expand(runs)
        if len({len(each) for each in pages.values()}) != 1:
            counts = {name: len(each) for name, each in pages.items()}
            raise ProtocolError(f"a grant of unequal numbers of pages: {counts}")
        return pages

    def _with(self, node_id: str) -> list[_Transfer]:
        return [
            each for each in self._transfers.values() if each.machine.request.decode_id == node_id
        ]

    # ---- I/O thread: actions ----

    def _advance(self, transfer: _Transfer, event: Event) -> None:
        actions = transfer.machine.advance(event)
        if transfer.machine.state is OutboundState.CLOSED:
            self._transfers.pop(transfer.machine.request.key, None)
            if transfer.lease is not None:
                self._by_lease.pop(transfer.lease, None)
        for action in actions:
            self._execute(transfer, action)

    def _execute(self, transfer: _Transfer, action: Action) -> None:
        if isinstance(action, Send):
            self._control.send(transfer.machine.request.decode_id, action.message)
        elif isinstance(action, StartWrite):
            self._start_write(transfer, action)
        elif isinstance(action, StopWrites):
            self._mover.cancel(transfer.machine.request.key)
        elif isinstance(action, Post):
            self._post_event(action.event)

    def _start_write(self, transfer: _Transfer, action: StartWrite) -> None:
        assert transfer.peer is not None
        path, source, targets = transfer.path, action.source, transfer.target_pages
        layers = layers_in(list(self._regions.values()), action.layers)
        theirs: dict[str, wire.Region]
        stage: Stage | None = None
        if path is None:
            own, address = self._regions, transfer.peer.hello.data_address
            theirs = {region.name: region for region in transfer.peer.hello.regions}
            if source is not None:
                stage = partial(source.stage, action.source_pages, layers)
        else:
            own, address, theirs = self._direct_regions, path.data_address, path.regions
            if source is not None:
                stage = source.settle
        first, end = action.first_page, action.first_page + len(action.source_pages)
        plan = partial(
            plan_span,
            action.layers,
            [(own[name], theirs[name], pages[first:end]) for name, pages in targets.items()],
            action.source_pages,
            self._config.max_write_bytes,
            is_hashed=self._has_checksums and path is None,
        )
        on_end = partial(self._on_write_end, transfer, action.sequence, action.tries)
        self._mover.write(
            WriteJob(
                owner=transfer.machine.request.key,
                peer_data_address=address,
                plan=plan,
                on_end=on_end,
                stage=stage,
            )
        )

    def _on_write_end(
        self, transfer: _Transfer, sequence: int, tries: int, result: WriteResult
    ) -> None:
        if transfer.path is not None:
            transfer.path.is_doubtful |= result.status is TicketStatus.FAILED_UNKNOWN
        elif result.status is not TicketStatus.DONE and transfer.peer is not None:
            self._mover.forget(transfer.peer.hello.data_address)
        self._advance(transfer, WriteEnded(sequence, tries, result))
