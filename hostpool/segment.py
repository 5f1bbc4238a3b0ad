"""Host memory that outlives the process that fills it: one sealed memfd, divided into named parts.

A decode node puts its host pool, its indexer keys and its journal into one segment, and a keeper
process holds the descriptor as well (keeper_link.py): when the node is killed, the bytes stay, and
its successor maps them again. Any process of the same user that is handed the descriptor can map it.
A memfd has no name: nothing is left in /dev/shm when the last holder has ended.

| bytes                   | hold                                                                |
|-------------------------|---------------------------------------------------------------------|
| [0, LEDGER_AT)          | magic, spoiled mark, generation, proven generation, table            |
| [LEDGER_AT, HEADER_BYTES) | other processes that may write here: the keeper's (deploy/keeper.py) |
| the rest                | the parts, each aligned to PART_ALIGNMENT                           |

The table (identity, and name, offset and size of each part) is written once, before anybody else has
the descriptor. The size is sealed: no holder can cut memory away under the others. Used on the thread
that builds a node; what lies in a part is its user's business.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import torch
import xxhash
from torch import Tensor

from ..common.errors import ConfigError, SegmentError
from .memory import available_host_bytes

HEADER_BYTES = 64 * 1024
LEDGER_AT = 60 * 1024
PART_ALIGNMENT = 2 * 1024 * 1024
"""A huge page, so that parts can be backed and pinned by whole ones."""
MAGIC = b"tidepool segment 2\n\0\0\0\0\0"
_SPOILED_AT = len(MAGIC)
_GENERATION_AT = _SPOILED_AT + 8
_PROVEN_AT = _GENERATION_AT + 8
_TABLE_AT = _PROVEN_AT + 8
_TABLE_HEAD = struct.Struct("<QQ")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    offset: int
    num_bytes: int


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    identity: str
    parts: dict[str, _Part]


class SharedSegment:
    """Made by `create` or `attach` only.

    Attributes:
        identity: what its maker said it holds; who attaches compares it with what it needs.
        descriptor: of the memfd, close-on-exec; this object's to close.
        generation: how often an owner has taken it, its maker included.
    """

    def __init__(self, descriptor: int, memory: mmap.mmap, table: _Table) -> None:
        self.descriptor = descriptor
        self.identity = table.identity
        self._memory: Any = memory
        self._parts = MappingProxyType(table.parts)

    @classmethod
    def create(cls, parts: Mapping[str, int], *, identity: str, what: str) -> SharedSegment:
        """Makes zeroed memory with a part of so many bytes for each name (0 is allowed).

        Pages cost memory once they are touched. ConfigError, with both numbers, if the machine or
        its cgroup has less; `what` names the user in it.
        """
        table = _lay_out(parts, identity)
        num_bytes = _end(table)
        available = available_host_bytes()
        if num_bytes > available:
            raise ConfigError(
                f"{what} needs {num_bytes} bytes, but this machine or its cgroup has {available}"
            )
        descriptor = os.memfd_create("tidepool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, num_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(descriptor, num_bytes)
        except (OSError, ValueError) as error:
            os.close(descriptor)
            raise ConfigError(
                f"{what}: cannot make {num_bytes} bytes of memory: {error}"
            ) from error
        text = msgspec.msgpack.encode(table)
        memory[_TABLE_AT + _TABLE_HEAD.size : _TABLE_AT + _TABLE_HEAD.size + len(text)] = text
        _TABLE_HEAD.pack_into(memory, _TABLE_AT, len(text), xxhash.xxh64_intdigest(text))
        memory[: len(MAGIC)] = MAGIC
        segment = cls(descriptor, memory, table)
        segment.begin_generation()
        return segment

    @classmethod
    def attach(cls, descriptor: int) -> SharedSegment:
        """Maps a segment that another process made; takes the descriptor, also when it raises.

        SegmentError if it is not a whole segment: too short, not sealed, another magic, a torn table.
        """
        try:
            num_bytes = os.fstat(descriptor).st_size
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise SegmentError("the memory is not sealed: it could be cut away")
            if num_bytes < HEADER_BYTES:
                raise SegmentError(f"a segment of {num_bytes} bytes has no header")
            memory = mmap.mmap(descriptor, num_bytes)
            return cls(descriptor, memory, _read_table(memory, num_bytes))
        except OSError as error:
            os.close(descriptor)
            raise SegmentError(f"the memory cannot be mapped: {error}") from error
        except SegmentError:
            os.close(descriptor)
            raise

    @property
    def num_bytes(self) -> int:
        return len(self._memory)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part."""
        return {name: part.num_bytes for name, part in self._parts.items()}

    def part(self, name: str) -> Tensor:
        """uint8 [bytes of the part], aligned to PART_ALIGNMENT; every call sees the same memory.

        SegmentError if there is no such part.
        """
        part = self._find(name)
        if part.num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(
            self._memory, dtype=torch.uint8, count=part.num_bytes, offset=part.offset
        )

    def map_part(self, name: str) -> Tensor:
        """As `part`, in a mapping of its own: the rest of the segment is out of its reach."""
        part = self._find(name)
        if part.num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        memory = mmap.mmap(self.descriptor, part.num_bytes, offset=part.offset)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def view(self, name: str) -> memoryview:
        """The part as writable bytes."""
        part = self._find(name)
        return memoryview(self._memory)[part.offset : part.offset + part.num_bytes]

    def discard(self, name: str, offset: int, num_bytes: int) -> None:
        """Gives whole pages inside [offset, offset + num_bytes) of a part back; they read as zero."""
        part = self._find(name)
        page = mmap.PAGESIZE
        first = -(-(part.offset + offset) // page) * page
        end = (part.offset + min(offset + num_bytes, part.num_bytes)) // page * page
        if end > first:
            self._memory.madvise(mmap.MADV_REMOVE, first, end - first)

    @property
    def generation(self) -> int:
        return int(struct.unpack_from("<Q", self._memory, _GENERATION_AT)[0])

    def begin_generation(self) -> None:
        """Another owner takes the memory."""
        struct.pack_into("<Q", self._memory, _GENERATION_AT, self.generation + 1)

    @property
    def num_unproven(self) -> int:
        """Owners in a row, the newest included, that have not called `prove` (yet)."""
        proven = struct.unpack_from("<Q", self._memory, _PROVEN_AT)[0]
        return self.generation - int(proven)

    def prove(self) -> None:
        """The owner of now works with what it found here."""
        struct.pack_into("<Q", self._memory, _PROVEN_AT, self.generation)

    @property
    def is_spoiled(self) -> bool:
        """An owner found its own state wrong: nobody may go on from it."""
        return bool(self._memory[_SPOILED_AT])

    def spoil(self) -> None:
        """Marks the memory as wrong, for ever. One byte: cannot be torn. Any thread."""
        self._memory[_SPOILED_AT] = 1

    def close(self) -> None:
        """Closes the descriptor; the mapping lives as long as a part is referred to."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _find(self, name: str) -> _Part:
        part = self._parts.get(name)
        if part is None:
            raise SegmentError(f"the segment has no part {name!r}, but {', '.join(self._parts)}")
        return part


def _lay_out(parts: Mapping[str, int], identity: str) -> _Table:
    placed: dict[str, _Part] = {}
    offset = PART_ALIGNMENT
    for name, num_bytes in parts.items():
        placed[name] = _Part(offset, num_bytes)
        offset += -(-num_bytes // PART_ALIGNMENT) * PART_ALIGNMENT
    table = _Table(identity, placed)
    table_bytes = len(msgspec.msgpack.encode(table))
    if _TABLE_AT + _TABLE_HEAD.size + table_bytes > LEDGER_AT:
        raise ConfigError(f"a segment's table of {table_bytes} bytes does not fit into its header")
    return table


def _end(table: _Table) -> int:
    ends = [part.offset + part.num_bytes for part in table.parts.values()]
    return -(-max(ends, default=PART_ALIGNMENT) // PART_ALIGNMENT) * PART_ALIGNMENT


def _read_table(memory: mmap.mmap, num_bytes: int) -> _Table:
    if memory[: len(MAGIC)] != MAGIC:
        raise SegmentError("the memory is not a segment of this version")
    length, expected = _TABLE_HEAD.unpack_from(memory, _TABLE_AT)
    first = _TABLE_AT + _TABLE_HEAD.size
    if first + length > LEDGER_AT:
        raise SegmentError(f"a table of {length} bytes does not fit into the header")
    text = memory[first : first + length]
    if xxhash.xxh64_intdigest(text) != expected:
        raise SegmentError("the segment's table is torn")
    try:
        table = msgspec.msgpack.decode(text, type=_Table)
    except msgspec.MsgspecError as error:
        raise SegmentError(f"the segment's table cannot be read: {error}") from error
    for name, part in table.parts.items():
        if part.offset < HEADER_BYTES or part.num_bytes < 0 or _end(table) > num_bytes:
            raise SegmentError(f"part {name!r} lies outside of {num_bytes} bytes")
    return table
