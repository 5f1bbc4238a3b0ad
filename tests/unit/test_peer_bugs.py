"""Bugs that peers have (docs/peer_bugs.md), asked of the engines and of the two transfer machines.

Only what no other test asks; the table names every test.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.engines import UnifiedHarness, exact_config
from helpers.handoff_world import World
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.common import wire
from tidepool.decode_node.build import host_bytes
from tidepool.hostpool.pages import OwnerKind
from tidepool.model.output import MAX_TOP_LOGPROBS
from tidepool.transfer.transport import TicketStatus

SEED = VETTED_SEEDS["glm52"][0]
HOT = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm52", SEED)


def test_nobody_is_parked_while_a_seat_is_free_however_full_the_pool_is(path: Path) -> None:
    node = UnifiedHarness(
        path, **{**HOT, "decode.seats": 4, "decode.host_tokens": 160, "decode.park_after_tokens": 1}
    )
    pages = node.decode.coordinator.host.pages
    for number in range(5):
        node.ask(f"r{number}", prompt(number, 50), max_tokens=30)
    fewest = pages.num_total
    while node.step():
        fewest = min(fewest, pages.num_free)
    assert fewest < 4, "the pool was never full"
    assert {finish.reason for finish in node.finishes.values()} == {"length"}
    assert node.decode.stats()["parks"] == 0
    node.assert_empty()


@pytest.mark.parametrize("hot_rows", [INDEX_TOPK, INDEX_TOPK + 1, 23, 40_000])
def test_a_hot_buffer_of_any_size_gives_the_same_tokens(path: Path, hot_rows: int) -> None:
    (expected,) = UnifiedHarness(path).generate([prompt(0, 90)], max_tokens=20)
    node = UnifiedHarness(
        path, **{"decode.hot_rows": hot_rows, "kv.page_size": 16, "decode.seats": 1}
    )
    (tokens,) = node.generate([prompt(0, 90)], max_tokens=20)
    assert tokens == expected
    node.assert_empty()


@pytest.mark.parametrize("request_id", ["0", "", "-1", "None"])
def test_no_request_id_means_anything_but_itself(path: Path, request_id: str) -> None:
    node = UnifiedHarness(path, **HOT)
    (expected,) = node.generate([prompt(0, 40)], max_tokens=8, seed=0)
    node.ask(request_id, prompt(0, 40), max_tokens=8, seed=0)
    node.run()
    assert node.output(request_id) == expected
    node.assert_empty()


@pytest.mark.parametrize("num_top", [21, 128, 129, 100_000, 2**40])
def test_no_number_of_log_probabilities_hurts_a_node(path: Path, num_top: int) -> None:
    node = UnifiedHarness(path, **HOT)
    node.ask("many", prompt(0, 40), max_tokens=4, logprobs=num_top)
    node.ask("other", prompt(1, 40), max_tokens=4)
    node.run()
    assert node.finishes["many"].reason == "length"
    for token in node.tokens["many"]:
        assert token.logprob is not None
        assert len(token.logprob.top_ids) == MAX_TOP_LOGPROBS
    assert node.finishes["other"].reason == "length"
    node.assert_empty()


def test_the_host_pool_is_allocated_once_and_as_large_as_planned(path: Path) -> None:
    node = UnifiedHarness(path, **HOT)
    host = node.decode.coordinator.host
    assert host.rows.numel() == host_bytes(exact_config(path, **HOT), node.runtime.geometry)
    assert host.rows.untyped_storage().nbytes() == host.rows.numel()


def test_an_attempt_that_has_run_is_never_admitted_again(path: Path) -> None:
    node = UnifiedHarness(path, **HOT)
    node.ask("r", prompt(0, 30), max_tokens=4)
    node.run()
    tokens = node.output("r")
    first = node.finishes.pop("r")
    node.ask("r", prompt(1, 30), max_tokens=4)
    node.run()
    assert first.reason == "length"
    assert (node.finishes["r"].reason, node.finishes["r"].code) == ("error", "duplicate_attempt")
    assert node.output("r") == tokens
    node.assert_empty()


# ---- the two ends of a hand-off ----


def pump(world: World) -> None:
    for _ in range(4):
        while world.undecided:
            world.decide(0, "grant")
        while world.wire:
            world.deliver(0)
        while world.d.mover.verifies:
            world.verify(0)


def test_a_transfer_that_failed_does_not_blacklist_its_peer() -> None:
    world = World()
    world.session_up("p")
    for status in (TicketStatus.FAILED_DRAINED, TicketStatus.DONE):
        key = world.offer(4)
        assert key is not None
        pump(world)
        world.give_pages(key, 4)
        world.commit(key)
        world.end_write(0, status)
        pump(world)
    assert world.jobs[key]["log"] == ["ExportGranted", "ExportDone", "ExportReleased"]
    assert world.d.handler.num_leases == world.p.handler.num_transfers == 0


def test_messages_of_a_transfer_that_is_over_bring_nothing_back() -> None:
    world = World()
    world.session_up("p")
    key = world.offer(4)
    assert key is not None
    world.deliver(0)
    world.decide(0, "grant")
    (grant,) = [each for each in world.wire if isinstance(each[2], wire.Grant)]
    world.cancel_export(key)
    pump(world)
    assert world.d.handler.num_leases == world.p.handler.num_transfers == 0
    for _ in range(3):
        world.wire.append(grant)
        pump(world)
        assert world.d.handler.num_leases == world.p.handler.num_transfers == 0
    assert world.jobs[key]["log"].count("ExportReleased") == 1
    again = world.offer(4)
    assert again is not None and again != key


def test_pages_have_an_owner_for_each_who_may_touch_them(path: Path) -> None:
    """Release of one owner frees nothing the other still writes: the peers' abort window."""
    node = UnifiedHarness(path, **HOT)
    pages = node.decode.coordinator.host.pages
    lease = pages.try_acquire(3, OwnerKind.REQUEST)
    assert lease is not None
    lease.hold(OwnerKind.REMOTE_WRITER)
    lease.release(OwnerKind.REQUEST)
    assert pages.num_free == pages.num_total - 3
    lease.release(OwnerKind.REMOTE_WRITER)
    assert pages.num_free == pages.num_total
