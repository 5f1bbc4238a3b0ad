"""The poller that tells a front which nodes there are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from tidepool.deploy import membership
from tidepool.deploy.membership import MembershipPoller

Answer = Callable[[], Awaitable[dict[str, Any]]]


class FakeActor:
    """A handle whose `info` answers what `answer` does."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.info = self
        self.error: Exception | None = None
        self.is_hanging = False

    async def remote(self) -> dict[str, Any]:
        if self.is_hanging:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return {
            "node_id": self.node_id,
            "role": "decode",
            "epoch": 1,
            "address": "tcp://10.0.0.1:1",
            "max_context": 100,
        }


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr(membership, "POLL_TIMEOUT_S", 0.2)


def seen_by(actors: dict[str, FakeActor], changes: list[Callable[[], None]]) -> list[set[str]]:
    """The nodes listed at first, and after each change."""

    async def look_up(name: str) -> FakeActor:
        if name not in actors:
            raise ValueError(name)
        return actors[name]

    async def scenario() -> list[set[str]]:
        latest: list[set[str]] = [set()]
        names = ["decode-0", "decode-1"]
        update = lambda infos: latest.append({info.node_id for info in infos})  # noqa: E731
        task = asyncio.create_task(MembershipPoller(names, look_up, update).run())
        views = []
        for change in [lambda: None, *changes]:
            change()
            await asyncio.sleep(0.1)
            views.append(latest[-1])
        task.cancel()
        return views

    return asyncio.run(scenario())


def pair() -> dict[str, FakeActor]:
    return {name: FakeActor(name) for name in ("decode-0", "decode-1")}


def test_a_node_that_hangs_delays_no_other() -> None:
    actors = pair()
    actors["decode-0"].is_hanging = True
    assert seen_by(actors, []) == [{"decode-1"}]


def test_a_node_that_stops_answering_stays_listed() -> None:
    actors = pair()

    def hang() -> None:
        actors["decode-0"].is_hanging = True

    def break_off() -> None:
        actors["decode-1"].error = ActorUnavailableError("no connection", None)

    assert seen_by(actors, [hang, break_off]) == [{"decode-0", "decode-1"}] * 3


def test_a_node_that_is_dead_is_left_out_until_it_is_back() -> None:
    actors = pair()

    def die() -> None:
        actors["decode-0"].error = ActorDiedError()

    def come_back() -> None:
        actors["decode-0"].error = None

    both = {"decode-0", "decode-1"}
    assert seen_by(actors, [die, come_back]) == [both, {"decode-1"}, both]


def test_an_actor_that_does_not_exist_yet_is_found_later() -> None:
    actors = pair()
    late = actors.pop("decode-1")
    appear = lambda: actors.update({"decode-1": late})  # noqa: E731
    assert seen_by(actors, [appear]) == [{"decode-0"}, {"decode-0", "decode-1"}]
