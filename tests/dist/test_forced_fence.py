"""The forced fence: of transports, and of a decode node under running and arriving requests."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.engines import UnifiedHarness, exact_config
from helpers.memory import Memory
from helpers.pd import pd_pair
from helpers.tiny_models import INDEX_TOPK, VETTED_SEEDS, prompt, session_checkpoint

from tidepool.common.clock import MonotonicClock
from tidepool.common.errors import InvariantError, TransferError
from tidepool.transfer import mooncake
from tidepool.transfer.fencing import DataFence
from tidepool.transfer.loopback import Fault, LoopbackTransport
from tidepool.transfer.mooncake import MooncakeTransport
from tidepool.transfer.own_sockets import listening_ports
from tidepool.transfer.transport import Channel, TicketStatus, Transport, Write
from tidepool.transfer.transports import make_tcp

SIZE = 1 << 20
HOT = {"decode.hot_rows": INDEX_TOPK, "kv.page_size": 4}


def wait_for(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.005)


def write(transport: Transport, channel: Channel, source: Memory, target: Memory) -> TicketStatus:
    ticket = transport.submit(channel, [Write(source.address, target.address, SIZE)])
    wait_for(lambda: transport.poll(ticket) is not TicketStatus.PENDING)
    return transport.poll(ticket)


@pytest.mark.parametrize(
    "make",
    [
        LoopbackTransport,
        lambda: MooncakeTransport("127.0.0.1"),
        lambda: make_tcp("127.0.0.1", 2),
    ],
)
def test_a_renewed_transport_takes_writes_at_its_new_address_only(
    make: Callable[[], Transport],
) -> None:
    near, far = make(), make()
    source, target = Memory(SIZE), Memory(SIZE)
    near.register(source.address, SIZE)
    far.register(target.address, SIZE)
    data = source.fill(1)
    addresses = {far.data_address}
    try:
        stale = near.open(far.data_address)
        assert write(near, stale, source, target) is TicketStatus.DONE
        for round_ in range(3):
            far.renew()
            assert far.data_address not in addresses
            addresses.add(far.data_address)
            before = target.fill(round_ + 2)
            assert write(near, stale, source, target) is not TicketStatus.DONE
            assert target.read() == before
            fresh = near.open(far.data_address)
            assert write(near, fresh, source, target) is TicketStatus.DONE
            assert target.read() == data
        with pytest.raises(InvariantError, match="writes"):
            near.renew()
    finally:
        near.close()
        far.close()


def test_a_loopback_write_that_hangs_does_not_land_after_a_renewal() -> None:
    near, far = LoopbackTransport(lambda _: Fault.HANG), LoopbackTransport()
    source, target = Memory(SIZE), Memory(SIZE)
    far.register(target.address, SIZE)
    source.fill(1)
    near.poll(near.submit(near.open(far.data_address), [Write(source.address, target.address, 9)]))
    far.renew()
    assert near.land_late() == 1
    assert target.read() == bytes(SIZE)
    near.close()
    far.close()


def test_renewed_engines_are_kept_and_only_the_oldest_of_many_is_destroyed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Destroying one stops every thread of the process for about a second; keeping all has no end."""
    monkeypatch.setattr(mooncake, "_MAX_RETIRED", 3)
    transport = MooncakeTransport("127.0.0.1")
    memory = Memory(SIZE)
    transport.register(memory.address, SIZE)
    destroyed: list[int] = []
    seen: list[list[int]] = []
    try:
        for number in range(5):
            weakref.finalize(transport._engine, destroyed.append, number)
            transport.renew()
            seen.append(destroyed.copy())
        ports = listening_ports()
    finally:
        transport.close()
    assert seen == [[], [], [], [0], [0, 1]]
    assert sorted(destroyed) == list(range(5))
    assert len(listening_ports()) < len(ports)


