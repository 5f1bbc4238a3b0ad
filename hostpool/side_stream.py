"""A CUDA stream beside the current one, and marks on it. On the CPU work runs where it is called.

Used on a node's step thread for copies that must not hold up the step. Inside a captured graph,
`fork`, `mark` and `join` become edges of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


class Mark:
    """A point in the stream's work; always passed on the CPU."""

    __slots__ = ("_event",)

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def has_passed(self) -> bool:
        """Whether all work before the mark has ended; does not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Returns when all work before the mark has ended; the host waits."""
        if self._event is not None:
            self._event.synchronize()  # type: ignore[no-untyped-call]

    def join(self) -> None:
        """What is launched on the current stream from now on runs behind the mark."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)  # type: ignore[no-untyped-call]


class SideStream:
    """Args: `device` of the work; `is_urgent`: its kernels go before the current stream's."""

    def __init__(self, device: torch.device, *, is_urgent: bool = False) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            priority = -1 if is_urgent else 0
            self._stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def fork(self) -> AbstractContextManager[object]:
        """What is launched inside runs behind all work so far and beside what follows."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)

    def beside(self, behind: SideStream) -> AbstractContextManager[object]:
        """What is launched inside runs behind the forks of `behind`, not behind the current stream."""
        if self._stream is None or behind._stream is None:
            return nullcontext()
        self._stream.wait_stream(behind._stream)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        """Marks the work launched in forks so far."""
        if self._stream is None:
            return Mark(None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)  # type: ignore[no-untyped-call]
        return Mark(event)

    def join(self) -> None:
        """What is launched on the current stream from now on runs behind all forks."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)  # type: ignore[no-untyped-call]
