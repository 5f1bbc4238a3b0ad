"""Packing: literal bytes at literal offsets for every layout, FP8 edges, guard rows, skipped slots."""

from __future__ import annotations

import struct

import pytest
import torch

from tidepool.common.errors import KernelError
from tidepool.kernels import fp8
from tidepool.kernels.store_index_keys import store_index_keys, unpack_index_pages
from tidepool.kernels.store_rows import pack_rows, store_rows, unpack_rows
from tidepool.kernels.store_v4_rows import store_v4_rows, unpack_v4_pages

ROW_LAYOUTS = [("mla_bf16", 1152), ("mla_fp8", 656), ("mla_fp32", 2304)]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def slots(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_mla_bf16_row_has_latent_then_rope() -> None:
    latent, rope = torch.zeros(1, 512), torch.zeros(1, 64)
    latent[0, 0], latent[0, 511], rope[0, 0], rope[0, 63] = 1.0, -2.0, 0.5, 3.0
    rows = torch.zeros(3, 1152, dtype=torch.uint8)
    store_rows(latent, rope, slots(1), rows, "mla_bf16")
    expected = bytearray(1152)
    expected[0:2] = b"\x80\x3f"
    expected[1022:1024] = b"\x00\xc0"
    expected[1024:1026] = b"\x00\x3f"
    expected[1150:1152] = b"\x40\x40"
    assert raw(rows[1]) == bytes(expected)
    assert not rows[0].any() and not rows[2].any()


def test_mla_fp8_row_has_e4m3_latent_then_four_scales_then_bf16_rope() -> None:
    latent, rope = torch.zeros(1, 512), torch.zeros(1, 64)
    latent[0, 0], latent[0, 1] = 448.0, -1.0
    latent[0, 128], latent[0, 129] = 896.0, 4.0
    latent[0, 511] = 224.0
    rope[0, 0], rope[0, 63] = 1.0, -2.0
    rows = torch.zeros(2, 656, dtype=torch.uint8)
    store_rows(latent, rope, slots(0), rows, "mla_fp8")
    expected = bytearray(656)
    expected[0], expected[1] = 0x7E, 0xB8
    expected[128], expected[129] = 0x7E, 0x40
    expected[511] = 0x7E
    floor = struct.unpack("<f", f32(1e-4))[0] / 448
    expected[512:528] = f32(1.0, 2.0, floor, 0.5)
    expected[528:530] = b"\x80\x3f"
    expected[654:656] = b"\x00\xc0"
    assert raw(rows[0]) == bytes(expected)


def test_hand_written_mla_fp8_bytes_decode() -> None:
    data = bytearray(656)
    data[0], data[127], data[128], data[511] = 0x38, 0x01, 0x7E, 0xFE
    data[512:528] = f32(2.0, 0.5, 1.0, 0.25)
    data[528:530] = b"\x40\x40"
    latent, rope = unpack_rows(as_tensor(bytes(data)), "mla_fp8", 512)
    assert latent[0] == 2.0
    assert latent[127] == 2.0**-9 * 2.0
    assert latent[128] == 448.0 * 0.5
    assert latent[511] == -448.0 * 0.25
    assert latent.count_nonzero() == 4
    assert rope.tolist() == [3.0] + [0.0] * 63


def test_mla_fp32_row_keeps_every_bit() -> None:
    latent, rope = torch.randn(2, 5), torch.randn(2, 3)
    rows = torch.zeros(2, 32, dtype=torch.uint8)
    store_rows(latent, rope, slots(1, 0), rows, "mla_fp32")
    assert raw(rows[1]) == f32(*latent[0].tolist(), *rope[0].tolist())
    decoded = unpack_rows(rows, "mla_fp32", 5)
    assert torch.equal(decoded[0], latent.flip(0))
    assert torch.equal(decoded[1], rope.flip(0))


def test_index_k_page_has_all_keys_then_all_scales() -> None:
    pages = torch.zeros(2, 8448, dtype=torch.uint8)
    key = torch.zeros(2, 128)
    key[0, 0], key[0, 127] = 448.0, 1.0
    key[1, 1] = -896.0
    store_index_keys(key, slots(64 + 3, 63), pages, 64, "index_k")
    expected = [bytearray(8448), bytearray(8448)]
    expected[1][128 * 3], expected[1][128 * 3 + 127] = 0x7E, 0x38
    expected[1][8192 + 12 : 8192 + 16] = f32(1.0)
    expected[0][128 * 63 + 1] = 0xFE
    expected[0][8192 + 252 : 8448] = f32(2.0)
    assert [raw(page) for page in pages] == [bytes(page) for page in expected]
    decoded = unpack_index_pages(pages, 64, "index_k", 128)
    assert decoded.shape == (2, 64, 128)
    assert torch.equal(decoded[1, 3], key[0])
    assert torch.equal(decoded[0, 63], key[1])


def test_index_fp32_page_keeps_every_bit() -> None:
    pages = torch.zeros(2, 2 * 3 * 4, dtype=torch.uint8)
    key = torch.randn(1, 3)
    store_index_keys(key, slots(3), pages, 2, "index_fp32")
    assert raw(pages[1, 12:]) == f32(*key[0].tolist())
    assert torch.equal(unpack_index_pages(pages, 2, "index_fp32", 3)[1, 1], key[0])


def test_deepseek_v4_page_has_values_then_scales_then_padding() -> None:
    pages = torch.zeros(2, 37_440, dtype=torch.uint8)
    nope, rope = torch.zeros(1, 448), torch.zeros(1, 64)
    nope[0, 0] = 448.0
    nope[0, 64] = 449.0
    nope[0, 447] = -3.5
    rope[0, 0], rope[0, 63] = 1.0, -2.0
    store_v4_rows(nope, rope, slots(64 + 5), pages, 64)
    expected = bytearray(37_440)
    value = 576 * 5
    expected[value], expected[value + 64], expected[value + 447] = 0x7E, 0x76, 0xFE
    expected[value + 448 : value + 450] = b"\x80\x3f"
    expected[value + 574 : value + 576] = b"\x00\xc0"
    scale = 36_864 + 8 * 5
    floor = 127 - 22  # 1e-4 / 448 = 2.2e-7, rounded up to 2 ** -22
    expected[scale : scale + 8] = bytes([127, 128, floor, floor, floor, floor, 120, 0])
    assert raw(pages[1]) == bytes(expected)
    assert not pages[0].any()


def test_hand_written_deepseek_v4_bytes_decode() -> None:
    data = bytearray(37_440)
    data[576 * 63], data[576 * 63 + 447] = 0x38, 0xB8
    data[576 * 63 + 448 : 576 * 63 + 450] = b"\x40\x40"
    data[36_864 + 8 * 63], data[36_864 + 8 * 63 + 6] = 128, 126
    nope, rope = unpack_v4_pages(as_tensor(bytes(data))[None], 64)
    assert (nope[0, 63, 0], nope[0, 63, 447], rope[0, 63, 0]) == (2.0, -0.5, 3.0)
    assert (nope.count_nonzero(), rope.count_nonzero()) == (2, 1)


def test_deepseek_v4_entries_survive_a_round_trip_within_a_sixteenth() -> None:
    nope, rope = torch.randn(128, 448) * 7, torch.randn(128, 64).bfloat16()
    pages = torch.zeros(2, 37_440, dtype=torch.uint8)
    store_v4_rows(nope, rope, torch.arange(128), pages, 64)
    decoded, decoded_rope = unpack_v4_pages(pages, 64)
    blocks = nope.view(2, 64, 7, 64)
    error = (decoded.view(2, 64, 7, 64) - blocks).abs()
    assert (error <= blocks.abs() / 16 + blocks.abs().amax(-1, keepdim=True) / 2**16).all()
    assert torch.equal(decoded_rope.view(128, 64), rope.float())


@pytest.mark.parametrize("exponent", range(-20, 21))
def test_ue8m0_scale_of_an_exact_power_of_two_is_not_rounded_up(exponent: int) -> None:
    amax = 448.0 * 2.0**exponent
    _, byte = fp8.quantize_ue8m0(torch.tensor([[amax, 0.0]]))
    above = torch.tensor([[amax * (1 + 2**-20), 0.0]])
    assert int(byte) == 127 + exponent
    assert int(fp8.quantize_ue8m0(above)[1]) == 128 + exponent
    assert fp8.scale_of_ue8m0(byte).item() == 2.0**exponent


def test_all_256_e4m3_bytes_decode_as_torch_does() -> None:
    payload = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = payload.float() * 0.3
    actual = fp8.decode(payload, torch.tensor(0.3))
    assert torch.equal(actual.nan_to_num(7e7), expected.nan_to_num(7e7))
    assert actual.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


def test_an_all_zero_row_is_zero_and_not_nan() -> None:
    rows = torch.full((1, 656), 0xFF, dtype=torch.uint8)
    store_rows(torch.zeros(1, 512), torch.zeros(1, 64), slots(0), rows, "mla_fp8")
    assert all(not part.any() for part in unpack_rows(rows, "mla_fp8", 512))
    keys = torch.full((1, 132), 0xFF, dtype=torch.uint8)
    store_index_keys(torch.zeros(1, 128), slots(0), keys, 1, "index_k")
    assert not unpack_index_pages(keys, 1, "index_k", 128).any()
    v4 = torch.full((1, 576 * 2), 0xFF, dtype=torch.uint8)
    store_v4_rows(torch.zeros(1, 448), torch.zeros(1, 64), slots(0), v4, 1)
    assert all(not part.any() for part in unpack_v4_pages(v4, 1))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-30, 1e-6, 1.0, 1e30, 3.4e38, float("inf")])
