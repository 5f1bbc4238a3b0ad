"""CUDA implementations of the ops, imported at their first call.

Triton is not installed on hosts without a GPU, and importing it takes a second: the op files
register these functions, which import the real one when a CUDA tensor first comes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def _later(module: str, name: str) -> Callable[..., Any]:
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            found.append(getattr(import_module(f".{module}", __package__), name))
        return found[0](*args)

    return call


attend = _later("attention", "attend")
add_rms_norm = _later("triton_norms", "add_rms_norm")
begin_step = _later("triton_begin_step", "begin_step")
best_tokens = _later("triton_sample_tokens", "best_tokens")
block_fp8_linear = _later("triton_block_fp8", "block_fp8_linear")
copy_rows = _later("cuda_rows", "copy_rows")
draw_tokens = _later("triton_sample_tokens", "draw_tokens")
filter_tokens = _later("triton_filter_tokens", "filter_tokens")
index_logits = _later("triton_index_logits", "index_logits")
index_logits_chunk = _later("triton_index_logits_chunk", "index_logits_chunk")
layer_norm = _later("triton_norms", "layer_norm")
rms_norm = _later("triton_norms", "rms_norm")
rotate = _later("triton_rotate", "rotate")
rotate_into = _later("triton_rotate", "rotate_into")
route_experts = _later("triton_route_experts", "route_experts")
routed_experts = _later("triton_routed_experts", "routed_experts")
select_topk = _later("cuda_select_topk", "select_topk")
sparse_mla = _later("attention", "sparse_mla")
store_index_keys = _later("cuda_rows", "store_index_keys")
store_rows = _later("cuda_rows", "store_rows")
swiglu = _later("triton_norms", "swiglu")
