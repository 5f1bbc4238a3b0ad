"""The one thread of a node that moves bytes and has them hashed.

Exporter and importer hand it jobs from the I/O thread; each job ends exactly once, by a call that
runs on the I/O thread (through `post`). Jobs of one owner (a transfer) are submitted in order, the
next as soon as the one before is wholly submitted; owners take turns, a slice of work each, so that
none waits for another's whole prompt. What is sent is hashed while it is under way, on the hasher's
threads. Never spins: while something is in flight it sleeps `POLL_S` between looks, else it waits
for a job, or for the end of a hash.

A write that has not ended after `write_timeout_s` counts as FAILED_UNKNOWN; its ticket is kept and
polled until it does end. Limits on writes in flight hold for each peer, so that a dead one delays
nobody else; meeting a new peer, which can block, happens on a thread of its own.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from itertools import islice

from ..common.clock import Clock, MonotonicClock
from ..common.config import TransferSection
from ..common.errors import TransferError
from .checksum import Hasher
from .jobs import VerifyJob, WriteJob, WriteResult
from .tasks import Flight, Verifying, Writing
from .transport import Channel, Ticket, TicketStatus, Transport, Writes

_LOGGER = logging.getLogger(__name__)

POLL_S = 0.0003
_SLOW_POLL_S = 0.05
"""While only a peer that does not answer is waited for."""
_MAX_PENDING_LOOKS = 8
"""Batches of a job end in about the order they began: behind so many that have not, none is looked at."""
_VERIFIED_AHEAD = 2
"""Jobs of an owner that are hashed at a time."""
_CALLS_A_TURN = 4
"""Taken from other threads between two turns: the first of many jobs begins before the rest is staged."""
_MAX_JOBS = 65536
_NO_LIMIT = 1 << 30


class Mover:
    """See the module.

    Args:
        post: runs a call on the I/O thread; ControlLoop.post.
        on_fatal: called on the mover's thread if it dies; the node stops.
    """

    def __init__(
        self,
        transport: Transport,
        config: TransferSection,
        post: Callable[[Callable[[], None]], None],
        *,
        clock: Clock | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._transport = transport
        self._config = config
        self._post = post
        self._clock = clock or MonotonicClock()
        self._on_fatal = on_fatal
        self._wakeup = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._is_stopping = False
        self._is_woken = False
        """Something was hashed since the last look."""
        self._hasher = Hasher()
        self._num_jobs = 0
        self._queues: dict[Hashable, deque[Writing | Verifying]] = {}
        self._flying: list[Writing] = []
        """Wholly submitted, not ended."""
        self._abandoned: list[Ticket] = []
        self._channels: dict[str, Channel | TransferError | float] = {}
        """While it is being opened: since when."""
        self._num_in_flight: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="mover", daemon=True)
        self.bytes_written = 0
        self.num_mismatches = 0

    # ---- any thread ----

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread; jobs that have not ended never do. TransferError if it hangs."""
        with self._wakeup:
            self._is_stopping = True
            self._wakeup.notify()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TransferError(f"the mover is still busy after {timeout_s} s")
        self._hasher.stop()

    def write(self, job: WriteJob) -> None:
        """Queues a write job; it ends FAILED_DRAINED at once if there are too many."""
        self._tell(lambda: self._enqueue(job.owner, Writing(job)))

    def verify(self, job: VerifyJob) -> None:
        """Queues a verification."""
        self._tell(lambda: self._enqueue(job.owner, Verifying(job)))

    def cancel(self, owner: Hashable) -> None:
        """Submits no more of the owner's writes; its jobs end once nothing of them is in flight."""
        self._tell(lambda: self._cancel(owner))

    def forget(self, peer_data_address: str) -> None:
        """The peer is gone: the next job for this address opens it anew."""
        self._tell(lambda: self._forget(peer_data_address))

    def abandon(self, peer_data_address: str) -> None:
        """The peer that was there is dead or has moved, for good: its connections are closed.

        What is in flight to it fails.
        """
        self._tell(lambda: self._abandon(peer_data_address))

    def _tell(self, call: Callable[[], None]) -> None:
        with self._wakeup:
            self._inbox.append(call)
            self._wakeup.notify()

    def _wake(self) -> None:
        with self._wakeup:
            self._is_woken = True
            self._wakeup.notify()

    # ---- the mover's thread ----

    def _run(self) -> None:
        try:
            while self._wait():
                for call in self._take_inbox():
                    call()
                self._land()
                self._turn()
        except Exception as error:
            _LOGGER.critical("the mover stops", exc_info=error)
            if self._on_fatal is not None:
                self._on_fatal(error)

    def _wait(self) -> bool:
        """Waits for something to do; False to stop."""
        with self._wakeup:
            is_told = self._inbox or self._is_stopping or self._is_woken
            if not is_told and not self._has_work():
                is_idle = not self._queues and not self._abandoned
                slow_s = None if is_idle else _SLOW_POLL_S
                is_fast = self._num_in_flight or self._is_staging()
                self._wakeup.wait(POLL_S if is_fast else slow_s)
            self._is_woken = False
            return not self._is_stopping

    def _has_work(self) -> bool:
        """Whether a turn would submit or end something."""
        return any(self._can_go_on(queue[0]) for queue in self._queues.values())

    def _is_staging(self) -> bool:
        heads = [queue[0] for queue in self._queues.values()]
        return any(
            isinstance(task, Writing) and task.staged is not None for task in heads + self._flying
        )

    def _can_go_on(self, task: Writing | Verifying) -> bool:
        if isinstance(task, Verifying):
            return task.hashing is None or task.hashing.is_done
        if task.is_submitted:
            return True
        address = task.job.peer_data_address
        has_room = self._room(address) > 0 and not isinstance(self._channels.get(address), float)
        return has_room and task.check_staged()

    def _room(self, address: str) -> int:
        channel = self._channels.get(address)
        num_lanes = 1
        if isinstance(channel, Channel):
            if not channel.is_limited:
                return _NO_LIMIT
            num_lanes = channel.num_lanes
        limit = num_lanes * self._config.max_writes_in_flight
        return limit - self._num_in_flight.get(address, 0)

    def _take_inbox(self) -> list[Callable[[], None]]:
        with self._wakeup:
            inbox = self._inbox[:_CALLS_A_TURN]
            del self._inbox[:_CALLS_A_TURN]
        return inbox

    def _enqueue(self, owner: Hashable, task: Writing | Verifying) -> None:
        if self._num_jobs >= _MAX_JOBS and isinstance(task, Writing):
            self._report(task, WriteResult(TicketStatus.FAILED_DRAINED, reason="too many jobs"))
            return
        self._num_jobs += 1
        if isinstance(task, Writing) and task.job.stage is not None:
            task.staged = task.job.stage()
        self._queues.setdefault(owner, deque()).append(task)

    def _cancel(self, owner: Hashable) -> None:
        for task in self._queues.get(owner, ()):
            if isinstance(task, Writing):
                task.fail(TicketStatus.FAILED_DRAINED, "cancelled")

    def _forget(self, address: str) -> None:
        if not isinstance(self._channels.get(address, 0.0), float):
            del self._channels[address]

    def _abandon(self, address: str) -> None:
        self._forget(address)
        ticket = self._transport.abandon(address)
        if ticket is not None:
            self._abandoned.append(ticket)

    def _turn(self) -> None:
        """One slice of work for each owner; who got one waits behind those who did not."""
        for owner in list(self._queues):
            queue = self._queues[owner]
            task = queue[0]
            if not self._can_go_on(task):
                continue
            del self._queues[owner]
            is_over = self._verify(queue) if isinstance(task, Verifying) else self._advance(task)
            if is_over:
                queue.popleft()
                self._num_jobs -= 1
            if queue:
                self._queues[owner] = queue

    def _verify(self, queue: deque[Writing | Verifying]) -> bool:
        """Has the next jobs hashed; True once the first has ended."""
        for task in islice(queue, _VERIFIED_AHEAD):
            if isinstance(task, Verifying) and task.hashing is None:
                task.hashing = self._hasher.start(task.job.parts, self._wake)
        head = queue[0]
        assert isinstance(head, Verifying)
        assert head.hashing is not None
        if not head.hashing.is_done:
            return False
        job = head.job
        is_good = head.hashing.values() == list(job.expected)
        self.num_mismatches += not is_good
        self._post(lambda: job.on_end(is_good))
        return True

    def _advance(self, task: Writing) -> bool:
        """Submits a batch a lane; True once everything is submitted, or it has failed."""
        if not task.is_submitted:
            self._submit(task)
        if task.is_submitted:
            self._begin_hashing(task)
            self._flying.append(task)
            self._land_one(task)
        return task.is_submitted

    def _submit(self, task: Writing) -> None:
        address = task.job.peer_data_address
        channel = self._channel(address)
        if isinstance(channel, float):
            return
        if isinstance(channel, TransferError):
            del self._channels[address]
            task.fail(TicketStatus.FAILED_DRAINED, str(channel))
            return
        for _ in range(channel.num_lanes):
            writes = self._next_batch(task, self._room(address), channel)
            if not len(writes):
                return
            ticket = self._transport.submit(channel, writes)
            deadline_s = self._clock.now() + self._config.write_timeout_s
            task.flights.append(Flight(ticket, len(writes), deadline_s))
            self._begin_hashing(task)
            task.num_submitted += len(writes)
            in_flight = self._num_in_flight.get(address, 0)
            self._num_in_flight[address] = in_flight + len(writes)
            self.bytes_written += writes.num_bytes

    def _begin_hashing(self, task: Writing) -> None:
        """Once its bytes are there."""
        if task.hashing is None and task.job.parts and task.failure is None:
            task.hashing = self._hasher.start(task.job.parts, self._wake)

    def _next_batch(self, task: Writing, room: int, channel: Channel) -> Writes:
        share = -(-self._config.max_writes_in_flight // 4)
        max_writes = min(room, share) if channel.is_limited else room
        rest = task.job.writes[task.num_submitted :]
        return rest.head(max(0, max_writes), channel.batch_bytes)

    def _channel(self, address: str) -> Channel | TransferError | float:
        if address not in self._channels:
            self._channels[address] = self._clock.now()
            opener = threading.Thread(
                target=self._open, args=(address,), name=f"mover-open-{address}", daemon=True
            )
            opener.start()
        return self._channels[address]

    def _open(self, address: str) -> None:
        """Runs on its own thread."""
        channel: Channel | TransferError
        try:
            channel = self._transport.open(address)
        except TransferError as error:
            channel = error
        except Exception as error:
            fault = error
            self._tell(lambda: _raise(fault))  # our own: it stops the mover, and so the node
            return
        self._tell(lambda: self._channels.__setitem__(address, channel))

    def _land(self) -> None:
        """Looks at everything in flight."""
        for queue in self._queues.values():
            task = queue[0]
            if isinstance(task, Writing):
                self._poll(task)
                self._check_opening(task)
        for task in list(self._flying):
            self._land_one(task)
        self._abandoned = [
            ticket
            for ticket in self._abandoned
            if self._transport.poll(ticket) is TicketStatus.PENDING
        ]

    def _check_opening(self, task: Writing) -> None:
        """A peer that cannot be reached in time fails what waits for it; nothing was sent."""
        address = task.job.peer_data_address
        since_s = self._channels.get(address)
        timeout_s = self._config.write_timeout_s
        if isinstance(since_s, float) and self._clock.now() - since_s > timeout_s:
            task.fail(TicketStatus.FAILED_DRAINED, f"{address} does not answer for {timeout_s} s")

    def _land_one(self, task: Writing) -> None:
        self._poll(task)
        if task.flights or not task.is_hashed or not task.check_staged():
            return
        self._flying.remove(task)
        if task.failure is not None:
            self._report(task, WriteResult(task.failure, reason=task.reason))
        else:
            values = [] if task.hashing is None else task.hashing.values()
            self._report(task, WriteResult(TicketStatus.DONE, tuple(values)))

    def _poll(self, task: Writing) -> None:
        now_s = self._clock.now()
        address = task.job.peer_data_address
        num_pending = 0
        for flight in list(task.flights):
            if num_pending >= _MAX_PENDING_LOOKS:
                return
            status = self._transport.poll(flight.ticket)
            if status is TicketStatus.PENDING:
                if now_s < flight.deadline_s:
                    num_pending += 1
                    continue
                self._abandoned.append(flight.ticket)
                took = f"{self._config.write_timeout_s} s"
                task.fail(TicketStatus.FAILED_UNKNOWN, f"a write to {address} took over {took}")
            elif status is not TicketStatus.DONE:
                task.fail(status, f"a write to {address} {status.value}")
            task.flights.remove(flight)
            self._num_in_flight[address] -= flight.num_writes
            if not self._num_in_flight[address]:
                del self._num_in_flight[address]

    def _report(self, task: Writing, result: WriteResult) -> None:
        self._post(lambda: task.job.on_end(result))


def _raise(error: Exception) -> None:
    raise error
