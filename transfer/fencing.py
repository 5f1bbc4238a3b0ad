"""The forced fence: ends what lost writers can reach, without waiting for their death.

A write that failed may land seconds later, and a writer that was replaced may only be cut off and
go on later. So the node that is written to moves its
transport to a new data address and closes the old one; then every lease that was granted under the
old one ends, and sessions with nodes begin anew under the new one. It does so for leases of
replaced writers whose death nobody proves, in a quiet moment if there is one soon; when too much of its pool is in quarantine; and
when it is asked to. What other peers were sending fails with the rest, and is tried again by the
front. One fence at a time, on a thread of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..common.clock import Clock
from ..common.errors import TransferError
from .transport import Transport

_LOGGER = logging.getLogger(__name__)

MIN_INTERVAL_S = 5.0
"""From the end of one fence to the begin of the next, whatever keeps asking for it."""


PATIENCE_S = 2.0
"""How long pages of a replaced writer wait for a moment without transfers."""
_QUIET_POLL_S = 0.01


class DataFence:
    """See the module.

    Args:
        transport: one that only receives.
        end_leases: called on the I/O thread once nothing can land any more, with the reason.
        set_data_address: called on the I/O thread behind it, with the new address.
        post: runs a call on the I/O thread.
        num_receiving: how many transfers a fence would hit now.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        end_leases: Callable[[str], None],
        set_data_address: Callable[[str], None],
        post: Callable[[Callable[[], None]], None],
        num_receiving: Callable[[], int],
        clock: Clock,
        min_interval_s: float = MIN_INTERVAL_S,
    ) -> None:
        self._transport = transport
        self._end_leases = end_leases
        self._set_data_address = set_data_address
        self._post = post
        self._num_receiving = num_receiving
        self._clock = clock
        self._min_interval_s = min_interval_s
        self._lock = threading.Lock()
        self._is_under_way = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._ended_s = -min_interval_s
        self.num_fences = 0
        self.num_failed = 0
        self.last_ms = 0.0

    def request(self, reason: str, patience_s: float = 0.0) -> bool:
        """Fences soon, any thread; False if a fence is under way already.

        `patience_s`: waits so long for a moment in which no transfer would be hit.
        """
        with self._lock:
            if self._is_under_way or self._stopping.is_set():
                return False
            self._is_under_way = True
            self._thread = threading.Thread(
                target=self._run, args=(reason, patience_s), name="data-fence", daemon=True
            )
            self._thread.start()
        return True

    def stop(self, timeout_s: float = 10.0) -> None:
        """Waits for a fence under way. TransferError if it hangs."""
        self._stopping.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
            if thread.is_alive():
                raise TransferError(f"the fence is still busy after {timeout_s} s")

    def _run(self, reason: str, patience_s: float) -> None:
        wait_s = self._ended_s + self._min_interval_s - self._clock.now()
        if wait_s > 0 and self._stopping.wait(wait_s):
            return
        deadline_s = self._clock.now() + patience_s
        while self._num_receiving() and self._clock.now() < deadline_s:
            if self._stopping.wait(_QUIET_POLL_S):
                return
        _LOGGER.warning("fencing all writers: %s", reason)
        begin_s = self._clock.now()
        try:
            self._transport.renew()
        except TransferError as error:
            _LOGGER.error("the fence failed, pages stay in quarantine: %s", error)
            self.num_failed += 1
            self._end()
            return
        self.last_ms = (self._clock.now() - begin_s) * 1000
        self._post(lambda: self._finish(reason))

    def _finish(self, reason: str) -> None:
        """On the I/O thread, in one turn: no lease is granted in between."""
        self._end_leases(f"all writers were fenced: {reason}")
        self._set_data_address(self._transport.data_address)
        self.num_fences += 1
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._ended_s = self._clock.now()
            self._is_under_way = False
