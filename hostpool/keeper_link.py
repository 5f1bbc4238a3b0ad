"""A node's end of its keeper: the process that holds the node's memory when the node is killed.

    link = KeeperLink(path)                   a decode node, at its start
    segment = link.own(timeout_s)             what the process before left, or None
    link.hold(SharedSegment.create(...))      if there was nothing to go on from

    link = KeeperLink(path)                   another process of the same user and machine
    segment = link.borrow()

Who has borrowed is a *guest*, which may write into the memory until it calls `give_back` or has ended:
call that only when nothing of the process can write any more, and borrow anew for each owner that
follows. The owner asks `num_earlier_guests` before it gives away pages that those could still write.
A keeper that takes the place of one that was killed knows its guests, and they give back to it.
The keeper's own side, and what makes an owner count as gone, is in deploy/keeper.py. Calls block for
milliseconds, `own` and `give_back` as long as they say; any thread, one call at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

from ..common.errors import SegmentError
from .segment import SharedSegment

_TIMEOUT_S = 2.0
_RETRY_S = 0.02
_GIVE_BACK_S = 3.0
_GIVE_BACK_RETRY_S = 0.25
_MAX_PACKET_BYTES = 4096
_CREDENTIALS = struct.Struct("3i")


class KeeperLink:
    """One connection to the keeper that listens at `path`; SegmentError if there is none.

    Attributes:
        is_owner: the keeper has accepted this process as the owner.
        path: where it listens.
    """

    def __init__(self, path: Path) -> None:
        self.is_owner = False
        self.path = path
        self._ticket = 0
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_TIMEOUT_S)
        try:
            self._socket.connect(str(path))
            option = self._socket.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
            )
        except OSError as error:
            self._socket.close()
            raise SegmentError(f"no keeper answers at {path}: {error}") from error
        if _CREDENTIALS.unpack(option)[1] != os.getuid():
            self._socket.close()
            raise SegmentError(f"the keeper at {path} belongs to another user")

    def own(self, timeout_s: float) -> SharedSegment | None:
        """Becomes the owner; returns the memory that is held, None if there is none.

        Waits up to `timeout_s` for the owner before to have ended. SegmentError if it lives on, if
        the keeper is gone, or if the memory is no whole segment (this process is the owner then).
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            answer, descriptor = self._ask({"do": "own"})
            if answer["ok"]:
                self.is_owner = True
                return None if descriptor is None else SharedSegment.attach(descriptor)
            if time.monotonic() >= deadline_s:
                raise SegmentError(f"the keeper refuses: {answer.get('why')}")
            time.sleep(_RETRY_S)

    def hold(self, segment: SharedSegment) -> None:
        """From now on the keeper holds this segment, and no other. The owner only."""
        self._insist({"do": "hold"}, segment.descriptor)

    def borrow(self) -> SharedSegment:
        """Maps the owner's memory as a guest; once. SegmentError if there is none."""
        self._ticket = secrets.randbits(62) + 1
        descriptor = self._insist({"do": "borrow", "ticket": self._ticket})
        if descriptor is None:
            raise SegmentError("the keeper lends no memory")
        return SharedSegment.attach(descriptor)

    def give_back(self) -> bool:
        """Nothing of this process writes any more into what was borrowed; nothing if it was not.

        Where the keeper is gone, waits up to _GIVE_BACK_S for another in its place; False if there
        is none, or it is the end of the memory: if it is not, this process counts until it ends.
        """
        if not self._ticket:
            return True
        deadline_s = time.monotonic() + _GIVE_BACK_S
        with contextlib.suppress(SegmentError):
            if self._return_to(self):
                return True
        while time.monotonic() < deadline_s:
            time.sleep(_GIVE_BACK_RETRY_S)
            with (
                contextlib.suppress(SegmentError),
                contextlib.closing(KeeperLink(self.path)) as now,
            ):
                if self._return_to(now):
                    return True
        return False

    def _return_to(self, link: KeeperLink) -> bool:
        answer, received = link._ask({"do": "return", "ticket": self._ticket})
        if received is not None:  # the late answer to a `borrow` that was given up
            os.close(received)
        return bool(answer["ok"])

    def num_earlier_guests(self) -> int:
        """Guests that came before this owner and may still write. SegmentError; the owner only."""
        answer, received = self._ask({"do": "guests"})
        if received is not None or type(answer.get("earlier")) is not int:
            raise SegmentError(f"the keeper does not know: {answer.get('why')}")
        return int(answer["earlier"])

    @property
    def is_alive(self) -> bool:
        """Whether the keeper has not ended. Does not block."""
        # A socket with a time-out waits for it whatever the flags say, so first: is there anything?
        readable, _, _ = select.select([self._socket], [], [], 0)
        if not readable:
            return True
        try:
            return self._socket.recv(1, socket.MSG_PEEK) != b""
        except OSError:
            return False

    def end(self) -> None:
        """The keeper ends, and what it holds with it; nothing if it is gone. The owner only."""
        with contextlib.suppress(SegmentError):
            self._ask({"do": "end"})

    def close(self) -> None:
        self._socket.close()

    def _insist(self, message: dict[str, Any], descriptor: int | None = None) -> int | None:
        answer, received = self._ask(message, descriptor)
        if not answer["ok"]:
            raise SegmentError(f"the keeper refuses: {answer.get('why')}")
        return received

    def _ask(
        self, message: dict[str, Any], descriptor: int | None = None
    ) -> tuple[dict[str, Any], int | None]:
        sent = [] if descriptor is None else [descriptor]
        try:
            with self._lock:
                socket.send_fds(self._socket, [json.dumps(message).encode()], sent)
                packet, received, _, _ = socket.recv_fds(self._socket, _MAX_PACKET_BYTES, 1)
            for each in received:
                os.set_inheritable(each, False)
            answer = json.loads(packet)
        except (OSError, ValueError) as error:
            raise SegmentError(f"the keeper does not answer: {error}") from error
        if not isinstance(answer, dict) or "ok" not in answer:
            raise SegmentError(f"the keeper answers {packet!r:.100}")
        return answer, received[0] if received else None
