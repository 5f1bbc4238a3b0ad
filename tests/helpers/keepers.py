"""Processes around a keeper: owners and guests of its memory, as scripts that say what they find."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
found = int(segment.part("kv")[0])
segment.part("kv")[0] += 1
print(segment.generation, found, flush=True)
time.sleep(60)
"""
WATCHFUL_OWNER = """
import os, sys, time
from functools import partial
from pathlib import Path
from tidepool.decode_node.journal import Shape
from tidepool.decode_node.keeper_watch import KeeperWatch
from tidepool.decode_node.kept import KeptMemory
from tidepool.deploy.keeping import find_or_start
from tidepool.hostpool.segment import SharedSegment
path, idle_s, anchor = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
start = partial(find_or_start, path, idle_s=idle_s, anchor_pid=anchor)
link = start()
segment = link.own(5.0)
is_fresh = segment is None
if is_fresh:
    segment = SharedSegment.create({"kv": 4096}, identity="test", what="test")
    link.hold(segment)
segment.part("kv")[0] += 1
kept = KeptMemory(segment, link, Shape(1, 1, 1), is_fresh)
watch = KeeperWatch(kept, start, time.monotonic)
print("owns", flush=True)
while watch.num_restarts == 0:
    watch.poll()
    time.sleep(0.01)
print("replaced", kept.link.num_earlier_guests(), flush=True)
time.sleep(60)
"""
GUEST = """
import sys, time
from pathlib import Path
from tidepool.hostpool.keeper_link import KeeperLink
link = KeeperLink(Path(sys.argv[1]))
segment = link.borrow()
segment.part("kv")[1] = 77
print("mapped", link._ticket, flush=True)
sys.stdin.readline()
print(link.give_back(), flush=True)
time.sleep(60)
"""


class Child:
    """A process of the test, and what it said first."""

    def __init__(self, script: str, *arguments: object) -> None:
        command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )
        self.said = self.hear()

    def hear(self) -> list[str]:
        """The next line, in words."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def nudge(self) -> None:
        """Lets a guest give back."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10.0)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def children(path: Path) -> Iterator[Callable[..., Child]]:
    """Starts processes at the keeper of `path`; behind it neither they nor the keeper are there."""
    started: list[Child] = []

    def start(script: str = OWNER, idle_s: float = 30.0, anchor: int | None = None) -> Child:
        arguments = (path, idle_s, os.getpid() if anchor is None else anchor)
        started.append(Child(script, *arguments))
        return started[-1]

    yield start
    for child in started:
        child.kill()
    for pid in keepers_of(path):
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not keepers_of(path))
    assert not path.exists()


def keepers_of(path: Path) -> list[int]:
    """Keepers that listen at `path`: their pids."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(path).encode() in words and any(b"keeper.py" in word for word in words):
                found.append(int(process.name))
    return found


def kill_keeper(path: Path) -> None:
    """With SIGKILL; the one that is there."""
    (keeper,) = keepers_of(path)
    os.kill(keeper, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
