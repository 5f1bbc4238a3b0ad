"""Which blocks a mirror copies: addresses only, so that no GPU is needed (tests/gpu has the copies)."""

from __future__ import annotations

import itertools

import pytest
import torch

from tidepool.hostpool.mirror import HostMirror
from tidepool.kernels.copy_blocks import BlockCopier


@pytest.mark.parametrize("layers", [None, range(3), range(1, 2), range(1, 3)], ids=str)
@pytest.mark.parametrize("pages", [[5], [2, 3, 4], [6, 1, 2, 0], list(range(8))], ids=str)
def test_the_blocks_of_pages_are_those_pages_in_those_layers(
    pages: list[int], layers: range | None
) -> None:
    source_LPX = torch.randint(1, 256, (3, 8, 40), dtype=torch.uint8)
    target_LPX = torch.zeros_like(source_LPX)
    mirror = HostMirror("index", source_LPX)
    blocks = mirror._blocks(source_LPX, target_LPX, pages, layers)
    assert BlockCopier(torch.device("cpu")).copy(blocks)()
    chosen = list(range(3) if layers is None else layers)
    expected = torch.zeros_like(source_LPX)
    for layer in chosen:
        expected[layer, pages] = source_LPX[layer, pages]
    assert torch.equal(target_LPX, expected)
    num_runs = 1 + sum(after != before + 1 for before, after in itertools.pairwise(pages))
    assert len(blocks) == num_runs * len(chosen)


def test_a_pool_on_the_cpu_is_its_own_mirror() -> None:
    data_LPX = torch.zeros(2, 4, 8, dtype=torch.uint8)
    mirror = HostMirror("kv", data_LPX)
    assert mirror.is_device
    assert mirror.region() == mirror.device_region()
    assert mirror.to_host([1, 2], None, range(1))()
