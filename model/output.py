"""From logits to output tokens, the same for a prompt's first token and every later one.

`OutputBuffers` holds a step's tokens and log-probabilities on the device at fixed addresses;
`start_read` sends them to pinned memory, and `PendingOutput` makes wire types of them when the host
comes to it, a step later if it likes. Owned by a node's step thread.

Shape suffixes: B rows, V vocabulary, K best tokens, L = 1 + K.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import RequestError
from ..common.wire import OutputToken, Sampling, TokenLogprob
from ..kernels.select_topk import select_topk
from .sampling import SamplingRow, sample

MAX_TOP_LOGPROBS = 20
"""Best tokens a request may have named; who asks for more gets so many."""
_NUM_SLOTS = 3
"""Reads that may be under way; a PendingOutput is good until as many more have begun."""


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One row of logits.

    Attributes:
        position: where the sampled token will stand in the sequence; keys its randomness.
        num_output: output tokens the attempt has so far.
    """

    sampling: Sampling
    position: int
    num_output: int


class OutputBuffers:
    """What a step puts out, for up to `max_batch` rows.

    Attributes:
        token_B: int64 [max_batch], for `sample_into`; the next step's input as it stands.
        logprobs_BL: float32 [max_batch, 1 + K]: `logprob_B`, then `top_logprobs_BK`.
        logprob_B: float32 [max_batch], of the chosen tokens.
        top_ids_BK: int32 [max_batch, K], ascending ids of the best tokens; -1 behind a small
            vocabulary's end.
        top_logprobs_BK: float32 [max_batch, K].
    """

    def __init__(
        self,
        max_batch: int,
        vocab_size: int,
        device: torch.device | str,
        *,
        max_top: int = MAX_TOP_LOGPROBS,
    ) -> None:
        is_cuda = torch.device(device).type == "cuda"
        self.token_B = torch.full((max_batch,), -1, dtype=torch.int64, device=device)
        self.logprobs_BL = torch.zeros((max_batch, 1 + max_top), device=device)
        self.logprob_B = self.logprobs_BL[:, 0]
        self.top_logprobs_BK = self.logprobs_BL[:, 1:]
        self.top_ids_BK = torch.full((max_batch, max_top), -1, dtype=torch.int32, device=device)
        self._lengths_B = torch.full((max_batch,), vocab_size, dtype=torch.int32, device=device)
        self._num_top = max_top
        self._slots = [_Slot(self, is_cuda=is_cuda) for _ in range(_NUM_SLOTS)]
        self._next_slot = 0

    def write_logprobs(self, logits_BV: Tensor, token_B: Tensor) -> None:
        """Log-probabilities of raw float32 logits; capturable, no synchronisation.

        Exact set of best tokens, lowest id first on ties at its edge. Rows whose token is -1 get
        any values.
        """
        batch = logits_BV.shape[0]
        logprob_BV = logits_BV.log_softmax(-1)
        self.logprob_B[:batch] = logprob_BV.gather(1, token_B.clamp(min=0)[:, None])[:, 0]
        if self._num_top:
            top_ids_BK = self.top_ids_BK[:batch]
            select_topk(logits_BV, self._lengths_B[:batch], top_ids_BK)
            index_BK = top_ids_BK.clamp(min=0).long()
            self.top_logprobs_BK[:batch] = logprob_BV.gather(1, index_BK)

    def start_read(self, num_rows: int, *, with_logprobs: bool) -> PendingOutput:
        """Begins to copy the first rows to the host, on the current stream."""
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        slot.start(self, num_rows, with_logprobs=with_logprobs)
        return PendingOutput(slot, num_rows, with_logprobs)


class _Slot:
    """Host side of one read."""

    def __init__(self, buffers: OutputBuffers, *, is_cuda: bool) -> None:
        def mirror(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda)

        self.token_B = mirror(buffers.token_B)
        self.logprobs_BL = mirror(buffers.logprobs_BL)
        self.top_ids_BK = mirror(buffers.top_ids_BK)
        self.event = torch.cuda.Event() if is_cuda else None

    def start(self, buffers: OutputBuffers, num_rows: int, *, with_logprobs: bool) -> None:
        self.token_B[:num_rows].copy_(buffers.token_B[:num_rows], non_blocking=True)
        if with_logprobs:
            self.logprobs_BL[:num_rows].copy_(buffers.logprobs_BL[:num_rows], non_blocking=True)
            self.top_ids_BK[:num_rows].copy_(buffers.top_ids_BK[:num_rows], non_blocking=True)
        if self.event is not None:
            self.event.record()


