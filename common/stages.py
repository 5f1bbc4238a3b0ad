"""When a process got how far while it started: what a restart's length is made of.

Filled by the thread that builds a node; read afterwards, by anybody.
"""

from __future__ import annotations

import os
import time
from pathlib import Path


class Stages:
    """Times in seconds since the epoch, by stage, in order; "process" is when the kernel made it."""

    def __init__(self) -> None:
        self.times_s: dict[str, float] = {"process": _process_start_s()}

    def mark(self, stage: str) -> None:
        """This stage is done."""
        self.times_s[stage] = time.time()


def _process_start_s() -> float:
    """To a hundredth of a second, as the kernel counts."""
    text = Path("/proc/self/stat").read_text()
    ticks = int(text.rpartition(")")[2].split()[19])
    uptime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")
