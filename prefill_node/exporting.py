"""The hand-off over the wire: the prefill engine's commands to the exporter, its answers back.

Runs on the step thread, beside the engine in the step loop; the exporter's own state lives on the
I/O thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..common.wire import OutputToken
from ..hostpool.mirror import HostMirror
from ..transfer.events import (
    ExportDone,
    ExportFailed,
    ExportGranted,
    ExportRefused,
    ExportReleased,
    ExportRequest,
    ExportUnquarantined,
)
from ..transfer.exporter import Exporter
from .engine import PrefillEngine
from .handoff import HandoffFailed, HandoffGranted, HandoffReleased, HandoffUnquarantined
from .job import Job


class ComputedPages:
    """Implements transfer.jobs.PageSource: pages that are final once the step's stream is here.

    Made on the step thread behind the chunk that computes them; asked on the mover's.
    """

    def __init__(self, mirrors: Sequence[HostMirror]) -> None:
        self._mirrors = mirrors
        self._computed: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._computed.record()

    def stage(self, pages: Sequence[int], layers: Mapping[str, range]) -> Callable[[], bool]:
        ends = [
            mirror.to_host(pages, self._computed, layers[mirror.name])
            for mirror in self._mirrors
            if mirror.name in layers
        ]
        return lambda: all(has_ended() for has_ended in ends)

    def settle(self) -> Callable[[], bool]:
        has_happened: Callable[[], bool] = self._computed.query
        return has_happened


class RemoteHandoff:
    """Implements handoff.Handoff over an Exporter, and is the step loop's engine for its events.

    `mirrors`: of the device pool; pages are copied there, or straight to a peer's memory, once the
    step that computes them has ended on the device. Nothing here waits for it.
    """

    def __init__(self, exporter: Exporter, mirrors: Iterable[HostMirror]) -> None:
        self._exporter = exporter
        self._mirrors = tuple(mirrors)
        self._is_on_device = not all(mirror.is_device for mirror in self._mirrors)
        self._engine: PrefillEngine | None = None

    def serve(self, engine: PrefillEngine) -> None:
        """Tells whom the answers are for; once, before the loop starts."""
        self._engine = engine

    # handoff.Handoff

    def offer(self, job: Job) -> None:
        submit = job.submit
        self._exporter.offer(
            ExportRequest(
                request_id=submit.request_id,
                attempt=submit.attempt,
                num_prompt_tokens=job.num_tokens,
                sampling=submit.sampling,
                front_id=submit.front_id,
                decode_id=submit.decode_id,
                decode_address=submit.decode_address,
            )
        )

    def pages_ready(self, job: Job, first_page: int, pages: list[int]) -> None:
        source = ComputedPages(self._mirrors) if self._is_on_device else None
        self._exporter.pages_ready(job.key, first_page, pages, source)

    def commit(self, job: Job, first_token: OutputToken, warm_positions: tuple[bytes, ...]) -> None:
        self._exporter.commit(job.key, first_token, warm_positions)

    def cancel(self, job: Job, reason: str, *, is_told: bool) -> None:
        self._exporter.cancel(job.key, reason)

    # common.step_loop.Engine

    def handle(self, event: object) -> bool:
        engine = self._engine
        if engine is None:
            return False
        match event:
            case ExportGranted():
                return engine.handle(HandoffGranted(event.key))
            case ExportRefused():
                failed = HandoffFailed(
                    event.key, event.reason, event.status, event.code, event.status == 503
                )
                return engine.handle(failed)
            case ExportFailed():
                return engine.handle(
                    HandoffFailed(event.key, event.reason, 503, "handoff_failed", True)
                )
            case ExportReleased():
                return engine.handle(HandoffReleased(event.key, event.is_quarantined))
            case ExportUnquarantined():
                return engine.handle(HandoffUnquarantined(event.key))
            case ExportDone():
                return True
        return False

    def step(self) -> bool:
        return False
