# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Batch invariance: a row gets the same bits whatever else is in the batch.

Sums of floating-point numbers depend on their order, so the order follows from
positions alone.  The keys of a sequence fall into segments of SEGMENT keys, counted
from key 0, and segments into tiles.  The softmax state of a segment is made from
nothing, tile by tile, and the states of a row are merged in the order of the keys:

    ((segment 0 + segment 1) + segment 2) + ...

A program that has all segments of a row merges them as it goes.  Where decode deals
them to several, every later segment leaves its own state, and the last program to
arrive merges these by the same function.  Tiles and segments of which a row sees
nothing change no bit of its state, so it does not matter who visits them.

What else could differ between kernels is ruled out: sums over a tile are made pair by
pair (`softmax.sum_in_pairs`), products and sums are contracted only where `tl.fma`
says so, and the plan gives all kernels the same tiles of keys and instructions that
add in the same order.
"""

from vllm.triton_utils import tl, triton

from .combine import leave_partial
from .decode import SEQUENCE_FIELDS, WORKER_FIELDS, decode_key_tiles, load_sequence
from .limits import first_seen_key, row_limits
from .tile import (
    attend_tiles,
    load_query,
    load_scales,
    load_slopes,
    query_rows,
    row_offsets,
    start_state,
    whole,
    write_rows,
)

# Rows that are merged at once, and so many states of theirs are loaded ahead.
MERGE_ROWS: tl.constexpr = tl.constexpr(4)
MERGE_ELEMENTS: tl.constexpr = tl.constexpr(2048)


@triton.jit
def merge_states(acc, row_max, row_sum, later_acc, later_max, later_sum):
    """The softmax state of some keys and that of keys behind them, made one.

    [M, D], [M] and [M] each.  The state of no key, (0, -inf, 0), changes no bit.
    """
    new_max = tl.maximum(row_max, later_max)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp2(row_max - shift)
    weight = tl.exp2(later_max - shift)
    acc = tl.fma(acc, decay[:, None], later_acc * weight[:, None])
    return acc, new_max, tl.fma(row_sum, decay, later_sum * weight)


@triton.jit
def clip(tiles, begin, end):
    """What of a range of tiles (first, end) lies in [begin, end)."""
    first = tl.maximum(tiles[0], begin)
    return first, tl.maximum(tl.minimum(tiles[1], end), first)


@triton.jit
def load_state(
    partials, slot, rows, valid, ROWS: tl.constexpr, HEAD_PADDED: tl.constexpr
):
    """The state of some rows of a slot; that of no key where not valid."""
    dims = tl.arange(0, HEAD_PADDED)
    stat = slot.to(tl.int64) * ROWS + rows
    acc = tl.load(
        partials[0] + stat[:, None] * HEAD_PADDED + dims[None, :],
        mask=valid[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    row_max = tl.load(
        partials[1] + stat, mask=valid, other=float("-inf"), cache_modifier=".cg"
    )
    row_sum = tl.load(partials[2] + stat, mask=valid, other=0.0, cache_modifier=".cg")
    return acc, row_max, row_sum


@triton.jit
def merge_row(
    partials,
    row_begin,  # of the row's first segment on the line
    num_segments,  # of the row
    share,  # segments of a worker, but where a row or its line ends
    first_of_line,  # place of the line's first worker
    rows,  # [R] rows of the tile
    row_valid,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, HEAD_PADDED: tl.constexpr,
    AHEAD: tl.constexpr,  # states that are loaded at once
):  # fmt: skip
    """Merges the states that workers have left of some rows."""
    first_worker = row_begin // share
    slot = (first_of_line + first_worker) * (SLOTS + 1)
    acc, row_max, row_sum = load_state(
        partials, slot, rows, row_valid, ROWS, HEAD_PADDED
    )
    for start in range((first_worker + 1) * share - row_begin, num_segments, AHEAD):
        accs: tl.tuple = ()
        maxima: tl.tuple = ()
        sums: tl.tuple = ()
        for i in tl.static_range(AHEAD):
            place = row_begin + start + i  # on the line
            slot = (first_of_line + place // share) * (SLOTS + 1) + 1 + place % share
            state = load_state(
                partials, slot, rows, row_valid & (start + i < num_segments),
                ROWS, HEAD_PADDED,
            )  # fmt: skip
            accs = accs + (state[0],)
            maxima = maxima + (state[1],)
            sums = sums + (state[2],)
        for i in tl.static_range(AHEAD):
            acc, row_max, row_sum = merge_states(
                acc, row_max, row_sum, accs[i], maxima[i], sums[i]
            )
    return acc, row_max, row_sum


@triton.jit
def write_merged(
    target, v_scale, partials, row_begin, num_segments, share, first_of_line,
    query_start, query_len, kv_head, m_block,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    FP8: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    """Merges the states of one decode row and writes its tile of query rows."""
    AHEAD: tl.constexpr = min(MERGE_ELEMENTS // HEAD_PADDED, 16)
    num_rows = tl.minimum(query_len * GROUP - m_block * BLOCK_M, BLOCK_M)
    for first_row in range(0, num_rows, MERGE_ROWS):
        rows = first_row + tl.arange(0, MERGE_ROWS)
        acc, row_max, row_sum = merge_row(
            partials, row_begin, num_segments, share, first_of_line,
            rows, rows < num_rows, SLOTS, ROWS, HEAD_PADDED, AHEAD,
        )  # fmt: skip
        write_rows(
            target, acc, row_max, row_sum, v_scale, query_start,
            (m_block * BLOCK_M + rows) // GROUP,
            kv_head * GROUP + (m_block * BLOCK_M + rows) % GROUP,
            rows < num_rows, HEAD_SIZE, HEAD_PADDED, FP8, FP8_MAX,
        )  # fmt: skip


# Microbatches slice what is per sequence anywhere: alignment must make no variant.
@triton.jit(
    do_not_specialize=[
        "block_table_ptr",
        "causal_ptr",
        "ranges_ptr",
        "prefix_ptr",
        "lse_stride",
        "block_table_stride",
        "window",
        "num_ranges",
    ]
)
def segment_decode_kernel(
    output_ptr,  # [num_tokens, num_query_heads, head_size]
    lse_ptr,  # [num_tokens, num_query_heads] or None
    query_ptr,  # [num_tokens, num_query_heads, head_size]
    key_ptr,  # [num_blocks, block_size, num_kv_heads, head_size]
    value_ptr,
    block_table_ptr,  # [num_seqs, max_blocks]
    workers_ptr,  # [num_workers, WORKER_FIELDS], in segments
    sequences_ptr,  # [num_seqs, SEQUENCE_FIELDS]
    partial_acc_ptr,  # [num_workers, SLOTS + 1, ROWS, HEAD_PADDED] fp32
    partial_max_ptr,  # [num_workers, SLOTS + 1, ROWS] fp32
    partial_sum_ptr,
    arrivals_ptr,  # [num_workers], zero between launches
    q_scale_ptr,  # [1] or None
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,  # [num_query_heads] or None
    slopes_ptr,  # [num_query_heads] fp32, or None
    causal_ptr,  # [num_seqs] or None
    ranges_ptr,  # [num_seqs, num_ranges, 2] or None
    prefix_ptr,  # [num_seqs] or None
    output_scale_ptr,  # [1] or None
    output_strides,  # (token, head)
    lse_stride,
    query_strides,
    key_strides,  # (page, slot, head)
    value_strides,
    scale_strides,  # None: scales per token are not covered
    block_table_stride,
    scale,  # softmax scale in log2 units; with softcap: the cap in log2 units
    cap_scale,  # softcap's inner scale
    window,  # keys, or with a lookback the size of a chunk
    num_ranges,  # None without ranges
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,  # keys, a multiple of TILE
    SLOTS: tl.constexpr,  # segments that a worker can leave
    ROWS: tl.constexpr,  # of a tile of query rows that may be valid
    PRECISION: tl.constexpr,
    PAIRED_VALUES: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    WIDENING: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI_SQRT: tl.constexpr,
    LIMITED: tl.constexpr,  # what rows see is not causality and a window alone
    CHUNK_LOOKBACK: tl.constexpr,  # -1: none
    RANGES_IN_WINDOW: tl.constexpr,
    FP8: tl.constexpr,  # format of an output that is divided by output_scale, or None
    FP8_MAX: tl.constexpr,
):
    """As `decode_kernel`, with a line of segments in the place of tiles.

    A worker's share begins with the end of a row, each segment of which takes a slot.
    Then come whole rows, which need none, and the start of a row, whose segments are
    merged and take one slot. Where shares are larger than SLOTS, rows are not cut:
    the worker that begins one takes all of it.
    """
    partials = (partial_acc_ptr, partial_max_ptr, partial_sum_ptr)
    ranges = (ranges_ptr, num_ranges)
    target = (
        output_ptr, lse_ptr, output_strides, lse_stride, sinks_ptr, output_scale_ptr,
    )  # fmt: skip
    record = workers_ptr + tl.program_id(0) * WORKER_FIELDS
    sequence, query_start, query_len, seq_len = load_sequence(record)
    entry = tl.load(record + 4)
    kv_head = tl.load(record + 5)
    m_block = tl.load(record + 6)
    begin = tl.load(record + 7)  # segment of the row
    remaining = tl.load(record + 8)
    share = tl.load(record + 9)
    abreast = tl.load(record + 10)
    worker = tl.load(record + 11)
    first_of_line = tl.load(record + 12)
    line = worker * share  # where this worker is on its line of segments
    slot = (first_of_line + worker) * (SLOTS + 1)
    cuts_rows = share <= SLOTS

    layer_scales, v_scale = load_scales(
        q_scale_ptr, k_scale_ptr, v_scale_ptr, scale_strides, (scale, cap_scale),
        SOFTCAP,
    )  # fmt: skip
    dims = tl.arange(0, HEAD_PADDED)
    TILES: tl.constexpr = SEGMENT // TILE

    while remaining > 0:
        first_key = first_seen_key(
            query_len, seq_len, sequence, window, ranges, prefix_ptr,
            WINDOWED, CHUNK_LOOKBACK, RANGES_IN_WINDOW,
        )  # fmt: skip
        first_segment, row_segments = decode_key_tiles(first_key, seq_len, SEGMENT)
        taken = tl.minimum(remaining, row_segments - begin)
        end = begin + taken
        if not cuts_rows:
            end = tl.where(begin == 0, row_segments, begin)
        token, group_head, row_valid = query_rows(m_block, query_len, GROUP, BLOCK_M)
        head = kv_head * GROUP + group_head
        dims_valid = row_valid[:, None] & (dims < HEAD_SIZE)[None, :]
        offsets = row_offsets(query_start, token, head, query_strides, dims)
        query, scales = load_query(
            query_ptr, offsets, dims_valid, layer_scales,
            key_ptr.dtype.element_ty, SOFTCAP, True,
        )  # fmt: skip
        position = seq_len - query_len + token
        if slopes_ptr is None:
            slopes: tl.constexpr = None
        else:
            slopes = load_slopes(slopes_ptr, head, row_valid)
        if not LIMITED:
            limits: tl.constexpr = None
        else:
            limits = row_limits(
                position, sequence, seq_len, window, causal_ptr, ranges, prefix_ptr,
                CAUSAL, WINDOWED, CHUNK_LOOKBACK, RANGES_IN_WINDOW,
            )  # fmt: skip
        sight = (window, slopes, limits)
        head_keys = key_ptr + kv_head.to(tl.int64) * key_strides[2]
        head_values = value_ptr + kv_head.to(tl.int64) * value_strides[2]
        block_row = block_table_ptr + sequence.to(tl.int64) * block_table_stride
        row_tiles = (first_key // TILE, tl.cdiv(seq_len, TILE))
        acc, row_max, row_sum = start_state(BLOCK_M, HEAD_PADDED, None, None)
        for segment in range(begin, end):
            first_tile = (first_segment + segment) * TILES
            later, later_max, later_sum = attend_tiles(
                start_state(BLOCK_M, HEAD_PADDED, PAIRED_VALUES, KV_FORMAT),
                query, position, head_keys, head_values,
                key_strides, value_strides, block_row,
                clip(row_tiles, first_tile, first_tile + TILES),
                (first_key, seq_len), scales, sight, None, None,
                CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, True, TILE, BLOCK_SIZE,
                HEAD_SIZE, HEAD_PADDED, PRECISION, PAIRED_VALUES, KV_FORMAT, WIDENING,
                True,
            )  # fmt: skip
            later = whole(later, BLOCK_M, HEAD_PADDED, PAIRED_VALUES, KV_FORMAT)
            if begin > 0:
                leave_partial(
                    partials, slot + 1 + segment - begin, later, later_max, later_sum,
                    row_valid, ROWS, HEAD_PADDED,
                )  # fmt: skip
            acc, row_max, row_sum = merge_states(
                acc, row_max, row_sum, later, later_max, later_sum
            )

        if end - begin == row_segments:
            write_rows(
                target, acc, row_max, row_sum, v_scale,
                query_start, token, head, row_valid,
                HEAD_SIZE, HEAD_PADDED, FP8, FP8_MAX,
            )  # fmt: skip
        elif end > begin:
            if begin == 0:
                leave_partial(
                    partials, slot, acc, row_max, row_sum, row_valid, ROWS, HEAD_PADDED
                )
            row_begin = line - begin
            first_worker = row_begin // share
            last_worker = (row_begin + row_segments - 1) // share
            arrivals = arrivals_ptr + first_of_line + first_worker
            tl.debug_barrier()  # every thread's stores come before the arrival
            arrived = tl.atomic_add(arrivals, 1, sem="acq_rel")
            if arrived == last_worker - first_worker:
                tl.store(arrivals, 0)
                write_merged(
                    target, v_scale, partials, row_begin, row_segments, share,
                    first_of_line, query_start, query_len, kv_head, m_block,
                    GROUP, HEAD_SIZE, HEAD_PADDED, BLOCK_M, SLOTS, ROWS, FP8, FP8_MAX,
                )  # fmt: skip

        line += taken
        remaining -= taken
        begin = 0
        kv_head += abreast
        if kv_head >= NUM_KV_HEADS:
            kv_head -= NUM_KV_HEADS
            m_block += 1
        if (remaining > 0) & (m_block == tl.cdiv(query_len * GROUP, BLOCK_M)):
            m_block = 0
            entry += 1
            sequence, query_start, query_len, seq_len = load_sequence(
                sequences_ptr + entry * SEQUENCE_FIELDS
            )
