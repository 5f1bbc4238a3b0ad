"""Chooses the transport that the configuration names; called once by each node at start."""

from __future__ import annotations

from ..common.config import TransferSection
from .loopback import LoopbackTransport
from .mooncake import MooncakeTransport
from .transport import Transport


def build_transport(config: TransferSection, host: str) -> Transport:
    """Starts a transport that peers reach under `host`; TransferError if it does not start."""
    if config.protocol == "loopback":
        return LoopbackTransport()
    return MooncakeTransport(host, config.protocol)
