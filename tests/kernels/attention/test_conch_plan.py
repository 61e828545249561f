# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plan for devices that need not be there: every shape gets tiles that can run."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.attention.conch_devices import DEVICES, KIB
from tests.kernels.attention.conch_harness import make_batch, make_schedule
from vllm.attention.ops.conch import hopper_decode, hopper_prefill, plan
from vllm.attention.ops.conch.plan import (
    MAX_DECODE_QUERY_LEN,
    AttentionPlan,
    Config,
    Device,
    Order,
    Shape,
    check_layer_shape,
    count_xcds,
    make_plan,
    this_device,
)
from vllm.triton_utils import triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E4M3_FNUZ, E5M2 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
)
INTERPRETER = this_device(None)
ALL_DEVICES = DEVICES | {"interpreter": INTERPRETER}
H200 = DEVICES["H200"]


def layer(
    head_size: int,
    query_dtype: torch.dtype = BF16,
    kv_dtype: torch.dtype | None = None,
    group: int = 4,
    block_size: int = 16,
) -> Shape:
    """8 KV heads of that size."""
    kv_dtype = kv_dtype or query_dtype
    return Shape(8 * group, 8, head_size, block_size, query_dtype, kv_dtype)


def portable(shape: Shape, device: Device, max_query_len: int = 1) -> AttentionPlan:
    return make_plan(shape, device, max_query_len, portable=True)


shapes = st.builds(
    lambda group, heads, size, page, dtypes: Shape(
        group * heads, heads, size, 16 * page, *dtypes
    ),
    st.integers(1, 128),
    st.integers(1, 64),
    st.integers(16, 512),
    st.integers(1, 80),
    st.sampled_from(
        [
            *itertools.product((BF16, FP16, FP32), (E4M3, E4M3_FNUZ, E5M2)),
            *((dtype, dtype) for dtype in (BF16, FP16, FP32, E4M3)),
        ]
    ),
)
lengths = st.integers(1, MAX_DECODE_QUERY_LEN)
devices = st.sampled_from(list(ALL_DEVICES.values()))


def configs(chosen: AttentionPlan) -> list[Config]:
    found = [chosen.decode, chosen.prefill, chosen.prefill_boxes]
    return [config for config in found if config]


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


@settings(deadline=None, max_examples=500)
@given(shapes, devices, lengths)
def test_every_shape_has_a_plan(shape, device, max_query_len):
    check_layer_shape(shape)
    chosen = make_plan(shape, device, max_query_len)
    assert chosen.num_workers >= device.num_units
    for config in (chosen.prefill, chosen.prefill_boxes or chosen.prefill):
        assert chosen.prefill_rows % config.block_m == 0
    for config in configs(chosen):
        assert config.block_m >= 16 and is_power_of_two(config.block_m)
        assert config.tile >= 16 and is_power_of_two(config.tile)
        masked_tile = config.masked_tile or config.tile
        assert 16 <= masked_tile <= config.tile and is_power_of_two(masked_tile)
        assert config.num_warps in (4, 8, 16)
        assert config.num_stages >= 1
        if device.backend != "cuda":
            assert config.num_stages == 1 and config.max_registers is None
        if config.max_registers:
            threads = 32 * config.num_warps
            assert config.max_registers <= 255
            assert config.max_registers * threads <= 65536


