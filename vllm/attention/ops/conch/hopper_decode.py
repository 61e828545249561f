# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decode attention for Hopper: the host side of `hopper_decode_kernel`.

It takes the place of `decode_kernel`, with the same work list and partials, where TMA
can read queries and pages. Availability and descriptors are those of `hopper_prefill`.
"""

import torch

from vllm.triton_utils import triton

from .checks import TensorSpec
from .hopper_prefill import (
    CONSUMER_ROWS,
    DTYPES,
    LOG2E,
    PANEL,
    HopperLaunch,
)
from .launch import Launch, dependent_options
from .limits import WIDEST_WINDOW

# Not 64: on an H200 16 x 8k take 86 us in this kernel, 82 in the portable one. Two
# programs on a multiprocessor have no registers for heads of 256.
HEAD_SIZES = range(72, 129, 8)
# Of K and V in flight in each of two programs on a multiprocessor.
RING_BYTES = 96 * 1024
# Beside prefills, which what is in flight keeps waiting: on an H200 2k tokens beside 64
# decodes at 4k take 283 us so, not 285, and with a worse share of the multiprocessors
# 294, not 343.
RING_BYTES_BESIDE = 64 * 1024
REGISTERS = 128  # of a thread, on average: what two programs can have
# Partials that are loaded at once: 1 x 8k, with 32 parts a row, take 21.4 us so, and
# 22.3 in two rounds. Of rows with few parts twice as many rows are combined at once: 16
# x 8k with 5 query tokens take 143.5 us so, not 146.2, and 8 x 1k 20.2, not 20.6.
PARTS, FEW_PARTS = 32, 8


def supports(
    *,
    head_size: int,
    group: int,
    block_size: int,
    query_dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> bool:
    """Whether the kernel covers a model's attention; else the portable one does.

    Causal or not, windows, packed views and sinks are covered with all of these.
    Softcaps, ALiBi, ranges of images and other masks are not.
    """
    return (
        head_size in HEAD_SIZES
        and group <= CONSUMER_ROWS
        and group & (group - 1) == 0  # a box of queries has so many heads
        and block_size % 16 == 0
        and query_dtype in DTYPES
        and kv_dtype == query_dtype
    )


def plan_launch(
    query: TensorSpec,
    key_cache: TensorSpec,
    output: TensorSpec,
    lse: TensorSpec | None,
    block_table: TensorSpec,
    *,
    block_m: int,
    tile: int,
    workers: int,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    overlaps: bool = False,
) -> HopperLaunch:
    """Plans the launch of the decodes on a schedule's list.

    Its tensors: output, output_lse, block_table, workers, sequences, the three of
    partials, arrivals, sinks. On an H200 ragged batches of 8, 16 and 64 sequences take
    49.4, 78.3 and 249 us, by the portable kernel 52.5, 82.5 and 260, as the next row's
    keys are on their way while a row ends; 64 x 8k take 490 and 489.

    Args:
        query: as for `hopper_prefill`.
        key_cache: likewise.
        output: likewise.
        lse: [num_tokens, num_query_heads] fp32, if there is one.
        block_table: likewise.
        block_m: rows of a tile of query rows, at most 64.
        tile: keys of a tile.
        workers: programs.
        scale: factor of the logits.
        causal: as for `hopper_prefill`.
        sliding_window: likewise.
        overlaps: whether the launch follows that of prefills; see `overlap`.

    """
    from .hopper_decode_kernel import hopper_decode_kernel

    _, block_size, num_kv_heads, head_size = key_cache.shape
    group = query.shape[1] // num_kv_heads
    padded = triton.next_power_of_2(head_size)
    tile_bytes = 2 * tile * padded * key_cache.dtype.itemsize
    launch = Launch(
        hopper_decode_kernel,
        (workers,),
        (
            *output.strides[:2],
            lse.strides[0] if lse else 0,
            block_table.strides[0],
            scale * LOG2E,
            min(sliding_window or 0, WIDEST_WINDOW),
        ),
        dict(
            HEAD_SIZE=head_size,
            BLOCK_M=block_m,
            BLOCK_N=tile,
            PAGE=block_size,
            GROUP=group,
            NUM_KV_HEADS=num_kv_heads,
            STAGES=(RING_BYTES_BESIDE if overlaps else RING_BYTES) // tile_bytes,
            CAUSAL=causal,
            WINDOWED=sliding_window is not None,
            PARTS=PARTS,
            FEW_PARTS=FEW_PARTS,
            num_warps=4,
            maxnreg=REGISTERS,
            **dependent_options(overlaps),
        ),
    )
    page_box = (1, min(block_size & -block_size, tile), 1, PANEL)
    query_box = (block_m // group, group, PANEL)
    return HopperLaunch(launch, query_box, page_box, queries={})
