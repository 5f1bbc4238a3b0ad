"""Peers whose memory this process can map: no bytes go over a wire then.

A *path* leads to the memory of one incarnation of a decode node on the same machine. It is mapped on
a thread of its own when the peer comes up, which takes seconds where the memory is pinned; until then,
and wherever it fails, transfers go over the wire. A path says by being open that this process may
write: it is closed when its peer is gone and no transfer uses it, and never once a copy into it did
not end in time. Everything else is called on the I/O thread.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Protocol

from ..common import wire
from ..common.errors import TidepoolError
from .session import Peer

_LOGGER = logging.getLogger(__name__)

PREFIX = "memory:"
"""Of the data addresses under which the mover finds the copying transport."""


class Borrowed(Protocol):
    """A peer's memory, mapped into this process, and readied for the device if there is one."""

    @property
    def parts(self) -> Mapping[str, tuple[int, int]]:
        """(address, bytes) by region name."""
        ...

    def close(self) -> None:
        """Nothing of this process writes any more: unmaps, then gives the memory back."""
        ...


Borrow = Callable[[wire.SharedMemory], Borrowed]
"""Maps what a Hello offers. Blocks; raises a TidepoolError if it cannot."""


class SharedPath:
    """Made and closed by SharedPaths; see the module."""

    def __init__(self, peer: Peer, memory: Borrowed, regions: Mapping[str, wire.Region]) -> None:
        self.peer = peer
        self.memory = memory
        self.regions = dict(regions)
        """The peer's regions, at the addresses they have in this process."""
        self.is_open = True
        self.is_doubtful = False
        """A copy did not end in time: it may go on, so the path stays open."""

    @property
    def data_address(self) -> str:
        return f"{PREFIX}{self.peer.node_id}"


class SharedPaths:
    """See the module.

    Args:
        machine: of this process; `machine_id()`.
        borrow: maps a peer's memory, on a thread of its own.
        post: runs a call on the I/O thread.
    """

    def __init__(
        self, machine: str, borrow: Borrow, post: Callable[[Callable[[], None]], None]
    ) -> None:
        self._machine = machine
        self._borrow = borrow
        self._post = post
        self._opening: set[tuple[str, int]] = set()
        self._open: dict[tuple[str, int], SharedPath] = {}
        self.num_opened = 0

    def meet(self, peer: Peer) -> None:
        """A peer is up: begins to map its memory if that can be."""
        shared, key = peer.hello.shared, (peer.node_id, peer.epoch)
        if shared is None or shared.machine != self._machine:
            return
        if {each.name for each in peer.hello.regions} != set(shared.regions):
            return
        if key not in self._open and key not in self._opening:
            self._opening.add(key)
            threading.Thread(
                target=self._map, args=(peer, shared), name=f"map-{peer.node_id}", daemon=True
            ).start()

    def find(self, node_id: str, epoch: int) -> SharedPath | None:
        """The path to that incarnation, if it is open."""
        return self._open.get((node_id, epoch))

    def close_unused(self, live: Container[tuple[str, int]], used: Container[SharedPath]) -> None:
        """Closes paths to incarnations that are not `live` and that no transfer uses."""
        for key, path in list(self._open.items()):
            if key not in live and path not in used and not path.is_doubtful:
                del self._open[key]
                path.is_open = False
                threading.Thread(
                    target=path.memory.close, name=f"unmap-{path.peer.node_id}", daemon=True
                ).start()

    def _map(self, peer: Peer, shared: wire.SharedMemory) -> None:
        """Runs on its own thread."""
        path: SharedPath | None = None
        try:
            memory = self._borrow(shared)
            try:
                path = SharedPath(peer, memory, _place(peer, memory.parts))
            except TidepoolError:
                memory.close()
                raise
        except TidepoolError as error:
            _LOGGER.warning("cannot map the memory of %s: %s", peer.node_id, error)
        except Exception:
            _LOGGER.exception("cannot map the memory of %s", peer.node_id)
        self._post(lambda: self._mapped(peer, path))

    def _mapped(self, peer: Peer, path: SharedPath | None) -> None:
        key = (peer.node_id, peer.epoch)
        self._opening.discard(key)
        if path is not None:
            self._open[key] = path
            self.num_opened += 1
            _LOGGER.info("the memory of %s is mapped", peer.node_id)


def machine_id() -> str:
    """Equal for processes that run under one kernel, see each other's ids and the same files."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "mnt")]
    return " ".join([boot, *spaces])


def _place(peer: Peer, parts: Mapping[str, tuple[int, int]]) -> dict[str, wire.Region]:
    """The peer's regions where this process has mapped them; TidepoolError if they do not fit."""
    placed: dict[str, wire.Region] = {}
    for region in peer.hello.regions:
        address, num_bytes = parts[region.name]
        needed = region.num_layers * region.num_pages * region.page_bytes
        if needed > num_bytes:
            raise TidepoolError(f"{region.name!r} needs {needed} bytes, {num_bytes} are mapped")
        placed[region.name] = wire.Region(
            region.name, address, region.num_layers, region.num_pages, region.page_bytes
        )
    return placed
