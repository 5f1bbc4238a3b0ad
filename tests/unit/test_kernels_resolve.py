"""resolve against a slow model with dictionaries: long random runs, every edge, poisoned rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.common.errors import KernelError
from tidepool.kernels.resolve import FAULT_FULL, FAULT_HOLE, FAULT_POSITION, resolve
from tidepool.kernels.sparse_mla import sparse_mla
from tidepool.kernels.store_rows import pack_rows
from tidepool.kernels.swap_in import load_cache_to_device_buffer


@dataclass
class Tables:
    """The tensors of one index group."""

    num_seats: int
    hot_rows: int
    ring_rows: int
    page_size: int
    max_context: int
    slot_dtype: torch.dtype = torch.int16
    step: int = 0

    def __post_init__(self) -> None:
        seats, context = self.num_seats, self.max_context
        num_pages = -(-context // self.page_size)
        self.page_table = torch.full((seats, num_pages), -1, dtype=torch.int32)
        self.ring_start = torch.zeros(seats, dtype=torch.int32)
        self.position_of_slot = torch.full((seats, self.hot_rows), -1, dtype=torch.int32)
        self.slot_of_position = torch.full((seats, context), -1, dtype=self.slot_dtype)
        self.last_use = torch.zeros(seats, self.hot_rows, dtype=torch.int32)

    @property
    def stride(self) -> int:
        return self.hot_rows + self.ring_rows

    def snapshot(self) -> list[torch.Tensor]:
        tables = self.page_table, self.ring_start, self.position_of_slot
        return [table.clone() for table in (*tables, self.slot_of_position, self.last_use)]

    def resolve(self, topk, lengths, seats, dtype=torch.int32, scores=None) -> Answer:
        """Resolves the next step; outputs start as garbage so that every one must be written."""
        self.step += 1
        topk = torch.as_tensor(topk, dtype=torch.int32)
        rows, k = topk.shape
        answer = Answer(
            torch.full((rows, k), 99, dtype=torch.int32),
            torch.full((rows, k), 99),
            torch.full((rows, k), 99),
            torch.full((rows,), 99, dtype=torch.int32),
            torch.full((rows,), 99, dtype=torch.int32),
        )
        resolve(
            topk,
            torch.tensor(lengths, dtype=dtype),
            torch.tensor(seats, dtype=dtype),
            self.page_table,
            self.ring_start,
            self.position_of_slot,
            self.slot_of_position,
            self.last_use,
            torch.tensor([self.step], dtype=torch.int32),
            answer.hot_idx,
            answer.host_slots,
            answer.device_rows,
            answer.num_misses,
            answer.faults,
            self.page_size,
            self.ring_rows,
            False,
            scores,
        )
        return answer

    def check_invariants(self) -> None:
        """The two maps are each other's inverse, in every seat."""
        for seat in range(self.num_seats):
            by_slot = {
                slot: position
                for slot, position in enumerate(self.position_of_slot[seat].tolist())
                if position >= 0
            }
            by_position = {
                position: slot
                for position, slot in enumerate(self.slot_of_position[seat].tolist())
                if slot >= 0
            }
            assert by_slot == {slot: position for position, slot in by_position.items()}
            assert len(by_slot) == len(by_position)


@dataclass
class Answer:
    hot_idx: torch.Tensor
    host_slots: torch.Tensor
    device_rows: torch.Tensor
    num_misses: torch.Tensor
    faults: torch.Tensor

    def misses(self, row: int) -> list[tuple[int, int]]:
        """(host slot, device row) in order; checks that the rest of the lists is -1."""
        count = int(self.num_misses[row])
        assert (self.host_slots[row, count:] == -1).all()
        assert (self.device_rows[row, count:] == -1).all()
        return list(
            zip(
                self.host_slots[row, :count].tolist(),
                self.device_rows[row, :count].tolist(),
                strict=True,
            )
        )