@settings(deadline=None, max_examples=500)
@given(shapes, devices, lengths)
def test_tiles_fit(shape, device, max_query_len):
    """The least that a tile takes: compiling shows what it does take."""
    chosen = portable(shape, device, max_query_len)
    for config in configs(chosen):
        query = config.block_m * shape.head_padded * shape.query_dtype.itemsize
        tiles = plan.tile_bytes(shape, config.tile)
        if config.num_stages > 1:  # two tiles of K and of V, one in use
            assert query + 2 * tiles <= device.shared_memory
        else:
            assert max(query, tiles // 2) <= device.shared_memory
        # Half of a thread's registers for its share of the accumulators, or all of
        # those that a Hopper warpgroup or AMD's matrix units add.
        wave = 64 if str(device.arch).startswith("gfx9") else 32
        accumulators = config.block_m * shape.head_padded // (wave * config.num_warps)
        assert accumulators <= 128 or device.backend == "interpreter"


@settings(deadline=None, max_examples=300)
@given(shapes, devices)
def test_a_plan_does_not_depend_on_the_batch(shape, device):
    """Few compiled variants: the query length only widens the tile of decode rows."""
    plans = [make_plan(shape, device, n) for n in range(1, MAX_DECODE_QUERY_LEN + 1)]
    assert len({(chosen.prefill, chosen.prefill_boxes) for chosen in plans}) == 1
    assert len({chosen.num_workers for chosen in plans}) == 1
    rows = [chosen.decode.block_m for chosen in plans]
    assert rows == sorted(rows) and len({chosen.decode for chosen in plans}) <= 5


@settings(deadline=None, max_examples=300)
@given(shapes, devices, lengths)
def test_layers_of_one_kind_share_variants(shape, device, max_query_len):
    """The number of KV heads is no reason for other tiles."""
    other = shape._replace(num_query_heads=shape.group, num_kv_heads=1)
    one, two = (make_plan(s, device, max_query_len) for s in (shape, other))
    assert list(configs(one)) == list(configs(two))


@settings(deadline=None, max_examples=300)
@given(shapes, lengths)
def test_no_wgmma_with_converted_operands(shape, max_query_len):
    """Hopper takes wgmma from 64 rows on; prefills then wait for their query."""
    chosen = portable(shape, H200, max_query_len)
    from_fp8 = shape.kv_dtype.itemsize == 1
    converts = shape.query_dtype == FP32 or from_fp8
    assert plan.avoids_wgmma(shape, H200) == from_fp8
    for config in (chosen.decode, chosen.prefill):
        assert config.block_m < 64 or config.synced or not converts
    assert not chosen.decode.synced
    if chosen.prefill.synced and shape.kv_dtype == plan.KV_INT4_DTYPE:
        assert chosen.prefill.tile == 32  # 64 keys gave wrong results


@settings(deadline=None, max_examples=300)
@given(shapes, devices)
def test_boxes(shape, device):
    """Only of 16 bits and within a page, and items are whole tiles."""
    few = make_plan(shape, device, 1, True, small=True)
    for chosen in portable(shape, device), make_plan(shape, device, 1), few:
        boxes = chosen.prefill_boxes
        if boxes:
            assert device in (H200, DEVICES["B200"])
            assert shape.query_dtype.itemsize == shape.kv_dtype.itemsize == 2
            assert shape.block_size % boxes.tile == 0
            assert chosen.prefill_rows % boxes.block_m == 0
            assert chosen.prefill_rows % chosen.prefill.block_m == 0


@pytest.mark.parametrize("block_size, expected", [(16, False), (64, True), (192, True)])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
def test_boxes_need_pages_of_a_tile(head_size, block_size, expected):
    shape = layer(head_size, block_size=block_size)
    for name in ("H200", "B200"):
        chosen = portable(shape, DEVICES[name])
        assert (chosen.prefill_boxes is not None) == expected
        fp8 = portable(shape._replace(kv_dtype=E5M2), DEVICES[name])
        assert fp8.prefill_boxes is None
    for name in ("A100", "L40S", "RTX 5090", "MI300X", "interpreter"):
        assert portable(shape, ALL_DEVICES[name]).prefill_boxes is None


# Short queries pack heads on Hopper, also where their tiles are too many to be split.
@example(Shape(270, 27, 64, 16, BF16, BF16), H200)
@settings(deadline=None, max_examples=300)
@given(shapes, devices)
def test_order(shape, device):
    """An L2 of its own for each die and KV head, or reads that meet in one for all."""
    usual = make_plan(shape, device, 1)
    order = usual.order
    few = make_plan(shape, device, 1, split_query_len=17)
    segments = make_plan(shape, device, 1, batch_invariant=True)
    assert shape.num_kv_heads % order.lanes == 0
    if device.num_xcds > 1:
        assert order == Order(math.gcd(shape.num_kv_heads, device.num_xcds), None)
        assert order == few.order == segments.order
        return
    assert segments.order == Order(1, 0)
    for chosen in usual, few:
        rows = 128 * device.num_units * chosen.prefill_pack // shape.group
        assert rows > 0
        if shape.head_padded > 128 or chosen.split:
            rows = 0
        assert chosen.order == Order(1, rows)


def test_blocks_are_what_runs_at_once(triton_of_hopper):
    """On an H200, 132 programs of 128 rows or 264 of 64, of all heads of a KV head."""
    small_pages, pages = layer(128), layer(128, block_size=128)
    chosen = portable(small_pages, H200)
    assert chosen.order.tiles(chosen.prefill) == 264
    assert portable(pages, H200).order.tiles(portable(pages, H200).prefill_boxes) == 132
    chosen = make_plan(small_pages, H200, 1)  # each of four heads has tiles of its own
    assert chosen.prefill_pack == 1 and chosen.order.tiles(chosen.prefill) == 66
    assert portable(layer(256), H200).order.tiles(chosen.prefill) == 1
    assert plan.plan_order(small_pages, replace(H200, num_xcds=6), 4, True).lanes == 2
    assert plan.plan_order(small_pages, replace(H200, num_xcds=4), 4, True).lanes == 4


# What comments in the plan give rates for: (head size, cache, page, decode, prefill).
MEASURED = [
    (64, BF16, 16, Config(16, 128, 4, 5), Config(64, 64, 4, 3)),
    (64, BF16, 128, Config(16, 128, 4, 5), Config(64, 64, 4, 3)),
    (128, BF16, 16, Config(16, 64, 4, 5), Config(64, 64, 4, 3)),
    (128, BF16, 128, Config(16, 64, 4, 5), Config(128, 64, 4, 2, masked_tile=32)),
    (128, E4M3, 16, Config(16, 128, 4, 5), Config(64, 128, 4, 2, synced=True)),
]


@pytest.mark.parametrize("head_size, kv_dtype, page, decode, prefill", MEASURED)
def test_measured_on_an_h200(head_size, kv_dtype, page, decode, prefill):
    for query_dtype in (BF16, FP16):
        cache = query_dtype if kv_dtype == BF16 else kv_dtype
        chosen = portable(layer(head_size, query_dtype, cache, block_size=page), H200)
        assert chosen.decode == decode
        assert (chosen.prefill_boxes or chosen.prefill) == prefill


@pytest.mark.parametrize("page", [16, 128])
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_items_fill_multiprocessors(head_size, page):
    """Two programs of 64 rows to each, or one of 128."""
    chosen = portable(layer(head_size, block_size=page), H200)
    assert chosen.prefill_rows == 128
    converted = portable(layer(head_size, BF16, E5M2, block_size=page), H200)
    assert converted.prefill_rows == converted.prefill.block_m


@pytest.mark.parametrize("name", ["A100", "L40S", "RTX 5090"])
def test_products_in_registers(name):
    """Rows as the accumulators leave room for, whatever the cache."""
    for kv_dtype in (BF16, E5M2):
        rows = [
            portable(layer(d, BF16, kv_dtype), DEVICES[name]).prefill.block_m
            for d in (64, 80, 128, 256, 512)
        ]
        assert rows == [128, 64, 64, 64, 32]


@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_blackwell_has_rows_for_tensor_memory(head_size):
    for arch in (100, 103):
        device = replace(DEVICES["B200"], arch=arch)
        assert portable(layer(head_size), device).prefill.block_m == 128


@pytest.mark.parametrize("name", ["MI250X", "MI300X", "MI355X"])
def test_cdna(name):
    """Four waves, and a tile of V in 64 KiB of LDS."""
    for head_size in (64, 128, 256, 512):
        for config in (
            portable(layer(head_size), DEVICES[name]).prefill,
            portable(layer(head_size), DEVICES[name], 16).decode,
        ):
            assert config.num_warps == 4
            assert config.tile * head_size * 2 <= 64 * KIB


def test_rdna():
    """More and smaller waves for wider heads, whose accumulators they share."""
    device = DEVICES["RX 7900 XTX"]
    for query_dtype, kv_dtype in ((BF16, BF16), (FP16, E5M2), (FP32, FP32)):
        for head_size in (64, 128, 256, 512):
            chosen = portable(layer(head_size, query_dtype, kv_dtype), device, 16)
            for config in (chosen.decode, chosen.prefill):
                assert config.num_warps >= (16 if head_size >= 256 else 8)
            assert chosen.decode.block_m <= (32 if head_size <= 128 else 16)
    converted = portable(layer(128, BF16, E5M2), device).prefill
    assert converted.block_m < portable(layer(128), device).prefill.block_m
    # RDNA4 is of that kind.
    assert portable(layer(128), replace(device, arch="gfx1201")) == portable(
        layer(128), device
    )


def test_fp32_products():
    """Tensor cores have tf32; of heads over 128 three products do not fit."""
    for device in ALL_DEVICES.values():
        for head_size, most, precision in ((64, 32, "tf32x3"), (128, 32, "tf32x3"),
                                           (256, 16, "ieee")):  # fmt: skip
            for kv_dtype in (FP32, E5M2):
                chosen = portable(layer(head_size, FP32, kv_dtype), device, 16)
                for config in (chosen.decode, chosen.prefill):
                    if device.backend == "cuda":
                        assert config.precision == precision
                        assert config.max_registers == 255
                    else:
                        assert config.precision == "ieee"
                    if device != INTERPRETER:
                        assert config.block_m <= most


def test_decode_rows():
    """The rows of a tile are tokens times heads, to a limit; then there are more."""
    assert portable(layer(128, group=1), H200, 1).decode.block_m == 16
    assert portable(layer(128, group=4), DEVICES["A100"], 5).decode.block_m == 32
    # Measured on Hopper: more than 16 rows go to a whole warpgroup.
    assert portable(layer(128, group=4), H200, 5).decode.block_m == 64
    assert portable(layer(128, group=8), H200, 16).decode.block_m == 64
    assert portable(layer(512, group=8), H200, 16).decode.block_m == 32
    assert portable(layer(128, BF16, E4M3, group=8), H200, 16).decode.block_m == 32
    assert portable(layer(128, group=71), INTERPRETER, 16).decode.block_m == 32


def test_decode_tiles():
    """16 KiB of K whatever the head and cache, less where rows take the registers."""
    sizes = (16, 64, 128, 256, 512)

    def tiles(device: Device, kv_dtype: torch.dtype, max_query_len: int) -> list[int]:
        plans = [
            portable(layer(d, BF16, kv_dtype), device, max_query_len) for d in sizes
        ]
        return [chosen.decode.tile for chosen in plans]

    for device in (DEVICES["A100"], H200):
        assert tiles(device, BF16, 1) == [128, 128, 64, 32, 16]
        assert tiles(device, E5M2, 1) == [128, 128, 128, 64, 32]
        assert tiles(device, BF16, 16) == [64, 64, 64, 16, 16]


def test_decode_stages():
    """Five in a third of the shared memory, or three."""
    assert portable(layer(128), DEVICES["A100"]).decode.num_stages == 3
    assert portable(layer(128), H200).decode.num_stages == 5
    small_memory = replace(H200, shared_memory=99 * KIB)
    assert portable(layer(128), small_memory).decode.num_stages == 3


def test_the_compiler_is_let_alone_where_it_was_measured():
    assert portable(layer(128), H200).decode.max_registers is None
    assert portable(layer(256), H200).decode.max_registers == 255
    assert portable(layer(128), DEVICES["A100"]).decode.max_registers == 255
    assert "maxnreg" not in Config(16, 16, 4, 1).constants()
    assert Config(16, 16, 4, 1, max_registers=255).constants()["maxnreg"] == 255


@pytest.fixture
def triton_of_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hopper_prefill, "TRITON_VERSIONS", (plan.triton.__version__,))
    make_plan.cache_clear()
    yield
    make_plan.cache_clear()


