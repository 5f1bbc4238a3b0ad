"""A decode node's process: model, pools, importer and engine, joined."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..common.clock import MonotonicClock
from ..common.config import Config
from ..common.step_loop import Engine, StepLoop
from ..model.runtime import load_runtime
from ..transfer.control import ControlLoop
from ..transfer.curve import cluster_keys
from ..transfer.fencing import PATIENCE_S, DataFence
from ..transfer.fronts import FrontHandler
from ..transfer.importer import Importer
from ..transfer.mover import Mover
from ..transfer.node import Auditor, Node
from ..transfer.transports import has_checksums, make_transport
from .build import build_coordinator, max_context
from .engine import DecodeEngine
from .receiver import Receiver


def build_node(
    config: Config, *, node_id: str, bind_host: str, on_fatal: Callable[[BaseException], None]
) -> Node:
    """Loads the model, registers host and index pool with the transport, binds the control socket.

    Raises CheckpointError, ConfigError, PeerError or TransferError.
    """
    runtime = load_runtime(config)
    geometry = runtime.geometry
    clock = MonotonicClock()
    coordinator = build_coordinator(config, runtime.model.config, geometry, runtime.device)
    index = coordinator.index.mirror()
    regions = (coordinator.host.region(), index.region())
    transport = make_transport(config.transfer, bind_host)
    for tensor in (coordinator.host.rows, index.host_LPX):
        transport.register(tensor.data_ptr(), tensor.numel())
    control = ControlLoop(
        node_id,
        "decode",
        time.time_ns(),
        bind_host=bind_host,
        layout_hash=geometry.layout_hash,
        layout_text=geometry.layout_text,
        data_address=transport.data_address,
        regions=regions,
        config=config.transfer,
        clock=clock,
        on_fatal=on_fatal,
        keys=cluster_keys(config.cluster),
    )
    mover = Mover(transport, config.transfer, control.post, on_fatal=on_fatal)
    engines: list[Engine] = []
    step_loop = StepLoop(f"step-{node_id}", engines, on_fatal)
    importer = Importer(
        control,
        mover,
        regions,
        config.transfer,
        has_checksums=has_checksums(config.transfer),
        post_event=step_loop.post,
        end_reach=lambda reason: fence.request(reason, PATIENCE_S),
    )
    fence = DataFence(
        transport,
        end_leases=importer.end_all,
        set_data_address=control.set_data_address,
        post=control.post,
        num_receiving=lambda: importer.num_receiving,
        clock=clock,
    )
    decode = DecodeEngine(
        runtime.model,
        coordinator,
        send=control.send,
        clock=clock,
        park_after_tokens=config.decode.park_after_tokens,
    )
    receiver = Receiver(
        importer,
        decode,
        geometry,
        index,
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
    mover.start()
    return Node(
        control,
        step_loop,
        [importer, fronts],
        (decode,),
        max_context=max_context(config, runtime.model.config),
        fence=fence,
        closers=(fence.stop, mover.stop, transport.close, index.close, coordinator.host.close),
    )
