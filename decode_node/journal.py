"""What a decode node knows of each sequence, in memory that outlives the node's process.

One slot a sequence, in the part "journal" of the node's segment (hostpool/segment.py). Written on the
step thread as the engine changes its own state, read once by the node's next process:

| bytes of a slot          | hold                                                                     |
|--------------------------|--------------------------------------------------------------------------|
| 2 x STATE_BYTES          | state, twice: version, nonce, is_live, durable_len, hash of the details  |
| details                  | length; key, front, sampling, prompt length, pages (MessagePack)         |
| log, to the slot's end   | output tokens in order, then perhaps the Finish; each entry with its hash |

A process can be killed inside any of these writes, so none of them is believed unless its hash is
right, and the order of writes makes every prefix of them a state the sequence was in:

* A new state goes over the older of the two: while it is torn, the other is the state.
* Details are written while the state says that the slot is free, and the state names their hash.
* The log only grows. An entry's hash covers the record's nonce and the entry's number, so what an
  earlier record left behind does not continue it; a torn entry is no entry.
* A token is in the log before it is sent, the Finish before the pages are free, and `durable_len`
  covers rows only once they are final in their pages.

So a torn write loses nothing but itself. A record that is damaged in another way fails its hash, and
its sequence alone is lost: the front hears that it is unknown here, and submits it again.

A slot whose record has a Finish is kept until another sequence needs it, since the front may not have
received the last tokens. Memory is x86 or ARM shared memory that survives a process, not a machine:
no write needs to be flushed.
"""

from __future__ import annotations

import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
import xxhash

from ..common.wire import Finish, OutputToken, PageRun, Sampling, TokenLogprob
from .sequence import RequestKey, Sequence

STATE_BYTES = 64
_STATE = struct.Struct("<QQQQQ")
_HASH = struct.Struct("<Q")
_DETAILS_AT = 2 * STATE_BYTES
_LENGTH = struct.Struct("<I")
_ENTRY = struct.Struct("<QIi")
"""Hash, bytes that follow, token id (or _FINISH)."""
_FINISH = -2
_BASE_DETAILS_BYTES = 4096
_PAGE_DETAILS_BYTES = 24
"""Most that a page adds to the details: a run of its own in both pools."""
_BASE_LOG_BYTES = 256 * 1024
"""Room for logprobs; a sequence that needs more is no longer kept."""
_MASK = 2**64 - 1
_DISCARD_BYTES = 1024 * 1024
"""A log that grew past it gives its memory back when its slot is used again."""