class FailingTransport(LoopbackTransport):
    num_tries = 0

    def renew(self) -> None:
        self.num_tries += 1
        if self.num_tries == 1:
            raise TransferError("not now")
        super().renew()


def test_a_fence_that_fails_ends_nothing_and_can_be_asked_for_again() -> None:
    transport = FailingTransport()
    log: list[str] = []
    fence = DataFence(
        transport,
        end_leases=lambda reason: log.append("ended"),
        set_data_address=log.append,
        post=lambda call: call(),
        num_receiving=lambda: 0,
        clock=MonotonicClock(),
        min_interval_s=0.0,
    )
    fence.request("first")
    wait_for(lambda: fence.num_failed == 1)
    assert log == []
    wait_for(lambda: fence.request("second"))
    wait_for(lambda: fence.num_fences == 1)
    assert log == ["ended", transport.data_address]
    fence.stop()
    assert not fence.request("after the end")
    transport.close()


def test_a_patient_fence_waits_for_a_moment_without_transfers_but_not_for_ever() -> None:
    transport, receiving = LoopbackTransport(), [1]
    fence = DataFence(
        transport,
        end_leases=lambda reason: None,
        set_data_address=lambda address: None,
        post=lambda call: call(),
        num_receiving=lambda: receiving[0],
        clock=MonotonicClock(),
        min_interval_s=0.0,
    )
    fence.request("patient", 30.0)
    assert not fence.request("one at a time")
    time.sleep(0.1)
    assert fence.num_fences == 0
    receiving[0] = 0
    wait_for(lambda: fence.num_fences == 1)
    receiving[0] = 1
    wait_for(lambda: fence.request("in a hurry soon", 0.1))
    wait_for(lambda: fence.num_fences == 2)
    fence.stop()
    transport.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_checkpoint(tmp_path_factory, "glm52", SEED)


SEED = VETTED_SEEDS["glm52"][0]


def test_requests_that_run_do_not_notice_a_fence_and_the_others_may_try_again(path: Path) -> None:
    long, short = prompt(0, 60), prompt(1, 90)
    reference = UnifiedHarness(path)
    (expected,) = reference.generate([long], max_tokens=300)
    with pd_pair(exact_config(path, **{**HOT, "prefill.chunk_tokens": 16})) as pair:
        before = pair.decode.info()["stats"]["data_fences"]
        pair.submit("long", long, max_tokens=300)
        wait_for(lambda: pair.front.tokens["long"])
        for number in range(6):
            pair.submit(f"short{number}", short, max_tokens=4)
        assert pair.decode.fence_writers("asked by the test")
        names = [f"short{number}" for number in range(6)]
        pair.wait([*names, "long"])
        assert pair.front.tokens["long"] == expected
        for name in names:
            finish = pair.front.finishes[name]
            assert finish.reason != "error" or finish.can_retry, finish
        wait_for(lambda: pair.decode.info()["stats"]["data_fences"] == before + 1)
        (again,) = pair.generate([long], max_tokens=20)
        assert again == expected[:20]
        pair.assert_settles_empty()
    assert not pair.prefill.fence_writers("a node that takes no writes")


def test_pages_in_quarantine_beyond_their_share_force_the_fence(path: Path) -> None:
    overrides = {**HOT, "transfer.max_quarantine_share": 0.0, "prefill.chunk_tokens": 8}
    with pd_pair(exact_config(path, **overrides)) as pair:
        pair.submit("cut", prompt(0, 120), max_tokens=4)
        wait_for(lambda: pair.decode.info()["stats"]["open_leases"] == 1)
        pair.prefill.control.fence("decode-0", pair.decode.control.epoch)  # it never comes back
        wait_for(lambda: pair.decode.info()["stats"]["data_fences"] >= 1)
        wait_for(lambda: pair.decode.info()["stats"]["host_pages_quarantined"] == 0)
        wait_for(lambda: pair.decode.info()["stats"]["open_leases"] == 0)
