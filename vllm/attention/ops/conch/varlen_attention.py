# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention of ragged batches over a paged KV cache."""

import torch

from vllm.triton_utils import triton

from .decode import decode_kernel
from .prefill import prefill_kernel
from .schedule import VarlenSchedule
from .softmax import LOG2_E


def varlen_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_query_len: int,
    scale: float,
    causal: bool = True,
    softcap: float = 0.0,
    sliding_window: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    output_lse: torch.Tensor | None = None,
    schedule: VarlenSchedule | None = None,
) -> None:
    if schedule is None:
        schedule = VarlenSchedule(
            max_num_seqs=max(seq_lens.shape[0], 1),
            max_num_tokens=max(query.shape[0], 1),
            num_query_heads=query.shape[1],
            num_kv_heads=key_cache.shape[2],
            head_size=query.shape[2],
            block_size=key_cache.shape[1],
            query_dtype=query.dtype,
            kv_dtype=key_cache.dtype,
            device=query.device,
            sliding_window=sliding_window,
        )
        schedule.update(
            query_start_loc,
            seq_lens,
            max_query_len=max_query_len,
            num_tokens=query.shape[0],
            causal=causal,
        )
    plan = schedule.plan
    shape = schedule.shape
    score_scale, cap_scale = scale * LOG2_E, 0.0
    if softcap:
        score_scale, cap_scale = softcap * LOG2_E, 2 * LOG2_E * scale / softcap
    variant = dict(
        GROUP=shape.group,
        HEAD_SIZE=shape.head_size,
        HEAD_PADDED=shape.head_padded,
        BLOCK_SIZE=shape.block_size,
        CAUSAL=causal,
        WINDOWED=sliding_window is not None,
        SOFTCAP=softcap > 0,
    )
    scales = (k_scale, v_scale)
    strides = (
        output.stride()[:2],
        0 if output_lse is None else output_lse.stride(0),
        query.stride()[:2],
        key_cache.stride()[:3],
        value_cache.stride()[:3],
        block_table.stride(0),
        score_scale,
        cap_scale,
        sliding_window or 0,
    )
    tensors = (output, output_lse, query, key_cache, value_cache, block_table)
    decode_kernel[(schedule.num_workers,)](
        *tensors,
        schedule.workers,
        schedule.sequences,
        schedule.partials,
        schedule.arrivals,
        *scales,
        *strides,
        **variant,
        NUM_KV_HEADS=shape.num_kv_heads,
        BLOCK_M=plan.decode.block_m,
        TILE=plan.decode.tile,
        num_warps=plan.decode.num_warps,
        num_stages=plan.decode.num_stages,
    )
    if schedule.num_items:
        prefill_kernel[(shape.num_kv_heads, schedule.num_items)](
            *tensors,
            schedule.items,
            *scales,
            *strides,
            **variant,
            BLOCK_M=plan.prefill.block_m,
            TILE=plan.prefill.tile,
            num_warps=plan.prefill.num_warps,
            num_stages=plan.prefill.num_stages,
        )
