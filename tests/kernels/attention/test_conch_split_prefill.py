# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prefills of few query tiles, whose keys are split over the device.

The parts are planned for a device of 32 multiprocessors in the interpreter, and for the
GPU's own number of them on a GPU.
"""

import dataclasses
from random import Random

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    DTYPES,
    HALF_DTYPES,
    KV_FP8_DTYPES,
    ON_GPU,
    attend,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
    with_tiles,
)
from vllm.attention.ops.conch import schedule as schedule_module
from vllm.attention.ops.conch.schedule import LAST_KEY, VarlenSchedule

HALF = HALF_DTYPES[-1]
# Long enough on a GPU, too, to have several parts of 128 keys and more.
LONG = 5000 if ON_GPU else 700
BATCHES = {
    "one": [(20, LONG)],
    "several": [(17, LONG), (40, 300), (24, 24)],
    "several_tiles": [(90, LONG // 2)],
    "beside_decodes": [(1, 90), (33, LONG), (0, 0), (2, 300), (1, 1)],
    "no_context": [(100, 100)],
    "dummy": [(20, 1), (18, LONG)],
}
all_batches = pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())


@pytest.fixture(autouse=True)
def many_multiprocessors(monkeypatch):
    if not ON_GPU:
        found = schedule_module.this_device(None)
        device = dataclasses.replace(found, num_units=32)
        monkeypatch.setattr(schedule_module, "this_device", lambda index: device)


def split_schedule(batch, **options) -> VarlenSchedule:
    """Updated, as by a host that knows how many prefills there are."""
    schedule = make_schedule(batch, **options)
    is_prefill = batch.query_start_loc.diff() > schedule.longest_decode
    return update(schedule, batch, num_prefills=int(is_prefill.sum()))


def num_splits(schedule: VarlenSchedule) -> int:
    """Tiles of rows whose keys are split."""
    assert schedule.plan.split is not None
    return int(schedule.splits[0])


def check_split(batch, **options) -> VarlenSchedule:
    schedule = split_schedule(batch, **options)
    assert num_splits(schedule) > 0
    check(batch, schedule)
    return schedule


@pytest.mark.parametrize("dtype", DTYPES)
@all_batches
def test_batches(lengths, dtype):
    batch = make_batch(lengths, num_query_heads=4, num_kv_heads=1, dtype=dtype)
    schedule = split_schedule(batch)
    # A GPU's parts have more keys than there are without context.
    assert num_splits(schedule) > 0 or (ON_GPU and lengths == BATCHES["no_context"])
    check(batch, schedule)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (3, 1), (8, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_heads_and_pages(heads, block_size):
    num_query_heads, num_kv_heads = heads
    options = {"num_query_heads": num_query_heads, "num_kv_heads": num_kv_heads}
    options["block_size"] = block_size
    for dtype in DTYPES[0], DTYPES[-1]:
        check_split(make_batch([(18, LONG)], dtype=dtype, **options))


@pytest.mark.parametrize("head_size", [40, 64, 80, 128, 256, 512])
def test_head_sizes(head_size):
    batch = make_batch([(50, LONG)], head_size=head_size, dtype=HALF, num_kv_heads=1)
    check_split(batch)


def per_head(*values: float) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"softcap": 5.0, "logit_std": 4.0},
        {"softcap": 80.0, "logit_std": 4.0},
        {"sinks": per_head(1.5, -2.0, 0.0, 6.0)},
        {"alibi_slopes": per_head(0.5, 0.25, 0.125, 0.0625)},
        {"mm_prefix_range": torch.tensor([[[90, 120]]], dtype=torch.int32).to(DEVICE)},
        {"kv_dtype": KV_FP8_DTYPES[0], "k_scale": 0.5, "v_scale": 2.0},
        {"layout": "HND"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("dtype", [DTYPES[0], HALF], ids=str)
def test_options(options, dtype):
    check_split(make_batch([(30, LONG)], num_kv_heads=1, dtype=dtype, **options))


def test_output_in_fp8():
    scale = torch.tensor([0.25], device=DEVICE)
    check_split(
        make_batch(
            [(30, LONG)],
            num_kv_heads=1,
            dtype=HALF,
            output_scale=scale,
            output_dtype=torch.float8_e4m3fn,
        )
    )


def test_several_tiles_of_an_item():
    """Each leaves its parts in a place of its own."""
    for lengths in BATCHES["several"], BATCHES["several_tiles"]:
        batch = make_batch(lengths, num_kv_heads=1, dtype=HALF)
        schedule = make_schedule(batch, portable=True)
        with_tiles(schedule, schedule.plan.prefill.tile, halves=True)
        update(schedule, batch, num_prefills=len(lengths))
        assert schedule.plan.prefill_rows >= 2 * schedule.plan.prefill.block_m
        assert num_splits(schedule) > 0
        check(batch, schedule)


def test_the_portable_kernel():
    for dtype in DTYPES:
        batch = make_batch(BATCHES["several"], num_kv_heads=1, dtype=dtype)
        check_split(batch, portable=True)


@pytest.mark.parametrize("seed", range(6))
def test_parts_hold_every_key_once(seed):
    """Of each tile of rows; and no more parts than the schedule has room for."""
    random = Random(seed)
    scale = 20 if ON_GPU else 1
    while True:
        lengths = [
            (query_len, query_len + scale * random.choice([0, 5, 90, 400, 2000]))
            for query_len in random.choices([0, 1, 3, 17, 33, 64], k=4)
        ]
        batch = make_batch(lengths, num_query_heads=2, num_kv_heads=1, head_size=16)
        schedule = make_schedule(batch, portable=True)
        schedule.items.fill_(12345)
        if max(lengths)[0] <= 16:
            continue
        schedule = split_schedule(batch, portable=True)
        if schedule.plan.split is not None:
            break
    split = schedule.plan.split
    items = [item for item in schedule.items.tolist() if item[0] >= 0]
    assert len(items) <= schedule.num_items == split.max_items
    assert schedule.items[len(items) :, 0].eq(-1).all()
    tiles: dict[tuple[int, int], list] = {}
    firsts = []
    for place, item in enumerate(items):
        tiles.setdefault((item[0], item[1]), []).append((item[5], item[6]))
        assert item[2] == int(batch.query_start_loc[item[0]])
        assert tuple(item[3:5]) == lengths[item[0]]
        parts = item[7]
        if parts > 1:
            firsts.append(place)
            following = items[place + 1 : place + parts]
            assert all(other[7] == 0 and other[:5] == item[:5] for other in following)
    for parts_of_tile in tiles.values():
        ends = [0, *(end for _, end in parts_of_tile)]
        assert [first for first, _ in parts_of_tile] == ends[:-1]
        assert ends[-1] == LAST_KEY.value
        assert all(end % split.keys == 0 for end in ends)
    expected = {
        (sequence, tile)
        for sequence, (query_len, _) in enumerate(lengths)
        if query_len > schedule.longest_decode
        for tile in range(-(-query_len * 2 // schedule.plan.prefill_rows))
    }
    assert tiles.keys() == expected
    assert schedule.splits[0].tolist() == [len(firsts)]
    assert schedule.splits[1 : 1 + len(firsts), 0].tolist() == firsts


def test_as_many_tiles_as_multiprocessors():
    """Of one prefill none is split, as all are equal; of two the longer one may be."""
    options = {"num_query_heads": 4, "num_kv_heads": 1, "dtype": HALF, "padding": 0}
    batch = make_batch([(17, LONG), (20, 40)], **options)
    schedule = make_schedule(batch)
    plan = schedule.plan_for(20, split=True)
    rows = plan.prefill_rows // plan.prefill_pack
    one = plan.split.max_tiles * rows
    two = (plan.split.max_tiles - 1) * rows  # and a tile begun for each
    assert schedule.split_plan(20, one, 1) is None
    assert schedule.split_plan(20, one - rows, 1) is not None
    assert schedule.split_plan(20, two, 2) is not None
    assert schedule.split_plan(20, two + rows, 2) is None


def test_long_sequences_get_the_parts():
    """In proportion to their keys, and as many as fill the device."""
    batch = make_batch([(17, LONG), (20, 40)], num_kv_heads=1, dtype=HALF)
    schedule = split_schedule(batch)
    split = schedule.plan.split
    items = [item for item in schedule.items.tolist() if item[0] >= 0]
    parts = {item[0]: item[7] for item in items if item[7] > 0}
    assert parts[1] == 1
    filled = len(items) * split.head_tiles
    most = -(-LONG // split.keys) // 2
    assert filled <= split.num_units
    assert filled > 0.9 * split.num_units or parts[0] == most


def test_one_schedule_with_and_without_parts():
    """What a batch leaves harms none that follows."""
    many = [(200, 300)] * (40 if ON_GPU else 8)
    batches = [BATCHES["one"], many, [(1, 90)], BATCHES["several"]]
    made = [make_batch(lengths, num_kv_heads=1, dtype=HALF) for lengths in batches]
    largest = dict(max_num_seqs=40, max_num_tokens=9000)
    schedule = make_schedule(made[0], **largest)
    is_split = []
    for batch in (*made, *made[::-1]):
        check(batch, update(schedule, batch))
        is_split.append(schedule.plan.split is not None)
    expected = [True, False, False, True]
    assert is_split == expected + expected[::-1]


def test_other_lengths_in_the_same_launches():
    """As a CUDA graph replays them: only what the schedule kernel reads is new."""
    lengths = [[(20, LONG), (1, 60)], [(17, 40), (4, LONG)], [(20, 300), (1, LONG)]]
    made = [make_batch(pair, num_kv_heads=1, dtype=HALF, seed=7) for pair in lengths]
    for batch in made:
        batch.max_query_len = 21
    schedule = make_schedule(made[0])
    choices = []
    for batch in made:
        check(batch, update(schedule, batch))
        choices.append((schedule.choice, schedule.num_items))
    assert len(set(choices)) == 1 and schedule.plan.split is not None


def test_a_graph_fits_any_number_of_sequences():
    """Without the host's word, only the number of tokens decides whether to split."""
    num_tokens = 520 if ON_GPU else 120
    batches = [(num_tokens, 800)], [(17, 17)] + [(1, 9)] * (num_tokens - 17)
    made = [make_batch(pair, num_kv_heads=1, dtype=HALF) for pair in batches]
    schedule = make_schedule(made[1])
    choices = []
    for batch in made:
        batch.max_query_len = num_tokens
        check(batch, update(schedule, batch))
        choices.append(schedule.choice)
    assert choices[0] == choices[1]


def test_bitwise_repeatable():
    batch = make_batch(BATCHES["several"], num_kv_heads=1, dtype=HALF)
    schedule = split_schedule(batch)
    expected, expected_lse = attend(batch, schedule)
    for _ in range(100 if ON_GPU else 2):
        output, lse = attend(batch, schedule)
        assert torch.equal(output, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("window, batch_invariant", [(50, False), (None, True)])
def test_keys_that_are_not_split(window, batch_invariant):
    batch = make_batch([(30, LONG)], num_kv_heads=1, sliding_window=window)
    schedule = split_schedule(batch, batch_invariant=batch_invariant)
    assert schedule.plan.split is None
    check(batch, schedule)
