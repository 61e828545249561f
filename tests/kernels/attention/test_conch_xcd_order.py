# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The order of prefill programs on GPUs of several dies, each with an L2 of its own."""

import dataclasses
import importlib
import math

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)
from vllm.attention.ops.conch.plan import head_lanes
from vllm.attention.ops.conch.prefill import head_and_item
from vllm.triton_utils import tl, triton

schedule_module = importlib.import_module("vllm.attention.ops.conch.schedule")


@triton.jit
def order_kernel(
    out_ptr, head_tiles, num_items, HEAD_LANES: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.arange(0, BLOCK)
    valid = program < head_tiles * num_items
    head_tile, item = head_and_item(program, head_tiles, num_items, HEAD_LANES)
    tl.store(out_ptr + 2 * program, head_tile, mask=valid)
    tl.store(out_ptr + 2 * program + 1, item, mask=valid)


def order(head_tiles: int, num_items: int, lanes: int) -> list[tuple[int, int]]:
    """(Head tile, item) of every program of a grid."""
    programs = head_tiles * num_items
    found = torch.full((programs, 2), -1, dtype=torch.int32).to(DEVICE)
    block = triton.next_power_of_2(programs)
    order_kernel[(1,)](found, head_tiles, num_items, lanes, block)
    return [tuple(pair) for pair in found.tolist()]


GRIDS = [
    (head_tiles, num_items)
    for head_tiles in (1, 3, 4, 8, 10, 24, 71)
    for num_items in (1, 7, 16)
]


@pytest.mark.parametrize("num_xcds", [4, 6, 8])
@pytest.mark.parametrize("head_tiles,num_items", GRIDS)
def test_order(head_tiles, num_items, num_xcds):
    lanes = head_lanes(head_tiles, num_xcds)
    pairs = order(head_tiles, num_items, lanes)
    everything = {(h, i) for h in range(head_tiles) for i in range(num_items)}
    assert len(pairs) == len(everything) and set(pairs) == everything

    on_xcd = [pairs[xcd::num_xcds] for xcd in range(num_xcds)]
    for head_tile in range(head_tiles):
        homes = [xcd for xcd in on_xcd if any(h == head_tile for h, _ in xcd)]
        # Fewer is not possible where all are to have the same work.
        assert len(homes) <= num_xcds // lanes
    for xcd in on_xcd:
        heads = [h for h, _ in xcd]
        assert heads == sorted(heads)  # one after the other
        for head_tile in set(heads):
            items = [i for h, i in xcd if h == head_tile]
            assert items == sorted(items)  # heaviest first
    # Within a lane the items go to its XCDs in turn, so all have the same work.
    sizes = [len(xcd) for xcd in on_xcd]
    assert max(sizes) - min(sizes) <= 1


def test_lanes():
    """One die: no order at all. Else a divisor of the heads and of the dies."""
    assert head_lanes(8, 1) is None
    assert [head_lanes(h, 8) for h in (1, 4, 5, 8, 12, 32)] == [1, 4, 1, 8, 4, 8]
    assert all(head_lanes(h, 6) == math.gcd(h, 6) for h in range(1, 80))


@pytest.mark.parametrize("num_kv_heads", [1, 3, 4, 16])
def test_attention(num_kv_heads, monkeypatch):
    """The work of every program is done once, whatever their order."""
    lengths = [(1, 90), (70, 150), (33, 33), (0, 9)]
    heads = {"num_query_heads": 2 * num_kv_heads, "num_kv_heads": num_kv_heads}
    batch = make_batch(lengths, **heads)
    device = dataclasses.replace(make_schedule(batch).target, num_xcds=8)
    monkeypatch.setattr(schedule_module, "this_device", lambda index: device)
    schedule = update(make_schedule(batch, portable=True), batch)
    assert schedule.plan.head_lanes == math.gcd(num_kv_heads, 8)
    check(batch, schedule)
