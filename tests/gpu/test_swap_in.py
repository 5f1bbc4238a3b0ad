"""Swap-in on CUDA: the same answers and tables as the torch references, bit for bit, and no wild row.

Plans are compared as sets of pairs (their order is free on CUDA); everything else exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from tidepool.common.errors import KernelError
from tidepool.common.layouts import DeepSeekV4Layout
from tidepool.kernels import cuda_swap_in
from tidepool.kernels.cuda_swap_in import Tuning
from tidepool.kernels.resolve import FAULT_FULL, FAULT_HOLE, FAULT_POSITION, resolve
from tidepool.kernels.swap_in import load_cache_to_device_buffer, swap_in
from tidepool.kernels.swap_in_v4 import load_v4_cache_to_device_buffer

pytestmark = pytest.mark.gpu
POISON = 0xFB
Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    topk: int = 128
    hot_rows: int = 256
    context: int = 1024
    batch: int = 4
    page_size: int = 64
    row_bytes: int = 656
    order: str = "ascending"  # or shuffled, repeated, hostile
    locality: float = 0.9
    seats_dtype: torch.dtype = torch.int64
    lens_dtype: torch.dtype = torch.int64
    holes: bool = False
    scattered: bool = False
    scores: str = ""  # or normal, few, wild
    steps: int = 12


CASES = [
    Case("plain"),
    Case("int32 indices", seats_dtype=torch.int32, lens_dtype=torch.int32),
    Case("shuffled", order="shuffled"),
    Case("repeated", order="repeated"),
    Case("hostile", order="hostile", holes=True),
    Case("sorted plan", order="shuffled", scattered=True, page_size=1),
    Case("as many slots as selected", hot_rows=128, locality=0.5),
    Case("fewer slots than selected", hot_rows=100, order="hostile"),
    Case("odd sizes", topk=131, hot_rows=259, context=1003, page_size=1, row_bytes=585),
    Case("full top-k", topk=2048, hot_rows=4096, context=16384, batch=9, steps=6),
    Case("full top-k, one row", topk=2048, hot_rows=4096, context=8192, batch=1, steps=6),
    Case("full top-k, repeated", topk=2048, hot_rows=2048, context=8192, order="repeated", steps=5),
    Case("8192 hot rows", topk=1024, hot_rows=8192, context=20000, locality=0.0, steps=14),
    Case("16384 hot rows", topk=2048, hot_rows=16384, context=65536, locality=0.0, batch=2),
    Case("16384 hot rows, hostile", topk=2048, hot_rows=16381, context=40000, order="hostile"),
    Case("many rows", topk=128, batch=512, context=512, row_bytes=48, steps=3),
    Case("scores", scores="normal"),
    Case("scores, half of them", scores="normal", locality=0.5, hot_rows=512, context=4096),
    Case("equal scores", scores="few", order="shuffled", locality=0.5),
    Case("wild scores", scores="wild", order="hostile", holes=True, locality=0.6),
    Case("scores, as many slots as selected", scores="normal", hot_rows=128, locality=0.5),
    Case("scores, fewer slots", scores="few", hot_rows=100, order="hostile"),
    Case("scores, odd", topk=131, hot_rows=259, context=1003, page_size=1, scores="wild"),
    Case("scores, full", topk=2048, hot_rows=4096, context=16384, batch=9, scores="normal"),
    Case("scores, 8192", topk=1024, hot_rows=8192, context=20000, scores="wild", steps=14),
    Case("scores, 16381", topk=2048, hot_rows=16381, context=40000, scores="normal", batch=2),
    Case("scores, sorted plan", order="shuffled", scattered=True, page_size=1, scores="normal"),
    Case("row of 584 bytes", row_bytes=584),
    Case("row of 1152 bytes", row_bytes=1152),
    Case("row of 2304 bytes", row_bytes=2304),
    Case("row of 7 bytes", row_bytes=7),
]


class World:
    """One group's tables on the CPU (reference) and on the GPU, over the same pinned host rows."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rng = torch.Generator().manual_seed(len(case.name))
        seats = self.num_seats = case.batch + 2
        pages = -(-case.context // case.page_size)
        self.ring_rows = 2 * case.page_size
        num_slots = seats * pages * case.page_size
        bytes_NX = torch.randint(0, 256, (num_slots, case.row_bytes), generator=self.rng)
        self.host_NX = bytes_NX.to(torch.uint8).pin_memory()
        page_table = torch.randperm(seats * pages, generator=self.rng).view(seats, pages).int()
        if case.holes:
            page_table[torch.rand(page_table.shape, generator=self.rng) < 0.05] = -1
        lengths = torch.randint(1, case.context + 1, (seats,), generator=self.rng)
        lengths[0] = case.context
        ring_start = (
            lengths - torch.randint(0, self.ring_rows, (seats,), generator=self.rng)
        ).clamp(min=0)
        self.lengths = lengths
        stride = case.hot_rows + self.ring_rows
        self.cpu = {
            "page_table": page_table,
            "ring_start": ring_start.int(),
            "position_of_slot": torch.full((seats, case.hot_rows), -1, dtype=torch.int32),
            "slot_of_position": torch.full((seats, case.context), -1, dtype=torch.int32),
            "last_use": torch.zeros(seats, case.hot_rows, dtype=torch.int32),
            "rows": torch.full((seats * stride, case.row_bytes), POISON, dtype=torch.uint8),
        }
        self.gpu = {name: tensor.cuda() for name, tensor in self.cpu.items()}
        self.step = 0
        self.last = torch.zeros(seats, case.topk, dtype=torch.int64)

    def next_topk(self, seats: torch.Tensor) -> torch.Tensor:
        case = self.case
        rows = torch.full((seats.numel(), case.topk), -1, dtype=torch.int64)
        for row, seat in enumerate(seats.tolist()):
            length = int(self.lengths[max(seat, 0)])
            picked = torch.randperm(length, generator=self.rng)[: case.topk]
            keep = torch.rand(picked.numel(), generator=self.rng) < case.locality
            mixed = torch.where(keep, self.last[max(seat, 0), : picked.numel()], picked)
            distinct = mixed[mixed < length].unique()
            self.last[max(seat, 0), : distinct.numel()] = distinct
            rows[row, : distinct.numel()] = distinct
        if case.order != "ascending":
            rows = rows[:, torch.randperm(case.topk, generator=self.rng)]
        if case.order in ("repeated", "hostile"):
            half = case.topk // 2
            source = torch.randint(0, case.topk, (half,), generator=self.rng)
            rows[:, torch.randperm(case.topk, generator=self.rng)[:half]] = rows[:, source]
        rows = rows.int()
        if case.order == "hostile":
            wild = torch.tensor([-2, -(2**31), 2**31 - 1, case.context, -1], dtype=torch.int32)
            at = torch.rand(rows.shape, generator=self.rng) < 0.05
            choice = torch.randint(0, wild.numel(), rows.shape, generator=self.rng)
            rows = torch.where(at, wild[choice], rows)
        return rows

    def next_scores(self, batch: int) -> torch.Tensor | None:
        """few: many are equal; wild: 77 powers of ten, zeros, infinities, no numbers."""
        kind, context = self.case.scores, self.case.context
        if not kind:
            return None
        scores = torch.randn(batch, context + 5, generator=self.rng)
        if kind == "few":
            scores = (scores * 2).round() / 2 * 0.0001
        if kind == "wild":
            scores = scores * 10.0 ** torch.randint(-40, 38, scores.shape, generator=self.rng)
            at = torch.randint(0, 40, scores.shape, generator=self.rng)
            for number, value in enumerate([float("inf"), -float("inf"), float("nan"), -0.0, 0.0]):
                scores[at == number] = value
        return scores

    def run(self, where: str, topk, lengths, seats, call, scores=None) -> Outputs:
        device = "cpu" if where == "cpu" else "cuda"
        tables = self.cpu if where == "cpu" else self.gpu
        if scores is not None:  # rows that lie apart, and shorter than the longest sequence
            scores = scores.to(device)[:, : self.case.context - 3]
        batch, k = topk.shape
        out = {
            "hot_idx": torch.full((batch, k), 99, dtype=torch.int32, device=device),
            "host_slots": torch.full((batch, k), 99, device=device),
            "device_rows": torch.full((batch, k), 99, device=device),
            "num_misses": torch.full((batch,), 99, dtype=torch.int32, device=device),
            "fault": torch.full((batch,), 99, dtype=torch.int32, device=device),
        }
        call(
            topk.to(device), lengths.to(device), seats.to(device),
            tables["page_table"], tables["ring_start"], tables["position_of_slot"],
            tables["slot_of_position"], tables["last_use"],
            torch.tensor([self.step], dtype=torch.int32, device=device), *out.values(),
            self.host_NX, tables["rows"], self.case.page_size, self.ring_rows,
            self.case.scattered, scores,
        )  # fmt: skip
        return {name: tensor.cpu() for name, tensor in out.items()}

    def check_equal(self, want: Outputs, have: Outputs, is_sorted: bool = False) -> None:
        for name in ("fault", "num_misses", "hot_idx"):
            assert torch.equal(want[name], have[name]), name
        for row, count in enumerate(want["num_misses"].tolist()):
            pairs = [
                sorted(zip(out["host_slots"][row, :count].tolist(),
                           out["device_rows"][row, :count].tolist(), strict=True))
                for out in (want, have)
            ]  # fmt: skip
            assert pairs[0] == pairs[1]
            if is_sorted:
                listed = have["host_slots"][row, :count]
                assert bool((listed[1:] > listed[:-1]).all())
        for name, tensor in self.cpu.items():
            assert torch.equal(tensor, self.gpu[name].cpu()), name


def separate(*args: object) -> None:
    *tensors, host, rows, page_size, ring_rows, is_scattered, scores = args
    resolve(*tensors, page_size, ring_rows, is_scattered, scores)
    load_cache_to_device_buffer(host, rows, *tensors[10:13], is_scattered)


def sliced(*args: object) -> None:
    *tensors, host, rows, page_size, ring_rows, _, scores = args
    resolve(*tensors, page_size, ring_rows, True, scores)
    tuning = Tuning(is_sliced=True, copy_ctas=5)
    cuda_swap_in.launch_copy(tuning, host, rows, *tensors[10:13], True)


def with_ranks(num_ranks: int) -> Callable[..., None]:
    tuning = Tuning(num_ranks=num_ranks, copy_warps=3)
    return lambda *args: cuda_swap_in.launch_swap_in(tuning, *args[:-1], scores_BC=args[-1])


WAYS = {
    "fused": swap_in,
    "separate": separate,
    "sliced": sliced,
    "one CTA a row": with_ranks(1),
    "2 CTAs a row": with_ranks(2),
    "16 CTAs a row": with_ranks(16),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answers_tables_and_rows_equal_the_references(case: Case, way: str) -> None:
    world = World(case)
    for _ in range(case.steps):
        world.step += 1
        seats = torch.randperm(world.num_seats, generator=world.rng)[: case.batch]
        seats[torch.rand(case.batch, generator=world.rng) < 0.1] = -1
        topk = world.next_topk(seats)
        lengths = torch.where(seats >= 0, world.lengths[seats], 0).to(case.lens_dtype)
        seats = seats.to(case.seats_dtype)
        scores = world.next_scores(case.batch)
        want = world.run("cpu", topk, lengths, seats, separate, scores)
        have = world.run("gpu", topk, lengths, seats, WAYS[way], scores)
        world.check_equal(want, have, case.scattered and way in ("separate", "sliced"))
    if case.order == "hostile":
        assert int(want["fault"].max()) & FAULT_POSITION
    assert bool((want["num_misses"] >= 0).all())


def test_a_hundred_steps_never_select_a_row_of_another_position() -> None:
    """Every slot outside the sequences' pages is poison; the rows selected are the right ones."""
    case = Case("long", topk=512, hot_rows=1024, context=8192, batch=6, locality=0.93)
    world = World(case)
    page_table = world.cpu["page_table"].long()
    owned = torch.zeros(world.host_NX.shape[0], dtype=torch.bool)
    for seat in range(world.num_seats):
        positions = torch.arange(int(world.lengths[seat]))
        pages = page_table[seat, positions // case.page_size]
        owned[pages * case.page_size + positions % case.page_size] = True
    world.host_NX[~owned] = POISON
    for _ in range(100):
        world.step += 1
        seats = torch.randperm(world.num_seats, generator=world.rng)[: case.batch]
        topk = world.next_topk(seats)
        have = world.run("gpu", topk, world.lengths[seats], seats, swap_in)
        rows = world.gpu["rows"].cpu()
        ring_start = world.cpu["ring_start"][seats][:, None]
        is_cached = (topk >= 0) & (topk < ring_start)
        page = page_table[seats].gather(1, topk.clamp(min=0).long() // case.page_size)
        slots = page * case.page_size + topk % case.page_size
        got = rows[have["hot_idx"].long()[is_cached]]
        assert torch.equal(got, world.host_NX[slots[is_cached]])
        assert int(have["fault"].max()) == 0


def test_two_layers_of_a_group_hold_the_same_positions() -> None:
    case = Case("layers")
    world = World(case)
    second_host = (255 - world.host_NX).pin_memory()
    second_rows = torch.full_like(world.gpu["rows"], POISON)
    for _ in range(8):
        world.step += 1
        seats = torch.arange(case.batch)
        topk = world.next_topk(seats)
        have = world.run("gpu", topk, world.lengths[seats], seats, swap_in)
        plan = [have[name].cuda() for name in ("host_slots", "device_rows", "num_misses")]
        load_cache_to_device_buffer(second_host, second_rows, *plan)
        ring_start = world.cpu["ring_start"][seats][:, None]
        rows = have["hot_idx"].long()[(topk >= 0) & (topk < ring_start)]
        assert torch.equal(255 - second_rows.cpu()[rows], world.gpu["rows"].cpu()[rows])


def test_a_graph_replays_what_it_captured() -> None:
    case = Case("graph")
    world, plain = World(case), World(case)
    seats = torch.arange(case.batch)
    lengths = world.lengths[seats]
    topk = world.next_topk(seats)
    plain.next_topk(seats)
    static = {"topk": topk.cuda(), "lens": lengths.cuda(), "seats": seats.cuda()}
    step = torch.ones(1, dtype=torch.int32, device="cuda")
    out = [
        torch.zeros(topk.shape, dtype=torch.int32, device="cuda"),
        torch.zeros(topk.shape, dtype=torch.int64, device="cuda"),
        torch.zeros(topk.shape, dtype=torch.int64, device="cuda"),
        torch.zeros(case.batch, dtype=torch.int32, device="cuda"),
        torch.zeros(case.batch, dtype=torch.int32, device="cuda"),
    ]
    tables = list(world.gpu.values())
    cuda_swap_in.load(torch.device("cuda", 0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        swap_in(*static.values(), *tables[:5], step, *out, world.host_NX, tables[5], 64, 128)
    for number in range(1, 6):
        plain.step = number
        want = plain.run("gpu", topk, lengths, seats, swap_in)
        static["topk"].copy_(topk)
        step.fill_(number)
        graph.replay()
        assert torch.equal(out[0].cpu(), want["hot_idx"])
        assert torch.equal(tables[5].cpu(), plain.gpu["rows"].cpu())
        topk = world.next_topk(seats)


@pytest.mark.parametrize("row_bytes", [1, 3, 8, 12, 15, 16, 17, 24, 31, 48, 584, 600, 1551, 4112])
@pytest.mark.parametrize("shift", [0, 1, 4, 8])
def test_rows_of_any_size_at_any_address_arrive_and_nothing_else_changes(
    row_bytes: int, shift: int
) -> None:
    host = torch.randint(0, 256, (64 * row_bytes + shift,), dtype=torch.uint8).pin_memory()
    host_NX = host[shift:].view(64, row_bytes)
    device = torch.full((50 * row_bytes + 16,), POISON, dtype=torch.uint8, device="cuda")
    device_MX = device[8 - shift : 8 - shift + 50 * row_bytes].view(50, row_bytes)
    expected = device.cpu()
    slots, rows = torch.randperm(64)[:30].view(3, 10), torch.randperm(50)[:30].view(3, 10)
    counts = torch.tensor([10, 0, 7], dtype=torch.int32)
    view = expected[8 - shift : 8 - shift + 50 * row_bytes].view(50, row_bytes)
    for row, count in enumerate(counts.tolist()):
        view[rows[row, :count]] = host_NX[slots[row, :count]]
    load_cache_to_device_buffer(host_NX, device_MX, slots.cuda(), rows.cuda(), counts.cuda())
    assert torch.equal(device.cpu(), expected)


def test_a_plan_entry_out_of_range_is_skipped() -> None:
    host = torch.randint(0, 256, (8, 64), dtype=torch.uint8).pin_memory()
    device = torch.full((8, 64), POISON, dtype=torch.uint8, device="cuda")
    slots = torch.tensor([[1, -1, 8, 2, 1 << 40]], device="cuda")
    rows = torch.tensor([[0, 1, 2, 8, 3]], device="cuda")
    counts = torch.tensor([5], dtype=torch.int32, device="cuda")
    load_cache_to_device_buffer(host, device, slots, rows, counts)
    assert torch.equal(device[0].cpu(), host[1])
    assert bool((device[1:] == POISON).all())


@pytest.mark.parametrize("page_size", [1, 64])
def test_v4_entries_move_value_and_scale_and_nothing_else(page_size: int) -> None:
    page_bytes = DeepSeekV4Layout().page_bytes(page_size)
    host = torch.randint(0, 256, (12, page_bytes), dtype=torch.uint8)
    device = torch.full((9, page_bytes), POISON, dtype=torch.uint8)
    count = min(7 * page_size // 2, 200)
    slots = torch.randperm(12 * page_size)[: 2 * count].view(2, count)
    rows = torch.randperm(9 * page_size)[: 2 * count].view(2, count)
    counts = torch.tensor([count, count // 2], dtype=torch.int32)
    on_gpu = device.cuda()
    load_v4_cache_to_device_buffer(
        host.pin_memory(), on_gpu, slots.cuda(), rows.cuda(), counts.cuda(), page_size
    )
    load_v4_cache_to_device_buffer(host, device, slots, rows, counts, page_size)
    assert torch.equal(on_gpu.cpu(), device)


def test_faults_are_flagged_and_change_nothing() -> None:
    case = Case("faults", topk=4, hot_rows=2, batch=3, context=256)
    world = World(replace(case, name="faults"))
    for tables in (world.cpu, world.gpu):
        tables["ring_start"].fill_(200)
        tables["page_table"][1, 0] = -1
    topk = torch.tensor([[5, 6, 7, -1], [3, 70, -1, -1], [-2, 256, 9, 9]], dtype=torch.int32)
    lengths = torch.tensor([250, 250, 250])
    world.step = 1
    args = topk, lengths, torch.arange(3)
    want = world.run("cpu", *args, separate)
    world.check_equal(want, world.run("gpu", *args, swap_in))
    assert want["fault"].tolist() == [FAULT_FULL, FAULT_HOLE, FAULT_POSITION]


def test_a_seat_past_the_tables_is_flagged_and_padded() -> None:
    world = World(Case("seat", batch=2))
    before = {name: tensor.clone() for name, tensor in world.gpu.items()}
    world.step = 1
    topk = torch.zeros(2, 128, dtype=torch.int32)
    seats = torch.tensor([-1, world.num_seats])
    have = world.run("gpu", topk, torch.tensor([9, 9]), seats, swap_in)
    assert have["fault"].tolist() == [0, cuda_swap_in.FAULT_SEAT]
    assert have["num_misses"].tolist() == [0, 0] and bool((have["hot_idx"] == -1).all())
    assert all(torch.equal(tensor, world.gpu[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("case", "pattern"),
    [
        (Case("k", topk=2049, hot_rows=4096, context=4096), "top-k 2049"),
        (Case("h", hot_rows=16385, context=256), "hot rows 16385"),
        (Case("b", batch=513, context=128, row_bytes=16), "batch 513"),
    ],
)
def test_sizes_beyond_the_kernel_are_refused_with_both_sides(case: Case, pattern: str) -> None:
    world = World(case)
    topk = torch.full((case.batch, case.topk), -1, dtype=torch.int32)
    seats = torch.arange(case.batch)
    with pytest.raises(KernelError, match=pattern):
        world.run("gpu", topk, world.lengths[seats], seats, swap_in)


def test_pageable_host_rows_are_refused() -> None:
    world = World(Case("pageable"))
    world.host_NX = world.host_NX.clone()
    seats = torch.arange(4)
    with pytest.raises(KernelError, match="pinned"):
        world.run("gpu", world.next_topk(seats), world.lengths[seats], seats, swap_in)