def test_conversion_saturates_and_never_makes_nan(magnitude: float) -> None:
    values = torch.tensor([[magnitude, -magnitude, 0.0, magnitude / 3]])
    payload, scale = fp8.quantize(values)
    decoded = fp8.decode(payload, scale)
    assert decoded.isfinite().all()
    assert decoded[0, 0] == -decoded[0, 1]
    payload, exponent = fp8.quantize_ue8m0(values)
    assert not payload.float().isnan().any()
    assert int(exponent) < 255


def test_nan_stays_visible_after_packing() -> None:
    latent = torch.zeros(1, 128)
    latent[0, 3] = float("nan")
    for layout in ("mla_bf16", "mla_fp8", "mla_fp32"):
        packed = pack_rows(latent, torch.zeros(1, 2), layout)
        assert unpack_rows(packed, layout, 128)[0][0, 3].isnan()
    _, exponent = fp8.quantize_ue8m0(latent)
    assert fp8.scale_of_ue8m0(exponent).isnan().all()


@pytest.mark.parametrize(("layout", "row_bytes"), ROW_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipped_tokens_and_other_rows_change_no_byte(layout, row_bytes, dtype) -> None:
    rows = torch.randint(0, 256, (6, row_bytes), dtype=torch.uint8)
    before = rows.clone()
    latent, rope = torch.randn(4, 512, dtype=dtype), torch.randn(4, 64, dtype=dtype)
    store_rows(latent, rope, slots(4, -1, 2, -1), rows, layout)
    assert torch.equal(rows[[0, 1, 3, 5]], before[[0, 1, 3, 5]])
    assert torch.equal(rows[[4, 2]], pack_rows(latent[[0, 2]], rope[[0, 2]], layout))
    store_rows(latent, rope, slots(-1, -1, -1, -1), rows, layout)
    store_rows(latent[:0], rope[:0], slots(), rows, layout)
    assert torch.equal(rows[[0, 1, 3, 5]], before[[0, 1, 3, 5]])


@pytest.mark.parametrize("layout", ["index_k", "index_fp32"])
@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 256])
def test_index_keys_touch_only_their_own_slots(layout: str, page_size: int) -> None:
    width = 128
    page_bytes = page_size * (width + 4 if layout == "index_k" else 4 * width)
    pages = torch.zeros(4, page_bytes, dtype=torch.uint8)
    every = torch.randn(4 * page_size, width)
    store_index_keys(every, torch.arange(4 * page_size), pages, page_size, layout)
    before = unpack_index_pages(pages, page_size, layout, width).view(-1, width)
    chosen = torch.randperm(4 * page_size)[:3]
    new = torch.randn(4, width)
    store_index_keys(new, torch.cat([chosen, slots(-1)]), pages, page_size, layout)
    after = unpack_index_pages(pages, page_size, layout, width).view(-1, width)
    changed = torch.zeros(4 * page_size, dtype=torch.bool)
    changed[chosen] = True
    assert torch.equal(after[~changed], before[~changed])
    assert torch.allclose(after[chosen], new[:3], atol=0.3, rtol=0.07)


