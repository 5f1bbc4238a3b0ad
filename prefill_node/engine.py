"""The prefill engine: queues prompts, computes them in chunks, hands their pages over.

One step a call, on the step thread. A chunk's full pages go to the hand-off as soon as the chunk is
computed, so that they travel while the next chunk computes. The prompt's last, partial page goes
with the last chunk, then the first token.
"""

from __future__ import annotations

import logging

import torch

from ..common.errors import InvariantError, RequestError, TidepoolError
from ..common.layouts import KvGeometry
from ..common.wire import Cancel, Finish, Load, Submit
from ..hostpool.device_pool import DevicePool
from ..hostpool.pages import OwnerKind, PageLease
from ..model.model import Model
from ..model.output import OutputRow, choose_tokens, no_token_error
from ..transfer.fronts import FrontGone
from .context import PrefillContext, Segment
from .handoff import (
    Handoff,
    HandoffFailed,
    HandoffGranted,
    HandoffReleased,
    HandoffUnquarantined,
    Send,
)
from .job import Job, JobState, RequestKey
from .scheduler import PrefillScheduler

log = logging.getLogger(__name__)


class PrefillEngine:
    """Step thread only, but for the constructor.

    Args:
        model: weights; shared with a decode engine in the unified role.
        pool: paged device KV of prompts being computed or sent.
        handoff: takes the KV.
        send: delivers a message to a front.
        max_queued: prompts waiting; one more is refused with 429.
    """

    def __init__(
        self,
        model: Model,
        geometry: KvGeometry,
        pool: DevicePool,
        scheduler: PrefillScheduler,
        *,
        handoff: Handoff,
        send: Send,
        max_queued: int,
    ) -> None:
        self._model = model
        self._geometry = geometry
        self._pool = pool
        self._scheduler = scheduler
        self._handoff = handoff
        self._send = send
        self._max_queued = max_queued
        self._jobs: dict[RequestKey, Job] = {}
        self._quarantined: dict[RequestKey, PageLease] = {}
        self.num_tokens = 0
        self.num_steps = 0
        self.num_failed = 0
        self.is_draining = False

    # common.step_loop.Engine

    def handle(self, event: object) -> bool:
        match event:
            case Submit():
                self._submit(event)
            case Cancel():
                return self._cancel((event.request_id, event.attempt), event.reason)
            case FrontGone():
                for key, job in list(self._jobs.items()):
                    if job.submit.front_id == event.front_id:
                        self._cancel(key, "the front is gone")
                return False
            case HandoffGranted():
                self._granted(event)
            case HandoffFailed():
                self._failed(event)
            case HandoffReleased():
                self._released(event)
            case HandoffUnquarantined():
                self._quarantined.pop(event.key).release(OwnerKind.REMOTE_WRITER)
            case _:
                return False
        return True

    def step(self) -> bool:
        """Offers what can be offered and computes one chunk of each active prompt."""
        activated = self._scheduler.activate()
        for job in activated:
            self._handoff.offer(job)
        shares = self._scheduler.shares()
        if not shares:
            return bool(activated)
        try:
            self._compute(shares)
        except InvariantError:
            raise
        except (TidepoolError, RuntimeError) as error:
            self._fail_batch([job for job, _ in shares], error)
        return True

    # Reading

    def load(self) -> Load:
        """What the front routes by."""
        return Load(
            num_queued=len(self._scheduler.queue),
            num_running=len(self._scheduler.active),
            free_pages=self._pool.pages.num_free,
            total_pages=self._pool.pages.num_total,
            quarantined_pages=self._pool.pages.num_quarantined,
            is_draining=self.is_draining,
        )

    def stats(self) -> dict[str, float]:
        """Counters and gauges for /metrics; names without the tidepool_ prefix."""
        return {
            "device_pages_total": self._pool.pages.num_total,
            "device_pages_free": self._pool.pages.num_free,
            "device_pages_quarantined": self._pool.pages.num_quarantined,
            "prefill_queued": len(self._scheduler.queue),
            "prefill_active": len(self._scheduler.active),
            "prefill_tokens": self.num_tokens,
            "prefill_steps": self.num_steps,
            "prefill_failed": self.num_failed,
        }

    def check_invariants(self) -> None:
        self._pool.pages.check_invariants()

    @property
    def is_idle(self) -> bool:
        return not self._jobs

    @property
    def max_prompt_tokens(self) -> int:
        return self._pool.pages.num_total * self._geometry.page_size

    # Events

    def _submit(self, submit: Submit) -> None:
        job = Job(submit)
        if job.key in self._jobs:
            return
        fault = self._refusal(job)
        if fault is not None:
            self._tell_front(job, fault, can_retry=fault.status in (429, 503))
            return
        self._jobs[job.key] = job
        self._scheduler.queue.append(job)

    def _refusal(self, job: Job) -> RequestError | None:
        vocab_size = self._model.config.vocab_size
        if self.is_draining:
            return RequestError("the node is draining", status=503, code="draining")
        if len(self._scheduler.queue) >= self._max_queued:
            return RequestError("the prefill queue is full", status=429, code="queue_full")
        if not 1 <= job.num_tokens <= self.max_prompt_tokens:
            return RequestError(
                f"the prompt has {job.num_tokens} tokens; this node takes 1 to "
                f"{self.max_prompt_tokens}",
                code="context_length_exceeded",
            )
        if not all(0 <= token < vocab_size for token in job.submit.prompt_token_ids):
            return RequestError(f"token ids must be from 0 to {vocab_size - 1}")
        return None

    def _cancel(self, key: RequestKey, reason: str, *, is_told: bool = False) -> bool:
        """False if the key is not here, so that a decode engine beside this one can look."""
        job = self._jobs.get(key)
        if job is None:
            return False
        if job.state is JobState.QUEUED:
            self._forget(job)
        elif job.state is not JobState.CANCELLED:
            job.advance(JobState.CANCELLED)
            self._scheduler.retire(job)
            self._handoff.cancel(job, reason, is_told=is_told)
        return True

    def _granted(self, event: HandoffGranted) -> None:
        job = self._jobs.get(event.key)
        if job is not None and job.state is JobState.OFFERED:
            job.advance(JobState.COMPUTING)

    def _failed(self, event: HandoffFailed) -> None:
        job = self._jobs.get(event.key)
        if job is None or job.state is JobState.CANCELLED:
            return
        job.advance(JobState.CANCELLED)
        self._scheduler.retire(job)
        error = RequestError(event.reason, status=event.status, code=event.code)
        self._tell_front(job, error, can_retry=event.can_retry)

    def _released(self, event: HandoffReleased) -> None:
        job = self._jobs.get(event.key)
        if job is None:
            return
        if event.is_quarantined and job.lease is not None:
            job.lease.hold(OwnerKind.REMOTE_WRITER)
            job.lease.quarantine()
            self._quarantined[job.key] = job.lease
        self._forget(job)

    def _forget(self, job: Job) -> None:
        """The job is over; its pages are free unless quarantined."""
        job.advance(JobState.RELEASED)
        self._scheduler.retire(job)
        del self._jobs[job.key]
        if job.lease is not None:
            job.lease.release(OwnerKind.REQUEST)

    def hand_over(self, error: RequestError) -> None:
        """Ends every request so that its front runs it on elsewhere: the node stops."""
        for job in list(self._jobs.values()):
            if job.state is not JobState.CANCELLED:
                self._tell_front(job, error, can_retry=True)
                self._cancel(job.key, str(error), is_told=True)

    # One step

    def _compute(self, shares: list[tuple[Job, int]]) -> None:
        device = self._pool.rows.device
        segments = [Segment(job.pages, job.computed_len, count) for job, count in shares]
        token_ids = [
            token
            for job, count in shares
            for token in job.submit.prompt_token_ids[job.computed_len : job.computed_len + count]
        ]
        positions = [
            position for segment in segments for position in range(segment.first, segment.end)
        ]
        config = self._model.config
        context = PrefillContext(self._pool, self._geometry, segments, config.index_topk)
        hidden_TD = self._model.forward(
            torch.tensor(token_ids, device=device), torch.tensor(positions, device=device), context
        )
        self.num_steps += 1
        self.num_tokens += len(token_ids)
        token = 0
        for number, (job, count) in enumerate(shares):
            token += count
            job.computed_len += count
            self._send_pages(job)
            if job.num_left == 0:
                self._commit(job, hidden_TD[token - 1 : token], context.last_positions[number])

    def _send_pages(self, job: Job) -> None:
        """Hands over the pages that are final now."""
        if job.num_left == 0:
            num_final = len(job.pages)
        else:
            num_final = job.computed_len // self._geometry.page_size
        if num_final > job.sent_pages:
            first = job.sent_pages
            job.sent_pages = num_final
            self._handoff.pages_ready(job, first, job.pages[first:num_final])

    def _commit(
        self, job: Job, hidden_1D: torch.Tensor, last_positions: list[torch.Tensor]
    ) -> None:
        row = OutputRow(job.submit.sampling, job.num_tokens, 0)
        eos = self._model.config.eos_token_ids
        (first_token,) = choose_tokens(self._model.logits(hidden_1D), [row], eos)
        if first_token.token_id < 0:
            self._fail_batch([job], no_token_error())
            return
        warm_GK = torch.stack(last_positions).to(torch.int32).cpu().numpy()
        warm = tuple(row_K[row_K >= 0].tobytes() for row_K in warm_GK)
        job.advance(JobState.SENT)
        self._scheduler.retire(job)
        self._handoff.commit(job, first_token, warm)

    def _fail_batch(self, jobs: list[Job], error: Exception) -> None:
        """A step that raised: its prompts fail, the node goes on with the others."""
        log.error("a prefill step of %d prompts failed", len(jobs), exc_info=error)
        for job in jobs:
            reason = RequestError(
                f"the prefill step failed: {error}", status=500, code="step_failed"
            )
            self._tell_front(job, reason, can_retry=True)
            self._cancel(job.key, str(reason), is_told=True)

    def _tell_front(self, job: Job, error: RequestError, *, can_retry: bool) -> None:
        self.num_failed += 1
        request_id, attempt = job.key
        finish = Finish(
            request_id=request_id,
            attempt=attempt,
            reason="error",
            num_tokens=0,
            status=error.status,
            code=error.code,
            detail=str(error),
            can_retry=can_retry,
        )
        self._send(job.submit.front_id, finish)
