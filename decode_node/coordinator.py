"""HiSparseCoordinator: who has a seat, which rows are durable, and the only way out.

Owned by the decode engine, step thread only. It joins the host pool (every durable row), the index
pool (indexer keys), the seats and the hot cache:

    admit_request_direct         transferred prompt: its rows are in host pages already
    admit_request_into_staging   local prefill: device pages -> host pages, then like any other
    seat / retract_req           take a hot buffer / give it up (park): no KV is lost or moved up
    _eager_backup_previous_token ring -> host, a full page at a time; durable_len follows by event
    release_req                  the only way out: seat, host pages, index pages

`_eager_backup_previous_token` is the peers' name for copying the newest token's row to the host
before every step. With a ring of two pages there is nothing to do until a page is full, and then
one copy of whole rows does; the name is kept so that readers of the seed documents find it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import InvariantError
from ..hostpool.device_pool import DevicePool
from ..hostpool.index_pool import IndexPool
from ..hostpool.mirror import HostMirror
from ..hostpool.pages import OwnerKind
from ..hostpool.pool import HostPool
from ..hostpool.seats import SeatPool
from ..kernels.copy_rows import copy_rows
from .admission import Admission
from .backup import Backup
from .hot_cache import HotCache
from .seat_fill import SeatFill
from .sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class SeatRow:
    """What one row of a step feeds: see `begin_step` in kernels/begin_step.py."""

    seat: int
    position: int
    ring_start: int
    token_id: int


class HiSparseCoordinator:
    """Args: the node's pools and ledger; `warm_start` loads a prompt's last top-k with its seat."""

    def __init__(
        self,
        host: HostPool,
        index: IndexPool,
        seats: SeatPool,
        cache: HotCache,
        admission: Admission,
        *,
        warm_start: bool,
    ) -> None:
        self.host = host
        self.index = index
        self.seats = seats
        self.cache = cache
        self.admission = admission
        self._warm_start = warm_start
        self._page_size = cache.geometry.page_size
        self._device = cache.rows.device
        self.backup = Backup(self._device)
        self._fill = SeatFill(cache, host.rows)
        self.kept_keys: HostMirror | None = None
        """Host memory that outlives the process and must have the keys of every durable row, where
        that is not the index pool's own memory."""

    # Admission

    def admit_request_direct(self, sequence: Sequence) -> None:
        """The prompt's rows are final in the sequence's host pages: it is READY for a seat."""
        sequence.kv_len = sequence.durable_len = sequence.backup_len = sequence.num_prompt_tokens
        sequence.advance(SequenceState.READY)

    def admit_request_into_staging(
        self, sequence: Sequence, source: DevicePool, source_pages: list[int]
    ) -> None:
        """Starts to copy a local prefill's pages to the sequence's host and index pages.

        They have arrived, and the source pages are free, when `durable_len` has moved; then
        `admit_request_direct` makes it READY.

        Args:
            source: the prefill's device pool, same geometry.
            source_pages: pages of the prompt there, in order of position.
        """
        sequence.advance(SequenceState.STAGING)
        num_pages = len(source_pages)
        target_pages = sequence.host_lease.pages[:num_pages]
        if len(target_pages) < num_pages:
            raise InvariantError(
                f"{sequence.key}: {num_pages} pages to stage, {len(target_pages)} reserved"
            )

        def copy() -> None:
            copy_rows(
                source.rows,
                self.host.rows,
                self._slots(source_pages),
                self._slots(target_pages),
            )
            copy_rows(
                source.index,
                self.index.data,
                self._tensor(source_pages),
                self._tensor(sequence.index_lease.pages[:num_pages]),
            )

        self.backup.start(sequence, sequence.num_prompt_tokens, copy)

    # Seats

    def try_seat(self, sequence: Sequence) -> bool:
        """Gives a READY or PARKED sequence a seat, which begins to be filled; False if none is free."""
        seat = self.seats.try_acquire()
        if seat is None:
            return False
        sequence.seat = seat
        sequence.admit_len = sequence.kv_len = sequence.backup_len
        sequence.tokens_since_seated = 0
        sequence.filling = self._fill.start(
            seat,
            sequence.host_lease.pages,
            sequence.index_lease.pages,
            sequence.backup_len,
            sequence.warm_positions if self._warm_start else (),
            behind=self.backup.side,
        )
        sequence.warm_positions = ()
        sequence.advance(SequenceState.RUNNING)
        return True

    def is_filled(self, sequence: Sequence) -> bool:
        """Whether its seat is ready for a step; does not wait."""
        if sequence.filling is not None and sequence.filling.has_passed():
            sequence.filling = None
        return sequence.filling is None

    def await_fill(self, sequence: Sequence) -> None:
        """Its next step waits for the seat on the device: for when there is nobody else to hold up."""
        if sequence.filling is not None:
            sequence.filling.join()
            sequence.filling = None

    def retract_req(self, sequence: Sequence) -> None:
        """Parks a RUNNING sequence: its newest rows go to the host, its seat is free again.

        No step of it may be in flight.
        """
        if sequence.in_flight:
            raise InvariantError(f"{sequence.key}: parked with a step in flight")
        self._start_backup(sequence, sequence.kv_len)
        sequence.advance(SequenceState.PARKED)
        self._free_seat(sequence)

    def release_req(self, sequence: Sequence) -> None:
        """Gives back the seat of an ended sequence and its hold on pages.

        No step of it may be in flight. Pages under a lease that a remote writer has not ended stay
        out of the free list until then.
        """
        if sequence.in_flight:
            raise InvariantError(f"{sequence.key}: released with a step in flight")
        self.backup.wait(sequence)
        self._free_seat(sequence)
        self.admission.release(sequence.host_lease, sequence.index_lease)

    # Steps

    def seat_row(self, sequence: Sequence) -> SeatRow:
        """What the sequence's next step feeds: a token known, or the one its last step chooses."""
        position, index = sequence.kv_len, sequence.next_index
        is_known = index < len(sequence.output)
        return SeatRow(
            seat=self._seat(sequence),
            position=position,
            ring_start=self._ring_start(sequence, position),
            token_id=sequence.output[index].token_id if is_known else -1,
        )

    def _eager_backup_previous_token(self, sequences: Iterable[Sequence]) -> None:
        """Behind a step: a sequence whose newest page is full has it backed up, in one piece."""
        for sequence in sequences:
            if sequence.kv_len % self._page_size == 0:
                self._start_backup(sequence, sequence.kv_len)

    finish_step = _eager_backup_previous_token

    def _ring_start(self, sequence: Sequence, position: int) -> int:
        """Oldest position that the ring still holds once `position` is stored over the one before it."""
        start = max(sequence.admit_len, position + 1 - self.cache.ring_rows)
        if sequence.backup_len < start:
            raise InvariantError(f"{sequence.key}: the ring would overwrite rows not yet durable")
        if sequence.durable_len < start:
            self.backup.order()
        return start

    def _start_backup(self, sequence: Sequence, end: int) -> None:
        """Copies rows [backup_len, end) from the ring to host pages, all layers; they are final."""
        first = sequence.backup_len
        if first == end:
            return
        if end - first > self.cache.ring_rows:
            raise InvariantError(f"{sequence.key}: rows {first} to {end} are not all in the ring")

        def copy() -> None:
            copy_rows(
                self.cache.rows,
                self.host.rows,
                self._upload(self.cache.ring_rows_of(self._seat(sequence), first, end)),
                self._host_slots(sequence, first, end),
            )
            if self.kept_keys is not None:
                self._copy_keys(sequence, first, end, self.kept_keys)

        self.backup.start(sequence, end, copy)

    def _copy_keys(self, sequence: Sequence, first: int, end: int, target: HostMirror) -> None:
        """Copies the index pages of rows [first, end) to the host, all index layers."""
        page_size = self._page_size
        pages = sequence.index_lease.pages[first // page_size : -(-end // page_size)]
        page_ids = self._tensor(pages)
        copy_rows(self.index.data, target.host_LPX, page_ids, page_ids)

    def _free_seat(self, sequence: Sequence) -> None:
        if sequence.seat is not None:
            self.seats.release(sequence.seat)
            sequence.seat = None

    def _seat(self, sequence: Sequence) -> int:
        if sequence.seat is None:
            raise InvariantError(f"{sequence.key} is {sequence.state.name} and has no seat")
        return sequence.seat

    def _host_slots(self, sequence: Sequence, first: int, end: int) -> Tensor:
        positions = torch.arange(first, end)
        pages = torch.tensor(sequence.host_lease.pages, dtype=torch.int64)
        slots = pages[positions // self._page_size] * self._page_size + positions % self._page_size
        return self._upload(slots)

    def _slots(self, pages: list[int]) -> Tensor:
        """Every slot of `pages`, int64, in order."""
        first = torch.tensor(pages, dtype=torch.int64)[:, None] * self._page_size
        return self._upload((first + torch.arange(self._page_size)).flatten())

    def _tensor(self, values: list[int]) -> Tensor:
        return self._upload(torch.tensor(values, dtype=torch.int64))

    def _upload(self, tensor: Tensor) -> Tensor:
        """On its way to the device through pinned memory: the host does not wait."""
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def quarantine(self, sequence: Sequence) -> None:
        """The remote writer of its pages may still write and cannot be asked: they stay held."""
        for lease in (sequence.host_lease, sequence.index_lease):
            lease.quarantine()

    def end_remote_lease(self, sequence: Sequence) -> None:
        """The remote writer is proven to be done: its hold on the pages ends."""
        for lease in (sequence.host_lease, sequence.index_lease):
            lease.release(OwnerKind.REMOTE_WRITER)