@dataclass
class SlowSeat:
    """The contract of one seat, written with a dictionary and loops."""

    tables: Tables
    seat: int
    slots: dict[int, int] = field(default_factory=dict)
    """position -> slot"""
    used: dict[int, int] = field(default_factory=dict)
    """slot -> step of its last use"""

    def resolve(self, topk: list[int], length: int, step: int, scores: list[float] | None = None):
        tables = self.tables
        ring_start = int(tables.ring_start[self.seat])
        end = min(length, ring_start + tables.ring_rows, tables.max_context)
        base = self.seat * tables.stride
        bad = {position for position in topk if position < -1 or position >= end}
        fault = FAULT_POSITION if bad else 0
        wanted = [p for p in topk if 0 <= p < ring_start and p not in bad]
        for position in wanted:
            if position in self.slots:
                self.used[self.slots[position]] = step
        holes = {p for p in wanted if p not in self.slots and self.host_slot(p) is None}
        fault |= FAULT_HOLE if holes else 0
        missing = [p for p in dict.fromkeys(wanted) if p not in self.slots and p not in holes]
        victims = self.victims(len(missing), step, scores)
        fault |= FAULT_FULL if len(victims) < len(missing) else 0
        misses = []
        for position, victim in zip(missing, victims, strict=False):
            self.slots = {p: s for p, s in self.slots.items() if s != victim}
            self.slots[position] = victim
            self.used[victim] = step
            misses.append((self.host_slot(position), base + victim))
        return [self.row(p, base, ring_start, end) for p in topk], misses, fault

    def row(self, position: int, base: int, ring_start: int, end: int) -> int:
        if 0 <= position < end and position >= ring_start:
            return base + self.tables.hot_rows + position % self.tables.ring_rows
        return base + self.slots[position] if 0 <= position < end and position in self.slots else -1

    def host_slot(self, position: int) -> int | None:
        page_size = self.tables.page_size
        page = int(self.tables.page_table[self.seat, position // page_size])
        return page * page_size + position % page_size if page >= 0 else None

    def victims(self, count: int, step: int, scores: list[float] | None) -> list[int]:
        held = {slot: position for position, slot in self.slots.items()}
        empty = [slot for slot in range(self.tables.hot_rows) if slot not in held]
        old = [slot for slot in held if self.used[slot] != step]
        rank = self.used if scores is None else steps_of({s: held[s] for s in old}, scores)
        old.sort(key=lambda slot: (rank[slot], slot))
        return sorted((empty + old)[:count])


def steps_of(held: dict[int, int], scores: list[float]) -> dict[int, int]:
    """slot -> which of 63 even steps its position's score is nearest to."""
    values = {slot: scores[min(position, len(scores) - 1)] for slot, position in held.items()}
    values = {
        slot: np.float32(-1e30 if math.isnan(value) else min(max(value, -1e30), 1e30))
        for slot, value in values.items()
    }
    low, high = min(values.values(), default=0), max(values.values(), default=0)
    if high - low < np.float32(1e-30):
        return dict.fromkeys(values, 0)
    scale = np.float32(62) / (high - low)
    return {slot: round(float((value - low) * scale)) for slot, value in values.items()}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def draw_scores(data, num_rows: int, max_context: int) -> torch.Tensor:
    few = st.sampled_from([-math.inf, -2.5, -1e-42, -0.0, 0.0, 1.0, 7.25, math.inf, math.nan])
    size = num_rows * data.draw(st.integers(1, max_context))
    drawn = data.draw(st.lists(few, min_size=size, max_size=size))
    return torch.tensor(drawn, dtype=torch.float32).view(num_rows, -1)


def run_against_model(
    data, tables: Tables, num_steps: int, k: int, dtype, is_clean: bool, has_scores: bool
) -> None:
    """Random steps over growing sequences; `is_clean`: only legal input, so no fault may occur."""
    seats = [SlowSeat(tables, seat) for seat in range(tables.num_seats)]
    lengths = [data.draw(st.integers(1, tables.max_context)) for _ in seats]
    for seat, length in enumerate(lengths):
        start = max(0, length - data.draw(st.integers(0, tables.ring_rows)))
        tables.ring_start[seat] = start
        tables.page_table[seat] = torch.randperm(50)[: tables.page_table.shape[1]]
        if not is_clean and data.draw(st.booleans()):
            tables.page_table[seat, data.draw(st.integers(0, tables.page_table.shape[1] - 1))] = -1
    for _ in range(num_steps):
        order = data.draw(st.permutations(range(tables.num_seats)))
        batch = [*order[: data.draw(st.integers(0, len(order)))], -1]
        topk = []
        for seat in batch:
            top = max(lengths[seat] - 1, 0) if is_clean else tables.max_context + 3
            low = -1 if is_clean else -3
            entries = st.lists(st.integers(low, top), min_size=k, max_size=k)
            row = data.draw(entries)
            if (
                is_clean
                and len({p for p in row if 0 <= p < int(tables.ring_start[seat])}) > tables.hot_rows
            ):
                row = [-1] * k
            topk.append(row)
        before = tables.snapshot()
        scores = draw_scores(data, len(batch), tables.max_context) if has_scores else None
        answer = tables.resolve(topk, [lengths[seat] for seat in batch], batch, dtype, scores)
        for index, seat in enumerate(batch):
            if seat < 0:
                assert answer.hot_idx[index].tolist() == [-1] * k
                assert answer.misses(index) == []
                assert int(answer.faults[index]) == 0
                continue
            given = None if scores is None else scores[index].tolist()
            hot, misses, fault = seats[seat].resolve(topk[index], lengths[seat], tables.step, given)
            assert answer.hot_idx[index].tolist() == hot
            assert answer.misses(index) == misses
            assert int(answer.faults[index]) == fault
            assert not (is_clean and fault)
            state = {p: s for s, p in enumerate(tables.position_of_slot[seat].tolist()) if p >= 0}
            assert state == seats[seat].slots
            for slot, used in seats[seat].used.items():
                assert int(tables.last_use[seat, slot]) == used
        tables.check_invariants()
        others = [seat for seat in range(tables.num_seats) if seat not in batch]
        for old, new in zip(before, tables.snapshot(), strict=True):
            assert torch.equal(old[others], new[others])
        for seat in range(tables.num_seats):
            if lengths[seat] < tables.max_context and data.draw(st.booleans()):
                lengths[seat] += 1
                start = int(tables.ring_start[seat])
                if lengths[seat] - start > tables.ring_rows:
                    tables.ring_start[seat] = start + tables.page_size


shapes = st.builds(
    Tables,
    num_seats=st.integers(1, 3),
    hot_rows=st.integers(1, 9),
    ring_rows=st.sampled_from([4, 8]),
    page_size=st.sampled_from([1, 2, 4]),
    max_context=st.integers(1, 30),
    slot_dtype=st.sampled_from([torch.int16, torch.int32]),
)


@settings(max_examples=160, deadline=None)
@given(
    data=st.data(),
    tables=shapes,
    dtype=st.sampled_from([torch.int32, torch.int64]),
    has_scores=st.booleans(),
)
def test_any_input_resolves_as_the_slow_model_does(data, tables, dtype, has_scores) -> None:
    run_against_model(data, tables, 6, data.draw(st.integers(1, 8)), dtype, False, has_scores)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), tables=shapes, has_scores=st.booleans())
