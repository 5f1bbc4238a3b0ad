"""copy_rows and load_cache_to_device_buffer: bit for bit, any row size, guard rows unchanged."""

from __future__ import annotations

import threading

import pytest
import torch

from tidepool.common.errors import KernelError
from tidepool.kernels.copy_rows import copy_rows, rows_of_runs
from tidepool.kernels.swap_in import load_cache_to_device_buffer

ROW_BYTES = [1, 2, 3, 7, 8, 12, 16, 17, 132, 576, 584, 656, 1152, 1153]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def random_bytes(*shape: int) -> torch.Tensor:
    """Random bytes, so every NaN pattern of every type occurs."""
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def slots(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_all_layers_are_copied_bit_for_bit_and_nothing_else(row_bytes: int) -> None:
    source, target = random_bytes(3, 40, row_bytes), random_bytes(3, 30, row_bytes)
    expected, kept = target.clone(), source.clone()
    source_rows, target_rows = torch.randperm(40)[:20], torch.randperm(30)[:20]
    source_rows[4] = target_rows[9] = -1
    copy_rows(source, target, source_rows, target_rows)
    for s, t in zip(source_rows.tolist(), target_rows.tolist(), strict=True):
        if s >= 0 and t >= 0:
            expected[:, t] = source[:, s]
    assert torch.equal(target, expected)
    assert torch.equal(source, kept)


@pytest.mark.parametrize("row_bytes", [3, 656])
def test_a_run_of_rows_is_copied_like_any_other(row_bytes: int) -> None:
    source, target = random_bytes(2, 40, row_bytes), random_bytes(2, 30, row_bytes)
    expected = target.clone()
    expected[:, 7:23] = source[:, 20:36]
    copy_rows(source, target, torch.arange(20, 36), torch.arange(7, 23))
    assert torch.equal(target, expected)
    expected[:, 7:23] = source[:, 20:36].flip(1)
    copy_rows(source, target, torch.arange(20, 36), torch.arange(7, 23).flip(0))
    assert torch.equal(target, expected)


def test_rows_with_gaps_between_them_leave_the_gaps_alone() -> None:
    source, memory = random_bytes(2, 8, 17), random_bytes(2, 8, 23)
    before = memory.clone()
    copy_rows(source, memory[..., 3:20], slots(1, 5), slots(6, 0))
    assert torch.equal(memory[..., :3], before[..., :3])
    assert torch.equal(memory[..., 20:], before[..., 20:])
    assert torch.equal(memory[:, [6, 0], 3:20], source[:, [1, 5]])


def test_rows_at_an_odd_address_are_copied_like_any_other() -> None:
    source, memory = random_bytes(2, 8, 16), random_bytes(2 * 8 * 16 + 3)
    target, before = memory[3:].view(2, 8, 16), memory.clone()
    copy_rows(source, target, slots(1, 5), slots(6, 0))
    assert torch.equal(target[:, [6, 0]], source[:, [1, 5]])
    target[:, [6, 0]] = before[3:].view(2, 8, 16)[:, [6, 0]]
    assert torch.equal(memory, before)


def test_no_rows_and_only_skipped_rows_copy_nothing() -> None:
    source, target = random_bytes(2, 4, 8), random_bytes(2, 4, 8)
    before = target.clone()
    copy_rows(source, target, slots(), slots())
    copy_rows(source, target, slots(-1, 2), slots(1, -1))
    assert torch.equal(target, before)


def test_rows_of_runs_lists_the_rows_in_order() -> None:
    assert rows_of_runs([(8, 2), (0, 0), (3, 3)]).tolist() == [8, 9, 3, 4, 5]
    assert rows_of_runs([]).dtype == torch.int64
    with pytest.raises(KernelError):
        rows_of_runs([(0, -1)])


@pytest.mark.parametrize(("source_row", "target_row"), [(4, 0), (0, 5), (-2, 0), (0, -2)])
def test_copies_outside_a_pool_are_refused(source_row: int, target_row: int) -> None:
    target = random_bytes(2, 5, 8)
    before = target.clone()
    with pytest.raises(KernelError, match="copy_rows"):
        copy_rows(random_bytes(2, 4, 8), target, slots(source_row), slots(target_row))
    assert torch.equal(target, before)


def test_pools_of_other_shapes_are_refused() -> None:
    with pytest.raises(KernelError, match="L=2"):
        copy_rows(random_bytes(2, 4, 8), random_bytes(3, 4, 8), slots(0), slots(0))
    with pytest.raises(KernelError, match="X=8"):
        copy_rows(random_bytes(2, 4, 8), random_bytes(2, 4, 9), slots(0), slots(0))
    with pytest.raises(KernelError, match="T=1"):
        copy_rows(random_bytes(2, 4, 8), random_bytes(2, 4, 8), slots(0), slots(0, 1))


@pytest.mark.parametrize("row_bytes", ROW_BYTES)
def test_a_miss_plan_is_executed_up_to_its_counts(row_bytes: int) -> None:
    host, device = random_bytes(50, row_bytes), random_bytes(40, row_bytes)
    expected = device.clone()
    host_slots = torch.randint(0, 50, (3, 6))
    device_rows = torch.randperm(40)[:18].view(3, 6)
    counts = torch.tensor([4, 0, 6], dtype=torch.int32)
    for row, count in enumerate(counts.tolist()):
        expected[device_rows[row, :count]] = host[host_slots[row, :count]]
        host_slots[row, count:] = -1
        device_rows[row, count:] = 1 << 40
    load_cache_to_device_buffer(host, device, host_slots, device_rows, counts)
    assert torch.equal(device, expected)


def test_an_empty_plan_copies_nothing() -> None:
    host, device = random_bytes(5, 8), random_bytes(5, 8)
    before = device.clone()
    none = torch.full((2, 3), -1)
    load_cache_to_device_buffer(host, device, none, none, torch.zeros(2, dtype=torch.int32))
    load_cache_to_device_buffer(host, device, none[:0], none[:0], torch.zeros(0, dtype=torch.int32))
    assert torch.equal(device, before)


@pytest.mark.parametrize(
    ("host_slot", "device_row", "count"),
    [(5, 0, 1), (-1, 0, 1), (0, 5, 1), (0, -1, 1), (0, 0, 2), (0, 0, -1)],
)
def test_a_plan_that_points_outside_is_refused(host_slot, device_row, count) -> None:
    host, device = random_bytes(5, 8), random_bytes(5, 8)
    before = device.clone()
    with pytest.raises(KernelError, match="load_cache_to_device_buffer"):
        load_cache_to_device_buffer(
            host,
            device,
            slots(host_slot)[None],
            slots(device_row)[None],
            torch.tensor([count], dtype=torch.int32),
        )
    assert torch.equal(device, before)


def test_several_threads_may_copy_at_the_same_time() -> None:
    source, target = random_bytes(2, 400, 656), torch.zeros(2, 400, 656, dtype=torch.uint8)
    failures: list[Exception] = []

    def work(part: int) -> None:
        rows = torch.arange(part * 100, part * 100 + 100).flip(0)
        try:
            for _ in range(20):
                copy_rows(source, target, rows, rows)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert torch.equal(source, target)
