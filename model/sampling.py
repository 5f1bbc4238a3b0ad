"""Sampling parameters in fixed device buffers, and the ops that turn logits into tokens with them.

Owned by a node's step thread, on the stream that runs the pass. A row's token depends on its
logits, its parameters, its seed and its position alone: not on the batch, the node or the attempt.
There is no generator state: one uniform a row comes from hashing (seed, position).

`SamplingBuffers.fill` writes a step's parameters and says which kind of step it is; `sample_into`
then launches that kind's ops. It reads nothing on the host, so a step of each kind can be captured
into a CUDA graph once and replayed behind every `fill`.

Shape suffixes: B rows, V vocabulary, N banned ids, W words of a row's parameters.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..common.errors import RequestError
from ..common.wire import Sampling
from ..kernels.sample_tokens import GREEDY_BELOW, best_tokens, draw_tokens, filter_tokens

SamplingKind = Literal["greedy", "plain", "filtered"]
"""What the rows of a step need: no draw; a draw for some; top-k, top-p or min-p for some."""
SAMPLING_KINDS: tuple[SamplingKind, ...] = ("greedy", "plain", "filtered")

MAX_BANNED = 272
"""Stop ids the front lets a request name (256), and a model's own end tokens."""

_ROW = struct.Struct("<dddqqqqq")
"""temperature, top_p, min_p, top_k, seed, position, number of banned ids, unused."""
_NUM_WORDS = _ROW.size // 8
_TOP_K_OFF = 1 << 31
_PADDED_ROW = (0.0, 1.0, 0.0, _TOP_K_OFF, 0, 0, 0, 0)
_NUM_SLOTS = 3
"""Uploads that may be under way before `fill` waits for the oldest."""


class SamplingRow(NamedTuple):
    """A row's parameters, the position of the token to be chosen, ids that must not be chosen."""

    sampling: Sampling
    position: int
    banned: Collection[int] = ()


class SamplingBuffers:
    """Parameters of up to `max_batch` rows at fixed addresses.

    One upload a `fill`, of 64 bytes a row, and a second one if a row has banned ids.

    Attributes:
        temperature_B, top_p_B, min_p_B: float64 [max_batch], strided.
        top_k_B, seed_B, position_B, num_banned_B: int64 [max_batch], strided.
        banned_BN: int64 [max_batch, max_banned]; the first num_banned of a row count.
    """

    def __init__(
        self,
        max_batch: int,
        vocab_size: int,
        device: torch.device | str,
        *,
        max_banned: int = MAX_BANNED,
    ) -> None:
        self.max_batch = max_batch
        self.max_banned = max_banned
        self._vocab_size = vocab_size
        self._is_cuda = torch.device(device).type == "cuda"
        self._words_BW = torch.zeros((max_batch, _NUM_WORDS), dtype=torch.int64, device=device)
        self.banned_BN = torch.zeros((max_batch, max_banned), dtype=torch.int64, device=device)
        columns = self._words_BW.unbind(1)
        self.temperature_B, self.top_p_B, self.min_p_B = (
            column.view(torch.float64) for column in columns[:3]
        )
        self.top_k_B, self.seed_B, self.position_B, self.num_banned_B = columns[3:7]
        num_slots = _NUM_SLOTS if self._is_cuda else 1
        self._slots = [
            _Slot(max_batch, max_banned, is_pinned=self._is_cuda) for _ in range(num_slots)
        ]
        self._next_slot = 0

    def fill(self, rows: Sequence[SamplingRow], num_rows: int | None = None) -> SamplingKind:
        """Uploads the parameters of `rows`, and of greedy padding up to `num_rows`.

        On the current stream; does not wait for the device unless three uploads are under way.
        Raises RequestError if a row bans more than `max_banned` ids of the vocabulary.
        """
        num_rows = len(rows) if num_rows is None else num_rows
        slot = self._slots[self._next_slot]
        self._next_slot = (self._next_slot + 1) % len(self._slots)
        slot.wait()
        has_banned = slot.write(rows, num_rows, self._vocab_size)
        self._words_BW[:num_rows].copy_(slot.words_BW[:num_rows], non_blocking=True)
        if has_banned:
            count = len(rows)
            self.banned_BN[:count].copy_(slot.banned_BN[:count], non_blocking=True)
        if self._is_cuda:
            slot.record()
        return kind_of([row.sampling for row in rows])


