"""The Ray shell of a front (fronts.py places it)."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import ray

from ..common.config import Config
from .actors import LOG_FORMAT, bind_address
from .drain import DrainOnTerm
from .front.server import FrontServer, build_server, listen
from .membership import MembershipPoller

T = TypeVar("T")


class FrontActor:
    """A front's process, with an asyncio loop on a thread of its own.

    Ray restarts it after a crash; whoever runs the cluster calls `start` again and again, so that a
    restarted front serves the port of the one before. No method is asynchronous: Ray builds actors
    that have such methods off the main thread, which alone can take over SIGTERM.

    Args:
        node_names: names of the node actors, on this Ray.
        namespace: their Ray namespace.
    """

    def __init__(
        self, config: Config, front_id: str, node_names: list[str], namespace: str
    ) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT.format(front_id))
        self._front = _Front(config, front_id, node_names, namespace)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="front", daemon=True).start()
        DrainOnTerm(self._serve_out).install()

    def start(self, port: int, is_first: bool = False) -> str:
        """Starts serving at `port` (0: a free one) unless it serves already; returns the URL.

        `is_first`: of several that share a port; ConfigError if somebody else has it.
        """
        return self._run(self._front.start(port, is_first))

    def pid(self) -> int:
        return os.getpid()

    def machine(self) -> str:
        """Ray's id of the machine it runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def stop(self, drain_s: float) -> None:
        """Drains for up to `drain_s` seconds and stops serving."""
        self._run(self._front.stop(drain_s))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _serve_out(self, hurry: threading.Event) -> None:
        """SIGTERM: leaves the port at once, serves its connections to their end."""
        self._run(self._front.leave(hurry))


class _Front:
    """The HTTP server, and the poller that tells it which nodes there are; on the front's loop."""

    def __init__(
        self, config: Config, front_id: str, node_names: list[str], namespace: str
    ) -> None:
        self._config = config
        self._front_id = front_id
        self._names = node_names
        self._namespace = namespace
        self._server: FrontServer | None = None
        self._url = ""
        self._poller: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def start(self, port: int, is_first: bool) -> str:
        async with self._starting:
            if self._server is None:
                await self._serve(port, is_first)
        return self._url

    async def _serve(self, port: int, is_first: bool) -> None:
        """Leaves nothing behind if it cannot: the next try may."""
        front = dataclasses.replace(self._config.front, port=port)
        if is_first and self._config.cluster.fronts > 1:
            listen(front.host, port).close()
        server = build_server(
            dataclasses.replace(self._config, front=front),
            node_id=self._front_id,
            epoch=time.time_ns(),
            bind_host=bind_address(self._config),
        )
        try:
            self._url = await server.start()
        except BaseException:
            await server.stop()
            raise
        self._server = server
        poller = MembershipPoller(self._names, self._handle, server.update_nodes)
        self._poller = asyncio.create_task(poller.run())

    async def stop(self, drain_s: float) -> None:
        if self._server is not None:
            await self._server.stop(drain_s)
        if self._poller is not None:
            self._poller.cancel()

    async def leave(self, hurry: threading.Event) -> None:
        if self._server is not None:
            self._server.leave_port()
            await self._server.drain(self._config.cluster.drain_s, hurry.is_set)
        await self.stop(0.0)

    async def _handle(self, name: str) -> Any:
        """A node actor's handle. Off the loop: without Ray's head the look-up blocks."""
        return await asyncio.to_thread(ray.get_actor, name, namespace=self._namespace)
