"""How the attention backend is chosen: the measured table, and what a node refuses at its start."""

from __future__ import annotations

import json

import pytest

from tidepool.common.config import parse
from tidepool.common.errors import ConfigError
from tidepool.kernels.attention_table import TABLE, ranking
from tidepool.model.runtime import load_runtime

MEASURED = json.loads(TABLE.read_text())


def test_the_table_says_where_it_was_measured() -> None:
    assert all(MEASURED[key] for key in ("machine", "commit", "command", "versions", "date"))


@pytest.mark.parametrize("layout", ["mla_bf16", "mla_fp8"])
def test_the_first_backend_is_the_fastest_at_every_size_measured(layout: str) -> None:
    for heads, batches in MEASURED["us"][layout].items():
        for batch, times in batches.items():
            found = ranking(layout, int(heads), int(batch))
            assert [times[name] for name in found] == sorted(times.values())
            assert set(found) == set(times)


def test_sizes_between_those_measured_go_by_more_heads_and_a_smaller_batch() -> None:
    assert ranking("mla_fp8", 100, 40) == ranking("mla_fp8", 128, 32)
    assert ranking("mla_bf16", 3, 1) == ranking("mla_bf16", 8, 1)
    assert ranking("mla_bf16", 256, 100_000) == ranking("mla_bf16", 128, 256)


def test_a_layout_without_measurements_goes_to_triton() -> None:
    assert ranking("mla_fp32", 128, 1) == ("triton",)


def test_a_gpu_backend_on_a_cpu_node_is_refused_by_name() -> None:
    config = parse(
        {"model": {"path": "/nowhere", "device": "cpu"}, "kernels": {"attention": "cuda"}}
    )
    with pytest.raises(ConfigError, match=r"kernels\.attention: 'cuda' needs a GPU"):
        load_runtime(config)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"kernels\.attention.*flashmla_sparse"):
        parse({"kernels": {"attention": "flash"}})
