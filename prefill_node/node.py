"""A prefill node's process: model, device pool, exporter and engine, joined."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from ..common.clock import MonotonicClock
from ..common.config import Config
from ..common.step_loop import Engine, StepLoop
from ..kernels.copy_blocks import BlockCopier
from ..model.runtime import load_runtime
from ..transfer.control import ControlLoop
from ..transfer.curve import cluster_keys
from ..transfer.exporter import Exporter
from ..transfer.fronts import FrontHandler
from ..transfer.memory_copies import (
    DEVICE_BATCH_BYTES,
    HOST_BATCH_BYTES,
    Copy,
    MemoryTransport,
    RoutedTransport,
    copy_on_host,
)
from ..transfer.mover import Mover
from ..transfer.node import Auditor, Node
from ..transfer.shared_paths import SharedPaths, machine_id
from ..transfer.transports import has_checksums, make_transport, may_share
from .borrowing import BorrowedMemory
from .build import build_engine, build_pool
from .exporting import RemoteHandoff


def _copying(copier: BlockCopier, device: torch.device) -> tuple[Copy, int]:
    """How pages reach memory that is mapped here, and how much at a time."""
    if device.type == "cuda":
        return copier.copy, DEVICE_BATCH_BYTES
    return copy_on_host, HOST_BATCH_BYTES


def build_node(
    config: Config, *, node_id: str, bind_host: str, on_fatal: Callable[[BaseException], None]
) -> Node:
    """Loads the model, registers the device pool with the transport, binds the control socket.

    Raises CheckpointError, ConfigError, PeerError or TransferError.
    """
    runtime = load_runtime(config)
    clock = MonotonicClock()
    pool = build_pool(config, runtime.geometry, runtime.device)
    copier = BlockCopier(runtime.device)
    wire = make_transport(config.transfer, bind_host)
    memory = MemoryTransport(*_copying(copier, runtime.device))
    transport = RoutedTransport(wire, memory)
    mirrors = pool.mirrors(copier)
    for mirror in mirrors:
        transport.register(mirror.host_LPX.data_ptr(), mirror.host_LPX.numel())
    control = ControlLoop(
        node_id,
        "prefill",
        time.time_ns(),
        bind_host=bind_host,
        layout_hash=runtime.geometry.layout_hash,
        layout_text=runtime.geometry.layout_text,
        data_address=transport.data_address,
        config=config.transfer,
        clock=clock,
        on_fatal=on_fatal,
        keys=cluster_keys(config.cluster),
    )
    mover = Mover(transport, config.transfer, control.post, on_fatal=on_fatal)
    engines: list[Engine] = []
    step_loop = StepLoop(f"step-{node_id}", engines, on_fatal)
    exporter = Exporter(
        control,
        mover,
        [mirror.region() for mirror in mirrors],
        config.transfer,
        has_checksums=has_checksums(config.transfer),
        post_event=step_loop.post,
        paths=SharedPaths(
            machine_id(), partial(BorrowedMemory, device=runtime.device), control.post
        )
        if may_share(config.transfer)
        else None,
        direct_regions=[mirror.device_region() for mirror in mirrors],
    )
    handoff = RemoteHandoff(exporter, mirrors)
    prefill = build_engine(
        config, runtime.model, runtime.geometry, pool, handoff=handoff, send=control.send
    )
    handoff.serve(prefill)
    engines += [Auditor((prefill,)), handoff, prefill]
    fronts = FrontHandler(
        step_loop.post,
        lambda: control.set_load(prefill.load()),
        clock,
        grace_s=config.transfer.front_grace_s,
    )
    mover.start()
    return Node(
        control,
        step_loop,
        [exporter, fronts],
        (prefill,),
        max_context=prefill.max_prompt_tokens,
        closers=(mover.stop, transport.close, *(mirror.close for mirror in mirrors)),
    )
