"""Faults of hosts, links, Ray and processes, and a timeline of what every side saw of them.

    faults = Faults(cluster)
    with faults.link_down(cluster.where("prefill-0")):
        ...
    print(faults.timeline())

A fault that heals is a context manager; one that does not is a method. Each notes the moment of its
injection (and of its healing) on the machine's clock, which all hosts share; `timeline` puts these
beside the log lines of the nodes and the front. Used from one thread.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from multinode.hosts import Host, has_ended, run, wait_for
from multinode.ray_cluster import RayCluster

Direction = Literal["to", "from"]
_LOG_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \[([\w-]+)\] \w+ (.*)$")
_RESET_S = 0.3


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One line of the timeline: seconds since the epoch, who, what."""

    time_s: float
    who: str
    text: str


class Faults:
    """See the module."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster = cluster
        self.begin_s = time.time()
        self.entries: list[Entry] = []

    def note(self, text: str) -> float:
        """Adds a line to the timeline; returns its time on the monotonic clock."""
        self.entries.append(Entry(time.time(), "FAULT", text))
        return time.monotonic()

    @property
    def injected_s(self) -> float:
        """Time of the last note, seconds since the epoch."""
        return self.entries[-1].time_s

    # ---- links ----

    @contextmanager
    def link_down(self, host: Host) -> Iterator[None]:
        """The cable is out: a partition in both directions, silent."""
        host.set_link(False)
        self.note(f"{host.name}: link down")
        try:
            yield
        finally:
            host.set_link(True)
            self.note(f"{host.name}: link up")

    @contextmanager
    def one_way_loss(self, host: Host, direction: Direction) -> Iterator[None]:
        """Everything "to" the host is lost, or everything "from" it."""
        with self._filtered([host], {direction: "drop"}, f"all packets {direction} it are lost"):
            yield

    @contextmanager
    def cut_between(self, host: Host, other: Host) -> Iterator[None]:
        """The two hosts cannot reach each other; everybody else can reach both."""
        rules: dict[Direction, str] = {
            "to": f"ip saddr {other.address} drop",
            "from": f"ip daddr {other.address} drop",
        }
        with self._filtered([host], rules, f"cut off from {other.name}"):
            yield

    @contextmanager
    def random_loss(self, hosts: Sequence[Host], percent: int) -> Iterator[None]:
        """Each packet to a host is lost with this probability."""
        rule = f"numgen random mod 100 < {percent} drop"
        with self._filtered(hosts, {"to": rule}, f"{percent} % of packets are lost"):
            yield

    def reset_connections(self, host: Host) -> None:
        """Every TCP connection in use over the host's link is reset on both ends."""
        rule = "meta l4proto tcp reject with tcp reset"
        with self._filtered([host], {"to": rule, "from": rule}, "connections are reset"):
            time.sleep(_RESET_S)

    @contextmanager
    def rate_limit(self, hosts: Sequence[Host], mbit: int) -> Iterator[None]:
        """What a host sends is held to this rate."""
        shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms")
        for host in hosts:
            run("tc", "-n", host.namespace, "qdisc", "add", "dev", "eth0", *shape)
            self.note(f"{host.name}: {mbit} Mbit/s")
        try:
            yield
        finally:
            for host in hosts:
                run("tc", "-n", host.namespace, "qdisc", "del", "dev", "eth0", "root")
                self.note(f"{host.name}: full rate")

    @contextmanager
    def delay(self, host: Host, delay_s: float) -> Iterator[None]:
        """Everything to and from the host takes this much longer, each way."""
        line = host.delay_line(delay_s)
        self.note(f"{host.name}: {delay_s * 1e3:.0f} ms delay each way")
        try:
            yield
        finally:
            host.end_delay(line)
            self.note(f"{host.name}: no delay")

    @contextmanager
    def _filtered(
        self, hosts: Sequence[Host], rules: dict[Direction, str], what: str
    ) -> Iterator[None]:
        hooks = {"to": ("input", "iifname"), "from": ("output", "oifname")}
        lines = []
        for direction, rule in rules.items():
            hook, device = hooks[direction]
            lines.append(
                f"add chain inet faults {direction} {{ type filter hook {hook} priority 0; }}"
            )
            lines.append(f'add rule inet faults {direction} {device} "eth0" {rule}')
        for host in hosts:
            self._nft(host, "\n".join(["add table inet faults", *lines]))
            self.note(f"{host.name}: {what}")
        try:
            yield
        finally:
            for host in hosts:
                if host.is_up:
                    self._nft(host, "delete table inet faults")
                self.note(f"{host.name}: packets pass again")

    def _nft(self, host: Host, command: str) -> None:
        run("ip", "netns", "exec", host.namespace, "nft", command)

    # ---- hosts ----

    def power_off(self, host: Host) -> None:
        self.note(f"{host.name}: power off")
        self.cluster.power_off(host)

    def boot(self, host: Host) -> None:
        self.cluster.boot(host)
        self.note(f"{host.name}: booted")

    # ---- processes ----

    def kill_actor(self, node_id: str) -> None:
        """kill -9 of a node's process."""
        pid = self.cluster.pid(node_id)
        os.kill(pid, signal.SIGKILL)
        self.note(f"{node_id}: process killed")

    def kill_front(self, front_id: str = "front-0") -> None:
        """kill -9 of a front's process; returns once the kernel has taken its sockets."""
        pid = self.cluster.front_pids()[front_id]
        os.kill(pid, signal.SIGKILL)
        self.note(f"{front_id}: process killed")
        wait_for(lambda: has_ended(pid), 10.0, f"{front_id} to end")

    @contextmanager
    def stopped_actor(self, node_id: str) -> Iterator[None]:
        """SIGSTOP: the process hangs, its sockets stay open."""
        with self._stopped([self.cluster.pid(node_id)], node_id):
            yield

    @contextmanager
    def stopped_raylet(self, host: Host) -> Iterator[None]:
        """SIGSTOP of Ray's daemon on a host; the node's process goes on."""
        with self._stopped(host.pids_named("raylet/raylet"), f"raylet of {host.name}"):
            yield

    @contextmanager
    def _stopped(self, pids: Sequence[int], what: str) -> Iterator[None]:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        self.note(f"{what}: stopped (SIGSTOP)")
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self.note(f"{what}: goes on (SIGCONT)")

    # ---- what every side saw ----

    def timeline(self) -> str:
        """Injections and log lines of all nodes since this object was made, in order."""
        entries = list(self.entries)
        for host in self.cluster.network.hosts:
            for path in host.directory.parent.glob(
                f"{host.name}*/ray/session_2*/logs/worker-*.err"
            ):
                entries += self._read(path.read_text(errors="replace"))
        base_s = self.entries[0].time_s if self.entries else self.begin_s
        return "\n".join(
            f"{each.time_s - base_s:+9.3f} s  {each.who:10} {each.text}" for each in sorted(entries)
        )

    def _read(self, text: str) -> Iterator[Entry]:
        for line in text.splitlines():
            match = _LOG_LINE.match(line)
            if match is None:
                continue
            moment = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            if moment >= self.begin_s:
                yield Entry(moment, match[2], match[3])
