"""A cluster on Ray: one placement group and one named, restartable actor a node, and the fronts (fronts.py).

`start` brings it up, `Cluster.stop` takes all of it down; `serve` is what the command line runs.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from ..common.config import Config, Resolved
from ..common.errors import ConfigError, PeerError
from ..decode_node.build import check as check_decode
from ..hostpool.memory import available_host_bytes
from ..model.runtime import check_model
from .cluster_secret import check_secrets, forget, with_local_secret
from .fronts import Fronts, pinned_to, try_get
from .ray_environment import RAY_ENVIRONMENT

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
KEEP_INTERVAL_S = 1.0
LOCAL_OBJECT_STORE_BYTES = 100_000_000
"""Nothing large goes through Ray's object store; its default would take 30 % of the memory."""


@dataclass(slots=True)
class Cluster:
    """A running cluster.

    Attributes:
        run_id: tells this start from all others.
        fronts: the HTTP fronts.
        nodes: node id -> actor handle.
    """

    config: Config
    namespace: str
    owns_ray: bool
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    fronts: Fronts = field(default_factory=Fronts)
    nodes: dict[str, Any] = field(default_factory=dict)
    groups: list[Any] = field(default_factory=list)
    own_secret: str = ""
    """File made for this cluster alone; removed with it."""

    @property
    def url(self) -> str:
        """Where clients connect."""
        return self.fronts.url

    def keep_fronts(self) -> None:
        """Makes fronts that Ray has restarted serve again. Cheap; call often."""
        self.fronts.keep()

    def stop(self, drain_s: float = 0.0) -> None:
        """Drains for up to `drain_s` seconds, then ends the fronts, the nodes and what we started."""
        import ray  # noqa: PLC0415

        self.fronts.stop(drain_s)
        stops = [actor.stop.remote() for actor in self.nodes.values()]
        for stop in stops:
            try_get(stop, STOP_TIMEOUT_S)
        for actor in self.nodes.values():
            ray.kill(actor)
        for group in self.groups:
            ray.util.remove_placement_group(group)
        if self.owns_ray:
            ray.shutdown()
        forget(self.own_secret)


def check(config: Config, *, is_local: bool) -> None:
    """Raises ConfigError or CheckpointError for all that can be seen before anything starts.

    `is_local`: the nodes will run on this machine, so its memory counts.
    """
    check_secrets(config, is_local=is_local)
    model = check_model(config)
    check_decode(config, model, available_host_bytes() if is_local else None)


def start(config: Config, *, address: str | None = None, log_to_driver: bool = True) -> Cluster:
    """Starts the cluster and waits until the front is ready.

    Args:
        address: of a running Ray; None: a local one is started, and ended by `stop`.
        log_to_driver: whether the actors' output appears here.

    Raises PeerError if a node does not come up; everything started until then is stopped.
    """
    check(config, is_local=address is None)
    config, own_secret = with_local_secret(config) if address is None else (config, "")
    try:
        cluster = _connect(config, address, log_to_driver)
    except BaseException:
        forget(own_secret)
        raise
    cluster.own_secret = own_secret
    try:
        _place_nodes(cluster)
        _place_fronts(cluster)
    except BaseException:
        cluster.stop()
        raise
    return cluster


