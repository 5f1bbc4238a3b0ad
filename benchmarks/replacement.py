"""Which resident row should make room, and how many rows come from the host for it?

    python benchmarks/replacement.py --out benchmarks/results

Every policy is simulated on every trace (benchmarks/replacement_traces.py) for hot buffers of several
multiples of the top-k: misses after the first sixth of the steps, relative to exact LRU. MIN is
Belady's: it evicts the row whose next use is farthest, and knows the future. `score` and `lru` are
also run through the op (kernels/resolve.py), which must miss exactly as often.

| policy | evicts, among the rows not used by this step |
|---|---|
| lru | the least recently used |
| lru-2 | the one whose use before the last is oldest |
| lfu, aged | the lowest count of uses, counts fading by 0.9 a step |
| score | the lowest index score of this step, in 63 steps between lowest and highest: what ships |
| exact score | the same without rounding |
| mean score | the lowest mean of scores, older ones fading by one half a step |
| score and age | the lowest score less 0.02 deviations for each step not used |
| MIN | the one used again farthest in the future |
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from replacement_traces import (
    PAGE,
    RING_ROWS,
    SYNTHETIC,
    Ints,
    Trace,
    make_synthetic,
    record_demo,
)

from tidepool.kernels.resolve import resolve, score_steps

HOT_MULTIPLES = (1.5, 2.0, 3.0, 4.0)
"""Hot rows by the top-k, of demo traces; synthetic ones are made for 2."""
NEVER = 1 << 30


class Policy:
    """What a policy knows; `use` is told each step's selection after victims were chosen."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.positions = trace.scores_TC.shape[1]
        self.start()

    def start(self) -> None:
        """Sets up the policy's own state."""

    def see(self, step: int, selected: Ints) -> None:
        """A step begins, missing anything or not."""

    def keys(self, step: int, candidates: Ints) -> Any:
        """A number for each candidate position; the lowest go first."""
        raise KeyError(step)


class Lru(Policy):
    def start(self) -> None:
        self.last = np.full(self.positions, -1)

    def see(self, step: int, selected: Ints) -> None:
        self.last[selected] = step

    def keys(self, step: int, candidates: Ints) -> Any:
        return self.last[candidates]


class Lru2(Lru):
    def start(self) -> None:
        super().start()
        self.before = np.full(self.positions, -NEVER)

    def see(self, step: int, selected: Ints) -> None:
        self.before[selected] = self.last[selected]
        super().see(step, selected)

    def keys(self, step: int, candidates: Ints) -> Any:
        return self.before[candidates] * 4096.0 + self.last[candidates]


class Lfu(Policy):
    def start(self) -> None:
        self.count = np.zeros(self.positions)

    def see(self, step: int, selected: Ints) -> None:
        self.count *= 0.9
        self.count[selected] += 1

    def keys(self, step: int, candidates: Ints) -> Any:
        return self.count[candidates]


class ExactScore(Policy):
    def keys(self, step: int, candidates: Ints) -> Any:
        return self.trace.scores_TC[step, candidates]


class Score(Policy):
    def keys(self, step: int, candidates: Ints) -> Any:
        return score_steps(self.trace.scores_TC[step], candidates)


class MeanScore(Policy):
    def start(self) -> None:
        self.mean = np.zeros(self.positions)

    def see(self, step: int, selected: Ints) -> None:
        scores = self.trace.scores_TC[step]
        self.mean = 0.5 * self.mean + 0.5 * np.where(np.isfinite(scores), scores, 0)

    def keys(self, step: int, candidates: Ints) -> Any:
        return self.mean[candidates]


class ScoreAndAge(Lru):
    def keys(self, step: int, candidates: Ints) -> Any:
        scores = self.trace.scores_TC[step]
        deviation = scores[np.isfinite(scores)].std()
        return scores[candidates] / deviation - 0.02 * (step - self.last[candidates])


