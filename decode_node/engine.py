"""The decode engine: admits, decodes, answers; one step a call, on the step thread.

It knows nothing of how a prompt's KV comes: the receiver (decode_node/receiver.py, over the wire)
and the unified node (deploy/unified.py, from a local prefill) call `try_admit`, then `make_ready` or
`fail`. Tokens go to the front by `send`; each request ends with exactly one Finish.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch

from ..common.clock import Clock
from ..common.errors import InvariantError, RequestError, TidepoolError
from ..common.wire import (
    UNKNOWN_ATTEMPT,
    AnyMessage,
    Cancel,
    Finish,
    FinishReason,
    Load,
    OutputToken,
    Resume,
    Sampling,
    Tokens,
)
from ..model.model import Model
from ..model.output import has_stopped, no_token_error
from ..transfer.fronts import FrontGone
from .coordinator import HiSparseCoordinator
from .flight import Flight, FlownStep
from .journal import NoJournal, SequenceLog
from .scheduler import SeatScheduler
from .sequence import RequestKey, Sequence, SequenceState
from .step_runner import StepRunner
from .step_times import ANSWER, LAUNCH, OTHERS, SEATS, StepTimes

MAX_FINISHED_RECORDS = 1024
"""Ended requests whose tokens can still be asked for again."""

log = logging.getLogger(__name__)

Send = Callable[[str, AnyMessage], None]
"""send(node_id, message): to the live incarnation of that node, or dropped."""


class DecodeEngine:
    """Step thread only, but for the constructor.

    Args:
        model: weights; shared with a prefill engine in the unified role.
        coordinator: pools, seats, hot cache, ledger.
        runner: runs the steps.
        send: delivers a message to a front.
        park_after_tokens: see SeatScheduler.
        is_overlapped: a step's results are read when the next one has been launched, so that
            scheduling and sending run while the device computes; else at once.
        journal: hears of every sequence what the node's next process needs to go on with it.
    """

    def __init__(
        self,
        model: Model,
        coordinator: HiSparseCoordinator,
        runner: StepRunner,
        *,
        send: Send,
        clock: Clock,
        park_after_tokens: int,
        is_overlapped: bool,
        journal: SequenceLog | None = None,
    ) -> None:
        self._model = model
        self._coordinator = coordinator
        self._journal: SequenceLog = journal or NoJournal()
        coordinator.backup.on_durable = self._journal.durable
        self._flight = Flight(coordinator, runner)
        self._is_overlapped = is_overlapped
        self._ending: set[RequestKey] = set()
        self._send = send
        self._clock = clock
        self._scheduler = SeatScheduler(
            coordinator, park_after_tokens=park_after_tokens, settle=self._settle
        )
        self._sequences: dict[RequestKey, Sequence] = {}
        self._finished: OrderedDict[RequestKey, tuple[list[OutputToken], Finish]] = OrderedDict()
        self.on_release: Callable[[Sequence], None] = lambda _: None
        self.extra_stats: Callable[[], dict[str, float]] = dict
        self.kept_stats: Callable[[], dict[str, float]] = dict
        self.times = StepTimes()
        self.num_steps = 0
        self.num_tokens = 0
        self.num_failed = 0
        self.host_pages_peak = 0
        self.is_draining = False

    @property
    def coordinator(self) -> HiSparseCoordinator:
        return self._coordinator

    # Admission, called by the receiver or the unified node

    def try_admit(
        self, key: RequestKey, front_id: str, num_prompt_tokens: int, sampling: Sampling
    ) -> Sequence | None:
        """Reserves everything the request can need; None if it does not fit now.

        Raises RequestError if it can never fit, or if this attempt has been seen before.
        """
        self._coordinator.admission.check_can_ever_fit(num_prompt_tokens, sampling.max_tokens)
        if self.is_draining:
            raise RequestError("the decode node is draining", status=503, code="draining")
        if key in self._sequences or key in self._finished:
            raise RequestError(f"{key} has run here before", status=409, code="duplicate_attempt")
        reserved = self._coordinator.admission.try_reserve(num_prompt_tokens, sampling.max_tokens)
        if reserved is None:
            return None
        sequence = Sequence(
            key=key,
            front_id=front_id,
            sampling=sampling,
            num_prompt_tokens=num_prompt_tokens,
            host_lease=reserved.host,
            index_lease=reserved.index,
            arrival_s=self._clock.now(),
        )
        self._sequences[key] = sequence
        host = self._coordinator.host.pages
        self.host_pages_peak = max(self.host_pages_peak, host.num_total - host.num_free)
        return sequence

    def find(self, key: RequestKey) -> Sequence | None:
        return self._sequences.get(key)

    def make_ready(
        self,
        sequence: Sequence,
        first_token: OutputToken,
        warm_positions: tuple[bytes, ...],
    ) -> None:
        """The prompt's KV is complete and verified: the first token goes out, decoding may begin."""
        sequence.warm_positions = warm_positions
        if sequence.state is not SequenceState.READY:
            self._coordinator.admit_request_direct(sequence)
        self._journal.begin(sequence)
        self._scheduler.add(sequence)
        self._append(sequence, first_token)

    def adopt(self, sequence: Sequence) -> None:
        """Goes on with a READY sequence of the process before (reattach.py).

        Its tokens are known, its newest rows may not be: steps feed what is known first. It may
        have ended without having noted it.
        """
        self._sequences[sequence.key] = sequence
        self._scheduler.add(sequence)
        self._finish_if_complete(sequence)

    def adopt_finished(self, key: RequestKey, output: list[OutputToken], finish: Finish) -> None:
        """Remembers a request that ended in the process before."""
        self._finished[key] = (output, finish)

    def fail(self, key: RequestKey, error: RequestError, *, can_retry: bool) -> None:
        """Ends a request with an error its client sees (or, if `can_retry`, with a new attempt)."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return
        self.num_failed += 1
        finish = _error(key, error, len(sequence.output), can_retry=can_retry)
        self._end(sequence, SequenceState.FAILED, finish)

    def hand_over(self, error: RequestError) -> None:
        """Ends every request so that its front runs it on elsewhere: the node stops."""
        for key in list(self._sequences):
            self.fail(key, error, can_retry=True)

    # common.step_loop.Engine

    def handle(self, event: object) -> bool:
        match event:
            case Cancel():
                self.cancel((event.request_id, event.attempt))
            case Resume():
                self._resume(event)
            case FrontGone():
                for key, sequence in list(self._sequences.items()):
                    if sequence.front_id == event.front_id:
                        self.cancel(key)
            case _:
                return False
        return True

    def step(self) -> bool:
        """Seats who can be seated and starts one step of every running sequence; reads the last."""
        self.times.lap(OTHERS)
        self._coordinator.backup.poll()
        self._scheduler.assign()
        batch = self._steppable()
        self.times.lap(SEATS)
        if batch:
            self._guarded(batch, partial(self._launch, batch))
            self.times.lap(LAUNCH)
        keep = 1 if batch and self._is_overlapped else 0
        has_read = len(self._flight) > keep
        self._settle(keep)
        return bool(batch) or has_read

    # Reading

    def load(self) -> Load:
        """What the front routes by."""
        host = self._coordinator.host.pages
        num_parked = sum(
            sequence.state is SequenceState.PARKED for sequence in list(self._scheduler.waiting)
        )
        return Load(
            num_queued=len(self._sequences) - len(self._scheduler.running) - num_parked,
            num_running=len(self._scheduler.running),
            num_parked=num_parked,
            free_pages=host.num_free,
            total_pages=host.num_total,
            quarantined_pages=host.num_quarantined,
            is_draining=self.is_draining,
        )

    def stats(self) -> dict[str, float]:
        """Counters and gauges for /metrics; names without the tidepool_ prefix."""
        coordinator, cache = self._coordinator, self._coordinator.cache.stats
        return {
            "host_pages_total": coordinator.host.pages.num_total,
            "host_pages_free": coordinator.host.pages.num_free,
            "host_pages_peak": self.host_pages_peak,
            "host_pages_quarantined": coordinator.host.pages.num_quarantined,
            "index_pages_total": coordinator.index.pages.num_total,
            "index_pages_free": coordinator.index.pages.num_free,
            "seats_total": coordinator.seats.num_seats,
            "seats_free": coordinator.seats.num_free,
            "hot_rows_per_seat": coordinator.cache.hot_rows,
            "hot_hits": cache.hits,
            "hot_misses": cache.misses,
            "rows_swapped_in": cache.rows_swapped_in,
            "bytes_swapped_in": cache.bytes_swapped_in,
            "decode_steps": self.num_steps,
            "output_tokens": self.num_tokens,
            "parks": self._scheduler.num_parks,
            "failed_requests": self.num_failed,
            "steps_in_flight": len(self._flight),
            **self.times.stats(),
            **self.extra_stats(),
            **self.kept_stats(),
        }

    def check_invariants(self) -> None:
        """Raises InvariantError if ledger, seats and tables do not agree."""
        coordinator = self._coordinator
        for pool in (coordinator.host.pages, coordinator.index.pages, coordinator.seats):
            pool.check_invariants()
        coordinator.cache.check_invariants()

    @property
    def is_idle(self) -> bool:
        return not self._sequences and not self._flight and not self._ending

    # One step

    def _steppable(self) -> list[Sequence]:
        """The sequences of the next step. Nobody's step waits for another's seat to be filled."""
        coordinator = self._coordinator
        running = [sequence for sequence in self._scheduler.running if sequence.can_step]
        filled = [sequence for sequence in running if coordinator.is_filled(sequence)]
        if filled or self._flight:
            return filled
        for sequence in running:
            coordinator.await_fill(sequence)
        return running

    def _launch(self, batch: list[Sequence]) -> None:
        self._flight.launch(batch)
        self.num_steps += 1

    def _settle(self, keep: int = 0) -> None:
        """Reads the results of all but the `keep` newest steps in flight."""
        while len(self._flight) > keep:
            step = self._flight.pop()
            self._guarded(step.sequences, partial(self._read, step))

    def _read(self, step: FlownStep) -> None:
        """Appends the step's tokens; what a sequence did after its end is dropped."""
        results = self._flight.read(step)
        goes_on = any(sequence.can_step or sequence.in_flight for sequence in step.sequences)
        self.times.step_read(len(results), goes_on=goes_on)
        for result in results:
            sequence = result.sequence
            if sequence.has_ended:
                self._release_ended(sequence)
            elif result.fault:
                self._fault(sequence, result.fault)
            elif result.token.token_id < 0:
                self.fail(sequence.key, no_token_error(), can_retry=True)
            elif result.index == len(sequence.output):
                sequence.tokens_since_seated += 1
                self._append(sequence, result.token)
        self.times.lap(ANSWER)

    def _guarded(self, batch: list[Sequence], run: Callable[[], None]) -> None:
        """A step that raises fails its sequences; the node goes on, unless its device is lost."""
        try:
            run()
        except InvariantError:
            raise
        except (TidepoolError, RuntimeError) as error:
            self._fail_batch(batch, error)
            if isinstance(error, torch.AcceleratorError):
                raise

    def _append(self, sequence: Sequence, token: OutputToken) -> None:
        index = len(sequence.output)
        sequence.output.append(token)
        self.num_tokens += 1
        self._journal.append(sequence, token)  # before anybody can have seen it
        request_id, attempt = sequence.key
        self._send(sequence.front_id, Tokens(request_id, attempt, index, (token,)))
        self._finish_if_complete(sequence)

    def _finish_if_complete(self, sequence: Sequence) -> None:
        sampling, token = sequence.sampling, sequence.output[-1]
        if has_stopped(token, sampling, len(sequence.output), self._model.config.eos_token_ids):
            self._finish(sequence, "stop")
        elif len(sequence.output) >= sampling.max_tokens:
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        request_id, attempt = sequence.key
        finish = Finish(request_id, attempt, reason, num_tokens=len(sequence.output))
        self._end(sequence, SequenceState.FINISHED, finish)

    def cancel(self, key: RequestKey, *, is_told: bool = False) -> None:
        """Ends a request nobody wants any more; unknown keys are ignored.

        `is_told`: the front has heard of its end from elsewhere, and hears nothing from here.
        """
        sequence = self._sequences.get(key)
        if sequence is not None:
            finish = Finish(key[0], key[1], "cancelled", num_tokens=len(sequence.output))
            self._end(sequence, SequenceState.FINISHED, finish, is_told=is_told)

    def _end(
        self, sequence: Sequence, state: SequenceState, finish: Finish, *, is_told: bool = False
    ) -> None:
        self._journal.end(sequence, finish)  # before its pages can belong to another
        self._scheduler.remove(sequence)
        del self._sequences[sequence.key]
        sequence.advance(state)
        self._finished[sequence.key] = (sequence.output, finish)
        while len(self._finished) > MAX_FINISHED_RECORDS:
            self._finished.popitem(last=False)
        self._ending.add(sequence.key)
        self._release_ended(sequence)
        if not is_told:
            self._send(sequence.front_id, finish)

    def _release_ended(self, sequence: Sequence) -> None:
        """Gives back what an ended sequence holds, once, when no step of it is in flight."""
        if sequence.key in self._ending and not sequence.in_flight:
            self._ending.remove(sequence.key)
            self._coordinator.release_req(sequence)
            self.on_release(sequence)

    def _resume(self, event: Resume) -> None:
        """Sends again what the front missed, or says that there is no such attempt here."""
        key = (event.request_id, event.attempt)
        sequence = self._sequences.get(key)
        finish: Finish | None = None
        if sequence is not None:
            output = sequence.output
        elif key in self._finished:
            output, finish = self._finished[key]
        else:
            gone = RequestError(
                "the decode node does not have this attempt (any more)",
                status=503,
                code=UNKNOWN_ATTEMPT,
            )
            self._send(event.front_id, _error(key, gone, 0, can_retry=True))
            return
        missed = tuple(output[event.next_index :])
        if missed or finish is None:  # nothing missed is an answer too: the attempt is alive
            self._send(event.front_id, Tokens(key[0], key[1], event.next_index, missed))
        if finish is not None:
            self._send(event.front_id, finish)

    def _fault(self, sequence: Sequence, fault: int) -> None:
        error = RequestError(
            f"the hot cache could not resolve this request's rows (fault flags {fault})",
            status=500,
            code="kv_fault",
        )
        log.error("%s: fault flags %d at length %d", sequence.key, fault, sequence.kv_len)
        self.fail(sequence.key, error, can_retry=True)

    def _fail_batch(self, batch: list[Sequence], error: Exception) -> None:
        """A step that raised: its sequences fail, the node goes on with the others."""
        log.error("a decode step of %d sequences failed", len(batch), exc_info=error)
        for sequence in batch:
            if sequence.has_ended:
                self._release_ended(sequence)
                continue
            reason = RequestError(
                f"the decode step failed: {error}", status=500, code="step_failed"
            )
            self.fail(sequence.key, reason, can_retry=True)


def _error(key: RequestKey, error: RequestError, num_tokens: int, *, can_retry: bool) -> Finish:
    return Finish(
        request_id=key[0],
        attempt=key[1],
        reason="error",
        num_tokens=num_tokens,
        status=error.status,
        code=error.code,
        detail=str(error),
        can_retry=can_retry,
    )
