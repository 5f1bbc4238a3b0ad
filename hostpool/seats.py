"""Seats: the fixed number of requests that can decode at once, each with a hot buffer.

A seat is a number in [0, num_seats); what lies in its rows is the coordinator's business. Used on
the step thread. Always true: free + taken == num_seats, and no seat is given out twice.
"""

from __future__ import annotations

from ..common.errors import InvariantError


class SeatPool:
    """O(1) acquire and release; the seat given back last is taken first (its rows are warm)."""

    def __init__(self, num_seats: int) -> None:
        if num_seats < 0:
            raise InvariantError(f"a pool cannot have {num_seats} seats")
        self._free = list(range(num_seats - 1, -1, -1))
        self._is_taken = bytearray(num_seats)

    @property
    def num_seats(self) -> int:
        return len(self._is_taken)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_taken(self) -> int:
        return self.num_seats - self.num_free

    def try_acquire(self) -> int | None:
        """A free seat, or None."""
        if not self._free:
            return None
        seat = self._free.pop()
        self._is_taken[seat] = 1
        return seat

    def release(self, seat: int) -> None:
        """Gives a seat back; InvariantError if it is not taken."""
        if not (0 <= seat < self.num_seats and self._is_taken[seat]):
            raise InvariantError(f"seat {seat} of {self.num_seats} is released but not taken")
        self._is_taken[seat] = 0
        self._free.append(seat)

    def check_invariants(self) -> None:
        """Raises InvariantError unless the free list and the marks agree."""
        if len(set(self._free)) != len(self._free):
            raise InvariantError("a seat is free twice")
        if any(self._is_taken[seat] for seat in self._free):
            raise InvariantError("a seat is free and taken")
        if self._is_taken.count(1) + len(self._free) != self.num_seats:
            raise InvariantError("a seat is neither free nor taken")
