# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plan for devices that need not be there: every shape gets tiles that can run."""

import itertools

import pytest
import torch

from tests.kernels.attention.conch_harness import make_batch, make_schedule
from vllm.attention.ops.conch.plan import (
    MAX_DECODE_QUERY_LEN,
    Device,
    Shape,
    make_plan,
)

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
    assert make_plan(shape, DEVICES[device], 1).unpacking == unpacking
