"""Who sits: seats for READY and PARKED sequences, and who gives one up for whom.

Every running sequence has a seat and decodes in every step; the batch of a step is built from
`running` alone and is never merged with anything else. When seats run out, a waiting sequence
deserves one if it came earlier than a running one or has less than half as much left to do; the
running one must have had its seat for `park_after_tokens` tokens, so that seats do not flap.
"""

from __future__ import annotations

from collections.abc import Callable

from .coordinator import HiSparseCoordinator
from .sequence import Sequence, SequenceState

MAX_SEATED = 2
"""Sequences that get a seat between two steps of others."""


class SeatScheduler:
    """Step thread only.

    Args:
        coordinator: who gives and takes seats.
        park_after_tokens: tokens a sequence may keep its seat for.
        settle: waits for the steps in flight; called before a sequence of theirs is parked.
    """

    def __init__(
        self,
        coordinator: HiSparseCoordinator,
        *,
        park_after_tokens: int,
        settle: Callable[[], None],
    ) -> None:
        self._coordinator = coordinator
        self._settle = settle
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
        """Seats whom it can; parks at most one sequence for each waiting one.

        Beside running sequences at most MAX_SEATED a call: they wait while seats are prepared.
        """
        self.waiting.sort(key=lambda sequence: sequence.arrival_s)
        most = len(self.running) + MAX_SEATED if self.running else len(self.waiting)
        for waiter in list(self.waiting):
            if len(self.running) >= most:
                return
            if waiter in self.waiting and not self._try_run(waiter):
                self._make_room(waiter)

    def _make_room(self, waiter: Sequence) -> None:
        """Parks somebody for `waiter`, if there is one who must yield."""
        victim = self._victim(waiter)
        if victim is not None and victim.in_flight:
            self._settle()  # their tokens may end sequences, and free seats
            if waiter not in self.waiting or self._try_run(waiter):
                return
            victim = self._victim(waiter)
        if victim is None:
            return
        self._coordinator.retract_req(victim)
        self.running.remove(victim)
        self.waiting.append(victim)
        self.num_parks += 1
        self._try_run(waiter)

    def _try_run(self, waiter: Sequence) -> bool:
        if not self._coordinator.try_seat(waiter):
            return False
        self._run(waiter)
        return True

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
