"""Mirrors of pools on a GPU carry pages byte for byte, and only those asked for."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from tidepool.hostpool.memory import allocate_host
from tidepool.hostpool.mirror import HostMirror
from tidepool.kernels.copy_blocks import BlockCopier

pytestmark = pytest.mark.gpu


def wait(is_done: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not is_done():
        assert time.monotonic() < deadline_s, "the copy did not end"


@pytest.mark.parametrize("engine_bytes", [1, 1 << 40], ids=["copy engine", "kernel"])
def test_pages_travel_both_ways_and_others_stay(engine_bytes: int) -> None:
    device_LPX = torch.randint(0, 256, (3, 8, 512), dtype=torch.uint8, device="cuda")
    copier = BlockCopier(device_LPX.device, engine_bytes=engine_bytes)
    mirror = HostMirror("index", device_LPX, copier)
    before = mirror.host_LPX.clone()
    wait(mirror.to_host([5, 2, 3]))
    assert torch.equal(mirror.host_LPX[:, [5, 2, 3]], device_LPX[:, [5, 2, 3]].cpu())
    untouched = [0, 1, 4, 6, 7]
    assert torch.equal(mirror.host_LPX[:, untouched], before[:, untouched])
    mirror.host_LPX[:, 7] = 9
    expected = device_LPX.clone()
    expected[:, 7] = 9
    mirror.to_device([7])
    assert torch.equal(device_LPX, expected)
    mirror.close()


@pytest.mark.parametrize("engine_bytes", [1, 8192, 1 << 40], ids=["copy engine", "both", "kernel"])
@pytest.mark.parametrize("offset", [0, 8, 4, 1])
def test_blocks_of_any_size_at_any_address_are_copied_bit_for_bit(
    engine_bytes: int, offset: int
) -> None:
    copier = BlockCopier(torch.device("cuda", 0), engine_bytes=engine_bytes)
    source = torch.randint(0, 256, (200_000,), dtype=torch.uint8, device="cuda")
    memory = allocate_host(200_000, pin=True)
    memory.data.fill_(7)
    expected = memory.data.clone()
    blocks, at = [], offset
    for size in (1, 7, 8, 16, 656, 8192, 8193, 16384, 50_001):
        blocks.append((source.data_ptr() + at, memory.data.data_ptr() + at, size))
        expected[at : at + size] = source[at : at + size].cpu()
        at += size + 32 - size % 16 if offset == 0 else size + 16
    wait(copier.copy(blocks))
    assert torch.equal(memory.data, expected)
    memory.close()


def test_a_copy_begins_behind_the_event_it_is_given() -> None:
    device_LPX = torch.zeros(2, 4, 4096, dtype=torch.uint8, device="cuda")
    mirror = HostMirror("kv", device_LPX, BlockCopier(device_LPX.device))
    torch.cuda._sleep(200_000_000)
    device_LPX[:, 1] = 3
    computed = torch.cuda.Event()
    computed.record()
    is_done = mirror.to_host([1], computed)
    assert not is_done()
    wait(is_done)
    assert bool((mirror.host_LPX[:, 1] == 3).all())
    mirror.close()
