"""Bytes per row, token and page: the one table every other folder reads. No tensors here.

A *row* is one token of one layer of the KV cache. A *page* is `page_size` tokens of one layer.

| layout          | bytes                                  | offsets                                              |
|-----------------|----------------------------------------|------------------------------------------------------|
| mla_bf16        | 2 * (latent + rope)       (1152)       | [0, 2L) bf16 latent, [2L, 2L+2R) bf16 rotated k_pe   |
| mla_fp8         | L + 4 * L/128 + 2R         (656)       | [0, L) e4m3 latent, fp32 scale per 128, bf16 k_pe    |
| mla_fp32        | 4 * (latent + rope)                    | fp32 latent, fp32 k_pe; for exact tests              |
| index_k         | D + 4 a token              (132)       | page: page_size * D e4m3, then page_size fp32 scales |
| index_fp32      | 4 * D a token                          | page: page_size * D fp32                             |
| deepseek_v4_c4  | 584 a token, 37,440 a page of 64       | page: 576 B values (448 e4m3 + 64 bf16) a token,     |
|                 |                                        | then 8 B (7 ue8m0 + pad) a token, padded to 576      |

Source: FlashMLA's sparse FP8 row, DeepGEMM's paged index keys, DeepSeek-V4's C4 page.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError

KvLayoutName = Literal["mla_bf16", "mla_fp8", "mla_fp32"]
IndexLayoutName = Literal["index_k", "index_fp32"]

FP8_BLOCK = 128
"""Latent values that share one fp32 scale in `mla_fp8`."""

MAX_PAGE_SIZE = 256


def check_page_size(page_size: int) -> None:
    """Raises ConfigError unless `page_size` is a power of two from 1 to 256 (tokens)."""
    if not (1 <= page_size <= MAX_PAGE_SIZE and page_size & (page_size - 1) == 0):
        raise ConfigError(f"page size must be a power of two from 1 to 256, not {page_size}")


@dataclass(frozen=True, slots=True)
class RowLayout:
    """One token of one layer: latent (after its norm) and rotated rope key.

    Attributes:
        name: which encoding.
        latent_dim: values of the latent part (kv_lora_rank).
        rope_dim: values of the rope part (qk_rope_head_dim).
    """

    name: KvLayoutName
    latent_dim: int
    rope_dim: int

    def __post_init__(self) -> None:
        if self.name == "mla_fp8" and self.latent_dim % FP8_BLOCK:
            raise ConfigError(
                f"mla_fp8 needs a latent width that is a multiple of {FP8_BLOCK}, "
                f"not {self.latent_dim}"
            )

    @property
    def num_scales(self) -> int:
        """fp32 scales in a row; 0 unless mla_fp8."""
        return self.latent_dim // FP8_BLOCK if self.name == "mla_fp8" else 0

    @property
    def scale_offset(self) -> int:
        """Byte offset of the first scale (mla_fp8 only)."""
        return self.latent_dim

    @property
    def rope_offset(self) -> int:
        """Byte offset of the rope part."""
        if self.name == "mla_fp8":
            return self.latent_dim + 4 * self.num_scales
        return self.latent_dim * (2 if self.name == "mla_bf16" else 4)

    @property
    def row_bytes(self) -> int:
        return self.rope_offset + self.rope_dim * (4 if self.name == "mla_fp32" else 2)

    def page_bytes(self, page_size: int) -> int:
        return page_size * self.row_bytes


@dataclass(frozen=True, slots=True)
class IndexLayout:
    """Indexer keys of one layer, by page: all payloads, then all scales."""

    name: IndexLayoutName
    head_dim: int

    @property
    def key_bytes(self) -> int:
        """Bytes of one key's payload."""
        return self.head_dim * (1 if self.name == "index_k" else 4)

    @property
    def token_bytes(self) -> int:
        return self.key_bytes + (4 if self.name == "index_k" else 0)

    def page_bytes(self, page_size: int) -> int:
        return page_size * self.token_bytes

    def scale_offset(self, page_size: int) -> int:
        """Byte offset of the first scale inside a page (index_k only)."""
        return page_size * self.key_bytes


@dataclass(frozen=True, slots=True)
class DeepSeekV4Layout:
    """DeepSeek-V4's C4 page: values, then scales, then padding to whole 576-byte units."""

    nope_dim: int = 448
    rope_dim: int = 64

    @property
    def value_bytes(self) -> int:
        return self.nope_dim + 2 * self.rope_dim

    @property
    def scale_bytes(self) -> int:
        """One ue8m0 byte per 64 nope values, and one byte of padding."""
        return self.nope_dim // 64 + 1

    @property
    def token_bytes(self) -> int:
        return self.value_bytes + self.scale_bytes

    def scale_offset(self, page_size: int) -> int:
        return page_size * self.value_bytes

    def page_bytes(self, page_size: int) -> int:
        data = page_size * self.token_bytes
        return math.ceil(data / self.value_bytes) * self.value_bytes


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """Everything two peers must agree on before a byte moves between them.

    Attributes:
        row: layout of a KV row.
        index: layout of indexer keys.
        page_size: tokens a page, the same on device, host and wire.
        num_layers: layers with KV rows.
        num_index_layers: layers with an indexer of their own (they own index pages).
    """

    row: RowLayout
    index: IndexLayout
    page_size: int
    num_layers: int
    num_index_layers: int

    def __post_init__(self) -> None:
        check_page_size(self.page_size)

    @property
    def kv_page_bytes(self) -> int:
        """Bytes of one KV page of one layer."""
        return self.row.page_bytes(self.page_size)

    @property
    def index_page_bytes(self) -> int:
        """Bytes of one index page of one index layer."""
        return self.index.page_bytes(self.page_size)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers, index keys included."""
        return self.num_layers * self.row.row_bytes + self.num_index_layers * self.index.token_bytes

    def num_pages(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    @property
    def layout_text(self) -> str:
        """A sentence that names every value the hash covers."""
        return (
            f"{self.row.name}({self.row.latent_dim}+{self.row.rope_dim}) x {self.num_layers} layers, "
            f"{self.index.name}({self.index.head_dim}) x {self.num_index_layers} layers, "
            f"page {self.page_size}"
        )

    @property
    def layout_hash(self) -> str:
        """Short hash of `layout_text`; peers compare it when they meet."""
        return hashlib.sha256(self.layout_text.encode()).hexdigest()[:16]
