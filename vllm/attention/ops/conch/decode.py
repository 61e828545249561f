# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decode: few query tokens per sequence, the keys split over the whole device.

Bound by reading K and V, so the work is cut by keys: all tiles of all decode rows
(sequence, tile of query rows, KV head) form one line, and each worker takes an
equal contiguous piece of it (stream-K, Osama et al. 2023; LeanAttention, Sanovar
et al. 2024).  A piece holds the end of one row, whole rows, and the start of
another.  Whole rows are written at once.  Of a row that was cut, every worker
leaves an fp32 partial, and the last one to arrive combines them in the order of
the keys (FlashDecoding, Dao et al. 2023), so results do not depend on timing.
"""

from vllm.triton_utils import tl, triton

from .softmax import log_sum_exp, normalize
from .tile import attend_tiles, query_rows, row_offsets

# One worker: entry in the sequence list, row of that sequence, tile of that row,
# number of tiles; and the number of tiles that every worker but the last gets.
WORKER_FIELDS: tl.constexpr = tl.constexpr(8)
# One sequence of the list: sequence, query_start, query_len, seq_len.
SEQUENCE_FIELDS: tl.constexpr = tl.constexpr(4)


@triton.jit
def decode_key_tiles(
    query_len, seq_len, window, TILE: tl.constexpr, WINDOWED: tl.constexpr
):
    """First key, first tile and number of tiles of a decode row, at least one."""
    first_key = query_len * 0
    if WINDOWED:
        first_key = tl.maximum(seq_len - query_len - window + 1, 0)
    first_tile = first_key // TILE
    return first_key, first_tile, tl.maximum(tl.cdiv(seq_len, TILE) - first_tile, 1)


@triton.jit
def decode_rows(query_len, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Number of decode rows of a sequence; row = m_block * NUM_KV_HEADS + KV head."""
    return tl.cdiv(query_len * GROUP, BLOCK_M) * NUM_KV_HEADS


@triton.jit
def partial_offsets(slot, dims, BLOCK_M: tl.constexpr, HEAD_PADDED: tl.constexpr):
    """Offsets of a partial's accumulator [BLOCK_M, D] and of its statistics [BLOCK_M]."""
    row = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row[:, None] * HEAD_PADDED + dims[None, :], row


