"""The Ray shells of the nodes and the front. Ray starts, places and restarts; nothing of it runs
per step or per token.

A node that finds its own state wrong ends its process, and Ray starts a fresh one: state that is
known to be wrong is never served from.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import sys
import time
from typing import Any

import ray

from ..common.config import Config
from ..common.errors import SegmentError
from ..hostpool.keeper_link import KeeperLink
from ..transfer.node import Node
from .front.server import FrontServer, build_server, listen
from .incarnations import Incarnations
from .keeping import find_or_start, keeper_path
from .membership import MembershipPoller

LOG_FORMAT = "%(asctime)s [{}] %(levelname)s %(message)s"

log = logging.getLogger(__name__)


def _end_process(error: BaseException) -> None:
    """Called by a node whose loop has ended by an error: the process must not live on."""
    print(f"tidepool: the node ends: {error!r}", file=sys.stderr, flush=True)
    os._exit(70)


def _build(
    role: str, config: Config, node_id: str, bind_host: str, link: KeeperLink | None
) -> Node:
    """Builds the node of `role`; imports only what that role needs."""
    if role == "prefill":
        from ..prefill_node.node import build_node  # noqa: PLC0415
    elif role == "decode":
        from ..decode_node.node import build_node as build_decode  # noqa: PLC0415

        return build_decode(
            config, node_id=node_id, bind_host=bind_host, on_fatal=_end_process, link=link
        )
    else:
        from .unified import build_node  # noqa: PLC0415
    return build_node(config, node_id=node_id, bind_host=bind_host, on_fatal=_end_process)


def _keeper(config: Config, run_id: str, node_id: str) -> KeeperLink | None:
    """The keeper of this node's memory, started if need be; without one nothing outlives us."""
    try:
        return find_or_start(keeper_path(run_id, node_id), idle_s=config.decode.keep_s)
    except SegmentError as error:
        log.warning("no keeper, a kill of this process loses its KV: %s", error)
        return None


def bind_address(config: Config) -> str:
    """The interface this machine's sockets listen on."""
    if config.cluster.bind_host != "auto":
        return config.cluster.bind_host
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


class NodeActor:
    """One node. Methods run on the actor's threads; the node has its own.

    Args:
        run_id: of the cluster's start; the same for each process of this node.
    """

    def __init__(self, role: str, config: Config, node_id: str, run_id: str) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT.format(node_id))
        self._incarnations = Incarnations(f"{run_id}-{node_id}")
        is_alone = self._incarnations.claim()
        if not is_alone:
            log.warning("another process of this node holds its record: is it still alive?")
        keeps = is_alone and role == "decode" and config.decode.reattach
        link = _keeper(config, run_id, node_id) if keeps else None
        self._node = _build(role, config, node_id, bind_address(config), link)
        self._incarnations.record(self._node.control.epoch)
        self._node.start()

    def info(self) -> dict[str, Any]:
        return {**self._node.info(), "dead_epochs": self._incarnations.dead_epochs()}

    def audit(self) -> dict[str, Any]:
        """Checks every invariant of the node's pools and tables; raises what it found."""
        return self._node.audit()

    def fence_writers(self, reason: str) -> bool:
        """Ends what any peer can still write to this node, without waiting for its death."""
        return self._node.fence_writers(reason)

    def drain(self, timeout_s: float) -> bool:
        return self._node.drain(timeout_s)

    def stop(self) -> None:
        self._node.stop()
        self._incarnations.forget()


class FrontActor:
    """The HTTP front, and the poller that tells it which nodes there are.

    Ray restarts it after a crash; whoever runs the cluster calls `start` again and again, so that a
    restarted front serves the port of the one before.

    Args:
        node_names: names of the node actors, on this Ray.
        namespace: their Ray namespace.
    """

    def __init__(
        self, config: Config, front_id: str, node_names: list[str], namespace: str
    ) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT.format(front_id))
        self._config = config
        self._front_id = front_id
        self._names = node_names
        self._namespace = namespace
        self._server: FrontServer | None = None
        self._url = ""
        self._poller: asyncio.Task[None] | None = None

    async def start(self, port: int, is_first: bool = False) -> str:
        """Starts serving at `port` (0: a free one) unless it serves already; returns the URL.

        `is_first`: of several that share a port; ConfigError if somebody else has it.
        """
        if self._server is None:
            front = dataclasses.replace(self._config.front, port=port)
            if is_first and self._config.cluster.fronts > 1:
                listen(front.host, port).close()
            self._server = build_server(
                dataclasses.replace(self._config, front=front),
                node_id=self._front_id,
                epoch=time.time_ns(),
                bind_host=bind_address(self._config),
            )
            self._url = await self._server.start()
            poller = MembershipPoller(self._names, self._handle, self._server.update_nodes)
            self._poller = asyncio.create_task(poller.run())
        return self._url

    async def pid(self) -> int:
        return os.getpid()

    async def machine(self) -> str:
        """Ray's id of the machine it runs on."""
        return str(ray.get_runtime_context().get_node_id())

    async def stop(self, drain_s: float) -> None:
        """Drains for up to `drain_s` seconds and stops serving."""
        if self._server is not None:
            await self._server.stop(drain_s)
        if self._poller is not None:
            self._poller.cancel()

    async def _handle(self, name: str) -> Any:
        """A node actor's handle. Off the loop: without Ray's head the look-up blocks."""
        return await asyncio.to_thread(ray.get_actor, name, namespace=self._namespace)
