"""The HTTP answer of a call: whole or as server-sent events, watched for the client's leaving.

A stream's status is sent with its first token, so that a call that cannot be served is still
answered with the right status; only a call that waits longer than COMMIT_S gets its 200 earlier,
and comments keep its connection alive. An error behind that is one `data: {"error": ...}` event,
and the stream ends without [DONE].
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...common.errors import RequestError
from .choice import ChoiceDelta
from .openai_responses import error_body
from .render import Renderer, encode
from .service import FrontService
from .slots import Slot

COMMIT_S = 15.0
_KEEP_ALIVE = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"
_JSON = [(b"content-type", b"application/json")]
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGoneError(Exception):
    """The client closed its connection."""


class CallResponse(Response):
    """Runs a call while it answers; releases its slot at the end, however that comes."""

    def __init__(self, service: FrontService, renderer: Renderer, slot: Slot) -> None:
        super().__init__()
        self._service = service
        self._renderer = renderer
        self._slot = slot
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._stream if self._renderer.call.is_stream else self._whole
        try:
            await until_disconnect(receive, answer(send))
        except ClientGoneError:
            self._service.metrics.disconnects.inc()
        finally:
            self._slot.release()

    async def _whole(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._service.events(self._renderer.call)) as events:
                async for _ in events:
                    pass
        except RequestError as error:
            await send_error(send, error)
            return
        await _send_all(send, 200, _JSON, encode(self._renderer.whole()))

    async def _stream(self, send: Send) -> None:
        commit_s = time.monotonic() + COMMIT_S
        try:
            async with contextlib.aclosing(self._service.events(self._renderer.call)) as events:
                async for deltas in events:
                    if deltas or self._is_started or time.monotonic() >= commit_s:
                        await self._send_deltas(send, deltas)
        except RequestError as error:
            await self._fail(send, error)
            return
        last = [self._renderer.usage_chunk()] if self._renderer.call.include_usage else []
        await _send_body(send, _frame(last) + _DONE, is_last=True)

    async def _send_deltas(self, send: Send, deltas: list[ChoiceDelta]) -> None:
        bodies = [] if self._is_started else list(self._renderer.opening())
        if not self._is_started:
            await _send_start(send, 200, _EVENTS)
            self._is_started = True
        for delta in deltas:
            chunk = self._renderer.chunk(delta)
            if chunk is not None:
                bodies.append(chunk)
        payload = _frame(bodies) if deltas or bodies else _KEEP_ALIVE
        if payload:
            await _send_body(send, payload, is_last=False)

    async def _fail(self, send: Send, error: RequestError) -> None:
        if not self._is_started:
            await send_error(send, error)
            return
        self._service.metrics.stream_errors.inc()
        event = b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"
        await _send_body(send, event, is_last=True)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`; cancels it and raises ClientGoneError if the client leaves first."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def send_error(send: Send, error: RequestError) -> None:
    headers = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    await _send_all(send, error.status, _JSON + headers, msgspec.json.encode(error_body(error)))


def error_headers(error: RequestError) -> dict[str, str]:
    """Retry-After in whole seconds, at least one, where trying again makes sense."""
    if error.retry_after_s is None:
        return {}
    return {"retry-after": str(max(1, round(error.retry_after_s)))}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _frame(bodies: Sequence[Any]) -> bytes:
    return b"".join(b"data: " + encode(body) + b"\n\n" for body in bodies)


async def _send_start(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _send_body(send: Send, body: bytes, *, is_last: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


async def _send_all(
    send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    await _send_start(send, status, [*headers, (b"content-length", str(len(body)).encode())])
    await _send_body(send, body, is_last=True)
