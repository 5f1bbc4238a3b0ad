"""A decode node's process: model, pools, importer and engine, joined."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..common.clock import MonotonicClock
from ..common.config import Config
from ..common.stages import Stages
from ..common.step_loop import Engine, StepLoop
from ..common.wire import Region
from ..hostpool.keeper_link import KeeperLink
from ..hostpool.mirror import HostMirror
from ..kernels.copy_blocks import BlockCopier
from ..model.runtime import load_runtime
from ..transfer.control import ControlLoop
from ..transfer.curve import cluster_keys
from ..transfer.fencing import PATIENCE_S, DataFence
from ..transfer.fronts import FrontHandler
from ..transfer.importer import Importer
from ..transfer.mover import Mover
from ..transfer.node import Auditor, Node
from ..transfer.transport import Transport
from ..transfer.transports import has_checksums, make_transport, may_share
from .build import build_coordinator, build_engine, max_context
from .continuity import Continuity
from .coordinator import HiSparseCoordinator
from .keeper_watch import StartKeeper
from .receiver import Receiver


@dataclass(frozen=True, slots=True)
class _KvManager:
    """What prefill nodes reach of this node: memory, the transport it is registered with, regions."""

    transport: Transport
    index: HostMirror
    regions: tuple[Region, ...]


def _init_kv_manager(
    config: Config, coordinator: HiSparseCoordinator, bind_host: str
) -> _KvManager:
    """Registers the host pool and the index pool's mirror. Raises TransferError.

    Page size and row layout are prefill's, so there is one way to send a page and no case for
    requests with a hot buffer.
    """
    index = coordinator.index.mirror(BlockCopier(coordinator.index.data.device))
    transport = make_transport(config.transfer, bind_host)
    for tensor in (coordinator.host.rows, index.host_LPX):
        transport.register(tensor.data_ptr(), tensor.numel())
    return _KvManager(transport, index, (coordinator.host.region(), index.region()))


def build_node(
    config: Config,
    *,
    node_id: str,
    bind_host: str,
    on_fatal: Callable[[BaseException], None],
    link: KeeperLink | None = None,
    start_keeper: StartKeeper | None = None,
    stages: Stages | None = None,
) -> Node:
    """Loads the model, registers host and index pool with the transport, binds the control socket.

    Args:
        on_fatal: ends the process.
        link: to the node's keeper, which may hold what the process before left; None: nothing
            outlives this process.
        start_keeper: for another keeper, should that one end.
        stages: told how far the start is.

    Raises CheckpointError, ConfigError, PeerError or TransferError.
    """
    stages = stages or Stages()
    runtime = load_runtime(config)
    stages.mark("model")
    geometry = runtime.geometry
    clock = MonotonicClock()
    context = max_context(config, runtime.model.config)
    continuity = Continuity(link, config, geometry, context, start_keeper)
    on_fatal = continuity.guard(on_fatal)
    coordinator = build_coordinator(
        config, runtime.model.config, geometry, runtime.device, continuity.segment
    )
    stages.mark("pools")
    kv = _init_kv_manager(config, coordinator, bind_host)
    stages.mark("transport")
    control = ControlLoop(
        node_id,
        "decode",
        time.time_ns(),
        bind_host=bind_host,
        bind_port=continuity.port,
        layout_hash=geometry.layout_hash,
        layout_text=geometry.layout_text,
        data_address=kv.transport.data_address,
        regions=kv.regions,
        shared=continuity.lending() if may_share(config.transfer) else None,
        config=config.transfer,
        clock=clock,
        on_fatal=on_fatal,
        keys=cluster_keys(config.cluster),
    )
    continuity.note_address(control.address)
    mover = Mover(kv.transport, config.transfer, control.post, on_fatal=on_fatal)
    engines: list[Engine] = []
    step_loop = StepLoop(f"step-{node_id}", engines, on_fatal)
    importer = Importer(
        control,
        mover,
        kv.regions,
        config.transfer,
        has_checksums=has_checksums(config.transfer),
        post_event=step_loop.post,
        end_reach=lambda reason: fence.request(reason, PATIENCE_S),
    )
    fence = DataFence(
        kv.transport,
        end_leases=importer.end_all,
        set_data_address=control.set_data_address,
        post=control.post,
        num_receiving=lambda: importer.num_receiving,
        clock=clock,
    )
    decode = build_engine(
        config,
        runtime.model,
        coordinator,
        send=control.send,
        clock=clock,
        journal=continuity.journal,
    )
    stages.mark("engine")
    receiver = Receiver(
        importer,
        decode,
        geometry,
        kv.index,
        fence=fence,
        max_quarantine_share=config.transfer.max_quarantine_share,
    )
    engines += [Auditor((decode,)), receiver, decode]
    fronts = FrontHandler(
        step_loop.post,
        lambda: control.set_load(decode.load()),
        clock,
        grace_s=config.transfer.front_grace_s,
    )
    engines += continuity.begin(decode, kv.index, clock, on_fatal)
    stages.mark("sequences")
    for front_id in continuity.front_ids:
        fronts.expect(front_id)
    mover.start()
    return Node(
        control,
        step_loop,
        [importer, fronts],
        (decode,),
        max_context=context,
        fence=fence,
        let_go=continuity.let_go,
        closers=(
            fence.stop,
            mover.stop,
            kv.transport.close,
            kv.index.close,
            coordinator.host.close,
            continuity.close,
        ),
    )
