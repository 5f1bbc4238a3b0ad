"""The step loop hands events to the first engine that takes them, and ends by on_fatal alone."""

from __future__ import annotations

import subprocess
import sys
import threading

from tidepool.common.errors import InvariantError
from tidepool.common.step_loop import StepLoop

WAIT_S = 5.0


class Recorder:
    def __init__(self, takes: type, steps: int = 0) -> None:
        self.takes = takes
        self.steps = steps
        self.seen: list[object] = []
        self.got = threading.Event()

    def handle(self, event: object) -> bool:
        if not isinstance(event, self.takes):
            return False
        self.seen.append(event)
        self.got.set()
        return True

    def step(self) -> bool:
        self.steps -= 1
        return self.steps > 0


def test_an_event_goes_to_the_first_engine_that_takes_it() -> None:
    first, second = Recorder(int), Recorder(object)
    loop = StepLoop("test", [first, second], on_fatal=lambda _: None)
    loop.start()
    for event in (1, "a", 2):
        loop.post(event)
    assert first.got.wait(WAIT_S) and second.got.wait(WAIT_S)
    assert loop.stop(WAIT_S)
    assert first.seen == [1, 2]
    assert second.seen == ["a"]


def test_what_escapes_an_engine_ends_the_loop_through_on_fatal() -> None:
    fatal: list[BaseException] = []
    ended = threading.Event()

    class Broken(Recorder):
        def step(self) -> bool:
            raise InvariantError("broken")

    def on_fatal(error: BaseException) -> None:
        fatal.append(error)
        ended.set()

    loop = StepLoop("test", [Broken(int)], on_fatal=on_fatal)
    loop.start()
    assert ended.wait(WAIT_S)
    assert isinstance(fatal[0], InvariantError)
    assert loop.stop(WAIT_S)


def test_an_idle_loop_stops_at_once() -> None:
    loop = StepLoop("test", [Recorder(int)], on_fatal=lambda _: None)
    loop.start()
    assert loop.is_alive
    assert loop.stop(WAIT_S)
    assert not loop.is_alive


def test_a_nodes_own_process_shares_the_interpreter_within_a_step() -> None:
    code = (
        "import gc, sys\n"
        "from tidepool.transfer.node import own_interpreter\n"
        "own_interpreter()\n"
        "print(sys.getswitchinterval(), gc.get_freeze_count() > 1000)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0.0005", "True"]
