"""Continuous batching, parking, admission and cancelling, on a unified node stepped by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import UnifiedHarness
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.common.errors import RequestError

SEED = VETTED_SEEDS["glm52"][0]
HOT: dict[str, Any] = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm52", SEED)


@pytest.fixture(autouse=True, params=["off", "on"])
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds too when a step's tokens are read after the next one was launched."""
    monkeypatch.setitem(HOT, "decode.overlap", request.param)


def prompts(*lengths: int) -> list[list[int]]:
    return [prompt(number, length) for number, length in enumerate(lengths)]


def alone(path: Path, requests: list[list[int]], **sampling: Any) -> list[list[int]]:
    """Each request by itself on a resident node."""
    node = UnifiedHarness(path)
    return [node.generate([request], **sampling)[0] for request in requests]


def test_a_batch_gives_the_tokens_of_each_request_alone(path: Path) -> None:
    requests = prompts(1, 5, 30, 64, 90)
    node = UnifiedHarness(path, **{**HOT, "decode.seats": 5})
    assert node.generate(requests, max_tokens=24) == alone(path, requests, max_tokens=24)
    node.assert_empty()


def test_sampled_tokens_do_not_depend_on_the_batch(path: Path) -> None:
    requests = prompts(20, 40, 33)
    sampling = {"max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    node = UnifiedHarness(path, **HOT)
    assert node.generate(requests, **sampling) == alone(path, requests, **sampling)


def test_parked_sequences_resume_token_exact(path: Path) -> None:
    requests = prompts(50, 20, 70, 35)
    node = UnifiedHarness(path, **{**HOT, "decode.seats": 1, "decode.park_after_tokens": 3})
    expected = alone(path, requests, max_tokens=30)
    for number, request in enumerate(requests):
        node.ask(f"r{number}", request, max_tokens=30)
        for _ in range(4):
            node.step()
    node.ask("short", requests[0], max_tokens=2)
    node.run()
    assert [node.output(f"r{number}") for number in range(4)] == expected
    assert node.decode.stats()["parks"] > 0
    node.assert_empty()


def test_a_short_request_takes_a_seat_from_a_long_one(path: Path) -> None:
    node = UnifiedHarness(path, **{**HOT, "decode.seats": 1, "decode.park_after_tokens": 2})
    node.ask("long", prompt(0, 40), max_tokens=200)
    for _ in range(10):
        node.step()
    node.ask("short", prompt(1, 40), max_tokens=5)
    while "short" not in node.finishes:
        assert node.step()
    assert "long" not in node.finishes
    node.run()
    assert len(node.output("long")) == 200


def test_a_full_pool_defers_and_loses_nobody(path: Path) -> None:
    requests = prompts(60, 60, 60, 60)
    node = UnifiedHarness(path, **{**HOT, "decode.host_tokens": 160})
    assert node.generate(requests, max_tokens=16) == alone(path, requests, max_tokens=16)
    node.assert_empty()


def test_what_can_never_fit_is_refused_with_the_limit(path: Path) -> None:
    node = UnifiedHarness(path, **{**HOT, "decode.host_tokens": 64})
    node.ask("big", prompt(0, 60), max_tokens=10)
    node.run()
    finish = node.finishes["big"]
    assert (finish.reason, finish.status) == ("error", 400)
    assert finish.code == "context_length_exceeded"
    assert "64 tokens" in finish.detail
    node.assert_empty()


def test_token_ids_out_of_the_vocabulary_are_refused(path: Path) -> None:
    node = UnifiedHarness(path, **HOT)
    node.ask("bad", [1, 2, 256], max_tokens=4)
    node.ask("negative", [1, -2], max_tokens=4)
    node.run()
    assert node.finishes["bad"].status == 400
    assert node.finishes["negative"].status == 400


def test_a_full_queue_answers_429(path: Path) -> None:
    node = UnifiedHarness(path, **{**HOT, "prefill.max_queued": 1, "prefill.max_active": 1})
    for number in range(4):
        node.ask(f"r{number}", prompt(number, 30), max_tokens=2)
    node.run()
    statuses = sorted(finish.status for finish in node.finishes.values())
    assert statuses == [200, 429, 429, 429]
    node.assert_empty()


def test_cancelling_at_any_step_frees_everything_and_hurts_nobody(path: Path) -> None:
    expected = alone(path, prompts(40), max_tokens=20)[0]
    for steps in range(16):
        node = UnifiedHarness(path, **{**HOT, "prefill.chunk_tokens": 16})
        node.ask("kept", prompt(0, 40), max_tokens=20)
        node.ask("cancelled", prompt(1, 50), max_tokens=20)
        for _ in range(steps):
            node.step()
        node.cancel("cancelled")
        node.run()
        assert node.output("kept") == expected
        node.assert_empty()


def test_eos_ends_a_request_unless_it_is_ignored(path: Path) -> None:
    tokens = alone(path, prompts(40), max_tokens=20)[0]
    node = UnifiedHarness(path, **HOT)
    stop = tokens[7]
    first = tokens.index(stop)
    node.ask("stops", prompt(0, 40), max_tokens=20, stop_token_ids=(stop,))
    node.ask("later", prompt(0, 40), max_tokens=20, stop_token_ids=(stop,), min_tokens=12)
    node.run()
    assert node.output("stops") == tokens[: first + 1]
    assert node.finishes["stops"].reason == "stop"
    assert len(node.output("later")) > 12
    assert stop not in node.output("later")[:12]


def test_one_output_token_needs_no_decode_step(path: Path) -> None:
    node = UnifiedHarness(path, **HOT)
    assert node.generate(prompts(40), max_tokens=1) == alone(path, prompts(40), max_tokens=1)
    assert node.decode.stats()["decode_steps"] == 0
    node.assert_empty()


def test_logprobs_are_of_the_chosen_and_the_best_tokens(path: Path) -> None:
    node = UnifiedHarness(path, **HOT)
    node.ask("r", prompt(0, 40), max_tokens=5, logprobs=3)
    node.run()
    for token in node.tokens["r"]:
        assert token.logprob is not None
        assert len(token.logprob.top_ids) == 3
        assert token.logprob.top_ids[0] == token.token_id  # greedy
        assert token.logprob.logprob == pytest.approx(token.logprob.top_logprobs[0])
        assert token.logprob.logprob <= 0


def test_a_random_load_ends_every_request_once_with_its_own_tokens(path: Path) -> None:
    rng = random.Random(3)
    node = UnifiedHarness(
        path,
        **{
            **HOT,
            "decode.seats": 3,
            "decode.park_after_tokens": 4,
            "decode.host_tokens": 512,
            "prefill.pool_tokens": 256,
            "prefill.chunk_tokens": 32,
        },
    )
    requests = [(prompt(n, rng.randint(1, 90)), rng.randint(1, 25)) for n in range(24)]
    for number, (request, max_tokens) in enumerate(requests):
        node.ask(f"r{number}", request, max_tokens=max_tokens)
        for _ in range(rng.randint(0, 3)):
            node.step()
    node.run()
    solo = UnifiedHarness(path)
    for number, (request, max_tokens) in enumerate(requests):
        assert node.output(f"r{number}") == solo.generate([request], max_tokens=max_tokens)[0]
    assert node.decode.stats()["parks"] > 0
    node.assert_empty()


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_single_node_staging_allocates_paged_host_slots(path: Path, page_size: int) -> None:
    node = UnifiedHarness(path, **{**HOT, "kv.page_size": page_size})
    num_tokens, max_tokens = 50, 10
    node.ask("r", prompt(0, num_tokens), max_tokens=max_tokens)
    coordinator = node.decode.coordinator
    copied: list[torch.Tensor] = []
    stage = coordinator.admit_request_into_staging

    def spy(sequence: Any, source: Any, source_pages: list[int]) -> None:
        stage(sequence, source, source_pages)
        num_pages = -(-num_tokens // page_size)
        assert len(source_pages) == num_pages
        # Whole pages, growth to max_tokens included; no page twice.
        pages = sequence.host_lease.pages
        assert len(pages) == len(set(pages)) == -(-(num_tokens + max_tokens - 1) // page_size)
        assert sequence.durable_len == num_tokens
        for position in range(num_tokens):
            host_slot = pages[position // page_size] * page_size + position % page_size
            device_slot = source_pages[position // page_size] * page_size + position % page_size
            assert torch.equal(coordinator.host.rows[:, host_slot], source.rows[:, device_slot])
        copied.append(coordinator.host.rows[:, :num_tokens])

    coordinator.admit_request_into_staging = spy  # type: ignore[method-assign]
    node.run()
    assert len(copied) == 1
    assert len(node.output("r")) == max_tokens
    node.assert_empty()


def test_damaged_host_rows_fail_their_own_request_and_no_other(path: Path) -> None:
    requests = prompts(60, 60)
    expected = alone(path, requests, max_tokens=20)
    node = UnifiedHarness(path, **HOT)
    for number, request in enumerate(requests):
        node.ask(f"r{number}", request, max_tokens=20)
    while not node.tokens["r1"]:
        node.step()
    sequence = node.decode.find(("r0", 0))
    assert sequence is not None
    node.decode.coordinator.host.poison(sequence.host_lease.pages)
    node.run()
    assert node.finishes["r0"].code == "not_finite"
    assert node.finishes["r0"].can_retry
    assert node.output("r1") == expected[1]
    node.assert_empty()


@pytest.mark.parametrize("how", ["a chunk fails", "the node stops"])
def test_a_prompt_that_cannot_be_computed_ends_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    node = UnifiedHarness(path, **{**HOT, "prefill.chunk_tokens": 16})  # a second end raises
    node.ask("kept", prompt(0, 10), max_tokens=6)
    node.run()
    node.ask("lost", prompt(1, 60), max_tokens=6)
    while node.decode.find(("lost", 0)) is None:
        node.step()
    if how == "a chunk fails":
        forward = node.runtime.model.forward

        def fail(*arguments: Any) -> Any:
            monkeypatch.setattr(node.runtime.model, "forward", forward)
            raise RuntimeError("no")

        monkeypatch.setattr(node.runtime.model, "forward", fail)
    else:
        for engine in (node.prefill, node.decode):
            engine.hand_over(RequestError("the node stops", status=503, code="draining"))
    node.run()
    assert node.finishes["lost"].can_retry
    assert node.finishes["lost"].reason == "error"
    assert node.finishes["kept"].reason == "length"
    node.assert_empty()
