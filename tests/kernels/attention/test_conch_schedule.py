# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""VarlenSchedule: how work is cut must not show in the result, from step to step."""

import dataclasses
from collections import defaultdict
from random import Random

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    HALF_DTYPES,
    ON_GPU,
    VarlenSchedule,
    attend,
    check,
    compare,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)
from vllm.attention.ops.conch.plan import MAX_DECODE_QUERY_LEN

LONG = 20000 if ON_GPU else 300
BATCHES = {
    "one_long": [(1, LONG)],
    "ragged": [(1, LONG), (0, 0), (1, 1), (1, 17), (0, 9), (1, LONG // 3), (3, 50)],
    "verify": [(5, LONG), (16, 40), (2, LONG // 2)],
    "short": [(1, 5), (1, 16), (1, 1)],
    "mixed": [(1, LONG), (40, 75), (1, 33), (20, 20), (1, 1)],
    "no_decode": [(33, 50), (17, 17)],
    "empty": [(0, 0), (0, 5)],
    "even": [(1, LONG // 3)] * 3,
}


FP8_CACHE = {"kv_dtype": torch.float8_e5m2, "dtype": HALF_DTYPES[-1]}
# Heads one after the other on one line of tiles, or abreast.
ORDERS = {"in_line": None, "abreast": 1}
in_both_orders = pytest.mark.parametrize(
    "abreast_tiles", ORDERS.values(), ids=ORDERS.keys()
)


def planned(
    schedule: VarlenSchedule,
    *,
    tile: int | None = None,
    abreast_tiles: int | None = None,
) -> VarlenSchedule:
    """The schedule with other choices than its plan's."""
    chosen = schedule.plan_for

    def plan_for(max_query_len: int, **few: bool):
        plan = dataclasses.replace(
            chosen(max_query_len, **few), abreast_tiles=abreast_tiles
        )
        if tile is None:
            return plan
        return dataclasses.replace(
            plan,
            decode=dataclasses.replace(plan.decode, tile=tile),
            prefill=dataclasses.replace(plan.prefill, tile=tile),
        )

    schedule.plan_for = plan_for
    return schedule


@in_both_orders
@pytest.mark.parametrize("num_workers", [1, 2, 3, 7, 16, 41])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_any_number_of_workers(lengths, num_workers, abreast_tiles):
    batch = make_batch(lengths, dtype=torch.float32)
    schedule = make_schedule(batch, num_workers=num_workers)
    check(batch, update(planned(schedule, abreast_tiles=abreast_tiles), batch))


@in_both_orders
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 50},
        {"causal": False},
        FP8_CACHE,
        FP8_CACHE | {"sliding_window": 50},
        FP8_CACHE | {"causal": False},
    ],
)
@pytest.mark.parametrize("num_workers", [3, 16])
@pytest.mark.parametrize("name", ["ragged", "verify"])
def test_workers_with_masks(name, num_workers, options, abreast_tiles):
    batch = make_batch(BATCHES[name], **options)
    schedule = make_schedule(batch, num_workers=num_workers)
    check(batch, update(planned(schedule, abreast_tiles=abreast_tiles), batch))


def parts_of_rows(schedule: VarlenSchedule) -> dict[tuple, list[tuple]]:
    """Parts, (tiles of keys, place), by row: (sequence, tile of query rows, KV head).

    Follows a worker over its piece as the decode kernel does, without a window.
    """
    shape, config = schedule.shape, schedule.plan.decode
    sequences = schedule.sequences.tolist()
    parts = defaultdict(list)
    for record in schedule.workers.tolist():
        entry, kv_head, m_block, tile, remaining, _, abreast, piece, first = record[
            4:13
        ]
        if remaining:
            assert record[:4] == sequences[entry]
        while remaining:
            sequence, _, query_len, seq_len = sequences[entry]
            end = min(tile + remaining, max(-(-seq_len // config.tile), 1))
            parts[sequence, m_block, kv_head].append((range(tile, end), first + piece))
            remaining -= end - tile
            tile = 0
            kv_head += abreast
            if kv_head >= shape.num_kv_heads:
                kv_head, m_block = kv_head - shape.num_kv_heads, m_block + 1
            if m_block == -(-query_len * shape.group // config.block_m):
                entry, m_block = entry + 1, 0
    return parts


@in_both_orders
@pytest.mark.parametrize("num_workers", [3, 4, 16, 200])
@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize(
    "name", ["one_long", "ragged", "verify", "short", "mixed", "even"]
)
def test_every_tile_is_in_one_part(name, num_kv_heads, num_workers, abreast_tiles):
    batch = make_batch(BATCHES[name], num_query_heads=16, num_kv_heads=num_kv_heads)
    schedule = make_schedule(batch, num_workers=num_workers)
    schedule.workers.fill_(12345)
    update(planned(schedule, abreast_tiles=abreast_tiles), batch)
    config = schedule.plan.decode
    mixed = batch.max_query_len > MAX_DECODE_QUERY_LEN
    most = schedule.longest_decode if mixed else MAX_DECODE_QUERY_LEN
    rows = {
        (sequence, m_block, kv_head): max(-(-seq_len // config.tile), 1)
        for sequence, (query_len, seq_len) in enumerate(BATCHES[name])
        for m_block in range(-(-query_len * 16 // num_kv_heads // config.block_m))
        for kv_head in range(num_kv_heads)
        if query_len <= most
    }
    parts = parts_of_rows(schedule)
    assert parts.keys() == rows.keys()
    for row, num_tiles in rows.items():
        parts[row].sort(key=lambda part: part[0].start)
        tiles = [tile for part, _ in parts[row] for tile in part]
        assert tiles == list(range(num_tiles))
        # Those who combine a row find its parts at consecutive places.
        places = [place for _, place in parts[row]]
        assert places == list(range(places[0], places[0] + len(places)))
        assert places[0] >= 0 and places[-1] < num_workers
    # Nobody goes on with two rows, or leaves two, at one place.
    for end in (0, -1):
        cut = [p[end][1] for p in parts.values() if len(p) > 1]
        assert len(cut) == len(set(cut))


@in_both_orders
def test_heads_abreast_are_read_at_the_same_time(abreast_tiles):
    batch = make_batch([(1, LONG)], num_kv_heads=4)
    schedule = make_schedule(batch, num_workers=12)
    update(planned(schedule, abreast_tiles=abreast_tiles), batch)
    heads = schedule.workers[schedule.workers[:, 8] > 0, 5].tolist()
    assert heads == ([0, 1, 2, 3] * 3 if abreast_tiles else sorted(heads))


@pytest.mark.parametrize("abreast_tiles", [19, 20])
def test_heads_go_abreast_from_a_number_of_tiles(abreast_tiles):
    batch = make_batch([(1, 16 * 38)], num_kv_heads=2)
    schedule = make_schedule(batch, num_workers=4)
    # 2 heads of 38 tiles are 19 for each of 4 workers.
    update(planned(schedule, tile=16, abreast_tiles=abreast_tiles), batch)
    assert schedule.workers[:, 10].tolist() == [2 if abreast_tiles == 19 else 1] * 4


@pytest.mark.parametrize("num_kv_heads", [1, 4])
@pytest.mark.parametrize("decode_query_len", [1, 2, 5, 16, 20])
def test_decode_query_len(decode_query_len, num_kv_heads):
    """Which kernel a sequence takes in a mixed batch."""
    lengths = [(1, 90), (2, 70), (5, 40), (6, 30), (16, 33), (20, 250), (20, 18)]
    batch = make_batch(lengths, num_kv_heads=num_kv_heads)
    # So many workers that even the last sequence, with rows that see no key, is cut.
    options = {"decode_query_len": decode_query_len, "num_workers": 200}
    check(batch, update(make_schedule(batch, **options), batch))


@pytest.mark.parametrize(
    "group, decode_query_len, longest",
    [(1, 1, 16), (4, 1, 4), (4, 5, 8), (6, 1, 2), (16, 1, 1), (32, 3, 3)],
)
def test_short_queries_beside_a_prefill_are_decodes(group, decode_query_len, longest):
    """As long as they fit the tile of rows that decodes need anyway."""
    lengths = [(1, 30), (longest, 90), (longest + 1, 60), (40, 40)]
    batch = make_batch(lengths, num_query_heads=2 * group, num_kv_heads=2, head_size=16)
    schedule = make_schedule(batch, decode_query_len=decode_query_len, num_workers=7)
    schedule.sequences.fill_(-1)
    check(batch, update(schedule, batch))
    assert schedule.sequences[:, 0].tolist() == [0, 1, -1, -1]
    assert set(schedule.work[:, 0].tolist()) - {-1} == {2, 3}


@in_both_orders
@pytest.mark.parametrize(
    "tiles, num_workers, longest, is_whole",
    [
        ([5, 5, 5], 12, 3, True),  # 30 tiles of keys: 12 pieces in 6 rows
        ([5, 5, 5], 9, 4, False),  # of 4 tiles at most there would be 12 pieces too
        ([7], 4, 4, True),
        ([7], 3, 5, False),
        ([10, 3], 8, 4, True),  # 3 pieces and 1 in each of two rows
        ([10, 3, 3], 10, 4, True),
        ([10, 3, 3], 8, 4, False),
        ([264], 33, 17, True),  # one tile more than 528 / 33: 16 pieces in each row
        ([132], 33, 8, False),  # one more of eight is too much
        ([1, 1], 9, 1, True),
    ],
)
def test_rows_begin_with_a_piece(tiles, num_workers, longest, is_whole, abreast_tiles):
    """Where workers suffice, none has tiles of two rows, and pieces are no longer."""
    schedule = make_schedule(make_batch([(1, 1)]), num_workers=num_workers)
    tile = schedule.plan_for(1).decode.tile
    lengths = [(1, count * tile) for count in tiles]
    batch = make_batch(lengths, num_query_heads=4, num_kv_heads=2)
    schedule = make_schedule(batch, num_workers=num_workers)
    update(planned(schedule, abreast_tiles=abreast_tiles), batch)
    pieces = defaultdict(list)  # tiles of each part, by place
    for parts in parts_of_rows(schedule).values():
        for part, place in parts:
            pieces[place].append(len(part))
    assert max(map(sum, pieces.values())) == longest
    assert all(len(parts) == 1 for parts in pieces.values()) == is_whole


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_no_piece_has_a_segment_more(batch_invariant):
    """Where workers have slots for so many segments, one more could be too much."""
    options = {"num_workers": 33, "batch_invariant": batch_invariant}
    schedule = make_schedule(make_batch([(1, 1)]), **options)
    plan = schedule.plan_for(1)
    seq_len = 264 * (plan.segment or plan.decode.tile)
    batch = make_batch([(1, seq_len)], num_query_heads=4, num_kv_heads=2)
    schedule = update(make_schedule(batch, **options), batch)
    # In 33 pieces of 2 rows there are 16 tiles, in 16 pieces of each row 16 or 17.
    assert schedule.workers[0, 9] == (16 if batch_invariant else 17)


@pytest.mark.parametrize("neighbours", [[], [(40, 75)], [(0, 0), (33, 33)]])
def test_a_long_decode_keeps_all_workers_busy(neighbours):
    """Also beside a prefill: each worker leaves a partial of the row that was cut."""
    batch = make_batch([*neighbours, (1, LONG)], num_kv_heads=1)
    schedule = make_schedule(batch, num_workers=5)
    check(batch, update(schedule, batch))
    written = schedule.partials[0].isfinite().flatten(1).any(1)
    assert written.sum() == schedule.num_workers


@pytest.mark.parametrize("options", [{}, {"sliding_window": 37}, {"causal": False}])
@pytest.mark.parametrize("block_size", [16, 48, 64, 80])
@pytest.mark.parametrize("tile", [32, 64])
def test_tiles_against_pages(tile, block_size, options):
    """A tile is part of a page, some whole pages, or begins and ends in two."""
    for lengths in [(1, 150), (1, 65), (4, 63)], [(1, 129), (40, 150), (20, 20)]:
        batch = make_batch(lengths, num_kv_heads=1, block_size=block_size, **options)
        schedule = make_schedule(batch, num_workers=3, portable=True)
        check(batch, update(planned(schedule, tile=tile), batch))


def test_one_schedule_serves_changing_batches():
    """Lengths, sequences and kinds of batch change; what a step leaves harms none."""
    largest = make_batch([(60, 60)] * 7)
    schedule = make_schedule(largest, num_workers=5)
    steps = ["mixed", "one_long", "ragged", "short", "empty", "verify", "no_decode"]
    for step, name in enumerate(steps + steps[::-1]):
        layers = [make_batch(BATCHES[name], seed=2 * step + i) for i in range(2)]
        for layer in layers:
            # Page numbers are drawn anew, but lengths are those of the step.
            check(
                layer, schedule if layer is not layers[0] else update(schedule, layer)
            )


def test_a_schedule_larger_than_the_batch():
    batch = make_batch(BATCHES["ragged"])
    options = {"max_num_seqs": 1500, "max_num_tokens": 5000, "num_workers": 6}
    schedule = make_schedule(batch, **options)
    check(batch, update(schedule, batch))


@pytest.mark.parametrize("prefill", [[], [(18, 40)]])
def test_more_sequences_than_the_schedule_kernel_reads_at_once(prefill):
    lengths = [(1, 40), (3, 20)] + [(0, 7)] * 1030 + [(2, 33), *prefill, (1, 1)]
    lengths[500] = (1, 200)
    batch = make_batch(lengths, num_query_heads=1, num_kv_heads=1, head_size=16)
    check(batch, update(make_schedule(batch, num_workers=3), batch))


@in_both_orders
@pytest.mark.parametrize("name", ["ragged", "verify", "mixed"])
def test_bitwise_repeatable(name, abreast_tiles):
    batch = make_batch(BATCHES[name], dtype=HALF_DTYPES[-1])
    schedule = make_schedule(batch, num_workers=None if ON_GPU else 6)
    schedule = planned(schedule, abreast_tiles=abreast_tiles)
    expected, expected_lse = attend(batch, update(schedule, batch))
    for _ in range(100 if ON_GPU else 2):
        output, lse = attend(batch, schedule)
        assert torch.equal(output, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("name", ["ragged", "mixed"])
def test_a_sequence_alone_and_in_a_batch(name):
    batch = make_batch(BATCHES[name])
    output, lse = check(batch)
    starts = batch.query_start_loc.tolist()
    for i, (start, end) in enumerate(zip(starts, starts[1:])):
        alone = make_batch([BATCHES[name][i]], padding=0)
        alone.query = batch.query[start:end]
        alone.key_cache, alone.value_cache = batch.key_cache, batch.value_cache
        alone.block_table = batch.block_table[i : i + 1]
        check(alone)
        # What the batch gave for these rows is right for the sequence alone.
        compare(alone, output[start:end], lse[start:end])


@pytest.mark.parametrize("pack", [1, 3, 4, 5, 71])
@pytest.mark.parametrize("seed", range(5))
def test_prefill_items_come_heaviest_first(seed, pack):
    """Every tile of rows once, by the end of its keys; then nothing but empty items."""
    random = Random(seed)
    lengths = [
        (query_len, query_len + random.choice([0, 0, 1, 16, 31, 90]))
        for query_len in random.choices([0, 1, 2, 5, 17, 33, 64, 100], k=6)
    ]
    batch = make_batch(lengths, num_query_heads=2 * pack, num_kv_heads=2)
    schedule = make_schedule(batch, portable=True)
    schedule.splits = None  # as if they were more than a GPU has multiprocessors
    schedule.items.fill_(12345)
    schedule.update(
        batch.query_start_loc,
        batch.seq_lens,
        max_query_len=100,
        num_tokens=len(batch.query),
    )
    block_m = schedule.plan.prefill_rows
    tiles = []
    for sequence, (query_len, seq_len) in enumerate(lengths):
        start = int(batch.query_start_loc[sequence])
        is_prefill = query_len > schedule.longest_decode
        for tile in range(-(-query_len * pack // block_m) if is_prefill else 0):
            tokens = min((tile + 1) * block_m // pack, query_len)
            end = seq_len - query_len + tokens
            order = (-end, sequence, -tile)
            tiles.append((order, (sequence, tile, start, query_len, seq_len)))
    expected = [item for _, item in sorted(tiles)]
    items = [tuple(item[:5]) for item in schedule.items.tolist()]
    assert items[: len(expected)] == expected
    assert all(item[0] == -1 for item in items[len(expected) :])


@pytest.mark.skipif(ON_GPU, reason="a CPU's schedule runs in the interpreter")
def test_a_cpu_with_a_number_is_the_interpreter():
    batch = make_batch([(1, 5)])
    schedules = [make_schedule(batch, device=name) for name in ("cpu", "cpu:0")]
    assert schedules[0].target == schedules[1].target
