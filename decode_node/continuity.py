"""Joins a decode node to what outlives its process: memory, journal, and the sequences found there.

Used by decode_node/node.py on the thread that builds the node. Without a link to a keeper, or where
the keeper fails, everything here is a no-op and the node works as if nothing could outlive it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..common.clock import Clock
from ..common.config import Config
from ..common.errors import SegmentError
from ..common.layouts import KvGeometry
from ..common.step_loop import Engine
from ..common.wire import SharedMemory
from ..hostpool.keeper_link import KeeperLink
from ..hostpool.mirror import HostMirror
from ..hostpool.segment import SharedSegment
from ..transfer.shared_paths import machine_id
from .engine import DecodeEngine
from .journal import Journal
from .keeper_watch import KeeperWatch, StartKeeper
from .kept import KeptMemory, claim
from .reattach import Aftermath, Reattached, reattach

log = logging.getLogger(__name__)


class Continuity:
    """Built first, `begin` last.

    Attributes:
        segment: for the node's pools; None: they allocate.
        journal: for the engine.
        front_ids: fronts that wait for sequences of the process before; after `begin`.
    """

    def __init__(
        self,
        link: KeeperLink | None,
        config: Config,
        kv: KvGeometry,
        max_context: int,
        start_keeper: StartKeeper | None = None,
    ) -> None:
        self._memory: KeptMemory | None = None
        self._watch: KeeperWatch | None = None
        self._start_keeper = start_keeper
        self.segment: SharedSegment | None = None
        self.journal: Journal | None = None
        self.front_ids: tuple[str, ...] = ()
        if link is None:
            return
        try:
            self._memory = claim(link, config, kv, max_context)
        except SegmentError as error:
            log.warning("nothing will outlive this process: %s", error)
            return
        self.segment = self._memory.segment
        self.journal = self._memory.journal()

    def lending(self) -> SharedMemory | None:
        """What prefill nodes of this machine are told, so that they can copy into the pools."""
        if self._memory is None:
            return None
        return SharedMemory(machine_id(), str(self._memory.link.path), ("kv", "index"))

    @property
    def port(self) -> int:
        """Where peers of the process before look for this one; 0: anywhere."""
        return self._memory.port if self._memory else 0

    def note_address(self, address: str) -> None:
        """Where this one listens, "tcp://host:port"."""
        if self._memory is not None:
            self._memory.note_port(int(address.rpartition(":")[2]))

    def guard(self, on_fatal: Callable[[BaseException], None]) -> Callable[[BaseException], None]:
        """`on_fatal` for a node that finds its own state wrong: nobody goes on from it."""
        return on_fatal if self._memory is None else self._memory.guard(on_fatal)

    def begin(
        self,
        decode: DecodeEngine,
        index: HostMirror,
        clock: Clock,
        on_fatal: Callable[[BaseException], None],
    ) -> list[Engine]:
        """Goes on with what is there; returns what the step loop must run for it.

        Args:
            index: the index pool's mirror, in the segment.
            on_fatal: of `guard`. Called if it cannot be gone on from, so that the next process
                starts clean.
        """
        memory, journal = self._memory, self.journal
        if memory is None or journal is None:
            return []
        if not index.is_device:
            decode.coordinator.kept_keys = index
        try:
            past = Reattached() if memory.is_fresh else reattach(decode, journal, index)
            self._watch = watch = KeeperWatch(memory, self._start_keeper, clock.now)
            aftermath = Aftermath(
                memory, watch, decode.coordinator, lambda: decode.num_steps, clock.now
            )
        except Exception as error:
            on_fatal(error)
            raise
        self.front_ids = past.front_ids
        decode.kept_stats = lambda: {
            **past.stats(),
            "pages_kept_from_guests": aftermath.num_kept_back,
            "has_keeper": watch.has_keeper,
            "keeper_restarts": watch.num_restarts,
            "journal_live": journal.num_live,
            "journal_not_kept": journal.num_not_kept,
        }
        return [aftermath]

    def let_go(self) -> None:
        """The node is about to end in order, and nothing is to outlive it: whatever happens to it
        from now on, its memory goes with it. Any thread."""
        if self._watch is not None:
            self._watch.let_go()

    def close(self) -> None:
        """Behind everything that uses the memory."""
        self.let_go()
        if self._memory is not None:
            self._memory.close()
