"""benchmarks/decode.py runs each of its modes and counts what it says it counts (CPU, a tiny model)."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser, Namespace
from types import ModuleType

import pytest
import torch
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, session_checkpoint

from tidepool.benchmarks import decode_points as points
from tidepool.common.config import KvSection
from tidepool.common.layouts import KvGeometry
from tidepool.model.config import geometry
from tidepool.model.model import Model

CONTEXT, MISSES = 64, 3


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    module = importlib.import_module("tidepool.benchmarks.decode")
    module.WARM_STEPS, module.WINDOWS, module.WINDOW_STEPS = 4, 1, 5
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = session_checkpoint(tmp_path_factory, "glm52", VETTED_SEEDS["glm52"][0])
    return Model.load(path, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("mode", ["resident", "hot", "serial", "no-copy"])
def test_each_mode_decodes_and_misses_what_the_trace_says(
    mode: str, bench: ModuleType, model: Model
) -> None:
    section = KvSection(layout="mla_fp32", index_layout="index_fp32", page_size=4)
    kv = geometry(model.config, section)
    point = bench.Point("test", mode, 2, CONTEXT, "mla_fp32", 2 * INDEX_TOPK, MISSES)
    options = Namespace(no_graphs=True, profile=False, weights="bf16")
    result = bench.measure(model, kv, point, bench.HostRows(kv, [point], pin=False), options)
    assert result["failed"] == 0
    assert result["missed_per_row"] == (0 if mode == "resident" else MISSES)
    assert (result["least_us"]["link"] > 0) == (mode in ("hot", "serial"))


@pytest.fixture
def cut(model: Model, monkeypatch: pytest.MonkeyPatch) -> KvGeometry:
    """The tiny model stands for a published one and for its cut."""
    section = KvSection(layout="mla_fp32", index_layout="index_fp32", page_size=4)
    kv = geometry(model.config, section)
    monkeypatch.setattr(Model, "random", lambda *_, **__: model)
    for name in ("decode", "decode_points", "decode_capacity"):
        module = importlib.import_module(f"tidepool.benchmarks.{name}")
        for attribute, value in (
            ("cut_config", lambda _: model.config),
            ("whole_config", lambda _: model.config),
            ("kv_of", lambda *_: kv),
            ("KvSection", lambda **_: section),
        ):
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, value)
    return kv


def options(*changes: str) -> Namespace:
    parser = ArgumentParser()
    points.add_arguments(parser)
    fixed = f"""--device cpu --dtype float32 --weights bf16 --layout mla_fp32 --contexts {CONTEXT}
        --hot-rows {2 * INDEX_TOPK} --misses {MISSES}"""
    return parser.parse_args([*fixed.split(), *changes])


def test_equal_memory_has_a_line_for_each_number_of_resident_sequences(
    bench: ModuleType, cut: KvGeometry
) -> None:
    args = options("--suite", "memory", "--resident-batches", "1", "2")
    args.no_graphs, args.profile = True, False
    results = bench.measure_all(args)
    assert [(r["mode"], r["resident_batch"]) for r in results] == [
        (mode, batch) for batch in (1, 2) for mode in ("resident", "hot", "no-copy")
    ]
    for resident, hot in ((results[0], results[1]), (results[3], results[4])):
        budget = resident["resident_batch"] * resident["seat_mb"]
        assert hot["batch"] * hot["seat_mb"] <= budget < (hot["batch"] + 1) * hot["seat_mb"]
    table = bench.equal_memory(results)
    assert table.count("\n") == 3
    assert f"| {CONTEXT} | 2: " in table


def test_an_engine_admits_as_many_as_fit_into_its_budget_and_no_more(cut: KvGeometry) -> None:
    capacity = importlib.import_module("tidepool.benchmarks.decode_capacity")
    args = options("--resident-batches", "1")
    args.kv_gib = [0.002]
    results = capacity.measure_all(args)
    assert [result["mode"] for result in results] == ["resident", "hot"]
    for result in results:
        assert result["as_run"] in (result["computed"], result["computed"] - 1)
        assert result["seated"] == result["as_run"] > 1
        assert result["tokens"] == capacity.STEPS * result["as_run"]
        assert result["failed"] == 0
        assert result["pools_mb"] <= result["budget_mb"]
