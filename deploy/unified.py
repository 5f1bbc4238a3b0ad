"""The unified role: prefill and decode engines in one process, joined without a wire.

A finished local prefill enters staging (device pages -> host pages) and then decodes like any
other. Both engines and this hand-off run on one step thread. It is the baseline for every
comparison with prefill and decode apart.
"""

from __future__ import annotations

from collections.abc import Callable

from ..common.errors import RequestError
from ..common.wire import OutputToken
from ..decode_node.engine import DecodeEngine
from ..hostpool.device_pool import DevicePool
from ..prefill_node.handoff import HandoffFailed, HandoffGranted, HandoffReleased
from ..prefill_node.job import Job


class LocalHandoff:
    """Implements prefill_node.handoff.Handoff; also an engine of the step loop, for its retries.

    Args:
        decode: the engine that takes the prompts.
        pool: the prefill engine's device pool.
        post: puts an event into the step loop's inbox.
    """

    def __init__(
        self, decode: DecodeEngine, pool: DevicePool, post: Callable[[object], None]
    ) -> None:
        self._decode = decode
        self._pool = pool
        self._post = post
        self._deferred: list[Job] = []

    # prefill_node.handoff.Handoff

    def offer(self, job: Job) -> None:
        if self._deferred or not self._try_admit(job):
            self._deferred.append(job)

    def pages_ready(self, job: Job, first_page: int, pages: list[int]) -> None:
        """Nothing to do: the whole prompt is staged at commit."""

    def commit(
        self, job: Job, first_token: OutputToken, warm_positions: tuple[tuple[int, ...], ...]
    ) -> None:
        sequence = self._decode.find(job.key)
        if sequence is not None:
            self._decode.coordinator.admit_request_into_staging(sequence, self._pool, job.pages)
            self._decode.make_ready(sequence, first_token, warm_positions)
        self._post(HandoffReleased(job.key, is_quarantined=False))

    def cancel(self, job: Job, reason: str) -> None:
        if job in self._deferred:
            self._deferred.remove(job)
        self._decode.cancel(job.key)
        self._post(HandoffReleased(job.key, is_quarantined=False))

    # common.step_loop.Engine

    def handle(self, event: object) -> bool:
        return False

    def step(self) -> bool:
        """Tries deferred prompts again, oldest first; a prompt never overtakes another."""
        while self._deferred and self._try_admit(self._deferred[0]):
            self._deferred.pop(0)
        return False

    def _try_admit(self, job: Job) -> bool:
        submit = job.submit
        try:
            sequence = self._decode.try_admit(
                job.key, submit.front_id, job.num_tokens, submit.sampling
            )
        except RequestError as error:
            self._post(HandoffFailed(job.key, str(error), error.status, error.code, False))
            self._post(HandoffReleased(job.key, is_quarantined=False))
            return True
        if sequence is None:
            return False
        self._post(HandoffGranted(job.key))
        return True
