"""Which transport a configuration means, and whether its bytes are hashed."""

from __future__ import annotations

from ..common.config import TransferSection
from .loopback import LoopbackTransport
from .mooncake import MooncakeTransport
from .transport import Transport


def make_transport(config: TransferSection, host: str) -> Transport:
    """Starts the transport of `config.protocol` on interface `host`. Raises TransferError."""
    if config.protocol == "loopback":
        return LoopbackTransport()
    return MooncakeTransport(host, config.protocol)


def may_share(config: TransferSection) -> bool:
    """Whether nodes of one machine may copy instead of sending: not where all bytes are hashed."""
    return config.shared_memory == "auto" and config.checksums != "on"


def has_checksums(config: TransferSection) -> bool:
    """Whether pages are hashed before the write and verified after it; auto: over tcp."""
    if config.checksums == "auto":
        return config.protocol == "tcp"
    return config.checksums == "on"
