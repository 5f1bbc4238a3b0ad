"""The HTTP fronts of a cluster: placed, kept serving, stopped; called by whoever runs the cluster.

One front is an actor of its own. Several share one port of one machine (SO_REUSEPORT): the kernel
deals new connections out among those that live, so that a killed front costs its own connections
and no other, and the next request works at once. Each of several also listens on a port of its
own, for its metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..common.config import Config

START_TIMEOUT_S = 180.0
KEEP_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
MAX_CALLS = 8


@dataclass(slots=True)
class Fronts:
    """Attributes:
    url: where clients connect; known once started.
    actors: front id -> actor handle.
    """

    url: str = ""
    actors: dict[str, Any] = field(default_factory=dict)

    def start(self, config: Config, node_ids: list[str], namespace: str) -> None:
        """Places all fronts and waits until they serve; RayError of the first that does not.

        The others go to the machine of the first: a port cannot be shared between two.
        """
        import ray  # noqa: PLC0415

        first, *others = (f"front-{number}" for number in range(config.cluster.fronts))
        self.actors[first] = _place(config, first, node_ids, namespace, "")
        start = self.actors[first].start.remote(config.front.port, is_first=True)
        self.url = ray.get(start, timeout=START_TIMEOUT_S)
        machine = ray.get(self.actors[first].machine.remote(), timeout=KEEP_TIMEOUT_S)
        for front_id in others:
            self.actors[front_id] = _place(config, front_id, node_ids, namespace, machine)
        ray.get(self._start_all(), timeout=START_TIMEOUT_S)

    def keep(self) -> None:
        """Makes fronts that Ray has restarted serve again, at the old port. Cheap; call often."""
        for start in self._start_all():
            try_get(start, KEEP_TIMEOUT_S)

    def stop(self, drain_s: float) -> None:
        """Drains all at once for up to `drain_s` seconds, then ends them."""
        import ray  # noqa: PLC0415

        stops = [actor.stop.remote(drain_s) for actor in self.actors.values()]
        for stop in stops:
            try_get(stop, drain_s + STOP_TIMEOUT_S)
        for actor in self.actors.values():
            ray.kill(actor)

    def _start_all(self) -> list[Any]:
        port = int(self.url.rsplit(":", 1)[1])
        return [actor.start.remote(port) for actor in self.actors.values()]


def _place(config: Config, front_id: str, node_ids: list[str], namespace: str, machine: str) -> Any:
    """Creates the actor. `machine`: Ray's id of the one it should run on; empty: any."""
    import ray  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    from .front_actor import FrontActor  # noqa: PLC0415

    options: dict[str, Any] = {"resources": pinned_to(config, front_id)}
    if machine and not config.cluster.pinned:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(machine, soft=True)
    actor = ray.remote(FrontActor).options(
        name=front_id,
        namespace=namespace,
        num_cpus=0,
        max_concurrency=MAX_CALLS,
        max_restarts=-1,
        **options,
    )
    return actor.remote(config, front_id, node_ids, namespace)


PIN_AMOUNT = 0.001
"""What a pinned node or front takes of its machine's custom resource."""


def pinned_to(config: Config, node_id: str) -> dict[str, float]:
    """The custom resource that ties a node or front to its machine; nothing unless pinned."""
    return {node_id: PIN_AMOUNT} if config.cluster.pinned else {}


def try_get(reference: Any, timeout_s: float) -> None:
    """Waits for a call to an actor that may be dead already."""
    import ray  # noqa: PLC0415

    try:
        ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayError:
        return
