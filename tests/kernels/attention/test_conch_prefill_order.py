# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The order of prefill programs, by which those that share keys run at once.

So they do on GPUs with one L2, and on GPUs of several dies, each with an L2 of its own.
"""

import dataclasses
import importlib
import math

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    INTERPRETED,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)
from vllm.attention.ops.conch.plan import Config, Order
from vllm.attention.ops.conch.prefill import head_and_tile
from vllm.triton_utils import tl, triton

schedule_module = importlib.import_module("vllm.attention.ops.conch.schedule")


@triton.jit
def order_kernel(
    out_ptr,
    num_tiles,
    num_blocks,
    KV_HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    last = KV_HEADS * SHARING * num_tiles - 1
    program = tl.minimum(tl.arange(0, PROGRAMS), last)
    head, tile = head_and_tile(
        program, num_tiles, num_blocks, KV_HEADS, SHARING, LANES, BLOCK
    )
    tl.store(out_ptr + 2 * program, head)
    tl.store(out_ptr + 2 * program + 1, tile)


def order(
    num_tiles: int,
    heads: int,
    sharing: int = 1,
    lanes: int = 1,
    block: int | None = 1,
    num_blocks: int = 0,
) -> list[tuple[int, int]]:
    """(Head tile, tile of rows) of every program; each pair is there once."""
    programs = heads * sharing * num_tiles
    found = torch.full((programs, 2), -1, dtype=torch.int32).to(DEVICE)
    padded = triton.next_power_of_2(programs)
    order_kernel[(1,)](
        found, num_tiles, num_blocks, heads, sharing, lanes, block, padded
    )
    pairs = [tuple(pair) for pair in found.tolist()]
    everything = {(h, i) for h in range(heads * sharing) for i in range(num_tiles)}
    assert len(pairs) == len(everything) and set(pairs) == everything
    return pairs


GRIDS = [
    (heads, num_tiles) for heads in (1, 3, 4, 8, 10, 24, 71) for num_tiles in (1, 7, 16)
]


@pytest.mark.parametrize("num_xcds", [4, 6, 8])
@pytest.mark.parametrize("heads,num_tiles", GRIDS)
def test_dies(heads, num_tiles, num_xcds):
    lanes = math.gcd(heads, num_xcds)
    pairs = order(num_tiles, heads, lanes=lanes, block=None)
    on_xcd = [pairs[xcd::num_xcds] for xcd in range(num_xcds)]
    for head in range(heads):
        homes = [xcd for xcd in on_xcd if any(h == head for h, _ in xcd)]
        # Fewer is not possible where all are to have the same work.
        assert len(homes) <= num_xcds // lanes
    for xcd in on_xcd:
        taken = [h for h, _ in xcd]
        assert taken == sorted(taken)  # one after the other
        for head in set(taken):
            tiles = [i for h, i in xcd if h == head]
            assert tiles == sorted(tiles)  # heaviest first
    # Within a lane the tiles go to its XCDs in turn, so all have the same work.
    sizes = [len(xcd) for xcd in on_xcd]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("sharing", [1, 4])
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize(
    "num_tiles, block, num_blocks", [(8, 4, 2), (9, 4, 2), (15, 4, 2), (15, 4, 0)]
)
def test_blocks(num_tiles, block, num_blocks, heads, sharing):
    """Of a block what reads one KV head comes before what reads the next."""
    whole = num_blocks * block
    expected = [
        (kv_head * sharing + sharer, tile)
        for first in range(0, whole, block)
        for kv_head in range(heads)
        for tile in range(first, first + block)
        for sharer in range(sharing)
    ]
    rest = [(h, i) for i in range(whole, num_tiles) for h in range(heads * sharing)]
    found = order(num_tiles, heads, sharing, block=block, num_blocks=num_blocks)
    assert found == expected + rest


def test_one_by_one():
    tiles = [tile for _, tile in order(16, heads=3, sharing=2)]
    assert tiles == sorted(tiles)


def test_whole_blocks():
    """Fewer than two are none: the heaviest tiles of all heads come first."""
    tile = Config(64, 64, 4, 1)
    blocks = [Order(1, 4 * 64).whole_blocks(tile, n) for n in (1, 7, 8, 11, 12)]
    assert blocks == [0, 0, 2, 2, 3]
    assert Order(8, None).whole_blocks(tile, 100) == 0


LENGTHS = [(1, 90), (70, 150), (33, 33), (0, 9)]


@pytest.mark.parametrize("num_xcds, block", [(8, None), (1, 4), (1, 2), (1, 0)])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 4, 16])
def test_attention(num_kv_heads, num_xcds, block, monkeypatch):
    """The work of every program is done once, whatever their order."""
    heads = {"num_query_heads": 2 * num_kv_heads, "num_kv_heads": num_kv_heads}
    batch = make_batch(LENGTHS, **heads)
    device = dataclasses.replace(make_schedule(batch).target, num_xcds=num_xcds)
    monkeypatch.setattr(schedule_module, "this_device", lambda index: device)
    schedule = make_schedule(batch, portable=True)
    if block is None:
        assert schedule.plan.order == Order(math.gcd(num_kv_heads, num_xcds), None)
    else:
        chosen = schedule.plan_for

        def plan_for(*args, **few):
            plan = chosen(*args, **few)
            rows = block * plan.prefill.block_m
            return dataclasses.replace(plan, order=Order(1, rows))

        schedule.plan_for = plan_for
    update(schedule, batch, num_prefills=2)
    if block:  # eight tiles of 32 rows
        tile = schedule.plan.prefill
        found = schedule.plan.order.whole_blocks(tile, schedule.num_items)
        assert found == 8 // block or not INTERPRETED
    check(batch, schedule)


def test_decodes_are_no_places_on_the_list():
    """Where the host knows how many prefills there are."""
    batch = make_batch([(1, 50)] * 20 + [(70, 150)], num_kv_heads=1)
    schedule = make_schedule(batch, portable=True)
    rows = 70 * schedule.plan.prefill_pack
    tiles = -(-rows // schedule.plan.prefill_rows)
    assert update(schedule, batch).num_items > tiles + 1
    assert not schedule.knows_prefills
    update(schedule, batch, num_prefills=1)
    assert schedule.knows_prefills
    if schedule.plan.split is None:
        # And what the decodes' own tokens may be in places of the last prefill's tile.
        places = (90 * schedule.plan.prefill_pack) // schedule.plan.prefill_rows + 1
        assert tiles <= schedule.num_items <= places
