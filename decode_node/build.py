"""Builds a decode engine from a configuration: checks what the model and the machine allow."""

from __future__ import annotations

import torch

from ..common.clock import Clock
from ..common.config import Config
from ..common.errors import ConfigError
from ..common.layouts import KvGeometry
from ..hostpool.index_pool import IndexPool
from ..hostpool.pool import MLATokenToKVPoolHost
from ..hostpool.seats import SeatPool
from ..hostpool.segment import SharedSegment
from ..model.config import ModelConfig, geometry
from ..model.model import Model
from .admission import Admission
from .coordinator import HiSparseCoordinator
from .engine import DecodeEngine, Send
from .hot_cache import HotCache
from .journal import SequenceLog
from .step_runner import StepRunner


def max_context(config: Config, model: ModelConfig) -> int:
    """Longest sequence (prompt and output tokens) a decode node of this configuration takes."""
    decode = config.decode
    limits = [model.max_position_embeddings, decode.host_tokens, decode.index_tokens]
    if decode.max_context:
        limits.append(decode.max_context)
    return min(limits)


def check(config: Config, model: ModelConfig, available_bytes: int | None = None) -> None:
    """Raises ConfigError with every fault that needs the model to see.

    `available_bytes`: memory of the machine the node will run on, if it is this one.
    """
    decode, faults = config.decode, []
    if decode.hot_rows and decode.hot_rows < model.index_topk:
        faults.append(
            f"decode.hot_rows: a hot buffer must hold the model's top-k of {model.index_topk} "
            f"rows, not {decode.hot_rows}"
        )
    if decode.max_context > model.max_position_embeddings:
        faults.append(
            f"decode.max_context: the model was made for {model.max_position_embeddings} "
            f"positions, not {decode.max_context}"
        )
    for name in ("host_tokens", "index_tokens"):
        if getattr(decode, name) < config.kv.page_size:
            faults.append(
                f"decode.{name}: must hold at least one page of {config.kv.page_size} tokens, "
                f"not {getattr(decode, name)}"
            )
    try:
        needed = host_bytes(config, geometry(model, config.kv))
    except ConfigError as error:
        faults.append(f"kv: {error}")
    else:
        if available_bytes is not None and needed > available_bytes:
            faults.append(
                f"decode.host_tokens: the host pool needs {needed} bytes, and this machine or its "
                f"cgroup has {available_bytes}"
            )
    if faults:
        raise ConfigError("\n".join(faults))


def host_bytes(config: Config, kv: KvGeometry) -> int:
    """Bytes of the host pool of one decode node."""
    num_pages = config.decode.host_tokens // kv.page_size
    return num_pages * kv.num_layers * kv.kv_page_bytes


def build_coordinator(
    config: Config,
    model: ModelConfig,
    kv: KvGeometry,
    device: torch.device,
    segment: SharedSegment | None = None,
) -> HiSparseCoordinator:
    """Allocates the decode node's pools. Raises ConfigError if they do not fit the machine.

    `segment`: host memory to use instead, parts "kv" and "index"; what lies in it stays.
    """
    check(config, model)
    decode, context = config.decode, max_context(config, model)
    host = MLATokenToKVPoolHost(
        kv,
        decode.host_tokens // kv.page_size,
        pin=device.type == "cuda",
        memory=segment.part("kv") if segment else None,
    )
    index = IndexPool(
        kv,
        decode.index_tokens // kv.page_size,
        device,
        memory=segment.part("index") if segment else None,
    )
    cache = HotCache(
        kv,
        model.index_layer_of,
        num_seats=decode.seats,
        hot_rows=decode.hot_rows or context,
        max_context=context,
        topk=model.index_topk,
        device=device,
        by_score=decode.replacement == "score",
    )
    admission = Admission(
        host.pages,
        index.pages,
        page_size=kv.page_size,
        max_context=context,
        max_requests=decode.max_requests,
    )
    return HiSparseCoordinator(
        host, index, SeatPool(decode.seats), cache, admission, warm_start=decode.warm_start
    )


def build_engine(
    config: Config,
    model: Model,
    coordinator: HiSparseCoordinator,
    *,
    send: Send,
    clock: Clock,
    journal: SequenceLog | None = None,
) -> DecodeEngine:
    """Joins model and pools to an engine; takes the graphs of its steps.

    `journal`: of memory that outlives the process.
    """
    decode, is_cuda = config.decode, model.device.type == "cuda"
    runner = StepRunner(
        model,
        coordinator.cache,
        coordinator.host,
        coordinator.index,
        max_batch=decode.seats,
        max_context=max_context(config, model.config),
        use_graphs=decode.cuda_graphs,
    )
    runner.prepare()
    return DecodeEngine(
        model,
        coordinator,
        runner,
        send=send,
        clock=clock,
        park_after_tokens=decode.park_after_tokens,
        is_overlapped=is_cuda if decode.overlap == "auto" else decode.overlap == "on",
        journal=journal,
    )
