"""A seat is filled beside the steps: the right rows, in few calls, and nobody waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import UnifiedHarness
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.decode_node import seat_fill
from tidepool.decode_node.seat_fill import SeatFill
from tidepool.decode_node.sequence import Sequence
from tidepool.hostpool.side_stream import Mark

SEED = VETTED_SEEDS["glm52"][0]
HOT: dict[str, Any] = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4, "decode.overlap": "on"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm52", SEED)


class LateMark(Mark):
    """Passes when it is told to."""

    __slots__ = ("is_joined", "is_over")

    def __init__(self) -> None:
        super().__init__(None)
        self.is_over = self.is_joined = False

    def has_passed(self) -> bool:
        return self.is_over

    def join(self) -> None:
        self.is_joined = True


def packed(positions: list[int]) -> bytes:
    return np.asarray(positions, dtype="<i4").tobytes()


def ready(node: UnifiedHarness, request_id: str) -> Sequence:
    """Steps until the request has its first token and no seat yet."""
    while not node.tokens[request_id]:
        node.prefill.step()
        node.handoff.step()
        while node.inbox:
            event = node.inbox.popleft()
            any(e.handle(event) for e in (node.prefill, node.handoff, node.decode))
    sequence = node.decode.find((request_id, 0))
    assert sequence is not None
    return sequence


def test_warm_rows_are_in_the_seat_and_in_its_tables_and_junk_is_ignored(path: Path) -> None:
    node = UnifiedHarness(path, **HOT)
    length = 3 * INDEX_TOPK
    node.ask("r", prompt(0, length), max_tokens=8)
    sequence = ready(node, "r")
    coordinator, cache = node.decode.coordinator, node.decode.coordinator.cache
    groups = len(cache.layers_of_group)
    wanted = [
        [group, group + 9, length - 1, group + 9, -5, length, 2**31 - 1] for group in range(groups)
    ]
    sequence.warm_positions = (*map(packed, wanted), packed([1]), b"\x01\x02\x03")
    assert coordinator.try_seat(sequence)
    assert sequence.seat is not None
    for group, layers in enumerate(cache.layers_of_group):
        warm = sorted({p for p in wanted[group] if 0 <= p < length})
        held = cache.position_of_slot_GSH[group, sequence.seat]
        assert held[: len(warm)].tolist() == warm
        assert (held[len(warm) :] == -1).all()
        for slot, position in enumerate(warm):
            page = sequence.host_lease.pages[position // 4]
            for layer in layers:
                row = cache.rows[layer, sequence.seat * cache.seat_rows + slot]
                assert torch.equal(row, coordinator.host.rows[layer, page * 4 + position % 4])
    cache.check_invariants()


def test_warm_bytes_that_are_no_whole_numbers_are_cut(path: Path) -> None:
    node = UnifiedHarness(path, **HOT)
    node.ask("r", prompt(0, 2 * INDEX_TOPK), max_tokens=4)
    sequence = ready(node, "r")
    sequence.warm_positions = (packed([3, 5]) + b"\xff\xff",)
    assert node.decode.coordinator.try_seat(sequence)
    held = node.decode.coordinator.cache.position_of_slot_GSH[0, sequence.seat]
    assert held[:3].tolist() == [3, 5, -1]


@pytest.mark.parametrize("num_tokens", [5, 3 * INDEX_TOPK])
def test_a_seat_is_filled_by_one_copy_of_all_layers(
    path: Path, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    node = UnifiedHarness(path, **HOT)
    node.ask("r", prompt(0, num_tokens), max_tokens=4)
    sequence = ready(node, "r")
    copies, uploads = [], []
    copy_rows, upload = seat_fill.copy_rows, SeatFill._upload
    monkeypatch.setattr(seat_fill, "copy_rows", lambda *a: (copies.append(a), copy_rows(*a)))
    monkeypatch.setattr(SeatFill, "_upload", lambda s, p: (uploads.append(p), upload(s, p))[1])
    assert sequence.warm_positions
    assert node.decode.coordinator.try_seat(sequence)
    assert (len(copies), len(uploads)) == (1, 1)


def test_nobody_waits_for_a_seat_that_is_being_filled(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [prompt(0, 30), prompt(1, 2 * INDEX_TOPK)]
    solo = UnifiedHarness(path)
    expected = [solo.generate([request], max_tokens=24)[0] for request in requests]
    node = UnifiedHarness(path, **HOT)
    node.ask("runs", requests[0], max_tokens=24)
    while len(node.tokens["runs"]) < 3:
        node.step()
    mark, start = LateMark(), SeatFill.start

    def late(*arguments: Any, **named: Any) -> Mark:
        start(*arguments, **named)
        return mark

    monkeypatch.setattr(SeatFill, "start", late)
    node.ask("fills", requests[1], max_tokens=24)
    while not node.tokens["fills"]:
        node.step()
    before = len(node.tokens["runs"])
    for _ in range(6):
        node.step()
    assert len(node.tokens["runs"]) == before + 6
    assert len(node.tokens["fills"]) == 1
    mark.is_over = True
    node.run()
    assert not mark.is_joined
    assert [node.output("runs"), node.output("fills")] == expected
    node.assert_empty()


def test_a_seat_is_waited_for_on_the_device_when_nobody_else_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = prompt(1, 2 * INDEX_TOPK)
    expected = UnifiedHarness(path).generate([request], max_tokens=6)
    mark, start = LateMark(), SeatFill.start
    monkeypatch.setattr(SeatFill, "start", lambda *a, **k: (start(*a, **k), mark)[1])
    node = UnifiedHarness(path, **HOT)
    assert node.generate([request], max_tokens=6) == expected
    assert mark.is_joined
    node.assert_empty()


def test_a_request_that_ends_while_its_seat_is_filled_gives_everything_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = UnifiedHarness(path, **HOT)
    node.ask("runs", prompt(0, 30), max_tokens=30)
    while len(node.tokens["runs"]) < 3:
        node.step()
    start = SeatFill.start
    monkeypatch.setattr(SeatFill, "start", lambda *a, **k: (start(*a, **k), LateMark())[1])
    node.ask("gone", prompt(1, 2 * INDEX_TOPK), max_tokens=30)
    while not node.tokens["gone"]:
        node.step()
    node.step()
    node.cancel("gone")
    node.run()
    assert node.finishes["gone"].reason == "cancelled"
    assert len(node.output("runs")) == 30
    node.assert_empty()


def test_beside_running_requests_a_step_seats_two_at_most(path: Path) -> None:
    node = UnifiedHarness(path, **{**HOT, "decode.seats": 8})
    node.ask("runs", prompt(0, 20), max_tokens=60)
    while len(node.tokens["runs"]) < 3:
        node.step()
    sequences = []
    for number in range(5):
        node.ask(f"r{number}", prompt(number + 1, 20), max_tokens=40)
        sequences.append(ready(node, f"r{number}"))
    seated = []
    for _ in range(3):
        node.decode.step()
        seated.append(sum(sequence.seat is not None for sequence in sequences))
    assert seated == [2, 4, 5]
    node.run()
    node.assert_empty()
