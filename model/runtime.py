"""From a configuration to a loaded model: device, dtype, threads, byte geometry."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common.config import Config
from ..common.errors import ConfigError
from ..common.layouts import KvGeometry
from ..kernels import index_choice
from .config import ModelConfig, geometry
from .model import Model


@dataclass(frozen=True, slots=True)
class Runtime:
    """What every node builds its pools and engines from."""

    model: Model
    geometry: KvGeometry
    device: torch.device


def load_runtime(config: Config) -> Runtime:
    """Loads `config.model.path`. Raises CheckpointError or ConfigError."""
    section = config.model
    device = _device(section.device)
    _choose_kernels(config, device)
    if section.threads:
        torch.set_num_threads(section.threads)
    if section.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = torch.float32 if section.dtype == "float32" else torch.bfloat16
    model = Model.load(
        section.path, dtype=dtype, device=device, strict_norm_eps=section.strict_norm_eps
    )
    return Runtime(model, geometry(model.config, config.kv), device)


def check_model(config: Config) -> ModelConfig:
    """Reads the checkpoint's configuration without its weights. Raises CheckpointError."""
    if not config.model.path:
        raise ConfigError("model.path: no checkpoint directory was given")
    return ModelConfig.from_dir(config.model.path)


def _choose_kernels(config: Config, device: torch.device) -> None:
    index_choice.use(config.kernels.index_logits, config.kernels.index_queries, device)
    backend = config.kernels.attention
    if device.type == "cuda":
        # Imports Triton, which hosts without a GPU lack.
        from ..kernels import attention  # noqa: PLC0415

        attention.use(backend)
    elif backend not in ("auto", "reference"):
        raise ConfigError(f"kernels.attention: {backend!r} needs a GPU, the model runs on the CPU")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device: this machine has no usable GPU")
    return torch.device(name)
