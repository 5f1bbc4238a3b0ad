"""HiSparseCoordinator: who has a seat, which rows are durable, and the only way out.

Owned by the decode engine, step thread only. It joins the host pool (every durable row), the index
pool (indexer keys), the seats and the hot cache:

    admit_request_direct         transferred prompt: its rows are in host pages already
    admit_request_into_staging   local prefill: device pages -> host pages, then like any other
    seat / retract_req           take a hot buffer / give it up (park): no KV is lost or moved up
    _eager_backup_previous_token ring -> host, a full page at a time; moves durable_len
    release_req                  the only way out: seat, host pages, index pages

`_eager_backup_previous_token` is the peers' name for copying the newest token's row to the host
before every step. With a ring of two pages there is nothing to do until a page is full, and then
one copy of whole rows does; the name is kept so that readers of the seed documents find it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..common.errors import InvariantError
from ..hostpool.device_pool import DevicePool
from ..hostpool.index_pool import IndexPool
from ..hostpool.pages import OwnerKind
from ..hostpool.pool import HostPool
from ..hostpool.seats import SeatPool
from ..kernels.copy_rows import copy_rows
from .admission import Admission
from .context import StepBatch
from .hot_cache import HotCache
from .sequence import Sequence, SequenceState


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

    # Admission

    def admit_request_direct(self, sequence: Sequence) -> None:
        """The prompt's rows are final in the sequence's host pages: it is READY for a seat."""
        sequence.durable_len = sequence.num_prompt_tokens
        sequence.advance(SequenceState.READY)

    def admit_request_into_staging(
        self, sequence: Sequence, source: DevicePool, source_pages: list[int]
    ) -> None:
        """Copies a local prefill's pages to the sequence's host and index pages; READY after it.

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
        self.admit_request_direct(sequence)

    # Seats

    def try_seat(self, sequence: Sequence) -> bool:
        """Gives a READY or PARKED sequence a seat and fills its hot buffer; False if none is free."""
        seat = self.seats.try_acquire()
        if seat is None:
            return False
        sequence.seat = seat
        sequence.admit_len = sequence.durable_len
        sequence.tokens_since_seated = 0
        self.cache.take_seat(seat, sequence.host_lease.pages)
        self._preload(sequence, seat)
        sequence.advance(SequenceState.RUNNING)
        return True

    def retract_req(self, sequence: Sequence) -> None:
        """Parks a RUNNING sequence: its newest rows go to the host, its seat is free again."""
        self._backup(sequence, sequence.kv_len)
        sequence.advance(SequenceState.PARKED)
        self._free_seat(sequence)

    def release_req(self, sequence: Sequence, end: SequenceState) -> None:
        """Ends the sequence and gives back its seat and its hold on pages.

        Pages under a lease that a remote writer has not ended stay out of the free list until then.
        """
        sequence.advance(end)
        self._free_seat(sequence)
        self.admission.release(sequence.host_lease, sequence.index_lease)

    # Steps

    def prepare_step(self, sequences: list[Sequence]) -> StepBatch:
        """Builds the tensors of one decode step; every sequence feeds its newest token."""
        page_size = self._page_size
        positions = [sequence.kv_len for sequence in sequences]
        num_pages = max(position // page_size for position in positions) + 1
        index_slots, ring_starts = [], []
        table = torch.full((len(sequences), num_pages), -1, dtype=torch.int32)
        for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            pages = sequence.index_lease.pages[: position // page_size + 1]
            table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            index_slots.append(pages[-1] * page_size + position % page_size)
            ring_starts.append(self._ring_start(sequence, position))
        seats_B = self._tensor([self._seat(sequence) for sequence in sequences])
        positions_B = self._tensor(positions)
        store_rows_2B = self.cache.begin_step(
            seats_B, positions_B, self._tensor(ring_starts).to(torch.int32)
        )
        return StepBatch(
            token_ids_B=self._tensor([sequence.output[-1].token_id for sequence in sequences]),
            positions_B=positions_B,
            seats_B=seats_B,
            index_slots_B=self._tensor(index_slots),
            index_table_BP=self._upload(table),
            store_rows_2B=store_rows_2B,
            max_len=max(positions) + 1,
        )

    def _eager_backup_previous_token(self, sequences: Iterable[Sequence]) -> None:
        """After a step: a sequence whose newest page is full has it backed up, in one piece."""
        for sequence in sequences:
            if sequence.kv_len % self._page_size == 0:
                self._backup(sequence, sequence.kv_len)
        self.cache.end_step()

    finish_step = _eager_backup_previous_token

    def _ring_start(self, sequence: Sequence, position: int) -> int:
        """Oldest position in the ring once `position` is stored: this page and the one before."""
        page = position // self._page_size
        start = max(sequence.admit_len, (page - 1) * self._page_size)
        if sequence.durable_len < start:
            raise InvariantError(f"{sequence.key}: the ring would overwrite rows not yet durable")
        return start

    def _backup(self, sequence: Sequence, end: int) -> None:
        """Copies rows [durable_len, end) from the ring to host pages, all layers; they are final."""
        first = sequence.durable_len
        if first == end:
            return
        if end - first > self.cache.ring_rows:
            raise InvariantError(f"{sequence.key}: rows {first} to {end} are not all in the ring")
        copy_rows(
            self.cache.rows,
            self.host.rows,
            self.cache.ring_rows_of(self._seat(sequence), first, end),
            self._host_slots(sequence, first, end),
        )
        sequence.durable_len = end

    def _preload(self, sequence: Sequence, seat: int) -> None:
        """A sequence that fits is resident whole; else its prompt's last top-k, if known."""
        length = sequence.durable_len
        host_rows = self.host.rows
        if length <= self.cache.hot_rows:
            self.cache.preload(seat, None, torch.arange(length, device=self._device), host_rows)
        elif self._warm_start:
            for group, positions in enumerate(sequence.warm_positions):
                warm = sorted({p for p in positions if 0 <= p < length})[: self.cache.hot_rows]
                self.cache.preload(seat, group, self._tensor(warm), host_rows)
        sequence.warm_positions = ()

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
