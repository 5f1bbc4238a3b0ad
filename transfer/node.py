"""A node's process: its control loop and step loop, started, read and stopped in one order.

Built by prefill_node/node.py, decode_node/node.py and deploy/unified.py, each with its engines and
handlers; wrapped by a Ray actor. Methods are called on the actor's threads.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..common.errors import InvariantError, PeerError, RequestError
from ..common.step_loop import Engine, StepLoop
from ..common.wire import Load
from .control import ControlLoop
from .fencing import DataFence
from .session import CompositeHandler, Handler

AUDIT_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 2.0
"""How long a drained node waits for its last messages to leave."""
SWITCH_INTERVAL_S = 0.0005
"""How long a thread keeps the interpreter from another that wants it. Python's own 5 ms are longer
than a decode step, which needs it several times and would wait each time."""
_DRAIN_POLL_S = 0.02


class NodeEngine(Engine, Protocol):
    """What a node shows of an engine; counters are read from other threads."""

    is_draining: bool

    @property
    def is_idle(self) -> bool: ...

    def load(self) -> Load: ...

    def stats(self) -> dict[str, float]: ...

    def check_invariants(self) -> None: ...

    def hand_over(self, error: RequestError) -> None:
        """Ends every request so that its front runs it on elsewhere; step thread."""
        ...


def own_interpreter() -> None:
    """This process runs one node that is built, and nothing else: its steps are not to be held up.

    Threads give the interpreter away sooner, and what is there now is never looked at by the
    garbage collector again (a full collection over it takes 60 ms and more, between two tokens).
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()


class HandOver:
    """An event for the step loop: the node's requests end here and go on elsewhere."""

    def __init__(self) -> None:
        self.done = threading.Event()


class Audit:
    """An event for the step loop: checks every invariant between two steps."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None


class Auditor:
    """The engine of the step loop that answers Audit and HandOver events."""

    def __init__(self, engines: Sequence[NodeEngine]) -> None:
        self._engines = engines

    def handle(self, event: object) -> bool:
        match event:
            case Audit():
                self._audit(event)
            case HandOver():
                for engine in self._engines:
                    engine.hand_over(_draining())
            case _:
                return False
        event.done.set()
        return True

    def _audit(self, audit: Audit) -> None:
        try:
            for engine in self._engines:
                engine.check_invariants()
        except InvariantError as error:
            audit.error = error

    def step(self) -> bool:
        return False


class Node:
    """See the module.

    Args:
        engines: the node's engines, each stepped by `step_loop`.
        let_go: called first of all when the node stops: nothing is to outlive it.
        closers: called last, in order: the transfer thread, the transport, pinned memory.
        max_context: longest sequence the node takes, in tokens.
        fence: of a node whose memory peers write to.
    """

    def __init__(
        self,
        control: ControlLoop,
        step_loop: StepLoop,
        handlers: Sequence[Handler],
        engines: Sequence[NodeEngine],
        *,
        max_context: int,
        fence: DataFence | None = None,
        let_go: Callable[[], None] | None = None,
        closers: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._fence = fence
        self.control = control
        self._step_loop = step_loop
        self._handlers = handlers
        self._engines = engines
        self._let_go = let_go
        self._closers = closers
        self._max_context = max_context

    def start(self) -> None:
        self._step_loop.start()
        self.control.start(CompositeHandler(self._handlers))

    def info(self) -> dict[str, Any]:
        """Who and where the node is, and its counters: plain values."""
        stats: dict[str, float] = {}
        for engine in self._engines:
            stats |= engine.stats()
        stats["strangers_refused"] = self.control.stats.num_unauthenticated
        stats["hellos_refused"] = self.control.stats.num_refused
        return {
            "node_id": self.control.node_id,
            "role": self.control.hello.role,
            "epoch": self.control.epoch,
            "address": self.control.address,
            "max_context": self._max_context,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "stats": stats,
        }

    def audit(self) -> dict[str, Any]:
        """Checks every pool and table between two steps; raises what it found, returns `info`."""
        audit = Audit()
        self._step_loop.post(audit)
        if not audit.done.wait(AUDIT_TIMEOUT_S):
            raise PeerError(f"{self.control.node_id}: no step ended in {AUDIT_TIMEOUT_S} s")
        if audit.error is not None:
            raise audit.error
        return self.info()

    def fence_writers(self, reason: str) -> bool:
        """Ends what any peer can still write here, now; False if there is nothing to fence.

        Transfers under way fail and are tried again; requests that run go on.
        """
        return self._fence is not None and self._fence.request(reason)

    def drain(self, timeout_s: float, hurry: threading.Event | None = None) -> bool:
        """Takes no new requests, waits for those it has, hands over what is left.

        True if all ended here; False if `timeout_s` went by, or `hurry` was set, and some go on
        elsewhere. All that there is to tell has left the node when it returns.
        """
        for engine in self._engines:
            engine.is_draining = True
        is_idle = self._wait_until_idle(timeout_s, hurry or threading.Event())
        if not is_idle:
            event = HandOver()
            self._step_loop.post(event)
            event.done.wait(FLUSH_TIMEOUT_S)
            self._wait_until_idle(FLUSH_TIMEOUT_S, threading.Event())
        self._flush()
        return is_idle

    def _wait_until_idle(self, timeout_s: float, hurry: threading.Event) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not all(engine.is_idle for engine in self._engines):
            if time.monotonic() > deadline_s or hurry.wait(_DRAIN_POLL_S):
                return False
        return True

    def _flush(self) -> None:
        """Waits until what the step thread has sent is with the sockets."""
        audit = Audit()
        self._step_loop.post(audit)
        audit.done.wait(FLUSH_TIMEOUT_S)
        is_sent = threading.Event()
        self.control.post(is_sent.set)
        is_sent.wait(FLUSH_TIMEOUT_S)

    def stop(self) -> None:
        """Ends both loops and closes what is open, also where a part of that raises. May be called
        twice."""
        closers, self._closers = self._closers, ()
        with contextlib.ExitStack() as stack:
            for close in reversed(closers):
                stack.callback(close)
            if self._let_go is not None:
                self._let_go()
            self.control.stop()
            self._step_loop.stop(timeout_s=30.0)


def _draining() -> RequestError:
    return RequestError(
        "the node stops; the request goes on elsewhere", status=503, code="draining"
    )


def total_load(engines: Sequence[NodeEngine]) -> Load:
    """The sum of what several engines of one node tell."""
    loads = [engine.load() for engine in engines]
    return Load(
        num_queued=sum(load.num_queued for load in loads),
        num_running=sum(load.num_running for load in loads),
        num_parked=sum(load.num_parked for load in loads),
        free_pages=loads[-1].free_pages,
        total_pages=loads[-1].total_pages,
        quarantined_pages=sum(load.quarantined_pages for load in loads),
        is_draining=any(load.is_draining for load in loads),
    )
