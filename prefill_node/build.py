"""Builds a prefill engine from a configuration."""

from __future__ import annotations

import torch

from ..common.config import Config
from ..common.errors import ConfigError
from ..common.layouts import KvGeometry
from ..hostpool.device_pool import DevicePool
from ..model.model import Model
from .engine import PrefillEngine
from .handoff import Handoff, Send
from .scheduler import PrefillScheduler


def build_pool(config: Config, geometry: KvGeometry, device: torch.device) -> DevicePool:
    """Allocates the device pool. Raises ConfigError if it holds no page."""
    num_pages = config.prefill.pool_tokens // geometry.page_size
    if num_pages < 1:
        raise ConfigError(
            f"prefill.pool_tokens: must hold at least one page of {geometry.page_size} tokens, "
            f"not {config.prefill.pool_tokens}"
        )
    return DevicePool(geometry, num_pages, device)


def build_engine(
    config: Config,
    model: Model,
    geometry: KvGeometry,
    pool: DevicePool,
    *,
    handoff: Handoff,
    send: Send,
) -> PrefillEngine:
    scheduler = PrefillScheduler(
        pool.pages,
        page_size=geometry.page_size,
        chunk_tokens=config.prefill.chunk_tokens,
        max_active=config.prefill.max_active,
    )
    return PrefillEngine(
        model,
        geometry,
        pool,
        scheduler,
        handoff=handoff,
        send=send,
        max_queued=config.prefill.max_queued,
    )
