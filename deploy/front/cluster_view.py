"""The cluster as a front sees it: JSON for /cluster, a table for `tidepool status`.

`cluster_view` runs on the front's loop; `cluster_table` in the command line, on what came over
HTTP, so it takes nothing for granted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from .nodes import Node

if TYPE_CHECKING:
    from rich.table import Table

    from .service import FrontService


def cluster_view(service: FrontService) -> dict[str, Any]:
    """Returns what GET /cluster answers."""
    missing = service.missing_roles
    return {
        "cluster": service.config.cluster.name,
        "model": service.model.name,
        "max_context": service.context_limit,
        "is_ready": not missing and not service.slots.is_closed,
        "missing": missing,
        "front": {
            "front_id": service.front_id,
            "is_draining": service.slots.is_closed,
            "in_flight": service.slots.num_used,
            "waiting": service.num_waiting,
            "max_requests": service.slots.limit,
        },
        "nodes": [_node_view(node) for node in service.nodes],
    }


def _node_view(node: Node) -> dict[str, Any]:
    info = node.info
    return {
        "node_id": info.node_id,
        "role": info.role,
        "state": _state(node),
        "epoch": info.epoch,
        "address": info.address,
        "host": info.host,
        "pid": info.pid,
        "max_context": info.max_context,
        "in_flight": node.in_flight,
        "load": msgspec.to_builtins(node.load),
        "stats": dict(info.stats),
    }


def _state(node: Node) -> str:
    if not node.is_listed:
        return "leaving"
    if not node.is_up:
        return "down"
    return "draining" if node.load.is_draining else "up"


def cluster_table(view: dict[str, Any]) -> Table:
    """Returns the nodes of a /cluster answer as a rich table."""
    from rich.table import Table  # noqa: PLC0415

    front = view["front"]
    state = "ready" if view["is_ready"] else "not ready"
    if view["missing"]:
        state += f" (no {' and no '.join(view['missing'])} node)"
    title = (
        f"{view['cluster']}: {view['model']}, {state}, "
        f"{front['in_flight']} of {front['max_requests']} requests in flight"
    )
    table = Table(title=title)
    for name in ("node", "role", "state", "host", "pid", "epoch"):
        table.add_column(name)
    for name in (
        "queued",
        "running",
        "parked",
        "pages free",
        "pages",
        "quarantined",
        "re-attached",
        "context",
    ):
        table.add_column(name, justify="right")
    for node in view["nodes"]:
        table.add_row(*_cells(node))
    return table


def _cells(node: dict[str, Any]) -> list[str]:
    load = node["load"]
    names = ("node_id", "role", "state", "host", "pid", "epoch")
    loads = ("num_queued", "num_running", "num_parked", "free_pages", "total_pages")
    return [
        *(str(node[name]) for name in names),
        *(str(load[name]) for name in loads),
        str(load["quarantined_pages"]),
        str(node["stats"].get("reattached_requests", "")),
        str(node["max_context"]),
    ]
