"""The unified role: prefill and decode engines in one process, joined without a wire.

A finished local prefill enters staging (device pages -> host pages) and then decodes like any
other. Both engines and this hand-off run on one step thread. It is the baseline for every
comparison with prefill and decode apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..common.clock import MonotonicClock
from ..common.config import Config
from ..common.errors import RequestError
from ..common.step_loop import Engine, StepLoop
from ..common.wire import OutputToken
from ..decode_node import build as decode_build
from ..decode_node.build import max_context
from ..decode_node.engine import DecodeEngine
from ..decode_node.sequence import Sequence
from ..hostpool.device_pool import DevicePool
from ..model.runtime import load_runtime
from ..prefill_node import build as prefill_build
from ..prefill_node.build import build_pool
from ..prefill_node.handoff import HandoffFailed, HandoffGranted, HandoffReleased
from ..prefill_node.job import Job
from ..transfer.control import ControlLoop
from ..transfer.curve import cluster_keys
from ..transfer.fronts import FrontHandler
from ..transfer.node import Auditor, Node, total_load

OnFatal = Callable[[BaseException], None]


@dataclass(frozen=True, slots=True)
class _Staged:
    """A prompt whose pages are on their way to the host."""

    sequence: Sequence
    first_token: OutputToken
    warm_positions: tuple[bytes, ...]


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
        self._staged: list[_Staged] = []

    # prefill_node.handoff.Handoff

    def offer(self, job: Job) -> None:
        if self._deferred or not self._try_admit(job):
            self._deferred.append(job)

    def pages_ready(self, job: Job, first_page: int, pages: list[int]) -> None:
        """Nothing to do: the whole prompt is staged at commit."""

    def commit(self, job: Job, first_token: OutputToken, warm_positions: tuple[bytes, ...]) -> None:
        sequence = self._decode.find(job.key)
        if sequence is None:
            self._post(HandoffReleased(job.key, is_quarantined=False))
            return
        self._decode.coordinator.admit_request_into_staging(sequence, self._pool, job.pages)
        self._staged.append(_Staged(sequence, first_token, warm_positions))
        self._finish_staged()

    def cancel(self, job: Job, reason: str, *, is_told: bool) -> None:
        if job in self._deferred:
            self._deferred.remove(job)
        self._decode.cancel(job.key, is_told=is_told)
        self._staged = [staged for staged in self._staged if staged.sequence.key != job.key]
        self._post(HandoffReleased(job.key, is_quarantined=False))

    # common.step_loop.Engine

    def handle(self, event: object) -> bool:
        return False

    def step(self) -> bool:
        """Sends on what has been staged; tries deferred prompts again, oldest first."""
        self._finish_staged()
        while self._deferred and self._try_admit(self._deferred[0]):
            self._deferred.pop(0)
        return bool(self._staged)

    def _finish_staged(self) -> None:
        """A prompt whose pages are all on the host decodes; its device pages are free."""
        still_staged = []
        for staged in self._staged:
            sequence = staged.sequence
            if not sequence.has_ended and sequence.durable_len < sequence.num_prompt_tokens:
                still_staged.append(staged)
                continue
            if not sequence.has_ended:
                self._decode.make_ready(sequence, staged.first_token, staged.warm_positions)
            self._post(HandoffReleased(sequence.key, is_quarantined=False))
        self._staged = still_staged

    def _try_admit(self, job: Job) -> bool:
        submit = job.submit
        try:
            sequence = self._decode.try_admit(
                job.key, submit.front_id, job.num_tokens, submit.sampling
            )
        except RequestError as error:
            can_retry = error.status == 503  # the node drains
            self._post(HandoffFailed(job.key, str(error), error.status, error.code, can_retry))
            self._post(HandoffReleased(job.key, is_quarantined=False))
            return True
        if sequence is None:
            return False
        self._post(HandoffGranted(job.key))
        return True


def build_node(config: Config, *, node_id: str, bind_host: str, on_fatal: OnFatal) -> Node:
    """Loads the model once and joins both engines, the hand-off and a control loop."""
    runtime = load_runtime(config)
    clock = MonotonicClock()
    control = ControlLoop(
        node_id,
        "unified",
        time.time_ns(),
        bind_host=bind_host,
        layout_hash=runtime.geometry.layout_hash,
        layout_text=runtime.geometry.layout_text,
        config=config.transfer,
        clock=clock,
        on_fatal=on_fatal,
        keys=cluster_keys(config.cluster),
    )
    pool = build_pool(config, runtime.geometry, runtime.device)
    coordinator = decode_build.build_coordinator(
        config, runtime.model.config, runtime.geometry, runtime.device
    )
    decode = decode_build.build_engine(
        config, runtime.model, coordinator, send=control.send, clock=clock
    )
    engines: list[Engine] = []
    step_loop = StepLoop(f"step-{node_id}", engines, on_fatal)
    handoff = LocalHandoff(decode, pool, step_loop.post)
    prefill = prefill_build.build_engine(
        config, runtime.model, runtime.geometry, pool, handoff=handoff, send=control.send
    )
    both = (prefill, decode)
    engines += [Auditor(both), prefill, handoff, decode]
    fronts = FrontHandler(
        step_loop.post,
        lambda: control.set_load(total_load(both)),
        clock,
        grace_s=config.transfer.front_grace_s,
    )
    context = min(max_context(config, runtime.model.config), prefill.max_prompt_tokens)
    return Node(control, step_loop, [fronts], both, max_context=context)
