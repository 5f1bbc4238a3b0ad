"""Proof that the earlier processes of a node are dead, so that pages they could write are given back.

A newer process proves nothing by itself: Ray may replace a node whose machine it cannot reach, and
the old one may live on and write. But processes of one machine can be told apart for certain: each
holds a lock that the kernel takes back only when it has ended. Whoever has the lock knows that all
who are recorded in the file are gone; bytes that the kernel still sends for them are waited for.

Used by the node's actor, on its threads. What cannot be proven is not claimed: pages that such a
process could write stay in quarantine.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from pathlib import Path

CLAIM_TIMEOUT_S = 10.0
"""A killed process takes some time to end: 1.4 s with 16 GiB of pinned memory, more with more."""
MAX_RECORDED = 16
_RETRY_S = 0.05
_DYING_STATES = ("04", "09", "0B")
"""FIN_WAIT1, LAST_ACK, CLOSING: a closed socket whose bytes are not all acknowledged."""
_TCP_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def node_directory() -> Path:
    """This user's private directory for what processes of one node leave each other."""
    directory = Path(tempfile.gettempdir()) / f"tidepool-nodes-{os.getuid()}"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


class Incarnations:
    """The record of one node's processes on this machine.

    Args:
        name: of the node, unique on the machine.
        directory: of all records; None: one of this user's under the temporary directory.
    """

    def __init__(self, name: str, directory: Path | None = None) -> None:
        directory = directory or node_directory()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._path = directory / f"{name}.json"
        self._file = os.fdopen(os.open(self._path, flags, 0o600), "r+")
        self._is_claimed = False
        self._is_drained = False
        self._past: tuple[int, ...] = ()

    def claim(self, timeout_s: float = CLAIM_TIMEOUT_S) -> bool:
        """Takes the lock, held until this process ends; False if another process has it."""
        deadline_s = time.monotonic() + timeout_s
        while not self._try_lock():
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_RETRY_S)
        self._is_claimed = True
        self._past = _epochs_in(self._file.read())
        return True

    def record(self, epoch: int) -> None:
        """Notes this process, before it says hello to anybody."""
        if not self._is_claimed:
            return
        epochs = [*self._past, epoch][-MAX_RECORDED:]
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(epochs))
        self._file.flush()
        os.fsync(self._file.fileno())

    def dead_epochs(self) -> tuple[int, ...]:
        """Epochs that can never write again. Empty while their last bytes may be under way."""
        if not self._is_drained:
            self._is_drained = not _has_dying_sockets()
        return self._past if self._is_drained else ()

    def forget(self) -> None:
        """The node ends in order: nobody comes after it."""
        if self._is_claimed:
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        self._file.close()

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _epochs_in(text: str) -> tuple[int, ...]:
    """The record's epochs; a torn or foreign record proves nothing."""
    try:
        epochs = json.loads(text or "[]")
    except ValueError:
        return ()
    if not isinstance(epochs, list) or not all(type(epoch) is int for epoch in epochs):
        return ()
    return tuple(epochs)


def _has_dying_sockets() -> bool:
    """Whether the kernel still sends for a socket whose process has closed it."""
    for table in _TCP_TABLES:
        try:
            rows = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            unsent = fields[4].partition(":")[0]
            if fields[3] in _DYING_STATES and int(unsent, 16) > 0:
                return True
    return False
