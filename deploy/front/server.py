"""Runs a front: uvicorn over the application, on the asyncio loop of whoever starts it.

A Ray actor (or a test, through `ThreadedServer`) builds a FrontServer, awaits `start`, passes the
membership poller's lists to `update_nodes`, and ends with `stop`. Signals are left
to the process that owns the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from ...common.config import Config
from ...common.errors import ConfigError, PeerError
from ...common.secret_files import read_api_keys
from .app import create_app
from .no_tokenizer import NoTokenizer
from .nodes import NodeInfo
from .ports import Control, ModelLimits, Tokenizer
from .service import FrontService

_LOGGER = logging.getLogger("tidepool.front")

START_TIMEOUT_S = 10.0
_BACKLOG = 1024


class _Uvicorn(uvicorn.Server):
    """Uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class FrontServer:
    """One front: HTTP server, service and control plane, started and stopped together."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        model: ModelLimits,
        control: Control,
        *,
        front_id: str = "front-0",
    ) -> None:
        """`front_id` must be the control plane's node id: nodes send tokens to it.

        ConfigError if the configuration names a file of API keys that cannot be used.
        """
        keys_file = config.front.api_keys_file
        self._api_keys = read_api_keys(keys_file) if keys_file else ()
        self.service = FrontService(config, tokenizer, model, control, front_id=front_id)
        self._config = config.front
        self._shares_port = config.cluster.fronts > 1
        self._number = int(front_id.rpartition("-")[2]) if self._shares_port else 0
        self._uvicorn: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Where clients connect; known once started."""
        host = self._config.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def start(self) -> str:
        """Binds the port, starts everything on the running loop, returns the URL.

        One of several fronts also binds, if it can, the port behind the shared one that has its
        number. ConfigError if the port cannot be bound.
        """
        listeners = self._listen()
        self.port = listeners[0].getsockname()[1]
        settings = uvicorn.Config(
            create_app(self.service, self._api_keys),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
        await self.service.start()
        self._uvicorn = _Uvicorn(settings)
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=listeners))
        async with asyncio.timeout(START_TIMEOUT_S):
            while not self._uvicorn.started:
                if self._serving.done():
                    await self._serving
                await asyncio.sleep(0.005)
        return self.url

    def _listen(self) -> list[socket.socket]:
        shared = listen(self._config.host, self._config.port, is_shared=self._shares_port)
        if not self._shares_port:
            return [shared]
        own_port = shared.getsockname()[1] + 1 + self._number
        try:
            return [shared, listen(self._config.host, own_port)]
        except ConfigError as error:
            _LOGGER.warning("no port of its own, /metrics is where requests are: %s", error)
            return [shared]

    def update_nodes(self, infos: list[NodeInfo]) -> None:
        """Takes the whole list of known nodes; on the server's loop."""
        self.service.update_nodes(infos)

    def leave_port(self) -> None:
        """Listens no more: new connections go to the fronts that share the port, or nowhere."""
        if self._uvicorn is not None:
            for server in self._uvicorn.servers:
                server.close()

    async def drain(
        self, timeout_s: float | None = None, is_hurried: Callable[[], bool] = lambda: False
    ) -> bool:
        """Answers new calls 503 and waits for the running ones; returns whether all ended.

        `is_hurried` is asked again and again; once it says so, nothing is waited for.
        """
        bound_s = self._config.drain_s if timeout_s is None else timeout_s
        return await self.service.drain(bound_s, is_hurried)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Drains for up to `drain_s`, ends what still runs with an error, closes everything."""
        if drain_s > 0:
            await self.drain(drain_s)
        await self.service.stop()
        if self._uvicorn is not None and self._serving is not None:
            self._uvicorn.should_exit = True
            await self._serving
            self._serving = None


def build_server(config: Config, *, node_id: str, epoch: int, bind_host: str) -> FrontServer:
    """Builds a front of `config.model.path`: tokenizer, limits and a control plane of its own.

    Args:
        node_id: of the front; nodes send tokens to it.
        epoch: incarnation; must be larger than that of any front before it under this id.
        bind_host: interface the control socket listens on.

    Raises CheckpointError or ConfigError.
    """
    from ...model.runtime import check_model  # noqa: PLC0415  (torch: not for the command line)
    from ...model.tokenizer import load_tokenizer  # noqa: PLC0415
    from ...transfer.control import ControlLoop  # noqa: PLC0415
    from ...transfer.curve import cluster_keys  # noqa: PLC0415

    checkpoint = check_model(config)
    loaded = load_tokenizer(config.model.path, checkpoint.architecture)
    model = ModelLimits(
        name=config.model.name or Path(config.model.path).resolve().name,
        vocab_size=checkpoint.vocab_size,
        max_context=config.decode.max_context or checkpoint.max_position_embeddings,
        eos_token_ids=checkpoint.eos_token_ids,
    )
    control = ControlLoop(
        node_id,
        "front",
        epoch,
        bind_host=bind_host,
        config=config.transfer,
        keys=cluster_keys(config.cluster),
    )
    tokenizer: Tokenizer = loaded.tokenizer or NoTokenizer(loaded.reason)
    return FrontServer(config, tokenizer, model, control, front_id=node_id)


class ThreadedServer:
    """A FrontServer on a thread and loop of its own, for callers that have no loop."""

    def __init__(self, server: FrontServer) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="front", daemon=True)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def start(self) -> str:
        """Starts the server; returns its URL."""
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(self._server.start(), self._loop)
        return starting.result(2 * START_TIMEOUT_S)

    def update_nodes(self, infos: list[NodeInfo]) -> None:
        """Thread-safe `FrontServer.update_nodes`."""
        self._loop.call_soon_threadsafe(self._server.update_nodes, infos)

    def drain(self, timeout_s: float) -> bool:
        draining = asyncio.run_coroutine_threadsafe(self._server.drain(timeout_s), self._loop)
        return draining.result(timeout_s + START_TIMEOUT_S)

    def stop(self) -> None:
        """Stops the server and its thread; PeerError if the thread does not end."""
        stopping = asyncio.run_coroutine_threadsafe(self._server.stop(), self._loop)
        stopping.result(2 * START_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_TIMEOUT_S)
        if self._thread.is_alive():
            raise PeerError("the front's thread does not end")
        self._loop.close()


def listen(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """Returns a listening socket; ConfigError if the port cannot be had.

    `is_shared`: other sockets that say the same may have it too.

    asyncio sets TCP_NODELAY only on sockets that say their protocol is TCP; without it every
    answer in two writes waits 40 ms for the client's delayed acknowledgement.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return listener
