# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plan for devices that need not be there: every shape gets tiles that can run."""

import itertools

import pytest
import torch

from tests.kernels.attention.conch_harness import make_batch, make_schedule
from vllm.attention.ops.conch import hopper_prefill
from vllm.attention.ops.conch.plan import (
    MAX_DECODE_QUERY_LEN,
    Device,
    Shape,
    make_plan,
)
from vllm.triton_utils import triton

DEVICES = {
    "A100": Device("cuda", 80, 108, 163 * 1024),
    "L40S": Device("cuda", 89, 142, 99 * 1024),
    "H200": Device("cuda", 90, 132, 227 * 1024),
    "B200": Device("cuda", 100, 148, 227 * 1024),
    "RTX 5090": Device("cuda", 120, 170, 99 * 1024),
    "MI300X": Device("hip", "gfx942", 304, 64 * 1024),
    "MI355X": Device("hip", "gfx950", 256, 160 * 1024),
    "interpreter": Device("interpreter", 0, 4, 2**30),
}
SHAPES = [
    Shape(group * num_kv_heads, num_kv_heads, head_size, block_size, dtype, kv_dtype)
    for group, num_kv_heads, head_size, block_size, (
        dtype,
        kv_dtype,
    ) in itertools.product(
        [1, 5, 8, 71],
        [1, 8],
        [16, 64, 80, 128, 192, 256, 512],
        [16, 48, 128, 1056],
        [
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float8_e5m2),
            (torch.float32, torch.float32),
            (torch.float8_e4m3fn, torch.float8_e4m3fn),
        ],
    )
]


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_every_shape_has_a_plan(device):
    for shape, query_len in itertools.product(SHAPES, [1, 2, 5, MAX_DECODE_QUERY_LEN]):
        plan = make_plan(shape, device, query_len)
        assert plan.num_workers >= device.num_units
        assert plan.prefill_rows % plan.prefill.block_m == 0
        for config in (plan.decode, plan.prefill):
            assert config.block_m >= 16 and is_power_of_two(config.block_m)
            assert config.tile >= 16 and is_power_of_two(config.tile)
            assert config.num_warps in (1, 2, 4, 8, 16)
            assert config.num_stages >= 1
            # What must be in shared memory at once: one tile of K.
            tile = config.tile * shape.head_padded * shape.kv_dtype.itemsize
            assert tile <= device.shared_memory, (shape, config)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_a_plan_does_not_depend_on_the_batch(device):
    """Few compiled variants: the query length only widens the tile of decode rows."""
    for shape in SHAPES:
        plans = [
            make_plan(shape, device, n) for n in range(1, MAX_DECODE_QUERY_LEN + 1)
        ]
        assert len({plan.prefill for plan in plans}) == 1
        assert len({plan.num_workers for plan in plans}) == 1
        rows = [plan.decode.block_m for plan in plans]
        assert rows == sorted(rows) and len({plan.decode for plan in plans}) <= 5


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


@pytest.mark.parametrize("head_size", [64, 128, 256, 512])
@pytest.mark.parametrize("query", [torch.bfloat16, torch.float8_e4m3fn])
def test_fp8_caches_keep_off_wgmma(query, head_size):
    """See `plan.avoids_wgmma`: the portable kernels convert K and V in registers."""
    shape = Shape(64, 1, head_size, 16, query, torch.float8_e4m3fn)
    plan = make_plan(shape, DEVICES["H200"], MAX_DECODE_QUERY_LEN)
    assert plan.decode.block_m < 64 and plan.prefill.block_m < 64
