"""Several transports used as one, so that one peer's bytes keep several of their threads busy.

A transfer engine sends, and receives, on one thread, and that thread's processor is what limits it:
on a host with 16 cores four engines on each end moved 11.8 GB/s where one moved 3.2
(benchmarks/results/2026-11-20-handoff.md). Every stripe has all memory registered. A *lane* is one stripe
here and one of the peer's; batches take the lanes in turn. The two ends need not have equally many.

What holds for one transport holds for all: a batch is on one lane and its ticket is that lane's, and
`renew` has ended what can land only when it has for each stripe.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..common.errors import InvariantError
from .transport import Channel, Ticket, TicketStatus, Transport, Write

_SEPARATOR = ","


@dataclass(frozen=True, slots=True)
class _StripedChannel(Channel):
    turns: Iterator[tuple[Transport, Channel]] = field(default_factory=lambda: iter(()))
    """The lanes, for ever."""


class _StripedTicket(Ticket):
    __slots__ = ("stripe", "ticket")

    def __init__(self, stripe: Transport, ticket: Ticket) -> None:
        self.stripe = stripe
        self.ticket = ticket


class _Tickets(Ticket):
    """Of the stripes that still free what they held for a peer."""

    __slots__ = ("pending",)

    def __init__(self, pending: list[Ticket]) -> None:
        self.pending = pending


class StripedTransport(Transport):
    """See the module. `data_address` names every stripe's, in order."""

    def __init__(self, stripes: Sequence[Transport]) -> None:
        if not stripes:
            raise InvariantError("a striped transport without stripes")
        self._stripes = tuple(stripes)

    @property
    def data_address(self) -> str:
        return _SEPARATOR.join(stripe.data_address for stripe in self._stripes)

    def register(self, address: int, num_bytes: int) -> None:
        for stripe in self._stripes:
            stripe.register(address, num_bytes)

    def open(self, peer_data_address: str) -> Channel:
        """Every lane must answer: what is submitted takes them all."""
        lanes = [
            (stripe, stripe.open(address)) for stripe, address in self._lanes(peer_data_address)
        ]
        return _StripedChannel(
            peer_data_address, num_lanes=len(lanes), turns=itertools.cycle(lanes)
        )

    def submit(self, channel: Channel, writes: Sequence[Write]) -> Ticket:
        assert isinstance(channel, _StripedChannel)
        stripe, lane = next(channel.turns)
        return _StripedTicket(stripe, stripe.submit(lane, writes))

    def poll(self, ticket: Ticket) -> TicketStatus:
        if isinstance(ticket, _Tickets):
            return self._poll_all(ticket)
        assert isinstance(ticket, _StripedTicket)
        return ticket.stripe.poll(ticket.ticket)

    def abandon(self, peer_data_address: str) -> Ticket | None:
        tickets: list[Ticket] = []
        for stripe, address in self._lanes(peer_data_address):
            ticket = stripe.abandon(address)
            if ticket is not None:
                tickets.append(_StripedTicket(stripe, ticket))
        return _Tickets(tickets) if tickets else None

    def renew(self) -> None:
        for stripe in self._stripes:
            stripe.renew()

    def _lanes(self, peer_data_address: str) -> list[tuple[Transport, str]]:
        addresses = peer_data_address.split(_SEPARATOR)
        return [
            (self._stripes[lane % len(self._stripes)], addresses[lane % len(addresses)])
            for lane in range(max(len(self._stripes), len(addresses)))
        ]

    def _poll_all(self, ticket: _Tickets) -> TicketStatus:
        ticket.pending = [
            each for each in ticket.pending if self.poll(each) is TicketStatus.PENDING
        ]
        return TicketStatus.PENDING if ticket.pending else TicketStatus.DONE

    def close(self) -> None:
        for stripe in self._stripes:
            stripe.close()
