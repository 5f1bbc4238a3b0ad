"""From logits to output tokens, the same for a prompt's first token and every later one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import RequestError
from ..common.wire import OutputToken, Sampling
from .sampling import SamplingBatch, logprobs, sample


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


def choose_tokens(
    logits_NV: Tensor, rows: list[OutputRow], eos_token_ids: Collection[int]
) -> list[OutputToken]:
    """Samples one token a row of float32 logits [N, V], with logprobs for those who asked."""
    batch = SamplingBatch.build(
        [(row.sampling, row.position) for row in rows], device=logits_NV.device
    )
    banned = [_banned(row, eos_token_ids) for row in rows]
    token_ids = sample(logits_NV, batch, banned=banned).tolist()
    top_ns = [row.sampling.logprobs for row in rows]
    if max(top_ns) < 0:
        return [OutputToken(token_id) for token_id in token_ids]
    chosen = logprobs(logits_NV, torch.tensor(token_ids, device=logits_NV.device), top_ns)
    return [
        OutputToken(token_id, logprob) for token_id, logprob in zip(token_ids, chosen, strict=True)
    ]


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
