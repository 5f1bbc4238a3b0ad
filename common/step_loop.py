"""The step thread of a node: it drains an inbox of events and steps the node's engines.

One thread owns the model, the pools and the sequences. Everything else (the I/O thread, Ray calls)
only puts events into the inbox. The loop sleeps while no engine has work and wakes with the next
event. An engine fails single requests itself; what escapes an engine is our own fault and ends the
loop through `on_fatal`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

IDLE_WAKE_S = 0.05
"""Longest sleep: engines get a tick (deadlines, parked requests) at least this often."""

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What the loop drives. All methods run on the step thread."""

    def handle(self, event: Any) -> bool:
        """Takes an event of the inbox; False if it is not this engine's."""
        ...

    def step(self) -> bool:
        """Does one unit of work; False if there was none."""
        ...


class StepLoop:
    """Runs engines on one thread.

    Args:
        engines: stepped in this order; an event goes to the first that takes it. Read at start.
        on_fatal: called on the step thread with what escaped an engine; the loop has ended then.
    """

    def __init__(
        self, name: str, engines: Sequence[Engine], on_fatal: Callable[[BaseException], None]
    ) -> None:
        self._engines = engines
        self._on_fatal = on_fatal
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, event: Any) -> None:
        """Puts an event into the inbox; any thread."""
        self._inbox.put(event)

    def stop(self, timeout_s: float) -> bool:
        """Ends the loop after the current step; False if it did not end in time."""
        self._stopping.set()
        self._inbox.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            busy = False
            while not self._stopping.is_set():
                self._drain(wait=not busy)
                busy = False
                for engine in self._engines:
                    busy |= engine.step()
        except BaseException as error:
            log.exception("the step loop ends")
            self._on_fatal(error)

    def _drain(self, *, wait: bool) -> None:
        try:
            event = self._inbox.get(timeout=IDLE_WAKE_S) if wait else self._inbox.get_nowait()
            while True:
                if event is not None:
                    self._dispatch(event)
                event = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _dispatch(self, event: Any) -> None:
        for engine in self._engines:
            if engine.handle(event):
                return
        log.debug("nobody takes %r", event)
