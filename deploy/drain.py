"""SIGTERM of a node's or a front's process: it drains, then ends; a second SIGTERM hurries.

The handler is Python's, so it must be installed on the process's main thread (an actor's constructor
runs there); the drain runs on a thread of its own, beside everything that serves.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

FAULT_STATUS = 70

log = logging.getLogger(__name__)


class DrainOnTerm:
    """Args: drain: serves out what it has and stops; returns soon once the event is set. The process
    ends when it returns."""

    def __init__(self, drain: Callable[[threading.Event], None]) -> None:
        self._drain = drain
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None

    def install(self) -> None:
        """Takes over SIGTERM; on the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._thread is not None:
            self._hurry.set()
            return
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        log.info("SIGTERM: draining; a second one hurries")
        status = 0
        try:
            self._drain(self._hurry)
        except Exception:
            log.exception("the drain failed")
            status = FAULT_STATUS
        log.info("drained; the process ends")
        os._exit(status)