@pytest.mark.parametrize("group, pack", [(1, 1), (4, 4), (5, 1), (6, 2), (64, 16)])
def test_few_tiles_of_hopper(group, pack, triton_of_hopper):
    """Heads share tiles that one head's rows would not fill; else nothing changes."""
    shape = layer(128)._replace(num_query_heads=8 * group)
    many, short, long = (
        make_plan(shape, H200, 1, split_query_len=length) for length in (None, 17, 128)
    )
    assert many.split is None
    packs = [chosen.prefill_pack for chosen in (many, short, long)]
    assert packs == [1, pack, 1]
    for chosen in short, long:
        tiles = shape.num_query_heads // chosen.prefill_pack
        fits = tiles <= H200.num_units
        assert chosen.split == (plan.Split(128, tiles, 132) if fits else None)
        assert chosen.head_tiles == tiles
        heads = shape.num_query_heads
        others = {"prefill_pack": 1, "head_tiles": heads, "order": many.order}
        assert replace(chosen, split=None, **others) == many


def test_split_plans(triton_of_hopper):
    shape = layer(128)
    assert make_plan(shape, H200, 1, False, True, 17).split is None
    for device in DEVICES.values():
        chosen = make_plan(shape, device, 1, True, False, 17)
        assert chosen.split.max_tiles * chosen.split.head_tiles <= device.num_units
        for config in configs(chosen):
            assert chosen.split.keys % config.tile == 0


