"""Host memory that a device or a NIC can address: page-aligned, touched lazily, pinned on demand.

Memory comes from an anonymous mmap, so a large pool costs resident memory only where it was used
(pinning touches all of it). Unpinned memory ends with the last tensor over it; pinned memory must
be closed first. Pools call this at start, on the thread that builds the node.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ConfigError, KernelError

POISON_BYTE = 0xFF
"""A run of it is NaN in e4m3, bf16, fp32 and ue8m0: whatever reads freed memory shows it."""


@dataclass(slots=True)
class HostMemory:
    """One allocation. `data`: uint8 [num_bytes], page-aligned.

    Pinned memory is one registration: a cudaMemcpy that crosses from one into the next fails.
    """

    data: Tensor
    is_pinned: bool = False

    def close(self) -> None:
        """Unpins; again is nothing. The bytes live on as long as a tensor refers to them."""
        if self.is_pinned:
            self.is_pinned = False
            _check_cuda("cudaHostUnregister", _runtime().cudaHostUnregister(self.data.data_ptr()))


def allocate_host(num_bytes: int, *, pin: bool, what: str = "host memory") -> HostMemory:
    """Allocates zeroed host memory of `num_bytes` bytes.

    Raises ConfigError, with both numbers, when the machine or its cgroup has less, and when
    pinning is asked for without a CUDA device; KernelError when CUDA refuses to pin.
    """
    available = available_host_bytes()
    if num_bytes > available:
        raise ConfigError(
            f"{what} needs {num_bytes} bytes, but this machine or its cgroup has {available} bytes"
        )
    if pin and not torch.cuda.is_available():
        raise ConfigError(f"{what} is to be pinned, but there is no CUDA device")
    if num_bytes == 0:
        return HostMemory(torch.empty(0, dtype=torch.uint8))
    data = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
    memory = HostMemory(data)
    if pin:
        _pin(memory)
    return memory


def adopt_host(data: Tensor, num_bytes: int, *, pin: bool, what: str = "host memory") -> HostMemory:
    """Uses memory that somebody else allocated, such as a part of a SharedSegment.

    Args:
        data: uint8 on the CPU, `num_bytes` long; never copied or cleared.

    Raises ConfigError if it has another size, or cannot be pinned as in allocate_host.
    """
    if data.dtype != torch.uint8 or data.device.type != "cpu" or data.numel() != num_bytes:
        raise ConfigError(
            f"{what} needs {num_bytes} bytes of host memory, not {data.numel()} x {data.dtype} "
            f"on {data.device}"
        )
    if pin and not torch.cuda.is_available():
        raise ConfigError(f"{what} is to be pinned, but there is no CUDA device")
    memory = HostMemory(data)
    if pin and num_bytes:
        _pin(memory)
    return memory


def allocate(num_bytes: int, device: torch.device, *, pin: bool, what: str) -> HostMemory:
    """As allocate_host on "cpu"; on another device plain device memory (uninitialised)."""
    if device.type == "cpu":
        return allocate_host(num_bytes, pin=pin, what=what)
    return HostMemory(torch.empty(num_bytes, dtype=torch.uint8, device=device))


def available_host_bytes() -> int:
    """Bytes of memory this process may use at most: the machine's, or less by a cgroup's limit."""
    return min(
        [_machine_bytes(), *_cgroup_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    )


def _machine_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo does not say how much memory this machine has")


def _cgroup_limits(membership: Path, root: Path) -> Iterator[int]:
    """Limits of this process's cgroup and of all above it, versions 1 and 2.

    Inside a container the path in `membership` may be the host's; then only the root's own
    files exist, and they are the container's.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                yield from _limit(folder / name)


def _limit(path: Path) -> Iterator[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return
    if text.isdigit():
        yield int(text)


def _pin(memory: HostMemory) -> None:
    base, size = memory.data.data_ptr(), memory.data.numel()
    _check_cuda("cudaHostRegister", _runtime().cudaHostRegister(base, size, 0))
    memory.is_pinned = True


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check_cuda(call: str, result: object) -> None:
    code = int(result)  # type: ignore[call-overload]
    if code != 0:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # takes the error that CUDA would report to the next op
        raise KernelError(f"{call} failed: {_runtime().cudaGetErrorString(result)}")


def poison_pages(memory_LPX: Tensor, pages: list[int]) -> None:
    """Overwrites `pages` in every layer of uint8 [layers, pages, page bytes] with POISON_BYTE."""
    if memory_LPX.numel() and pages:
        memory_LPX[:, torch.tensor(pages, device=memory_LPX.device)] = POISON_BYTE
