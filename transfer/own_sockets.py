"""The TCP sockets of this process that libraries opened and do not show, found by Linux's /proc.

The transfer engine has no call that ends its peers' connections; `transfer/mooncake.py` does it from
here, on a thread that may block. Where there is no /proc nothing is found.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Collection
from pathlib import Path

_LISTEN = "0A"
_POLL_S = 0.002


def listening_ports() -> set[int]:
    """Ports of the sockets that listen, both families."""
    ports = _ports_by_inode(is_listening=True)
    return {ports[inode] for inode in _descriptors() if inode in ports}


def cut_connections(ports: Collection[int], timeout_s: float) -> bool:
    """Shuts down the connections that were accepted on `ports`, and waits for their owner.

    True once the owner has closed every one that was there at the call: then none of its threads
    reads from them any more, what was in the kernel's buffers included.
    """
    local = _ports_by_inode(is_listening=False)
    targets = {inode for inode, port in local.items() if port in ports}
    for inode, descriptor in _descriptors().items():
        if inode in targets:
            with contextlib.suppress(OSError):
                _shut_down(descriptor, inode)
    deadline_s = time.monotonic() + timeout_s
    while targets & _descriptors().keys():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True


def _shut_down(descriptor: int, inode: int) -> None:
    """On a duplicate, and only if it is that socket still: its owner may close it at any time."""
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        if os.fstat(duplicate.fileno()).st_ino == inode:
            duplicate.shutdown(socket.SHUT_RDWR)


def _ports_by_inode(*, is_listening: bool) -> dict[int, int]:
    """Local port of each TCP socket of this network namespace."""
    ports = {}
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if (fields[3] == _LISTEN) is is_listening:
                    ports[int(fields[9])] = int(fields[1].rpartition(":")[2], 16)
    ports.pop(0, None)  # sockets that no process has any more
    return ports


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
