"""Pages to addresses: coalescing, splitting, checks, checksums."""

from __future__ import annotations

import ctypes
import itertools
import threading

import pytest
import xxhash
from helpers.memory import Memory, make_region
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.common.errors import ProtocolError
from tidepool.common.wire import PageRun, Region
from tidepool.transfer.checksum import Hasher, checksum
from tidepool.transfer.pages import (
    LayerSpan,
    check_regions,
    check_runs,
    expand,
    layer_parts,
    layers_in,
    plan_span,
    plan_writes,
    slices,
)
from tidepool.transfer.transport import Write, Writes

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


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("sizes", [[], [0], [7], [300_000] * 5, [1, 900_000, 5, 5, 600_000, 2]])
def test_parts_hashed_on_several_threads_give_the_same_values_in_order(
    num_threads: int, sizes: list[int]
) -> None:
    memory = Memory(2_000_000)
    memory.fill(4)
    ends = list(itertools.accumulate(sizes))
    parts = [
        [(memory.address + end - size, size // 2), (memory.address + end - size // 2, size // 2)]
        for size, end in zip(sizes, ends, strict=True)
    ]
    hasher = Hasher(num_threads)
    is_over = threading.Event()
    hashing = hasher.start(parts, is_over.set)
    assert is_over.wait(5.0) or not parts
    assert hashing.is_done
    assert hashing.values() == [checksum(part) for part in parts]
    hasher.stop()


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


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pieces_hold_each_layer_once_in_order_and_are_about_equal(data: st.DataObject) -> None:
    kv = Region("kv", 1 << 30, data.draw(st.integers(1, 9)), 10, data.draw(st.integers(1, 50)))
    index = Region("index", 1 << 40, data.draw(st.integers(0, 9)), 10, data.draw(st.integers(1, 9)))
    num_pages, max_bytes = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 3000))
    pieces = slices([kv, index], num_pages, max_bytes)
    covered = [
        layer for each in pieces for layer in range(each.first, each.first + each.num_layers)
    ]
    assert covered == list(range(kv.num_layers + index.num_layers))
    assert min(each.num_layers for each in pieces) >= 1
    largest_layer = num_pages * max(kv.page_bytes, index.page_bytes if index.num_layers else 0)
    pages = list(range(num_pages))
    whole = layer_parts([(kv, pages), (index, pages)])
    in_pieces = []
    for each in pieces:
        parts = layer_parts([(kv, pages), (index, pages)], each)
        in_pieces += parts
        assert sum(size for part in parts for _, size in part) < max_bytes + 2 * largest_layer
        of_each = layers_in([kv, index], each)
        assert sum(len(layers) for layers in of_each.values()) == each.num_layers
    assert in_pieces == whole


def test_the_plans_of_all_spans_are_the_writes_and_parts_of_the_whole() -> None:
    source, target = Region("kv", 1000, 5, 10, 4), Region("kv", 5000, 5, 20, 4)
    keys = Region("index", 1 << 20, 2, 10, 3), Region("index", 1 << 21, 2, 20, 3)
    pages, theirs, keys_there = [1, 2, 3, 7], [8, 9, 10, 11], [4, 3, 2, 1]
    regions = [(source, target, theirs), (*keys, keys_there)]
    writes, parts = [], []
    for span in slices([source, keys[0]], len(pages), 40):
        of_span = plan_span(span, regions, pages, 6, is_hashed=True)
        writes += list(of_span[0])
        parts += of_span[1]
        assert plan_span(span, regions, pages, 6, is_hashed=False)[1] == []
    assert writes == [
        *plan_writes(source, target, pages, theirs, 6),
        *plan_writes(*keys, pages, keys_there, 6),
    ]
    assert parts == layer_parts([(source, pages), (keys[0], pages)])


def test_slices_name_the_layers_of_each_region() -> None:
    kv, index = Region("kv", 0, 3, 10, 4), Region("index", 0, 2, 10, 4)
    assert layers_in([kv, index], LayerSpan(1, 3)) == {"kv": range(1, 3), "index": range(1)}
    assert layers_in([kv, index], LayerSpan(3, 2)) == {"index": range(2)}


def test_a_batch_of_writes_ends_with_the_one_that_reaches_the_limit() -> None:
    writes = Writes([Write(0, 100, 10), Write(10, 110, 10), Write(20, 120, 10)])
    assert [len(writes.head(9, limit)) for limit in (1, 10, 11, 20, 21, 30, 99)] == [
        1,
        1,
        2,
        2,
        3,
        3,
        3,
    ]
    assert len(writes.head(2, 99)) == 2
    assert len(writes.head(0, 99)) == 0
    assert writes[1:].num_bytes == 20
    assert writes[2] == Write(20, 120, 10)
