# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Who works on what: one small kernel a step turns lengths into work lists.

Lengths are read on the device, so a captured CUDA graph replays with other
lengths: grids and buffers have fixed sizes, only the lists' contents change.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm.triton_utils import tl, triton

from .checks import LENGTH, check_tensor, reject, whole_number
from .combine import ITEM_FIELDS
from .decode import SEQUENCE_FIELDS, WORKER_FIELDS, decode_key_tiles, decode_rows
from .launch import Launch
from .limits import WIDEST_WINDOW, first_seen_key
from .overlap import Work, can_share, count_work, prefill_units
from .plan import (
    KV_INTEGER_DTYPES,
    MAX_DECODE_QUERY_LEN,
    SEGMENT_BYTES,
    SHORT_QUERY_LEN,
    SHORT_SEQ_LEN,
    AttentionPlan,
    Shape,
    check_layer_shape,
    make_plan,
    this_device,
)

# Workers and prefill items that one program of the schedule kernel fills in.
LANES = 16
MAX_SEQUENCES_AT_ONCE = 1024
# Without a prefill kernel the decode kernel takes every sequence.
ANY_QUERY_LEN = 2**31 - 1
# Tiles of a piece from which one more is worth it, see `whole_pieces`.
LONG_PIECE = 16
# End of the last part of a sequence's keys, a multiple of every tile.
LAST_KEY: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def load_lengths(
    query_start_loc_ptr, seq_lens_ptr, start, num_seqs, BLOCK: tl.constexpr
):
    """query_start, query_len and seq_len, [BLOCK] each; 0 past the last sequence."""
    sequence = start + tl.arange(0, BLOCK)
    valid = sequence < num_seqs
    query_start = tl.load(query_start_loc_ptr + sequence, mask=valid, other=0)
    query_end = tl.load(query_start_loc_ptr + sequence + 1, mask=valid, other=0)
    seq_len = tl.load(seq_lens_ptr + sequence, mask=valid, other=0)
    return sequence, query_start, query_end - query_start, seq_len


@triton.jit
def pick(match, values):
    """Values [BLOCK] at the one match of each lane of match [LANES, BLOCK]; else 0."""
    return tl.sum(tl.where(match, values[None, :], 0), 1)


