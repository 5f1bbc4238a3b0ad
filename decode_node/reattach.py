"""Goes on with the sequences of a process that was killed, from the memory that outlived it.

    kept memory + journal  ->  sequences with their pages, tokens and limits, as the engine had them

Called once while the node is built, before its threads run. Of each sequence the rows below
`durable_len` are in its host pages and their indexer keys in the index pool's mirror. The newest rows
were in a ring on the device and are computed again, by ordinary decode steps that feed the tokens the
journal has: at most two pages of them, and no step for the prompt. Tokens that are known are neither
chosen nor sent again; the front asks for what it missed (`Resume`).

A sequence that was still being received is not in the journal. Its pages are free here: no write
granted by the dead process can reach this memory. Peers wrote through that process's transport, whose
threads, sockets and device files the kernel had closed before the keeper called it gone, and the new
process has another data address. Only *guests*, which map the memory themselves, can still write: as
long as one that came before this process lives, pages that belong to no sequence are kept back.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ..common.errors import RequestError, SegmentError
from ..hostpool.mirror import HostMirror
from ..hostpool.pages import OwnerKind, PageLease
from .coordinator import HiSparseCoordinator
from .engine import DecodeEngine
from .journal import Journal, Record
from .keeper_watch import KeeperWatch
from .kept import PROOF_STEPS, KeptMemory
from .sequence import Sequence

POLL_S = 0.2
MAX_UNKNOWN_S = 60.0
"""How long pages are kept back while there is no keeper that could give them free."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Reattached:
    """What came of it; numbers for the node's stats.

    Attributes:
        num_sequences: sequences that go on.
        num_ended: ended ones whose last tokens can still be asked for.
        num_dropped: records that could not be gone on from; the front submits those again.
        num_replayed: rows to be computed again.
        front_ids: who waits for them.
    """

    num_sequences: int = 0
    num_ended: int = 0
    num_dropped: int = 0
    num_replayed: int = 0
    took_s: float = 0.0
    front_ids: tuple[str, ...] = ()

    def stats(self) -> dict[str, float]:
        """For /metrics."""
        return {
            "reattached_requests": self.num_sequences,
            "reattach_dropped": self.num_dropped,
            "reattach_replayed_rows": self.num_replayed,
            "reattach_ms": self.took_s * 1000,
        }


def reattach(engine: DecodeEngine, journal: Journal, index: HostMirror) -> Reattached:
    """Gives the engine every sequence of the journal that is whole.

    Args:
        engine: of the node that is being built, empty.
        journal: as the process before left it.
        index: the index pool's mirror, which has the keys of all durable rows.
    """
    begin_s = time.monotonic()
    result = Reattached()
    records = journal.recover()
    claims = Counter(page for record in records for page in _pages_of(record))
    sequences: list[Sequence] = []
    for record in records:
        if record.finish is not None:
            journal.keep(record)
            engine.adopt_finished(record.key, record.output, record.finish)
            result.num_ended += 1
            continue
        is_shared = any(claims[page] > 1 for page in _pages_of(record))
        sequence = None if is_shared else _rebuild(engine, record)
        if sequence is None:
            log.warning("%s is not gone on with: its record makes no sense", record.key)
            journal.drop(record)
            result.num_dropped += 1
            continue
        journal.keep(record)
        index.to_device(sequence.index_lease.pages)
        sequences.append(sequence)
        result.num_replayed += record.num_prompt_tokens + len(record.output) - 1 - sequence.kv_len
    for sequence in sequences:
        engine.adopt(sequence)
    result.num_sequences = len(sequences)
    result.front_ids = tuple({sequence.front_id for sequence in sequences})
    result.took_s = time.monotonic() - begin_s
    log.info("%s", result)
    return result


def _pages_of(record: Record) -> list[tuple[str, int]]:
    """Pages that a record claims for itself; those of an ended one are not its own."""
    if record.finish is not None:
        return []
    return [
        (pool, page)
        for pool, runs in (("host", record.host_runs), ("index", record.index_runs))
        for run in runs
        for page in range(run.first, run.first + run.count)
    ]


