# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rows whose keys were split: what each share leaves, and how they are combined.

A share of the keys leaves its softmax state in fp32: accumulator, maximum, sum. All
states of a row are merged in the order of the keys, so results do not depend on timing
(FlashDecoding, Dao et al. 2023). In decode the last worker to arrive does it; for
prefills, whose shares are many rows each, `combine_kernel` follows in a launch of its
own and spreads the rows over the device.
"""

from vllm.triton_utils import tl, triton

from .tile import write_rows

# One prefill item: sequence (or -1), tile of rows, query_start, query_len, seq_len;
# if keys are split, first key and end of its part, and how many parts the tile has, 0
# in parts after the first.
ITEM_FIELDS: tl.constexpr = tl.constexpr(8)


@triton.jit
def combine_rows(
    partials,  # (accumulators, row maxima, row sums)
    slots,  # of the first part: from here, and so many behind; from part to part
    num_parts,
    rows,  # [R] rows of the tile
    row_valid,
    BLOCK_M: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PARTS: tl.constexpr,  # partials that are loaded at once
):
    """Merges the partials of some rows in the order of their keys."""
    R: tl.constexpr = rows.shape[0]
    dims = tl.arange(0, HEAD_PADDED)
    acc = tl.zeros([R, HEAD_PADDED], tl.float32)
    row_max = tl.full([R], float("-inf"), tl.float32)
    row_sum = tl.zeros([R], tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        slot = slots[0] + part * slots[2] + tl.where(part == 0, slots[1], 0)
        stat = slot.to(tl.int64)[None, :] * BLOCK_M + rows[:, None]  # [R, PARTS]
        valid = row_valid[:, None] & (part < num_parts)[None, :]
        part_acc = tl.load(
            partials[0] + (stat * HEAD_PADDED)[:, :, None] + dims[None, None, :],
            mask=valid[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )  # [R, PARTS, D]
        part_max = tl.load(
            partials[1] + stat, mask=valid, other=float("-inf"), cache_modifier=".cg"
        )
        part_sum = tl.load(
            partials[2] + stat, mask=valid, other=0.0, cache_modifier=".cg"
        )
        new_max = tl.maximum(row_max, tl.max(part_max, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(row_max - shift)
        weight = tl.exp2(part_max - shift[:, None])
        acc = acc * decay[:, None] + tl.sum(part_acc * weight[:, :, None], 1)
        row_sum = row_sum * decay + tl.sum(part_sum * weight, 1)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def leave_partial(
    partials,  # (accumulators, row maxima, row sums)
    slot, acc, row_max, row_sum, row_valid,
    ROWS: tl.constexpr, HEAD_PADDED: tl.constexpr,
):  # fmt: skip
    """Leaves the state of a share of a tile's keys; slots have room for ROWS rows."""
    dims = tl.arange(0, HEAD_PADDED)
    stat = slot.to(tl.int64) * ROWS + tl.arange(0, acc.shape[0])
    offsets = stat[:, None] * HEAD_PADDED + dims[None, :]
    tl.store(partials[0] + offsets, acc, mask=row_valid[:, None])
    tl.store(partials[1] + stat, row_max, mask=row_valid)
    tl.store(partials[2] + stat, row_sum, mask=row_valid)


@triton.jit(do_not_specialize=["lse_stride"])
def combine_kernel(
    output_ptr,  # [num_tokens, num_query_heads, head_size]
    lse_ptr,  # [num_tokens, num_query_heads] or None
    items_ptr,  # [num_items, ITEM_FIELDS]
    splits_ptr,  # how many tiles of rows were split, then the first item of each
    partial_acc_ptr,  # [num_items, HEAD_TILES, BLOCK_M, HEAD_PADDED] fp32
    partial_max_ptr,  # [num_items, HEAD_TILES, BLOCK_M] fp32
    partial_sum_ptr,
    v_scale_ptr,  # [1] or None
    sinks_ptr,  # [num_query_heads] or None
    output_scale_ptr,  # [1] or None
    output_strides,  # (token, head)
    lse_stride,
    PACK: tl.constexpr,  # query heads in a tile
    HEAD_TILES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of an item
    ROWS: tl.constexpr,  # that are combined at once
    PARTS: tl.constexpr,  # partials that are loaded at once
    FP8: tl.constexpr,  # format of an output that is divided by output_scale, or None
    FP8_MAX: tl.constexpr,
    OVERLAPS: tl.constexpr,  # the launch before may still run; see `overlap`
):
    """Combines the parts of each prefill tile whose keys were split."""
    partials = (partial_acc_ptr, partial_max_ptr, partial_sum_ptr)
    target = (
        output_ptr, lse_ptr, output_strides, lse_stride, sinks_ptr, output_scale_ptr,
    )  # fmt: skip
    v_scale = 1.0
    if v_scale_ptr is not None:
        v_scale = tl.load(v_scale_ptr)
    CHUNKS: tl.constexpr = BLOCK_M // ROWS
    num_chunks = tl.load(splits_ptr) * HEAD_TILES * CHUNKS
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    for index in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        place = tl.load(splits_ptr + 1 + index // (HEAD_TILES * CHUNKS))
        head_tile = index // CHUNKS % HEAD_TILES
        item = items_ptr + place * ITEM_FIELDS
        m_block = tl.load(item + 1)
        query_start = tl.load(item + 2)
        query_len = tl.load(item + 3)
        num_parts = tl.load(item + 7)
        rows = index % CHUNKS * ROWS + tl.arange(0, ROWS)
        packed_row = m_block * BLOCK_M + rows
        token = packed_row // PACK
        valid = token < query_len
        acc, row_max, row_sum = combine_rows(
            partials, (place * HEAD_TILES + head_tile, 0, HEAD_TILES), num_parts,
            rows, valid, BLOCK_M, HEAD_PADDED, PARTS,
        )  # fmt: skip
        write_rows(
            target, acc, row_max, row_sum, v_scale, query_start, token,
            head_tile * PACK + packed_row % PACK, valid,
            HEAD_SIZE, HEAD_PADDED, FP8, FP8_MAX,
        )  # fmt: skip