def test_legal_input_never_faults(data, tables, has_scores) -> None:
    run_against_model(data, tables, 8, data.draw(st.integers(1, 6)), torch.int32, True, has_scores)


def one_seat(hot_rows: int, ring_start: int, max_context: int = 64) -> Tables:
    tables = Tables(2, hot_rows, 8, 4, max_context)
    tables.page_table[:] = torch.arange(tables.page_table.numel()).view(2, -1).flip(1)
    tables.ring_start[:] = ring_start
    return tables


@pytest.mark.parametrize("seed", range(3))
def test_a_long_run_of_full_rows_agrees_with_the_slow_model(seed: int) -> None:
    torch.manual_seed(seed)
    tables = Tables(2, 24, 8, 4, 200)
    tables.page_table[:] = torch.randperm(100).view(2, 50)
    tables.ring_start[:] = 192
    seats = [SlowSeat(tables, seat) for seat in range(2)]
    for _ in range(150):
        topk = [(torch.randperm(60)[:20].sort().values * 3 + 20).tolist() for _ in range(2)]
        answer = tables.resolve(topk, [200, 200], [1, 0])
        for row, seat in enumerate((1, 0)):
            hot, misses, fault = seats[seat].resolve(topk[row], 200, tables.step)
            assert (answer.hot_idx[row].tolist(), answer.misses(row), fault) == (hot, misses, 0)
        tables.check_invariants()


