"""What exporter and importer tell their nodes, through `post_event`, and the key of a request."""

from __future__ import annotations

from dataclasses import dataclass

from ..common import wire
from .session import Peer

Key = tuple[str, int]
"""(request_id, attempt)."""


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """A prompt that prefill is about to compute, and the decode node that shall take it."""

    request_id: str
    attempt: int
    num_prompt_tokens: int
    sampling: wire.Sampling
    front_id: str
    decode_id: str
    decode_address: str

    @property
    def key(self) -> Key:
        return self.request_id, self.attempt


@dataclass(frozen=True, slots=True)
class ExportGranted:
    """Decode has room: compute."""

    key: Key


@dataclass(frozen=True, slots=True)
class ExportRefused:
    """Decode can never take this request; `status` and `code` are the client's error."""

    key: Key
    reason: str
    status: int
    code: str


@dataclass(frozen=True, slots=True)
class ExportFailed:
    """The attempt is over, another one may succeed. Also the answer to `cancel`."""

    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class ExportDone:
    """Handed over: decode has verified every page."""

    key: Key


@dataclass(frozen=True, slots=True)
class ExportReleased:
    """Exactly once, after Refused, Failed or Done: the source pages may be reused.

    If `is_quarantined`, a late write may still read them: keep them out of use, until
    ExportUnquarantined.
    """

    key: Key
    is_quarantined: bool


@dataclass(frozen=True, slots=True)
class ExportUnquarantined:
    """The decode process a late write was meant for is dead: its source pages may be reused."""

    key: Key


@dataclass(frozen=True, slots=True)
class OfferArrived:
    """Answer with grant, defer or refuse."""

    peer: Peer
    offer: wire.Offer


@dataclass(frozen=True, slots=True)
class ImportReady:
    """Every page of the prompt has arrived, verified: the request may run."""

    key: Key
    lease_id: int
    first_token: wire.OutputToken
    warm_positions: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ImportFailed:
    """The prompt will not arrive. The pages are held until LeaseEnded."""

    key: Key
    lease_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseQuarantined:
    """The writer is lost or has failed: pages stay held until LeaseEnded. At most once a lease."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """Nobody can write to the lease's pages any more. Last, exactly once a lease."""

    lease_id: int


ExportEvent = (
    ExportGranted | ExportRefused | ExportFailed | ExportDone | ExportReleased | ExportUnquarantined
)
ImportEvent = OfferArrived | ImportReady | ImportFailed | LeaseQuarantined | LeaseEnded
