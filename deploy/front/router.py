"""Which prefill and which decode node serve an attempt. Pure: reads the directory, changes nothing.

Least loaded first, then most free pages, then least recently chosen. Draining and silent nodes are
never chosen. A pair of nodes goes before a unified one; nodes in `avoid` (they failed this request
before) come last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from .nodes import Node, NodeDirectory, NodeInfo


@dataclass(frozen=True, slots=True)
class Route:
    """Where an attempt runs; both are the same node if it is unified."""

    prefill: NodeInfo
    decode: NodeInfo

    @property
    def is_unified(self) -> bool:
        return self.prefill.node_id == self.decode.node_id

    def uses(self, node_ids: Collection[str]) -> bool:
        return self.prefill.node_id in node_ids or self.decode.node_id in node_ids


def pick(
    nodes: Iterable[Node], num_prompt_tokens: int, num_total_tokens: int, avoid: Collection[str]
) -> Route | None:
    """Returns the best route for an attempt, or None if no node can take it now."""
    routable = [node for node in nodes if node.is_routable]
    prefill = _best(routable, "prefill", num_prompt_tokens, avoid)
    decode = _best(routable, "decode", num_total_tokens, avoid)
    unified = _best(routable, "unified", num_total_tokens, avoid)
    routes = []
    if prefill is not None and decode is not None:
        routes.append(Route(prefill.info, decode.info))
    if unified is not None:
        routes.append(Route(unified.info, unified.info))
    return min(routes, key=lambda route: route.uses(avoid), default=None)


def missing_roles(nodes: Iterable[Node]) -> list[str]:
    """Returns the roles without which nothing can be served; empty if requests can be."""
    roles = {node.info.role for node in nodes if node.is_routable}
    if "unified" in roles:
        return []
    return [role for role in ("prefill", "decode") if role not in roles]


def context_limit(directory: NodeDirectory, fallback: int) -> int:
    """Longest sequence that some known node takes, in tokens."""
    limits = [node.info.max_context for node in directory if node.info.role != "prefill"]
    return max(limits, default=fallback)


def prompt_limit(directory: NodeDirectory, fallback: int) -> int:
    """Longest prompt that some known node takes, in tokens."""
    limits = [node.info.max_context for node in directory if node.info.role != "decode"]
    return max(limits, default=fallback)


def _best(nodes: list[Node], role: str, num_tokens: int, avoid: Collection[str]) -> Node | None:
    fit = [node for node in nodes if node.info.role == role and node.info.max_context >= num_tokens]
    return min(fit, key=lambda node: (node.info.node_id in avoid, *_rank(node)), default=None)


def _rank(node: Node) -> tuple[float, float, int]:
    load = node.load
    used = 1 - load.free_pages / load.total_pages if load.total_pages else 0.0
    return (node.pressure, round(used, 2), node.last_pick)
