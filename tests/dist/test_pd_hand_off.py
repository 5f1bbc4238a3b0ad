"""The hand-off between two real nodes: paged host slots, full pools, cancelling, layout mismatch."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import UnifiedHarness, exact_config
from helpers.pd import HOST, TIMEOUT_S, pd_pair
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.common import wire
from tidepool.decode_node.node import build_node as build_decode
from tidepool.decode_node.sequence import Sequence
from tidepool.hostpool.mirror import HostMirror
from tidepool.prefill_node.node import build_node as build_prefill

SEED = VETTED_SEEDS["glm52"][0]
HOT = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4}
OPEN = {"cluster.authentication": "off"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm52", SEED)


def prompts(*lengths: int) -> list[list[int]]:
    return [prompt(number, length) for number, length in enumerate(lengths)]


def alone(path: Path, requests: list[list[int]], **sampling: Any) -> list[list[int]]:
    node = UnifiedHarness(path)
    return [node.generate([request], **sampling)[0] for request in requests]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pd_decode_prealloc_hisparse_host_slots(path: Path, page_size: int) -> None:
    """Decode grants whole pages before prefill computes, and every row lands in its host slot."""
    num_tokens, max_tokens = 50, 10
    request = prompt(SEED, num_tokens)
    reference = UnifiedHarness(path, **{**HOT, "kv.page_size": page_size})
    expected_rows: list[torch.Tensor] = []
    reference_pool = reference.decode.coordinator
    stage = reference_pool.admit_request_into_staging

    def keep(sequence: Sequence, source: Any, source_pages: list[int]) -> None:
        stage(sequence, source, source_pages)
        expected_rows.append(_rows(reference_pool.host.rows, sequence, page_size, num_tokens))

    reference_pool.admit_request_into_staging = keep  # type: ignore[method-assign]
    (expected,) = reference.generate([request], max_tokens=max_tokens)

    with pd_pair(exact_config(path, **{**HOT, "kv.page_size": page_size})) as pair:
        engine = pair.decode._engines[0]
        arrived: list[torch.Tensor] = []
        ready = engine.make_ready  # type: ignore[attr-defined]

        def spy(sequence: Sequence, *rest: Any) -> None:
            pages = sequence.host_lease.pages
            assert len(pages) == len(set(pages)) == -(-(num_tokens + max_tokens - 1) // page_size)
            rows = engine.coordinator.host.rows  # type: ignore[attr-defined]
            arrived.append(_rows(rows, sequence, page_size, num_tokens))
            ready(sequence, *rest)

        engine.make_ready = spy  # type: ignore[attr-defined]
        (tokens,) = pair.generate([request], max_tokens=max_tokens)
        assert tokens == expected
        assert len(arrived) == 1
        assert torch.equal(arrived[0], expected_rows[0])
        pair.assert_settles_empty()


def _rows(rows: torch.Tensor, sequence: Sequence, page_size: int, count: int) -> torch.Tensor:
    """The first `count` positions' rows of every layer, gathered through the page table."""
    positions = torch.arange(count)
    pages = torch.tensor(sequence.host_lease.pages)
    return rows[:, pages[positions // page_size] * page_size + positions % page_size].clone()


def test_a_batch_gives_the_tokens_of_each_request_alone(path: Path) -> None:
    requests = prompts(1, 5, 30, 64, 90, 17)
    expected = alone(path, requests, max_tokens=20)
    with pd_pair(exact_config(path, **HOT)) as pair:
        assert pair.generate(requests, max_tokens=20) == expected
        pair.assert_settles_empty()


def test_full_pools_defer_and_lose_nobody(path: Path) -> None:
    requests = prompts(*[60] * 8)
    expected = alone(path, requests, max_tokens=12)
    overrides = {**HOT, "decode.host_tokens": 160, "prefill.pool_tokens": 128, "decode.seats": 1}
    with pd_pair(exact_config(path, **overrides)) as pair:
        assert pair.generate(requests, max_tokens=12) == expected
        pair.assert_settles_empty()


def test_what_can_never_fit_on_decode_is_refused_with_the_limit(path: Path) -> None:
    with pd_pair(exact_config(path, **{**HOT, "decode.host_tokens": 64})) as pair:
        pair.submit("big", prompt(0, 60), max_tokens=10)
        pair.wait(["big"])
        finish = pair.front.finishes["big"]
        assert (finish.status, finish.code) == (400, "context_length_exceeded")
        assert not finish.can_retry
        pair.assert_settles_empty()


def test_cancelling_at_any_moment_frees_both_sides_and_hurts_nobody(path: Path) -> None:
    request = prompt(0, 90)
    (expected,) = alone(path, [request], max_tokens=20)
    # On a busy machine a silent session would end, and what it carries with it.
    overrides = {**HOT, "prefill.chunk_tokens": 16, "transfer.heartbeat_timeout_s": TIMEOUT_S}
    with pd_pair(exact_config(path, **overrides)) as pair:
        for number in range(20):
            pair.submit(f"kept{number}", request, max_tokens=20)
            pair.submit(f"cancelled{number}", prompt(1, 90), max_tokens=200)
            time.sleep(0.004 * number)
            pair.cancel(f"cancelled{number}")
            pair.wait([f"kept{number}"])
            assert pair.front.tokens[f"kept{number}"] == expected
        pair.assert_settles_empty()


def test_tokens_that_are_lost_with_a_session_come_again_when_they_are_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, cuts = prompt(0, 90), (3, 17, 40)
    (expected,) = alone(path, [request], max_tokens=48)
    with pd_pair(exact_config(path, **HOT)) as pair:
        loop = pair.decode.control
        really_send, count = loop._send, itertools.count()

        def send(node_id: str, message: wire.AnyMessage) -> None:
            session = loop._sessions.get(node_id)
            if session is not None and isinstance(message, wire.Tokens) and next(count) in cuts:
                loop._end(session, "as after a silence")
            really_send(node_id, message)

        monkeypatch.setattr(loop, "_send", send)
        pair.submit("cut", request, max_tokens=48)
        pair.wait(["cut"])
        assert pair.front.tokens["cut"] == expected
        assert loop.stats.num_no_session > 0, "nothing was lost"
        pair.assert_settles_empty()


def test_nodes_with_different_layouts_refuse_each_other_with_both_values(path: Path) -> None:
    decode = build_decode(
        exact_config(path, **{"kv.page_size": 4, **OPEN}),
        node_id="decode-0",
        bind_host=HOST,
        on_fatal=lambda _: None,
    )
    prefill = build_prefill(
        exact_config(path, **{"kv.page_size": 16, **OPEN}),
        node_id="prefill-0",
        bind_host=HOST,
        on_fatal=lambda _: None,
    )
    try:
        decode.start()
        prefill.start()
        prefill.control.connect("decode-0", decode.control.address)
        deadline_s = time.monotonic() + 10
        while prefill.control.refusal("decode-0") is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        sentence = str(prefill.control.refusal("decode-0"))
        assert "page 4" in sentence
        assert "page 16" in sentence
    finally:
        prefill.stop()
        decode.stop()


def test_a_decode_node_that_stays_full_answers_429(path: Path) -> None:
    overrides = {**HOT, "decode.max_requests": 1, "transfer.max_defer_s": 0.5}
    with pd_pair(exact_config(path, **overrides)) as pair:
        pair.submit("long", prompt(0, 40), max_tokens=3000)
        while not pair.front.tokens["long"]:
            time.sleep(0.01)
        pair.submit("late", prompt(1, 40), max_tokens=4)
        pair.wait(["late"])
        finish = pair.front.finishes["late"]
        assert (finish.status, finish.code, finish.can_retry) == (429, "overloaded", False)
        pair.cancel("long")
        pair.assert_settles_empty()


def test_a_prompt_whose_keys_are_not_on_the_device_holds_up_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [prompt(0, 40), prompt(1, 60)]
    have_keys = threading.Event()
    with pd_pair(exact_config(path)) as pair:
        expected = pair.generate(requests, max_tokens=40)
        pair.submit("runs", requests[0], max_tokens=40)
        with pair.front.changed:
            pair.front.changed.wait_for(lambda: bool(pair.front.tokens["runs"]), 20.0)
        start = HostMirror.start_to_device
        monkeypatch.setattr(
            HostMirror, "start_to_device", lambda *a: (start(*a), have_keys.is_set)[1]
        )
        pair.submit("waits", requests[1], max_tokens=40)
        pair.wait(["runs"])
        assert not pair.front.tokens["waits"]
        have_keys.set()
        pair.wait(["waits"])
        assert [pair.front.tokens[r] for r in ("runs", "waits")] == expected
        pair.assert_settles_empty()