def test_with_as_many_slots_as_the_top_k_every_slot_can_be_a_victim() -> None:
    tables = one_seat(hot_rows=4, ring_start=60)
    first = tables.resolve([[0, 1, 2, 3]], [60], [0])
    assert first.hot_idx.tolist() == [[0, 1, 2, 3]]
    second = tables.resolve([[2, 10, 11, 12]], [60], [0])
    assert second.hot_idx.tolist() == [[2, 0, 1, 3]]
    third = tables.resolve([[20, 21, 22, 23]], [60], [0])
    assert third.hot_idx.tolist() == [[0, 1, 2, 3]]
    assert int(third.num_misses[0]) == 4
    assert not third.faults.any()
    tables.check_invariants()


def test_a_slot_of_this_step_is_never_a_victim() -> None:
    tables = one_seat(hot_rows=4, ring_start=60)
    tables.resolve([[0, 1, 2, 3]], [60], [0])
    answer = tables.resolve([[3, 9, 0, 8]], [60], [0])
    assert answer.hot_idx.tolist() == [[3, 1, 0, 2]]
    answer = tables.resolve([[30, 31, 32, 33, 34, 30]], [60], [0])
    assert answer.hot_idx.tolist() == [[0, 1, 2, 3, -1, 0]]
    assert int(answer.faults[0]) == FAULT_FULL
    assert int(tables.slot_of_position[0, 34]) == -1
    tables.check_invariants()


def test_the_least_recently_used_slot_goes_first_and_the_lowest_on_ties() -> None:
    tables = one_seat(hot_rows=4, ring_start=60)
    for positions in ([10, 11], [12, 13], [11, -1]):
        tables.resolve([positions], [60], [0])
    assert tables.resolve([[20]], [60], [0]).hot_idx.tolist() == [[0]]
    assert tables.resolve([[21]], [60], [0]).hot_idx.tolist() == [[2]]
    assert tables.resolve([[22]], [60], [0]).hot_idx.tolist() == [[3]]
    assert tables.resolve([[23]], [60], [0]).hot_idx.tolist() == [[1]]


def test_with_scores_the_lowest_scored_slot_goes_first_and_the_lowest_on_ties() -> None:
    tables = one_seat(hot_rows=4, ring_start=60)
    scores = torch.zeros(1, 60)
    tables.resolve([[10, 11, 12, 13]], [60], [0])
    scores[0, 10:14] = torch.tensor([3.0, -1.0, 2.0, -1.0])
    for new, slot in ((20, 1), (21, 3), (22, 2), (23, 0)):
        scores[0, new] = 4.0
        assert tables.resolve([[new]], [60], [0], scores=scores).hot_idx.tolist() == [[slot]]
    assert tables.position_of_slot[0].tolist() == [23, 20, 22, 21]
    scores[0, 20:24] = torch.tensor([-math.inf, 5.0, math.nan, 0.0])
    for new, slot in ((30, 1), (31, 2), (32, 0)):
        scores[0, new] = 4.0
        assert tables.resolve([[new]], [60], [0], scores=scores).hot_idx.tolist() == [[slot]]


def test_scores_nearer_than_a_step_count_as_equal() -> None:
    tables = one_seat(hot_rows=4, ring_start=60)
    tables.resolve([[10, 11, 12, 13]], [60], [0])
    scores = torch.zeros(1, 60)
    scores[0, 10:14] = torch.tensor([62.0, 1.4, 0.6, 0.0])
    answer = tables.resolve([[20, 21]], [60], [0], scores=scores)
    assert answer.hot_idx.tolist() == [[1, 3]]


def test_a_low_score_does_not_cost_a_slot_of_this_step_its_row() -> None:
    tables = one_seat(hot_rows=4, ring_start=60)
    tables.resolve([[0, 1, 2, 3]], [60], [0])
    scores = torch.ones(1, 60)
    scores[0, 2] = -5.0
    answer = tables.resolve([[2, 9]], [60], [0], scores=scores)
    assert answer.hot_idx.tolist() == [[2, 0]]


