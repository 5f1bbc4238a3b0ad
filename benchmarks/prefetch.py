"""Would rows fetched ahead be the ones that the next step misses?

    python benchmarks/prefetch.py --out benchmarks/results

After each step the best rows by a key that are neither in the hot buffer nor in the ring are brought
in, at most P of them, in place of the rows with the lowest keys that the step did not select. The
next step then misses less, if it selects them. Simulated on the traces of
benchmarks/replacement_traces.py, hot = 2 x top-k, P = top-k / 32 to / 4; misses and rows moved after
the first sixth of the steps, relative to what ships (victims by score, nothing fetched ahead).

| key | the best are |
|---|---|
| score | by index score of this step |
| score + half change | the same, plus half of what it changed by since the step before |
| score + change | plus all of it |
| mean score | by the mean of scores, older ones fading by one half a step |
| score, near | by score, and only rows within a quarter deviation of the lowest selected score |
| next step known | first what the next step selects: what the budget alone allows |

`ranks` says why: where the rows that a step misses stood, by score, in the step before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from replacement_traces import SYNTHETIC, Floats, Ints, Trace, make_synthetic, record_demo

KEYS = (
    "score",
    "score + half change",
    "score + change",
    "mean score",
    "score, near",
    "next step known",
)
DIVISORS = (32, 16, 8, 4)
"""P = top-k / each."""
RANK_EDGES = (1, 1.25, 1.5, 2, 4, 8)
"""Multiples of the top-k."""
NEAR = 0.25
CHANGE = {"score + half change": 0.5, "score + change": 1.0}


def keys_of(trace: Trace, name: str) -> Iterator[Floats]:
    """The key of every position, at each step; what is not there yet is lowest."""
    scores_TC, mean = trace.scores_TC, None
    for step, scores in enumerate(scores_TC):
        known = np.isfinite(scores)
        if name == "mean score":
            now = np.where(known, scores, np.float32(0))
            mean = now if mean is None else 0.5 * mean + 0.5 * now
            yield np.where(known, mean, -np.inf)
        elif name in CHANGE and step:
            before = scores_TC[step - 1]
            change = np.subtract(
                scores, before, where=known & np.isfinite(before), out=np.zeros_like(scores)
            )
            yield scores + np.float32(CHANGE[name]) * change
        elif name == "next step known" and step + 1 < len(trace.selected):
            ahead = scores.copy()
            ahead[trace.selected[step + 1]] = np.finfo(np.float32).max
            yield ahead
        else:
            yield scores


class Buffer:
    """One hot buffer: which position is in which slot."""

    def __init__(self, trace: Trace, hot_rows: int) -> None:
        self.position_of_slot = np.full(hot_rows, -1)
        self.is_resident = np.zeros(trace.scores_TC.shape[1], dtype=bool)
        self.put(np.arange(trace.warm.size), trace.warm)

    def put(self, slots: Ints, positions: Ints) -> None:
        old = self.position_of_slot[slots]
        self.is_resident[old[old >= 0]] = False
        self.position_of_slot[slots] = positions
        self.is_resident[positions] = True

    def victims(self, keys: Floats, selected: Ints, count: int) -> Ints:
        """Up to `count` slots: empty ones, then those with the lowest keys, not selected."""
        empty = np.flatnonzero(self.position_of_slot < 0)[:count]
        if empty.size == count:
            return empty
        is_selected = np.zeros(self.is_resident.size, dtype=bool)
        is_selected[selected] = True
        free = np.flatnonzero(self.position_of_slot >= 0)
        free = free[~is_selected[self.position_of_slot[free]]]
        order = np.argsort(keys[self.position_of_slot[free]], kind="stable")
        return np.concatenate([empty, free[order[: count - empty.size]]])


def simulate(trace: Trace, name: str, budget: int) -> dict[str, int]:
    """Misses, rows fetched ahead, and how many of those were selected while resident."""
    buffer = Buffer(trace, 2 * trace.topk)
    was_fetched = np.zeros(buffer.is_resident.size, dtype=bool)
    first, totals = len(trace.selected) // 6, {"misses": 0, "fetched": 0, "used": 0}
    for step, (selected, keys) in enumerate(zip(trace.selected, keys_of(trace, name), strict=True)):
        scores = trace.scores_TC[step]
        missing = selected[~buffer.is_resident[selected]]
        hits = selected[buffer.is_resident[selected]]
        used = int(was_fetched[hits].sum())
        was_fetched[selected] = False
        buffer.put(buffer.victims(scores, selected, missing.size), missing)
        floor = lowest_near(scores, selected) if name == "score, near" else -np.inf
        fetched = fetch_ahead(trace, buffer, step, keys, selected, budget, floor)
        was_fetched &= buffer.is_resident
        was_fetched[fetched] = True
        if step >= first:
            totals["misses"] += missing.size
            totals["fetched"] += fetched.size
            totals["used"] += used
    return totals


def lowest_near(scores: Floats, selected: Ints) -> float:
    if not selected.size:
        return float("inf")
    return float(scores[selected].min() - NEAR * scores[np.isfinite(scores)].std())


def fetch_ahead(
    trace: Trace,
    buffer: Buffer,
    step: int,
    keys: Floats,
    selected: Ints,
    budget: int,
    floor: float,
) -> Ints:
    """Brings up to `budget` rows into the buffer, each in place of one with a lower key.

    `floor`: a row with a lower score is left where it is.
    """
    is_candidate = np.isfinite(keys) & ~buffer.is_resident & (trace.scores_TC[step] >= floor)
    if trace.ring_start_T.size:
        is_candidate[trace.ring_start_T[step] :] = False
    rows = np.flatnonzero(is_candidate)
    rows = rows[np.argsort(-keys[rows], kind="stable")[:budget]]
    slots = buffer.victims(keys, selected, rows.size)
    rows, held = rows[: slots.size], buffer.position_of_slot[slots]
    is_better = (held < 0) | (keys[rows] > keys[held])
    buffer.put(slots[is_better], rows[is_better])
    return rows[is_better]


def ranks(trace: Trace) -> Ints:
    """Misses as things are, counted by their rank in the step before (RANK_EDGES x top-k)."""
    buffer = Buffer(trace, 2 * trace.topk)
    edges = np.array(RANK_EDGES) * trace.topk
    counts = np.zeros(len(RANK_EDGES) + 1, dtype=np.int64)
    for step, selected in enumerate(trace.selected):
        missing = selected[~buffer.is_resident[selected]]
        if step >= len(trace.selected) // 6:
            order = np.argsort(-trace.scores_TC[step - 1], kind="stable")
            rank = np.empty(order.size, dtype=np.int64)
            rank[order] = np.arange(order.size)
            counts += np.bincount(
                np.searchsorted(edges, rank[missing], side="right"), minlength=counts.size
            )
        scores = trace.scores_TC[step]
        buffer.put(buffer.victims(scores, selected, missing.size), missing)
    return counts


def compare(name: str, traces: list[Trace]) -> dict[str, Any]:
    base = sum(simulate(trace, "score", 0)["misses"] for trace in traces)
    counts = sum((ranks(trace) for trace in traces), np.zeros(len(RANK_EDGES) + 1, dtype=np.int64))
    row: dict[str, Any] = {"trace": name, "misses": base, "ranks": counts.tolist(), "keys": {}}
    for key in KEYS:
        cells = []
        for divisor in DIVISORS:
            parts = [simulate(trace, key, trace.topk // divisor) for trace in traces]
            totals = {part: sum(each[part] for each in parts) for part in parts[0]}
            cells.append(
                {
                    "divisor": divisor,
                    "misses": round(totals["misses"] / base, 3),
                    "moved": round((totals["misses"] + totals["fetched"]) / base, 2),
                    "used": round(totals["used"] / max(1, totals["fetched"]), 3),
                }
            )
        row["keys"][key] = cells
    return row


def report(rows: list[dict[str, Any]]) -> str:
    head = " | ".join(f"P = top-k / {divisor}" for divisor in DIVISORS)
    lines = ["Misses (rows moved), today's = 1:", "", f"| trace | key | {head} |"]
    lines.append("|" + "---|" * (len(DIVISORS) + 2))
    for row in rows:
        for key, cells in row["keys"].items():
            text = " | ".join(f"{cell['misses']:.2f} ({cell['moved']:.1f})" for cell in cells)
            lines.append(f"| {row['trace']} | {key} | {text} |")
    edges = [f"< {RANK_EDGES[0]}", *(f"to {edge}" for edge in RANK_EDGES[1:]), "beyond"]
    lines += ["", "Rank of missed rows in the step before, by multiples of the top-k:", ""]
    lines += ["| trace | " + " | ".join(edges) + " |", "|" + "---|" * (len(edges) + 1)]
    for row in rows:
        shares = " | ".join(f"{count / sum(row['ranks']):.1%}" for count in row["ranks"])
        lines.append(f"| {row['trace']} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    demo = list(record_demo())
    rows = [compare("all of the demo", demo)]
    rows += [compare(f"demo, group {group}", demo[group::3]) for group in range(3)]
    rows += [compare(name, [make_synthetic(name)]) for name in SYNTHETIC]
    text = report(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{date.today()}-prefetch-traces"
    stem.with_suffix(".json").write_text(json.dumps(rows) + "\n")
    print(text)


if __name__ == "__main__":
    main()