class _Details(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    number: int
    key: tuple[str, int]
    front_id: str
    sampling: Sampling
    num_prompt_tokens: int
    host_runs: tuple[PageRun, ...]
    index_runs: tuple[PageRun, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a journal; equal sizes read each other's records.

    Attributes:
        num_slots: sequences it holds, ended ones that are still remembered included.
        max_pages: most pages a sequence has in one pool.
        max_context: longest sequence, in tokens.
    """

    num_slots: int
    max_pages: int
    max_context: int

    @property
    def details_bytes(self) -> int:
        return _BASE_DETAILS_BYTES + _PAGE_DETAILS_BYTES * self.max_pages

    @property
    def slot_bytes(self) -> int:
        log_bytes = _BASE_LOG_BYTES + _ENTRY.size * self.max_context
        return -(-(_DETAILS_AT + self.details_bytes + log_bytes) // 4096) * 4096

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.slot_bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One sequence as the journal has it.

    Attributes:
        number: grows with each sequence that was begun.
        output: tokens, all of which may have been sent.
        finish: the end it came to, if it did; its pages are not its own any more then.
    """

    slot: int
    number: int
    key: RequestKey
    front_id: str
    sampling: Sampling
    num_prompt_tokens: int
    host_runs: tuple[PageRun, ...]
    index_runs: tuple[PageRun, ...]
    durable_len: int
    output: list[OutputToken]
    finish: Finish | None


class SequenceLog(Protocol):
    """What the engine tells as it happens; step thread. `Journal` keeps it, `NoJournal` does not."""

    def begin(self, sequence: Sequence) -> None:
        """It is READY: its prompt is final in its pages."""

    def append(self, sequence: Sequence, token: OutputToken) -> None:
        """Its next output token, which has not been sent yet."""

    def durable(self, sequence: Sequence) -> None:
        """Rows below its `durable_len` are final in its pages."""

    def end(self, sequence: Sequence, finish: Finish) -> None:
        """It has ended; its pages are still its own."""


class NoJournal:
    """Nothing outlives the process."""

    def begin(self, sequence: Sequence) -> None:
        return

    def append(self, sequence: Sequence, token: OutputToken) -> None:
        return

    def durable(self, sequence: Sequence) -> None:
        return

    def end(self, sequence: Sequence, finish: Finish) -> None:
        return


class _Slot:
    """Where one record is written. `store(offset, data)` writes into the journal's memory."""

    def __init__(self, store: Callable[[int, bytes], None], base: int, shape: Shape) -> None:
        self._store = store
        self._base = base
        self._shape = shape
        self.log_at = base + _DETAILS_AT + shape.details_bytes
        self._end_at = base + shape.slot_bytes
        self.version = 0
        self.nonce = 0
        self.details_hash = 0
        self.num_entries = 0
        self.next_at = self.log_at

    def begin(self, details: bytes, durable_len: int) -> None:
        """Writes a new record over an old one; `fits` has said that there is room."""
        self.free()
        self._store(self._base + _DETAILS_AT, _LENGTH.pack(len(details)) + details)
        self.nonce = secrets.randbits(64)
        self.details_hash = xxhash.xxh64_intdigest(details)
        self.num_entries = 0
        self.next_at = self.log_at
        self.set_state(is_live=True, durable_len=durable_len)

    def fits(self, details: bytes) -> bool:
        return _LENGTH.size + len(details) <= self._shape.details_bytes

    def free(self) -> None:
        self.set_state(is_live=False, durable_len=0)

    def set_state(self, *, is_live: bool, durable_len: int) -> None:
        self.version += 1
        body = _STATE.pack(self.version, self.nonce, is_live, durable_len, self.details_hash)
        at = self._base + STATE_BYTES * (self.version % 2)
        self._store(at, body + _HASH.pack(_state_hash(body)))

    def append(self, token_id: int, extra: bytes) -> bool:
        """Adds an entry to the log; False, with nothing changed, if it does not fit."""
        end_at = self.next_at + _ENTRY.size + len(extra)
        if end_at > self._end_at:
            return False
        check = _entry_hash(self.nonce, self.num_entries, token_id, extra)
        self._store(self.next_at, _ENTRY.pack(check, len(extra), token_id) + extra)
        self.num_entries += 1
        self.next_at = end_at
        return True


class Journal:
    """See the module. Implements SequenceLog. Step thread only, but for the constructor.

    Args:
        memory: `shape.num_bytes` writable bytes, zero or what a journal of this shape left.
    """

    def __init__(self, memory: memoryview, shape: Shape) -> None:
        self._memory = memory
        self._shape = shape
        self._slots = [
            _Slot(self._store, number * shape.slot_bytes, shape)
            for number in range(shape.num_slots)
        ]
        self._free = list(range(shape.num_slots - 1, -1, -1))
        self._live: dict[RequestKey, int] = {}
        self._ended: OrderedDict[RequestKey, int] = OrderedDict()
        self._number = 0
        self.on_discard: Callable[[int, int], None] = lambda _offset, _num_bytes: None
        """Gives memory of the journal back to the machine."""
        self.num_not_kept = 0
        """Sequences that did not fit, at their begin or later."""

    @property
    def num_live(self) -> int:
        return len(self._live)

    # SequenceLog

    def begin(self, sequence: Sequence) -> None:
        number = self._take_slot()
        if number is None:
            self.num_not_kept += 1
            return
        slot = self._slots[number]
        self._number += 1
        details = msgspec.msgpack.encode(
            _Details(
                self._number,
                sequence.key,
                sequence.front_id,
                sequence.sampling,
                sequence.num_prompt_tokens,
                sequence.host_lease.runs,
                sequence.index_lease.runs,
            )
        )
        if not slot.fits(details):
            self._free.append(number)
            self.num_not_kept += 1
            return
        self._live[sequence.key] = number
        slot.begin(details, sequence.durable_len)

    def append(self, sequence: Sequence, token: OutputToken) -> None:
        number = self._live.get(sequence.key)
        if number is None:
            return
        extra = b"" if token.logprob is None else msgspec.msgpack.encode(token.logprob)
        if not self._slots[number].append(token.token_id, extra):
            self._forget(sequence.key)
            self.num_not_kept += 1

    def durable(self, sequence: Sequence) -> None:
        number = self._live.get(sequence.key)
        if number is not None:
            self._slots[number].set_state(is_live=True, durable_len=sequence.durable_len)

    def end(self, sequence: Sequence, finish: Finish) -> None:
        number = self._live.get(sequence.key)
        if number is None:
            return
        is_wanted = finish.reason != "cancelled"
        if not (is_wanted and self._slots[number].append(_FINISH, msgspec.msgpack.encode(finish))):
            self._forget(sequence.key)
            return
        del self._live[sequence.key]
        self._ended[sequence.key] = number

    # The next process

    def recover(self) -> list[Record]:
        """Every record that is whole, in the order of their begin; called once, before all else.

        The caller answers each with `keep` or `drop`. A slot whose record cannot be believed is free.
        """
        records = []
        for number in range(self._shape.num_slots):
            record = self._read(number)
            if record is None:
                self._slots[number].free()
            else:
                self._free.remove(number)
                records.append(record)
        records.sort(key=lambda record: record.number)
        self._number = records[-1].number if records else 0
        return records

    def keep(self, record: Record) -> None:
        """The record goes on."""
        slots = self._live if record.finish is None else self._ended
        slots[record.key] = record.slot

    def drop(self, record: Record) -> None:
        """Nobody goes on from this record."""
        self._slots[record.slot].free()
        self._free.append(record.slot)

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._ended:
            return None
        _, number = self._ended.popitem(last=False)
        self._give_back(number)
        return number

    def _forget(self, key: RequestKey) -> None:
        number = self._live.pop(key)
        self._slots[number].free()
        self._give_back(number)
        self._free.append(number)

    def _give_back(self, number: int) -> None:
        slot = self._slots[number]
        if slot.next_at - slot.log_at > _DISCARD_BYTES:
            slot.free()
            self.on_discard(slot.log_at, slot.next_at - slot.log_at)

    def _store(self, offset: int, data: bytes) -> None:
        self._memory[offset : offset + len(data)] = data

    def _read(self, number: int) -> Record | None:
        slot = self._slots[number]
        base = number * self._shape.slot_bytes
        states = [self._read_state(base + STATE_BYTES * which) for which in range(2)]
        state = max((state for state in states if state is not None), default=None)
        if state is None:
            return None
        slot.version, slot.nonce, is_live, durable_len, slot.details_hash = state
        if not is_live:
            return None
        details = self._read_details(base + _DETAILS_AT, slot.details_hash)
        if details is None:
            return None
        output, finish = self._read_log(slot)
        return Record(
            slot=number,
            number=details.number,
            key=details.key,
            front_id=details.front_id,
            sampling=details.sampling,
            num_prompt_tokens=details.num_prompt_tokens,
            host_runs=details.host_runs,
            index_runs=details.index_runs,
            durable_len=durable_len,
            output=output,
            finish=finish,
        )

    def _read_state(self, at: int) -> tuple[int, int, int, int, int] | None:
        body = bytes(self._memory[at : at + _STATE.size])
        (check,) = _HASH.unpack_from(self._memory, at + _STATE.size)
        if check != _state_hash(body):
            return None
        version, nonce, is_live, durable_len, details_hash = _STATE.unpack(body)
        return version, nonce, is_live, durable_len, details_hash

    def _read_details(self, at: int, expected: int) -> _Details | None:
        (length,) = _LENGTH.unpack_from(self._memory, at)
        if length + _LENGTH.size > self._shape.details_bytes:
            return None
        text = bytes(self._memory[at + _LENGTH.size : at + _LENGTH.size + length])
        if xxhash.xxh64_intdigest(text) != expected:
            return None
        return msgspec.msgpack.decode(text, type=_Details)

    def _read_log(self, slot: _Slot) -> tuple[list[OutputToken], Finish | None]:
        """The entries up to the first that is not whole; leaves the slot behind them."""
        output: list[OutputToken] = []
        end_at = slot.log_at + self._shape.slot_bytes - _DETAILS_AT - self._shape.details_bytes
        while slot.next_at + _ENTRY.size <= end_at:
            check, num_extra, token_id = _ENTRY.unpack_from(self._memory, slot.next_at)
            first = slot.next_at + _ENTRY.size
            if first + num_extra > end_at:
                break
            extra = bytes(self._memory[first : first + num_extra])
            if check != _entry_hash(slot.nonce, slot.num_entries, token_id, extra):
                break
            slot.num_entries += 1
            slot.next_at = first + num_extra
            if token_id == _FINISH:
                return output, msgspec.msgpack.decode(extra, type=Finish)
            logprob = msgspec.msgpack.decode(extra, type=TokenLogprob) if extra else None
            output.append(OutputToken(token_id, logprob))
        return output, None


def _state_hash(body: bytes) -> int:
    return xxhash.xxh64_intdigest(body, seed=1)  # zeroed memory is no state


def _entry_hash(nonce: int, number: int, token_id: int, extra: bytes) -> int:
    head = struct.pack("<iI", token_id, len(extra))
    return xxhash.xxh64_intdigest(head + extra, seed=(nonce + number) & _MASK)
