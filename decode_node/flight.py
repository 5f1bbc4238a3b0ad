"""Steps in flight: launched, not read yet.

Owned by the decode engine, step thread only. `launch` feeds one token of each sequence and moves
their counters; `read` gives the oldest step's results back, when the device has them. A sequence that
has ended is told by the engine; here it only counts how many steps of it are on their way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..common.wire import OutputToken
from ..model.output import OutputRow
from .coordinator import HiSparseCoordinator
from .sequence import Sequence
from .step_runner import Launched, StepRunner


@dataclass(frozen=True, slots=True)
class FlownStep:
    """A launched step: each sequence with the index of the output token it fed."""

    launched: Launched
    fed: list[tuple[Sequence, int]]

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for sequence, _ in self.fed]


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a step made of one sequence.

    Attributes:
        index: of the output token it chose.
        token: its id is -1 where there was none to choose.
        fault: flags, see kernels/resolve.py; 0: none.
    """

    sequence: Sequence
    index: int
    token: OutputToken
    fault: int


class Flight:
    """Args: who prepares rows and keeps backups, and who runs steps."""

    def __init__(self, coordinator: HiSparseCoordinator, runner: StepRunner) -> None:
        self._coordinator = coordinator
        self._runner = runner
        self._steps: deque[FlownStep] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def launch(self, batch: list[Sequence]) -> None:
        """Starts a step, and the backup of pages that it fills."""
        rows = [self._coordinator.seat_row(sequence) for sequence in batch]
        outputs = [
            OutputRow(sequence.sampling, sequence.kv_len + 1, sequence.next_index + 1)
            for sequence in batch
        ]
        launched = self._runner.launch(rows, outputs)
        self._steps.append(
            FlownStep(launched, [(sequence, sequence.next_index) for sequence in batch])
        )
        for sequence in batch:
            sequence.kv_len += 1
            sequence.in_flight += 1
        self._coordinator.finish_step(batch)

    def pop(self) -> FlownStep:
        """The oldest step; `read` it next."""
        return self._steps.popleft()

    def read(self, step: FlownStep) -> list[RowResult]:
        """Waits for a step; whatever comes of it, it is no longer in flight."""
        try:
            results = step.launched.results()
        finally:
            for sequence in step.sequences:
                sequence.in_flight -= 1
        return [
            RowResult(sequence, fed_index + 1, token, fault)
            for (sequence, fed_index), (token, fault) in zip(step.fed, results, strict=True)
        ]
