"""A node whose keeper ends: what its step thread does, and how long it waits between attempts."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from tidepool.common.errors import SegmentError
from tidepool.decode_node.journal import Shape
from tidepool.decode_node.keeper_watch import FIRST_RETRY_S, MAX_RETRY_S, KeeperWatch
from tidepool.decode_node.kept import KeptMemory


class Link:
    """A keeper, as its owner sees it."""

    def __init__(self) -> None:
        self.is_alive = True
        self.has_ended = False
        self.is_closed = False
        self.held: object = None
        self.error: SegmentError | None = None

    def own(self, timeout_s: float) -> None:
        return

    def hold(self, segment: object) -> None:
        if self.error is not None:
            raise self.error
        self.held = segment

    def end(self) -> None:
        self.has_ended = True

    def close(self) -> None:
        self.is_closed = True


class Bench:
    """A watch, its clock, and keepers that `start` answers with."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self.now_s = 0.0
        self.first = Link()
        self.segment: Any = object()
        link: Any = self.first
        self.kept = KeptMemory(self.segment, link, Shape(1, 1, 1), True)
        self.watch = KeeperWatch(self.kept, start, lambda: self.now_s)

    def settle(self) -> None:
        """Polls until no attempt is under way."""
        self.watch.poll()
        while self.watch._attempt is not None:
            self.watch._attempt.thread.join(10.0)
            self.watch.poll()


def test_polls_do_not_wait_while_a_keeper_is_started() -> None:
    goes_on, second = threading.Event(), Link()

    def start() -> Link:
        assert goes_on.wait(10.0)
        return second

    bench = Bench(start)
    bench.first.is_alive = False
    for _ in range(100):
        bench.watch.poll()
        bench.now_s += 1.0
    assert not bench.watch.has_keeper
    assert bench.watch.lost_for_s() == 100.0
    goes_on.set()
    bench.settle()
    assert bench.watch.has_keeper
    assert bench.watch.num_restarts == 1
    assert bench.kept.link is second  # type: ignore[comparison-overlap]
    assert second.held is bench.segment
    assert bench.first.is_closed and not second.is_closed
    assert bench.watch.lost_for_s() == 0.0


def test_attempts_that_fail_come_at_longer_and_longer_intervals_up_to_a_bound() -> None:
    tried_s: list[float] = []
    refused: list[Link] = []

    def start() -> Link:
        tried_s.append(bench.now_s)
        if len(tried_s) % 2:
            raise SegmentError("no process")
        refused.append(Link())
        refused[-1].error = SegmentError("its guests cannot be found")
        return refused[-1]

    bench = Bench(start)
    bench.first.is_alive = False
    while len(tried_s) < 12:
        bench.settle()
        bench.now_s += FIRST_RETRY_S / 2
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(tried_s)]
    assert gaps_s[:4] == [FIRST_RETRY_S * 2**n for n in range(4)]
    assert max(gaps_s) == gaps_s[-1] == MAX_RETRY_S
    assert all(link.has_ended for link in refused), "a keeper without memory is left behind"


def test_a_keeper_that_comes_while_the_node_stops_is_ended() -> None:
    goes_on, second = threading.Event(), Link()

    def start() -> Link:
        assert goes_on.wait(10.0)
        return second

    bench = Bench(start)
    bench.first.is_alive = False
    bench.watch.poll()
    threading.Timer(0.1, goes_on.set).start()
    bench.watch.let_go()
    assert second.has_ended and second.is_closed
    bench.watch.poll()
    assert not bench.watch.has_keeper, "it is over"


def test_a_keeper_that_ends_because_the_node_stops_is_not_replaced() -> None:
    started: list[float] = []
    bench = Bench(lambda: started.append(time.monotonic()))
    bench.watch.let_go()
    assert bench.first.has_ended
    bench.first.is_alive = False
    bench.watch.poll()
    assert not started