def serve(resolved: Resolved, *, address: str | None = None) -> None:
    """Runs a cluster until Ctrl-C or SIGTERM, then drains; a second signal hurries."""
    config = resolved.config
    stopping = threading.Event()
    hurry = threading.Event()

    def on_signal(signum: int, frame: object) -> None:
        if stopping.is_set():
            hurry.set()
        stopping.set()

    cluster = start(config, address=address)
    previous = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    print(
        f"tidepool serves {config.model.path} at {cluster.url}  (Ctrl-C drains and stops)",
        flush=True,
    )
    try:
        while not stopping.wait(KEEP_INTERVAL_S):
            cluster.keep_fronts()
        print(
            f"draining for up to {config.front.drain_s:.0f} s (Ctrl-C again: at once)", flush=True
        )
        stopper = threading.Thread(target=cluster.stop, args=(config.front.drain_s,), daemon=True)
        stopper.start()
        while stopper.is_alive() and not hurry.is_set():
            stopper.join(0.1)
        if hurry.is_set():
            cluster.stop(0.0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _connect(config: Config, address: str | None, log_to_driver: bool) -> Cluster:
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray  # noqa: PLC0415

    namespace = f"tidepool-{config.cluster.name}"
    if address is None:
        num_nodes = config.cluster.unified or config.cluster.prefill + config.cluster.decode
        ray.init(
            num_cpus=max(os.cpu_count() or 1, int(num_nodes * config.cluster.cpus_per_node) + 1),
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            namespace=namespace,
            log_to_driver=log_to_driver,
            configure_logging=False,
        )
    elif not ray.is_initialized():
        ray.init(address=address, namespace=namespace, log_to_driver=log_to_driver)
    return Cluster(config, namespace, owns_ray=address is None)


def _roles(config: Config) -> list[tuple[str, str]]:
    """(node id, role) of every node."""
    cluster = config.cluster
    if cluster.unified:
        return [(f"unified-{number}", "unified") for number in range(cluster.unified)]
    return [
        *((f"prefill-{number}", "prefill") for number in range(cluster.prefill)),
        *((f"decode-{number}", "decode") for number in range(cluster.decode)),
    ]


def _place_nodes(cluster: Cluster) -> None:
    import ray  # noqa: PLC0415
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: PLC0415

    from .actors import NodeActor  # noqa: PLC0415

    section = cluster.config.cluster
    for node_id, role in _roles(cluster.config):
        pin = pinned_to(cluster.config, node_id)
        bundle = {"CPU": section.cpus_per_node, "GPU": section.gpus_per_node, **pin}
        bundle = {name: amount for name, amount in bundle.items() if amount}
        options: dict[str, Any] = {"num_cpus": section.cpus_per_node, "resources": pin}
        if bundle:
            group = ray.util.placement_group([bundle], strategy="STRICT_PACK")
            cluster.groups.append(group)
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group)
        if section.gpus_per_node:
            options["num_gpus"] = section.gpus_per_node
        actor = ray.remote(NodeActor).options(
            name=node_id,
            namespace=cluster.namespace,
            max_restarts=-1,
            max_concurrency=8,
            **options,
        )
        cluster.nodes[node_id] = actor.remote(role, cluster.config, node_id, cluster.run_id)
    _wait_for_nodes(cluster)


def _wait_for_nodes(cluster: Cluster) -> None:
    import ray  # noqa: PLC0415

    pending = {actor.info.remote(): node_id for node_id, actor in cluster.nodes.items()}
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while pending:
        ready, _ = ray.wait(list(pending), timeout=max(0.0, deadline_s - time.monotonic()))
        if not ready:
            names = ", ".join(pending.values())
            raise PeerError(
                f"{names} did not start in {START_TIMEOUT_S:.0f} s; does the Ray cluster have "
                f"{cluster.config.cluster.cpus_per_node} CPUs and "
                f"{cluster.config.cluster.gpus_per_node} GPUs for each node"
                + (", and the custom resource of its id?" if cluster.config.cluster.pinned else "?")
            )
        node_id = pending.pop(ready[0])
        try:
            ray.get(ready[0])
        except ray.exceptions.RayError as error:
            raise PeerError(f"{node_id} could not start: {_first_cause(error)}") from error


def _place_fronts(cluster: Cluster) -> None:
    import ray  # noqa: PLC0415

    try:
        cluster.fronts.start(cluster.config, list(cluster.nodes), cluster.namespace)
    except ray.exceptions.RayError as error:
        raise PeerError(f"a front could not start: {_first_cause(error)}") from error


def _first_cause(error: BaseException) -> str:
    """The last line of what Ray wraps around a remote error: the error itself."""
    if isinstance(error, ConfigError):
        return str(error)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
