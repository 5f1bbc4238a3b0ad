"""The demo model answers through the sparse path, and its answers come from the host."""

from __future__ import annotations

from helpers.clusters import device_settings

from tidepool.deploy.demo.acceptance import Acceptance


def test_the_demo_model_passes_its_acceptance_on_a_small_sample() -> None:
    results = Acceptance(2, (2048, 4096, 8000), 2048, device_settings()).run()
    assert [result for result in results if not result.passed] == []
    assert len(results) == 7
