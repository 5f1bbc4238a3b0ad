"""Traces of top-k selections with the index scores behind them: of the demo model, and made up.

Used by benchmarks/replacement.py. A demo trace is recorded from a `LocalNode` that decodes on the
CPU with everything resident: for each step and index group the scores of all positions and the
top-k. Rows that are in the ring at a step are left out of its selection, as `resolve` leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tidepool.common.config import resolve
from tidepool.common.wire import OutputToken, Sampling
from tidepool.deploy.demo.data import make_prompt
from tidepool.deploy.local import LocalNode
from tidepool.prefill_node.job import Job

PAGE = 64
RING_ROWS = 2 * PAGE
DEMO_TOPK = 128
DEMO_STEPS = 384
DEMO_PROMPTS = ((2000, 4, "raw"), (4000, 1, "raw"), (8000, 2, "raw"), (8000, 3, "chat"))
"""(tokens, seed, form) of deploy/demo/data.make_prompt."""
DEMO_SETTINGS: dict[str, Any] = {
    "model.path": str(Path(__file__).parents[1] / "deploy" / "demo" / "checkpoint"),
    "model.device": "cpu",
    "model.threads": 1,
    "decode.hot_rows": 0,
    "decode.seats": 1,
    "decode.host_tokens": 16384,
    "decode.index_tokens": 16384,
    "prefill.pool_tokens": 16384,
}
"""Everything resident, so that what is selected does not depend on any policy."""
TOPK, POSITIONS, STEPS = 512, 16384, 240
"""Of the synthetic traces: a quarter of DeepSeek-V3.2's at a context of 65,536."""

Floats = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(slots=True)
class Trace:
    """T steps of one sequence and one index group, C positions.

    Attributes:
        topk: selected positions a step, those in the ring included.
        scores_TC: float32, -inf where there is no position yet.
        selected: for each step the positions selected from outside the ring, ascending.
        warm: the prompt's last top-k, ascending.
        prompt_scores_C: scores of the prompt's last token (demo only).
        ring_start_T: first position of the ring at each step.
    """

    name: str
    topk: int
    scores_TC: Floats
    selected: list[Ints]
    warm: Ints
    prompt_scores_C: Floats | None = None
    ring_start_T: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def num_selected(self) -> int:
        return sum(step.size for step in self.selected)


class Recorder(TorchDispatchMode):
    """Keeps (scores, top-k) of each select_topk whose scores an indexer wrote.

    Attributes:
        prompt: of the last token of each prefill chunk, in order of chunk and index group.
        decoded: of the first batch row of each decode step, in order of step and index group.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt: list[tuple[Floats, Ints]] = []
        self.decoded: list[tuple[Floats, Ints]] = []
        self._scores: torch.Tensor | None = None
        self._is_chunk = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if name in ("tidepool::index_logits", "tidepool::index_logits_chunk"):
            self._scores, self._is_chunk = args[5], name.endswith("chunk")
        elif name == "tidepool::select_topk" and args[0] is self._scores:
            row, kept = (-1, self.prompt) if self._is_chunk else (0, self.decoded)
            positions = args[2][row].numpy().astype(np.int64)
            scores = args[0][row, : int(args[1][row])].numpy().copy()
            kept.append((scores, positions[positions >= 0]))
        return result


def record_demo() -> Iterator[Trace]:
    """Yields a trace of each index group for each of DEMO_PROMPTS; sampled at temperature 0.8."""
    node = LocalNode(resolve(None, DEMO_SETTINGS).config)
    groups = node.decode.coordinator.cache.geometry.num_index_layers
    warm: list[tuple[int, ...]] = []
    commit = node.handoff.commit

    def keep(job: Job, token: OutputToken, positions: tuple[bytes, ...]) -> None:
        warm[:] = [tuple(np.frombuffer(packed, dtype="<i4").tolist()) for packed in positions]
        commit(job, token, positions)

    node.handoff.commit = keep  # type: ignore[method-assign]
    for num_tokens, seed, form in DEMO_PROMPTS:
        name = f"demo {num_tokens} {form}"
        sampling = Sampling(DEMO_STEPS + 1, temperature=0.8, seed=seed, ignore_eos=True)
        node.submit(name, make_prompt(num_tokens, seed=seed, form=form).token_ids, sampling)
        with Recorder() as recorder:
            node.run()
        prompt, steps = recorder.prompt[-groups:], recorder.decoded[: groups * DEMO_STEPS]
        for group in range(groups):
            yield _demo_trace(
                f"{name}, group {group}",
                num_tokens,
                prompt[group][0],
                warm[group],
                steps[group::groups],
            )


def _demo_trace(
    name: str,
    num_tokens: int,
    prompt_scores: Floats,
    warm: tuple[int, ...],
    steps: list[tuple[Floats, Ints]],
) -> Trace:
    width = steps[-1][0].size
    scores = np.full((len(steps), width), -np.inf, dtype=np.float32)
    selected, ring_starts = [], []
    for step, (row, positions) in enumerate(steps):
        newest = num_tokens + step
        if row.size != newest + 1:
            raise AssertionError(f"{name}: step {step} scores {row.size} positions")
        scores[step, : row.size] = row
        ring_start = max(num_tokens, (newest // PAGE - 1) * PAGE)
        ring_starts.append(ring_start)
        selected.append(positions[positions < ring_start])
    prompt = np.full(width, -np.inf, dtype=np.float32)
    prompt[:num_tokens] = prompt_scores[:num_tokens]
    return Trace(
        name, DEMO_TOPK, scores, selected, np.sort(np.array(warm)), prompt, np.array(ring_starts)
    )


# Synthetic: the top-k of C scores that change from step to step. One number of each is set so that LRU
# misses 6.7 % at hot = 2 x top-k, the published rate.


def _walk(rng: np.random.Generator, steps: int, count: int, keep: float) -> Iterator[Floats]:
    """Scores that are normal at every step, and `keep` correlated from one to the next (AR(1))."""
    scores = rng.standard_normal(count, dtype=np.float32)
    for _ in range(steps):
        yield scores
        fresh = rng.standard_normal(count, dtype=np.float32)
        scores = keep * scores + np.float32(np.sqrt(1 - keep * keep)) * fresh


def random_walk(rng: np.random.Generator, steps: int, count: int, keep: float) -> Floats:
    """Every position's score is an AR(1) process of its own."""
    return np.stack(list(_walk(rng, steps, count, keep)))


