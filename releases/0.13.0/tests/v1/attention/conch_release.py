# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The engine's side of CONCH's tests: what it binds to a layer and how it calls it."""

from typing import Any
from unittest import mock

import torch

from tests.kernels.attention.conch_reference import nan_filled
from vllm.attention.backends.registry import AttentionBackendEnum
from vllm.attention.selector import (
    AttentionSelectorConfig,
    _cached_get_attn_backend,
)
from vllm.attention.selector import get_attn_backend as select
from vllm.v1.attention.backends.conch_attn import ConchAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

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

KV_LAYOUTS = ["NHD", "HND", "cross-layer NHD", "cross-layer HND"]


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
    """A layer's cache, [B, 2, N, H, D], NaN in every element.

    Of a cross-layer cache it is the second layer's part.
    """
    backend = ConchAttentionBackend
    shape = backend.get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size)
    cross_layer = layout.startswith("cross-layer")
    if cross_layer:
        shape = (2, *shape)
    with mock.patch(
        "vllm.v1.attention.backends.utils._KV_CACHE_LAYOUT_OVERRIDE", layout[-3:]
    ):
        order = backend.get_kv_cache_stride_order(cross_layer)
    physical = nan_filled(*(shape[i] for i in order), dtype=dtype, device=device)
    logical = physical.permute(*(order.index(i) for i in range(len(order))))
    return logical[1] if cross_layer else logical


def bind_kv_cache(layer: Any, kv_cache: torch.Tensor) -> None:
    layer.kv_cache = [kv_cache]


def build_with_images(
    builder: Any,
    common: Any,
    images: dict[int, list[tuple[int, int]]],
    num_layers: int,
) -> Any:
    """Metadata of a batch whose requests have images at these positions."""
    metadata = builder.build(0, common)
    for _ in range(num_layers):
        metadata.mm_prefix_range = images
    return metadata


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
    return layer.impl.forward(
        layer, query, key, value, layer.kv_cache[0], metadata, output=output, **scales
    )


def get_attn_backend(head_size: int, dtype: torch.dtype, **features: Any) -> type:
    """The backend that vLLM gives a layer under the current configuration."""
    _cached_get_attn_backend.cache_clear()
    kv_cache_dtype = features.pop("kv_cache_dtype", "auto")
    return select(head_size, dtype, kv_cache_dtype, block_size=16, **features)