def test_rows_may_be_a_slice_with_guards_around_it() -> None:
    pool = torch.full((3, 4, 24), 7, dtype=torch.uint8)
    store_rows(torch.ones(1, 8), torch.ones(1, 4), slots(2), pool[1, :, :], "mla_bf16")
    assert (pool[[0, 2]] == 7).all()
    assert (pool[1, [0, 1, 3]] == 7).all()
    wide = torch.full((4, 27), 7, dtype=torch.uint8)
    store_rows(torch.ones(1, 8), torch.ones(1, 4), slots(3), wide[:, 1:25], "mla_bf16")
    assert (wide[:, [0, 25, 26]] == 7).all()
    assert raw(wide[3, 1:25]) == b"\x80\x3f" * 12


@pytest.mark.parametrize("slot", [-2, 4])
def test_a_slot_outside_the_pool_is_refused(slot: int) -> None:
    with pytest.raises(KernelError, match=str(slot)):
        store_rows(
            torch.ones(1, 8),
            torch.ones(1, 4),
            slots(slot),
            torch.zeros(4, 24, dtype=torch.uint8),
            "mla_bf16",
        )
    with pytest.raises(KernelError, match=str(slot)):
        pages = torch.zeros(2, 2 * 12, dtype=torch.uint8)
        store_index_keys(torch.ones(1, 8), slots(slot), pages, 2, "index_k")