def test_scores_of_another_batch_size_are_refused() -> None:
    with pytest.raises(KernelError, match=r"scores_BC is float32 \[2, 60\].*B=1"):
        one_seat(4, 60).resolve([[1]], [60], [0], scores=torch.zeros(2, 60))


def test_an_emptied_slot_is_taken_before_an_old_one() -> None:
    tables = one_seat(hot_rows=3, ring_start=60)
    tables.resolve([[5, 6, 7]], [60], [0])
    tables.position_of_slot[0, 2] = -1
    tables.slot_of_position[0, 7] = -1
    assert tables.resolve([[9]], [60], [0]).hot_idx.tolist() == [[2]]


def test_a_sequence_shorter_than_the_hot_buffer_stays_resident_whole() -> None:
    tables = one_seat(hot_rows=16, ring_start=16)
    answer = tables.resolve([[*range(16), -1, -1]], [16], [1])
    assert int(answer.num_misses[0]) == 16
    for _ in range(5):
        again = tables.resolve([[*range(15, -1, -1), 3, -1]], [16], [1])
        assert int(again.num_misses[0]) == 0
        assert not again.faults.any()
        stride = tables.stride
        assert again.hot_idx[0].tolist() == [
            *(stride + i for i in range(15, -1, -1)),
            stride + 3,
            -1,
        ]


def test_ring_positions_need_no_slot_and_no_host_page() -> None:
    tables = one_seat(hot_rows=4, ring_start=10)
    tables.page_table[:] = -1
    answer = tables.resolve([[10, 17, 15, 16]], [18], [1])
    base = tables.stride + 4
    assert answer.hot_idx.tolist() == [[base + 2, base + 1, base + 7, base]]
    assert not answer.num_misses.any() and not answer.faults.any()
    assert (tables.position_of_slot == -1).all()


def test_the_edges_of_ring_and_length_are_exact() -> None:
    tables = one_seat(hot_rows=4, ring_start=10)
    answer = tables.resolve([[9, 10, 17, 18]], [18], [0])
    assert answer.hot_idx.tolist() == [[0, 4 + 2, 4 + 1, -1]]
    assert int(answer.faults[0]) == FAULT_POSITION
    beyond_ring = tables.resolve([[17, 18]], [30], [0])
    assert beyond_ring.hot_idx.tolist() == [[4 + 1, -1]]
    assert int(beyond_ring.faults[0]) == FAULT_POSITION


def test_minus_one_is_no_fault_anywhere_and_other_negatives_are() -> None:
    tables = one_seat(hot_rows=4, ring_start=10)
    answer = tables.resolve([[-1, 3, -1, 5, -1], [-1, 3, -2, 5, -1]], [10, 10], [0, 1])
    stride = tables.stride
    assert answer.hot_idx.tolist() == [[-1, 0, -1, 1, -1], [-1, stride, -1, stride + 1, -1]]
    assert answer.faults.tolist() == [0, FAULT_POSITION]


def test_a_hole_faults_only_the_positions_that_need_it() -> None:
    tables = one_seat(hot_rows=4, ring_start=20)
    tables.resolve([[5]], [20], [0])
    tables.page_table[0, 1] = -1
    answer = tables.resolve([[5, 6, 12, 1000]], [20], [0])
    assert answer.hot_idx.tolist() == [[0, -1, 1, -1]]
    assert int(answer.faults[0]) == FAULT_HOLE | FAULT_POSITION
    assert answer.misses(0) == [(int(tables.page_table[0, 3]) * 4, 1)]
    assert int(tables.slot_of_position[0, 6]) == -1
    tables.check_invariants()


def test_a_page_table_narrower_than_the_context_is_a_hole() -> None:
    tables = one_seat(hot_rows=4, ring_start=60)
    for width in (2, 0):
        tables.page_table = tables.page_table[:, :width].contiguous()
        answer = tables.resolve([[40]], [60], [0])
        assert (answer.hot_idx.tolist(), answer.faults.tolist()) == ([[-1]], [FAULT_HOLE])