class _Slot:
    """Host side of one upload; not written again before it has arrived."""

    def __init__(self, max_batch: int, max_banned: int, *, is_pinned: bool) -> None:
        self.words_BW = torch.zeros(
            (max_batch, _NUM_WORDS), dtype=torch.int64, pin_memory=is_pinned
        )
        self.banned_BN = torch.zeros(
            (max_batch, max_banned), dtype=torch.int64, pin_memory=is_pinned
        )
        self._bytes = memoryview(self.words_BW.numpy()).cast("B") if max_batch else None
        self._event: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def record(self) -> None:
        if self._event is None:
            self._event = torch.cuda.Event()
        self._event.record()

    def write(self, rows: Sequence[SamplingRow], num_rows: int, vocab_size: int) -> bool:
        """Writes the rows and their padding; whether a row has banned ids."""
        has_banned = False
        for index, (sampling, position, banned) in enumerate(rows):
            num_banned = self._ban(index, banned, vocab_size) if banned else 0
            has_banned |= num_banned > 0
            _ROW.pack_into(
                self._bytes,
                index * _ROW.size,
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.top_k if sampling.top_k > 0 else _TOP_K_OFF,
                _signed(sampling.seed),
                position,
                num_banned,
                0,
            )
        for index in range(len(rows), num_rows):
            _ROW.pack_into(self._bytes, index * _ROW.size, *_PADDED_ROW)
        return has_banned

    def _ban(self, row: int, banned: Collection[int], vocab_size: int) -> int:
        ids = [token_id for token_id in banned if 0 <= token_id < vocab_size]
        if len(ids) > self.banned_BN.shape[1]:
            raise RequestError(
                f"a request bans {len(ids)} tokens until its min_tokens; at most "
                f"{self.banned_BN.shape[1]} can be",
                param="stop_token_ids",
            )
        self.banned_BN[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return len(ids)


def kind_of(samplings: Sequence[Sampling]) -> SamplingKind:
    """The cheapest kind that serves all rows."""
    sampled = [sampling for sampling in samplings if sampling.temperature >= GREEDY_BELOW]
    if not sampled:
        return "greedy"
    is_filtered = any(s.top_k > 0 or s.top_p < 1 or s.min_p > 0 for s in sampled)
    return "filtered" if is_filtered else "plain"


def sample_into(
    logits_BV: Tensor, buffers: SamplingBuffers, kind: SamplingKind, token_B: Tensor
) -> None:
    """Chooses one token a row with the first B rows of `buffers`; capturable, no synchronisation.

    Args:
        logits_BV: float32 [B, V], unchanged.
        kind: as `fill` said, or one that does more.
        token_B: int64 [B]; written. A row without a finite best logit (NaN from bad bytes,
            everything banned) gives -1: there is no token to choose, and the caller fails that
            request alone.
    """
    rows = slice(0, logits_BV.shape[0])
    banned = (buffers.banned_BN[rows], buffers.num_banned_B[rows])
    best_B = torch.empty_like(token_B, dtype=torch.float32)
    best_tokens(logits_BV, *banned, best_B, token_B)
    if kind == "greedy":
        return
    temperature_B = buffers.temperature_B[rows]
    last_value_B = last_id_B = None
    if kind == "filtered":
        last_value_B, last_id_B = torch.empty_like(best_B), torch.empty_like(token_B)
        filter_tokens(
            logits_BV,
            *banned,
            best_B,
            temperature_B,
            buffers.top_k_B[rows],
            buffers.top_p_B[rows],
            buffers.min_p_B[rows],
            last_value_B,
            last_id_B,
        )
    draw_tokens(
        logits_BV,
        *banned,
        best_B,
        temperature_B,
        buffers.seed_B[rows],
        buffers.position_B[rows],
        last_value_B,
        last_id_B,
        token_B,
    )


def sample(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """As `sample_into`, with buffers of its own: for prompts' first tokens. int64 [B]."""
    max_banned = max((len(row.banned) for row in rows), default=0)
    buffers = SamplingBuffers(
        len(rows), logits_BV.shape[1], logits_BV.device, max_banned=max_banned
    )
    token_B = torch.empty(len(rows), dtype=torch.int64, device=logits_BV.device)
    sample_into(logits_BV, buffers, buffers.fill(rows), token_B)
    return token_B


def _signed(seed: int) -> int:
    """The seed's low 64 bits as a signed integer."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
