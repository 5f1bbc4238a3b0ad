"""Who sits: seats for READY and PARKED sequences, and who gives one up for whom.

Every running sequence has a seat and decodes in every step; the batch of a step is built from
`running` alone and is never merged with anything else. When seats run out, a waiting sequence
deserves one if it came earlier than a running one or has less than half as much left to do; the
running one must have had its seat for `park_after_tokens` tokens, so that seats do not flap.
"""

from __future__ import annotations

from .coordinator import HiSparseCoordinator
from .sequence import Sequence, SequenceState


class SeatScheduler:
    """Step thread only."""

    def __init__(self, coordinator: HiSparseCoordinator, *, park_after_tokens: int) -> None:
        self._coordinator = coordinator
        self._park_after_tokens = park_after_tokens
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_parks = 0

    def add(self, sequence: Sequence) -> None:
        """Takes a READY sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets an ended sequence."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)

    def assign(self) -> None:
        """Seats whom it can; parks at most one sequence for each waiting one."""
        self.waiting.sort(key=lambda sequence: sequence.arrival_s)
        for waiter in list(self.waiting):
            if self._coordinator.try_seat(waiter):
                self._run(waiter)
                continue
            victim = self._victim(waiter)
            if victim is None:
                continue
            self._coordinator.retract_req(victim)
            self.running.remove(victim)
            self.waiting.append(victim)
            self.num_parks += 1
            if self._coordinator.try_seat(waiter):
                self._run(waiter)

    def _run(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def _victim(self, waiter: Sequence) -> Sequence | None:
        """The running sequence with most left to do, of those that must yield to `waiter`."""
        candidates = [
            sequence
            for sequence in self.running
            if sequence.state is SequenceState.RUNNING
            and sequence.tokens_since_seated >= self._park_after_tokens
            and _deserves(waiter, sequence)
        ]
        return max(
            candidates,
            key=lambda sequence: (sequence.num_remaining, sequence.arrival_s),
            default=None,
        )


def _deserves(waiter: Sequence, holder: Sequence) -> bool:
    is_older = waiter.arrival_s < holder.arrival_s
    return is_older or 2 * waiter.num_remaining < holder.num_remaining
