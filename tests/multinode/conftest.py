"""One cluster for all tests of this folder: each leaves it whole, or the next one gets a new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from multinode.faults import Faults
from multinode.ray_cluster import RayCluster, multinode_cluster
from multinode.streams import Answers

ROLES = ["head", "front-0 front-1", "prefill-0", "decode-0", "prefill-1 decode-1"]
SETTINGS = {
    "prefill.chunk_tokens": 256,
    "decode.seats": 8,
    "front.recovery_wait_s": 60.0,
    "front.max_attempts": 10,  # a machine with too few cores loses heartbeats too
}
READY_TIMEOUT_S = 90.0


class Shared:
    """The cluster, its right answers, and what ends it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._cluster: RayCluster | None = None
        self._answers: Answers | None = None

    def get(self) -> tuple[RayCluster, Answers]:
        if self._cluster is None or self._answers is None:
            self._cluster = self._stack.enter_context(multinode_cluster(ROLES, SETTINGS))
            self._answers = Answers(self._cluster)
        return self._cluster, self._answers

    def close(self) -> None:
        self._cluster = self._answers = None
        self._stack.close()


@pytest.fixture(scope="session")
def shared() -> Iterator[Shared]:
    shared = Shared()
    yield shared
    shared.close()


@pytest.fixture
def cluster(shared: Shared) -> Iterator[RayCluster]:
    """All nodes are up; after the test they must be again, and hold nothing but quarantine."""
    cluster, _ = shared.get()
    try:
        yield cluster
        cluster.wait_until_ready(READY_TIMEOUT_S)
        cluster.assert_settles()
    except BaseException:
        shared.close()
        raise


@pytest.fixture
def answers(shared: Shared, cluster: RayCluster) -> Answers:
    return shared.get()[1]


@pytest.fixture
def faults(cluster: RayCluster) -> Iterator[Faults]:
    """Faults of the test; what every side saw of them is printed if it fails."""
    faults = Faults(cluster)
    yield faults
    print(faults.timeline())
