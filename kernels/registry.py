"""How an op is registered and how its arguments are checked.

Ops are `tidepool::<name>`, defined from the reference's own signature. A direct torch.library
definition is used and not `torch.library.custom_op`: the schema, the fake and the dispatch are the
same, but a call costs 2 us instead of 17 (the engine makes dozens a step), and the first call does
not import torch._dynamo. A CUDA build adds its kernel with `implement(name, function, "CUDA")`.

Every op returns nothing and writes only into the arguments that its schema marks. Ops keep no
state, so any thread may call them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.errors import KernelError

_LIBRARY = torch.library.Library("tidepool", "FRAGMENT")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
FLOAT32 = (torch.float32,)
BYTES = (torch.uint8,)


def cpu_op(*, mutates: tuple[str, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a reference `_name(...) -> None` as tidepool::name for CPU tensors, with a fake.

    Returns the dispatching op, which takes positional arguments only.
    """

    def register(reference: Callable[..., None]) -> Callable[..., None]:
        name = reference.__name__.lstrip("_")
        _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=mutates))
        implement(name, reference, "CPU")
        torch.library.register_fake(f"tidepool::{name}", _nothing, lib=_LIBRARY)
        return getattr(torch.ops.tidepool, name).default

    return register


def implement(name: str, function: Callable[..., None], key: str) -> None:
    """Gives tidepool::`name` its implementation for a dispatch key ("CPU", "CUDA")."""
    _LIBRARY.impl(name, function, key)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class Arguments:
    """The arguments of one call: each tensor is checked once, sizes by name.

    A name in a shape stands for one size in all tensors of the call; a number for itself; None
    for any size. All tensors must be on the device of the first, unless `is_anywhere`.
    """

    __slots__ = ("device", "op", "sizes")

    def __init__(self, op: str, **sizes: int) -> None:
        self.op = op
        self.sizes = sizes
        self.device: torch.device | None = None

    def check(
        self,
        name: str,
        tensor: Tensor,
        dtypes: tuple[torch.dtype, ...],
        *shape: str | int | None,
        is_anywhere: bool = False,
    ) -> None:
        """Raises KernelError, with what is and what should be, on a wrong dtype, shape or device."""
        actual = tensor.shape
        if tensor.dtype not in dtypes or len(actual) != len(shape):
            self._refuse(name, tensor, dtypes, shape)
        sizes = self.sizes
        for want, have in zip(shape, actual, strict=True):
            if want is None:
                continue
            expected = sizes.setdefault(want, have) if type(want) is str else want
            if expected != have:
                self._refuse(name, tensor, dtypes, shape)
        if is_anywhere:
            return
        if self.device is None:
            self.device = tensor.device
        elif tensor.device != self.device:
            self._refuse(name, tensor, dtypes, shape)

    def _refuse(
        self,
        name: str,
        tensor: Tensor,
        dtypes: tuple[torch.dtype, ...],
        shape: tuple[str | int | None, ...],
    ) -> None:
        sides = ", ".join(
            f"{side}={self.sizes[side]}" if side in self.sizes else str(side or "any")
            for side in shape
        )
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelError(
            f"{self.op}: {name} is {str(tensor.dtype).removeprefix('torch.')} "
            f"{list(tensor.shape)} on {tensor.device}, expected {kinds} [{sides}] "
            f"on {self.device or tensor.device}"
        )
