"""How ops are registered: schemas, fakes, cost-free dispatch, and checks that print both sides."""

from __future__ import annotations

import pytest
import torch

from tidepool.common.errors import KernelError
from tidepool.kernels import (
    copy_rows,
    index_logits,
    resolve,
    select_topk,
    sparse_mla,
    store_index_keys,
    store_rows,
    store_v4_rows,
    swap_in,
)
from tidepool.kernels.registry import FLOATS, INT32, Arguments

MODULES = (
    copy_rows,
    index_logits,
    resolve,
    select_topk,
    sparse_mla,
    store_index_keys,
    store_rows,
    store_v4_rows,
    swap_in,
)
WRITTEN = {
    "copy_rows": {"target_LMX"},
    "index_logits": {"scores_BC"},
    "index_logits_chunk": {"scores_TC"},
    "load_cache_to_device_buffer": {"device_rows_MX"},
    "resolve": {
        "position_of_slot_SH",
        "slot_of_position_SC",
        "last_use_SH",
        "hot_idx_BK",
        "miss_host_slot_BK",
        "miss_device_row_BK",
        "num_misses_B",
        "fault_B",
    },
    "select_topk": {"topk_idx_BK"},
    "sparse_mla": {"out_BHC"},
    "store_index_keys": {"pages_PX"},
    "store_rows": {"rows_NX"},
    "store_v4_rows": {"pages_PX"},
}


def i64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_every_op_returns_nothing_and_declares_what_it_writes(name: str) -> None:
    assert len(MODULES) == 9
    schema = getattr(torch.ops.tidepool, name).default._schema
    written = {
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    assert written == WRITTEN[name]
    assert list(schema.returns) == []


def test_schemas_and_fakes_agree_with_what_the_references_do() -> None:
    torch.manual_seed(0)
    rows = torch.zeros(8, 24, dtype=torch.uint8)
    pages = torch.zeros(2, 4 * 12, dtype=torch.uint8)
    idx = torch.tensor([[0, 2, -1]], dtype=torch.int32)
    float_row = torch.randn(1, 8)
    calls = {
        "store_rows": (float_row, float_row[:, :4].clone(), i64(3), rows, "mla_bf16"),
        "store_index_keys": (float_row, i64(5), pages, 4, "index_k"),
        "select_topk": (torch.randn(1, 5), i64(5), idx.clone()),
        "copy_rows": (rows[None].clone(), torch.ones_like(rows)[None], i64(1, 5), i64(2, 0)),
        "sparse_mla": (
            torch.randn(1, 2, 8),
            torch.randn(1, 2, 4),
            rows,
            idx,
            0.5,
            "mla_bf16",
            torch.zeros(1, 2, 8),
        ),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(
            getattr(torch.ops.tidepool, name).default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )


def test_ops_run_on_meta_tensors_without_touching_memory() -> None:
    rows = torch.empty(1 << 40, 24, dtype=torch.uint8, device="meta")
    float_row = torch.empty(1, 8, device="meta")
    slots = torch.empty(1, dtype=torch.int64, device="meta")
    store_rows.store_rows(float_row, float_row[:, :4], slots, rows, "mla_bf16")


def test_ops_work_in_inference_mode_on_tensors_from_outside() -> None:
    rows = torch.zeros(2, 24, dtype=torch.uint8)
    with torch.inference_mode():
        store_rows.store_rows(torch.ones(1, 8), torch.ones(1, 4), i64(1), rows, "mla_bf16")
    assert rows[1].any()


def test_arguments_bind_sizes_by_name_and_refuse_other_devices() -> None:
    arguments = Arguments("op", K=3)
    arguments.check("a", torch.zeros(2, 3), FLOATS, "B", "K")
    with pytest.raises(KernelError, match=r"op: b is float32 \[3, 3\] on cpu, expected .*B=2, K=3"):
        arguments.check("b", torch.zeros(3, 3), FLOATS, "B", "K")
    with pytest.raises(KernelError, match=r"c is float64 \[2\].*float32 or bfloat16 or float16"):
        arguments.check("c", torch.zeros(2, dtype=torch.float64), FLOATS, "B")
    with pytest.raises(KernelError, match=r"d is int32 \[2\].*\[B=2, any\]"):
        arguments.check("d", torch.zeros(2, dtype=torch.int32), INT32, "B", None)
    with pytest.raises(KernelError, match=r"on meta, expected .* on cpu"):
        arguments.check("e", torch.zeros(2, 3, device="meta"), FLOATS, "B", "K")
    arguments.check("f", torch.zeros(2, 3, device="meta"), FLOATS, "B", "K", is_anywhere=True)
