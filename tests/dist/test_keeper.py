"""The keeper of a node: real processes, real deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tidepool.common.errors import SegmentError
from tidepool.deploy.keeping import find_or_start, keeper_path
from tidepool.hostpool.keeper_link import KeeperLink
from tidepool.hostpool.segment import SharedSegment

OWNER = """
import os, sys, time
from pathlib import Path
from tidepool.deploy.keeping import find_or_start
from tidepool.hostpool.segment import SharedSegment
link = find_or_start(Path(sys.argv[1]), idle_s=float(sys.argv[2]), anchor_pid=int(sys.argv[3]))
segment = link.own(5.0)
if segment is None:
    segment = SharedSegment.create({"kv": 4096}, identity="test", what="test")
    link.hold(segment)
else:
    segment.begin_generation()
print(segment.generation, int(segment.part("kv")[0]), flush=True)
segment.part("kv")[0] += 1
time.sleep(60)
"""
GUEST = """
import sys, time
from pathlib import Path
from tidepool.hostpool.keeper_link import KeeperLink
link = KeeperLink(Path(sys.argv[1]))
segment = link.borrow()
segment.part("kv")[1] = 77
print("mapped", flush=True)
time.sleep(60)
"""


class Child:
    """A process of the test, and what it said first."""

    def __init__(self, script: str, *arguments: object) -> None:
        command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().split()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10.0)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return keeper_path("run", "decode-0", tmp_path)


@pytest.fixture
def start(path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(script: str = OWNER, idle_s: float = 30.0, anchor: int | None = None) -> Child:
        arguments = (path, idle_s, os.getpid() if anchor is None else anchor)
        children.append(Child(script, *arguments))
        return children[-1]

    yield start
    for child in children:
        child.kill()
    for pid in keepers_of(path):
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not keepers_of(path))
    assert not path.exists()


def keepers_of(path: Path) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if str(path).encode() in (process / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(process.name))
            except OSError:
                continue
    return [pid for pid in found if b"keeper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_memory_outlives_owners_that_are_killed_and_each_finds_what_the_last_wrote(
    path: Path, start: Callable[..., Child]
) -> None:
    for number in range(3):
        owner = start()
        assert owner.said == [str(number + 1), str(number)]
        assert len(keepers_of(path)) == 1
        os.kill(owner.process.pid, signal.SIGKILL)


def test_the_socket_is_private(path: Path, start: Callable[..., Child]) -> None:
    start()
    assert path.stat().st_mode & 0o777 == 0o600


def test_there_is_one_owner_at_a_time_and_the_next_waits_for_its_end(
    path: Path, start: Callable[..., Child]
) -> None:
    owner = start()
    link = KeeperLink(path)
    with pytest.raises(SegmentError, match="owner that lives"):
        link.own(0.1)
    with pytest.raises(SegmentError, match="not for you"):
        link.hold(SharedSegment.create({"kv": 1}, identity="", what=""))
    link.end()
    assert keepers_of(path), "only the owner ends it"
    os.kill(owner.process.pid, signal.SIGKILL)
    segment = link.own(5.0)
    assert segment is not None
    assert int(segment.part("kv")[0]) == 1
    link.end()
    wait_until(lambda: not keepers_of(path))
    link.close()


def test_a_guest_shares_the_memory_and_the_next_owner_hears_that_it_lives(
    path: Path, start: Callable[..., Child]
) -> None:
    owner = start()
    guest = start(GUEST)
    assert guest.said == ["mapped"]
    os.kill(owner.process.pid, signal.SIGKILL)
    link = KeeperLink(path)
    segment = link.own(5.0)
    assert segment is not None
    assert int(segment.part("kv")[1]) == 77
    later = KeeperLink(path)
    later.borrow()
    assert link.num_earlier_guests() == 1, "the guest of the owner of now does not count"
    guest.kill()
    wait_until(lambda: link.num_earlier_guests() == 0)
    for each in (link, later):
        each.end()
        each.close()


def test_the_keeper_ends_with_its_anchor(path: Path, start: Callable[..., Child]) -> None:
    anchor = subprocess.Popen(["sleep", "60"])
    start(anchor=anchor.pid)
    assert keepers_of(path)
    anchor.kill()
    anchor.wait(10.0)
    wait_until(lambda: not keepers_of(path) and not path.exists())


def test_the_keeper_ends_when_nobody_owns_it_for_long(
    path: Path, start: Callable[..., Child]
) -> None:
    start(idle_s=0.3).kill()
    wait_until(lambda: not keepers_of(path) and not path.exists())


def test_a_quiet_keeper_counts_as_alive_until_it_is_killed(
    path: Path, start: Callable[..., Child]
) -> None:
    start()
    link = KeeperLink(path)
    try:
        assert link.is_alive
        (keeper,) = keepers_of(path)
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not link.is_alive)
    finally:
        link.close()
    path.unlink()  # as its successor would


def test_a_keeper_that_is_killed_is_replaced_by_an_empty_one(
    path: Path, start: Callable[..., Child]
) -> None:
    start()
    (pid,) = keepers_of(path)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not keepers_of(path))
    assert start().said == ["1", "0"]


def test_rubbish_is_refused_and_the_keeper_lives_on(
    path: Path, start: Callable[..., Child]
) -> None:
    start()
    for packet in (b"{", b"[]", b"null", b'{"do": 5}', b'{"do": "own", "x": [1]}', bytes(4096)):
        link = KeeperLink(path)
        link._socket.sendall(packet)
        assert b'"ok": false' in link._socket.recv(4096)
        link.close()
    link = KeeperLink(path)
    assert link.borrow().identity == "test"
    link.close()


def test_no_keeper_is_an_error_that_says_where(path: Path) -> None:
    with pytest.raises(SegmentError, match="no keeper answers at"):
        KeeperLink(path)
    with pytest.raises(SegmentError, match="does not start"):
        find_or_start(path, idle_s=1.0, anchor_pid=2**22 - 3)
    assert not path.exists()
