"""From a parsed body to a call: tokenizes, checks lengths and ids, derives seeds.

`encode` and `render` run on worker threads and touch nothing that changes; the rest on the loop.
Everything a client can do wrong here is a RequestError that names the field.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
import uuid

from ...common import wire
from ...common.clock import Clock
from ...common.errors import RequestError
from .attempt import Bounds
from .choice import Call, Choice
from .nodes import NodeDirectory
from .openai_requests import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody, SamplingBody
from .ports import ModelLimits, Tokenizer
from .request import FrontRequest
from .router import context_limit, prompt_limit
from .text import OutputText

MAX_SEED = 2**63 - 1

Prompt = tuple[int, ...]


class CallBuilder:
    """Builds the calls of one front."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: ModelLimits,
        nodes: NodeDirectory,
        *,
        front_id: str,
        bounds: Bounds,
        clock: Clock,
    ) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._nodes = nodes
        self._front_id = front_id
        self._bounds = bounds
        self._clock = clock

    def check_model(self, name: str | None) -> None:
        """RequestError 404 unless the body names this model or none."""
        if name is not None and name != self._model.name:
            raise RequestError(
                f"the model {name[:200]!r} does not exist; this server has {self._model.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    def encode(self, prompts: list[str] | list[list[int]]) -> list[Prompt]:
        """Token ids of each prompt."""
        return [self._encode(prompt) for prompt in prompts]

    def render(self, body: ChatBody) -> Prompt:
        """Token ids of a conversation."""
        messages = [message.for_template() for message in body.messages]
        kwargs = body.chat_template_kwargs or {}
        return tuple(self._tokenizer.render_chat(messages, body.active_tools, kwargs))

    def completion(self, body: CompletionBody, prompts: list[Prompt]) -> Call:
        max_tokens = body.max_tokens or DEFAULT_COMPLETION_TOKENS
        self._check(body, prompts, "prompt", max_tokens)
        num_top = -1 if body.logprobs is None else body.logprobs
        return self._call(body, prompts, f"cmpl-{uuid.uuid4().hex}", max_tokens, num_top)

    def chat(self, body: ChatBody, prompt: Prompt) -> Call:
        """Without a limit of its own the answer may fill the context."""
        room = max(1, context_limit(self._nodes, self._model.max_context) - len(prompt))
        max_tokens = body.max_completion_tokens or body.max_tokens or room
        self._check(body, [prompt], "messages", max_tokens)
        num_top = (body.top_logprobs or 0) if body.logprobs else -1
        return self._call(body, [prompt], f"chatcmpl-{uuid.uuid4().hex}", max_tokens, num_top)

    def _encode(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt)) if prompt else ()
        self._check_ids(prompt, "prompt")
        return tuple(prompt)

    def _check(
        self, body: SamplingBody, prompts: list[Prompt], param: str, max_tokens: int
    ) -> None:
        for prompt in prompts:
            self._check_lengths(prompt, param, max_tokens)
        self._check_ids(body.stop_token_ids or [], "stop_token_ids")
        if (body.min_tokens or 0) > max_tokens:
            raise RequestError(
                f"min_tokens: {body.min_tokens} is more than max_tokens ({max_tokens})",
                code="invalid_value",
                param="min_tokens",
            )

    def _check_lengths(self, prompt: Prompt, param: str, max_tokens: int) -> None:
        if not prompt:
            raise RequestError(f"{param}: a prompt is empty", code="invalid_value", param=param)
        limit = context_limit(self._nodes, self._model.max_context)
        longest = min(limit - 1, prompt_limit(self._nodes, self._model.max_context))
        if len(prompt) > longest or len(prompt) + max_tokens > limit:
            raise RequestError(
                f"This model's maximum context length is {limit} tokens (prompts: {longest}). "
                f"However, you requested {len(prompt) + max_tokens} tokens ({len(prompt)} in the "
                f"{param}, {max_tokens} in the completion).",
                code="context_length_exceeded",
                param=param,
            )

    def _check_ids(self, token_ids: list[int], param: str) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._model.vocab_size:
            raise RequestError(
                f"{param}: token ids run from 0 to {self._model.vocab_size - 1}",
                code="invalid_value",
                param=param,
            )

    def _call(
        self,
        body: SamplingBody,
        prompts: list[Prompt],
        call_id: str,
        max_tokens: int,
        num_top: int,
    ) -> Call:
        call = Call(
            call_id=call_id,
            created=int(time.time()),
            model=self._model.name,
            prompts=prompts,
            choices=[],
            num_top=num_top,
            is_stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            return_token_ids=bool(body.return_token_ids),
            changed=asyncio.Event(),
        )
        n = body.n or 1
        base_seed = secrets.randbits(63) if body.seed is None else body.seed
        for index in range(len(prompts) * n):
            salt = index if body.seed is None else index % n
            sampling = _sampling(body, max_tokens, num_top, derive_seed(base_seed, salt))
            call.choices.append(self._choice(call, index, prompts[index // n], sampling, body.stop))
        return call

    def _choice(
        self, call: Call, index: int, prompt: Prompt, sampling: wire.Sampling, stop: list[str]
    ) -> Choice:
        request = FrontRequest(
            f"{self._front_id}-{call.call_id}-{index}",
            prompt,
            sampling,
            front_id=self._front_id,
            model=self._model,
            bounds=self._bounds,
            now_s=self._clock.now(),
            notify=call.changed.set,
        )
        return Choice(
            index, request, OutputText(self._tokenizer.decoder(), stop, sampling.min_tokens)
        )


def derive_seed(seed: int, salt: int) -> int:
    """The seed itself for the first choice; others for the rest. 63 bits."""
    if salt == 0:
        return seed & MAX_SEED
    digest = hashlib.sha256(f"{seed}:{salt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


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