def test_duplicates_are_one_row_and_one_miss() -> None:
    tables = one_seat(hot_rows=4, ring_start=60)
    answer = tables.resolve([[7, 3, 7, 7, 3]], [60], [0])
    assert answer.hot_idx.tolist() == [[0, 1, 0, 0, 1]]
    assert int(answer.num_misses[0]) == 2
    tables.check_invariants()


def test_padded_rows_touch_nothing_whatever_they_hold() -> None:
    tables = one_seat(hot_rows=4, ring_start=60)
    before = tables.snapshot()
    answer = tables.resolve([[1, 2, 3], [9999, -7, 0]], [60, -5], [-1, -1])
    assert (answer.hot_idx == -1).all()
    assert (answer.host_slots == -1).all() and (answer.device_rows == -1).all()
    assert not answer.num_misses.any() and not answer.faults.any()
    for old, new in zip(before, tables.snapshot(), strict=True):
        assert torch.equal(old, new)
    empty = tables.resolve(torch.empty(0, 3, dtype=torch.int32), [], [])
    assert empty.hot_idx.shape == (0, 3)


@pytest.mark.parametrize("seats", [[0, 0], [2, 0]])
def test_a_seat_twice_or_past_the_end_is_refused(seats: list[int]) -> None:
    with pytest.raises(KernelError, match="seats"):
        one_seat(4, 60).resolve([[1], [2]], [60, 60], seats)


def test_more_hot_rows_than_int16_can_name_are_refused() -> None:
    tables = Tables(1, (1 << 15) + 1, 8, 4, 8)
    with pytest.raises(KernelError, match="int16"):
        tables.resolve([[1]], [8], [0])


def test_a_mismatch_names_both_sides() -> None:
    tables = one_seat(4, 60)
    tables.last_use = tables.last_use[:, :3]
    with pytest.raises(KernelError, match=r"last_use_SH is int32 \[2, 3\].*H=4"):
        tables.resolve([[1]], [60], [0])


@pytest.mark.parametrize("layout", ["mla_bf16", "mla_fp8", "mla_fp32"])
def test_swapped_in_rows_give_the_attention_of_resident_ones_and_poison_is_never_read(
    layout: str,
) -> None:
    tables = one_seat(hot_rows=12, ring_start=60, max_context=80)
    tables.page_table[:] = torch.randperm(40).view(2, 20)
    latent, rope = torch.randn(2, 68, 128), torch.randn(2, 68, 16)
    packed = [pack_rows(latent[seat], rope[seat], layout) for seat in range(2)]
    row_bytes = packed[0].shape[1]
    host = torch.full((40 * 4, row_bytes), 0xFF, dtype=torch.uint8)
    device = torch.full((2 * tables.stride + 3, row_bytes), 0xFF, dtype=torch.uint8)
    guard = device[2 * tables.stride :]
    for seat in range(2):
        for position in range(60):
            page = int(tables.page_table[seat, position // 4])
            host[page * 4 + position % 4] = packed[seat][position]
        for position in range(60, 68):
            device[seat * tables.stride + 12 + position % 8] = packed[seat][position]
    for _ in range(60):
        topk = torch.stack([torch.randperm(68)[:12].sort().values for _ in range(2)])
        topk[1, 9:] = -1
        answer = tables.resolve(topk.tolist(), [68, 68], [1, 0])
        assert not answer.faults.any()
        load_cache_to_device_buffer(
            host, device, answer.host_slots, answer.device_rows, answer.num_misses
        )
        q_latent, q_rope = torch.randn(2, 3, 128), torch.randn(2, 3, 16)
        swapped, resident = torch.empty(2, 3, 128), torch.empty(2, 3, 128)
        sparse_mla(q_latent, q_rope, device, answer.hot_idx, 0.1, layout, swapped)
        whole = torch.cat([packed[1], packed[0]])
        rows = torch.where(topk >= 0, topk + torch.tensor([[0], [68]]), -1).int()
        sparse_mla(q_latent, q_rope, whole, rows, 0.1, layout, resident)
        assert swapped.isfinite().all()
        assert torch.equal(swapped, resident)
    assert (guard == 0xFF).all()
    tables.check_invariants()
