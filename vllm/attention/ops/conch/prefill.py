# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prefill: many query tokens per sequence, one program per tile of query rows.

Portable Triton.  The tile of rows stays put while the keys stream past it
(FlashAttention-2, Dao 2023).  Only the tiles at the diagonal, at the window's left
edge and at the sequence's end are masked; those between run without a mask.
"""

from vllm.triton_utils import tl, triton

from .combine import ITEM_FIELDS, leave_partial
from .kv_format import in_elements
from .limits import row_limits
from .segments import clip, merge_states
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


@triton.jit
def tile_bounds(
    first_key, full_first_key, full_end_key, end_key,
    TILE: tl.constexpr, MASKED_TILE: tl.constexpr,
):  # fmt: skip
    """Keys seen by any row, and by every row, in tiles; see `key_tile_bounds`."""
    RATIO: tl.constexpr = TILE // MASKED_TILE
    first = first_key // MASKED_TILE
    end = tl.maximum(tl.cdiv(tl.maximum(end_key, 0), MASKED_TILE), first)
    full_first = tl.cdiv(full_first_key, TILE)
    full_end = tl.maximum(tl.maximum(full_end_key, 0) // TILE, full_first)
    left = (first, tl.minimum(full_first * RATIO, end))
    return (first_key, end_key), left, (full_first, full_end), (full_end * RATIO, end)


@triton.jit
def key_tile_bounds(
    m_block,
    query_len,
    seq_len,
    window,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    MASKED_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Which keys a tile of rows sees, and which tiles of keys need no mask.

    Returns (first key, end key) and three ranges of tiles, any of which may be empty:
    those before, in tiles of MASKED_TILE keys; those that every row sees whole, in
    tiles of TILE keys; those after, in tiles of MASKED_TILE keys.
    """
    context = seq_len - query_len
    first_position = context + (m_block * BLOCK_M) // PACK
    last_token = tl.minimum((m_block * BLOCK_M + BLOCK_M - 1) // PACK, query_len - 1)
    last_position = context + last_token
    first_key = 0
    end_key = seq_len
    full_first_key = 0
    full_end_key = seq_len
    if CAUSAL:
        end_key = tl.minimum(seq_len, last_position + 1)
        full_end_key = tl.minimum(seq_len, first_position + 1)
    if WINDOWED:
        first_key = tl.maximum(first_position - window + 1, 0)
        full_first_key = tl.maximum(last_position - window + 1, 0)
        if not CAUSAL:
            end_key = tl.minimum(seq_len, last_position + window)
            full_end_key = tl.minimum(seq_len, first_position + window)
    return tile_bounds(
        first_key, full_first_key, full_end_key, end_key, TILE, MASKED_TILE
    )


@triton.jit
def limited_tile_bounds(limits, TILE: tl.constexpr, MASKED_TILE: tl.constexpr):
    """The same, of rows with limits."""
    first, end, prefix = limits
    first_key = tl.where(prefix > 0, 0, tl.maximum(tl.min(first, 0), 0))
    full_first_key = tl.maximum(tl.max(first, 0), 0)
    return tile_bounds(
        first_key, full_first_key, tl.min(end, 0), tl.max(end, 0), TILE, MASKED_TILE
    )


@triton.jit
def attend_ranges(
    state, query, position, key_ptr, value_ptr, key_strides, value_strides, block_row,
    before, seen_whole, after,  # ranges of tiles, see key_tile_bounds
    keys_range, scales, sight, boxes, token_scales,  # as in attend_tiles
    HAS_BEFORE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI_SQRT: tl.constexpr, TILE: tl.constexpr,
    MASKED_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr, PRECISION: tl.constexpr, PAIRED_VALUES: tl.constexpr,
    KV_FORMAT: tl.constexpr, WIDENING: tl.constexpr, FIXED_ORDER: tl.constexpr,
    SYNCED: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Left edge of the window, then whole tiles, then diagonal and end."""
    if HAS_BEFORE:
        state = attend_tiles(
            state, query, position, key_ptr, value_ptr, key_strides, value_strides,
            block_row, before, keys_range, scales, sight, None, token_scales,
            CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, True, MASKED_TILE,
            BLOCK_SIZE, HEAD_SIZE, HEAD_PADDED, PRECISION, PAIRED_VALUES,
            KV_FORMAT, WIDENING, FIXED_ORDER,
            SYNCED=SYNCED, SCALE_COLUMNS=SCALE_COLUMNS,
        )  # fmt: skip
    state = attend_tiles(
        state, query, position, key_ptr, value_ptr, key_strides, value_strides,
        block_row, seen_whole, keys_range, scales, sight, boxes, token_scales,
        CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, False, TILE,
        BLOCK_SIZE, HEAD_SIZE, HEAD_PADDED, PRECISION, PAIRED_VALUES,
        KV_FORMAT, WIDENING, FIXED_ORDER,
        SYNCED=SYNCED, SCALE_COLUMNS=SCALE_COLUMNS,
    )  # fmt: skip
    return attend_tiles(
        state, query, position, key_ptr, value_ptr, key_strides, value_strides,
        block_row, after, keys_range, scales, sight, None, token_scales,
        CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, True, MASKED_TILE,
        BLOCK_SIZE, HEAD_SIZE, HEAD_PADDED, PRECISION, PAIRED_VALUES,
        KV_FORMAT, WIDENING, FIXED_ORDER,
        SYNCED=SYNCED, SCALE_COLUMNS=SCALE_COLUMNS,
    )  # fmt: skip


@triton.jit
def attend_segments(
    query, position, key_ptr, value_ptr, key_strides, value_strides, block_row,
    before, seen_whole, after, keys_range, scales, sight, boxes, token_scales,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_BEFORE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI_SQRT: tl.constexpr, TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    PRECISION: tl.constexpr, PAIRED_VALUES: tl.constexpr, KV_FORMAT: tl.constexpr,
    WIDENING: tl.constexpr,
):  # fmt: skip
    """The same, segment by segment, each from nothing; see `segments`."""
    TILES: tl.constexpr = SEGMENT // TILE
    acc, row_max, row_sum = start_state(BLOCK_M, HEAD_PADDED, None, None)
    for segment in range(before[0] // TILES, tl.cdiv(after[1], TILES)):
        begin, end = segment * TILES, (segment + 1) * TILES
        later, later_max, later_sum = attend_ranges(
            start_state(BLOCK_M, HEAD_PADDED, PAIRED_VALUES, KV_FORMAT),
            query, position, key_ptr, value_ptr, key_strides, value_strides, block_row,
            clip(before, begin, end), clip(seen_whole, begin, end),
            clip(after, begin, end), keys_range, scales, sight, boxes, token_scales,
            HAS_BEFORE, CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, TILE, TILE,
            BLOCK_SIZE, HEAD_SIZE, HEAD_PADDED, PRECISION, PAIRED_VALUES, KV_FORMAT,
            WIDENING, True, False, 0,
        )  # fmt: skip
        acc, row_max, row_sum = merge_states(
            acc, row_max, row_sum,
            whole(later, BLOCK_M, HEAD_PADDED, PAIRED_VALUES, KV_FORMAT),
            later_max, later_sum,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def head_and_tile(
    program, num_tiles, num_tile_blocks,
    KV_HEADS: tl.constexpr, SHARING: tl.constexpr,
    LANES: tl.constexpr, TILE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Which head tile and which tile of rows a program takes; see `plan.Order`.

    Args:
        program: number of the program.
        num_tiles: of rows; each is there for every head tile. Those of the heaviest
            items come first.
        num_tile_blocks: blocks of tiles; what they leave goes tile by tile.
        KV_HEADS: a multiple of LANES.
        SHARING: head tiles of a KV head.
        LANES: see `plan.Order`.
        TILE_BLOCK: tiles of rows in a block; None: all.

    """
    HEADS: tl.constexpr = KV_HEADS // LANES
    rank = program // LANES  # in its lane
    if TILE_BLOCK is None:
        kv_head = rank // (num_tiles * SHARING)
        tile = rank // SHARING % num_tiles
    elif TILE_BLOCK == 1:
        kv_head, tile = rank // SHARING % HEADS, rank // (SHARING * HEADS)
    else:
        # By constants, as quotients of numbers take registers of every thread.
        OF_HEAD: tl.constexpr = TILE_BLOCK * SHARING
        block = rank // (OF_HEAD * HEADS)
        in_block = block < num_tile_blocks
        kv_head = tl.where(in_block, rank // OF_HEAD, rank // SHARING) % HEADS
        tile = block * TILE_BLOCK + rank % OF_HEAD // SHARING
        tile = tl.where(in_block, tile, rank // (SHARING * HEADS))
    kv_head += program % LANES * HEADS
    return kv_head * SHARING + rank % SHARING, tile


# Microbatches slice what is per sequence anywhere: alignment must make no variant.
@triton.jit(
    do_not_specialize=[
        "num_tile_blocks",
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
def prefill_kernel(
    num_tile_blocks,  # see `head_and_tile`, as for LANES and TILE_BLOCK
    # Descriptors of [num_blocks, num_kv_heads, block_size, head_size], or None
    key_boxes,
    value_boxes,
    output_ptr,  # [num_tokens, num_query_heads, head_size]
    lse_ptr,  # [num_tokens, num_query_heads] or None
    query_ptr,  # [num_tokens, num_query_heads, head_size]
    key_ptr,  # [num_blocks, block_size, num_kv_heads, head_size]
    value_ptr,
    block_table_ptr,  # [num_seqs, max_blocks]
    items_ptr,  # [num_items, ITEM_FIELDS]
    partial_acc_ptr,  # as in `combine_kernel`, or None: keys are not split
    partial_max_ptr,
    partial_sum_ptr,
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
    GROUP: tl.constexpr,  # query heads per KV head
    PACK: tl.constexpr,  # query heads in a tile, a divisor of GROUP
    ITEM_TILES: tl.constexpr,  # tiles of rows that an item has
    HEAD_TILES: tl.constexpr,  # tiles of PACK heads
    LANES: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,  # keys in a tile that every row sees whole
    MASKED_TILE: tl.constexpr,  # keys in other tiles
    SYNCED: tl.constexpr,  # see `plan.Config`
    SCALE_COLUMNS: tl.constexpr,
    SEGMENT: tl.constexpr,  # keys; see `segments`; None: all keys in one
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
):
    SHARING: tl.constexpr = GROUP // PACK
    # One dimension, as others of a grid have at most 65535 programs.
    head_tile, row_tile = head_and_tile(
        tl.program_id(0), tl.num_programs(0) // HEAD_TILES, num_tile_blocks,
        HEAD_TILES // SHARING, SHARING, LANES, TILE_BLOCK,
    )  # fmt: skip
    first_head = head_tile * PACK
    kv_head = first_head // GROUP
    item = items_ptr + row_tile // ITEM_TILES * ITEM_FIELDS
    sequence = tl.load(item)
    if sequence < 0:
        return
    m_block = tl.load(item + 1) * ITEM_TILES + row_tile % ITEM_TILES
    query_start = tl.load(item + 2)
    query_len = tl.load(item + 3)
    seq_len = tl.load(item + 4)
    if ITEM_TILES > 1 and m_block * BLOCK_M >= query_len * PACK:
        return

    token, packed_head, row_valid = query_rows(m_block, query_len, PACK, BLOCK_M)
    head = first_head + packed_head
    dims = tl.arange(0, HEAD_PADDED)
    dims_valid = row_valid[:, None] & (dims < HEAD_SIZE)[None, :]
    offsets = row_offsets(query_start, token, head, query_strides, dims)
    scales, v_scale = load_scales(
        q_scale_ptr, k_scale_ptr, v_scale_ptr, scale_strides, (scale, cap_scale),
        SOFTCAP,
    )  # fmt: skip
    query, scales = load_query(
        query_ptr, offsets, dims_valid, scales, key_ptr.dtype.element_ty, SOFTCAP,
        SEGMENT is not None,
    )  # fmt: skip

    if not LIMITED:
        limits: tl.constexpr = None
        bounds = key_tile_bounds(
            m_block, query_len, seq_len, window,
            PACK, BLOCK_M, TILE, MASKED_TILE, CAUSAL, WINDOWED,
        )  # fmt: skip
    else:
        limits = row_limits(
            seq_len - query_len + tl.minimum(token, query_len - 1),
            sequence, seq_len, window, causal_ptr, (ranges_ptr, num_ranges), prefix_ptr,
            CAUSAL, WINDOWED, CHUNK_LOOKBACK, RANGES_IN_WINDOW,
        )  # fmt: skip
        bounds = limited_tile_bounds(limits, TILE, MASKED_TILE)
    keys_range, before, seen_whole, after = bounds
    if partial_acc_ptr is not None:
        part_begin, part_end = tl.load(item + 5), tl.load(item + 6)
        before = clip(before, part_begin // MASKED_TILE, part_end // MASKED_TILE)
        seen_whole = clip(seen_whole, part_begin // TILE, part_end // TILE)
        after = clip(after, part_begin // MASKED_TILE, part_end // MASKED_TILE)
    position = seq_len - query_len + token
    block_row = block_table_ptr + sequence.to(tl.int64) * block_table_stride
    key_strides = in_elements(key_strides, STRIDE_UNIT)
    value_strides = in_elements(value_strides, STRIDE_UNIT)
    if VALUE_OFFSET is not None:
        value_ptr = key_ptr + VALUE_OFFSET
    key_ptr += kv_head.to(tl.int64) * key_strides[2]
    value_ptr += kv_head.to(tl.int64) * value_strides[2]
    if slopes_ptr is None:
        slopes: tl.constexpr = None
    else:
        slopes = load_slopes(slopes_ptr, head, row_valid)
    sight = (window, slopes, limits)
    if key_boxes is None:
        boxes: tl.constexpr = None
    else:
        boxes = (key_boxes, value_boxes, kv_head)
    if scale_strides is None:
        token_scales: tl.constexpr = None
    else:
        token_scales = scales_of_head(k_scale_ptr, v_scale_ptr, scale_strides, kv_head)
    HAS_BEFORE: tl.constexpr = WINDOWED or LIMITED
    if SEGMENT is None:
        acc, row_max, row_sum = attend_ranges(
            start_state(BLOCK_M, HEAD_PADDED, PAIRED_VALUES, KV_FORMAT),
            query, position, key_ptr, value_ptr, key_strides, value_strides, block_row,
            before, seen_whole, after, keys_range, scales, sight, boxes, token_scales,
            HAS_BEFORE, CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, TILE, MASKED_TILE,
            BLOCK_SIZE, HEAD_SIZE, HEAD_PADDED, PRECISION, PAIRED_VALUES, KV_FORMAT,
            WIDENING, False, SYNCED, SCALE_COLUMNS,
        )  # fmt: skip
        acc = whole(acc, BLOCK_M, HEAD_PADDED, PAIRED_VALUES, KV_FORMAT)
    else:
        tl.static_assert(MASKED_TILE == TILE)
        acc, row_max, row_sum = attend_segments(
            query, position, key_ptr, value_ptr, key_strides, value_strides, block_row,
            before, seen_whole, after, keys_range, scales, sight, boxes, token_scales,
            SEGMENT, BLOCK_M, HAS_BEFORE, CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, TILE,
            BLOCK_SIZE, HEAD_SIZE, HEAD_PADDED, PRECISION, PAIRED_VALUES, KV_FORMAT,
            WIDENING,
        )  # fmt: skip

    target = (
        output_ptr, lse_ptr, output_strides, lse_stride, sinks_ptr, output_scale_ptr,
    )  # fmt: skip
    is_whole = True
    if partial_acc_ptr is not None:
        is_whole = tl.load(item + 7) == 1
        if not is_whole:
            place = row_tile // ITEM_TILES * HEAD_TILES + head_tile
            leave_partial(
                (partial_acc_ptr, partial_max_ptr, partial_sum_ptr),
                place * ITEM_TILES + row_tile % ITEM_TILES,
                acc, row_max, row_sum, row_valid, BLOCK_M, HEAD_PADDED,
            )  # fmt: skip
    if is_whole:
        write_rows(
            target, acc, row_max, row_sum, v_scale,
            query_start, token, head, row_valid, HEAD_SIZE, HEAD_PADDED, FP8, FP8_MAX,
        )  # fmt: skip
