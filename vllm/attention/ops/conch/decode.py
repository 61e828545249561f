# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decode: few query tokens per sequence, the keys split over the whole device.

Bound by reading K and V, so the work is cut by keys: all tiles of all decode rows
(sequence, tile of query rows, KV head) form one line, and each worker takes an
equal contiguous piece of it (stream-K, Osama et al. 2023; LeanAttention, Sanovar
et al. 2024).  A piece holds the end of one row, whole rows, and the start of
another, or, where rows begin with a piece (`schedule.whole_pieces`), tiles of one
row.  Whole rows are written at once.  Of a row that was cut, every worker
leaves an fp32 partial, and the last one to arrive combines them in the order of
the keys (FlashDecoding, Dao et al. 2023), so results do not depend on timing.
"""

from vllm.triton_utils import tl, triton

from .combine import combine_rows, leave_partial
from .kv_format import in_elements
from .limits import first_seen_key, row_limits
from .tile import (
    attend_tiles,
    load_query,
    load_scales,
    load_slopes,
    query_rows,
    row_offsets,
    scales_of_head,
    start_state,
    whole,
    write_rows,
)

# One sequence of the list: sequence, query_start, query_len, seq_len.
SEQUENCE_FIELDS: tl.constexpr = tl.constexpr(4)
# One worker: the sequence it starts in (the same four fields), that sequence's entry
# in the list, KV head, tile of query rows and tile of keys there, number of tiles, how
# many a piece has but where its line or, if rows begin with a piece, its row ends,
# heads abreast, piece of its line, and the place of that line's first piece among all
# pieces.
WORKER_FIELDS: tl.constexpr = tl.constexpr(16)
# Rows that are combined at once.
COMBINE_ROWS: tl.constexpr = tl.constexpr(4)


@triton.jit
def decode_key_tiles(first_key, seq_len, TILE: tl.constexpr):
    """First tile and number of tiles of a decode row, at least one."""
    first_tile = first_key // TILE
    return first_tile, tl.maximum(tl.cdiv(seq_len, TILE) - first_tile, 1)


@triton.jit
def decode_rows(
    query_len, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Number of decode rows of a sequence: its tiles of query rows, KV head by head."""
    return tl.cdiv(query_len * GROUP, BLOCK_M) * NUM_KV_HEADS


@triton.jit
def load_sequence(record):
    """sequence, query_start, query_len and seq_len of a list entry or a worker."""
    return (
        tl.load(record),
        tl.load(record + 1),
        tl.load(record + 2),
        tl.load(record + 3),
    )


