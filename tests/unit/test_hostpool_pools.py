"""Host, index and device pools: the four operations, memory, regions, poison."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from tidepool.common.errors import ConfigError, InvariantError
from tidepool.common.layouts import DeepSeekV4Layout, IndexLayout, KvGeometry, RowLayout
from tidepool.hostpool import memory
from tidepool.hostpool.device_pool import DevicePool
from tidepool.hostpool.index_pool import IndexPool
from tidepool.hostpool.pages import OwnerKind
from tidepool.hostpool.pool import (
    DeepSeekV4SingleKVPoolHost,
    HostPool,
    MLATokenToKVPoolHost,
    PagedHostPool,
)


def geometry(page_size: int = 4, num_layers: int = 2, num_index_layers: int = 1) -> KvGeometry:
    return KvGeometry(
        row=RowLayout("mla_bf16", 8, 4),
        index=IndexLayout("index_k", 8),
        page_size=page_size,
        num_layers=num_layers,
        num_index_layers=num_index_layers,
    )


def make_mla(page_size: int, num_pages: int) -> PagedHostPool:
    return MLATokenToKVPoolHost(geometry(page_size), num_pages)


def make_v4(page_size: int, num_pages: int) -> PagedHostPool:
    return DeepSeekV4SingleKVPoolHost(DeepSeekV4Layout(), 2, num_pages, page_size=page_size)


both_pools = pytest.mark.parametrize("make_pool", [make_mla, make_v4])


def tables(num_rows: int = 3, max_pages: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.full((num_rows, max_pages), -1, dtype=torch.int32),
        torch.zeros(num_rows, dtype=torch.int64),
    )


@both_pools
@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_sizes_round_up_to_whole_pages(make_pool, page_size: int) -> None:
    pool = make_pool(page_size, 1)
    assert pool._round_up_to_page_size(0) == 0
    assert pool._round_up_to_page_size(1) == page_size
    assert pool._round_up_to_page_size(page_size) == page_size
    assert pool._round_up_to_page_size(page_size + 1) == 2 * page_size


@both_pools
def test_alloc_page_returns_slots_of_whole_pages_or_none(make_pool) -> None:
    pool = make_pool(4, 3)
    slots = pool.alloc_page(2)
    assert slots is not None
    assert slots.dtype == torch.int64
    assert slots.tolist() == list(range(8))
    assert pool.alloc_page(2) is None
    assert pool.pages.num_free == 1
    lease = pool.take_lease(slots)
    with pytest.raises(InvariantError):
        pool.take_lease(slots)
    lease.release(OwnerKind.REQUEST)
    assert pool.pages.num_free == 3


@both_pools
@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_token_slots_follow_the_pages_and_grow_by_page(make_pool, page_size: int) -> None:
    pool = make_pool(page_size, 8)
    table, allocated = tables()
    wall = pool.pages.try_acquire(1, OwnerKind.REQUEST)
    prompt = page_size + 1
    slots = pool.alloc_paged_token_slots(table, allocated, 1, 0, prompt)
    assert slots is not None
    assert slots.tolist() == list(range(page_size, page_size + prompt))
    assert int(allocated[1]) == 2 * page_size
    behind = pool.pages.try_acquire(1, OwnerKind.REQUEST)
    assert wall is not None and behind is not None
    for position in range(prompt, 3 * page_size):
        token = pool.alloc_paged_token_slots(table, allocated, 1, position, 1)
        assert token is not None
        page = int(table[1, position // page_size])
        assert token.tolist() == [page * page_size + position % page_size]
    assert int(allocated[1]) == 3 * page_size
    assert table[1, :4].tolist() == [1, 2, 4, -1]
    again = pool.alloc_paged_token_slots(table, allocated, 1, 1, 2 * page_size)
    whole = pool.allocated_host_indices(table, 1, 3 * page_size)
    assert again is not None
    assert again.tolist() == whole[1 : 2 * page_size + 1].tolist()
    pool.pages.check_invariants()


@both_pools
def test_zero_tokens_give_no_slots_and_take_no_page(make_pool) -> None:
    pool = make_pool(4, 2)
    table, allocated = tables()
    slots = pool.alloc_paged_token_slots(table, allocated, 0, 0, 0)
    assert slots is not None
    assert (slots.numel(), slots.dtype, pool.pages.num_free) == (0, torch.int64, 2)


@both_pools
def test_a_gap_before_the_start_is_our_own_fault(make_pool) -> None:
    pool = make_pool(4, 4)
    table, allocated = tables()
    assert pool.alloc_paged_token_slots(table, allocated, 0, 0, 5) is not None
    assert pool.alloc_paged_token_slots(table, allocated, 0, 8, 1) is not None
    with pytest.raises(InvariantError, match="start 13"):
        pool.alloc_paged_token_slots(table, allocated, 0, 13, 1)
    with pytest.raises(InvariantError):
        pool.alloc_paged_token_slots(table, allocated, 0, -1, 1)


@both_pools
def test_more_pages_than_the_table_has_columns_is_our_own_fault(make_pool) -> None:
    pool = make_pool(4, 10)
    table, allocated = tables(max_pages=2)
    with pytest.raises(InvariantError, match="3 pages"):
        pool.alloc_paged_token_slots(table, allocated, 0, 0, 9)
    assert pool.pages.num_free == 10


@both_pools
def test_a_full_pool_returns_none_and_changes_nothing(make_pool) -> None:
    pool = make_pool(4, 3)
    table, allocated = tables()
    assert pool.alloc_paged_token_slots(table, allocated, 0, 0, 8) is not None
    before = table.clone(), allocated.clone()
    assert pool.alloc_paged_token_slots(table, allocated, 0, 8, 5) is None
    assert pool.alloc_paged_token_slots(table, allocated, 2, 0, 5) is None
    assert torch.equal(table, before[0])
    assert torch.equal(allocated, before[1])
    assert pool.pages.num_free == 1
    pool.pages.check_invariants()


@both_pools
def test_allocated_indices_leave_out_holes(make_pool) -> None:
    pool = make_pool(4, 3)
    table, _ = tables()
    table[0, :3] = torch.tensor([2, -1, 0])
    assert pool.allocated_host_indices(table, 0, 9).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    assert pool.allocated_host_indices(table, 0, 4).tolist() == [8, 9, 10, 11]
    assert pool.allocated_host_indices(table, 0, 0).tolist() == []
    assert pool.allocated_host_indices(table, 0, 1000).tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


@both_pools
def test_a_granted_lease_becomes_a_row_grows_there_and_leaves_once(make_pool) -> None:
    pool = make_pool(4, 4)
    table, allocated = tables()
    lease = pool.pages.try_acquire(2, OwnerKind.REQUEST)
    assert lease is not None
    pool.bind_row(table, allocated, 2, lease)
    with pytest.raises(InvariantError):
        pool.bind_row(table, allocated, 2, lease)
    assert pool.alloc_paged_token_slots(table, allocated, 2, 8, 1) is not None
    assert lease.pages == [0, 1, 2]
    assert pool.unbind_row(table, allocated, 2) is lease
    assert pool.unbind_row(table, allocated, 2) is None
    assert table[2].tolist() == [-1] * 8
    assert int(allocated[2]) == 0
    lease.release(OwnerKind.REQUEST)
    assert pool.pages.num_free == 4


def test_a_region_is_the_memory_layer_after_layer() -> None:
    host = HostPool(geometry(), 5)
    region = host.region()
    assert (region.name, region.num_layers, region.num_pages) == ("kv", 2, 5)
    assert region.page_bytes == 4 * 24
    assert region.base_address == host.rows.data_ptr()
    layer, slot = 1, 4 * 3 + 2
    address = region.base_address + (layer * 5 + 3) * region.page_bytes + 2 * 24
    assert host.rows[layer, slot].data_ptr() == address
    index = IndexPool(geometry(), 5)
    assert index.data[0, 3].data_ptr() == index.mirror().region().base_address + 3 * 4 * 12
    v4 = DeepSeekV4SingleKVPoolHost(DeepSeekV4Layout(), 2, 3)
    assert v4.region().page_bytes == 37_440
    assert v4.data[1, 2].data_ptr() == v4.region().base_address + 5 * 37_440


def test_a_device_pool_has_one_allocator_for_rows_and_index() -> None:
    pool = DevicePool(geometry(), 5)
    kv, index = (mirror.region() for mirror in pool.mirrors())
    assert (kv.name, index.name) == ("kv", "index")
    assert (kv.num_pages, index.num_pages) == (5, 5)
    assert kv.base_address == pool.rows.data_ptr()
    assert index.base_address == pool.index.data_ptr()
    assert pool.rows.shape == (2, 20, 24)
    assert pool.index.shape == (1, 5, 48)


def test_pools_without_index_layers_or_pages_are_empty() -> None:
    pool = DevicePool(geometry(num_index_layers=0), 5)
    assert pool.index.numel() == 0
    pool.poison([0, 4])
    assert HostPool(geometry(), 0).rows.numel() == 0
    assert IndexPool(geometry(num_index_layers=0), 3).mirror().region().num_layers == 0


def test_poison_is_nan_in_every_encoding_and_stays_on_its_pages() -> None:
    host, index = HostPool(geometry(), 4), IndexPool(geometry(), 4)
    device = DevicePool(geometry(), 4)
    v4 = DeepSeekV4SingleKVPoolHost(DeepSeekV4Layout(), 2, 4)
    for pool in (host, index, device, v4):
        pool.poison([1, 3])
    for memory_LPX in (
        host.rows.view(2, 4, -1),
        index.data,
        device.rows.view(2, 4, -1),
        device.index,
        v4.data,
    ):
        assert not memory_LPX[:, [0, 2]].any()
        page = memory_LPX[-1, 3]
        for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
            assert page.view(dtype).float().isnan().all()


def test_freed_pages_are_poisoned_through_on_free() -> None:
    pool = HostPool(geometry(), 4)
    pool.pages.on_free = pool.poison
    lease = pool.pages.try_acquire(2, OwnerKind.REQUEST)
    assert lease is not None
    lease.release(OwnerKind.REQUEST)
    assert (pool.rows[:, :8] == 0xFF).all()
    assert not pool.rows[:, 8:].any()


def test_host_memory_is_page_aligned_zero_and_touched_lazily() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident_bytes()
    big = memory.allocate_host(1 << 30, pin=False)
    assert big.data.data_ptr() % mmap.PAGESIZE == 0
    assert big.data[:: 1 << 28].tolist() == [0] * 4
    assert resident_bytes() - before < 1 << 27
    big.close()


def test_more_memory_than_the_machine_has_is_refused_with_both_numbers() -> None:
    available = memory.available_host_bytes()
    with pytest.raises(ConfigError) as caught:
        HostPool(geometry(page_size=256, num_layers=1000), available // 1000)
    assert str(available) in str(caught.value)
    assert str((available // 1000) * 1000 * 256 * 24) in str(caught.value)


def test_pinning_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no CUDA device"):
        HostPool(geometry(), 2, pin=True)


def test_the_lowest_cgroup_limit_counts(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "a/b").mkdir(parents=True)
    membership.write_text("0::/a/b\n")
    assert list(memory._cgroup_limits(membership, root)) == []
    (root / "a/b/memory.max").write_text("max\n")
    (root / "a/memory.max").write_text("4096\n")
    (root / "memory.max").write_text("8192\n")
    assert list(memory._cgroup_limits(membership, root)) == [4096, 8192]
    membership.write_text("5:cpu,cpuacct:/x\n4:memory:/y\n")
    (root / "memory/y").mkdir(parents=True)
    (root / "memory/y/memory.limit_in_bytes").write_text("1234\n")
    assert list(memory._cgroup_limits(membership, root)) == [1234]
    assert list(memory._cgroup_limits(tmp_path / "none", root)) == []