@pytest.mark.parametrize("head_size, rows", [(40, 64), (128, 64), (256, 64)])
def test_small_tiles_of_hopper(head_size, rows, triton_of_hopper):
    """Half as many rows, in the portable kernels too, which strides may call for."""
    shape = layer(head_size, block_size=128)
    usual, small = (make_plan(shape, H200, 1, small=n) for n in (False, True))
    assert small.small and not usual.small
    assert usual.prefill_rows == 2 * rows
    chosen = (small.prefill, small.prefill_boxes or small.prefill)
    assert small.prefill_rows == rows == chosen[0].block_m == chosen[1].block_m
    assert all(config.num_warps == 4 for config in chosen)
    changed = ("prefill", "prefill_boxes", "prefill_rows", "small")
    assert replace(usual, **{x: getattr(small, x) for x in changed}) == small


def test_small_tiles_of_pages():
    """Where boxes have more rows than what reads small pages: those have them too."""
    usual, small = (
        make_plan(layer(128, block_size=128), H200, 1, True, small=few)
        for few in (False, True)
    )
    assert usual.prefill_boxes.block_m == 2 * small.prefill_boxes.block_m
    assert small.prefill_boxes == small.prefill == usual.prefill
    changed = {"prefill_boxes": small.prefill, "prefill_rows": 64, "small": True}
    assert replace(usual, **changed) == small


