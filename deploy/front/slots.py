"""How many requests a front carries at a time. Used on the asyncio loop."""

from __future__ import annotations

from ...common.errors import InvariantError, RequestError


class Slot:
    """Room for one call: first for its body, then for its requests. Released exactly once."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._count = 1

    def grow(self, num_requests: int) -> None:
        """Takes room for all requests of the call; RequestError if there is not enough."""
        self._slots.take(num_requests - self._count)
        self._count = num_requests

    def release(self) -> None:
        if self._count == 0:
            raise InvariantError("a slot was released twice")
        self._slots.give(self._count)
        self._count = 0


class Slots:
    """Bound of requests in flight; one more is answered 429, after `close` any is 503."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_used = 0
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def admit(self) -> Slot:
        if self.is_closed:
            raise RequestError(
                "the front is draining", status=503, code="draining", retry_after_s=1.0
            )
        self.take(1)
        return Slot(self)

    def take(self, count: int) -> None:
        if count >= self.limit:
            raise RequestError(
                f"the call needs {count + 1} requests; this server takes {self.limit} at a time",
                code="too_many_choices",
                param="n",
            )
        if self.num_used + count > self.limit:
            raise RequestError(
                f"the server is full: {self.num_used} requests of {self.limit} are in flight",
                status=429,
                code="rate_limit_exceeded",
                retry_after_s=1.0,
            )
        self.num_used += count

    def give(self, count: int) -> None:
        self.num_used -= count
