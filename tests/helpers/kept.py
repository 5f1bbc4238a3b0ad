"""A unified node whose memory outlives it, killed between two bytes of its journal, and its next one.

    life = Life(path, **settings)       nothing is left of the one before but its segment
    life.run_until_killed(num_bytes)
    life = life.next()

What a device would lose is overwritten with NaN before the next node sees it: rows and indexer keys
behind each `durable_len`, and every page that no sequence owns.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tidepool.common.config import Config
from tidepool.common.wire import Cancel, Finish, Resume, Sampling
from tidepool.decode_node.build import max_context
from tidepool.decode_node.journal import Journal, Record, Shape
from tidepool.decode_node.reattach import Reattached, reattach
from tidepool.deploy.local import FRONT_ID, LocalNode
from tidepool.hostpool.index_pool import IndexPool
from tidepool.hostpool.memory import POISON_BYTE
from tidepool.hostpool.pool import HostPool
from tidepool.hostpool.segment import SharedSegment
from tidepool.model.runtime import Runtime, load_runtime

from .engines import exact_config


class KilledError(Exception):
    """The process is gone."""


class MortalJournal(Journal):
    """Ends the process in the middle of a store, once so many bytes are written."""

    num_bytes_left = 2**62

    def _store(self, offset: int, data: bytes) -> None:
        if len(data) > self.num_bytes_left:
            self._memory[offset : offset + self.num_bytes_left] = data[: self.num_bytes_left]
            raise KilledError
        self.num_bytes_left -= len(data)
        super()._store(offset, data)


class Life:
    """One process of the node; `node.tokens`, `node.finishes` are what the front has.

    `descriptor`: of a segment that another process has made with the same overrides, to be filled.
    """

    def __init__(self, path: Path | str, descriptor: int = -1, **overrides: Any) -> None:
        config = exact_config(path, **overrides)
        runtime = load_runtime(config)
        kv = runtime.geometry
        context = max_context(config, runtime.model.config)
        shape = Shape(2 * config.decode.max_requests, kv.num_pages(context), context)
        parts = {
            "kv": HostPool.bytes_needed(kv, config.decode.host_tokens // kv.page_size),
            "index": IndexPool.bytes_needed(kv, config.decode.index_tokens // kv.page_size),
            "journal": shape.num_bytes,
        }
        segment = (
            SharedSegment.create(parts, identity="", what="test")
            if descriptor < 0
            else SharedSegment.attach(descriptor)
        )
        self._begin(config, runtime, segment, shape)
        self.sent: dict[str, Any] = {}

    def _begin(
        self, config: Config, runtime: Runtime, segment: SharedSegment, shape: Shape
    ) -> None:
        self.config, self.runtime, self.segment, self.shape = config, runtime, segment, shape
        self.journal = MortalJournal(segment.view("journal"), shape)
        self.node = LocalNode(config, runtime, segment=segment, journal=self.journal)
        self.past = Reattached()
        coordinator = self.node.decode.coordinator
        coordinator.host.pages.on_free = coordinator.host.poison
        coordinator.index.pages.on_free = coordinator.index.poison

    def ask(self, request_id: str, prompt: list[int], **sampling: Any) -> None:
        chosen = Sampling(**{"temperature": 0.0, **sampling})
        self.sent[request_id] = (prompt, chosen)
        self.node.submit(request_id, prompt, chosen)

    def run_until_killed(self, num_bytes: int) -> bool:
        """Runs until the journal is cut off after so many bytes; False if all requests ended."""
        self.journal.num_bytes_left = num_bytes
        try:
            while self.node.step() or not self.node.decode.is_idle:
                self.node.check_invariants()
        except KilledError:
            return True
        return False

    def next(self) -> Life:
        """The next process: everything but the segment and what the front has is new."""
        life = object.__new__(Life)
        segment = SharedSegment.attach(os.dup(self.segment.descriptor))
        segment.begin_generation()
        life._begin(self.config, self.runtime, segment, self.shape)
        life.sent = self.sent
        life.node.tokens.update(self.node.tokens)
        life.node.finishes.update(self.node.finishes)
        life._forget_what_a_device_loses()
        coordinator = life.node.decode.coordinator
        life.past = reattach(life.node.decode, life.journal, coordinator.index.mirror())
        life.node.check_invariants()
        return life

    def ask_again(self) -> None:
        """As the front does: Resume where it has tokens, a new request where it has none.

        What it no longer has a request for, it cancels; an attempt that is unknown is a failure.
        """
        known = self.records()
        for request_id, (prompt, sampling) in self.sent.items():
            if request_id in self.node.finishes:
                continue
            received = len(self.node.tokens[request_id])
            if received:
                assert request_id in known, f"{request_id} is lost"
                self.node.inbox.append(Resume(request_id, 0, received, FRONT_ID))
                continue
            self.node.inbox.append(Cancel(request_id, 0, "lost"))
            self.node.step()
            self.node.finishes.pop(request_id, None)
            self.node.tokens[request_id].clear()
            again = f"{request_id}+"
            self.node.submit(again, prompt, sampling)
        self.sent = {
            name if name in known and self.node.tokens[name] else f"{name}+": value
            for name, value in self.sent.items()
            if name not in self.node.finishes
        }

    def records(self) -> dict[str, Record]:
        """What a journal over a copy of the memory would find now."""
        copy = memoryview(bytearray(self.segment.view("journal")))
        return {record.key[0]: record for record in Journal(copy, self.shape).recover()}

    def outcome(self) -> dict[str, tuple[list[int], Finish]]:
        """Tokens and end of each request, under its first name."""
        return {
            name.rstrip("+"): (self.node.output(name), finish)
            for name, finish in self.node.finishes.items()
        }

    def _forget_what_a_device_loses(self) -> None:
        kv, coordinator = self.runtime.geometry, self.node.decode.coordinator
        page_size = kv.page_size
        durable_rows: set[int] = set()
        durable_keys: set[int] = set()
        for record in self.records().values():
            if record.finish is not None:
                continue
            for runs, slots in (
                (record.host_runs, durable_rows),
                (record.index_runs, durable_keys),
            ):
                pages = [p for run in runs for p in range(run.first, run.first + run.count)]
                slots.update(
                    pages[position // page_size] * page_size + position % page_size
                    for position in range(min(record.durable_len, len(pages) * page_size))
                )
        rows = coordinator.host.rows
        keys = coordinator.index.data.view(kv.num_index_layers, -1, kv.index.token_bytes)
        for memory, kept in ((rows, durable_rows), (keys, durable_keys)):
            lost = [slot for slot in range(memory.shape[1]) if slot not in kept]
            memory[:, lost] = POISON_BYTE