@pytest.mark.parametrize(
    "shape, device, options",
    [
        (layer(512), H200, {}),
        (layer(128, E4M3, E4M3), H200, {}),
        (layer(128, FP32), H200, {}),
        (layer(128), H200, {"portable": True}),
        (layer(64, block_size=128), H200, {"portable": True}),
        (layer(128, block_size=128), H200, {"batch_invariant": True}),
        (layer(128), DEVICES["A100"], {}),
        (layer(128), DEVICES["MI300X"], {}),
    ],
)
def test_no_small_tiles(shape, device, options, triton_of_hopper):
    usual = make_plan(shape, device, 1, **options)
    assert make_plan(shape, device, 1, small=True, **options) == usual


@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_hopper_kernel(head_size, triton_of_hopper, monkeypatch):
    shape, paged = layer(head_size), layer(head_size, block_size=128)
    chosen = make_plan(shape, H200, 1)
    assert chosen.hopper and not portable(shape, H200).hopper
    # The schedule and the portable kernel, which strides may call for, share rows.
    rows = hopper_prefill.CONFIGS[head_size].block_m
    for config in (chosen.prefill, make_plan(paged, H200, 1).prefill_boxes):
        assert rows % config.block_m == 0
    assert chosen.prefill_pack == hopper_prefill.packed_heads(shape.group)
    for other in (
        (layer(head_size, BF16, E4M3), H200),
        (layer(head_size, FP32), H200),
        (layer(508), H200),
        (shape, DEVICES["A100"]),
        (shape, DEVICES["B200"]),
        (shape, DEVICES["MI300X"]),
        (shape, INTERPRETER),
    ):
        assert not make_plan(*other, 1).hopper
    monkeypatch.setattr(hopper_prefill, "TRITON_VERSIONS", ("2.",))
    make_plan.cache_clear()
    assert not make_plan(shape, H200, 1).hopper


@pytest.mark.parametrize(
    "name,native",
    [
        ("A100", None),
        ("L40S", E4M3),
        ("H200", E4M3),
        ("B200", E4M3),
        ("RTX 5090", E4M3),
        ("MI250X", None),
        ("MI300X", E4M3_FNUZ),
        ("MI355X", E4M3),
        ("RX 7900 XTX", None),
    ],
)
def test_e4m3_is_read_by_arithmetic_without_an_instruction(name, native):
    for dtype in (BF16, FP16, FP32, E5M2):
        assert plan.plan_kv_format(dtype, DEVICES[name]) is None
    for dtype, how in ((E4M3, "e4m3fn"), (E4M3_FNUZ, "e4m3fnuz")):
        expected = None if dtype == native else how
        assert plan.plan_kv_format(dtype, DEVICES[name]) == expected
        assert plan.plan_kv_format(dtype, INTERPRETER) is None