@triton.jit
def load_decodes(
    query_start_loc_ptr, seq_lens_ptr, start, num_seqs, decode_query_len, window,
    ranges, prefix_ptr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr,
    CHUNK_LOOKBACK: tl.constexpr, RANGES_IN_WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `load_lengths` returns, and each sequence's tiles on the decode line (0: not
    a decode) and tiles per row."""
    sequence, query_start, query_len, seq_len = load_lengths(
        query_start_loc_ptr, seq_lens_ptr, start, num_seqs, BLOCK
    )
    is_decode = (query_len > 0) & (query_len <= decode_query_len)
    first_key = first_seen_key(
        query_len, seq_len, sequence, window, ranges, prefix_ptr,
        WINDOWED, CHUNK_LOOKBACK, RANGES_IN_WINDOW,
    )  # fmt: skip
    _, row_tiles = decode_key_tiles(first_key, seq_len, TILE)
    tiles = row_tiles * decode_rows(query_len, NUM_KV_HEADS, GROUP, BLOCK_M)
    tiles = tl.where(is_decode, tiles, 0)
    return sequence, query_start, query_len, seq_len, tiles, row_tiles


@triton.jit
def whole_pieces(
    query_start_loc_ptr, seq_lens_ptr, num_seqs, decode_query_len, window, ranges,
    prefix_ptr, tiles_per_piece, num_workers,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr,
    CHUNK_LOOKBACK: tl.constexpr, RANGES_IN_WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    LONG_PIECE: tl.constexpr,
):  # fmt: skip
    """Whether each row can begin with a piece, and the tiles of the longest piece then.

    So it can if workers suffice though a row's last piece may be short, and no piece is
    longer than tiles_per_piece, or of LONG_PIECE and more by one tile. Nobody then has
    parts of two rows, each of which would be begun, left and combined: on an H200 1 x
    5000 take 17.9 us so, not 19.8, and 16 x 8k with 5 query tokens 144.7, not 149.2.
    """
    most = tiles_per_piece
    if LONG_PIECE is not None:
        most += tl.where(tiles_per_piece >= LONG_PIECE, 1, 0)
    needed = 0
    longest = 1
    for start in range(0, num_seqs, BLOCK):
        _, _, _, _, tiles, row_tiles = load_decodes(
            query_start_loc_ptr, seq_lens_ptr, start, num_seqs, decode_query_len,
            window, ranges, prefix_ptr, NUM_KV_HEADS, GROUP, BLOCK_M, TILE, WINDOWED,
            CHUNK_LOOKBACK, RANGES_IN_WINDOW, BLOCK,
        )  # fmt: skip
        parts = tl.cdiv(row_tiles, most)
        needed += tl.sum(tiles // row_tiles * parts)
        part_tiles = tl.where(tiles > 0, tl.cdiv(row_tiles, parts), 0)
        longest = tl.maximum(longest, tl.max(part_tiles))
    return needed <= num_workers, longest


@triton.jit
def schedule_decode(
    query_start_loc_ptr, seq_lens_ptr, workers_ptr, sequences_ptr, arrivals_ptr,
    num_seqs, decode_query_len, window, ranges, prefix_ptr, first_worker, num_workers,
    NUM_WORKERS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, ABREAST: tl.constexpr,
    ABREAST_TILES: tl.constexpr, WINDOWED: tl.constexpr, CHUNK_LOOKBACK: tl.constexpr,
    RANGES_IN_WINDOW: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    LONG_PIECE: tl.constexpr,
):  # fmt: skip
    """Gives LANES workers their pieces; the first program also lists the sequences.

    All heads are one line of tiles, or, abreast, each of ABREAST has a line of its own.
    Where each row begins with a piece, it takes whole pieces of its line. Workers past
    num_workers have nothing to do.
    """
    total = 0
    for start in range(0, num_seqs, BLOCK):
        _, _, _, _, tiles, _ = load_decodes(
            query_start_loc_ptr, seq_lens_ptr, start, num_seqs, decode_query_len,
            window, ranges, prefix_ptr, NUM_KV_HEADS, GROUP, BLOCK_M, TILE, WINDOWED,
            CHUNK_LOOKBACK, RANGES_IN_WINDOW, BLOCK,
        )  # fmt: skip
        total += tl.sum(tiles)
    tiles_per_piece = tl.maximum(tl.cdiv(total, num_workers), 1)
    are_whole, whole_tiles = whole_pieces(
        query_start_loc_ptr, seq_lens_ptr, num_seqs, decode_query_len, window, ranges,
        prefix_ptr, tiles_per_piece, num_workers, NUM_KV_HEADS, GROUP, BLOCK_M, TILE,
        WINDOWED, CHUNK_LOOKBACK, RANGES_IN_WINDOW, BLOCK, LONG_PIECE,
    )  # fmt: skip
    tiles_per_piece = tl.where(are_whole, whole_tiles, tiles_per_piece)
    abreast = 1
    if ABREAST > 1:
        are_even = num_workers % ABREAST == 0  # as many for each line
        are_abreast = are_even & (tiles_per_piece >= ABREAST_TILES)
        abreast = tl.where(are_abreast, ABREAST, 1)

    worker = first_worker + tl.arange(0, LANES)
    first_head = worker % abreast
    piece = worker // abreast
    begin = piece * tiles_per_piece  # on the line of tiles
    num_tiles = tl.zeros([LANES], tl.int32)
    record = workers_ptr + worker * WORKER_FIELDS
    valid = worker < NUM_WORKERS
    tl.store(record + 9, tiles_per_piece + worker * 0, mask=valid)
    tl.store(record + 10, abreast + worker * 0, mask=valid)
    tl.store(record + 11, piece, mask=valid)
    tl.store(record + 12, first_head * (num_workers // abreast), mask=valid)
    tl.store(arrivals_ptr + worker, worker * 0, mask=valid)
    line = 0
    listed = 0
    for start in range(0, num_seqs, BLOCK):
        sequence, query_start, query_len, seq_len, tiles, row_tiles = load_decodes(
            query_start_loc_ptr, seq_lens_ptr, start, num_seqs, decode_query_len,
            window, ranges, prefix_ptr, NUM_KV_HEADS, GROUP, BLOCK_M, TILE, WINDOWED,
            CHUNK_LOOKBACK, RANGES_IN_WINDOW, BLOCK,
        )  # fmt: skip
        is_decode = tiles > 0
        # What a row takes of its line.
        places = tl.cdiv(row_tiles, tiles_per_piece) * tiles_per_piece
        places = tl.where(are_whole, places, row_tiles)
        taken = tiles // row_tiles * places // abreast
        end = line + tl.cumsum(taken, 0)
        entry = listed + tl.cumsum(is_decode.to(tl.int32), 0) - 1
        if first_worker == 0:
            listing = sequences_ptr + entry * SEQUENCE_FIELDS
            tl.store(listing, sequence, mask=is_decode)
            tl.store(listing + 1, query_start, mask=is_decode)
            tl.store(listing + 2, query_len, mask=is_decode)
            tl.store(listing + 3, seq_len, mask=is_decode)
        # The sequence in which each worker begins, if it is among these.
        match = (begin[:, None] >= (end - taken)[None, :]) & (
            begin[:, None] < end[None, :]
        )
        found = valid & (tl.sum(match.to(tl.int32), 1) > 0)
        row_places = tl.maximum(pick(match, places), 1)
        within = begin - pick(match, end - taken)
        row = within // row_places
        tile = within % row_places
        heads = NUM_KV_HEADS // abreast
        tl.store(record, pick(match, sequence), mask=found)
        tl.store(record + 1, pick(match, query_start), mask=found)
        tl.store(record + 2, pick(match, query_len), mask=found)
        tl.store(record + 3, pick(match, seq_len), mask=found)
        tl.store(record + 4, pick(match, entry), mask=found)
        tl.store(record + 5, row % heads * abreast + first_head, mask=found)
        tl.store(record + 6, row // heads, mask=found)
        tl.store(record + 7, tile, mask=found)
        left = tl.where(
            are_whole, pick(match, row_tiles) - tile, total // abreast - begin
        )
        num_tiles = tl.where(found, tl.minimum(left, tiles_per_piece), num_tiles)
        line += tl.sum(taken)
        listed += tl.sum(is_decode.to(tl.int32))
    tl.store(record + 8, num_tiles, mask=valid)


@triton.jit
def prefill_blocks(
    query_len, decode_query_len, PACK: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Tiles of query rows of a sequence; 0 for a decode."""
    blocks = tl.cdiv(query_len * PACK, BLOCK_M)
    return tl.where(query_len > decode_query_len, blocks, 0)


