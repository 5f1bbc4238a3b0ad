"""The TCP sockets of this process that libraries opened and do not show, found by Linux's /proc.

The transfer engine has no call that ends its peers' connections, nor one that ends its own to a peer
that is gone; `transfer/mooncake.py` does it from here. Only `cut_connections` blocks. Where there is
no /proc nothing is found.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

_LISTEN = "0A"
_POLL_S = 0.002

SILENT_S = 30
"""A connection that is silent for so long is asked whether its other end is still there ..."""
PROBE_INTERVAL_S = 10
NUM_PROBES = 3
"""... so many times; or, while something was sent and not acknowledged, given up after the same time.
Much longer than any heartbeat: sessions and fences have ended by then, this only frees sockets."""


class _Connection(NamedTuple):
    """A line of the kernel's table: TCP sockets of this network namespace."""

    inode: int
    is_listening: bool
    local_port: int
    remote_ip: str
    remote_port: int


def listening_ports() -> set[int]:
    """Ports of the sockets that listen, both families."""
    descriptors = _descriptors()
    return {each.local_port for each in _table() if each.is_listening and each.inode in descriptors}


def notice_lost_peers(ports: Collection[int]) -> None:
    """Connections accepted on `ports` from now on end when the other end's host is gone.

    A peer whose power fails says nothing; without this its connections stay for ever. What is
    accepted inherits the options of the socket that listens.
    """
    descriptors = _descriptors()
    for each in _table():
        if each.is_listening and each.local_port in ports and each.inode in descriptors:
            with contextlib.suppress(OSError), _duplicate(descriptors[each.inode]) as listener:
                _set_keepalive(listener)


def _set_keepalive(target: socket.socket) -> None:
    target.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_S)
    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_INTERVAL_S)
    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)
    unanswered_ms = 1000 * (SILENT_S + NUM_PROBES * PROBE_INTERVAL_S)
    target.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, unanswered_ms)


def connections_to(ips: Collection[str], port: int) -> frozenset[int]:
    """The connections that were made to a remote port: names, until their owner closes them."""
    descriptors = _descriptors()
    return frozenset(
        each.inode
        for each in _table()
        if each.remote_port == port
        and each.remote_ip in ips
        and not each.is_listening
        and each.inode in descriptors
    )


def shut_down(names: frozenset[int]) -> None:
    """Nothing more is sent on these connections, and whoever writes to or reads from one is told."""
    for inode, descriptor in _descriptors().items():
        if inode in names:
            with contextlib.suppress(OSError):
                _shut_down(descriptor, inode)


def still_open(names: frozenset[int]) -> frozenset[int]:
    """Those that their owner has not closed."""
    return names & _descriptors().keys()


def cut_connections(ports: Collection[int], timeout_s: float) -> bool:
    """Shuts down the connections that were accepted on `ports`, and waits for their owner.

    True once the owner has closed every one that was there at the call: then none of its threads
    reads from them any more, what was in the kernel's buffers included.
    """
    targets = {
        each.inode for each in _table() if not each.is_listening and each.local_port in ports
    }
    shut_down(frozenset(targets))
    deadline_s = time.monotonic() + timeout_s
    while targets & _descriptors().keys():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def _shut_down(descriptor: int, inode: int) -> None:
    """On a duplicate, and only if it is that socket still: its owner may close it at any time."""
    with _duplicate(descriptor) as duplicate:
        if os.fstat(duplicate.fileno()).st_ino == inode:
            duplicate.shutdown(socket.SHUT_RDWR)


def _duplicate(descriptor: int) -> socket.socket:
    return socket.socket(fileno=os.dup(descriptor))


def _table() -> Iterator[_Connection]:
    """All but those that no process has any more."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                _, _, local_port = fields[1].rpartition(":")
                remote_ip, _, remote_port = fields[2].rpartition(":")
                inode, is_listening = int(fields[9]), fields[3] == _LISTEN
                if inode:
                    yield _Connection(
                        inode,
                        is_listening,
                        int(local_port, 16),
                        _ip(remote_ip),
                        int(remote_port, 16),
                    )


def _ip(text: str) -> str:
    """From the kernel's hexadecimal words in the machine's byte order; mapped IPv4 as IPv4."""
    words = [int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _descriptors() -> dict[int, int]:
    """Descriptor of each socket of this process, by inode."""
    found = {}
    with contextlib.suppress(OSError):
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                kind, _, inode = str(link.readlink()).partition(":[")
                if kind == "socket":
                    found[int(inode.rstrip("]"))] = int(link.name)
    return found
