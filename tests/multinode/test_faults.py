"""Faults while requests stream and prompts are on their way.

Every request completes with the right tokens or ends with a typed error, none hangs, and pools are
empty afterwards but for counted quarantine (the `cluster` fixture checks that). Times are printed
and measured by benchmarks/recovery.py, not asserted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from multinode.faults import Direction, Faults
from multinode.hosts import wait_for
from multinode.ray_cluster import RayCluster
from multinode.streams import Answers, check, join, question, start_streams, wait_for_tokens
from multinode.traffic import Outcome, Traffic, assert_nothing_grows, come_and_go

pytestmark = pytest.mark.multinode

PARTITION_S = 6.0
ROLE_NODES = ["prefill-0", "decode-0"]


@pytest.fixture
def broken_by(
    cluster: RayCluster, answers: Answers, faults: Faults
) -> Callable[[Callable[[], None]], Outcome]:
    """Runs traffic, injects (and heals) the fault in the middle of it, returns what clients saw."""

    def run(inject: Callable[[], None]) -> Outcome:
        traffic = Traffic(cluster, answers)
        traffic.begin()
        since_s = time.monotonic()
        inject()
        outcome = traffic.end(since_s)
        print(f"gaps {outcome.gaps_s}, first tokens {outcome.ttfts_s}, errors {traffic.errors}")
        return outcome

    return run


@pytest.mark.parametrize("node_id", ROLE_NODES)
def test_no_request_fails_when_a_node_is_killed(broken_by, faults: Faults, node_id: str) -> None:
    assert broken_by(lambda: faults.kill_actor(node_id)).num_failed == 0


@pytest.mark.parametrize("node_id", ROLE_NODES)
def test_no_request_fails_when_a_host_loses_power(
    broken_by, cluster: RayCluster, faults: Faults, node_id: str
) -> None:
    host = cluster.where(node_id)
    try:
        assert broken_by(lambda: faults.power_off(host)).num_failed == 0
    finally:
        faults.boot(host)


@pytest.mark.parametrize("node_id", ROLE_NODES)
def test_no_request_fails_in_a_partition_that_heals(
    broken_by, cluster: RayCluster, faults: Faults, node_id: str
) -> None:
    def partition() -> None:
        with faults.link_down(cluster.where(node_id)):
            time.sleep(PARTITION_S)

    assert broken_by(partition).num_failed == 0


@pytest.mark.parametrize(("node_id", "direction"), [("prefill-0", "from"), ("decode-0", "to")])
def test_no_request_fails_when_packets_are_lost_one_way(
    broken_by, cluster: RayCluster, faults: Faults, node_id: str, direction: Direction
) -> None:
    def lose() -> None:
        with faults.one_way_loss(cluster.where(node_id), direction):
            time.sleep(PARTITION_S)

    assert broken_by(lose).num_failed == 0


def test_no_request_fails_when_two_percent_of_packets_are_lost(
    broken_by, cluster: RayCluster, faults: Faults
) -> None:
    def lose() -> None:
        with faults.random_loss([cluster.where(node_id) for node_id in ROLE_NODES], 2):
            time.sleep(PARTITION_S)

    assert broken_by(lose).num_failed == 0


@pytest.mark.parametrize("node_id", ROLE_NODES)
def test_no_request_fails_when_connections_are_reset(
    broken_by, cluster: RayCluster, faults: Faults, node_id: str
) -> None:
    host = cluster.where(node_id)
    assert broken_by(lambda: faults.reset_connections(host)).num_failed == 0


@pytest.mark.parametrize("node_id", ROLE_NODES)
def test_no_request_fails_when_a_process_hangs_and_goes_on(
    broken_by, faults: Faults, node_id: str
) -> None:
    def hang() -> None:
        with faults.stopped_actor(node_id):
            time.sleep(PARTITION_S)

    assert broken_by(hang).num_failed == 0


def test_a_forced_fence_ends_quarantine_and_what_it_hits_is_tried_again(
    broken_by, cluster: RayCluster, faults: Faults
) -> None:
    """A prefill node hangs among its writes; the other one's transfers are hit by the fence too."""

    def num_quarantined() -> int:
        nodes = cluster.view()["nodes"]
        return sum(n["load"]["quarantined_pages"] for n in nodes if n["role"] == "decode")

    def fence() -> None:
        with faults.stopped_actor("prefill-0"):
            wait_for(lambda: cluster.node_states()["prefill-0"] == "down", 30.0, "silence")
            faults.note(f"{num_quarantined()} pages in quarantine; fencing")
            cluster.ask("fence")
            wait_for(lambda: num_quarantined() == 0, 30.0, "the end of quarantine")

    before = [each["data_fences"] for each in cluster.audits().values() if "data_fences" in each]
    assert broken_by(fence).num_failed == 0
    after = [each["data_fences"] for each in cluster.audits().values() if "data_fences" in each]
    assert all(new > old for new, old in zip(after, before, strict=True))


