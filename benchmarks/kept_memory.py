"""What pinned memory that outlives its process costs at a restart.

    python benchmarks/kept_memory.py --gib 16 --device-gib 60

A process makes a segment, pins it as a decode node does, takes device memory and is killed. Timed: making and
pinning new memory; from the kill to the end of the process as a keeper sees it (pidfd); how much
device memory is free then; a CUDA context in the next process; pinning what is there again. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time

import torch

from tidepool.hostpool.memory import adopt_host
from tidepool.hostpool.segment import SharedSegment

GIB = 2**30


def timed(name: str, begin_s: float, times_s: dict[str, float]) -> float:
    now_s = time.monotonic()
    times_s[name] = round(now_s - begin_s, 3)
    return now_s


def child(descriptor: int, device_bytes: int) -> None:
    """The node's process: says what its start took, then waits to be killed."""
    times_s: dict[str, float] = {}
    at = time.monotonic()
    torch.zeros(1, device="cuda")
    at = timed("context", at, times_s)
    data = SharedSegment.attach(descriptor).part("kv")
    first = int(data[0])
    memory = adopt_host(data, data.numel(), pin=True)
    at = timed("pin", at, times_s)
    held = torch.empty(device_bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    timed("device memory", at, times_s)
    held[: data.numel()].copy_(data[: held.numel()], non_blocking=True)
    data[:: 1 << 20] = first + 1
    print(json.dumps({"first byte": first, **times_s}), flush=True)
    time.sleep(600)
    memory.close()


def run(descriptor: int, device_bytes: int) -> dict[str, float]:
    """One life: its times, and those of its end."""
    os.set_inheritable(descriptor, True)
    command = [sys.executable, __file__, "--child", str(descriptor), str(device_bytes)]
    begin_s = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[descriptor])
    assert process.stdout is not None
    times_s = dict(json.loads(process.stdout.readline()))
    timed("start to ready", begin_s, times_s)
    pidfd = os.pidfd_open(process.pid)
    begin_s = time.monotonic()
    os.kill(process.pid, signal.SIGKILL)
    select.select([pidfd], [], [])
    timed("kill to end", begin_s, times_s)
    times_s["device GiB free then"] = round(torch.cuda.mem_get_info()[0] / GIB, 1)
    process.wait()
    os.close(pidfd)
    return times_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=16.0)
    parser.add_argument("--device-gib", type=float, default=60.0)
    parser.add_argument("--lives", type=int, default=2)
    arguments = parser.parse_args()
    torch.zeros(1, device="cuda")
    free = round(torch.cuda.mem_get_info()[0] / GIB, 1)
    segment = SharedSegment.create({"kv": int(arguments.gib * GIB)}, identity="", what="benchmark")
    for life in range(arguments.lives):
        line = run(segment.descriptor, int(arguments.device_gib * GIB))
        setting = {"life": life, "GiB": arguments.gib, "device GiB free before": free}
        print(json.dumps({**setting, **line}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
