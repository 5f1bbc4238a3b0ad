"""Shared segments: parts, sizes that cannot shrink, headers that cannot lie, pools inside them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch

from tidepool.common.errors import ConfigError, SegmentError
from tidepool.common.layouts import IndexLayout, KvGeometry, RowLayout
from tidepool.hostpool import segment as segments
from tidepool.hostpool.index_pool import IndexPool
from tidepool.hostpool.pool import HostPool
from tidepool.hostpool.segment import HEADER_BYTES, PART_ALIGNMENT, SharedSegment

KV = KvGeometry(RowLayout("mla_fp32", 8, 4), IndexLayout("index_fp32", 8), 4, 3, 2)


def make(**parts: int) -> SharedSegment:
    return SharedSegment.create(parts, identity="a test", what="the test")


def again(segment: SharedSegment) -> SharedSegment:
    """The same memory as another process would map it."""
    return SharedSegment.attach(os.dup(segment.descriptor))


def test_what_one_mapping_writes_the_other_reads_at_the_same_place() -> None:
    first = make(kv=10_000, index=0, journal=70)
    second = again(first)
    assert second.parts == {"kv": 10_000, "index": 0, "journal": 70}
    assert second.identity == "a test"
    first.part("kv")[:] = torch.arange(10_000, dtype=torch.uint8)
    first.view("journal")[-1] = 9
    assert torch.equal(second.part("kv"), torch.arange(10_000, dtype=torch.uint8))
    assert second.part("journal")[-1] == 9
    assert second.part("index").numel() == 0
    assert second.part("kv").data_ptr() % 4096 == 0
    with pytest.raises(SegmentError, match="no part 'seats'"):
        second.part("seats")


def test_memory_lives_as_long_as_a_part_is_referred_to() -> None:
    segment = make(kv=100)
    part = segment.part("kv")
    segment.close()
    segment.close()
    del segment
    part.fill_(3)
    assert int(part.sum()) == 300


def test_nothing_is_left_in_shared_memory_and_nobody_can_cut_it_away() -> None:
    before = set(Path("/dev/shm").iterdir())
    segment = make(kv=100)
    assert set(Path("/dev/shm").iterdir()) == before
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(segment.descriptor, 4096)


def test_generation_counts_owners_and_a_spoiled_segment_stays_so() -> None:
    segment = make(kv=1)
    assert segment.generation == 1
    other = again(segment)
    other.begin_generation()
    assert segment.generation == 2
    assert not segment.is_spoiled
    segment.spoil()
    assert again(other).is_spoiled


def test_a_part_that_is_discarded_reads_as_zero_and_its_neighbours_stay() -> None:
    segment = make(a=PART_ALIGNMENT, b=3 * 4096, c=4096)
    for name in "abc":
        segment.part(name).fill_(7)
    segment.discard("b", 100, 2 * 4096)
    assert int(segment.part("b")[:4096].sum()) == 7 * 4096, "the page is not whole inside"
    assert int(segment.part("b")[4096:8192].sum()) == 0
    segment.discard("b", 0, 10**9)
    assert int(segment.part("b").sum()) == 0
    assert int(segment.part("a").sum()) == 7 * PART_ALIGNMENT
    assert int(segment.part("c").sum()) == 7 * 4096


def test_memory_that_is_no_segment_is_refused() -> None:
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    with pytest.raises(SegmentError, match="not sealed"):
        SharedSegment.attach(unsealed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(unsealed)
    read_end, write_end = os.pipe()
    with pytest.raises(SegmentError):
        SharedSegment.attach(read_end)
    os.close(write_end)
    for name, at in (("not a segment", 0), ("torn", segments._TABLE_AT + 20)):
        segment = make(kv=1)
        segment._memory[at] ^= 1
        with pytest.raises(SegmentError, match=name):
            again(segment)
    segment = make(kv=1)
    struct.pack_into("<Q", segment._memory, segments._TABLE_AT, HEADER_BYTES)
    with pytest.raises(SegmentError, match="does not fit"):
        again(segment)


def test_more_than_the_machine_has_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"the test needs \d{19} bytes.* has \d+"):
        make(kv=2**60)


def test_pools_work_inside_a_segment_and_find_their_bytes_again() -> None:
    segment = make(kv=HostPool.bytes_needed(KV, 5), index=IndexPool.bytes_needed(KV, 5))
    host = HostPool(KV, 5, memory=segment.part("kv"))
    index = IndexPool(KV, 5, memory=segment.part("index"))
    host.rows[2, 7] = 5
    index.mirror().host_LPX[1, 4] = 6
    second = again(segment)
    assert torch.equal(HostPool(KV, 5, memory=second.part("kv")).rows, host.rows)
    assert torch.equal(IndexPool(KV, 5, memory=second.part("index")).data, index.data)
    assert int(index.data[1, 4].to(torch.int64).sum()) == 6 * KV.index_page_bytes
    with pytest.raises(ConfigError, match="host pool needs"):
        HostPool(KV, 6, memory=segment.part("kv"))