@dataclass(frozen=True, slots=True)
class PendingOutput:
    """A step's output on its way to the host."""

    _slot: _Slot
    _num_rows: int
    _has_logprobs: bool

    @property
    def is_ready(self) -> bool:
        return self._slot.event is None or self._slot.event.query()

    def token_ids(self) -> list[int]:
        """Waits for the copy; -1 where there was no token to choose."""
        if self._slot.event is not None:
            self._slot.event.synchronize()
        return self._slot.token_B[: self._num_rows].tolist()

    def tokens(self, top_ns: Sequence[int]) -> list[OutputToken]:
        """Wire types of the first rows; `top_ns` is each row's `Sampling.logprobs`.

        Best tokens come best first, lowest id first on ties. Waits for the copy.
        """
        token_ids = self.token_ids()
        tokens = []
        for row, top_n in enumerate(top_ns):
            has_logprob = top_n >= 0 and self._has_logprobs
            logprob = self._logprob(row, top_n) if has_logprob else None
            tokens.append(OutputToken(token_ids[row], logprob))
        return tokens

    def _logprob(self, row: int, top_n: int) -> TokenLogprob:
        chosen, *values = self._slot.logprobs_BL[row].tolist()
        ids = self._slot.top_ids_BK[row].tolist()
        pairs = [(value, i) for value, i in zip(values, ids, strict=True) if i >= 0]
        pairs.sort(key=lambda pair: (-pair[0], pair[1]))
        return TokenLogprob(
            logprob=chosen,
            top_ids=tuple(token_id for _, token_id in pairs[:top_n]),
            top_logprobs=tuple(value for value, _ in pairs[:top_n]),
        )


def sampling_rows(rows: Sequence[OutputRow], eos_token_ids: Collection[int]) -> list[SamplingRow]:
    """What `SamplingBuffers.fill` takes."""
    return [SamplingRow(row.sampling, row.position, _banned(row, eos_token_ids)) for row in rows]


def choose_tokens(
    logits_NV: Tensor, rows: list[OutputRow], eos_token_ids: Collection[int]
) -> list[OutputToken]:
    """Samples one token a row of float32 logits [N, V], with logprobs for those who asked.

    With buffers of its own, and waits for the device: for a prompt's first token.
    """
    token_B = sample(logits_NV, sampling_rows(rows, eos_token_ids))
    top_ns = [row.sampling.logprobs for row in rows]
    with_logprobs = max(top_ns) >= 0
    max_top = min(max(0, *top_ns), MAX_TOP_LOGPROBS)
    buffers = OutputBuffers(len(rows), logits_NV.shape[1], logits_NV.device, max_top=max_top)
    buffers.token_B.copy_(token_B)
    if with_logprobs:
        buffers.write_logprobs(logits_NV, token_B)
    return buffers.start_read(len(rows), with_logprobs=with_logprobs).tokens(top_ns)


def no_token_error() -> RequestError:
    """Why a row whose token id is -1 fails: its logits are not finite, so its KV cannot be right."""
    return RequestError(
        "the model's output is not a number; this attempt's KV is damaged",
        status=500,
        code="not_finite",
    )


def has_stopped(
    token: OutputToken, sampling: Sampling, num_output: int, eos_token_ids: Collection[int]
) -> bool:
    """Whether the attempt ends with `token`, its `num_output`-th output token."""
    if num_output <= sampling.min_tokens:
        return False
    is_eos = token.token_id in eos_token_ids and not sampling.ignore_eos
    return is_eos or token.token_id in sampling.stop_token_ids


def _banned(row: OutputRow, eos_token_ids: Collection[int]) -> Collection[int]:
    """Tokens that would end the attempt, while it has not reached min_tokens."""
    sampling = row.sampling
    if row.num_output >= sampling.min_tokens:
        return ()
    return {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
