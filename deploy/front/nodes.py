"""Which nodes there are, which answer, and how loaded they are.

Two sources meet here. The membership poller (Ray) calls `update` with every node it knows; the
control plane tells which sessions are up and passes on each node's load. A node takes requests
when both agree on its epoch. Everything runs on the front's asyncio loop.

A node that is restarted shows a newer epoch: the attempts of the old one are lost, but for those that
decode may go on with (request.py), and every other node, which may hold pages for the old one, is told by `Fence`, again whenever its session comes up. A node
that the poller no longer lists gets no new requests; its session stays while requests run on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...common import wire
from .ports import Control

NodeRole = Literal["prefill", "decode", "unified"]
MAX_FENCES_PER_NODE = 16


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node as the membership poller sees it.

    Attributes:
        epoch: incarnation; grows with every restart.
        address: of its control socket.
        max_context: longest sequence it takes, in tokens (prefill: longest prompt).
        stats: its counters and gauges; numbers go to /metrics as `tidepool_node_<key>`.
        dead_epochs: earlier incarnations that are proven dead.
    """

    node_id: str
    role: NodeRole
    epoch: int
    address: str
    max_context: int
    host: str = ""
    pid: int = 0
    stats: Mapping[str, Any] = field(default_factory=dict)
    dead_epochs: Sequence[int] = ()


@dataclass(slots=True)
class Node:
    """What the directory keeps of one node.

    Attributes:
        session_epoch: epoch of the live session; None while it is down.
        in_flight: attempts of this front that run here.
        since_ping: attempts submitted since the load was last told.
        last_pick: when it was last chosen, as a running number.
    """

    info: NodeInfo
    is_listed: bool = True
    session_epoch: int | None = None
    load: wire.Load = field(default_factory=wire.Load)
    in_flight: int = 0
    since_ping: int = 0
    last_pick: int = 0

    @property
    def is_up(self) -> bool:
        return self.session_epoch == self.info.epoch

    @property
    def is_routable(self) -> bool:
        return self.is_up and self.is_listed and not self.load.is_draining

    @property
    def pressure(self) -> int:
        """Requests the node has or will have, of all fronts."""
        load = self.load
        told = load.num_queued + load.num_running + load.num_parked
        return max(self.in_flight, told + self.since_ping)


class NodeDirectory:
    """The known nodes.

    Args:
        on_lost: called with (node id, epoch, reason) when an incarnation is gone for good.
        on_cut: the same, when its session is gone; it may come back.
        on_replaced: called with (old epoch, new NodeInfo) when an incarnation has a successor.
    """

    def __init__(
        self,
        control: Control,
        on_lost: Callable[[str, int, str], None],
        on_cut: Callable[[str, int, str], None],
        on_replaced: Callable[[int, NodeInfo], None],
    ) -> None:
        self._control = control
        self._on_lost = on_lost
        self._on_cut = on_cut
        self._on_replaced = on_replaced
        self._nodes: dict[str, Node] = {}
        self._fences: dict[str, list[int]] = {}
        self._picks = 0

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, node_id: str) -> Node | None:
        return self._nodes.get(node_id)

    def update(self, infos: Iterable[NodeInfo]) -> None:
        """Takes the poller's whole list; nodes it leaves out are no longer chosen."""
        listed = {info.node_id: info for info in infos}
        for info in listed.values():
            self._see(info)
        for node in list(self._nodes.values()):
            if node.info.node_id not in listed:
                node.is_listed = False
                if not node.is_up:
                    self._on_lost(node.info.node_id, node.info.epoch, "it is not restarted")
                self._forget_if_unused(node)

    def peer_up(self, node_id: str, epoch: int) -> None:
        """A session is up. A newer epoch than the poller's proves that the old one is dead."""
        node = self._nodes.get(node_id)
        if node is None or epoch < node.info.epoch:
            return
        if epoch > node.info.epoch:
            self._replace(node, dataclasses.replace(node.info, epoch=epoch))
        node.session_epoch = epoch
        self._resend_fences(node)

    def peer_down(self, node_id: str, epoch: int, reason: str) -> None:
        node = self._nodes.get(node_id)
        if node is None or node.session_epoch != epoch:
            return
        self._drop_session(node)
        self._on_cut(node_id, epoch, reason)
        self._forget_if_unused(node)

    def ping(self, node_id: str, epoch: int, load: wire.Load) -> None:
        node = self._nodes.get(node_id)
        if node is not None and node.session_epoch == epoch:
            node.load = load
            node.since_ping = 0

    def acquire(self, node_id: str) -> None:
        """An attempt starts on the node."""
        node = self._nodes[node_id]
        self._picks += 1
        node.last_pick = self._picks
        node.in_flight += 1
        node.since_ping += 1

    def release(self, node_id: str) -> None:
        """An attempt has left the node."""
        node = self._nodes.get(node_id)
        if node is None:
            return
        node.in_flight -= 1
        self._forget_if_unused(node)

    def _see(self, info: NodeInfo) -> None:
        node = self._nodes.get(info.node_id)
        if node is None:
            self._nodes[info.node_id] = Node(info)
            self._control.connect(info.node_id, info.address)
            self._spread_fences(info)
            return
        if info.epoch < node.info.epoch:
            return
        node.is_listed = True
        old = node.info
        if info.epoch > old.epoch:
            self._replace(node, info)
        node.info = info
        # The fence of the one before has ended its link; the successor may have its address.
        is_new = info.epoch > old.epoch or info.address != old.address
        if is_new and not node.is_up:
            self._control.connect(info.node_id, info.address)
        self._spread_fences(info)

    def _replace(self, node: Node, info: NodeInfo) -> None:
        """The incarnation the directory knew has a successor, `info`, and is spoken to no more."""
        old = node.info.epoch
        self._drop_session(node)
        node.info = info
        self._on_replaced(old, info)
        self._control.fence(info.node_id, old)

    def _spread_fences(self, info: NodeInfo) -> None:
        """Tells all other nodes which incarnations are proven dead, each once a session."""
        fences = self._fences.setdefault(info.node_id, [])
        fresh = [epoch for epoch in info.dead_epochs if epoch not in fences and epoch < info.epoch]
        fences += fresh
        del fences[:-MAX_FENCES_PER_NODE]
        for epoch in fresh[-MAX_FENCES_PER_NODE:]:
            for other in self._nodes.values():
                self._fence(other, info.node_id, epoch)

    def _drop_session(self, node: Node) -> None:
        node.session_epoch = None
        node.load = wire.Load()
        node.since_ping = 0

    def _resend_fences(self, node: Node) -> None:
        for node_id, epochs in self._fences.items():
            for epoch in epochs:
                self._fence(node, node_id, epoch)

    def _fence(self, target: Node, node_id: str, epoch: int) -> None:
        if target.info.node_id != node_id:
            self._control.send(target.info.node_id, wire.Fence(node_id, epoch))

    def _forget_if_unused(self, node: Node) -> None:
        if node.is_listed or node.in_flight > 0:
            return
        if self._nodes.pop(node.info.node_id, None) is not None:
            self._control.disconnect(node.info.node_id)
