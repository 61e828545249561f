# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CONCH's functions under the signatures that upstream's tests call.

Goes into the folder that tools/upstream_tests.py makes. An argument that CONCH has no
use for is dropped; one that it would have to obey and cannot is an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from vllm.attention.ops.conch import (
    reshape_and_cache,
    scaled_fp8_quant,
    varlen_attention,
)
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backends.conch_attn import ConchAttentionImpl
from vllm.v1.attention.backends.conch_pages import BatchPages, pages_of_batch

# Arguments of upstream's kernels that say how to compute, not what.
TUNING = {
    "max_seqlen_k",
    "seq_threshold_3D",
    "num_par_softmax_segments",
    "softmax_segm_output",
    "softmax_segm_max",
    "softmax_segm_expsum",
    "kv_quant_mode",
    "use_td",
    "fa_version",
}


def one_scale(scale: torch.Tensor | float | None) -> torch.Tensor | None:
    """The one number of a scale that upstream spreads over sequences and heads."""
    if not isinstance(scale, torch.Tensor):
        assert scale is None or scale == 1, scale
        return None
    scales = scale.reshape(-1)
    assert (scales == scales[0]).all(), "CONCH has one scale for a tensor"
    return scales[:1]


def window_of(window_size: tuple[int, int]) -> int | None:
    """Keys that a causal token sees, its own included."""
    left, right = window_size
    assert right in (-1, 0), window_size
    return None if left < 0 else left + 1


def unified_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    causal: bool | torch.Tensor,
    window_size: tuple[int, int],
    block_table: torch.Tensor,
    softcap: float,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | float | None = None,
    v_descale: torch.Tensor | float | None = None,
    mm_prefix_range: torch.Tensor | None = None,
    mm_prefix_clamp_sliding_window: bool = False,
    chunk_lookback: int = -1,
    output_scale: torch.Tensor | None = None,
    k_scale_cache: torch.Tensor | None = None,
    v_scale_cache: torch.Tensor | None = None,
    **others: Any,
) -> None:
    """Attention over pages, as vLLM's Triton kernel."""
    unknown = others.keys() - TUNING
    assert not unknown, f"arguments that CONCH would have to obey: {unknown}"
    if (q.dtype, k.dtype) == (torch.float16, torch.bfloat16):  # a test's, on a CPU
        k, v = k.half(), v.half()
    varlen_attention(
        q,
        k,
        v,
        out,
        cu_seqlens_q,
        seqused_k,
        block_table,
        max_query_len=max_seqlen_q,
        scale=softmax_scale,
        causal=causal,
        softcap=softcap,
        sliding_window=window_of(window_size),
        q_scale=one_scale(q_descale),
        k_scale=one_scale(k_descale) if k_scale_cache is None else k_scale_cache,
        v_scale=one_scale(v_descale) if v_scale_cache is None else v_scale_cache,
        mm_prefix_range=mm_prefix_range,
        mm_prefix_in_window=mm_prefix_clamp_sliding_window,
        chunk_lookback=chunk_lookback,
        output_scale=output_scale,
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    out: torch.Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float = 0.0,
    dynamic_causal: torch.Tensor | None = None,
    **arguments: Any,
) -> torch.Tensor:
    """FlashAttention's interface over pages."""
    arguments["causal"] = causal if dynamic_causal is None else dynamic_causal
    arguments["window_size"] = (-1, -1) if window_size is None else window_size
    arguments["softcap"] = softcap
    if out is None:
        # As upstream's: a query in fp8 gives bfloat16.
        dtype = torch.bfloat16 if q.dtype.itemsize == 1 else q.dtype
        out = torch.empty_like(q, dtype=dtype)
    unified_attention(q, out=out, **arguments)
    return out


def attend_batch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    **options: Any,
) -> None:
    """Attention to the keys and values of the batch itself, as in an encoder."""
    num_seqs = len(query_start_loc) - 1
    pages = BatchPages(num_seqs, max_query_len, q.device)
    seq_lens, block_table = pages.update(query_start_loc, max_query_len)
    varlen_attention(
        q,
        pages_of_batch(k),
        pages_of_batch(v),
        out,
        query_start_loc,
        seq_lens,
        block_table,
        max_query_len=max_query_len,
        scale=q.shape[-1] ** -0.5,
        **options,
    )


