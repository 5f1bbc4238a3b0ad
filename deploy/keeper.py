"""The keeper of a node: a small process that holds the node's memory while the node is restarted.

    python -I -S keeper.py LISTENER ANCHOR PATH IDLE_S

Started by the node (deploy/keeping.py), it lives in a session of its own and is no child of the
actor, so that neither the actor's death nor its killer reaches it. It never maps the memory: it
holds a descriptor. It ends when it is told to, when the process behind ANCHOR has ended (Ray's
daemon on this machine), after IDLE_S seconds without an owner, and on SIGTERM; with it, and with
the last process that has the memory mapped, the memory is gone.

Standard library only and no relative import: the process starts in some 20 ms.

One owner at a time. An owner is gone when its process has ended, which its pidfd tells: by then the
kernel has stopped all its threads and closed all its files, so that nothing of it, neither its
threads nor a device or network card that it had opened, writes into the memory any more. *Guests*
are other processes that map it, such as a prefill node on the same machine. A guest counts until it
says that it has given the memory back or its process has ended; a connection that breaks says neither.
Who comes as the next owner is told how many guests of the one before count, because they could write.

The memory's own header has the list of its guests (its *ledger*, LEDGER_AT, hostpool/segment.py): an
entry is there before its guest gets the descriptor. So a keeper that takes the place of one that was
killed, and is handed the same memory, knows all who could write into it.

Messages are JSON, one a packet, each answered by one; descriptors travel beside them:

| from client         | answer                                                                    |
|---------------------|---------------------------------------------------------------------------|
| {"do": "own"}       | {"ok": true, "has_memory": ...}, with the descriptor if there is one      |
| {"do": "hold"} + fd | {"ok": true}: this memory is held, its guests are known (the owner only)  |
| {"do": "borrow", "ticket": t} | {"ok": true} with the descriptor; the sender is guest t         |
| {"do": "return", "ticket": t} | {"ok": true}; guest t, the sender's, is one no more             |
| {"do": "guests"}    | {"ok": true, "earlier": n}: guests that came before the owner and count   |
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
LEDGER_AT = 60 * 1024
"""Byte of the memory; hostpool/segment.py leaves the place free."""
MAX_GUESTS = 64
_ENTRY = struct.Struct("<4Q")
"""ticket (0: no entry), pid, start of that process, whether it came before the owner of now."""
_CREDENTIALS = struct.Struct("3i")


class _Client:
    """One connection and the process behind it."""

    def __init__(self, connection: socket.socket, pid: int, process: int) -> None:
        self.connection = connection
        self.pid = pid
        self.process = process
        """Its pidfd."""


class _Guest:
    """A process that may write into the memory, and where the ledger has it."""

    def __init__(self, place: int, ticket: int, pid: int, start: int, is_early: int) -> None:
        self.place = place
        self.ticket = ticket
        self.pid = pid
        self.start = start
        self.is_early = bool(is_early)
        """It came before the owner of now."""
        self.process = -1
        """Its pidfd."""

    @property
    def entry(self) -> bytes:
        return _ENTRY.pack(self.ticket, self.pid, self.start, self.is_early)


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
        self._guests: dict[int, _Guest] = {}
        """By ticket; all that the ledger has."""
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
                self._admit(_Client(connection, pid, os.pidfd_open(pid)))
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
        """An owner counts until its process has ended."""
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
        if what in ("borrow", "return"):
            ticket = message.get("ticket")
            if type(ticket) is not int or not 0 < ticket < 2**63:
                return {"ok": False, "why": "no ticket"}, []
            if what == "borrow":
                return self._lend(client, ticket)
            if self._memory < 0:
                return {"ok": False, "why": "there is no memory yet"}, []
            guest = self._guests.get(ticket)
            if guest is not None and guest.pid == client.pid:
                self._forget(guest)
            return {"ok": True}, []
        if client is self._owner:
            return self._answer_owner(what, descriptors), []
        return {"ok": False, "why": f"{what!r} is not for you"}, []

    def _answer_owner(self, what: object, descriptors: list[int]) -> dict[str, Any]:
        if what == "hold" and len(descriptors) == 1:
            return self._hold(descriptors[0])
        if what == "guests":
            return {"ok": True, "earlier": sum(each.is_early for each in self._guests.values())}
        if what == "end":
            self._is_ending = True
            return {"ok": True}
        return {"ok": False, "why": f"{what!r} makes no sense"}

    def _own(self, client: _Client) -> None:
        self._owner = client
        for guest in self._guests.values():
            guest.is_early = True
            os.pwrite(self._memory, guest.entry, _offset(guest.place))

    def _hold(self, memory: int) -> dict[str, Any]:
        """Also finds the guests that the memory has already; on any doubt it is not held."""
        found: list[_Guest] = []
        try:
            ledger = os.pread(memory, MAX_GUESTS * _ENTRY.size, LEDGER_AT)
            if len(ledger) < MAX_GUESTS * _ENTRY.size:
                return {"ok": False, "why": "the memory has no ledger"}
            for place, entry in enumerate(_ENTRY.iter_unpack(ledger)):
                guest = _Guest(place, *entry)
                if guest.ticket and _find(guest):
                    found.append(guest)
                elif guest.ticket:
                    os.pwrite(memory, bytes(_ENTRY.size), _offset(place))
        except (OSError, OverflowError) as error:
            for guest in found:
                os.close(guest.process)
            return {"ok": False, "why": f"its guests cannot be found: {error}"}
        for guest in list(self._guests.values()):
            self._unwatch(guest)
        if self._memory >= 0:
            os.close(self._memory)
        self._memory = memory
        for guest in found:
            self._watch(guest)
        return {"ok": True}

    def _lend(self, client: _Client, ticket: int) -> tuple[dict[str, Any], list[int]]:
        if self._memory < 0:
            return {"ok": False, "why": "there is no memory"}, []
        places = set(range(MAX_GUESTS)) - {each.place for each in self._guests.values()}
        if not places or ticket in self._guests:
            return {"ok": False, "why": "too many guests, or this one is here already"}, []
        try:
            guest = _Guest(min(places), ticket, client.pid, _start_of(client.pid), is_early=False)
            guest.process = os.dup(client.process)
        except OSError as error:
            return {"ok": False, "why": f"the guest is not known: {error}"}, []
        self._watch(guest)
        os.pwrite(self._memory, guest.entry, _offset(guest.place))
        return {"ok": True}, [self._memory]

    def _watch(self, guest: _Guest) -> None:
        self._guests[guest.ticket] = guest
        self._selector.register(guest.process, selectors.EVENT_READ, lambda: self._forget(guest))

    def _unwatch(self, guest: _Guest) -> None:
        del self._guests[guest.ticket]
        self._selector.unregister(guest.process)
        os.close(guest.process)

    def _forget(self, guest: _Guest) -> None:
        """The guest's process has ended, or it has given the memory back."""
        if self._guests.get(guest.ticket) is guest:
            self._unwatch(guest)
            os.pwrite(self._memory, bytes(_ENTRY.size), _offset(guest.place))


def _offset(place: int) -> int:
    return LEDGER_AT + place * _ENTRY.size


def _start_of(pid: int) -> int:
    """When a process began: with its pid a name that is never given twice. FileNotFoundError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def _find(guest: _Guest) -> bool:
    """Opens the pidfd of that very process; False if it has ended. OSError if that is not known."""
    try:
        process = os.pidfd_open(guest.pid)
    except ProcessLookupError:
        return False
    try:
        is_same = _start_of(guest.pid) == guest.start
    except (FileNotFoundError, ProcessLookupError):
        is_same = False
    except OSError:
        os.close(process)
        raise
    if is_same:
        guest.process = process
    else:
        os.close(process)
    return is_same


def main(arguments: list[str]) -> None:
    """Runs in the background: the process that was started returns at once."""
    listener, anchor, path, idle_s = arguments
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    keeper = Keeper(socket.socket(fileno=int(listener)), int(anchor), float(idle_s))
    try:
        keeper.run()
    finally:  # while its sockets are open: who sees them close may start the next one there
        with contextlib.suppress(OSError):
            os.unlink(path)


if __name__ == "__main__":
    main(sys.argv[1:])
