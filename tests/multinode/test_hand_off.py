"""Prefill, decode and front on hosts of their own: the right answer crosses the network."""

from __future__ import annotations

import time

import httpx
import pytest

from multinode.faults import Faults
from multinode.ray_cluster import RayCluster
from multinode.streams import MODEL, Answers
from multinode.traffic import Traffic
from tidepool.deploy.demo.data import make_prompt

pytestmark = pytest.mark.multinode


def ask(cluster: RayCluster, text: str) -> str:
    body = {"model": MODEL, "prompt": text, "max_tokens": 12, "temperature": 0}
    with cluster.network.client_side():
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120.0)
    assert answer.status_code == httpx.codes.OK, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_every_node_listens_on_the_address_of_its_host(cluster: RayCluster) -> None:
    for node_id, info in cluster.ask("info").items():
        assert info["address"].startswith(f"tcp://{cluster.where(node_id).address}:")


def test_a_record_in_a_long_prompt_is_found_across_hosts(cluster: RayCluster) -> None:
    before = cluster.audits()
    prompt = make_prompt(6000, seed=31)
    assert ask(cluster, prompt.text) == prompt.completion
    after = cluster.audits()

    def grown(role: str, counter: str) -> list[str]:
        nodes = [node_id for node_id in after if node_id.startswith(role)]
        return [each for each in nodes if after[each][counter] > before[each][counter]]

    (computed_on,) = grown("prefill", "prefill_tokens")
    (received_on,) = grown("decode", "bytes_received")
    assert cluster.where(computed_on) is not cluster.where("front-0")
    assert received_on in ("decode-0", "decode-1")


def assert_traffic_is_right(cluster: RayCluster, answers: Answers) -> None:
    traffic = Traffic(cluster, answers)
    since_s = time.monotonic()
    traffic.begin()
    assert traffic.end(since_s).num_failed == 0


def test_answers_are_right_at_200_mbit_per_second(
    cluster: RayCluster, answers: Answers, faults: Faults
) -> None:
    with faults.rate_limit([cluster.where("prefill-0"), cluster.where("decode-0")], 200):
        assert_traffic_is_right(cluster, answers)


def test_answers_are_right_with_20_ms_of_delay(
    cluster: RayCluster, answers: Answers, faults: Faults
) -> None:
    with faults.delay(cluster.where("decode-0"), 0.020):
        assert_traffic_is_right(cluster, answers)
