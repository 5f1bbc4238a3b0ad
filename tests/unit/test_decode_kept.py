"""What a decode node goes on from, and what it leaves alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.engines import exact_config
from helpers.tiny_models import VETTED_SEEDS, session_checkpoint

from tidepool.common.errors import SegmentError
from tidepool.decode_node.kept import MAX_UNPROVEN, KeptMemory, claim, fingerprint
from tidepool.hostpool.segment import SharedSegment
from tidepool.model.config import geometry
from tidepool.model.runtime import check_model

SEED = VETTED_SEEDS["glm5"][0]


class Keeper:
    """A keeper and the link to it, without a process."""

    def __init__(self) -> None:
        self.held: SharedSegment | None = None
        self.is_owner = False
        self.error: SegmentError | None = None
        self.has_ended = False

    def own(self, timeout_s: float) -> SharedSegment | None:
        self.is_owner = True
        if self.error is not None:
            raise self.error
        if self.held is None:
            return None
        return SharedSegment.attach(os.dup(self.held.descriptor))

    def hold(self, segment: SharedSegment) -> None:
        self.held = segment

    def end(self) -> None:
        self.has_ended = True

    def close(self) -> None:
        return


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm5", SEED)


def claimed(keeper: Keeper, path: Path, **overrides: object) -> KeptMemory:
    config = exact_config(path, **overrides)
    kv = geometry(check_model(config), config.kv)
    return claim(keeper, config, kv, 256)  # type: ignore[arg-type]


def test_the_next_process_finds_the_memory_and_its_notes(keeper: Keeper, path: Path) -> None:
    first = claimed(keeper, path)
    assert first.is_fresh
    assert first.port == 0
    first.note_port(4711)
    first.segment.part("kv")[7] = 9
    second = claimed(keeper, path)
    assert not second.is_fresh
    assert second.port == 4711
    assert int(second.segment.part("kv")[7]) == 9
    assert second.segment.generation == 2
    second.close()
    assert keeper.has_ended


@pytest.mark.parametrize(
    "change", [{"decode.host_tokens": 2048}, {"kv.page_size": 4}, {"decode.max_requests": 3}]
)
def test_memory_of_another_shape_is_left_alone(
    keeper: Keeper, path: Path, change: dict[str, object]
) -> None:
    old = claimed(keeper, path)
    new = claimed(keeper, path, **change)
    assert new.is_fresh
    assert keeper.held is new.segment
    assert old.segment.identity != new.segment.identity


def test_seats_and_hot_rows_may_change(keeper: Keeper, path: Path) -> None:
    claimed(keeper, path)
    assert not claimed(keeper, path, **{"decode.seats": 2, "decode.hot_rows": 64}).is_fresh


def test_another_checkpoint_is_another_identity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    os.utime(weights, (1.0, 1.0))
    changed = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert len({before, changed, fingerprint(tmp_path)}) == 3


def test_memory_that_was_found_wrong_is_left_alone(keeper: Keeper, path: Path) -> None:
    reasons: list[BaseException] = []
    wrong = RuntimeError("wrong")
    claimed(keeper, path).guard(reasons.append)(wrong)
    assert reasons == [wrong]
    assert claimed(keeper, path).is_fresh


def test_memory_that_ends_process_after_process_is_left_alone(keeper: Keeper, path: Path) -> None:
    ages = [claimed(keeper, path).is_fresh for _ in range(2 * MAX_UNPROVEN)]
    assert ages == ([True] + [False] * (MAX_UNPROVEN - 1)) * 2
    proven = claimed(keeper, path)
    for _ in range(2 * MAX_UNPROVEN):
        proven.segment.prove()
        proven = claimed(keeper, path)
        assert not proven.is_fresh


def test_memory_that_is_no_segment_is_replaced_and_a_living_owner_is_not(
    keeper: Keeper, path: Path
) -> None:
    keeper.error = SegmentError("torn")
    assert claimed(keeper, path).is_fresh
    keeper.own = lambda timeout_s: (_ for _ in ()).throw(keeper.error)  # type: ignore[method-assign]
    keeper.is_owner = False
    with pytest.raises(SegmentError):
        claimed(keeper, path)
