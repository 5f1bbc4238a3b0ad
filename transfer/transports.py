"""Which transport a configuration means, and whether its bytes are hashed."""

from __future__ import annotations

import os

from ..common.config import TransferSection
from .loopback import LoopbackTransport
from .mooncake import MooncakeTransport
from .striped import StripedTransport
from .transport import Transport

_CORES_AN_ENGINE = 4
_MAX_ENGINES = 4


def make_transport(config: TransferSection, host: str) -> Transport:
    """Starts the transport of `config.protocol` on interface `host`. Raises TransferError."""
    if config.protocol == "loopback":
        return LoopbackTransport()
    if config.protocol == "rdma":
        return MooncakeTransport(host, config.protocol)
    return make_tcp(host, config.tcp_engines or default_engines())


def make_tcp(host: str, num_engines: int) -> Transport:
    """`num_engines` engines over TCP, as one transport. Raises TransferError."""
    retired_ports: set[int] = set()
    engines = [
        MooncakeTransport(host, "tcp", retired_ports=retired_ports) for _ in range(num_engines)
    ]
    return engines[0] if num_engines == 1 else StripedTransport(engines)


def default_engines() -> int:
    """One for each four cores of this process, at most four: each keeps a thread busy."""
    return max(1, min(_MAX_ENGINES, len(os.sched_getaffinity(0)) // _CORES_AN_ENGINE))


def may_share(config: TransferSection) -> bool:
    """Whether nodes of one machine may copy instead of sending: not where all bytes are hashed."""
    return config.shared_memory == "auto" and config.checksums != "on"


def has_checksums(config: TransferSection) -> bool:
    """Whether pages are hashed before the write and verified after it; auto: over tcp."""
    if config.checksums == "auto":
        return config.protocol == "tcp"
    return config.checksums == "on"