def test_bytes_of_a_cache():
    sizes = {BF16: 256, FP32: 512, E4M3: 128, torch.int8: 128, torch.uint8: 64}
    for dtype, size in sizes.items():
        assert layer(128, BF16, dtype).row_bytes == size
    assert layer(16, BF16, torch.uint8).head_padded == 32


def test_dies():
    assert [DEVICES[n].num_xcds for n in ("MI250X", "MI300X", "MI355X")] == [1, 8, 8]
    # MI300A, and partitions of an MI300X.
    assert [count_xcds("gfx942", n) for n in (228, 152, 38, 20)] == [6, 4, 1, 1]
    assert count_xcds(90, 132) == 1


@pytest.mark.parametrize(
    "change,name",
    [
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_query_heads": 12}, "num_query_heads"),
        ({"num_query_heads": 0}, "num_query_heads"),
        ({"head_size": 8}, "head_size"),
        ({"head_size": 513}, "head_size"),
        ({"block_size": 8}, "block_size"),
        ({"block_size": 0}, "block_size"),
        ({"query_dtype": torch.float64}, "query_dtype"),
        ({"kv_dtype": FP16}, "kv_dtype"),
    ],
)
def test_refused_shapes(change, name):
    with pytest.raises(ValueError, match=name):
        check_layer_shape(layer(128)._replace(**change))


@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.parametrize("decode_query_len", [1, 5, 16])
def test_scratch_holds_every_plan_of_a_schedule(decode_query_len, group):
    batch = make_batch([(1, 20)], num_query_heads=group, num_kv_heads=1)
    schedule = make_schedule(batch, decode_query_len=decode_query_len)
    rows = schedule.partials[0].shape[1]
    for max_query_len in (1, decode_query_len, MAX_DECODE_QUERY_LEN, 17, 1000):
        assert schedule.plan_for(max_query_len).decode.block_m <= rows


# Query, cache, head size, and Hopper's kernel with the rows of its items.
HOPPER_PREFILLS = [
    ("bfloat16", "bfloat16", 128, ("16-bit", 128)),
    ("float16", "float16", 40, ("16-bit", 128)),
    ("bfloat16", "bfloat16", 512, ("16-bit", 64)),
    ("float8_e4m3fn", "float8_e4m3fn", 64, ("fp8", 192)),
    ("float8_e4m3fn", "float8_e4m3fn", 48, ("fp8", 192)),
    ("float8_e4m3fn", "float8_e4m3fn", 128, ("fp8", 192)),
    ("float8_e4m3fn", "float8_e4m3fn", 192, ("fp8", 128)),
    ("float8_e4m3fn", "float8_e4m3fn", 40, None),
    ("float8_e4m3fn", "float8_e4m3fn", 512, None),
    ("bfloat16", "float8_e4m3fn", 128, None),
    ("float16", "float8_e5m2", 128, None),
    ("float32", "float32", 128, None),
]


@pytest.mark.parametrize("query, cache, head_size, expected", HOPPER_PREFILLS)
def test_which_prefills_have_a_kernel_for_hopper(
    query, cache, head_size, expected, monkeypatch
):
    monkeypatch.setattr(hopper_prefill, "TRITON_VERSIONS", (triton.__version__,))
    dtypes = getattr(torch, query), getattr(torch, cache)
    shape = Shape(8, 2, head_size, 16, *dtypes)
    for name, device in DEVICES.items():
        plan = make_plan.__wrapped__(shape, device, 1)
        if expected is None or name != "H200":
            assert plan.hopper is None
            assert plan.prefill_rows == plan.prefill.block_m
        else:
            assert (plan.hopper, plan.prefill_rows) == expected
        assert make_plan.__wrapped__(shape, device, 1, portable=True).hopper is None
    monkeypatch.setattr(hopper_prefill, "TRITON_VERSIONS", ("0.",))
    assert make_plan.__wrapped__(shape, DEVICES["H200"], 1).hopper is None


