"""Which prompts are computed, and how a step's token budget is shared.

First come, first served into `max_active` places; the active prompts share every step equally, so a
short prompt behind a long one waits for a share, not for the whole.
"""

from __future__ import annotations

from collections import deque

from ..hostpool.pages import OwnerKind, PageAllocator
from .job import Job, JobState


class PrefillScheduler:
    """Step thread only.

    Args:
        pages: allocator of the device pool.
        page_size: tokens a page.
        chunk_tokens: budget of a step.
        max_active: prompts offered or computing at a time.
    """

    def __init__(
        self, pages: PageAllocator, *, page_size: int, chunk_tokens: int, max_active: int
    ) -> None:
        self._pages = pages
        self._page_size = page_size
        self._chunk_tokens = chunk_tokens
        self._max_active = max_active
        self.queue: deque[Job] = deque()
        self.active: list[Job] = []

    def activate(self) -> list[Job]:
        """Gives pages to the head of the queue while they and a place are free; OFFERED now."""
        activated = []
        while self.queue and len(self.active) < self._max_active:
            job = self.queue[0]
            num_pages = -(-job.num_tokens // self._page_size)
            lease = self._pages.try_acquire(num_pages, OwnerKind.REQUEST)
            if lease is None:
                break
            self.queue.popleft()
            job.lease = lease
            job.advance(JobState.OFFERED)
            self.active.append(job)
            activated.append(job)
        return activated

    def shares(self) -> list[tuple[Job, int]]:
        """Tokens each COMPUTING job gets in the next step; what one leaves goes to the others."""
        jobs = [job for job in self.active if job.state is JobState.COMPUTING]
        budget, shares = self._chunk_tokens, []
        for num_behind, job in zip(range(len(jobs), 0, -1), _shortest_first(jobs), strict=True):
            count = min(job.num_left, max(1, budget // num_behind))
            if budget <= 0:
                break
            shares.append((job, count))
            budget -= count
        return shares

    def retire(self, job: Job) -> None:
        """The job needs no more computing (or never did)."""
        if job in self.active:
            self.active.remove(job)
        if job in self.queue:
            self.queue.remove(job)


def _shortest_first(jobs: list[Job]) -> list[Job]:
    """Those with least left first, so that what they do not use is shared by the rest."""
    return sorted(jobs, key=lambda job: job.num_left)
