"""A process that delays every packet of one port of the switch: netem, where the kernel has none.

    python -m multinode.delay port3 tap3 0.020

Run in the switch's namespace by faults.Faults.delay. The port is taken off the bridge beforehand; a
TAP device takes its place, and this process carries frames between the two, each `delay_s` late and
in order. Frames keep their virtio header, so that segmentation and checksums stay as offloaded as
they were. Prints "ready", and ends when it is killed (the TAP device goes with it).
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable

_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23
_SO_RCVBUFFORCE = 33
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04
_MAX_FRAME = 70_000
_FRAMES_A_TURN = 64


class Line:
    """One direction: frames in, frames out `delay_s` later."""

    def __init__(self, source: int, send: Callable[[bytes], object], delay_s: float) -> None:
        self.source = source
        self._send = send
        self._delay_s = delay_s
        self._frames: deque[tuple[float, bytes]] = deque()

    @property
    def due_s(self) -> float:
        return self._frames[0][0] if self._frames else float("inf")

    def take(self) -> None:
        for _ in range(_FRAMES_A_TURN):
            try:
                frame = os.read(self.source, _MAX_FRAME)
            except BlockingIOError:
                return
            self._frames.append((time.monotonic() + self._delay_s, frame))

    def give(self) -> None:
        while self._frames and self.due_s <= time.monotonic():
            try:
                self._send(self._frames.popleft()[1])
            except OSError:
                continue  # a full queue or a link that is down: the frame is lost


def open_port(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 * 1024 * 1024)
    port.bind((name, 0))
    port.setblocking(False)
    return port


def open_tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(tap, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
    return tap


def main() -> None:
    port_name, tap_name, delay_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    port, tap = open_port(port_name), open_tap(tap_name)
    lines = [
        Line(port.fileno(), lambda frame: os.write(tap, frame), delay_s),
        Line(tap, port.send, delay_s),
    ]
    print("ready", flush=True)
    while True:
        wait_s = min(line.due_s for line in lines) - time.monotonic()
        ready, _, _ = select.select([port, tap], [], [], max(0.0, min(wait_s, 1.0)))
        for line in lines:
            if line.source in [each if isinstance(each, int) else each.fileno() for each in ready]:
                line.take()
            line.give()


if __name__ == "__main__":
    main()