@triton.jit
def write_combined(
    target, v_scale, partials, first_place, num_parts,
    query_start, query_len, kv_head, m_block,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, FP8: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    """Combines the partials of one decode row and writes its tile of query rows."""
    # 128 registers a thread, or 64 where tiles are too large to spare them. On an H200
    # 1 x 8k, 32 parts a row, take 1.3 us longer in rounds of 16 than in one of 32.
    LOADED: tl.constexpr = 4096 if BLOCK_M == 16 and HEAD_PADDED == 128 else 2048
    PARTS: tl.constexpr = LOADED // HEAD_PADDED
    num_rows = tl.minimum(query_len * GROUP - m_block * BLOCK_M, BLOCK_M)
    for first_row in range(0, num_rows, COMBINE_ROWS):
        rows = first_row + tl.arange(0, COMBINE_ROWS)
        # Slot 1 of the piece that starts the row, slot 0 of those that go on.
        acc, row_max, row_sum = combine_rows(
            partials, (2 * first_place, 1, 2), num_parts,
            rows, rows < num_rows, BLOCK_M, HEAD_PADDED, PARTS,
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
def decode_kernel(
    output_ptr,  # [num_tokens, num_query_heads, head_size]
    lse_ptr,  # [num_tokens, num_query_heads] or None
    query_ptr,  # [num_tokens, num_query_heads, head_size]
    key_ptr,  # [num_blocks, block_size, num_kv_heads, head_size]
    value_ptr,
    block_table_ptr,  # [num_seqs, max_blocks]
    workers_ptr,  # [num_workers, WORKER_FIELDS]
    sequences_ptr,  # [num_seqs, SEQUENCE_FIELDS]
    partial_acc_ptr,  # [2 * num_workers, BLOCK_M, HEAD_PADDED] fp32
    partial_max_ptr,  # [2 * num_workers, BLOCK_M] fp32
    partial_sum_ptr,
    arrivals_ptr,  # [num_workers], zero between launches
    q_scale_ptr,  # [1] or None
    k_scale_ptr,  # [1] or None; with strides [num_blocks, block_size, num_kv_heads]
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
    scale_strides,  # those of k_scale and of v_scale, as above; None: they are [1]
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
    PRECISION: tl.constexpr,
    PAIRED_VALUES: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    WIDENING: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,  # elements that strides of K and V are given in
    VALUE_OFFSET: tl.constexpr,  # of V behind K in a page of both; None: elsewhere
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI_SQRT: tl.constexpr,
    LIMITED: tl.constexpr,  # what rows see is not causality and a window alone
    CHUNK_LOOKBACK: tl.constexpr,  # -1: none
    RANGES_IN_WINDOW: tl.constexpr,
    FP8: tl.constexpr,  # format of an output that is divided by output_scale, or None
    FP8_MAX: tl.constexpr,
    LEAN: tl.constexpr,
    SAME_STRIDES: tl.constexpr,  # of K and V
    OVERLAPS: tl.constexpr,  # the launch before may still run; see `overlap`
):
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
    tile = tl.load(record + 7)
    remaining = tl.load(record + 8)
    tiles_per_piece = tl.load(record + 9)
    abreast = tl.load(record + 10)
    piece = tl.load(record + 11)
    first_of_line = tl.load(record + 12)
    line = piece * tiles_per_piece  # where this worker is on its line of tiles

    layer_scales, v_scale = load_scales(
        q_scale_ptr, k_scale_ptr, v_scale_ptr, scale_strides, (scale, cap_scale),
        SOFTCAP,
    )  # fmt: skip
    dims = tl.arange(0, HEAD_PADDED)
    key_strides = in_elements(key_strides, STRIDE_UNIT)
    value_strides = in_elements(value_strides, STRIDE_UNIT)
    if VALUE_OFFSET is not None:
        value_ptr = key_ptr + VALUE_OFFSET

    while remaining > 0:
        first_key = first_seen_key(
            query_len, seq_len, sequence, window, ranges, prefix_ptr,
            WINDOWED, CHUNK_LOOKBACK, RANGES_IN_WINDOW,
        )  # fmt: skip
        first_tile, row_tiles = decode_key_tiles(first_key, seq_len, TILE)
        num_tiles = tl.minimum(remaining, row_tiles - tile)
        token, group_head, row_valid = query_rows(m_block, query_len, GROUP, BLOCK_M)
        head = kv_head * GROUP + group_head
        dims_valid = row_valid[:, None] & (dims < HEAD_SIZE)[None, :]
        offsets = row_offsets(query_start, token, head, query_strides, dims)
        query, scales = load_query(
            query_ptr,
            offsets,
            dims_valid,
            layer_scales,
            key_ptr.dtype.element_ty,
            SOFTCAP,
        )
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
        if scale_strides is None:
            token_scales: tl.constexpr = None
        else:
            token_scales = scales_of_head(
                k_scale_ptr, v_scale_ptr, scale_strides, kv_head
            )
        state = start_state(BLOCK_M, HEAD_PADDED, PAIRED_VALUES, KV_FORMAT)
        head_keys = key_ptr + kv_head.to(tl.int64) * key_strides[2]
        head_values = value_ptr + kv_head.to(tl.int64) * value_strides[2]
        block_row = block_table_ptr + sequence.to(tl.int64) * block_table_stride
        begin = first_tile + tile
        acc, row_max, row_sum = attend_tiles(
            state, query, position, head_keys, head_values,
            key_strides, value_strides, block_row,
            (begin, begin + num_tiles), (first_key, seq_len), scales, sight, None,
            token_scales, CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, True,
            TILE, BLOCK_SIZE, HEAD_SIZE, HEAD_PADDED, PRECISION, PAIRED_VALUES,
            KV_FORMAT, WIDENING, False, LEAN, SAME_STRIDES,
        )  # fmt: skip

        acc = whole(acc, BLOCK_M, HEAD_PADDED, PAIRED_VALUES, KV_FORMAT)
        if num_tiles == row_tiles:
            write_rows(
                target, acc, row_max, row_sum, v_scale,
                query_start, token, head, row_valid,
                HEAD_SIZE, HEAD_PADDED, FP8, FP8_MAX,
            )  # fmt: skip
        else:
            row_begin = line - tile
            first_piece = row_begin // tiles_per_piece
            last_piece = (row_begin + row_tiles - 1) // tiles_per_piece
            first_place = first_of_line + first_piece
            slot = 2 * (first_of_line + piece) + tl.where(tile == 0, 1, 0)
            leave_partial(
                partials, slot, acc, row_max, row_sum, row_valid, BLOCK_M, HEAD_PADDED
            )
            tl.debug_barrier()  # every thread's stores come before the arrival
            arrived = tl.atomic_add(arrivals_ptr + first_place, 1, sem="acq_rel")
            if arrived == last_piece - first_piece:
                tl.store(arrivals_ptr + first_place, 0)
                write_combined(
                    target, v_scale,
                    partials, first_place, last_piece - first_piece + 1,
                    query_start, query_len, kv_head, m_block,
                    GROUP, HEAD_SIZE, HEAD_PADDED, BLOCK_M, FP8, FP8_MAX,
                )  # fmt: skip

        line += num_tiles
        remaining -= num_tiles
        tile = 0
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
    if OVERLAPS:  # what follows may read what prefills write
        tl.extra.cuda.gdc_wait()
