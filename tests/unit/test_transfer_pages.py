"""Pages to addresses: coalescing, splitting, checks, checksums."""

from __future__ import annotations

import ctypes

import pytest
import xxhash
from helpers.memory import Memory, make_region
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.common.errors import ProtocolError
from tidepool.common.wire import PageRun, Region
from tidepool.transfer.checksum import checksum
from tidepool.transfer.pages import check_regions, check_runs, expand, layer_parts, plan_writes

REGION = Region("kv", 0, 1, 10, 4)


def test_runs_expand_in_order() -> None:
    assert expand([PageRun(5, 2), PageRun(1, 1)]) == [5, 6, 1]


def test_runs_contiguous_on_both_sides_are_one_write_a_layer() -> None:
    source = Region("kv", 1000, 2, 10, 4)
    target = Region("kv", 5000, 2, 20, 4)
    writes = list(plan_writes(source, target, [1, 2, 3, 7], [8, 9, 10, 11], 1 << 20))
    assert [(each.source, each.target, each.num_bytes) for each in writes] == [
        (1004, 5032, 12),
        (1028, 5044, 4),
        (1044, 5112, 12),
        (1068, 5124, 4),
    ]


def test_a_gap_on_either_side_ends_a_run() -> None:
    writes = list(plan_writes(REGION, REGION, [0, 1, 2], [0, 2, 3], 1 << 20))
    assert [each.num_bytes for each in writes] == [4, 8]


def test_writes_are_split_at_the_limit() -> None:
    writes = list(plan_writes(REGION, REGION, [0, 1, 2], [0, 1, 2], 5))
    assert [(each.source, each.num_bytes) for each in writes] == [(0, 5), (5, 5), (10, 2)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_planned_writes_copy_every_page_of_every_layer(data: st.DataObject) -> None:
    num_layers, page_bytes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    source_memory, target_memory = Memory(3 * 12 * 9), Memory(3 * 15 * 9)
    source_memory.fill(1)
    source = make_region(source_memory, "kv", num_layers, 12, page_bytes)
    target = make_region(target_memory, "kv", num_layers, 15, page_bytes)
    source_pages = data.draw(st.lists(st.integers(0, 11), unique=True, min_size=1))
    count = len(source_pages)
    target_pages = data.draw(
        st.lists(st.integers(0, 14), unique=True, min_size=count, max_size=count)
    )
    limit = data.draw(st.integers(1, 40))
    for write in plan_writes(source, target, source_pages, target_pages, limit):
        assert write.num_bytes <= limit
        ctypes.memmove(write.target, write.source, write.num_bytes)
    source_parts = layer_parts([(source, source_pages)])
    target_parts = layer_parts([(target, target_pages)])
    assert len(source_parts) == num_layers
    assert [checksum(part) for part in source_parts] == [checksum(part) for part in target_parts]
    unwritten = sorted(set(range(15)) - set(target_pages))
    for part in layer_parts([(target, unwritten)]):
        for address, size in part:
            assert ctypes.string_at(address, size) == bytes(size)


def test_parts_are_the_layers_of_each_region_with_contiguous_pages_joined() -> None:
    kv, index = Region("kv", 1000, 2, 10, 4), Region("index", 5000, 1, 20, 3)
    assert layer_parts([(kv, [1, 2, 7]), (index, [5, 4])]) == [
        [(1004, 8), (1028, 4)],
        [(1044, 8), (1068, 4)],
        [(5015, 3), (5012, 3)],
    ]


def test_a_checksum_is_xxh3_64_over_all_segments_in_order() -> None:
    memory = Memory(100)
    data = memory.fill(3)
    segments = [(memory.address + 50, 10), (memory.address, 20)]
    assert checksum(segments) == xxhash.xxh3_64_intdigest(data[50:60] + data[:20])
    assert checksum(reversed(segments)) != checksum(segments)


@pytest.mark.parametrize(
    "runs",
    [
        [PageRun(-1, 2)],
        [PageRun(9, 2)],
        [PageRun(0, 0)],
        [PageRun(0, -1)],
        [PageRun(2**62, 1)],
        [PageRun(0, 2**62)],
        [PageRun(0, 3), PageRun(2, 1)],
        [PageRun(0, 10), PageRun(0, 10)],
    ],
)
def test_runs_that_leave_the_region_or_repeat_a_page_are_refused(runs: list[PageRun]) -> None:
    with pytest.raises(ProtocolError):
        check_runs(runs, REGION)


def test_regions_that_differ_in_layers_or_page_bytes_are_refused() -> None:
    check_regions([REGION], [Region("kv", 77, 1, 99, 4)])
    for other in ([Region("kv", 0, 2, 10, 4)], [Region("kv", 0, 1, 10, 8)], []):
        with pytest.raises(ProtocolError, match="regions differ"):
            check_regions([REGION], other)
