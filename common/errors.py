"""The error tree.

TidepoolError
  ConfigError          the configuration cannot work; raised at start, lists every fault
  CheckpointError      a model directory cannot be loaded; lists every fault
  RequestError         the caller's request cannot be served; carries the HTTP status and a code
  ProtocolError        a peer sent what it must not send; the peer is told, the loop lives on
  PeerError            a peer is gone, refused us, or does not answer
  TransferError        bytes could not be moved
    ChecksumError      bytes arrived, and they are not the bytes that were sent
  SegmentError         memory of an earlier process cannot be had or gone on from
  KernelError          an op was called with tensors it cannot take, or a launch failed
  InvariantError       our own fault: the node stops

Full pools are not errors: `try_acquire` answers None.
"""

from __future__ import annotations


class TidepoolError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(TidepoolError):
    """The configuration cannot work. The message lists every fault found, one a line."""


class CheckpointError(TidepoolError):
    """A model directory cannot be loaded. The message lists every fault found, one a line."""


class RequestError(TidepoolError):
    """A request that cannot be served.

    Attributes:
        status: HTTP status the client gets (400, 404, 413, 429, 503, ...).
        code: short machine-readable reason, e.g. "context_length_exceeded".
        param: the offending field of the request body, or None.
        retry_after_s: seconds after which trying again makes sense, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class ProtocolError(TidepoolError):
    """A peer broke the protocol: unknown message, missing or mistyped field, impossible order."""


class PeerError(TidepoolError):
    """A peer is gone, refused the session, or does not answer."""


class TransferError(TidepoolError):
    """Bytes could not be moved. `is_drained` says whether nothing of the batch is in flight."""

    def __init__(self, message: str, *, is_drained: bool = False) -> None:
        super().__init__(message)
        self.is_drained = is_drained


class ChecksumError(TransferError):
    """Bytes arrived and differ from what was sent."""


class SegmentError(TidepoolError):
    """Shared memory of another process cannot be had, or is not what it must be."""


class KernelError(TidepoolError):
    """An op refused its arguments or its launch failed; the message prints both sides."""


class InvariantError(TidepoolError):
    """Our own fault. Nothing catches it but the outermost loop, which stops the node."""
