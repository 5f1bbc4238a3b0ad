"""The Ray shell of the nodes. Ray starts, places and restarts; nothing of it runs
per step or per token.

A node that finds its own state wrong ends its process, and Ray starts a fresh one: state that is
known to be wrong is never served from.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import ray

from ..common.config import Config
from ..common.errors import SegmentError
from ..common.stages import Stages
from ..hostpool.keeper_link import KeeperLink
from ..transfer.node import Node, own_interpreter
from .drain import DrainOnTerm
from .incarnations import Incarnations
from .keeping import keeper_path, keeper_starter

LOG_FORMAT = "%(asctime)s [{}] %(levelname)s %(message)s"


_ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Of the node's libraries. A node compiles one small function; torch would start a pool of processes
for it, each of which imports torch, while the node starts."""

log = logging.getLogger(__name__)


def _end_process(error: BaseException) -> None:
    """Called by a node whose loop has ended by an error: the process must not live on."""
    print(f"tidepool: the node ends: {error!r}", file=sys.stderr, flush=True)
    os._exit(70)


class _Keeper(NamedTuple):
    """A node's keeper, and how to have another in its place."""

    link: KeeperLink
    start: Callable[[], KeeperLink]


def _keeper(config: Config, run_id: str, node_id: str) -> _Keeper | None:
    """The keeper of this node's memory, started if need be; without one nothing outlives us."""
    start = keeper_starter(keeper_path(run_id, node_id), idle_s=config.decode.keep_s)
    try:
        return _Keeper(start(), start)
    except SegmentError as error:
        log.warning("no keeper, a kill of this process loses its KV: %s", error)
        return None


def _build(
    role: str,
    config: Config,
    node_id: str,
    bind_host: str,
    keeper: _Keeper | None,
    stages: Stages,
) -> Node:
    """Builds the node of `role`; imports only what that role needs."""
    if role == "prefill":
        from ..prefill_node.node import build_node  # noqa: PLC0415
    elif role == "decode":
        from ..decode_node.node import build_node as build_decode  # noqa: PLC0415

        stages.mark("imports")
        return build_decode(
            config,
            node_id=node_id,
            bind_host=bind_host,
            on_fatal=_end_process,
            link=keeper.link if keeper else None,
            start_keeper=keeper.start if keeper else None,
            stages=stages,
        )
    else:
        from .unified import build_node  # noqa: PLC0415
    return build_node(config, node_id=node_id, bind_host=bind_host, on_fatal=_end_process)


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
        self._stages = Stages()
        self._stages.mark("actor")
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT.format(node_id))
        self._incarnations = Incarnations(f"{run_id}-{node_id}")
        is_alone = self._incarnations.claim()
        if not is_alone:
            log.warning("another process of this node holds its record: is it still alive?")
        keeps = is_alone and role == "decode" and config.decode.reattach
        keeper = _keeper(config, run_id, node_id) if keeps else None
        self._stages.mark("keeper")
        self._node = _build(role, config, node_id, bind_address(config), keeper, self._stages)
        self._incarnations.record(self._node.control.epoch)
        own_interpreter()
        self._node.start()
        self._stages.mark("started")
        self._drain_s = config.cluster.drain_s
        self._is_stopped = False
        DrainOnTerm(self._serve_out).install()

    def info(self) -> dict[str, Any]:
        return {**self._node.info(), "dead_epochs": self._incarnations.dead_epochs()}

    def stages(self) -> dict[str, float]:
        """When this process got how far while it started: seconds since the epoch by stage."""
        return self._stages.times_s

    def audit(self) -> dict[str, Any]:
        """Checks every invariant of the node's pools and tables; raises what it found."""
        return self._node.audit()

    def fence_writers(self, reason: str) -> bool:
        """Ends what any peer can still write to this node, without waiting for its death."""
        return self._node.fence_writers(reason)

    def drain(self, timeout_s: float) -> bool:
        return self._node.drain(timeout_s)

    def stop(self) -> None:
        self._is_stopped = True
        self._node.stop()
        self._incarnations.forget()

    def _serve_out(self, hurry: threading.Event) -> None:
        """Its record stays: Ray starts a successor, which proves this process dead."""
        if not self._is_stopped:
            self._node.drain(self._drain_s, hurry)
            self._node.stop()