def context_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    b_start_loc: torch.Tensor,
    b_seq_len: torch.Tensor,
    max_input_len: int,
    is_causal: bool = True,
    sliding_window_q: int | None = None,
    sliding_window_k: int | None = None,
) -> None:
    """Attention without a cache, as vLLM's Triton kernel."""
    assert sliding_window_q == sliding_window_k, "CONCH's window is symmetric"
    ends = (b_start_loc[-1:] + b_seq_len[-1:]).to(torch.int32)
    attend_batch(
        q,
        k,
        v,
        o,
        torch.cat([b_start_loc, ends]),
        max_input_len,
        causal=is_causal,
        sliding_window=None if sliding_window_q is None else sliding_window_q + 1,
    )


def mm_prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_lens: list[int],
    seq_lens: list[int],
    mm_ranges: dict[int, list[tuple[int, int]]],
    sliding_window: int | None,
    scale: float,
    mm_clamp_sw: int = 0,
) -> torch.Tensor:
    """Attention with ranges seen both ways; K and V of each sequence one by one."""
    page, device = 16, q.device
    num_pages = [-(-length // page) for length in seq_lens]

    def in_pages(rows: torch.Tensor) -> torch.Tensor:
        parts = [
            torch.nn.functional.pad(part, (0, 0, 0, 0, 0, -len(part) % page))
            for part in rows.split(seq_lens)
        ]
        return torch.cat(parts).unflatten(0, (-1, page))

    block_table = torch.zeros(len(seq_lens), max(num_pages), dtype=torch.int32)
    first = 0
    for row, count in enumerate(num_pages):
        block_table[row, :count] = torch.arange(first, first + count)
        first += count
    most = max(map(len, mm_ranges.values()))
    ranges = torch.zeros(len(seq_lens), most, 2, dtype=torch.int32)
    for row, pairs in mm_ranges.items():
        ranges[row, : len(pairs)] = torch.tensor(pairs)
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0)
    out = torch.empty_like(q)
    varlen_attention(
        q,
        in_pages(k),
        in_pages(v),
        out,
        starts.to(device, torch.int32),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table.to(device),
        max_query_len=max(query_lens),
        scale=scale,
        sliding_window=sliding_window,
        mm_prefix_range=ranges.to(device),
        mm_prefix_in_window=mm_clamp_sw > 0,
    )
    return out


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """The write to the cache, as vLLM's op."""
    if kv_cache_dtype != "auto":
        dtype = current_platform.fp8_dtype()
        key_cache, value_cache = key_cache.view(dtype), value_cache.view(dtype)
    reshape_and_cache(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def triton_reshape_and_cache_flash_per_token_head_quant(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_scale_cache: torch.Tensor,
    v_scale_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_quant_mode: Any,
) -> None:
    """The write with scales per token and head, as vLLM's function."""
    reshape_and_cache(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        k_scale=k_scale_cache,
        v_scale=v_scale_cache,
    )


class QuantOps:
    """In the place of vllm._custom_ops, of which the test calls this alone."""

    @staticmethod
    def scaled_fp8_quant(
        input: torch.Tensor,
        scale: torch.Tensor | None = None,
        *,
        scale_ub: torch.Tensor | None = None,
        use_per_token_if_dynamic: bool = False,
        group_shape: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantisation to fp8, as vLLM's op."""
        assert group_shape in (None, (-1, -1)), "CONCH has no scales per group"
        given = None if scale is None else scale.reshape(-1)
        output, used = scaled_fp8_quant(
            input, given, per_token=use_per_token_if_dynamic, scale_ub=scale_ub
        )
        return output, used if scale is None else scale


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes it the default, as it is while vLLM builds a model of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def register_layer(
    vllm_config: Any, layer_names: list[str], dtype: torch.dtype, **options: Any
) -> None:
    """Makes the layers that a metadata builder is for, as loading a model does.

    Upstream's tests make builders for layers that there are not; CONCH's looks at
    them.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    head_size = options.pop("head_size", model.get_head_size())
    with set_current_vllm_config(vllm_config), default_dtype(dtype):
        impl = ConchAttentionImpl(
            num_heads=model.get_num_attention_heads(parallel),
            head_size=head_size,
            scale=head_size**-0.5,
            num_kv_heads=model.get_num_kv_heads(parallel),
            **options,
        )
    layers = vllm_config.compilation_config.static_forward_context
    layers.update({name: SimpleNamespace(impl=impl) for name in layer_names})
