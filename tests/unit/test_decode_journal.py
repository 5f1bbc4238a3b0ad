"""The journal: what a kill in the middle of any write leaves is a state the sequences were in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tidepool.common.wire import Finish, OutputToken, PageRun, Sampling, TokenLogprob
from tidepool.decode_node.journal import Journal, Record, Shape
from tidepool.decode_node.sequence import Sequence
from tidepool.hostpool.pages import OwnerKind, PageAllocator

SHAPE = Shape(num_slots=3, max_pages=8, max_context=64)
BEST = TokenLogprob(-0.5, (3, 4), (-0.5, -1.5))


class KilledError(Exception):
    """The process is gone."""


class Mortal(Journal):
    """A journal whose process is killed after so many bytes; it may leave a hole behind them.

    What a process stores need not become visible in order inside one copy: of the store that is cut
    off, the bytes [skip, cut) are written.
    """

    def __init__(self, memory: memoryview, num_bytes: int = 2**62, skip: int = 0) -> None:
        self.left = num_bytes
        self.skip = skip
        self.num_stores = 0
        super().__init__(memory, SHAPE)

    def _store(self, offset: int, data: bytes) -> None:
        self.num_stores += 1
        if len(data) > self.left:
            skip = min(self.skip, self.left)
            self._memory[offset + skip : offset + self.left] = data[skip : self.left]
            raise KilledError
        self.left -= len(data)
        super()._store(offset, data)


@dataclass
class World:
    """Sequences as the engine would drive them, and every state each of them has been in."""

    journal: Journal
    pages: PageAllocator = field(default_factory=lambda: PageAllocator(64))
    sequences: dict[str, Sequence] = field(default_factory=dict)
    history: dict[str, list[Any]] = field(default_factory=dict)

    def apply(self, action: tuple[str, int]) -> None:
        kind, number = action
        name = f"r{number}"
        if kind == "begin" and name not in self.history:
            self.begin(name, number)
        elif name in self.sequences:
            sequence = self.sequences[name]
            if kind == "append":
                token = OutputToken(len(sequence.output), BEST if number % 2 else None)
                sequence.output.append(token)
                self.note(sequence, None)
                self.journal.append(sequence, token)
            elif kind == "durable":
                sequence.durable_len = sequence.num_prompt_tokens + max(0, len(sequence.output) - 1)
                self.note(sequence, None)
                self.journal.durable(sequence)
            elif kind in ("stop", "cancelled"):
                finish = Finish(name, 1, kind, len(sequence.output))  # type: ignore[arg-type]
                self.note(sequence, finish)
                del self.sequences[name]
                self.journal.end(sequence, finish)

    def begin(self, name: str, number: int) -> None:
        leases = [self.pages.try_acquire(3, OwnerKind.REQUEST) for _ in range(2)]
        assert leases[0] is not None and leases[1] is not None
        sampling = Sampling(max_tokens=9, seed=number, stop_token_ids=(number,))
        sequence = Sequence((name, 1), "front-0", sampling, 5 + number, leases[0], leases[1], 0.0)
        sequence.durable_len = sequence.num_prompt_tokens
        self.sequences[name] = sequence
        self.history[name] = []
        self.note(sequence, None)
        self.journal.begin(sequence)

    def note(self, sequence: Sequence, finish: Finish | None) -> None:
        state = (sequence.durable_len, tuple(sequence.output), finish)
        self.history[sequence.key[0]].append(state)

    def check(self, records: list[Record]) -> None:
        """Every record is one of the last two states of its sequence, and none is missing."""
        found = {record.key[0]: record for record in records}
        assert len(found) == len(records)
        for name, record in found.items():
            state = (record.durable_len, tuple(record.output), record.finish)
            assert state in self.history[name][-2:], name
            assert record.num_prompt_tokens == 5 + int(name[1:])
            assert record.sampling.stop_token_ids == (int(name[1:]),)
        newest = list(self.history)[-1:]
        for name, sequence in self.sequences.items():
            assert name in found or name in newest, f"{name} is lost"
            if name in found:
                assert found[name].host_runs == sequence.host_lease.runs
                assert found[name].index_runs == sequence.index_lease.runs


def recovered(memory: bytearray) -> list[Record]:
    return Journal(memoryview(bytearray(memory)), SHAPE).recover()


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "append", "append", "append", "durable", "stop", "cancelled"]),
        st.integers(0, 4),
    ),
    max_size=40,
)


@given(ACTIONS)
@settings(max_examples=200, deadline=None)
def test_a_journal_says_what_it_was_told(actions: list[tuple[str, int]]) -> None:
    memory = bytearray(SHAPE.num_bytes)
    world = World(Mortal(memoryview(memory)))
    for action in actions:
        if action[0] == "begin" and len(world.sequences) == SHAPE.num_slots:
            continue
        world.apply(action)
    records = {record.key[0]: record for record in recovered(memory)}
    for name, sequence in world.sequences.items():
        record = records[name]
        assert record.output == sequence.output
        assert record.durable_len == sequence.durable_len
        assert record.finish is None
    assert all(records[name].finish for name in records if name not in world.sequences)


SCRIPT = [
    ("begin", 0),
    ("append", 0),
    ("begin", 1),
    ("append", 1),
    ("append", 0),
    ("durable", 0),
    ("append", 1),
    ("stop", 0),
    ("begin", 2),
    ("append", 2),
    ("durable", 2),
    ("cancelled", 1),
    ("begin", 3),
    ("append", 3),
    ("begin", 4),
    ("append", 4),
    ("append", 3),
    ("durable", 3),
    ("stop", 3),
]
"""Slots are used again: of an ended record, and of a cancelled one."""


@pytest.mark.parametrize("skip", [0, 1, 8, 40])
def test_a_kill_at_any_byte_leaves_each_sequence_in_a_state_it_was_in(skip: int) -> None:
    whole = Mortal(memoryview(bytearray(SHAPE.num_bytes)))
    world = World(whole)
    for action in SCRIPT:
        world.apply(action)
    num_bytes = 2**62 - whole.left
    for cut in range(num_bytes):
        memory = bytearray(SHAPE.num_bytes)
        world = World(Mortal(memoryview(memory), cut, skip))
        with pytest.raises(KilledError):
            for action in SCRIPT:
                world.apply(action)
        world.check(recovered(memory))


@given(ACTIONS, st.integers(0, 6000), st.integers(0, 64))
@settings(max_examples=200, deadline=None)
def test_a_kill_anywhere_leaves_each_sequence_in_a_state_it_was_in(
    actions: list[tuple[str, int]], cut: int, skip: int
) -> None:
    memory = bytearray(SHAPE.num_bytes)
    world = World(Mortal(memoryview(memory), cut, skip))
    try:
        for action in actions:
            if action[0] == "begin" and len(world.sequences) == SHAPE.num_slots:
                continue
            world.apply(action)
    except KilledError:
        pass
    world.check(recovered(memory))


def test_the_next_process_writes_on_where_the_last_one_was_cut_off() -> None:
    memory = bytearray(SHAPE.num_bytes)
    world = World(Mortal(memoryview(memory)))
    for action in SCRIPT[:5]:
        world.apply(action)
    world.journal.left = 10  # type: ignore[attr-defined]
    with pytest.raises(KilledError):
        world.apply(("append", 0))
    world.sequences["r0"].output.pop()
    for _ in range(3):  # each time another process
        world.journal = Journal(memoryview(memory), SHAPE)
        records = world.journal.recover()
        assert {record.key[0]: record.output for record in records} == {
            name: sequence.output for name, sequence in world.sequences.items()
        }
        for record in records:
            world.journal.keep(record)
        world.apply(("append", 0))
        world.apply(("append", 1))
        world.apply(("durable", 1))


def test_a_damaged_record_is_lost_alone() -> None:
    memory = bytearray(SHAPE.num_bytes)
    world = World(Mortal(memoryview(memory)))
    for action in [("begin", 0), ("append", 0), ("begin", 1), ("append", 1)]:
        world.apply(action)
    for damaged_at in (128 + 8, 130):  # inside the details of the first slot
        broken = bytearray(memory)
        broken[damaged_at] ^= 0xFF
        assert [record.key[0] for record in recovered(broken)] == ["r1"]


def test_rubbish_is_no_record() -> None:
    for byte in (0x00, 0x01, 0xFF):
        assert recovered(bytearray([byte]) * SHAPE.num_bytes) == []


def test_a_sequence_that_does_not_fit_is_not_kept_and_hurts_no_other() -> None:
    memory = bytearray(SHAPE.num_bytes)
    journal = Journal(memoryview(memory), SHAPE)
    world = World(journal)
    world.apply(("begin", 0))
    world.apply(("append", 0))
    world.begin("r1", 1)
    many = OutputToken(7, TokenLogprob(-1.0, tuple(range(5000)), (0.0,) * 5000))
    for _ in range(10):
        journal.append(world.sequences["r1"], many)
    assert journal.num_not_kept == 1
    assert [record.key[0] for record in recovered(memory)] == ["r0"]
    lease = PageAllocator(0).try_acquire(0, OwnerKind.REQUEST)
    assert lease is not None
    lease.runs = tuple(PageRun(2 * number, 1) for number in range(2000))
    journal.begin(Sequence(("big", 1), "f", Sampling(max_tokens=1), 1, lease, lease, 0.0))
    assert journal.num_not_kept == 2
    for number in (2, 3, 4):
        world.apply(("begin", number))
    assert journal.num_not_kept == 3, "three slots, r0 lives"
    assert {record.key[0] for record in recovered(memory)} == {"r0", "r2", "r3"}


def test_a_long_log_gives_its_memory_back_when_its_slot_is_used_again() -> None:
    shape = Shape(num_slots=1, max_pages=1, max_context=2**17)
    journal = Journal(memoryview(bytearray(shape.num_bytes)), shape)
    discarded: list[int] = []
    journal.on_discard = lambda _, num_bytes: discarded.append(num_bytes)
    world = World(journal)
    world.apply(("begin", 0))
    sequence = world.sequences["r0"]
    for number in range(80_000):
        journal.append(sequence, OutputToken(number))
    journal.end(sequence, Finish("r0", 1, "stop", 80_000))
    assert discarded == []
    world.apply(("begin", 1))
    assert len(discarded) == 1
    assert discarded[0] > 80_000 * 16