@triton.jit
def combine(
    partials,  # (accumulators, row maxima, row sums)
    first_worker,
    num_parts,
    dims,
    dims_valid,
    row_valid,
    BLOCK_M: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """Merges the partials of one row in the order of its keys."""
    acc = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.range(0, num_parts):
        # Slot 1 of the worker that starts the row, slot 0 of those that go on.
        slot = 2 * (first_worker + part) + tl.where(part == 0, 1, 0)
        acc_offsets, row = partial_offsets(slot, dims, BLOCK_M, HEAD_PADDED)
        part_acc = tl.load(partials[0] + acc_offsets, mask=dims_valid, other=0.0, cache_modifier=".cg")
        part_max = tl.load(partials[1] + row, mask=row_valid, other=float("-inf"), cache_modifier=".cg")
        part_sum = tl.load(partials[2] + row, mask=row_valid, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, part_max)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(row_max - shift)
        weight = tl.exp2(part_max - shift)
        acc = acc * decay[:, None] + part_acc * weight[:, None]
        row_sum = row_sum * decay + part_sum * weight
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["window"])
def decode_kernel(
    output_ptr,  # [num_tokens, num_query_heads, head_size]
    lse_ptr,  # [num_tokens, num_query_heads] or None
    query_ptr,  # [num_tokens, num_query_heads, head_size]
    key_ptr,  # [num_blocks, block_size, num_kv_heads, head_size]
    value_ptr,
    block_table_ptr,  # [num_seqs, max_blocks]
    workers_ptr,  # [num_workers, WORKER_FIELDS]
    sequences_ptr,  # [num_seqs, SEQUENCE_FIELDS]
    partials,  # ([2 * num_workers, BLOCK_M, D], [2 * num_workers, BLOCK_M] twice), fp32
    arrivals_ptr,  # [num_workers], zero between launches
    k_scale_ptr,  # [1] or None
    v_scale_ptr,
    output_strides,  # (token, head)
    lse_stride,
    query_strides,
    key_strides,  # (page, slot, head)
    value_strides,
    block_table_stride,
    scale,  # softmax scale in log2 units; with softcap: the cap in log2 units
    cap_scale,  # softcap's inner scale
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    worker = tl.program_id(0)
    record = workers_ptr + worker * WORKER_FIELDS
    entry = tl.load(record)
    row = tl.load(record + 1)
    tile = tl.load(record + 2)
    remaining = tl.load(record + 3)
    tiles_per_worker = tl.load(record + 4)
    line = worker * tiles_per_worker  # where this worker is on the line of tiles

    if k_scale_ptr is not None:
        k_scale = tl.load(k_scale_ptr)
        if SOFTCAP:
            cap_scale *= k_scale
        else:
            scale *= k_scale
    v_scale = 1.0
    if v_scale_ptr is not None:
        v_scale = tl.load(v_scale_ptr)
    dims = tl.arange(0, HEAD_PADDED)

    while remaining > 0:
        sequence = tl.load(sequences_ptr + entry * SEQUENCE_FIELDS)
        query_start = tl.load(sequences_ptr + entry * SEQUENCE_FIELDS + 1)
        query_len = tl.load(sequences_ptr + entry * SEQUENCE_FIELDS + 2)
        seq_len = tl.load(sequences_ptr + entry * SEQUENCE_FIELDS + 3)
        first_key, first_tile, row_tiles = decode_key_tiles(
            query_len, seq_len, window, TILE, WINDOWED
        )
        num_tiles = tl.minimum(remaining, row_tiles - tile)

        kv_head = row % NUM_KV_HEADS
        token, group_head, row_valid = query_rows(
            row // NUM_KV_HEADS, query_len, GROUP, BLOCK_M
        )
        head = kv_head * GROUP + group_head
        dims_valid = row_valid[:, None] & (dims < HEAD_SIZE)[None, :]
        offsets = row_offsets(query_start, token, head, query_strides, dims, HEAD_SIZE)
        query = tl.load(query_ptr + offsets, mask=dims_valid, other=0.0)
        state = (
            tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32),
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
        )
        acc, row_max, row_sum = attend_tiles(
            state, query, seq_len - query_len + token,
            key_ptr + kv_head.to(tl.int64) * key_strides[2],
            value_ptr + kv_head.to(tl.int64) * value_strides[2],
            key_strides, value_strides,
            block_table_ptr + sequence.to(tl.int64) * block_table_stride,
            (first_tile + tile, first_tile + tile + num_tiles), (first_key, seq_len),
            (scale, cap_scale), window,
            CAUSAL, WINDOWED, SOFTCAP, True, TILE, BLOCK_SIZE, HEAD_SIZE, HEAD_PADDED,
        )  # fmt: skip

        complete = num_tiles == row_tiles
        if not complete:
            first_worker = (line - tile) // tiles_per_worker
            num_parts = (line - tile + row_tiles - 1) // tiles_per_worker - first_worker + 1
            slot = 2 * worker + tl.where(tile == 0, 1, 0)
            acc_offsets, stat = partial_offsets(slot, dims, BLOCK_M, HEAD_PADDED)
            tl.store(partials[0] + acc_offsets, acc, mask=dims_valid)
            tl.store(partials[1] + stat, row_max, mask=row_valid)
            tl.store(partials[2] + stat, row_sum, mask=row_valid)
            tl.debug_barrier()  # every thread's stores come before the arrival
            arrived = tl.atomic_add(arrivals_ptr + first_worker, 1, sem="acq_rel")
            complete = arrived == num_parts - 1
            if complete:
                tl.store(arrivals_ptr + first_worker, 0)
                acc, row_max, row_sum = combine(
                    partials, first_worker, num_parts, dims, dims_valid, row_valid,
                    BLOCK_M, HEAD_PADDED,
                )  # fmt: skip
        if complete:
            out = normalize(acc, row_sum, v_scale).to(output_ptr.dtype.element_ty)
            offsets = row_offsets(query_start, token, head, output_strides, dims, HEAD_SIZE)
            tl.store(output_ptr + offsets, out, mask=dims_valid)
            if lse_ptr is not None:
                lse_row = (query_start + token).to(tl.int64) * lse_stride + head
                tl.store(lse_ptr + lse_row, log_sum_exp(row_max, row_sum), mask=row_valid)

        line += num_tiles
        remaining -= num_tiles
        tile = 0
        row += 1
        if row == decode_rows(query_len, NUM_KV_HEADS, GROUP, BLOCK_M):
            row = 0
            entry += 1
