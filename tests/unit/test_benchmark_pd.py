"""benchmarks/pd.py counts what it says it counts, on times made by hand."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tidepool.benchmarks.pd_nodes import Seen

pd: Any = importlib.import_module("tidepool.benchmarks.pd")


def seen(sent_s: float, *token_s: float, error: str = "") -> Seen:
    notes = {"offered": sent_s + 0.1, "committed": sent_s + 0.3, "ready": sent_s + 0.35}
    return Seen("long", sent_s, list(token_s), notes, True, error)


def test_the_parts_of_a_first_token_follow_each_other() -> None:
    split = pd.split_of([seen(5.0, 5.36, 5.4, 5.41)])
    assert split == {
        "queue": pytest.approx(100),
        "prefill": pytest.approx(200),
        "transfer": pytest.approx(50),
        "first_decode": pytest.approx(50),
    }


def test_gaps_are_counted_with_and_without_each_requests_first() -> None:
    requests = [seen(0.0, 0.5, 0.6, 0.604, 0.608), seen(1.0, error="503 no")]
    found = pd.summary(requests, 0.002, (1.0, 0.05))
    assert found["itl_ms"]["p99"] == pytest.approx(100)
    assert found["running_itl_ms"]["p99"] == pytest.approx(4)
    assert found["running_itl_p99_of_idle"] == pytest.approx(2)
    assert found["failed"] == ["503 no"]
    assert found["requests_s"] == pytest.approx(1 / 0.608)


@pytest.mark.parametrize(("slo", "good"), [((1.0, 0.05), 1), ((0.4, 0.05), 0), ((1.0, 0.03), 0)])
def test_goodput_counts_requests_within_both_limits(slo: tuple[float, float], good: int) -> None:
    found = pd.summary([seen(0.0, 0.5, 0.6, 0.604, 0.608)], 0.002, slo)
    assert found["goodput_s"] * 0.608 == pytest.approx(good)


def test_gaps_of_a_window_lie_wholly_inside_it() -> None:
    streams = [Seen("steady", 0.0, [1.0, 2.0, 3.0, 4.0])]
    assert pd.gaps_within(streams, 1.5, 4.0) == [1.0, 1.0]


def test_steady_streams_fit_the_longest_context() -> None:
    arguments = pd.parse(["--long", "8192", "16", "--steady-output", "1700"])
    config = pd.configuration(arguments)
    assert config.decode.max_context >= 8192 + 1700
    assert config.prefill.pool_tokens >= 8192