def noisy_walk(rng: np.random.Generator, steps: int, count: int, noise: float) -> Floats:
    """A slow AR(1), 0.999, plus fresh normal noise of deviation `noise` at every step."""
    scores = random_walk(rng, steps, count, 0.999)
    return scores + np.float32(noise) * rng.standard_normal(scores.shape, dtype=np.float32)


def fixed_taste(rng: np.random.Generator, steps: int, count: int, share: float) -> Floats:
    """`share` of the score never changes, the rest is an AR(1), 0.9; variance 1."""
    fixed = np.float32(share) * rng.standard_normal(count, dtype=np.float32)
    return fixed + np.float32(np.sqrt(1 - share * share)) * random_walk(rng, steps, count, 0.9)


def zipf_and_window(rng: np.random.Generator, steps: int, count: int, noise: float) -> Floats:
    """Heavy hitters, a drifting window and a random tail.

    score = log of a Zipf(1) weight by a random rank, + 6 in a window of count / 128 positions that
    moves on by a position every other step, + Gumbel noise times `noise`, fresh at every step: so a
    step's top-k is a sample without replacement by weight ** (1 / noise).
    """
    weight = -np.log1p(rng.permutation(count)).astype(np.float32)
    scores = np.empty((steps, count), dtype=np.float32)
    for step in range(steps):
        scores[step] = weight + np.float32(noise) * rng.gumbel(size=count).astype(np.float32)
        first = count // 2 + step // 2
        scores[step, first : first + count // 128] += 6
    return scores


def periodic(rng: np.random.Generator, steps: int, count: int, shortest: float) -> Floats:
    """Sinks and reuse at periods: score = height * cos(2 pi (step / period + phase)).

    Periods are log-uniform from `shortest` to 1000 steps, heights normal (absolute value) and 3 more
    for 4 sinks that have no period.
    """
    period = np.exp(rng.uniform(np.log(shortest), np.log(1000), count))
    phase, height = rng.random(count), np.abs(rng.standard_normal(count))
    at = np.arange(steps)[:, None]
    scores = height * np.cos(2 * np.pi * (at / period + phase))
    scores[:, :4] = height[:4] + 3
    return scores.astype(np.float32)


SYNTHETIC: dict[str, tuple[Callable[..., Floats], float]] = {
    "random walk": (random_walk, 0.985),
    "noisy walk": (noisy_walk, 0.26),
    "fixed taste": (fixed_taste, 0.9),
    "Zipf, window, tail": (zipf_and_window, 0.375),
    "sinks, periods": (periodic, 16.7),
}


def make_synthetic(
    name: str, value: float | None = None, topk: int = TOPK, positions: int = POSITIONS
) -> Trace:
    """STEPS steps of one of SYNTHETIC; `value`: another number than the one that gives 6.7 %."""
    make, calibrated = SYNTHETIC[name]
    rng = np.random.default_rng(0)
    scores = make(rng, STEPS + 1, positions, calibrated if value is None else value)
    top = np.sort(np.argpartition(scores, -topk, axis=1)[:, -topk:], axis=1)
    return Trace(name, topk, scores[1:], list(top[1:]), top[0])
