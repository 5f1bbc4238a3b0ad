"""A unified node's tokens equal transformers', resident and behind a small hot buffer."""

from __future__ import annotations

import pytest
from helpers.engines import UnifiedHarness
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


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk_tokens", [7, 64, 4096])
def test_tokens_do_not_depend_on_page_size_or_chunks(
    page_size: int, chunk_tokens: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = VETTED_SEEDS["glm52"][0]
    path = session_checkpoint(tmp_path_factory, "glm52", seed)
    node = UnifiedHarness(
        path,
        **{
            "decode.hot_rows": INDEX_TOPK,
            "kv.page_size": page_size,
            "prefill.chunk_tokens": chunk_tokens,
        },
    )
    (tokens,) = node.generate([prompt(seed)], max_tokens=NUM_GREEDY)
    assert tokens == list(greedy_reference("glm52", seed)[0])
    node.assert_empty()