def _rebuild(engine: DecodeEngine, record: Record) -> Sequence | None:
    """The sequence as it was without a seat; None if the record contradicts itself or the node."""
    admission = engine.coordinator.admission
    if not record.output or record.durable_len < record.num_prompt_tokens:
        return None
    try:
        admission.check_can_ever_fit(record.num_prompt_tokens, record.sampling.max_tokens)
    except RequestError:
        return None
    reserved = admission.try_take(
        record.host_runs, record.index_runs, record.num_prompt_tokens, record.sampling.max_tokens
    )
    if reserved is None:
        return None
    sequence = Sequence(
        key=record.key,
        front_id=record.front_id,
        sampling=record.sampling,
        num_prompt_tokens=record.num_prompt_tokens,
        host_lease=reserved.host,
        index_lease=reserved.index,
        arrival_s=float(record.number - 2**53),  # before all that come from now on, in their order
        output=list(record.output),
    )
    engine.coordinator.admit_request_direct(sequence)
    # A step's row can be durable before its token is known: then it is computed again.
    known_len = record.num_prompt_tokens + len(record.output) - 1
    durable_len = min(record.durable_len, known_len)
    sequence.kv_len = sequence.durable_len = sequence.backup_len = durable_len
    return sequence


class Aftermath:
    """An engine of the step loop: what remains to be done once the node runs.

    Args:
        kept: the node's memory.
        watch: over its keeper.
        coordinator: whose free pages are kept back while an earlier guest lives.
        num_steps: steps decoded so far.
        now: seconds.
    """

    def __init__(
        self,
        kept: KeptMemory,
        watch: KeeperWatch,
        coordinator: HiSparseCoordinator,
        num_steps: Callable[[], int],
        now: Callable[[], float],
    ) -> None:
        self._kept = kept
        self._watch = watch
        self._num_steps = num_steps
        self._now = now
        self._is_proven = False
        self._kept_back: list[PageLease] = []
        self._next_poll_s = 0.0
        if not kept.is_fresh and self._may_have_guests():
            self._keep_back(coordinator)

    @property
    def num_kept_back(self) -> int:
        """Host pages."""
        return self._kept_back[0].num_pages if self._kept_back else 0

    def handle(self, event: object) -> bool:
        return False

    def step(self) -> bool:
        if not self._is_proven and self._num_steps() >= PROOF_STEPS:
            self._is_proven = True
            self._kept.segment.prove()
        if self._now() >= self._next_poll_s:
            self._next_poll_s = self._now() + POLL_S
            self._poll()
        return False

    def _poll(self) -> None:
        """Asks the keeper; one that is slow to answer is asked again, and one that has ended is
        replaced by one that knows its guests.

        Raises SegmentError, which ends the node, if there was none for MAX_UNKNOWN_S while pages are
        kept back: nobody else can tell, and a new process has memory of its own.
        """
        self._watch.poll()
        if not self._kept_back:
            return
        if self._watch.has_keeper and not self._may_have_guests():
            for lease in self._kept_back:
                lease.release(OwnerKind.REMOTE_WRITER)
            self._kept_back = []
        elif self._watch.lost_for_s() > MAX_UNKNOWN_S:
            raise SegmentError(f"no keeper, and {self.num_kept_back} pages are kept back")

    def _may_have_guests(self) -> bool:
        """Whether a guest of an earlier process may still write; also if the keeper does not say."""
        try:
            return self._kept.link.num_earlier_guests() > 0
        except SegmentError:
            return True

    def _keep_back(self, coordinator: HiSparseCoordinator) -> None:
        for pages in (coordinator.host.pages, coordinator.index.pages):
            lease = pages.try_acquire(pages.num_free, OwnerKind.REMOTE_WRITER)
            assert lease is not None
            self._kept_back.append(lease)
        log.warning("%d pages wait for guests of the process before", self.num_kept_back)
