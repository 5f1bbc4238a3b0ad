"""Engines without processes: a unified node stepped by hand, with every pool poisoned and checked.

    node = UnifiedHarness(path, **{"decode.hot_rows": 16, "kv.page_size": 4})
    (tokens,) = node.generate([prompt], max_tokens=32)

Freed pages are overwritten with NaN bytes and all invariants are checked after every step, so that
a read of freed or stale memory shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tidepool.common.config import Config, resolve
from tidepool.common.wire import Sampling
from tidepool.deploy.local import LocalNode

EXACT = {
    "kv.layout": "mla_fp32",
    "kv.index_layout": "index_fp32",
    "kv.page_size": 16,
    "model.dtype": "float32",
    "model.device": "cpu",
    "model.threads": 1,
    "model.strict_norm_eps": True,
    "prefill.pool_tokens": 2048,
    "decode.host_tokens": 4096,
    "decode.index_tokens": 4096,
    "decode.seats": 4,
    "decode.hot_rows": 0,
}
"""Everything in fp32, norms as transformers has them, the whole context resident."""


def exact_config(path: Path | str, **overrides: Any) -> Config:
    return resolve(None, {"model.path": str(path), **EXACT, **overrides}).config


class UnifiedHarness(LocalNode):
    """A LocalNode of an exact configuration that poisons freed pages and checks itself."""

    def __init__(self, path: Path | str, **overrides: Any) -> None:
        super().__init__(exact_config(path, **overrides))
        coordinator = self.decode.coordinator
        self.pool.pages.on_free = self.pool.poison
        coordinator.host.pages.on_free = coordinator.host.poison
        coordinator.index.pages.on_free = coordinator.index.poison

    def ask(self, request_id: str, prompt: list[int], **sampling: Any) -> None:
        """Submits a request, greedy unless `sampling` says otherwise."""
        self.submit(request_id, prompt, Sampling(**{"temperature": 0.0, **sampling}))

    def step(self) -> bool:
        busy = super().step()
        self.check_invariants()
        return busy

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
        """Runs all prompts together; returns the output token ids of each."""
        begin = len(self.finishes)
        ids = [f"g{begin}-{number}" for number in range(len(prompts))]
        for request_id, prompt in zip(ids, prompts, strict=True):
            self.ask(request_id, prompt, **sampling)
        self.run()
        return [self.output(request_id) for request_id in ids]

    def assert_empty(self) -> None:
        """Every pool is as full as at the start."""
        coordinator = self.decode.coordinator
        for pages in (self.pool.pages, coordinator.host.pages, coordinator.index.pages):
            assert pages.num_free == pages.num_total
        assert coordinator.seats.num_free == coordinator.seats.num_seats
        assert coordinator.admission.num_admitted == 0
