"""Clusters over the demo model, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.clusters import demo, running

from tidepool.deploy.cluster import Cluster


@pytest.fixture(scope="module")
def demo_cluster() -> Iterator[Cluster]:
    """One prefill node, one decode node and the front, on a local Ray."""
    with running(demo({"cluster.name": "e2e", "prefill.chunk_tokens": 256})) as cluster:
        yield cluster