class Min(Policy):
    def start(self) -> None:
        """For each step the next use of what it selects, found from the end."""
        ahead = np.full(self.positions, NEVER)
        self.after: list[Ints] = []
        for step in range(len(self.trace.selected) - 1, -1, -1):
            selected = self.trace.selected[step]
            self.after.append(ahead[selected])
            ahead[selected] = step
        self.after.reverse()
        self.next = ahead

    def see(self, step: int, selected: Ints) -> None:
        self.next[selected] = self.after[step]

    def keys(self, step: int, candidates: Ints) -> Any:
        return -self.next[candidates]


POLICIES: dict[str, type[Policy]] = {
    "lru": Lru,
    "lru-2": Lru2,
    "lfu, aged": Lfu,
    "score": Score,
    "exact score": ExactScore,
    "mean score": MeanScore,
    "score and age": ScoreAndAge,
    "MIN": Min,
}


def simulate(trace: Trace, hot_rows: int, policy: Policy, warm: Ints | None = None) -> Ints:
    """Misses of each step; `warm` (None: the trace's) is resident at the start."""
    position_of_slot = np.full(hot_rows, -1)
    is_resident = np.zeros(policy.positions, dtype=bool)
    is_used = np.zeros(policy.positions, dtype=bool)
    start = (trace.warm if warm is None else warm)[:hot_rows]
    position_of_slot[: start.size] = start
    is_resident[start] = True
    misses = np.zeros(len(trace.selected), dtype=np.int64)
    for step, selected in enumerate(trace.selected):
        policy.see(step, selected)
        missing = selected[~is_resident[selected]]
        misses[step] = missing.size
        if not missing.size:
            continue
        slots = np.flatnonzero(position_of_slot < 0)[: missing.size]
        if slots.size < missing.size:
            is_used[selected] = True
            free = np.flatnonzero(position_of_slot >= 0)
            free = free[~is_used[position_of_slot[free]]]
            is_used[selected] = False
            order = np.argsort(policy.keys(step, position_of_slot[free]), kind="stable")
            slots = np.concatenate([slots, free[order[: missing.size - slots.size]]])
        slots.sort()
        old = position_of_slot[slots]
        is_resident[old[old >= 0]] = False
        position_of_slot[slots] = missing
        is_resident[missing] = True
    return misses


