"""What all tests share.

In CI (the variable CI is set) property tests draw the same examples every time, so that a red run
means that the change is wrong; anywhere else they look for new ones.

`pytest --device cuda tests/e2e` runs the end-to-end tests with their nodes on a GPU.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="of clusters' nodes")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device != "cpu":
        from helpers.clusters import use_device  # noqa: PLC0415

        use_device(device)
