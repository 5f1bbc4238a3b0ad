"""Reads a hub checkpoint: safetensors, sharded or not, plain or FP8 block-scaled.

Used by `Model.load` alone. First every header is compared with what the configuration asks for
(`check`: missing, extra, mis-shaped, undecodable: one CheckpointError), then tensors are read one
by one. Only safetensors are opened: nothing in a checkpoint is ever executed or unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import CheckpointError
from ..kernels.block_fp8 import BLOCK, dequantize_blocks
from .config import ModelConfig
from .config_reader import read_json
from .layers import BlockFp8
from .weight_shapes import expected_shapes
from .weight_source import WeightSource

_FLOAT_DTYPES = ("F32", "F16", "BF16")
_FP8_DTYPE = "F8_E4M3"
_SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
_SCALE_SUFFIX = "_scale_inv"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MAX_LISTED = 8


class Checkpoint:
    """The tensors of a directory by name. Use as a context manager; files stay mapped inside."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: list[Any] = []
        self._file_of: dict[str, Any] = {}
        self.faults: list[str] = []
        weight_map = self._weight_map()
        for name in dict.fromkeys(weight_map.values()):
            self._open(path / name)
        lost = [name for name in weight_map if name and name not in self._file_of]
        if lost:
            self.faults.append(f"tensors the index names and no file holds {_listed(lost)}")

    def _weight_map(self) -> dict[str, str]:
        """Tensor -> file by the index; {"": file} for a single file."""
        index = self._path / "model.safetensors.index.json"
        if not index.exists():
            if not (self._path / "model.safetensors").exists():
                raise CheckpointError(
                    f"{self._path} has neither model.safetensors.index.json nor model.safetensors "
                    "(no other weight format is ever opened)"
                )
            return {"": "model.safetensors"}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must be a non-empty object")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index}: {file!r:.80} is not the name of a file beside it")
        return weight_map

    def _open(self, file: Path) -> None:
        try:
            opened = safe_open(file, framework="pt", device="cpu")
            names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
        self._files.append(opened)
        twice = [name for name in names if name in self._file_of]
        if twice:
            self.faults.append(f"tensors held by two files {_listed(twice)}")
        self._file_of.update(dict.fromkeys(names, opened))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file_of.clear()
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, safetensors dtype) without reading the data."""
        view = self._file_of[name].get_slice(name)
        return tuple(view.get_shape()), view.get_dtype()

    def read(self, name: str) -> Tensor:
        try:
            return self._file_of[name].get_tensor(name)
        except (SafetensorError, OSError, TypeError) as error:
            raise CheckpointError(f"cannot read {name} of {self._path}: {error}") from error


class Weights(WeightSource):
    """Checked tensors of a checkpoint, in the dtype and on the device asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        keep_fp8: bool = False,
    ) -> None:
        check(checkpoint, config)
        self._checkpoint = checkpoint
        self._block = config.fp8_block
        super().__init__(dtype, device, keep_fp8=keep_fp8 and self._block == (BLOCK, BLOCK))

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Reads one tensor; an FP8 weight is multiplied by its block scales in float32 first.

        Always a copy: what safetensors hands out is the mapped file, which may change under us.
        """
        tensor = self._checkpoint.read(name).to(self.device, copy=True)
        if tensor.dtype == torch.float8_e4m3fn:
            scale = self._checkpoint.read(name + _SCALE_SUFFIX).to(self.device)
            tensor = dequantize_blocks(tensor, scale, self._block)
        return tensor.to(dtype or self.dtype)

    def exact(self, name: str) -> Tensor:
        is_mixed = self.device.type == "cuda" and self.dtype == torch.bfloat16
        is_stored = self._checkpoint.header(name)[1] == "BF16"
        return self.get(name, None if is_mixed and is_stored else torch.float32)

    def is_fp8(self, name: str) -> bool:
        shape, dtype = self._checkpoint.header(name)
        return dtype == _FP8_DTYPE and len(shape) == 2

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.header(name)[0]

    def get_fp8(self, name: str) -> BlockFp8:
        weight = self._checkpoint.read(name).to(self.device, copy=True)
        scale = self._checkpoint.read(name + _SCALE_SUFFIX).to(self.device, copy=True)
        return BlockFp8(weight, scale.float())


def check(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compares all headers with `expected_shapes`; raises one CheckpointError with every fault."""
    expected = expected_shapes(config)
    present = {name for name in checkpoint.names if not _is_ignored(name, config.num_layers)}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = [name for name in expected if name not in present and name not in optional]
    faults, scales = [], set()
    for name in expected.keys() & present:
        shape, dtype = checkpoint.header(name)
        if shape != expected[name]:
            faults.append(f"{name} is {list(shape)}, must be {list(expected[name])}")
        elif dtype == _FP8_DTYPE and len(shape) == 2:
            scales.add(name + _SCALE_SUFFIX)
            faults += _scale_faults(checkpoint, name, shape, config.fp8_block)
        elif dtype not in _FLOAT_DTYPES:
            faults.append(f"{name} has dtype {dtype}, which cannot be decoded")
    extra = sorted(present - expected.keys() - scales)
    lines = list(checkpoint.faults)
    if missing:
        lines.append(f"missing tensors {_listed(missing)}")
    if extra:
        lines.append(f"extra tensors {_listed(extra)}")
    if faults:
        lines.append(f"unusable tensors {_listed(sorted(faults), '; ')}")
    if lines:
        raise CheckpointError("\n".join(lines))


def _scale_faults(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], block: tuple[int, int]
) -> list[str]:
    scale = name + _SCALE_SUFFIX
    if scale not in checkpoint:
        return [f"{name} is FP8 and has no {scale}"]
    found, dtype = checkpoint.header(scale)
    expected = tuple(-(-size // step) for size, step in zip(shape, block, strict=True))
    if found != expected:
        return [f"{scale} is {list(found)}, must be {list(expected)}"]
    if dtype not in _SCALE_DTYPES:
        return [f"{scale} has dtype {dtype}, which cannot be decoded"]
    return []


def _is_ignored(name: str, num_layers: int) -> bool:
    """Multi-token-prediction layers stand behind the last layer; old files hold rope tables."""
    layer = _LAYER.match(name)
    if layer and int(layer.group(1)) >= num_layers:
        return True
    return name.endswith(".rotary_emb.inv_freq")


def _listed(entries: list[str], separator: str = ", ") -> str:
    text = separator.join(entries[:_MAX_LISTED])
    more = len(entries) - _MAX_LISTED
    return f"({len(entries)}): {text}" + (f"{separator}and {more} more" if more > 0 else "")
