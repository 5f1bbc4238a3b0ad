"""Hosts on one machine: network namespaces with mounts and process ids of their own.

Owns the namespaces, the bridge between them and every process started in them; used by the tests of
this folder and by benchmarks/recovery.py, from one thread (children end with the thread that made
them). Needs root. Always holds: nothing touches an interface or a mount of the machine itself; all
names begin with NAME_PREFIX and our process id, and what dead runs left under it is removed at start.

| namespace        | holds                                                             |
|------------------|-------------------------------------------------------------------|
| <prefix>-<pid>-0 | the bridge with a port for each host; clients run here            |
| <prefix>-<pid>-n | eth0 with the address SUBNET.n, and all processes of host n       |
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

NAME_PREFIX = "tidepool"
SUBNET = "10.77.0"
CLIENT_ADDRESS = f"{SUBNET}.254"
BOOT_TIMEOUT_S = 10.0
_CARD = "02:00:00:00:00:{:02x}"
"""Hardware addresses. A bridge without one of its own changes it with its ports."""
_DIRECTORY_PREFIX = f"{NAME_PREFIX}-hosts-"
_CLONE_NEWNET = 0x40000000
_DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_LIBC = ctypes.CDLL(None, use_errno=True)
_INIT = """
mount -t tmpfs tmpfs /dev/shm
mkdir -p "$1/ray" && mount --bind "$1/ray" /tmp/ray
echo ready
while :; do sleep 3600 & wait $!; done
"""


def run(*command: str) -> str:
    """Runs a command to its end; AssertionError with its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
    return done.stdout


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only its last thread is left, a zombie: its files are closed.

    The first thread may be a zombie while others still hold the files.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in "ZX" and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


