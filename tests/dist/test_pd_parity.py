"""Tokens of one prefill and one decode node over Mooncake TCP equal transformers'."""

from __future__ import annotations

import pytest
import torch
from helpers.engines import exact_config
from helpers.pd import pd_pair
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
def test_tokens_and_logprobs_equal_transformers(
    kind: Kind, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for seed in VETTED_SEEDS[kind]:
        path = session_checkpoint(tmp_path_factory, kind, seed)
        overrides = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4}
        with pd_pair(exact_config(path, **overrides)) as pair:
            (tokens,) = pair.generate([prompt(seed)], max_tokens=NUM_GREEDY, logprobs=20)
            expected, logits_TV = greedy_reference(kind, seed)
            assert tokens == list(expected)
            expected_TV = logits_TV[PROMPT_TOKENS - 1 :].log_softmax(-1)
            for number, logprob in enumerate(pair.front.logprobs["p0"]):
                assert logprob is not None
                ours = torch.tensor(logprob.top_logprobs)
                theirs = expected_TV[number, list(logprob.top_ids)]
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
            assert pair.stats()["rows_swapped_in"] > 0
            pair.assert_settles_empty()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk_tokens", [7, 64, 4096])
def test_tokens_do_not_depend_on_page_size_or_chunks(
    kind: Kind, page_size: int, chunk_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = VETTED_SEEDS[kind][0]
    path = session_checkpoint(tmp_path_factory, kind, seed)
    config = exact_config(
        path,
        **{
            "decode.hot_rows": INDEX_TOPK,
            "kv.page_size": page_size,
            "prefill.chunk_tokens": chunk_tokens,
        },
    )
    with pd_pair(config) as pair:
        (tokens,) = pair.generate([prompt(seed)], max_tokens=NUM_GREEDY)
        assert tokens == list(greedy_reference(kind, seed)[0])
        pair.assert_settles_empty()
