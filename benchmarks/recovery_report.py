"""What benchmarks/recovery.py writes: rows of figures, as JSON and as a dated table beside the goals.

A run adds to the rows that the day's report has of the same commit and replaces those of another, so
that it can be interrupted, and a fault measured again alone; each row names its commit.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

VERSIONS = ("ray", "torch", "pyzmq", "mooncake-transfer-engine-non-cuda")


@dataclass
class Row:
    """All injections of one fault; times in seconds.

    Attributes:
        resets: requests whose connection was reset; only a killed front may do that.
        gaps_s: for each injection and stream that it hit, the longest silence behind the injection.
        went_on_s: for each injection and stream, from it to the stream's last token; 0: it had ended.
        ttfts_s: of the prompts that were on their way.
        served_s: from the fault, or the moment it was over, until a new request was answered.
        restored_s: until all nodes were up and all pools settled, for each injection.
    """

    fault: str
    goal: str
    commit: str = ""
    injections: int = 0
    requests: int = 0
    failed: int = 0
    resets: int = 0
    gaps_s: list[list[float]] = field(default_factory=list)
    went_on_s: list[list[float]] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    served_s: list[float] = field(default_factory=list)
    restored_s: list[float] = field(default_factory=list)
    quarantined_pages: int = 0
    notes: list[str] = field(default_factory=list)


def facts_of(command: str) -> dict[str, Any]:
    """Machine, versions and commit; call it before the load begins."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, Linux {platform.release()}; load average "
        f"{os.getloadavg()[0]:.0f} before the start, the run at nice {os.nice(0)}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "commit": commit.stdout.strip(),
        "command": command,
    }


def write(rows: Sequence[Row], out: Path, facts: dict[str, Any], setting: str) -> None:
    """Writes <date>-recovery.json and .md. `setting`: a paragraph on what ran."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{facts['date']}-recovery"
    kept = load(out, facts)
    for row in rows:
        row.commit = facts["commit"]
        kept[row.fault] = row
    normal = kept.get("none")
    normal_s = statistics.median(normal.ttfts_s) if normal and normal.ttfts_s else 0.0
    figures = [asdict(row) | _summary(row, normal_s) for row in kept.values()]
    path.with_suffix(".json").write_text(json.dumps({**facts, "rows": figures}, indent=1) + "\n")
    text = _markdown(list(kept.values()), facts, setting, normal_s)
    path.with_suffix(".md").write_text(text)


def load(out: Path, facts: dict[str, Any]) -> dict[str, Row]:
    """The rows of the day's report, by fault."""
    path = out / f"{facts['date']}-recovery.json"
    if not path.exists():
        return {}
    names = set(Row.__dataclass_fields__)
    rows = json.loads(path.read_text())["rows"]
    return {
        row["fault"]: Row(**{name: row[name] for name in names})
        for row in rows
        if names <= set(row)
    }


def _percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; the largest value where there are too few for the share."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def _both(values: Sequence[float]) -> list[float] | None:
    if not values:
        return None
    return [round(statistics.median(values), 2), round(_percentile(values, 0.99), 2)]


def _summary(row: Row, normal_s: float) -> dict[str, Any]:
    return {
        "worst_gap_p50_p99_s": _both([max(gaps) for gaps in row.gaps_s if gaps]),
        "added_ttft_p50_p99_s": _both([ttft - normal_s for ttft in row.ttfts_s]),
        "served_p50_p99_s": _both(row.served_s),
        "restored_p50_p99_s": _both(row.restored_s),
    }


def _markdown(rows: Sequence[Row], facts: dict[str, Any], setting: str, normal_s: float) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"# Recovery, {facts['date']}",
        "",
        f"{facts['machine']}; Python {facts['python']}, {versions}.",
        "",
        f"Last command: `{facts['command']}`. {setting} *Gap*: the longest silence of the worst "
        "stream of an injection. *Added*: time to the first token of the prompts on their way, "
        f"less its median without a fault ({normal_s:.2f} s, which is what a prefill costs under "
        "this load). *Served*: until a new request was answered, from the fault (a front), from its "
        "end (the head), or at any time (none). With fewer than 100 values p99 is the largest. *Restored*: from the "
        "last answer until all nodes are up and all pools settled. *Quarantined*: pages kept back "
        "because a writer's end is not proven.",
        "",
        "| fault | goal | injections | streams hit | requests | failed | reset | gap p50 / p99 (s) "
        "| added p50 / p99 (s) | served p50 / p99 (s) | restored p50 / p99 (s) | quarantined pages "
        "| commit |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        times = [
            " / ".join(map(str, each)) if each else "" for each in _summary(row, normal_s).values()
        ]
        num_hit = sum(len(gaps) for gaps in row.gaps_s)
        counts = [row.injections, num_hit, row.requests, row.failed, row.resets]
        cells = [row.fault, row.goal, *counts, *times, row.quarantined_pages, row.commit]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    notes = {row.fault: sorted(set(row.notes)) for row in rows if row.notes}
    lines += ["", *(f"* {fault}: {'; '.join(texts)}" for fault, texts in notes.items()), ""]
    return "\n".join(lines)
