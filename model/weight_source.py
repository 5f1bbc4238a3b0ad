"""What the layers are built from: tensors by name, plain or as FP8 with block scales.

`Weights` (a checkpoint) and `RandomWeights` say where tensors come from; here is what both do with
them: projections side by side in one matrix, experts in one tensor.

Shape suffixes: E experts, O and I width of output and input, P and Q their 128x128 blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.block_fp8 import BLOCK
from .layers import BlockFp8, Matrix


def keeps_fp8(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether FP8 weights are multiplied as they are: in bfloat16, where the GPU can."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


class WeightSource(ABC):
    """Tensors in `dtype` on `device`; matrices stay FP8 where they are and `keep_fp8` says so."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, keep_fp8: bool) -> None:
        self.dtype = dtype
        self.device = device
        self._keep_fp8 = keep_fp8

    @abstractmethod
    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of its own memory, not FP8."""

    @abstractmethod
    def get_fp8(self, name: str) -> BlockFp8:
        """A matrix for which `is_fp8`."""

    @abstractmethod
    def is_fp8(self, name: str) -> bool:
        """Whether a matrix comes as FP8."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def exact(self, name: str) -> Tensor:
        """A tensor as it is stored, if that is the model's dtype and a GPU's; else float32.

        For products that must be float32: a GPU has them of bfloat16 factors, without rounding.
        """

    def matrix(self, name: str) -> Matrix:
        """Weight of a projection, for `layers.linear`."""
        return self.get_fp8(name) if self._keep_fp8 and self.is_fp8(name) else self.get(name)

    def fused(self, *names: str) -> Matrix:
        """Matrices of the same width, the rows of one behind the other's."""
        if not self.stays_fp8(names):
            return torch.cat([self.get(name) for name in names])
        parts = [self.get_fp8(name) for name in names]
        return BlockFp8(
            torch.cat([part.weight_OI for part in parts]),
            torch.cat([part.scale_PQ for part in parts]),
        )

    def stacked(
        self, experts: Sequence[tuple[str, ...]], *, as_fp8: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`fused` of each expert in one tensor: ([E, O, I], scales [E, P, Q] or None).

        `as_fp8`: only where `stays_fp8` for all. Copied one by one: at no time are there two
        copies of more than one expert.
        """
        first = experts[0]
        rows, width = sum(self.shape(name)[0] for name in first), self.shape(first[0])[1]
        shape = (len(experts), rows, width)
        if not as_fp8:
            plain = torch.empty(shape, dtype=self.dtype, device=self.device)
            for expert, names in enumerate(experts):
                torch.cat([self.get(name) for name in names], out=plain[expert])
            return plain, None
        weight = torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device)
        blocks = (-(-rows // BLOCK), -(-width // BLOCK))
        scale = torch.empty((len(experts), *blocks), dtype=torch.float32, device=self.device)
        for expert, names in enumerate(experts):
            fused = self.fused(*names)
            weight[expert] = fused.weight_OI
            scale[expert] = fused.scale_PQ
        return weight, scale

    def stays_fp8(self, names: Sequence[str]) -> bool:
        """All FP8, and no block of scales over the edge between two of them."""
        is_fp8 = self._keep_fp8 and all(self.is_fp8(name) for name in names)
        return is_fp8 and all(self.shape(name)[0] % BLOCK == 0 for name in names[:-1])
