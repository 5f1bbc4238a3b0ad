"""The keeper of a node: a small process that holds the node's memory while the node is restarted.

    python -I -S keeper.py LISTENER ANCHOR PATH IDLE_S

Started by the node's actor (start_keeper), it lives in a session of its own and is no child of the
actor, so that neither the actor's death nor its killer reaches it. It never maps the memory: it
holds a descriptor. It ends when it is told to, when the process behind ANCHOR has ended (Ray's
daemon on this machine), after IDLE_S seconds without an owner, and on SIGTERM; with it, and with
the last process that has the memory mapped, the memory is gone.

Standard library only and no relative import: the process starts in some 20 ms.

One owner at a time. An owner is gone when its process has ended, which its pidfd tells: by then the
kernel has stopped all its threads and closed all its files, so that nothing of it, neither its
threads nor a device or network card that it had opened, writes into the memory any more. *Guests*
are other processes that map it, such as a prefill node on the same machine. Who comes as the next
owner is told which guests of the one before still live, because those could still write.

Messages are JSON, one a packet, each answered by one; descriptors travel beside them:

| from client         | answer                                                                    |
|---------------------|---------------------------------------------------------------------------|
| {"do": "own"}       | {"ok": true, "has_memory": ...}, with the descriptor if there is one      |
| {"do": "hold"} + fd | {"ok": true}: from now on this memory is held (the owner only)            |
| {"do": "borrow"}    | {"ok": true} with the descriptor; the sender is a guest from now on       |
| {"do": "guests"}    | {"ok": true, "earlier": n}: guests that came before the owner and live    |
| {"do": "end"}       | {"ok": true}; the keeper ends (the owner only)                            |
| anything else       | {"ok": false, "why": ...}                                                 |
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from typing import Any

MAX_PACKET_BYTES = 4096
MAX_CLIENTS = 64
_CREDENTIALS = struct.Struct("3i")


class _Client:
    """One connection and the process behind it."""

    def __init__(self, connection: socket.socket, process: int) -> None:
        self.connection = connection
        self.process = process
        """Its pidfd."""
        self.is_guest = False
        self.is_early = False
        """A guest that came before the owner of now."""


class Keeper:
    """See the module. One thread; `run` returns when the keeper is to end.

    Args:
        listener: a listening SOCK_SEQPACKET unix socket.
        anchor: pidfd; the keeper ends with that process.
        idle_s: bound of the time without an owner.
    """

    def __init__(self, listener: socket.socket, anchor: int, idle_s: float) -> None:
        self._listener = listener
        self._anchor = anchor
        self._idle_s = idle_s
        self._memory = -1
        self._clients: dict[int, _Client] = {}
        """By descriptor of the connection."""
        self._owner: _Client | None = None
        self._ownerless_since_s = time.monotonic()
        self._is_ending = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(anchor, selectors.EVENT_READ, self._end)

    def run(self) -> None:
        while not self._is_ending:
            wait_s = self._ownerless_since_s + self._idle_s - time.monotonic()
            if self._owner is None and wait_s <= 0:
                return
            for key, _ in self._selector.select(wait_s if self._owner is None else None):
                key.data()

    def _end(self) -> None:
        self._is_ending = True

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            size = _CREDENTIALS.size
            option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            pid, user, _ = _CREDENTIALS.unpack(option)
            # Nobody of another user, and nobody whom this keeper could not see end: pid 0 is a
            # process of another namespace.
            if user == os.getuid() and pid > 0 and len(self._clients) < MAX_CLIENTS:
                self._admit(_Client(connection, os.pidfd_open(pid)))
                return
        connection.close()

    def _admit(self, client: _Client) -> None:
        number = client.connection.fileno()
        self._clients[number] = client
        self._selector.register(number, selectors.EVENT_READ, lambda: self._read(number))
        self._selector.register(client.process, selectors.EVENT_READ, lambda: self._drop(number))

    def _read(self, number: int) -> None:
        client = self._clients.get(number)
        if client is None:
            return
        try:
            packet, descriptors, _, _ = socket.recv_fds(client.connection, MAX_PACKET_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            packet, descriptors = b"", []
        if not packet:
            self._closed(client, number)
            return
        answer, sent = self._answer(client, packet, descriptors)
        for descriptor in descriptors:
            if descriptor != self._memory:
                os.close(descriptor)
        with contextlib.suppress(OSError):
            socket.send_fds(client.connection, [json.dumps(answer).encode()], sent)

    def _closed(self, client: _Client, number: int) -> None:
        """A guest has given the memory back; an owner counts until its process has ended."""
        if client is self._owner:
            self._selector.unregister(number)
        else:
            self._drop(number)

    def _drop(self, number: int) -> None:
        """The process behind a connection has ended, or nobody needs to know when it does."""
        client = self._clients.pop(number, None)
        if client is None:
            return
        with contextlib.suppress(KeyError):
            self._selector.unregister(number)
        self._selector.unregister(client.process)
        client.connection.close()
        os.close(client.process)
        if client is self._owner:
            self._owner = None
            self._ownerless_since_s = time.monotonic()

    def _answer(
        self, client: _Client, packet: bytes, descriptors: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        try:
            message = json.loads(packet)
            what = message.get("do") if isinstance(message, dict) else None
        except ValueError:
            what = None
        held = [] if self._memory < 0 else [self._memory]
        if what == "own":
            if self._owner is not None and self._owner is not client:
                return {"ok": False, "why": "the memory has an owner that lives"}, []
            if self._owner is None:
                self._own(client)
            return {"ok": True, "has_memory": bool(held)}, held
        if what == "borrow":
            if not held:
                return {"ok": False, "why": "there is no memory"}, []
            client.is_guest = True
            return {"ok": True}, held
        if client is self._owner:
            return self._answer_owner(what, descriptors), []
        return {"ok": False, "why": f"{what!r} is not for you"}, []

    def _answer_owner(self, what: object, descriptors: list[int]) -> dict[str, Any]:
        if what == "hold" and len(descriptors) == 1:
            if self._memory >= 0:
                os.close(self._memory)
            self._memory = descriptors[0]
        elif what == "guests":
            return {"ok": True, "earlier": sum(each.is_early for each in self._clients.values())}
        elif what == "end":
            self._is_ending = True
        else:
            return {"ok": False, "why": f"{what!r} makes no sense"}
        return {"ok": True}

    def _own(self, client: _Client) -> None:
        self._owner = client
        for each in self._clients.values():
            each.is_early = each.is_guest


def main(arguments: list[str]) -> None:
    """Runs in the background: the process that was started returns at once."""
    listener, anchor, path, idle_s = arguments
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        Keeper(socket.socket(fileno=int(listener)), int(anchor), float(idle_s)).run()
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


if __name__ == "__main__":
    main(sys.argv[1:])
