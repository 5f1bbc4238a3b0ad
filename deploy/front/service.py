"""The front without HTTP: checks and tokenizes calls, runs their requests, yields what comes.

Runs on one asyncio loop; tokenizing runs on a small thread pool, so the loop never waits for it.
A call holds a slot from its first byte to its last; every call ends, because the ticker bounds
every wait of its requests (request.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...common import wire
from ...common.clock import Clock, MonotonicClock
from ...common.config import Config
from ...common.errors import RequestError
from .attempt import Bounds
from .chat import ChatRenderer
from .choice import Call, Choice, ChoiceDelta
from .completions import CompletionRenderer
from .dispatch import Dispatcher, Handover
from .metrics import FrontMetrics
from .nodes import NodeInfo
from .openai_requests import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody, SamplingBody
from .ports import Control, ModelLimits, Tokenizer
from .request import FrontRequest
from .router import context_limit, missing_roles, prompt_limit
from .slots import Slots
from .text import OutputText

TICK_S = 0.1
KEEP_ALIVE_S = 10.0
"""Longest silence of `events`; a stream then shows a sign of life."""
TOKENIZER_THREADS = 2
MAX_SEED = 2**63 - 1

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
        self._clock = clock or MonotonicClock()
        self._control = control
        self._bounds = Bounds.of(config)
        self._dispatcher = Dispatcher(control, self._clock, self.metrics)
        self.nodes = self._dispatcher.nodes
        self.metrics.watch_nodes(lambda: self.nodes)
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the control plane and the ticker on the running loop."""
        self._control.start(Handover(asyncio.get_running_loop(), self._dispatcher))
        self._ticker = asyncio.create_task(self._tick())

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new calls and waits for the running ones; returns whether all ended."""
        self.slots.close()
        deadline_s = self._clock.now() + timeout_s
        while self.slots.num_used and self._clock.now() < deadline_s:
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
        self._check_model(body.model)
        prompts = await self.in_thread(lambda: [self._encode(prompt) for prompt in body.prompt])
        top = -1 if body.logprobs is None else body.logprobs
        call = self._call(
            body, prompts, "prompt", body.max_tokens or DEFAULT_COMPLETION_TOKENS, top
        )
        return CompletionRenderer(call, self.tokenizer)

    async def prepare_chat(self, body: ChatBody) -> ChatRenderer:
        """Like prepare_completion, through the model's chat template."""
        self._check_model(body.model)
        messages = [message.for_template() for message in body.messages]
        render = functools.partial(
            self.tokenizer.render_chat, messages, body.active_tools, body.chat_template_kwargs or {}
        )
        prompt = tuple(await self.in_thread(render))
        room = max(1, self.context_limit - len(prompt))
        max_tokens = body.max_completion_tokens or body.max_tokens or room
        top = (body.top_logprobs or 0) if body.logprobs else -1
        return ChatRenderer(self._call(body, [prompt], "messages", max_tokens, top), self.tokenizer)

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

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model.name:
            raise RequestError(
                f"the model {name[:200]!r} does not exist; this server has {self.model.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def _encode(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt)) if prompt else ()
        if prompt and not 0 <= min(prompt) <= max(prompt) < self.model.vocab_size:
            raise RequestError(
                f"prompt: token ids run from 0 to {self.model.vocab_size - 1}",
                code="invalid_value",
                param="prompt",
            )
        return tuple(prompt)

    def _call(
        self,
        body: SamplingBody,
        prompts: list[tuple[int, ...]],
        param: str,
        max_tokens: int,
        num_top: int,
    ) -> Call:
        for prompt in prompts:
            self._check_lengths(prompt, param, max_tokens)
        self._check_sampling(body, max_tokens)
        changed = asyncio.Event()
        prefix = "cmpl" if param == "prompt" else "chatcmpl"
        call_id = f"{prefix}-{uuid.uuid4().hex}"
        call = Call(
            call_id=call_id,
            created=int(time.time()),
            model=self.model.name,
            prompts=prompts,
            choices=[],
            num_top=num_top,
            is_stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            return_token_ids=bool(body.return_token_ids),
            changed=changed,
        )
        n = body.n or 1
        base_seed = secrets.randbits(63) if body.seed is None else body.seed
        for index in range(len(prompts) * n):
            salt = index if body.seed is None else index % n
            sampling = _sampling(body, max_tokens, num_top, _derive_seed(base_seed, salt))
            request = FrontRequest(
                f"{self.front_id}-{call_id}-{index}",
                prompts[index // n],
                sampling,
                front_id=self.front_id,
                model=self.model,
                bounds=self._bounds,
                now_s=self._clock.now(),
                notify=changed.set,
            )
            text = OutputText(self.tokenizer.decoder(), body.stop, sampling.min_tokens)
            call.choices.append(Choice(index, request, text))
        self.metrics.prompt_tokens.inc(call.num_prompt_tokens)
        return call

    def _check_lengths(self, prompt: tuple[int, ...], param: str, max_tokens: int) -> None:
        if not prompt:
            raise RequestError(f"{param}: a prompt is empty", code="invalid_value", param=param)
        limit = self.context_limit
        longest = min(limit - 1, prompt_limit(self.nodes, self.model.max_context))
        if len(prompt) > longest or len(prompt) + max_tokens > limit:
            raise RequestError(
                f"This model's maximum context length is {limit} tokens (prompts: {longest}). "
                f"However, you requested {len(prompt) + max_tokens} tokens ({len(prompt)} in the "
                f"{param}, {max_tokens} in the completion).",
                code="context_length_exceeded",
                param=param,
            )

    def _check_sampling(self, body: SamplingBody, max_tokens: int) -> None:
        if (body.min_tokens or 0) > max_tokens:
            raise RequestError(
                f"min_tokens: {body.min_tokens} is more than max_tokens ({max_tokens})",
                code="invalid_value",
                param="min_tokens",
            )
        ids = body.stop_token_ids or ()
        if any(not 0 <= token_id < self.model.vocab_size for token_id in ids):
            raise RequestError(
                f"stop_token_ids: token ids run from 0 to {self.model.vocab_size - 1}",
                code="invalid_value",
                param="stop_token_ids",
            )


def _sampling(body: SamplingBody, max_tokens: int, num_top: int, seed: int) -> wire.Sampling:
    return wire.Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=num_top,
    )


def _derive_seed(seed: int, salt: int) -> int:
    """The seed itself for the first choice; others for the rest. 63 bits."""
    if salt == 0:
        return seed & MAX_SEED
    digest = hashlib.sha256(f"{seed}:{salt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


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
