"""Runs decode steps: uploads what the host knows, launches, and hands back results when they come.

Owned by the decode engine, step thread only. All buffers of a step are allocated once. On a GPU the
whole step of one batch size is one CUDA graph (embedding, layers, output layer, greedy tokens), taken
at start for a ladder of batch sizes and context lengths; a step is padded up to the next of both. A
launch never waits for the device: the tokens stay there for the next step, and `Launched.results`
waits for an event that is long past when it is asked a step later. Steps with sampled rows replay a
second graph behind it. On the CPU a step runs as it is.

Suffixes: B batch rows, S seats, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..common.wire import OutputToken
from ..hostpool.index_pool import IndexPool
from ..hostpool.pool import HostPool
from ..hostpool.side_stream import SideStream
from ..kernels.begin_step import SEAT, begin_step
from ..model.context import AttentionContext
from ..model.model import Model
from ..model.output import OutputBuffers, OutputRow, PendingOutput, sampling_rows
from ..model.sampling import SAMPLING_KINDS, SamplingBuffers, SamplingKind, sample_into
from .context import DecodeContext, StepBatch
from .coordinator import SeatRow
from .hot_cache import HotCache
from .step_buffers import StepBuffers

CONTEXT_GROWTH = 4
"""Ratio of neighbouring context lengths for which graphs are taken."""

_FIRST_FAULT = -1
"""A row with fault flags f puts out -1 - f in place of its token."""

log = logging.getLogger(__name__)

MakeContext = Callable[[HotCache, HostPool, IndexPool, StepBatch], AttentionContext]


def batch_ladder(most: int) -> list[int]:
    """Batch sizes with graphs: powers of two to 16, steps of 8 to 64, of 16 to 128, then of 32."""
    sizes = [1, 2, 4, 8, 16, *range(24, 65, 8), *range(80, 129, 16), *range(160, most + 32, 32)]
    return [size for size in sizes if size < most] + [most]


def context_ladder(topk: int, most: int) -> list[int]:
    """Context lengths with graphs, from the one at which everything is selected."""
    lengths = [topk]
    while lengths[-1] * CONTEXT_GROWTH < most:
        lengths.append(lengths[-1] * CONTEXT_GROWTH)
    return [length for length in lengths if length < most] + [most]


class Launched:
    """A step on its way."""

    def __init__(self, pending: PendingOutput, top_ns: list[int]) -> None:
        self._pending = pending
        self._top_ns = top_ns

    def results(self) -> list[tuple[OutputToken, int]]:
        """For each row the token chosen (id -1: none) and its fault flags; waits for the step."""
        tokens = self._pending.tokens(self._top_ns)
        return [(token, max(0, _FIRST_FAULT - token.token_id)) for token in tokens]


class StepRunner:
    """Step thread only.

    Args:
        model: weights, on the cache's device.
        cache, host, index: the node's pools.
        max_batch: rows of a step at most; no more than the cache has seats.
        max_context: longest sequence.
        use_graphs: replay CUDA graphs; without effect on the CPU.
        make_context: builds the attention context of a step (benchmarks replace it).
        batches, contexts: batch sizes and context lengths with graphs, ascending; None: a ladder
            up to the bounds.
    """

    def __init__(
        self,
        model: Model,
        cache: HotCache,
        host: HostPool,
        index: IndexPool,
        *,
        max_batch: int,
        max_context: int,
        use_graphs: bool,
        make_context: MakeContext = DecodeContext,
        batches: Sequence[int] | None = None,
        contexts: Sequence[int] | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._host = host
        self._index = index
        self._make_context = make_context
        self._max_context = max_context
        self.device = cache.rows.device
        self._has_graphs = use_graphs and self.device.type == "cuda"
        self._batches = batches or batch_ladder(max_batch)
        self._contexts = contexts or context_ladder(cache.topk, max_context)
        self._buffers = StepBuffers(
            cache,
            max_batch=max_batch,
            max_context=max_context,
            vocab_size=model.config.vocab_size,
        )
        vocab_size = model.config.vocab_size
        self._sampling = SamplingBuffers(max_batch, vocab_size, self.device)
        self._output = OutputBuffers(max_batch, vocab_size, self.device)
        self._graphs: dict[tuple[int, int | str], torch.cuda.CUDAGraph] = {}
        self._number = 0

    @torch.inference_mode()
    def prepare(self) -> None:
        """Takes the graphs, if there are to be any: kernels are built, memory is fixed."""
        if not self._has_graphs:
            return
        started_s = time.monotonic()
        torch.cuda.synchronize(self.device)
        pool = torch.cuda.graph_pool_handle()
        first_s = 0.0
        # The largest first: the smaller ones then fit into the memory that it has taken.
        for batch in reversed(self._batches):
            self._buffers.upload([], batch, 0)  # padded rows, which touch nothing
            self._sampling.fill([], batch)
            for context in reversed(self._contexts):
                run = partial(self._run, batch, context)
                self._graphs[batch, context] = self._take_graph(run, pool)
                first_s = first_s or time.monotonic() - started_s
            for kind in SAMPLING_KINDS[1:]:
                choose = partial(self._choose, batch, kind)
                self._graphs[batch, kind] = self._take_graph(choose, pool)
            for (size, _), graph in self._graphs.items():
                if size == batch:
                    graph.replay()  # the first sends it to the device: not between two steps
        torch.cuda.synchronize(self.device)
        log.info(
            "%d graphs of decode steps in %.1f s, the first in %.1f s",
            len(self._graphs),
            time.monotonic() - started_s,
            first_s,
        )

    @torch.inference_mode()
    def launch(self, rows: list[SeatRow], outputs: list[OutputRow]) -> Launched:
        """Starts one step; `outputs` says for each row how its token is chosen."""
        self._number += 1
        batch, context = self._shape(rows)
        self._buffers.upload(rows, batch, self._number)
        eos = self._model.config.eos_token_ids
        kind = self._sampling.fill(sampling_rows(outputs, eos), batch)
        self._replay((batch, context), lambda: self._run(batch, context))
        if kind != "greedy":
            self._replay((batch, kind), lambda: self._choose(batch, kind))
        top_ns = [row.sampling.logprobs for row in outputs]
        with_logprobs = max(top_ns) >= 0
        if with_logprobs:
            logits_BV = self._buffers.logits_SV[:batch]
            self._output.write_logprobs(logits_BV, self._output.token_B[:batch])
        pending = self._output.start_read(len(rows), with_logprobs=with_logprobs)
        return Launched(pending, top_ns)

    def _replay(self, key: tuple[int, int | str], run: Callable[[], None]) -> None:
        if self._has_graphs:
            self._graphs[key].replay()
        else:
            run()

    def _choose(self, batch: int, kind: SamplingKind) -> None:
        """Chooses the rows' tokens from logits; faults take a token's place, see `Launched`."""
        buffers, token_B = self._buffers, self._output.token_B[:batch]
        sample_into(buffers.logits_SV[:batch], self._sampling, kind, token_B)
        fault_B = buffers.fault_S[:batch]
        token_B.copy_(torch.where(fault_B > 0, _FIRST_FAULT - fault_B, token_B))
        seats_B = buffers.input(batch)[SEAT]
        padded = buffers.next_token_S1.shape[0] - 1
        buffers.next_token_S1[torch.where(seats_B >= 0, seats_B, padded)] = token_B

    def _shape(self, rows: list[SeatRow]) -> tuple[int, int]:
        """Rows and context of the step: as they are, or the next ones that have a graph."""
        length = max(row.position for row in rows) + 1
        if not self._has_graphs:
            page = self._cache.geometry.page_size
            return len(rows), min(-(-length // page) * page, self._max_context)
        batch = next(size for size in self._batches if size >= len(rows))
        return batch, next(size for size in self._contexts if size >= length)

    def _run(self, batch: int, context: int) -> None:
        """The device's part of a step: everything from the upload to logits and faults."""
        cache, buffers = self._cache, self._buffers
        step = buffers.step(batch, context)
        begin_step(
            buffers.input(batch),
            buffers.next_token_S1,
            cache.index_table_SP,
            cache.ring_start_S,
            cache.step_1,
            cache.position_of_slot_GSH,
            cache.slot_of_position_GSC,
            cache.last_use_GSH,
            step.token_ids_B,
            step.positions_B,
            step.lens_B,
            step.seats_B,
            step.store_rows_2B,
            step.index_slots_B,
            step.index_table_BP,
            cache.geometry.page_size,
            cache.ring_rows,
        )
        attention = self._make_context(cache, self._host, self._index, step)
        hidden_BM = self._model.forward(step.token_ids_B, step.positions_B, attention)
        buffers.logits_SV[:batch] = self._model.logits(hidden_BM)
        buffers.fault_S[:batch] = cache.end_step(step.lens_B)
        self._choose(batch, "greedy")

    def _take_graph(self, run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
        """One warm-up, in which kernels are built, then the graph of the same."""
        side = SideStream(self.device)
        with side.fork():
            run()
        side.join()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph
