"""A real Ray cluster over hosts, and a tidepool cluster on it.

    with multinode_cluster(["head", "front-0", "prefill-0", "decode-0"]) as cluster:
        cluster.where("decode-0").set_link(False)

One host for each entry; an entry names what runs there ("prefill-1 decode-1" for two nodes). The
first is Ray's head, whose tables are on disk, so that a head that is restarted knows the cluster.
The driver (driver.py) runs on the fronts' host. All is removed at the end, whatever happened.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from multinode.hosts import Host, Network, wait_for
from tidepool.deploy.demo.run import SETTINGS
from tidepool.deploy.ray_environment import RAY_ENVIRONMENT

TESTS = Path(__file__).resolve().parent.parent
RAY_PORT = 6379
FRONT_PORT = 8000
START_TIMEOUT_S = 240.0
CALL_TIMEOUT_S = 60.0
SETTLE_TIMEOUT_S = 40.0


class NotAnsweringError(AssertionError):
    """A node's actor cannot be called now."""


class RayCluster:
    """See the module.

    Args:
        roles: what runs on each host.
        settings: of the configuration, over the demo's; dotted names.
    """

    def __init__(
        self, network: Network, roles: Sequence[str], settings: dict[str, Any] | None = None
    ) -> None:
        self.network = network
        self._roles = {host: role.split() for host, role in zip(network.hosts, roles, strict=True)}
        self._ray: dict[Host, subprocess.Popen[str]] = {}
        self._driver: subprocess.Popen[str] | None = None
        node_ids = [name for each in self._roles.values() for name in each]
        self.node_ids = [name for name in node_ids if name.startswith(("prefill", "decode"))]
        self.front_ids = [name for name in node_ids if name.startswith("front")]
        front = self.where("front-0")
        overrides = {
            **SETTINGS,
            "cluster.name": "multinode",
            "cluster.pinned": True,
            "cluster.prefill": sum(name.startswith("prefill") for name in node_ids),
            "cluster.decode": sum(name.startswith("decode") for name in node_ids),
            "cluster.fronts": len(self.front_ids),
            "cluster.cpus_per_node": 0.1,
            "cluster.secret_file": self._write_secret(),
            "front.host": front.address,
            "front.port": FRONT_PORT,
            **(settings or {}),
        }
        self._settings = _tree(overrides)
        self.front_address = (front.address, FRONT_PORT)
        self.url = f"http://{front.address}:{FRONT_PORT}"

    # ---- start and end ----

    def start(self) -> None:
        head, *others = self.network.hosts
        self.start_ray(head)
        wait_for(lambda: head.pids_named("raylet/raylet"), 60.0, "Ray's head")
        for host in others:
            self.start_ray(host)
        self._wait_for_raylets(others)
        self._start_driver()
        self.wait_until_ready(60.0)

    def start_ray(self, host: Host) -> None:
        """Starts Ray on a host that was (re)booted."""
        is_head = host is self.network.hosts[0]
        where = ("--head", f"--port={RAY_PORT}", "--include-dashboard=false")
        joins = (f"--address={self.network.hosts[0].address}:{RAY_PORT}",)
        resources = json.dumps(dict.fromkeys(self._roles[host], 1))
        self._ray[host] = host.start(
            str(Path(sys.executable).with_name("ray")),
            "start",
            *(where if is_head else joins),
            f"--node-ip-address={host.address}",
            "--num-cpus=1",
            f"--resources={resources}",
            "--object-store-memory=80000000",
            "--disable-usage-stats",
            "--block",
            env=self._environment(host),
            log=host.directory / "ray.log",
        )

    def stop(self) -> None:
        """Ends the driver in order; what does not end is ended with its host."""
        if self._driver is not None and self._driver.poll() is None:
            try:
                self.ask("stop")
                self._driver.wait(20.0)
            except (AssertionError, OSError, subprocess.TimeoutExpired):
                self._driver.kill()
        for process in (self._driver, *self._ray.values()):
            if process is not None:
                process.kill()
                process.wait(10.0)
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()

    def power_off(self, host: Host) -> None:
        host.power_off()
        self._ray.pop(host).wait(10.0)

    def boot(self, host: Host) -> None:
        """Boots a host that was powered off; it joins Ray again."""
        host.directory = host.directory.with_name(f"{host.name}-{time.monotonic_ns()}")
        host.boot()
        self.start_ray(host)

    def _environment(self, host: Host) -> dict[str, str]:
        head = self.network.hosts[0]
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            **RAY_ENVIRONMENT,
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        if host is head:
            tables = self.network.directory / "gcs"
            tables.mkdir(exist_ok=True)
            environment["RAY_gcs_storage"] = "rocksdb"
            environment["RAY_gcs_storage_path"] = str(tables)
        return environment

    def _write_secret(self) -> str:
        path = self.network.directory / "secret"
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(48))
        return str(path)

    def _wait_for_raylets(self, hosts: Sequence[Host]) -> None:
        for host in hosts:
            wait_for(lambda host=host: host.pids_named("raylet/raylet"), 60.0, f"Ray: {host.name}")

    def _start_driver(self) -> None:
        host = self.where("front-0")
        self._driver = host.start(
            sys.executable,
            "-m",
            "multinode.driver",
            json.dumps(self._settings),
            f"{self.network.hosts[0].address}:{RAY_PORT}",
            env=self._environment(host),
            log=host.directory / "driver.log",
            pipes=True,
        )
        assert self._read_line(START_TIMEOUT_S)["url"] == self.url

    # ---- asking ----

    def ask(self, operation: str) -> dict[str, Any]:
        """One question to the driver."""
        assert self._driver is not None and self._driver.stdin is not None
        self._driver.stdin.write(json.dumps({"op": operation}) + "\n")
        self._driver.stdin.flush()
        return self._read_line(CALL_TIMEOUT_S)

    def _read_line(self, timeout_s: float) -> dict[str, Any]:
        assert self._driver is not None and self._driver.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._driver.stdout, selectors.EVENT_READ)
            assert selector.select(timeout_s), f"the driver says nothing in {timeout_s} s"
        line = self._driver.stdout.readline()
        assert line, "the driver has ended: " + self.driver_log()
        return dict(json.loads(line))

    def driver_log(self) -> str:
        return (self.where("front-0").directory / "driver.log").read_text()[-4000:]

    def where(self, name: str) -> Host:
        """The host of a node, the front or the head."""
        return next(host for host, names in self._roles.items() if name in names)

    def view(self, number: int | None = None) -> dict[str, Any]:
        """/cluster of a front; None: of whichever answers."""
        url = self.url
        if number is not None and len(self.front_ids) > 1:
            url = url.replace(f":{FRONT_PORT}", f":{FRONT_PORT + 1 + number}")
        with self.network.client_side():
            return dict(httpx.get(f"{url}/cluster", timeout=5.0).json())

    def node_states(self) -> dict[str, str]:
        """ "up", "down", ... of each node, as a front sees it."""
        return {node["node_id"]: node["state"] for node in self.view()["nodes"]}

    def pid(self, node_id: str) -> int:
        """The machine's id of a node's process (of the incarnation that the front knows)."""
        node = next(each for each in self.view()["nodes"] if each["node_id"] == node_id)
        return self.where(node_id).pid_of(node["pid"])

    def front_pids(self) -> dict[str, int]:
        """The machine's ids of the fronts' processes; those that answer."""
        answers = self.ask("fronts")
        host = self.where("front-0")
        pids = {name: each["pid"] for name, each in answers.items()}
        return {name: host.pid_of(pid) for name, pid in pids.items() if isinstance(pid, int)}

    def census(self) -> dict[str, tuple[int, int]]:
        """Sockets and threads of every node and front."""
        pids = {node_id: self.pid(node_id) for node_id in self.node_ids} | self.front_pids()
        return {name: self.where(name).sockets_and_threads(pid) for name, pid in pids.items()}

    def wait_until_ready(self, timeout_s: float) -> float:
        """Until every front sees every node up."""

        def is_ready() -> bool:
            try:
                views = [self.view(number) for number in range(len(self.front_ids))]
            except httpx.HTTPError:
                return False
            states = [{node["node_id"]: node["state"] for node in view["nodes"]} for view in views]
            return all(each.get(node_id) == "up" for each in states for node_id in self.node_ids)

        return wait_for(is_ready, timeout_s, "all nodes to be up")

    # ---- what must hold ----

    def audits(self) -> dict[str, dict[str, Any]]:
        """Checks the invariants of every node; its counters."""
        answers = self.ask("audit")
        silent = [node_id for node_id, each in answers.items() if each.get("is_silent")]
        if silent:
            raise NotAnsweringError(f"{silent}: {answers}")
        faults = {node_id: each["error"] for node_id, each in answers.items() if "error" in each}
        assert not faults, faults
        return {node_id: each["stats"] for node_id, each in answers.items()}

    def assert_settles(self) -> dict[str, dict[str, Any]]:
        """All pools are empty soon, but for pages that are counted as quarantined."""
        last: dict[str, dict[str, Any]] = {}

        def is_settled() -> bool:
            try:
                last.update(self.audits())
            except NotAnsweringError:
                return False  # its session is up before Ray's call gets through
            return all(_num_leaked(stats) == 0 for stats in last.values())

        try:
            wait_for(is_settled, SETTLE_TIMEOUT_S, "empty pools")
        except AssertionError as error:
            leaked = {node_id: _num_leaked(stats) for node_id, stats in last.items()}
            raise AssertionError(f"pools do not empty: {leaked}") from error
        return last


def num_quarantined(stats: dict[str, Any]) -> int:
    """Pages that wait for the proof that nobody writes to, or reads from, them any more."""
    on_decode = 2 * stats.get("host_pages_quarantined", 0)  # each has its index page
    return int(on_decode + stats.get("device_pages_quarantined", 0))


def _num_leaked(stats: dict[str, Any]) -> int:
    """Pages and seats that are neither free nor quarantined."""
    pools = ("host_pages", "index_pages", "seats", "device_pages")
    held = sum(
        stats[f"{pool}_total"] - stats[f"{pool}_free"] for pool in pools if f"{pool}_free" in stats
    )
    return int(held) - num_quarantined(stats)


def _tree(dotted: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for name, value in dotted.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree


@contextmanager
def multinode_cluster(
    roles: Sequence[str], settings: dict[str, Any] | None = None
) -> Iterator[RayCluster]:
    """A started cluster; every process, namespace and file of it is gone afterwards."""
    network = Network(len(roles))
    try:
        cluster = RayCluster(network, roles, settings)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
    finally:
        network.close()
