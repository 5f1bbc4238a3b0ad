"""Tokens of one prefill and one decode node over Mooncake TCP equal transformers'."""

from __future__ import annotations

import pytest
from helpers.engines import exact_config
from helpers.pd import pd_pair
from helpers.tiny_models import (
    INDEX_TOPK,
    KINDS,
    NUM_GREEDY,
    VETTED_SEEDS,
    Kind,
    greedy_reference,
    prompt,
    session_checkpoint,
)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_transformers(
    kind: Kind, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for seed in VETTED_SEEDS[kind]:
        path = session_checkpoint(tmp_path_factory, kind, seed)
        overrides = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4}
        with pd_pair(exact_config(path, **overrides)) as pair:
            (tokens,) = pair.generate([prompt(seed)], max_tokens=NUM_GREEDY)
            assert tokens == list(greedy_reference(kind, seed)[0])
            assert pair.stats()["rows_swapped_in"] > 0
            pair.assert_settles_empty()


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk_tokens", [7, 64, 4096])
def test_tokens_do_not_depend_on_page_size_or_chunks(
    page_size: int, chunk_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = VETTED_SEEDS["glm52"][0]
    path = session_checkpoint(tmp_path_factory, "glm52", seed)
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
        assert tokens == list(greedy_reference("glm52", seed)[0])
        pair.assert_settles_empty()
