"""The front without HTTP: prepares calls, runs their requests, yields what comes.

Runs on one asyncio loop; tokenizing runs on a small thread pool, so the loop never waits for it.
A call holds a slot from its first byte to its last; every call ends, because the ticker bounds
every wait of its requests (request.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...common.clock import Clock, MonotonicClock
from ...common.config import Config
from ...common.errors import RequestError
from .attempt import Bounds
from .call_builder import CallBuilder
from .chat import ChatRenderer
from .choice import Call, Choice, ChoiceDelta
from .completions import CompletionRenderer
from .dispatch import Dispatcher, Handover
from .metrics import FrontMetrics
from .nodes import NodeInfo
from .openai_requests import ChatBody, CompletionBody
from .ports import Control, ModelLimits, Tokenizer
from .router import context_limit, missing_roles
from .slots import Slots

TICK_S = 0.1
KEEP_ALIVE_S = 10.0
"""Longest silence of `events`; a stream then shows a sign of life."""
TOKENIZER_THREADS = 2

_LOGGER = logging.getLogger("tidepool.front")
_T = TypeVar("_T")


class FrontService:
    """Serves calls of one model over the nodes it is told of with `update_nodes`."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        model: ModelLimits,
        control: Control,
        *,
        front_id: str = "front-0",
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.model = model
        self.front_id = front_id
        self.metrics = FrontMetrics()
        self.slots = Slots(config.front.max_requests)
        self.created = int(time.time())
        self._clock = clock = clock or MonotonicClock()
        self._control = control
        self._dispatcher = Dispatcher(control, self._clock, self.metrics)
        self.nodes = self._dispatcher.nodes
        self._builder = CallBuilder(
            tokenizer, model, self.nodes, front_id=front_id, bounds=Bounds.of(config), clock=clock
        )
        self.metrics.watch_nodes(lambda: self.nodes)
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the control plane and the ticker on the running loop."""
        self._control.start(Handover(asyncio.get_running_loop(), self._dispatcher))
        self._ticker = asyncio.create_task(self._tick())

    async def drain(self, timeout_s: float, is_hurried: Callable[[], bool] = lambda: False) -> bool:
        """Takes no new calls and waits for the running ones; returns whether all ended."""
        self.slots.close()
        deadline_s = self._clock.now() + timeout_s
        while self.slots.num_used and self._clock.now() < deadline_s and not is_hurried():
            await asyncio.sleep(0.05)
        return self.slots.num_used == 0

    async def stop(self) -> None:
        """Ends what still runs, then the control plane. May be called twice."""
        self.slots.close()
        self._dispatcher.fail_all(_stopping())
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        await asyncio.to_thread(self._control.stop, 5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def update_nodes(self, infos: list[NodeInfo]) -> None:
        """Takes the membership poller's list; on the loop."""
        self._dispatcher.update_nodes(infos)

    @property
    def missing_roles(self) -> list[str]:
        return missing_roles(self.nodes)

    @property
    def num_waiting(self) -> int:
        return self._dispatcher.num_waiting

    @property
    def num_live(self) -> int:
        return self._dispatcher.num_live

    @property
    def context_limit(self) -> int:
        """Longest sequence that can be served, in tokens."""
        return context_limit(self.nodes, self.model.max_context)

    def render_metrics(self) -> bytes:
        self.metrics.in_flight.set(self.slots.num_used)
        self.metrics.waiting.set(self.num_waiting)
        return self.metrics.render()

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Runs slow work of a call off the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def prepare_completion(self, body: CompletionBody) -> CompletionRenderer:
        """Checks and tokenizes; RequestError says what the client must change."""
        self._builder.check_model(body.model)
        prompts = await self.in_thread(lambda: self._builder.encode(body.prompt))
        call = self._builder.completion(body, prompts)
        self.metrics.prompt_tokens.inc(call.num_prompt_tokens)
        return CompletionRenderer(call, self.tokenizer)

    async def prepare_chat(self, body: ChatBody) -> ChatRenderer:
        """Like prepare_completion, through the model's chat template."""
        self._builder.check_model(body.model)
        prompt = await self.in_thread(lambda: self._builder.render(body))
        call = self._builder.chat(body, prompt)
        self.metrics.prompt_tokens.inc(call.num_prompt_tokens)
        return ChatRenderer(call, self.tokenizer)

    async def events(self, call: Call) -> AsyncGenerator[list[ChoiceDelta], None]:
        """Runs the call; yields what is new, or [] after KEEP_ALIVE_S of silence.

        Raises the RequestError of the first choice that fails. However it ends, closing included,
        nothing of the call runs on behind it.
        """
        try:
            for choice in call.choices:
                self._dispatcher.submit(choice.request)
            while call.open_choices:
                call.changed.clear()
                deltas = [d for c in call.open_choices if (d := self._advance(c)) is not None]
                if deltas:
                    yield deltas
                elif not await _wait(call.changed, KEEP_ALIVE_S):
                    yield []
        finally:
            for choice in call.choices:
                self._dispatcher.release(choice.request, _abandoned())
                self._record(choice)

    def _advance(self, choice: Choice) -> ChoiceDelta | None:
        delta = choice.advance()
        if delta is not None and delta.finish_reason is not None:
            self._dispatcher.stop(choice.request)
        return delta

    def _record(self, choice: Choice) -> None:
        request = choice.request
        self.metrics.output_tokens.inc(len(choice.tokens))
        if request.first_token_s is None or request.last_token_s is None:
            return
        self.metrics.ttft.observe(request.first_token_s - request.created_s)
        if len(request.tokens) > 1:
            duration_s = request.last_token_s - request.first_token_s
            self.metrics.tpot.observe(duration_s / (len(request.tokens) - 1))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._dispatcher.tick()
            except Exception:  # the outermost loop of the front: waits must stay bounded
                _LOGGER.exception("a tick of the front failed")


async def _wait(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _stopping() -> RequestError:
    return RequestError(
        "the front is stopping", status=503, code="shutting_down", retry_after_s=1.0
    )


def _abandoned() -> RequestError:
    return RequestError("the client has gone", status=499, code="client_disconnected")