@pytest.mark.parametrize(
    "shape, expected",
    [
        (layer(128), True),
        (layer(128, FP16, group=64, block_size=48), True),
        (layer(72, group=1), True),
        (layer(128, group=7), False),
        (layer(128, group=128), False),
        (layer(64), False),
        (layer(256), False),
        (layer(128, FP32), False),
        (layer(128, BF16, E4M3), False),
        (layer(128, E4M3), False),
    ],
)
def test_which_decodes_have_a_kernel_for_hopper(
    shape, expected, triton_of_hopper, monkeypatch
):
    for length in (1, MAX_DECODE_QUERY_LEN):
        chosen = make_plan(shape, H200, length)
        assert chosen.hopper_decode == expected
        if expected:  # the tensor cores' rows hold a tile of query rows, whole heads
            assert shape.group <= chosen.decode.block_m <= hopper_decode.CONSUMER_ROWS
    assert not portable(shape, H200).hopper_decode
    assert not make_plan(shape, H200, 1, batch_invariant=True).hopper_decode
    for name, device in ALL_DEVICES.items():
        assert name == "H200" or not make_plan(shape, device, 1).hopper_decode
    monkeypatch.setattr(hopper_prefill, "TRITON_VERSIONS", ("0.",))
    make_plan.cache_clear()
    assert not make_plan(shape, H200, 1).hopper_decode


@pytest.mark.parametrize("head_size", [64, 128, 256, 512])
@pytest.mark.parametrize("query", [torch.bfloat16, torch.float8_e4m3fn])
def test_fp8_caches_keep_off_wgmma(query, head_size):
    """See `plan.avoids_wgmma`: the portable kernels convert K and V in registers."""
    shape = Shape(64, 1, head_size, 16, query, torch.float8_e4m3fn)
    plan = make_plan(shape, DEVICES["H200"], MAX_DECODE_QUERY_LEN)
    assert plan.decode.block_m < 64
    assert plan.prefill.block_m < 64 or (plan.prefill.synced and head_size == 128)


def test_kv_heads_go_abreast_where_that_is_faster():
    bf16 = Shape(32, 8, 128, 16, torch.bfloat16, torch.bfloat16)
    assert make_plan(bf16, DEVICES["H200"], 1).abreast_tiles == 48
    one_head = bf16._replace(num_query_heads=8, num_kv_heads=1)
    fp8 = bf16._replace(kv_dtype=torch.float8_e4m3fn)
    for shape in (one_head, fp8):
        assert make_plan(shape, DEVICES["H200"], 1).abreast_tiles is None


@pytest.mark.parametrize(
    "kv_dtype, device, unpacking",
    [
        (torch.float8_e4m3fn, "H200", "ptx"),
        (torch.float8_e4m3fn, "A100", "triton"),
        (torch.float8_e5m2, "A100", "ptx"),
        (torch.float8_e5m2, "MI300X", "triton"),
        (torch.float8_e4m3fnuz, "MI300X", "triton"),
        (torch.float8_e4m3fn, "interpreter", "triton"),
    ],
)
def test_fp8_values_are_taken_apart_with_what_the_device_has(
    kv_dtype, device, unpacking
):
    shape = Shape(32, 8, 128, 16, torch.bfloat16, kv_dtype)
    assert make_plan(shape, ALL_DEVICES[device], 1).unpacking == unpacking


@settings(deadline=None, max_examples=200)
@given(shapes, devices)
def test_batch_invariance_is_for_every_length_of_a_query(shape, device):
    """What decides about the order of sums; see `segments`."""
    plans = [
        make_plan(shape, device, length, batch_invariant=True)
        for length in range(1, MAX_DECODE_QUERY_LEN + 1)
    ]
    kernels = [config for chosen in plans for config in configs(chosen)]
    assert len({(config.tile, config.precision) for config in kernels}) == 1
    assert {chosen.hopper for chosen in plans} == {None}
    (segment,) = {chosen.segment for chosen in plans}
    for config in kernels:
        assert segment % config.tile == 0 and segment > config.tile
        assert config.masked_tile in (None, config.tile)
        assert config.constants()["enable_fp_fusion"] is False
        if device.backend == "hip" and device.arch.startswith("gfx9"):
            assert config.constants()["matrix_instr_nonkdim"] == 16
        other_instructions = device.backend == "cuda" and device.arch // 10 == 10
        pairs = device.backend == "cuda" and shape.kv_dtype.itemsize == 1
        assert config.block_m < 64 or not (other_instructions or pairs)


@settings(deadline=None)
@given(shapes, devices, lengths)
def test_slots_have_room_for_the_rows_of_a_decode(shape, device, length):
    chosen = make_plan(shape, device, length, batch_invariant=True)
    needed = min(shape.group * length, chosen.decode.block_m)
    assert needed <= chosen.segment_rows <= chosen.decode.block_m
