"""A unified node's tokens equal transformers', resident and behind a small hot buffer."""

from __future__ import annotations

import pytest
import torch
from helpers.engines import UnifiedHarness
from helpers.tiny_models import (
    INDEX_TOPK,
    KINDS,
    NUM_GREEDY,
    PROMPT_TOKENS,
    VETTED_SEEDS,
    Kind,
    greedy_reference,
    prompt,
    session_checkpoint,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hot_rows", [0, INDEX_TOPK, 40])
def test_greedy_tokens_equal_transformers(
    kind: Kind, hot_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for seed in VETTED_SEEDS[kind]:
        path = session_checkpoint(tmp_path_factory, kind, seed)
        node = UnifiedHarness(path, **{"decode.hot_rows": hot_rows, "kv.page_size": 4})
        (tokens,) = node.generate([prompt(seed)], max_tokens=NUM_GREEDY)
        assert tokens == list(greedy_reference(kind, seed)[0])
        node.assert_empty()
        assert (node.decode.stats()["rows_swapped_in"] > 0) == (hot_rows > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_which_rows_make_room(
    kind: Kind, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = VETTED_SEEDS[kind][0]
    path = session_checkpoint(tmp_path_factory, kind, seed)
    misses = {}
    for replacement in ("score", "lru"):
        settings = {"decode.hot_rows": INDEX_TOPK + 4, "decode.replacement": replacement}
        node = UnifiedHarness(path, **settings, **{"kv.page_size": 4})
        (tokens,) = node.generate([prompt(seed)], max_tokens=NUM_GREEDY)
        assert tokens == list(greedy_reference(kind, seed)[0])
        misses[replacement] = node.decode.stats()["hot_misses"]
    assert misses["score"] != misses["lru"]


def test_a_row_of_the_ring_is_read_until_a_newer_one_takes_its_place(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    seed = VETTED_SEEDS[KINDS[0]][0]
    path = session_checkpoint(tmp_path_factory, KINDS[0], seed)
    node = UnifiedHarness(path, **{"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4})
    node.ask("r", prompt(seed), max_tokens=30)
    lags = set()
    while node.step():
        sequence = node.decode.find(("r", 0))
        if sequence is not None and sequence.kv_len >= PROMPT_TOKENS + 12:
            start = int(node.decode.coordinator.cache.ring_start_S[sequence.seat])
            lags.add(sequence.kv_len - start)
    assert lags == {8}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk_tokens", [7, 64, 4096])
def test_tokens_do_not_depend_on_page_size_or_chunks(
    kind: Kind, page_size: int, chunk_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = VETTED_SEEDS[kind][0]
    path = session_checkpoint(tmp_path_factory, kind, seed)
    node = UnifiedHarness(
        path,
        **{
            "decode.hot_rows": INDEX_TOPK,
            "kv.page_size": page_size,
            "prefill.chunk_tokens": chunk_tokens,
        },
    )
    (tokens,) = node.generate([prompt(seed)], max_tokens=NUM_GREEDY)
    assert tokens == list(greedy_reference(kind, seed)[0])
    node.assert_empty()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hot_rows", [0, INDEX_TOPK])
def test_logprobs_equal_transformers_within_1e_4(
    kind: Kind, hot_rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = VETTED_SEEDS[kind][0]
    path = session_checkpoint(tmp_path_factory, kind, seed)
    node = UnifiedHarness(path, **{"decode.hot_rows": hot_rows, "kv.page_size": 4})
    node.ask("r", prompt(seed), max_tokens=NUM_GREEDY, logprobs=20)
    node.run()
    _, logits_TV = greedy_reference(kind, seed)
    expected_TV = logits_TV[PROMPT_TOKENS - 1 :].log_softmax(-1)
    for number, token in enumerate(node.tokens["r"]):
        assert token.logprob is not None
        ours = torch.tensor(token.logprob.top_logprobs)
        theirs = expected_TV[number, list(token.logprob.top_ids)]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert set(token.logprob.top_ids) == set(expected_TV[number].topk(20).indices.tolist())
