# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prefill attention for Hopper with queries and a cache in fp8 e4m3.

The host side of `hopper_fp8_prefill_kernel`, as `hopper_prefill` is that of the kernel
for 16 bits; work list, TMA descriptors and availability are the same.
"""

import torch

from .checks import TensorSpec
from .hopper_prefill import (
    HopperLaunch,
    HopperOptions,
    TileConfig,
    padded_head,
    plan_kernel,
)

HEAD_SIZES = range(48, 257, 16)  # 16: TMA's strides; smaller ones waste half the tile
FP8 = torch.float8_e4m3fn
PANEL = 128  # bytes of the widest swizzle


class Fp8Config(TileConfig):
    """Those of the kernel for fp8; of V turned around as many tiles are in flight."""


# By head size, padded. Measured on an H200, causal, 8k tokens, pages of 128: 576, 755
# and 1055 TFLOP/s; 930 at 128 over 32k. The same with 16 bits: 470, 659, 745 and 647.
# Two consumers: 501 at 64, 728 at 128, 803 over 32k; there Q.K of a tile beside P.V of
# the tile before: 492, 740 and 803. At 256 three have no registers.
CONFIGS = {
    64: Fp8Config(consumers=3, block_n=128, stages=4),
    128: Fp8Config(consumers=3, block_n=128, stages=4),
    256: Fp8Config(consumers=2, block_n=128, stages=2),
}


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


def plan_launch(
    query: TensorSpec,
    key_cache: TensorSpec,
    output: TensorSpec,
    block_table: TensorSpec,
    options: HopperOptions,
) -> HopperLaunch:
    """Plans the attention of the queries on a work list to their sequences' paged keys.

    Its tensors: output, output_lse, sinks, work, block_table, q_scale, k_scale,
    v_scale. They and the arguments are as for `hopper_prefill.hopper_prefill`, except
    that

        query and the caches are e4m3fn, strides of the caches multiples of 16;
        q_scale, k_scale, v_scale are one fp32 each, above 0, on the device, by which
            query, keys and values are to be multiplied; None: 1;
        output is bf16 or fp16;
        a query tile has the rows of this module's config.
    """
    from .hopper_fp8_prefill_kernel import hopper_fp8_prefill_kernel

    padded = padded_head(key_cache.shape[3])
    return plan_kernel(
        hopper_fp8_prefill_kernel,
        *(query, key_cache, output, block_table, CONFIGS[padded], options),
        min(padded, PANEL),
        num_warps=4,
    )
