"""A keeper that ends while its node lives has a successor, which knows who may write: real processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers.engines import exact_config
from helpers.keepers import (
    GUEST,
    WATCHFUL_OWNER,
    Child,
    children,
    keepers_of,
    kill_keeper,
    wait_until,
)
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, session_checkpoint

from tidepool.common.errors import SegmentError
from tidepool.decode_node.node import build_node
from tidepool.deploy import keeper
from tidepool.deploy.cluster_secret import forget, with_local_secret
from tidepool.deploy.keeping import find_or_start, keeper_path, keeper_starter
from tidepool.hostpool import segment as segments
from tidepool.hostpool.keeper_link import KeeperLink
from tidepool.hostpool.segment import SharedSegment
from tidepool.transfer.node import Node

SEED = VETTED_SEEDS["glm5"][0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return keeper_path("run", "decode-0", tmp_path)


@pytest.fixture
def start(path: Path) -> Iterator[Callable[..., Child]]:
    with children(path) as start:
        yield start


def next_owner(path: Path, owner: Child) -> tuple[KeeperLink, SharedSegment]:
    """The owner is killed; this process comes after it."""
    os.kill(owner.process.pid, signal.SIGKILL)
    link = KeeperLink(path)
    segment = link.own(10.0)
    assert segment is not None, "the memory is lost"
    return link, segment


def end(link: KeeperLink) -> None:
    link.end()
    link.close()


def test_the_next_owner_finds_the_memory_and_hears_of_guests_of_the_keeper_that_was_killed(
    path: Path, start: Callable[..., Child]
) -> None:
    owner = start(WATCHFUL_OWNER)
    guest = start(GUEST)
    assert guest.said[0] == "mapped"
    kill_keeper(path)
    assert owner.hear() == ["replaced", "0"], "its own guest is no earlier one"
    link, segment = next_owner(path, owner)
    assert segment.part("kv")[:2].tolist() == [1, 77]
    assert link.num_earlier_guests() == 1
    guest.kill()
    wait_until(lambda: link.num_earlier_guests() == 0)
    end(link)


def test_a_guest_gives_back_to_the_keeper_that_came_after_its_own(
    path: Path, start: Callable[..., Child]
) -> None:
    owner = start(WATCHFUL_OWNER)
    guest = start(GUEST)
    kill_keeper(path)
    assert owner.hear() == ["replaced", "0"]
    link, _ = next_owner(path, owner)
    assert link.num_earlier_guests() == 1
    guest.nudge()
    assert guest.hear() == ["True"]
    assert link.num_earlier_guests() == 0
    assert guest.process.poll() is None
    end(link)


def test_a_guest_that_gives_back_while_there_is_no_keeper_waits_for_the_next(
    path: Path, start: Callable[..., Child]
) -> None:
    link = find_or_start(path, idle_s=30.0, anchor_pid=os.getpid())
    link.own(0.0)
    segment = SharedSegment.create({"kv": 4096}, identity="test", what="test")
    link.hold(segment)
    guest = start(GUEST)
    kill_keeper(path)
    wait_until(lambda: not link.is_alive)
    link.close()
    guest.nudge()
    link = find_or_start(path, idle_s=30.0, anchor_pid=os.getpid())
    link.own(0.0)
    stranger = KeeperLink(path)
    stranger._ticket = int(guest.said[1])
    assert not stranger._return_to(stranger), "nobody is let off before the guests are known"
    stranger.close()
    link.hold(segment)
    assert guest.hear() == ["True"]
    ledger = os.pread(segment.descriptor, 32, keeper.LEDGER_AT)
    assert ledger == bytes(32)
    end(link)


def test_guests_of_an_earlier_owner_are_still_earlier_ones_for_the_next_keeper(
    path: Path, start: Callable[..., Child]
) -> None:
    first = start(WATCHFUL_OWNER)
    guest = start(GUEST)
    os.kill(first.process.pid, signal.SIGKILL)
    second = start(WATCHFUL_OWNER)
    kill_keeper(path)
    assert second.hear() == ["replaced", "1"]
    guest.kill()
    link, _ = next_owner(path, second)
    assert link.num_earlier_guests() == 0
    end(link)


def test_an_entry_of_a_process_that_has_ended_counts_for_nobody_who_got_its_number(
    path: Path, start: Callable[..., Child]
) -> None:
    owner = start(WATCHFUL_OWNER)
    first, second = KeeperLink(path), KeeperLink(path)
    memory = first.borrow()
    second.borrow()
    entry = list(keeper._ENTRY.unpack(os.pread(memory.descriptor, 32, keeper.LEDGER_AT)))
    assert entry[1] == os.getpid()
    entry[2] -= 1  # another process had this number once
    kill_keeper(path)
    os.pwrite(memory.descriptor, keeper._ENTRY.pack(*entry), keeper.LEDGER_AT)
    assert owner.hear()[0] == "replaced"
    link, _ = next_owner(path, owner)
    assert link.num_earlier_guests() == 1, "the second of this process's, not the first"
    for each in (first, second):
        each.close()
    end(link)


def test_memory_and_keeper_agree_on_where_the_ledger_is() -> None:
    assert keeper.LEDGER_AT == segments.LEDGER_AT
    assert keeper.MAX_GUESTS * keeper._ENTRY.size <= segments.HEADER_BYTES - segments.LEDGER_AT


def test_no_keeper_is_started_for_a_process_that_has_lost_its_parent(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = keeper_starter(path, idle_s=1.0)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(SegmentError, match="has ended"):
        start()
    assert not path.exists()


@pytest.fixture
def node(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A decode node, running, with a keeper."""
    model = session_checkpoint(tmp_path_factory, "glm5", SEED)
    config, secret = with_local_secret(
        exact_config(model, **{"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4})
    )
    fatal: list[BaseException] = []
    start = partial(find_or_start, path, idle_s=60.0, anchor_pid=os.getpid())
    node = build_node(
        config,
        node_id="decode-0",
        bind_host="127.0.0.1",
        on_fatal=fatal.append,
        link=start(),
        start_keeper=start,
    )
    node.start()
    yield node
    node.stop()
    forget(secret)
    assert not fatal
    assert not keepers_of(path)


def test_a_node_replaces_its_keeper_again_and_again_and_ends_the_last_when_it_stops(
    node: Node, path: Path
) -> None:
    for number in range(1, 4):
        kill_keeper(path)
        wait_until(lambda n=number: node.info()["stats"]["keeper_restarts"] == n)
        assert node.info()["stats"]["has_keeper"]
    (last,) = keepers_of(path)
    assert any("memfd:tidepool" in os.readlink(each) for each in Path(f"/proc/{last}/fd").iterdir())
    node.stop()
    wait_until(lambda: not keepers_of(path))


def test_a_node_that_stops_while_its_keeper_is_being_replaced_leaves_none(
    node: Node, path: Path
) -> None:
    kill_keeper(path)
    wait_until(lambda: not node.info()["stats"]["has_keeper"])
    node.stop()
    wait_until(lambda: not keepers_of(path))


def test_a_node_that_cannot_stop_gives_its_memory_up_first(node: Node, path: Path) -> None:
    """As a cluster's stop waits for a while, and then kills."""
    hung, goes_on = threading.Event(), threading.Event()

    class Hang:
        @property
        def done(self) -> threading.Event:
            hung.set()
            goes_on.wait(60.0)
            return threading.Event()

    node._step_loop._engines[0].handle = lambda event: bool(event.done)  # type: ignore[method-assign]
    node._step_loop.post(Hang())
    assert hung.wait(10.0)
    stopping = threading.Thread(target=node.stop)
    stopping.start()
    try:
        wait_until(lambda: not keepers_of(path))
        assert stopping.is_alive()
    finally:
        goes_on.set()
        stopping.join(30.0)


def test_what_a_part_of_a_node_raises_when_it_stops_keeps_no_other_part_open(
    node: Node, path: Path
) -> None:
    closed: list[str] = []

    def fail() -> None:
        raise SegmentError("this part does not close")

    node._closers = (fail, *node._closers, lambda: closed.append("last"))
    with pytest.raises(SegmentError, match="does not close"):
        node.stop()
    assert closed == ["last"]
    wait_until(lambda: not keepers_of(path))