class Host:
    """One host. `boot` creates its network and its process 1; `power_off` ends both at once."""

    def __init__(self, network: Network, number: int) -> None:
        self.number = number
        self.name = f"host{number}"
        self.address = f"{SUBNET}.{number}"
        self.namespace = network.namespace(number)
        self.directory = network.directory / self.name
        self._switch = network.namespace(0)
        self._init: subprocess.Popen[str] | None = None

    @property
    def is_up(self) -> bool:
        return self._init is not None

    @property
    def ray_directory(self) -> Path:
        """What its processes know as /tmp/ray."""
        return self.directory / "ray"

    def boot(self) -> None:
        run("ip", "netns", "add", self.namespace)
        port = f"port{self.number}"
        add = ("link", "add", port, "type", "veth", "peer", "name", "eth0")
        run("ip", "-n", self._switch, *add, "netns", self.namespace)
        # The same card after each boot: the others remember its address.
        self.ip("link", "set", "eth0", "address", _CARD.format(self.number))
        run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
        self.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")
        self.ip("link", "set", "lo", "up")
        self.directory.mkdir(parents=True, exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)  # a mount point
        namespace = ("ip", "netns", "exec", self.namespace)
        isolate = ("unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child")
        self._init = subprocess.Popen(
            (*_DIE_WITH_US, *namespace, *isolate, "bash", "-c", _INIT, "init", self.directory),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == "ready\n", f"{self.name} does not boot"

    def power_off(self) -> None:
        """Cuts the link, then ends every process: nobody hears a reset or a goodbye."""
        if self._init is None:
            return
        self.set_link(False)
        os.kill(self._process_1(), signal.SIGKILL)
        self._init.wait(BOOT_TIMEOUT_S)
        assert self._init.stdout is not None
        self._init.stdout.close()
        self._init = None
        run("ip", "-n", self._switch, "link", "del", f"port{self.number}")
        run("ip", "netns", "del", self.namespace)

    def set_link(self, is_up: bool) -> None:
        """The cable to the switch."""
        state = "up" if is_up else "down"
        run("ip", "-n", self._switch, "link", "set", f"port{self.number}", state)

    def delay_line(self, delay_s: float) -> subprocess.Popen[str]:
        """Puts a process between the host's port and the switch (delay.py)."""
        port, tap = f"port{self.number}", f"tap{self.number}"
        run("ip", "-n", self._switch, "link", "set", port, "nomaster", "arp", "off")
        script = str(Path(__file__).with_name("delay.py"))
        command = (sys.executable, script, port, tap, str(delay_s))
        line = subprocess.Popen(
            (*_DIE_WITH_US, "ip", "netns", "exec", self._switch, *command),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert line.stdout is not None
        assert line.stdout.readline() == "ready\n", f"no delay line for {self.name}"
        run("ip", "-n", self._switch, "link", "set", tap, "master", "bridge", "up")
        return line

    def end_delay(self, line: subprocess.Popen[str]) -> None:
        line.kill()
        line.wait(BOOT_TIMEOUT_S)
        assert line.stdout is not None
        line.stdout.close()
        port = f"port{self.number}"
        run("ip", "-n", self._switch, "link", "set", port, "arp", "on", "master", "bridge")

    def ip(self, *arguments: str) -> None:
        run("ip", "-n", self.namespace, *arguments)

    def inside(self, *command: str) -> tuple[str, ...]:
        """The command line that runs `command` among the host's processes."""
        nsenter = ("nsenter", "-t", str(self._process_1()), "--net", "--mount", "--pid")
        return (*nsenter, "--wd=/tmp", *command)

    def start(
        self, *command: str, env: Mapping[str, str], log: Path, pipes: bool = False
    ) -> subprocess.Popen[str]:
        """Starts a process of the host; `pipes`: its stdin and stdout are the caller's."""
        channel = subprocess.PIPE if pipes else subprocess.DEVNULL
        with log.open("ab") as file:
            return subprocess.Popen(
                (*_DIE_WITH_US, *self.inside(*command)),
                stdin=channel,
                stdout=channel if pipes else file,
                stderr=file,
                text=True,
                env=dict(env),
            )

    def pid_of(self, inner_pid: int) -> int:
        """The machine's id of the process that the host knows as `inner_pid`."""
        for process in self._processes():
            status = (process / "status").read_text()
            line = next(each for each in status.splitlines() if each.startswith("NSpid:"))
            if line.split()[-1] == str(inner_pid):
                return int(process.name)
        raise AssertionError(f"{self.name} has no process {inner_pid}")

    def pids_named(self, text: str) -> list[int]:
        """The machine's ids of the host's processes whose command line contains `text`."""
        found = []
        for process in self._processes():
            with contextlib.suppress(OSError):
                if text in (process / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(int(process.name))
        return found

    def sockets_and_threads(self, pid: int) -> tuple[int, int]:
        """Open sockets and threads of one process (the machine's id)."""
        num_sockets = 0
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                num_sockets += os.readlink(entry).startswith("socket:")
        return num_sockets, len(list(Path(f"/proc/{pid}/task").iterdir()))

    def _processes(self) -> list[Path]:
        """/proc entries of all processes in the host's process id namespace."""
        mine = os.readlink(f"/proc/{self._process_1()}/ns/pid")
        found = []
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdecimal() and os.readlink(process / "ns" / "pid") == mine:
                    found.append(process)
        return found

    def _process_1(self) -> int:
        assert self._init is not None, f"{self.name} is off"
        pid = self._init.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1, f"{self.name} has no process 1"
        return int(children[0])


class Network:
    """A switch and its hosts, numbered from 1; removed by `close`, whatever happened before."""

    def __init__(self, num_hosts: int) -> None:
        assert os.geteuid() == 0, "hosts are network namespaces: run as root"
        remove_leftovers()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{_DIRECTORY_PREFIX}{os.getpid()}-"))
        self.hosts = [Host(self, number) for number in range(1, num_hosts + 1)]
        try:
            self._build_switch()
            for host in self.hosts:
                host.boot()
        except BaseException:
            self.close()
            raise

    def namespace(self, number: int) -> str:
        return f"{NAME_PREFIX}-{os.getpid()}-{number}"

    def host(self, number: int) -> Host:
        return self.hosts[number - 1]

    def close(self) -> None:
        for host in self.hosts:
            with contextlib.suppress(AssertionError, OSError, subprocess.TimeoutExpired):
                host.power_off()
        _delete_namespaces(f"{NAME_PREFIX}-{os.getpid()}-")
        shutil.rmtree(self.directory, ignore_errors=True)

    @contextlib.contextmanager
    def client_side(self) -> Iterator[None]:
        """Sockets that this thread opens inside belong to the switch's namespace."""
        with open("/proc/thread-self/ns/net") as home:
            _enter(self.namespace(0))
            try:
                yield
            finally:
                _set_namespace(home.fileno())

    def _build_switch(self) -> None:
        switch = self.namespace(0)
        run("ip", "netns", "add", switch)
        for arguments in (
            ("link", "add", "bridge", "address", _CARD.format(254), "type", "bridge"),
            ("addr", "add", f"{CLIENT_ADDRESS}/24", "dev", "bridge"),
            ("link", "set", "bridge", "up"),
            ("link", "set", "lo", "up"),
        ):
            run("ip", "-n", switch, *arguments)


def remove_leftovers() -> None:
    """Deletes the namespaces and directories of runs whose process is gone."""
    for name in _namespaces():
        if name.startswith(f"{NAME_PREFIX}-") and _is_of_dead_run(name, f"{NAME_PREFIX}-"):
            _delete_namespaces(name)
    for directory in Path(tempfile.gettempdir()).glob(f"{_DIRECTORY_PREFIX}*"):
        if _is_of_dead_run(directory.name, _DIRECTORY_PREFIX):
            shutil.rmtree(directory, ignore_errors=True)


def _is_of_dead_run(name: str, prefix: str) -> bool:
    pid = name.removeprefix(prefix).partition("-")[0]
    return pid.isdecimal() and not Path(f"/proc/{pid}").exists()


def _namespaces() -> Sequence[str]:
    return [line.split()[0] for line in run("ip", "netns", "list").splitlines()]


def _delete_namespaces(prefix: str) -> None:
    for name in _namespaces():
        if name.startswith(prefix):
            with contextlib.suppress(AssertionError):
                run("ip", "netns", "del", name)


def _enter(namespace: str) -> None:
    with open(f"/run/netns/{namespace}") as file:
        _set_namespace(file.fileno())


def _set_namespace(descriptor: int) -> None:
    """setns of the calling thread."""
    if _LIBC.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def wait_for(condition: object, timeout_s: float, what: str) -> float:
    """Polls a callable until it is true; returns the seconds it took."""
    assert callable(condition)
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)
    return time.monotonic() - begin