def test_streams_do_not_notice_that_ray_hangs_on_a_host(
    broken_by, cluster: RayCluster, faults: Faults
) -> None:
    def hang() -> None:
        with faults.stopped_raylet(cluster.where("decode-0")):
            time.sleep(PARTITION_S)

    assert broken_by(hang).num_failed == 0


def test_streams_do_not_notice_a_restart_of_the_head(
    broken_by, cluster: RayCluster, faults: Faults
) -> None:
    head = cluster.network.hosts[0]

    def restart() -> None:
        faults.power_off(head)
        time.sleep(3.0)
        faults.boot(head)

    before = {node_id: info["epoch"] for node_id, info in cluster.ask("info").items()}
    assert broken_by(restart).num_failed == 0
    assert broken_by(lambda: None).num_failed == 0  # new requests too
    after = {node_id: info["epoch"] for node_id, info in cluster.ask("info").items()}
    assert before == after, "no node was restarted with it"


def test_a_node_that_ray_calls_dead_is_used_while_it_lives(
    cluster: RayCluster, answers: Answers, faults: Faults
) -> None:
    """Only Ray's head cannot see the host. The daemon ends itself once it is told; then it is over."""
    head, host = cluster.network.hosts[0], cluster.where("decode-0")
    pid = cluster.pid("decode-0")
    with faults.cut_between(host, head):
        wait_for(lambda: cluster.ask("alive")["nodes"] == 4, 60.0, "Ray to give the host up")
        faults.note("Ray has given the host up")
        assert cluster.node_states()["decode-0"] == "up"
        traffic = Traffic(cluster, answers)
        traffic.begin()
        since_s = time.monotonic()
    assert traffic.end(since_s).num_failed == 0
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 60.0, "the forgotten node to end")
    faults.power_off(host)
    faults.boot(host)


def test_a_killed_front_costs_its_own_connections_and_no_other(
    cluster: RayCluster, answers: Answers, faults: Faults
) -> None:
    """Its clients hear a reset; streams of the other front and new requests notice nothing."""
    asked = question(300, 50, 400)
    short = question(300, 50, 20)
    answers.of(asked)
    answers.of(short)
    streams = start_streams(cluster, [asked] * 8)
    wait_for_tokens(streams)
    faults.kill_front("front-0")
    new = start_streams(cluster, [short] * 8)
    join([*streams, *new])
    assert check(new, answers) == 0
    check(streams, answers)
    assert {(stream.error or {}).get("code") for stream in streams} <= {"connection", None}
    wait_for(lambda: len(cluster.front_ids) == len(cluster.front_pids()), 60.0, "the front")
    cluster.wait_until_ready(60.0)
    traffic = Traffic(cluster, answers)
    traffic.begin()
    assert traffic.end(time.monotonic()).num_failed == 0


def test_clients_that_leave_leave_nothing_behind(cluster: RayCluster, faults: Faults) -> None:
    rng = random.Random(5)
    come_and_go(cluster, rng, 12)
    cluster.assert_settles()

    def leave() -> None:
        for _ in range(4):
            faults.note("twelve clients come and go")
            come_and_go(cluster, rng, 12)

    faults.note(assert_nothing_grows(cluster, leave))
    stats = cluster.assert_settles()
    assert all(
        each["seats_free"] == each["seats_total"]
        for each in stats.values()
        if "seats_total" in each
    )
