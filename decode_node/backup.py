"""Rows on their way to host pages: copies on a stream of their own, durable when an event says so.

Used by the coordinator on the step thread: for a full ring page (all layers in one launch, while the
next page fills), for a sequence that gives up its seat, and for a local prefill's pages. Nobody
waits for the device: `poll` moves `durable_len` of what has arrived, and work that depends on a copy
is put behind it on the device. On the CPU a copy has ended when `start` returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from ..common.errors import InvariantError
from ..hostpool.side_stream import Mark, SideStream
from .sequence import Sequence


class Backup:
    """Step thread only. `device`: where the rows come from. `side`: the stream of the copies."""

    def __init__(self, device: torch.device) -> None:
        self.side = SideStream(device)
        self._pending: deque[tuple[Mark, Sequence, int]] = deque()
        self.on_durable: Callable[[Sequence], None] = lambda _: None

    def start(self, sequence: Sequence, end: int, copy: Callable[[], None]) -> None:
        """Runs `copy`, which copies rows [backup_len, end), behind all work queued so far."""
        with self.side.fork():
            copy()
        sequence.backup_len = end
        self._pending.append((self.side.mark(), sequence, end))
        self.poll()

    def poll(self) -> None:
        """Moves `durable_len` of the sequences whose copies have ended."""
        while self._pending and self._pending[0][0].has_passed():
            self._arrived()

    def wait(self, sequence: Sequence) -> None:
        """Returns when no copy of this sequence is under way; the host waits."""
        while sequence.durable_len < sequence.backup_len:
            if not self._pending:
                raise InvariantError(f"{sequence.key}: a backup was lost")
            self._pending[0][0].wait()
            self._arrived()

    def order(self) -> None:
        """Work queued from now on runs behind all copies started so far; the host does not wait."""
        self.side.join()

    def _arrived(self) -> None:
        _, sequence, end = self._pending.popleft()
        sequence.durable_len = end
        self.on_durable(sequence)
