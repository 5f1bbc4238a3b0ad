"""e4m3 with a scale a block, as the packed layouts store it. Helpers of the references.

scale = max(amax, 1e-4) / 448 in float32, payload = x / scale rounded to nearest even. The floor keeps an
all-zero block at scale 1e-4/448 (without it: 0 * inf = NaN, as in SGLang's 656-byte rows), and
values are clamped to +-448 before conversion, because e4m3fn has no infinity to saturate to.
NaN stays NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
_AMAX_LIMIT = 3.0e38
"""Above it, rounding the scale could make 448 * scale infinite."""


def block_amax(values: Tensor) -> Tensor:
    """Largest magnitude of the last dimension, float32, floored; NaN if a value is NaN."""
    return values.abs().amax(-1, keepdim=True).clamp(AMAX_FLOOR, _AMAX_LIMIT)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises blocks of the last dimension.

    values: float32 [..., n]. Returns (payload float8_e4m3fn [..., n], scale float32 [..., 1]).
    """
    scale = block_amax(values) / E4M3_MAX
    return encode(values, scale), scale


def quantize_ue8m0(values: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize`, with the scale rounded up to a power of two.

    Returns (payload float8_e4m3fn [..., n], exponent uint8 [..., 1]: scale = 2 ** (byte - 127),
    255 = NaN).
    """
    ratio = block_amax(values) / E4M3_MAX
    mantissa, exponent = torch.frexp(ratio)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    scale = torch.ldexp(torch.ones_like(ratio), exponent)
    byte = torch.where(ratio.isnan(), 255, (exponent + 127).clamp(0, 254)).to(torch.uint8)
    return encode(values, torch.where(ratio.isnan(), ratio, scale)), byte


def scale_of_ue8m0(byte: Tensor) -> Tensor:
    """float32 scale of ue8m0 bytes; 255 is NaN."""
    exponent = byte.to(torch.int32) - 127
    scale = torch.ldexp(torch.ones(byte.shape, device=byte.device), exponent)
    return scale.masked_fill(byte == 255, float("nan"))


def encode(values: Tensor, scale: Tensor) -> Tensor:
    """values / scale, clamped to +-448, as float8_e4m3fn."""
    return (values / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode(payload: Tensor, scale: Tensor) -> Tensor:
    """payload (float8_e4m3fn) * scale (float32, broadcast), float32.

    Goes through float16, which torch converts five times faster: the same bits shifted by one
    place are the value / 256, subnormals included; NaN is put back afterwards.
    """
    bits = payload.view(torch.uint8)
    wide = bits.to(torch.int16)
    wide = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    values = wide.view(torch.float16).float().mul_(scale * 256.0)
    is_nan = (bits & 0x7F) == 0x7F
    return values.masked_fill_(is_nan, float("nan")) if is_nan.any() else values
