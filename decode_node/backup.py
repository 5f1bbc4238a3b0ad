"""Rows on their way to host pages: copies on a stream of their own, durable when an event says so.

Used by the coordinator on the step thread: for a full ring page (all layers in one launch, while the
next page fills), for a sequence that gives up its seat, and for a local prefill's pages. Nobody
waits for the device: `poll` moves `durable_len` of what has arrived, and work that depends on a copy
is put behind it on the device. On the CPU a copy has ended when `start` returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..common.errors import InvariantError
from .sequence import Sequence


class Backup:
    """Step thread only. `device`: where the rows come from."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: deque[tuple[torch.cuda.Event, Sequence, int]] = deque()
        self.on_durable: Callable[[Sequence], None] = lambda _: None

    def start(self, sequence: Sequence, end: int, copy: Callable[[], None]) -> None:
        """Runs `copy`, which copies rows [backup_len, end), behind all work queued so far."""
        with self._on_stream():
            copy()
        sequence.backup_len = end
        if self._stream is None:
            self._arrived(sequence, end)
            return
        event = torch.cuda.Event()
        event.record(self._stream)
        self._pending.append((event, sequence, end))

    def poll(self) -> None:
        """Moves `durable_len` of the sequences whose copies have ended."""
        while self._pending and self._pending[0][0].query():
            _, sequence, end = self._pending.popleft()
            self._arrived(sequence, end)

    def wait(self, sequence: Sequence) -> None:
        """Returns when no copy of this sequence is under way; the host waits."""
        while sequence.durable_len < sequence.backup_len:
            if not self._pending:
                raise InvariantError(f"{sequence.key}: a backup was lost")
            event, other, end = self._pending.popleft()
            event.synchronize()
            self._arrived(other, end)

    def order(self) -> None:
        """Work queued from now on runs behind all copies started so far; the host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _on_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def _arrived(self, sequence: Sequence, end: int) -> None:
        sequence.durable_len = end
        self.on_durable(sequence)
