"""Mirrors of pools on a GPU carry pages byte for byte, and only those asked for."""

from __future__ import annotations

import pytest
import torch

from tidepool.hostpool.mirror import HostMirror

pytestmark = pytest.mark.gpu


def test_pages_travel_both_ways_and_others_stay() -> None:
    device_LPX = torch.randint(0, 256, (3, 8, 512), dtype=torch.uint8, device="cuda")
    mirror = HostMirror("index", device_LPX)
    before = mirror.host_LPX.clone()
    mirror.to_host([5, 2])
    assert torch.equal(mirror.host_LPX[:, [5, 2]], device_LPX[:, [5, 2]].cpu())
    untouched = [0, 1, 3, 4, 6, 7]
    assert torch.equal(mirror.host_LPX[:, untouched], before[:, untouched])
    mirror.host_LPX[:, 7] = 9
    expected = device_LPX.clone()
    expected[:, 7] = 9
    mirror.to_device([7])
    assert torch.equal(device_LPX, expected)
    mirror.close()
