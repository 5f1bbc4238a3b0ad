"""The one ledger that answers "does it fit": host pages, index pages and request rows.

Pages for the prompt and for growth to max_tokens are taken at admission, in runs as long as the
pool has: nothing in a step can run out of memory, and rows of one request lie close together. A
seat is not part of it: a sequence without a seat waits or is parked, its pages stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import RequestError
from ..common.wire import PageRun
from ..hostpool.pages import OwnerKind, PageAllocator, PageLease


@dataclass(frozen=True, slots=True)
class Reservation:
    host: PageLease
    index: PageLease


class Admission:
    """Step thread only.

    Args:
        host, index: allocators of the host pool and the index pool.
        page_size: tokens a page, of both.
        max_context: longest sequence, prompt and output tokens.
        max_requests: sequences admitted at a time.
    """

    def __init__(
        self,
        host: PageAllocator,
        index: PageAllocator,
        *,
        page_size: int,
        max_context: int,
        max_requests: int,
    ) -> None:
        self._host = host
        self._index = index
        self._page_size = page_size
        self._max_context = max_context
        self._max_requests = max_requests
        self._num_admitted = 0

    @property
    def num_admitted(self) -> int:
        return self._num_admitted

    def check_can_ever_fit(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raises RequestError (400) with the limit if an empty node could not take it."""
        length = num_prompt_tokens + max_tokens
        pool_tokens = self._page_size * min(self._host.num_total, self._index.num_total)
        limit = min(self._max_context, pool_tokens)
        if num_prompt_tokens < 1 or max_tokens < 1:
            raise RequestError("a request needs at least one prompt token and one output token")
        if length > limit:
            raise RequestError(
                f"{num_prompt_tokens} prompt tokens and {max_tokens} output tokens are {length}, "
                f"and the decode node takes sequences of at most {limit} tokens",
                code="context_length_exceeded",
            )

    def try_reserve(self, num_prompt_tokens: int, max_tokens: int) -> Reservation | None:
        """Takes everything the request can ever need; None if it does not fit now."""
        if self._num_admitted >= self._max_requests:
            return None
        num_pages = self._num_pages(num_prompt_tokens, max_tokens)
        host = self._host.try_acquire(num_pages, OwnerKind.REQUEST)
        if host is None:
            return None
        index = self._index.try_acquire(num_pages, OwnerKind.REQUEST)
        if index is None:
            host.release(OwnerKind.REQUEST)
            return None
        self._num_admitted += 1
        return Reservation(host, index)

    def try_take(
        self,
        host_runs: tuple[PageRun, ...],
        index_runs: tuple[PageRun, ...],
        num_prompt_tokens: int,
        max_tokens: int,
    ) -> Reservation | None:
        """As try_reserve, but just these pages; None if they are not what it needs, or not free."""
        num_pages = self._num_pages(num_prompt_tokens, max_tokens)
        if self._num_admitted >= self._max_requests:
            return None
        if any(sum(run.count for run in runs) != num_pages for runs in (host_runs, index_runs)):
            return None
        host = self._host.try_acquire_exactly(host_runs, OwnerKind.REQUEST)
        if host is None:
            return None
        index = self._index.try_acquire_exactly(index_runs, OwnerKind.REQUEST)
        if index is None:
            host.release(OwnerKind.REQUEST)
            return None
        self._num_admitted += 1
        return Reservation(host, index)

    def release(self, host: PageLease, index: PageLease) -> None:
        """Gives up the request's own hold; pages a remote writer may still reach stay held."""
        host.release(OwnerKind.REQUEST)
        index.release(OwnerKind.REQUEST)
        self._num_admitted -= 1

    def _num_pages(self, num_prompt_tokens: int, max_tokens: int) -> int:
        # The last output token is never fed back, so it needs no row.
        return -(-(num_prompt_tokens + max_tokens - 1) // self._page_size)
