"""Sees that a decode node's keeper lives, and puts another in its place when it has ended.

`poll` runs on the step thread and never waits: the new keeper is started, owned and handed the
node's segment on a thread of its own. It finds the guests of the one before in the segment's ledger
(deploy/keeper.py), so it answers for them as that one did. Until it holds the segment a kill of this
process loses its KV.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..hostpool.keeper_link import KeeperLink
from .kept import KeptMemory

StartKeeper = Callable[[], KeeperLink]
"""Starts a keeper for this node, or finds one; blocks, on any thread. SegmentError."""

FIRST_RETRY_S = 0.5
MAX_RETRY_S = 30.0
CLOSE_TIMEOUT_S = 15.0

log = logging.getLogger(__name__)


class _Attempt:
    """A keeper that is being started."""

    def __init__(self, start: StartKeeper, kept: KeptMemory) -> None:
        self.link: KeeperLink | None = None
        self.error: BaseException | None = None
        self._start = start
        self._kept = kept
        self.thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            link = self._start()
        except Exception as error:
            self.error = error
            return
        try:
            strange = link.own(0.0)
            if strange is not None:
                strange.close()
            link.hold(self._kept.segment)
            self.link = link
        except Exception as error:
            self.error = error
            link.end()
            link.close()


class KeeperWatch:
    """See the module.

    Args:
        kept: whose link is replaced.
        start: None: nobody can; a keeper that has ended is only reported.
        now: seconds.

    Attributes:
        has_keeper: one holds the segment, as far as is known.
        num_restarts: keepers that took the place of one that had ended.
    """

    def __init__(
        self, kept: KeptMemory, start: StartKeeper | None, now: Callable[[], float]
    ) -> None:
        self._kept = kept
        self._start = start
        self._now = now
        self.has_keeper = True
        self.num_restarts = 0
        self._lost_s = 0.0
        self._next_try_s = 0.0
        self._retry_s = FIRST_RETRY_S
        self._attempt: _Attempt | None = None
        self._is_over = False
        self._lock = threading.Lock()
        """`poll` against `let_go`; held for no time."""

    def lost_for_s(self) -> float:
        """How long there has been no keeper; 0: there is one."""
        return 0.0 if self.has_keeper else self._now() - self._lost_s

    def poll(self) -> None:
        """Step thread."""
        with self._lock:
            if not self._is_over:
                self._look()

    def _look(self) -> None:
        if self.has_keeper and not self._kept.link.is_alive:
            self.has_keeper = False
            self._lost_s = self._next_try_s = self._now()
            self._retry_s = FIRST_RETRY_S
            log.error("the keeper has ended: if this process is killed now, its KV is lost")
        if self._attempt is not None and not self._attempt.thread.is_alive():
            self._conclude(self._attempt)
        elif self._must_try():
            assert self._start is not None
            self._attempt = _Attempt(self._start, self._kept)

    def _must_try(self) -> bool:
        is_due = not self.has_keeper and self._now() >= self._next_try_s
        return is_due and self._attempt is None and self._start is not None

    def _conclude(self, attempt: _Attempt) -> None:
        self._attempt = None
        if attempt.link is None:
            self._next_try_s = self._now() + self._retry_s
            log.warning("no new keeper, again in %.1f s: %s", self._retry_s, attempt.error)
            self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)
            return
        self._kept.link.close()
        self._kept.link = attempt.link
        self.has_keeper = True
        self.num_restarts += 1
        lost_s = self._now() - self._lost_s
        log.warning("another keeper holds the memory; %.2f s there was none", lost_s)

    def let_go(self) -> None:
        """The node ends in order: its keeper ends now, and no other is started. Any thread; again
        is nothing."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            attempt = self._attempt
        if attempt is not None:
            attempt.thread.join(CLOSE_TIMEOUT_S)
            if attempt.link is not None:
                attempt.link.end()
                attempt.link.close()
        self._kept.link.end()