@triton.jit
def count_heavier(
    end, sequence_of, sequence, query_len, seq_len, blocks,
    PACK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """How many tiles of rows of other sequences come before each of some tiles.

    A causal tile's work grows with its end, one past the last key that it sees. In a
    sequence the ends grow with the tiles, so those past a bound are counted without
    looking at each. Of equal ends, that of the first sequence comes first.

    end and sequence_of are [LANES], of the tiles; the others [BLOCK], of the sequences.
    """
    bound = end[:, None] - (sequence[None, :] < sequence_of[:, None]).to(tl.int32)
    # Tile b ends (b + 1) * BLOCK_M // PACK tokens after the context, the last tile at
    # seq_len.
    tokens = tl.maximum(bound - (seq_len - query_len)[None, :] + 1, 0)
    before = tl.maximum(tokens * PACK - 1, 0) // BLOCK_M
    before = tl.minimum(before, (blocks - 1)[None, :])
    before += (seq_len[None, :] <= bound).to(tl.int32)
    counted = (blocks > 0)[None, :] & (sequence[None, :] != sequence_of[:, None])
    return tl.sum(tl.where(counted, blocks[None, :] - before, 0), 1)


@triton.jit
def schedule_prefill(
    query_start_loc_ptr, seq_lens_ptr, items_ptr,
    num_seqs, decode_query_len, first_item,
    PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Puts LANES prefill items where they belong on a list with the heaviest first."""
    item = first_item + tl.arange(0, LANES)
    sequence_of = tl.full([LANES], -1, tl.int32)
    m_block = tl.zeros([LANES], tl.int32)
    query_start_of = tl.zeros([LANES], tl.int32)
    query_len_of = tl.zeros([LANES], tl.int32)
    seq_len_of = tl.zeros([LANES], tl.int32)
    rank = tl.zeros([LANES], tl.int32)
    line = 0
    for start in range(0, num_seqs, BLOCK):
        sequence, query_start, query_len, seq_len = load_lengths(
            query_start_loc_ptr, seq_lens_ptr, start, num_seqs, BLOCK
        )
        blocks = prefill_blocks(query_len, decode_query_len, PACK, BLOCK_M)
        last = line + tl.cumsum(blocks, 0)
        match = (item[:, None] >= (last - blocks)[None, :]) & (
            item[:, None] < last[None, :]
        )
        found = tl.sum(match.to(tl.int32), 1) > 0
        sequence_of = tl.where(found, pick(match, sequence), sequence_of)
        m_block = tl.where(found, item - pick(match, last - blocks), m_block)
        query_start_of = tl.where(found, pick(match, query_start), query_start_of)
        query_len_of = tl.where(found, pick(match, query_len), query_len_of)
        seq_len_of = tl.where(found, pick(match, seq_len), seq_len_of)
        # Of its own sequence the tiles behind it come before it.
        rank = tl.where(found, pick(match, last) - 1 - item, rank)
        line += tl.sum(blocks)

    last_token = tl.minimum((m_block * BLOCK_M + BLOCK_M) // PACK, query_len_of)
    end = seq_len_of - query_len_of + last_token
    for start in range(0, num_seqs, BLOCK):
        sequence, query_start, query_len, seq_len = load_lengths(
            query_start_loc_ptr, seq_lens_ptr, start, num_seqs, BLOCK
        )
        blocks = prefill_blocks(query_len, decode_query_len, PACK, BLOCK_M)
        rank += count_heavier(
            end, sequence_of, sequence, query_len, seq_len, blocks, PACK, BLOCK_M
        )

    # Items past the last tile end the list.
    place = tl.where(sequence_of >= 0, rank, item)
    record = items_ptr + place * ITEM_FIELDS
    tl.store(record, sequence_of)
    tl.store(record + 1, m_block)
    tl.store(record + 2, query_start_of)
    tl.store(record + 3, query_len_of)
    tl.store(record + 4, seq_len_of)


@triton.jit
def count_parts(seq_len, total, num_units, SPLIT_KEYS: tl.constexpr):
    """Units of keys that a sequence has, and how many parts its tiles are cut into.

    Rounded down: if all are equal, there are no more parts than multiprocessors. A part
    has two units or more.
    """
    units = tl.cdiv(seq_len, SPLIT_KEYS)
    parts = tl.minimum(units * num_units // tl.maximum(total, 1), units // 2)
    return units, tl.maximum(parts, 1)


@triton.jit
def schedule_parts(
    query_start_loc_ptr, seq_lens_ptr, items_ptr, splits_ptr,
    num_seqs, decode_query_len, first_item, num_units,
    PACK: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_TILES: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Lists LANES parts of prefill tiles whose keys are split, and the tiles.

    Where tiles are fewer than multiprocessors. Each sequence's tiles have parts in
    proportion to its keys, so that all parts of a batch are of about one size.
    """
    total = 0
    for start in range(0, num_seqs, BLOCK):
        _, _, query_len, seq_len = load_lengths(
            query_start_loc_ptr, seq_lens_ptr, start, num_seqs, BLOCK
        )
        blocks = prefill_blocks(query_len, decode_query_len, PACK, BLOCK_M)
        total += tl.sum(blocks * tl.cdiv(seq_len, SPLIT_KEYS)) * HEAD_TILES

    item = first_item + tl.arange(0, LANES)
    line = 0
    num_splits = 0
    tl.store(items_ptr + item * ITEM_FIELDS, item * 0 - 1)
    tl.debug_barrier()  # then those that there are
    for start in range(0, num_seqs, BLOCK):
        sequence, query_start, query_len, seq_len = load_lengths(
            query_start_loc_ptr, seq_lens_ptr, start, num_seqs, BLOCK
        )
        blocks = prefill_blocks(query_len, decode_query_len, PACK, BLOCK_M)
        units, parts = count_parts(seq_len, total, num_units, SPLIT_KEYS)
        count = blocks * parts
        last = line + tl.cumsum(count, 0)
        match = (item[:, None] >= (last - count)[None, :]) & (
            item[:, None] < last[None, :]
        )
        found = tl.sum(match.to(tl.int32), 1) > 0
        parts_of = tl.maximum(pick(match, parts), 1)
        within = item - pick(match, last - count)
        part = within % parts_of
        part_keys = tl.cdiv(pick(match, units), parts_of) * SPLIT_KEYS
        end = tl.where(part == parts_of - 1, LAST_KEY, (part + 1) * part_keys)
        record = items_ptr + item * ITEM_FIELDS
        tl.store(record, pick(match, sequence), mask=found)
        # The tiles with most keys first.
        m_block = pick(match, blocks) - 1 - within // parts_of
        tl.store(record + 1, m_block, mask=found)
        tl.store(record + 2, pick(match, query_start), mask=found)
        tl.store(record + 3, pick(match, query_len), mask=found)
        tl.store(record + 4, pick(match, seq_len), mask=found)
        tl.store(record + 5, part * part_keys, mask=found)
        tl.store(record + 6, end, mask=found)
        tl.store(record + 7, tl.where(part == 0, parts_of, 0), mask=found)
        # Where this sequence's tiles are on the list of those that are split.
        split = tl.where(parts > 1, blocks, 0)
        last_split = num_splits + tl.cumsum(split, 0)
        number = pick(match, last_split - split) + within // parts_of
        begins = found & (part == 0) & (parts_of > 1)
        tl.store(splits_ptr + 1 + number, item, mask=begins)
        line += tl.sum(count)
        num_splits += tl.sum(split)
    tl.store(splits_ptr, num_splits)  # every program the same


# Microbatches slice the lengths anywhere: their alignment must make no variant.
@triton.jit(
    do_not_specialize=[
        "query_start_loc_ptr",
        "seq_lens_ptr",
        "num_seqs",
        "decode_query_len",
        "num_workers",
        "num_units",
        "window",
        "ranges_ptr",
        "prefix_ptr",
        "num_ranges",
    ]
)
def schedule_kernel(
    num_seqs,
    decode_query_len,
    num_workers,  # that have work, at most NUM_WORKERS
    num_units,  # that have work of prefills; see `overlap`
    query_start_loc_ptr,  # [num_seqs + 1]
    seq_lens_ptr,  # [num_seqs]
    workers_ptr,
    sequences_ptr,
    arrivals_ptr,
    items_ptr,
    splits_ptr,
    ranges_ptr,  # [num_seqs, num_ranges, 2] or None
    prefix_ptr,  # [num_seqs] or None
    window,
    num_ranges,  # None without ranges
    NUM_WORKERS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DECODE_BLOCK_M: tl.constexpr,
    DECODE_TILE: tl.constexpr,  # or segment: what workers take several of
    ABREAST: tl.constexpr,  # so many heads go abreast
    ABREAST_TILES: tl.constexpr,  # from so many tiles a worker
    LONG_PIECE: tl.constexpr,  # see `whole_pieces`; None: no piece is
    PREFILL_PACK: tl.constexpr,
    PREFILL_BLOCK_M: tl.constexpr,
    HEAD_TILES: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,  # see `plan.Split`; None: keys are not split
    WINDOWED: tl.constexpr,
    CHUNK_LOOKBACK: tl.constexpr,
    RANGES_IN_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    DECODE_PROGRAMS: tl.constexpr = (NUM_WORKERS + LANES - 1) // LANES
    program = tl.program_id(0)
    if program < DECODE_PROGRAMS:
        schedule_decode(
            query_start_loc_ptr, seq_lens_ptr, workers_ptr, sequences_ptr, arrivals_ptr,
            num_seqs, decode_query_len, window, (ranges_ptr, num_ranges), prefix_ptr,
            program * LANES, num_workers,
            NUM_WORKERS, NUM_KV_HEADS, GROUP, DECODE_BLOCK_M, DECODE_TILE,
            ABREAST, ABREAST_TILES, WINDOWED, CHUNK_LOOKBACK, RANGES_IN_WINDOW,
            BLOCK, LANES, LONG_PIECE,
        )  # fmt: skip
    elif SPLIT_KEYS is not None:
        schedule_parts(
            query_start_loc_ptr, seq_lens_ptr, items_ptr, splits_ptr,
            num_seqs, decode_query_len, (program - DECODE_PROGRAMS) * LANES, num_units,
            PREFILL_PACK, PREFILL_BLOCK_M, HEAD_TILES, SPLIT_KEYS, BLOCK, LANES,
        )  # fmt: skip
    else:
        schedule_prefill(
            query_start_loc_ptr, seq_lens_ptr, items_ptr,
            num_seqs, decode_query_len, (program - DECODE_PROGRAMS) * LANES,
            PREFILL_PACK, PREFILL_BLOCK_M, BLOCK, LANES,
        )  # fmt: skip


class Sight(NamedTuple):
    """How far queries see, as kernels and schedule must agree on it; see `limits`."""

    sliding_window: int | None
    chunk_lookback: int
    num_ranges: int | None
    ranges_in_window: bool
    has_prefix: bool

    @property
    def window(self) -> int:
        """The kernels' window: keys, or with a lookback keys of a chunk."""
        window = min(self.sliding_window or 0, WIDEST_WINDOW)
        if self.chunk_lookback >= 0:
            window //= self.chunk_lookback + 1
        return window

    def constants(self) -> dict[str, object]:
        """As the kernels' constexprs."""
        return dict(
            WINDOWED=self.sliding_window is not None,
            CHUNK_LOOKBACK=self.chunk_lookback,
            RANGES_IN_WINDOW=self.ranges_in_window,
        )


@lru_cache(typed=True)
def known_sight(sliding_window: Any, chunk_lookback: Any, *others: Any) -> Sight:
    return Sight(*check_window(sliding_window, chunk_lookback), *others)


def make_sight(sliding_window: Any, chunk_lookback: Any, *others: Any) -> Sight:
    """The same object for the same values: quick to compare. Or `check_window`'s
    ValueErrors.
    """
    try:
        return known_sight(sliding_window, chunk_lookback, *others)
    except TypeError:  # what has no hash is no window
        check_window(sliding_window, chunk_lookback)
        raise


def count_ranges(mm_prefix_range: torch.Tensor) -> int:
    """Ranges of a sequence."""
    check_tensor("mm_prefix_range", mm_prefix_range)
    if mm_prefix_range.dim() != 3 or mm_prefix_range.shape[2] != 2:
        got = f"shape {list(mm_prefix_range.shape)}"
        reject("mm_prefix_range", got, "[num_seqs, num_ranges, 2]")
    return mm_prefix_range.shape[1]


def check_window(
    sliding_window: int | None, chunk_lookback: int
) -> tuple[int | None, int]:
    """Both; or ValueErrors of a window, or of chunks, that hold no key."""
    if sliding_window is not None:
        allowed = "1 or more, or None for none"
        sliding_window = whole_number("sliding_window", sliding_window, allowed, 1)
    allowed = f"-1 for none, or less than sliding_window={sliding_window}"
    chunk_lookback = whole_number("chunk_lookback", chunk_lookback, allowed)
    if chunk_lookback >= 0 and (sliding_window or 0) <= chunk_lookback:
        reject("chunk_lookback", chunk_lookback, allowed)
    return sliding_window, chunk_lookback


class Known(NamedTuple):
    """What the host knows of a batch, from which it decides what is launched.

    Nothing where a CUDA graph will replay the launches for other batches. If it is not
    so, rows may stay unwritten; only `work` may be off.

    Attributes:
        min_query_len: no query is shorter; decides whether decodes are launched beside
            prefills. 0: not known.
        num_prefills: no more sequences have queries longer than `longest_decode`;
            decides whether keys are split. None: not known.
        max_prefill_seq_len: none of these is longer, context included; decides whether
            tiles are smaller instead. None: not known.
        work: what there is to do, if layers have nothing that keeps prefills or decodes
            from Hopper's kernels; decides which multiprocessors prefills get, and which
            decodes, at the same time. None: not known.

    """

    min_query_len: int = 0
    num_prefills: int | None = None
    max_prefill_seq_len: int | None = None
    work: Work | None = None


UNKNOWN = Known()


class VarlenSchedule:
    """Work lists and scratch of `varlen_attention`, filled once a step.

    Every layer of one shape and window reads the same schedule; launches that
    share one must follow each other on one stream.

    Args:
        max_num_seqs: most sequences of a batch.
        max_num_tokens: most query tokens of a batch.
        num_query_heads, num_kv_heads, head_size, block_size: shape of the layers.
        query_dtype, kv_dtype: dtypes of queries and of the cache.
        device: where the buffers live.
        sliding_window: keys that a query sees, itself included; None: all.
        chunk_lookback: as for `varlen_attention`.
        token_scales: the cache has scales per token and head; always so in integers.
        decode_query_len: in a batch with prefills, sequences with up to this many query
            tokens are decodes all the same, and so are those with as many as a tile of
            rows that is made for these has room for; see `longest_decode`.
        num_workers: programs of the decode kernel; None: as many as fit the device.
        portable: leave out kernels made for one architecture.
        batch_invariant: a row's result has the same bits in every batch, and for
            every length of the query that it belongs to; see `segments`.

    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        query_dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device | str,
        sliding_window: int | None = None,
        chunk_lookback: int = -1,
        token_scales: bool = False,
        decode_query_len: int = 1,
        num_workers: int | None = None,
        portable: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        try:
            self.device = torch.device(device)
        except (TypeError, RuntimeError):
            reject("device", repr(device), "a torch.device, or the name of one")
        heads = (num_query_heads, num_kv_heads, head_size)
        token_scales |= kv_dtype in KV_INTEGER_DTYPES
        self.shape = Shape(*heads, block_size, query_dtype, kv_dtype, token_scales)

        def at_least_one(name: str, value: int) -> int:
            return whole_number(name, value, "1 or more", 1)

        max_num_seqs = at_least_one("max_num_seqs", max_num_seqs)
        max_num_tokens = at_least_one("max_num_tokens", max_num_tokens)
        decode_query_len = at_least_one("decode_query_len", decode_query_len)
        if num_workers is not None:
            num_workers = at_least_one("num_workers", num_workers)
        window = check_window(sliding_window, chunk_lookback)
        check_layer_shape(self.shape)
        if batch_invariant and self.shape.token_scales:
            reject("token_scales", True, "False where batch_invariant is True")
        self.sight = Sight(*window, None, False, False)
        self.decode_query_len = decode_query_len
        self.portable = portable
        self.batch_invariant = batch_invariant
        self.max_num_seqs = max_num_seqs
        self.max_num_tokens = max_num_tokens
        is_cpu = self.device.type == "cpu"  # that of "cpu:0" has an index too
        self.target = this_device(None if is_cpu else self.device.index or 0)
        plan = self.plan_for(MAX_DECODE_QUERY_LEN)
        self.num_workers = num_workers or plan.num_workers
        mixed = self.plan_for(MAX_DECODE_QUERY_LEN + 1)
        # Query tokens up to which a sequence beside prefills is a decode. One with so
        # few rows that they fit a tile costs the decode kernel no more than one token.
        self.longest_decode = max(
            decode_query_len,
            min(mixed.decode.block_m // self.shape.group, MAX_DECODE_QUERY_LEN),
        )
        if batch_invariant:  # slots have room for a decode's rows alone
            self.longest_decode = decode_query_len
        # Whether decodes may run beside prefills, and tokens of one in a tile of rows.
        self.may_share = can_share(mixed, self.target)
        self.tokens_per_tile = mixed.decode.block_m / self.shape.group

        def integers(rows: int, fields: int) -> torch.Tensor:
            return torch.zeros(rows, fields, dtype=torch.int32, device=self.device)

        def scratch(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.float32, device=self.device)

        self.workers = integers(self.num_workers, WORKER_FIELDS.value)
        self.sequences = integers(max_num_seqs, SEQUENCE_FIELDS.value)
        self.arrivals = integers(self.num_workers, 1)
        num_items = max(1, self.max_items(plan, max_num_tokens, max_num_seqs))
        if self.plan_for(MAX_DECODE_QUERY_LEN + 1, small=True).small:
            # Two for each of as many as `small_plan` takes at most.
            most = self.most_small_tiles(plan) // plan.head_tiles
            num_items = max(num_items, 2 * most)
        # Where few tiles of prefill rows are split by keys; not with windows, whose
        # keys are few.
        self.splits: torch.Tensor | None = None
        self.states: tuple[torch.Tensor | None, ...] = (None, None, None)
        lengths = (MAX_DECODE_QUERY_LEN + 1, SHORT_QUERY_LEN)
        chosen = [self.plan_for(length, split=True) for length in lengths]
        splits = [plan.split for plan in chosen if plan.split is not None]
        if splits and sliding_window is None:
            num_items = max(num_items, *(split.max_items for split in splits))
            self.splits = integers(1 + max(split.max_tiles for split in splits), 1)
            most = max(split.max_items * split.head_tiles for split in splits)
            rows = most * chosen[0].prefill_rows
            self.states = (
                scratch(rows, self.shape.head_padded),
                scratch(rows),
                scratch(rows),
            )
        self.items = integers(triton.cdiv(num_items, LANES) * LANES, ITEM_FIELDS.value)
        # Tiles of decode rows: in batches of decodes, and beside prefills.
        block_m = max(plan.decode.block_m, mixed.decode.block_m)
        slots: tuple[int, ...] = (2 * self.num_workers, block_m)
        if batch_invariant:
            row_bytes = 4 * self.shape.head_padded
            slots = (max(2 * self.num_workers * block_m, SEGMENT_BYTES // row_bytes),)
        self.partials = (
            scratch(*slots, self.shape.head_padded),
            scratch(*slots),
            scratch(*slots),
        )
        # What `update` saw last.
        self.max_query_len = 0
        self.num_seqs = 0
        self.work = self.items[:0]  # prefill items in use
        self.num_items = 0  # and their number
        self.knows_prefills = False  # the host does, so that few items are empty
        self.has_decodes = True  # False: the host knows that there are none
        # Programs of Hopper's prefill kernel, and of decode's; None: as many as ever.
        self.prefill_grid: tuple[int, int] | None = None
        self.decode_grid: tuple[int, int] | None = None
        self.plan = plan
        # Equal after updates that chose the same kernels.
        self.choice = 0
        self.choices = {(plan, self.sight): 0}
        self.launches: dict[int, Launch] = {}  # by choice
        self.segment_slots = 0  # segments that a worker can leave; see `segments`

    def plan_for(
        self, max_query_len: int, split: bool = False, small: bool = False
    ) -> AttentionPlan:
        """The plan of a batch whose longest query has max_query_len tokens.

        split: and which has few tiles of prefill rows; small: and few keys.
        """
        split_query_len = None
        if split:  # two plans for all lengths
            is_short = max_query_len < SHORT_QUERY_LEN
            split_query_len = MAX_DECODE_QUERY_LEN + 1 if is_short else SHORT_QUERY_LEN
        has_prefills = max_query_len > MAX_DECODE_QUERY_LEN
        if has_prefills:
            max_query_len = self.decode_query_len
        return make_plan(
            self.shape,
            self.target,
            max_query_len,
            self.portable,
            self.batch_invariant,
            split_query_len,
            small,
            has_prefills,
        )

    def heads_abreast(self, plan: AttentionPlan) -> int:
        """All KV heads, or 1 where they cannot share out the workers evenly.

        Some of them abreast gain nothing: 16 x 8k with 32 KV heads take 505 us on an
        H200 with 8 of them, 502 with none.
        """
        heads = self.shape.num_kv_heads
        if plan.abreast_tiles is None or self.num_workers % heads:
            return 1
        return heads

    def max_items(self, plan: AttentionPlan, num_tokens: int, num_prefills: int) -> int:
        """Bound of the number of prefill tiles of a batch, were none split."""
        rows = num_tokens * plan.prefill_pack
        prefills = min(num_prefills, num_tokens // (self.longest_decode + 1))
        # Each prefill's last tile has one row or more.
        return (rows + prefills * (plan.prefill_rows - 1)) // plan.prefill_rows

    def split_plan(
        self, max_query_len: int, num_tokens: int, num_prefills: int | None
    ) -> AttentionPlan | None:
        """The plan of a batch with so few prefill tiles that keys are split, or None.

        Args:
            max_query_len: as for `update`.
            num_tokens: likewise.
            num_prefills: as of `Known`.

        """
        if self.splits is None or max_query_len <= MAX_DECODE_QUERY_LEN:
            return None
        if num_prefills is None:  # what a graph of so many tokens must do for any batch
            num_prefills = self.max_num_seqs
        plan = self.plan_for(max_query_len, split=True)
        if plan.split is None:
            return None
        num_tiles = self.max_items(plan, num_tokens, num_prefills)
        # So many have equal keys if they are of one prefill, and are not split: the
        # launch that combines parts would find none.
        are_equal = num_tiles == plan.split.max_tiles and num_prefills == 1
        return plan if num_tiles <= plan.split.max_tiles and not are_equal else None

    def most_small_tiles(self, plan: AttentionPlan) -> int:
        """Tiles of a plan, for all heads, up to which smaller ones can do better: as
        many as run at once, of the portable kernel two to a multiprocessor."""
        return self.target.num_units * (1 if plan.hopper else 2)

    def small_plan(
        self,
        max_query_len: int,
        num_tokens: int,
        num_prefills: int | None,
        max_prefill_seq_len: int | None,
    ) -> AttentionPlan | None:
        """The plan of a batch that has few prefill tiles and few keys, or None.

        Its tiles have half as many rows, and their keys are not split.

        Args:
            max_query_len: as for `update`.
            num_tokens: likewise.
            num_prefills: as of `Known`.
            max_prefill_seq_len: likewise.

        """
        if not num_prefills or max_prefill_seq_len is None:
            return None
        small = self.plan_for(max_query_len, small=True)
        if not small.small:
            return None
        usual = self.plan_for(max_query_len)
        num_units = self.target.num_units
        num_items = [
            plan.head_tiles * self.max_items(plan, num_tokens, num_prefills)
            for plan in (usual, small)
        ]
        if num_items[0] > self.most_small_tiles(usual):
            return None
        # Where they do not run all at once, they gain as the tiles of a prompt without
        # context have few keys and many.
        keys_per_query = 2 if num_items[1] <= num_units else 1
        num_keys = max_prefill_seq_len
        if self.sight.sliding_window is not None:
            num_keys = min(num_keys, self.sight.sliding_window + max_query_len)
        is_short = num_keys <= max(keys_per_query * max_query_len, SHORT_SEQ_LEN)
        return small if is_short else None

    def look_at(
        self,
        query_lens: np.ndarray,
        seq_lens: np.ndarray | None = None,
        may_overlap: bool = False,
    ) -> Known:
        """What the host knows of a batch, for `update`.

        Args:
            query_lens: [num_seqs] new tokens.
            seq_lens: [num_seqs] all tokens, or bounds; None: not known.
            may_overlap: layers have nothing that keeps prefills or decodes from
                Hopper's kernels, and bounds are near.

        """
        is_prefill = query_lens > self.longest_decode
        num_prefills = int(np.count_nonzero(is_prefill))
        known = Known(int(query_lens.min()), num_prefills)
        if not num_prefills or seq_lens is None:
            return known
        if num_prefills == len(query_lens):
            return known._replace(max_prefill_seq_len=int(seq_lens.max()))
        longest = int(seq_lens[is_prefill].max())
        work = None
        if may_overlap and self.may_share:
            work = count_work(
                query_lens,
                seq_lens,
                is_prefill,
                self.tokens_per_tile,
                self.sight.sliding_window,
            )
        return known._replace(max_prefill_seq_len=longest, work=work)

    def least_unsplit_len(self) -> int | None:
        """Tokens from which a prefill, perhaps among others, is not split."""
        for length in range(MAX_DECODE_QUERY_LEN + 1, self.max_num_tokens + 1):
            if self.split_plan(length, length, None) is None:
                return length
        return None

    def check_lengths(self, name: str, tensor: torch.Tensor) -> None:
        """Rejects what is not [n] int32 on the device, without gaps."""
        check_tensor(name, tensor)
        if (
            tensor.dtype != torch.int32
            or tensor.dim() != 1
            or tensor.device.type != self.device.type
            or (tensor.shape[0] > 1 and tensor.stride(0) != 1)
        ):
            got = f"{tensor.dtype} {list(tensor.shape)} with strides "
            got += f"{tensor.stride()} on {tensor.device}"
            reject(name, got, f"contiguous torch.int32 [n] on {self.device}")

    def check_per_sequence(
        self, name: str, tensor: torch.Tensor, num_seqs: int
    ) -> None:
        """Rejects what is not [num_seqs or more, ...] int32 here, without gaps."""
        if (
            tensor.dtype != torch.int32
            or not tensor.is_contiguous()
            or tensor.device.type != self.device.type
            or tensor.shape[:1] < (num_seqs,)
        ):
            got = f"{tensor.dtype} {list(tensor.shape)} with strides "
            got += f"{tensor.stride()} on {tensor.device}"
            allowed = f"contiguous torch.int32 of {num_seqs} sequences on {self.device}"
            reject(name, got, allowed)

    def update(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        max_query_len: int,
        num_tokens: int,
        known: Known = UNKNOWN,
        mm_prefix_range: torch.Tensor | None = None,
        mm_prefix_in_window: bool = False,
        prefix_lens: torch.Tensor | None = None,
    ) -> None:
        """Fills the work lists for a batch: one kernel, no synchronisation.

        Args:
            query_start_loc: [num_seqs + 1] int32.
            seq_lens: [num_seqs] int32.
            max_query_len: no query of this batch is longer (host).
            num_tokens: bound of the number of query tokens (host).
            known: what the host knows besides, as `look_at` finds it.
            mm_prefix_range: as for this batch's calls of `varlen_attention`.
            mm_prefix_in_window: likewise.
            prefix_lens: likewise.

        Raises:
            ValueError: if the batch is larger than the buffers, or not of int32.

        """
        self.check_lengths("query_start_loc", query_start_loc)
        self.check_lengths("seq_lens", seq_lens)
        max_query_len = whole_number("max_query_len", max_query_len, LENGTH, 0)
        num_tokens = whole_number("num_tokens", num_tokens, LENGTH, 0)
        num_seqs = seq_lens.shape[0]
        if query_start_loc.shape[0] != num_seqs + 1:
            got = f"{query_start_loc.shape[0]} elements"
            reject("query_start_loc", got, f"{num_seqs + 1}, one more than seq_lens")
        num_ranges = None
        if mm_prefix_range is not None:
            num_ranges = count_ranges(mm_prefix_range)
            self.check_per_sequence("mm_prefix_range", mm_prefix_range, num_seqs)
        sight = make_sight(
            self.sight.sliding_window,
            self.sight.chunk_lookback,
            num_ranges,
            mm_prefix_in_window,
            prefix_lens is not None,
        )
        if prefix_lens is not None:
            self.check_lengths("prefix_lens", prefix_lens)
            self.check_per_sequence("prefix_lens", prefix_lens, num_seqs)
        # Without a window they move no decode's first key.
        if sight.sliding_window is None:
            mm_prefix_range = prefix_lens = None
        if num_seqs > self.max_num_seqs:
            advice = "Make a schedule with a larger max_num_seqs."
            allowed = f"up to {self.max_num_seqs}"
            reject("seq_lens", f"{num_seqs} sequences", allowed, advice)
        if num_tokens > self.max_num_tokens:
            advice = "Make a schedule with a larger max_num_tokens."
            reject("num_tokens", num_tokens, f"up to {self.max_num_tokens}", advice)
        plan = self.plan_for(max_query_len)
        decode_query_len = self.longest_decode
        num_items = 0
        units = None
        if max_query_len > MAX_DECODE_QUERY_LEN:
            num_prefills, work = known.num_prefills, known.work
            # One at least: what is launched behind prefills depends on them.
            most_prefills = num_prefills or num_seqs
            num_items = max(1, self.max_items(plan, num_tokens, most_prefills))
            size = (max_query_len, num_tokens, num_prefills)
            small = self.small_plan(*size, known.max_prefill_seq_len)
            few = self.split_plan(*size) if small is None else None
            if small is not None:
                plan = small
                num_items = self.max_items(plan, num_tokens, most_prefills)
            elif few is not None and few.split is not None:
                plan, num_items = few, few.split.max_items
            if work is not None:
                tiles = self.max_items(plan, work.prefill_tokens, most_prefills)
                tiles *= plan.head_tiles
                units = prefill_units(work, tiles, plan, self.shape, self.target)
        else:
            decode_query_len = ANY_QUERY_LEN
        self.choice = self.choices.setdefault((plan, sight), len(self.choices))
        self.prefill_grid = self.decode_grid = None
        num_units, num_workers = self.target.num_units, self.num_workers
        if units is not None:
            num_workers = max(1, num_workers * (num_units - units) // num_units)
            num_units = units
            self.prefill_grid, self.decode_grid = (num_units, 1), (num_workers, 1)
        launch = self.launches.get(self.choice)
        if launch is None:
            launch = self.launches[self.choice] = self.plan_launch(plan, sight)
        launch(
            query_start_loc,
            seq_lens,
            self.workers,
            self.sequences,
            self.arrivals,
            self.items,
            self.splits,
            mm_prefix_range,
            prefix_lens,
            varying=(num_seqs, decode_query_len, num_workers, num_units),
        )
        self.plan = plan
        rows = self.num_workers * plan.segment_rows
        self.segment_slots = self.partials[1].numel() // rows - 1
        self.sight = sight
        self.max_query_len = max_query_len
        self.num_seqs = num_seqs
        self.work = self.items[:num_items]
        self.num_items = num_items
        self.knows_prefills = known.num_prefills is not None
        self.has_decodes = num_items == 0 or known.min_query_len <= self.longest_decode

    def plan_launch(self, plan: AttentionPlan, sight: Sight) -> Launch:
        """Plans the launch that fills the work lists for kernels of this plan."""
        # All items, for a captured graph reads as many as its own batch had.
        programs = triton.cdiv(self.num_workers, LANES) + self.items.shape[0] // LANES
        has_ranges = sight.sliding_window is not None and sight.num_ranges is not None
        return Launch(
            schedule_kernel,
            (programs,),
            (sight.window, sight.num_ranges if has_ranges else None),
            dict(
                NUM_WORKERS=self.num_workers,
                NUM_KV_HEADS=self.shape.num_kv_heads,
                GROUP=self.shape.group,
                DECODE_BLOCK_M=plan.decode.block_m,
                DECODE_TILE=plan.segment or plan.decode.tile,
                ABREAST=self.heads_abreast(plan),
                ABREAST_TILES=plan.abreast_tiles,
                # A segment more may be more than workers have slots for.
                LONG_PIECE=LONG_PIECE if plan.segment is None else None,
                PREFILL_PACK=plan.prefill_pack,
                PREFILL_BLOCK_M=plan.prefill_rows,
                HEAD_TILES=plan.head_tiles,
                SPLIT_KEYS=plan.split.keys if plan.split else None,
                **sight.constants(),
                BLOCK=min(
                    triton.next_power_of_2(self.max_num_seqs), MAX_SEQUENCES_AT_ONCE
                ),
                LANES=LANES,
            ),
        )
