"""Finds or starts the keeper of a node on this machine.

Called by the node's actor when it starts, after it has claimed the node's record (incarnations.py),
and by its node when the keeper has ended: whoever holds that lock is the only process of the node
here. The keeper's socket lies in the same private directory, under a name that is the same for each
process of the node.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ..common.errors import SegmentError
from ..hostpool.keeper_link import KeeperLink
from . import keeper
from .incarnations import node_directory

_START_TIMEOUT_S = 10.0
_BACKLOG = 16


def keeper_path(run_id: str, node_id: str, directory: Path | None = None) -> Path:
    """Where the keeper of that node listens, if it has one on this machine.

    A unix socket's path has at most 107 bytes, a node's name may be longer: so a hash of it.
    """
    name = hashlib.sha256(f"{run_id}-{node_id}".encode()).hexdigest()[:32]
    return (directory or node_directory()) / f"{name}.keeper"


def find_or_start(path: Path, *, idle_s: float, anchor_pid: int | None = None) -> KeeperLink:
    """Connects to the keeper at `path`; starts one if nobody answers.

    Args:
        idle_s: how long the keeper lives without an owner.
        anchor_pid: it ends with that process; None: this process's parent, Ray's daemon.

    SegmentError if it cannot be started.
    """
    with contextlib.suppress(SegmentError):
        return KeeperLink(path)
    _start(path, idle_s, os.getppid() if anchor_pid is None else anchor_pid)
    return KeeperLink(path)


def keeper_starter(path: Path, *, idle_s: float) -> Callable[[], KeeperLink]:
    """find_or_start for as long as this process lives: for a keeper that has ended.

    What it returns raises SegmentError as that does, and if Ray's daemon has ended: nobody would end
    the new keeper then.
    """
    daemon = os.getppid()

    def start() -> KeeperLink:
        if os.getppid() != daemon:
            raise SegmentError("the process that started this one has ended")
        return find_or_start(path, idle_s=idle_s, anchor_pid=daemon)

    return start


def _start(path: Path, idle_s: float, anchor_pid: int) -> None:
    """The socket listens before the keeper runs: who connects from now on is heard."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    anchor = -1
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(_BACKLOG)
        anchor = os.pidfd_open(anchor_pid)
        # Isolated: what the node's environment makes Python load would cost half a second.
        arguments = (str(listener.fileno()), str(anchor), str(path), str(idle_s))
        subprocess.run(
            (sys.executable, "-I", "-S", str(keeper.__file__), *arguments),
            pass_fds=(listener.fileno(), anchor),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
            timeout=_START_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        path.unlink(missing_ok=True)
        raise SegmentError(f"the keeper does not start: {error}") from error
    finally:
        listener.close()
        if anchor >= 0:
            os.close(anchor)
