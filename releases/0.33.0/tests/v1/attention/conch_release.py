# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The engine's side of CONCH's tests: what it binds to a layer and how it calls it."""

from typing import Any

import torch

from tests.kernels.attention.conch_reference import nan_filled
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import (
    AttentionSelectorConfig,
    _cached_get_attn_backend,
)
from vllm.v1.attention.selector import get_attn_backend as select
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

__all__ = [
    "AttentionBackendEnum",
    "AttentionSelectorConfig",
    "KV_LAYOUTS",
    "bind_kv_cache",
    "build_with_images",
    "get_attn_backend",
    "make_kv_cache",
    "make_spec",
    "run_layer",
]

KV_LAYOUTS = [layout.name for layout in KVCacheLayout]


def make_spec(
    block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
    )


def make_kv_cache(
    layout: str,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: str,
) -> torch.Tensor:
    """The second of two layers' caches, [B, H, N, 2 * D], NaN in every element."""
    order = KVCacheLayout[layout].stride_order
    shape = (2, num_blocks, num_kv_heads, block_size, 2 * head_size)
    physical = nan_filled(*(shape[i] for i in order), dtype=dtype, device=device)
    return physical.permute(*(order.index(i) for i in range(len(order))))[1]


def bind_kv_cache(layer: Any, kv_cache: torch.Tensor) -> None:
    layer.kv_cache = kv_cache


def build_with_images(
    builder: Any,
    common: Any,
    images: dict[int, list[tuple[int, int]]],
    num_layers: int,
) -> Any:
    """Metadata of a batch whose requests have images at these positions."""
    common.mm_req_doc_ranges = images
    return builder.build(0, common)


def run_layer(
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    metadata: Any,
    output: torch.Tensor,
    **scales: torch.Tensor,
) -> torch.Tensor:
    """What vLLM's attention layer calls in one step."""
    impl = layer.impl
    writes = metadata is not None and impl.kv_sharing_target_layer_name is None
    if writes and key is not None and value is not None:
        impl.do_kv_cache_update(
            layer, key, value, layer.kv_cache, metadata.slot_mapping
        )
    return impl.forward(
        layer, query, key, value, layer.kv_cache, metadata, output=output, **scales
    )


def get_attn_backend(head_size: int, dtype: torch.dtype, **features: Any) -> type:
    """The backend that vLLM gives a layer under the current configuration."""
    _cached_get_attn_backend.cache_clear()
    return select(head_size, dtype, features.pop("kv_cache_dtype", "auto"), **features)
