"""Gaps between steps are measured, and a long one gets the cause that made it long."""

from __future__ import annotations

import pytest

from tidepool.decode_node.step_times import (
    ANSWER,
    CAUSES,
    DEVICE,
    HELD,
    LAUNCH,
    OTHERS,
    SEATS,
    StepTimes,
)
from tidepool.deploy.front import metrics

USUAL_MS = {OTHERS: 0.1, SEATS: 0.2, LAUNCH: 0.5, DEVICE: 3.0, ANSWER: 0.2}


class Steps:
    """Runs steps on clocks of its own."""

    def __init__(self) -> None:
        self.now_ns = self.cpu_ns = 0
        self.times = StepTimes(lambda: self.now_ns, lambda: self.cpu_ns)

    def phase(self, name: str, ms: float, held_ms: float = 0.0) -> None:
        self.now_ns += int((ms + held_ms) * 1e6)
        self.cpu_ns += int(ms * 1e6) if name != DEVICE else 0
        if name == DEVICE:
            self.times.step_read(1, goes_on=True)
        else:
            self.times.lap(name)

    def step(self, held_ms: float = 0.0, **longer_ms: float) -> None:
        for name, ms in USUAL_MS.items():
            self.phase(name, ms + longer_ms.get(name, 0.0), held_ms if name == LAUNCH else 0.0)


@pytest.mark.parametrize("cause", [OTHERS, SEATS, LAUNCH, DEVICE, ANSWER])
def test_the_phase_that_grew_is_the_cause(cause: str) -> None:
    steps = Steps()
    for _ in range(40):
        steps.step()
    steps.step(**{cause: 7.0})
    steps.step()  # what is behind the tokens of a step counts for the next gap
    stats = steps.times.stats()
    found = {each: stats[f"long_step_gaps_{each}"] for each in CAUSES}
    assert found == {each: float(each == cause) for each in CAUSES}
    assert stats[f"long_step_gaps_{cause}_ms"] == pytest.approx(7.0)
    assert stats["step_gap_p50_ms"] == pytest.approx(4.0)


def test_time_in_which_the_thread_did_not_run_is_held() -> None:
    steps = Steps()
    for _ in range(40):
        steps.step()
    steps.step(held_ms=5.0)
    stats = steps.times.stats()
    assert stats[f"long_step_gaps_{HELD}"] == 1
    assert stats["long_step_gaps_launch"] == 0


def test_time_without_a_running_sequence_is_no_gap() -> None:
    steps = Steps()
    steps.step()
    steps.times.step_read(1, goes_on=False)
    steps.phase(OTHERS, 900.0)
    steps.step()
    assert steps.times.stats()["step_gaps"] == 1
    assert steps.times.gaps[0].ms < 10


def test_the_front_exports_a_counter_for_each_cause() -> None:
    assert metrics.STEP_CAUSES == CAUSES
    assert {f"long_step_gaps_{cause}" for cause in CAUSES} <= metrics.NODE_COUNTERS
