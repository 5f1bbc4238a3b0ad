"""The keeper of a node: real processes, real deaths."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.keepers import GUEST, Child, children, keepers_of, wait_until

from tidepool.common.errors import SegmentError
from tidepool.deploy.keeping import find_or_start, keeper_path
from tidepool.hostpool.keeper_link import KeeperLink
from tidepool.hostpool.segment import SharedSegment


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return keeper_path("run", "decode-0", tmp_path)


@pytest.fixture
def start(path: Path) -> Iterator[Callable[..., Child]]:
    with children(path) as start:
        yield start


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
    assert guest.said[0] == "mapped"
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
    assert later.give_back()
    link.end()
    for each in (link, later):
        each.close()


def test_a_guest_counts_until_it_gives_back_whatever_becomes_of_its_connection(
    path: Path, start: Callable[..., Child]
) -> None:
    owner = start()
    guest = KeeperLink(path)
    guest.borrow()
    guest._socket.close()
    os.kill(owner.process.pid, signal.SIGKILL)
    link = KeeperLink(path)
    assert link.own(5.0) is not None
    assert link.num_earlier_guests() == 1
    assert guest.give_back()
    assert link.num_earlier_guests() == 0
    link.end()
    link.close()


def test_nobody_gives_back_for_another(path: Path, start: Callable[..., Child]) -> None:
    owner = start()
    guest = start(GUEST)
    os.kill(owner.process.pid, signal.SIGKILL)
    link = KeeperLink(path)
    assert link.own(5.0) is not None
    link._insist({"do": "return", "ticket": int(guest.said[1])})
    assert link.num_earlier_guests() == 1
    link.end()
    link.close()


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
    for packet in (
        b"{",
        b"[]",
        b"null",
        b'{"do": 5}',
        b'{"do": "own", "x": [1]}',
        b'{"do": "borrow"}',
        bytes(4096),
    ):
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