def run_op(trace: Trace, hot_rows: int, *, by_score: bool) -> Ints:
    """Misses of each step as the op has them."""

    def ints(*shape: int, fill: int) -> torch.Tensor:
        return torch.full(shape, fill, dtype=torch.int32)

    width = -(-trace.scores_TC.shape[1] // PAGE) * PAGE
    page_table, ring_start = torch.arange(width // PAGE).int()[None], ints(1, fill=width)
    held, slots = ints(1, hot_rows, fill=-1), ints(1, width, fill=-1)
    warm = torch.from_numpy(trace.warm[:hot_rows])
    held[0, : warm.numel()] = warm.int()
    slots[0, warm] = torch.arange(warm.numel()).int()
    last_use = ints(1, hot_rows, fill=0)
    misses = np.zeros(len(trace.selected), dtype=np.int64)
    for step, selected in enumerate(trace.selected):
        topk = ints(1, trace.topk, fill=-1)
        topk[0, : selected.size] = torch.from_numpy(selected).int()
        plan = [torch.empty(1, trace.topk, dtype=torch.int64) for _ in range(2)]
        count, fault = ints(1, fill=0), ints(1, fill=0)
        resolve(
            topk, ints(1, fill=width), ints(1, fill=0), page_table, ring_start, held, slots, last_use,
            ints(1, fill=step + 1), torch.empty_like(topk), *plan, count, fault, PAGE, RING_ROWS, False,
            torch.from_numpy(trace.scores_TC[step : step + 1]) if by_score else None,
        )  # fmt: skip
        if int(fault):
            raise AssertionError(f"{trace.name}: fault {int(fault)}")
        misses[step] = int(count)
    return misses


def compare(trace: Trace, multiples: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """Misses of all policies, a row for each size of hot buffer."""
    skipped = len(trace.selected) // 6
    num_selected = sum(step.size for step in trace.selected[skipped:])
    for multiple in multiples:
        hot_rows = int(multiple * trace.topk)
        row: dict[str, Any] = {"trace": trace.name, "hot": multiple, "selected": num_selected}
        for name, policy in POLICIES.items():
            misses = simulate(trace, hot_rows, policy(trace))
            row[name] = int(misses[skipped:].sum())
            if multiple == 2 and name in ("lru", "score"):
                op_misses = run_op(trace, hot_rows, by_score=name == "score")
                if not np.array_equal(misses, op_misses):
                    raise AssertionError(f"{trace.name}: {name} is not what the op does")
        yield row


def warm_rows(traces: list[Trace]) -> list[dict[str, Any]]:
    """Misses of the first steps with nothing, the prompt's top-k, or its best 2 x top-k loaded."""
    rows = []
    for trace in traces:
        assert trace.prompt_scores_C is not None
        hot_rows = 2 * trace.topk
        best = np.sort(np.argpartition(trace.prompt_scores_C, -hot_rows)[-hot_rows:])
        row: dict[str, Any] = {"trace": trace.name, "selected": trace.selected[0].size}
        for name, warm in (("cold", best[:0]), ("top-k", trace.warm), ("2 x top-k", best)):
            misses = simulate(trace, hot_rows, Score(trace), warm)
            row[name], row[f"{name}, 16 steps"] = int(misses[0]), int(misses[:16].sum())
        rows.append(row)
    return rows


def ring_rows(traces: list[Trace]) -> dict[str, int]:
    """Misses of all demo traces at 2 x top-k, by what becomes of rows that leave the ring."""
    totals = {"as it is": 0, "read until overwritten": 0, "never missed once": 0}
    for trace in traces:
        skipped = len(trace.selected) // 6
        first = int(trace.ring_start_T[0])
        later = []
        for step, selected in enumerate(trace.selected):
            later.append(selected[selected < max(first, first + step + 1 - RING_ROWS)])
        for name, steps in (("as it is", trace.selected), ("read until overwritten", later)):
            other = replace(trace, selected=steps)
            misses = simulate(other, 2 * trace.topk, Score(other))
            totals[name] += int(misses[skipped:].sum())
        new = np.concatenate([step[step >= first] for step in trace.selected[skipped:]])
        totals["never missed once"] += int(misses[skipped:].sum()) - np.unique(new).size
    return totals


def report(rows: list[dict[str, Any]], warm: list[dict[str, Any]], ring: dict[str, int]) -> str:
    names = [name for name in POLICIES if name != "lru"]
    lines = ["| trace | hot / top-k | LRU misses | " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * (len(names) + 3))
    for row in rows:
        cells = " | ".join(f"{row[name] / row['lru']:.3f}" for name in names)
        share = row["lru"] / row["selected"]
        lines.append(f"| {row['trace']} | {row['hot']} | {share:.1%} | {cells} |")
    kinds = ["cold", "top-k", "2 x top-k"]
    lines += ["", "First step and first 16 steps, misses:", ""]
    lines.append("| trace | selected | " + " | ".join(kinds) + " |")
    lines.append("|" + "---|" * 5)
    for row in warm:
        cells = " | ".join(f"{row[kind]}, {row[f'{kind}, 16 steps']}" for kind in kinds)
        lines.append(f"| {row['trace']} | {row['selected']} | {cells} |")
    lines += ["", "Rows that leave the ring, misses of all demo traces: " + str(ring)]
    return "\n".join(lines) + "\n"


def totals(rows: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """All rows of one kind of trace together, by size of hot buffer."""
    for multiple in HOT_MULTIPLES:
        some = [row for row in rows if row["hot"] == multiple]
        counts = {name: sum(row[name] for row in some) for name in ("selected", *POLICIES)}
        yield {"trace": kind, "hot": multiple, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    demo = list(record_demo())
    rows = [row for trace in demo for row in compare(trace, HOT_MULTIPLES)]
    rows += list(totals(rows, "all of the demo"))
    warm, ring = warm_rows(demo), ring_rows(demo)
    for name in SYNTHETIC:
        rows += compare(make_synthetic(name), (2.0,))
    text = report(rows, warm, ring)
    stem = args.out / f"{date.today()}-replacement-traces"
    args.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps({"rows": rows, "warm": warm, "ring": ring}))
    print(text)


if __name__ == "__main__":
    main()
