"""Where the time between two steps goes, and what made it long.

Owned by the decode engine, written on the step thread, read from others (`stats`). The engine calls
`lap` at the end of each phase of its loop and `step_read` when it has a step's tokens. The time from
one `step_read` to the next is a *gap*: what a client of a running request sees between two tokens.
Gaps are counted only while a sequence goes on from one step to the next.

A gap of more than LONG_RATIO of the median is long, and has one cause: the phase whose time grew most
over its own usual time.

| cause  | where the time went                                                                 |
|--------|-------------------------------------------------------------------------------------|
| others | events (prompts offered or arrived, cancels) and the other engines, prefill if unified |
| seats  | backups that arrived, seats given and their hot buffers filled                       |
| launch | preparing and launching a step                                                       |
| device | waiting for the step: the device had more to do                                      |
| answer | tokens written to the journal and given to the I/O thread, ends, releases            |
| held   | the thread wanted to run in a phase of its own and did not: GIL, processor, driver   |
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

OTHERS, SEATS, LAUNCH, DEVICE, ANSWER, HELD = CAUSES = (
    "others",
    "seats",
    "launch",
    "device",
    "answer",
    "held",
)
LONG_RATIO = 1.3
_NUM_KEPT = 1024
"""Gaps that quantiles are taken over."""
_REFRESH = 32
"""Gaps between two looks at the median."""
_USUAL_WEIGHT = 0.05


@dataclass(frozen=True, slots=True)
class Gap:
    """One gap: its length, its step's rows, and each cause's part of it; milliseconds."""

    end_s: float
    ms: float
    num_rows: int
    parts_ms: dict[str, float]


class StepTimes:
    """See the module. `now_ns`, `cpu_ns`: wall clock, and processor time of the calling thread."""

    def __init__(
        self,
        now_ns: Callable[[], int] = time.perf_counter_ns,
        cpu_ns: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self._now_ns = now_ns
        self._cpu_ns = cpu_ns
        self._lap_at = (0, 0)
        self._since_ns: int | None = None
        self._spent_ns = dict.fromkeys(CAUSES, 0)
        self._usual_ms = dict.fromkeys(CAUSES, 0.0)
        self._median_ms = 0.0
        self.gaps: deque[Gap] = deque(maxlen=_NUM_KEPT)
        self.num_gaps = 0
        self.num_long = dict.fromkeys(CAUSES, 0)
        self.long_ms = dict.fromkeys(CAUSES, 0.0)

    def lap(self, phase: str) -> None:
        """What was done since the last lap belongs to `phase`."""
        now, cpu = self._now_ns(), self._cpu_ns()
        wall, worked = now - self._lap_at[0], cpu - self._lap_at[1]
        self._lap_at = (now, cpu)
        if phase != DEVICE:
            held = max(0, wall - worked)
            self._spent_ns[HELD] += held
            wall -= held
        self._spent_ns[phase] += wall

    def step_read(self, num_rows: int, *, goes_on: bool) -> None:
        """A step's tokens are here; `goes_on`: one of its sequences is in a step to come."""
        self.lap(DEVICE)
        now = self._lap_at[0]
        if self._since_ns is not None:
            parts_ms = {cause: spent / 1e6 for cause, spent in self._spent_ns.items()}
            self._count(Gap(now / 1e9, (now - self._since_ns) / 1e6, num_rows, parts_ms))
        self._since_ns = now if goes_on else None
        self._spent_ns = dict.fromkeys(CAUSES, 0)

    def stats(self) -> dict[str, float]:
        """For /metrics; any thread."""
        ordered = sorted(gap.ms for gap in self.gaps.copy())
        return {
            "step_gaps": self.num_gaps,
            "step_gap_p50_ms": _quantile(ordered, 0.5),
            "step_gap_p99_ms": _quantile(ordered, 0.99),
            **{f"long_step_gaps_{cause}": count for cause, count in self.num_long.items()},
            **{f"long_step_gaps_{cause}_ms": over for cause, over in self.long_ms.items()},
        }

    def _count(self, gap: Gap) -> None:
        if self.num_gaps % _REFRESH == 0:
            self._median_ms = _quantile(sorted(each.ms for each in self.gaps), 0.5)
        self.num_gaps += 1
        self.gaps.append(gap)
        usual_ms = self._usual_ms
        if 0.0 < self._median_ms * LONG_RATIO < gap.ms:
            cause = max(CAUSES, key=lambda each: gap.parts_ms[each] - usual_ms[each])
            self.num_long[cause] += 1
            self.long_ms[cause] += gap.ms - self._median_ms
            return
        for cause, part_ms in gap.parts_ms.items():
            usual_ms[cause] += _USUAL_WEIGHT * (part_ms - usual_ms[cause])


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0
