"""benchmarks/decode.py runs each of its modes and counts what it says it counts (CPU, a tiny model)."""

from __future__ import annotations

import importlib
from argparse import Namespace
from types import ModuleType

import pytest
import torch
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, session_checkpoint

from tidepool.common.config import KvSection
from tidepool.model.config import geometry
from tidepool.model.model import Model

CONTEXT, MISSES = 64, 3


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    module = importlib.import_module("tidepool.benchmarks.decode")
    module.WARM_STEPS, module.WINDOWS, module.WINDOW_STEPS = 4, 1, 5
    return module


@pytest.mark.parametrize("mode", ["resident", "hot", "serial"])
def test_each_mode_decodes_and_misses_what_the_trace_says(
    mode: str, bench: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = session_checkpoint(tmp_path_factory, "glm52", VETTED_SEEDS["glm52"][0])
    model = Model.load(path, dtype=torch.float32, device="cpu")
    section = KvSection(layout="mla_fp32", index_layout="index_fp32", page_size=4)
    kv = geometry(model.config, section)
    point = bench.Point("test", mode, 2, CONTEXT, "mla_fp32", 2 * INDEX_TOPK, MISSES)
    # Keys of the index layout that the benchmark fills are its own business; fp32 ones are random.
    fill = bench.fill
    bench.fill = lambda host, index, cache: (host.rows.zero_(), index.data.zero_())
    try:
        result = bench.measure(model, kv, point, Namespace(no_graphs=True, profile=False))
    finally:
        bench.fill = fill
    assert result["failed"] == 0
    assert result["missed_per_row"] == (0 if mode == "resident" else MISSES)
