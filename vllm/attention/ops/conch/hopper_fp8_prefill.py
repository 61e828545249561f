# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prefill attention for Hopper with queries and a cache in fp8 e4m3.

The host side of `hopper_fp8_prefill_kernel`, as `hopper_prefill` is that of the kernel
for 16 bits; work list, TMA descriptors and availability are the same.
"""

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from vllm.triton_utils import triton

from .hopper_prefill import (
    CONSUMER_ROWS,
    LOG2E,
    LONG_SEQUENCE_BYTES,
    check_alignment,
    check_sinks,
    num_programs,
    rows_by_head,
)

HEAD_SIZES = range(48, 257, 16)  # 16: TMA's strides; smaller ones waste half the tile
FP8 = torch.float8_e4m3fn
PANEL = 128  # bytes of the widest swizzle


@dataclass(frozen=True)
class Fp8Config:
    """Tile and pipeline of a kernel."""

    consumers: int  # warpgroups of 64 rows
    block_n: int  # keys a tile
    stages: int  # tiles of K, of V, and of V turned around, in flight
    softcap: str = "approx"  # tanh by the hardware's, or exactly by "exp2"
    row_block: int | None = None  # see `hopper_prefill.rows_by_head`

    @property
    def block_m(self) -> int:
        """Packed query rows a work item."""
        return CONSUMER_ROWS * self.consumers


# By head size, padded. Measured on an H200, causal, 8k tokens, pages of 128: 576, 755
# and 1055 TFLOP/s; 930 at 128 over 32k. The same with 16 bits: 470, 659, 745 and 647.
# Two consumers: 501 at 64, 728 at 128, 803 over 32k; there Q.K of a tile beside P.V of
# the tile before: 492, 740 and 803. At 256 three have no registers.
CONFIGS = {
    64: Fp8Config(consumers=3, block_n=128, stages=4),
    128: Fp8Config(consumers=3, block_n=128, stages=4),
    256: Fp8Config(consumers=2, block_n=128, stages=2),
}
# Compiled kernels by what `hopper_fp8_prefill` says of a call.
VARIANTS: dict[tuple, Any] = {}


def supports(
    *,
    head_size: int,
    block_size: int,
    query_dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> bool:
    """Whether the kernel covers a model's attention; else the portable one does."""
    return (
        head_size in HEAD_SIZES
        and block_size % 16 == 0
        and query_dtype == FP8
        and kv_dtype == FP8
    )


@lru_cache(maxsize=4096)
def describe(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
):
    """TMA descriptor of a strided fp8 tensor; holds the address, not the memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    base = SimpleNamespace(dtype=FP8, data_ptr=lambda: address)
    layout = NVMMASharedLayout(box[-1], 8, rank=len(box))
    return TensorDescriptor(base, list(shape), list(strides), list(box), layout)


def describe_tensor(tensor: torch.Tensor, box: tuple[int, ...]):
    return describe(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), box)


def hopper_fp8_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    work: torch.Tensor,
    *,
    pack: int,
    scale: float,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    output_lse: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    config: Fp8Config | None = None,
) -> None:
    """Attention of the queries on a work list to their sequences' paged keys.

    Args:
        query: [num_tokens, num_query_heads, head_size], e4m3fn; times q_scale it is
            the query.
        key_cache: view [num_blocks, block_size, num_kv_heads, head_size], e4m3fn, any
            strides that are multiples of 16, the last 1; times k_scale it is the keys.
        value_cache: like key_cache, own strides, with v_scale.
        output: shaped like query, bf16 or fp16; rows of queries that are not on the
            list stay untouched.
        block_table: [num_seqs, max_blocks] int32; unused entries may hold anything.
        work: as for `hopper_prefill.hopper_prefill`, with this config's block_m.
        pack: heads in a query tile, see `hopper_prefill.packed_heads`.
        scale: factor of the logits, above 0.
        q_scale: one fp32, above 0, on the device; None: 1.
        k_scale: like q_scale.
        v_scale: like q_scale.
        causal: key position <= context + query index; False: all of the sequence.
        sliding_window: keys a query sees, itself included; non-causal: both ways.
        softcap: logits become softcap * tanh(logits / softcap); 0: they do not.
        output_lse: optional [num_tokens, num_query_heads] fp32, contiguous.
        sinks: as for `hopper_prefill.hopper_prefill`.
        config: tile and pipeline, default by head size.
    """
    from .hopper_fp8_prefill_kernel import hopper_fp8_prefill_kernel

    _, block_size, num_kv_heads, head_size = key_cache.shape
    num_query_heads = query.shape[1]
    for name, tensor in (
        ("query", query), ("key_cache", key_cache), ("value_cache", value_cache)
    ):  # fmt: skip
        if tensor.dtype != FP8:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; it must be {FP8}. Use "
                "hopper_prefill for 16-bit tensors."
            )
        check_alignment(name, tensor)
    if sinks is not None:
        check_sinks(sinks, query)
    padded = max(64, triton.next_power_of_2(head_size))
    config = config or CONFIGS[padded]
    group = num_query_heads // num_kv_heads
    row_block = config.row_block
    if row_block is None:
        row_block = rows_by_head(group, pack, sliding_window is not None)
    panel = min(padded, PANEL)
    box = (1, min(block_size & -block_size, config.block_n), 1, panel)
    constants = dict(
        HEAD_SIZE=head_size,
        BLOCK_N=config.block_n,
        PAGE=block_size,
        GROUP=group,
        PACK=pack,
        HEAD_TILES=num_query_heads // pack,
        CONSUMERS=config.consumers,
        STAGES=config.stages,
        CAUSAL=causal,
        WINDOWED=sliding_window is not None,
        WIDE_WINDOW=(sliding_window or 0) >= CONSUMER_ROWS + config.block_n,
        SOFTCAP=config.softcap if softcap else None,
        ROW_BLOCK=row_block,
    )
    arguments = (
        describe_tensor(query, (CONSUMER_ROWS // pack, pack, panel)),
        describe_tensor(key_cache, box),
        describe_tensor(value_cache, box),
        output,
        output_lse,
        sinks,
        work,
        block_table,
        q_scale,
        k_scale,
        v_scale,
        output.stride(0),
        output.stride(1),
        work.shape[0],
        LONG_SEQUENCE_BYTES // (2 * head_size * num_kv_heads),
        block_table.stride(0),
        (softcap or scale) * LOG2E,
        scale / softcap if softcap else 0.0,
        sliding_window or 0,
    )
    # All that Triton distinguishes variants by; looking for itself takes it longer.
    variant = (
        query.device,
        output.dtype,
        tuple(None if t is None else t.data_ptr() % 16 == 0 for t in arguments[3:11]),
        None if sinks is None else sinks.dtype,
        arguments[11:13],
        tuple(constants.values()),
    )
    grid = (num_programs(query.device), 1, 1)
    compiled = VARIANTS.get(variant)
    if compiled is None:
        VARIANTS[variant] = hopper_fp8_prefill_kernel[grid](
            *arguments, **constants, num_warps=4
        )
    else:
        compiled[grid](*arguments, *constants.values())