def test_a_mismatch_names_both_sides() -> None:
    rows = torch.zeros(4, 24, dtype=torch.uint8)
    with pytest.raises(KernelError, match=r"rope_TR is float32 \[2, 4\].*T=1"):
        store_rows(torch.ones(1, 8), torch.ones(2, 4), slots(0), rows, "mla_bf16")
    with pytest.raises(KernelError, match=r"rows_NX is uint8 \[4, 24\].*48"):
        store_rows(torch.ones(1, 8), torch.ones(1, 4), slots(0), rows, "mla_fp32")
    with pytest.raises(KernelError, match=r"slots_T is int32.*int64"):
        store_rows(torch.ones(1, 8), torch.ones(1, 4), slots(0).int(), rows, "mla_bf16")
    with pytest.raises(KernelError, match="mla_int3"):
        store_rows(torch.ones(1, 8), torch.ones(1, 4), slots(0), rows, "mla_int3")
    with pytest.raises(KernelError, match="multiple of 128"):
        store_rows(torch.ones(1, 8), torch.ones(1, 4), slots(0), rows, "mla_fp8")
    with pytest.raises(KernelError, match="index_x"):
        store_index_keys(torch.ones(1, 8), slots(0), rows, 2, "index_x")
    with pytest.raises(KernelError, match="37441"):
        unpack_v4_pages(torch.zeros(1, 37_441, dtype=torch.uint8), 64)
