# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CONCH's backend over vLLM's caches with a scale for every token and head."""

from typing import Any

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    assert_close,
    poisoned_scratch,
)
from tests.kernels.attention.conch_kv_formats import (
    INT4,
    dequantize,
    quantize,
    shared_out,
)
from tests.kernels.attention.conch_reference import (
    SENTINEL,
    Attention,
    output_tolerance,
    paged_attention,
)
from tests.v1.attention.conch_backend_harness import (
    BLOCK_SIZE,
    HEAD_SIZE,
    NUM_KV_HEADS,
    Engine,
    selector_config,
)
from tests.v1.attention.conch_release import bind_kv_cache, run_layer
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backends import conch_base
from vllm.v1.attention.backends.conch_attn import ConchAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheLayout,
    compute_layer_kv_cache_shape_bytes,
    get_kv_quant_mode,
)

FORMATS = conch_base.TOKEN_HEAD_FORMATS


def make_spec(kv_cache_dtype: str, head_size: int = HEAD_SIZE) -> FullAttentionSpec:
    """A layer's spec as vLLM makes it, before a backend has seen it."""
    return FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_size=head_size,
        dtype=STR_DTYPE_TO_TORCH_DTYPE[kv_cache_dtype],
        kv_quant_mode=get_kv_quant_mode(kv_cache_dtype),
    )


def make_kv_cache(layout: str, kv_cache_dtype: str, num_blocks: int) -> torch.Tensor:
    """The second of two layers' caches, of bytes that are NaN in fp8 and in fp32."""
    spec = ConchAttentionBackend.customize_spec(make_spec(kv_cache_dtype))
    shape = (2, *compute_layer_kv_cache_shape_bytes(spec, num_blocks))
    order = KVCacheLayout[layout].stride_order
    physical = torch.full(
        [shape[i] for i in order], 0x7F, dtype=torch.uint8, device=DEVICE
    )
    logical = physical.permute(*(order.index(i) for i in range(len(order))))
    return logical[1].view(spec.dtype)


class TokenHeadEngine(Engine):
    """One layer over such a cache."""

    def __init__(self, kv_cache_dtype: str, layout: str, **options: Any) -> None:
        super().__init__(kv_cache_dtype=kv_cache_dtype, **options)
        (layer,) = self.layers
        self.kv_cache = make_kv_cache(layout, kv_cache_dtype, self.num_blocks)
        bind_kv_cache(layer, self.kv_cache)
        layer.caches = layer.impl.key_value_caches(self.kv_cache)

    def store(
        self, layer: Any, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Writes rows by definition."""
        place = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        caches = layer.caches
        for cache, scales, rows in (
            (caches.key, caches.k_scale, key),
            (caches.value, caches.v_scale, value),
        ):
            stored, scale = quantize(rows, cache.dtype)
            cache.view(torch.uint8)[place] = stored.view(torch.uint8)
            scales[place] = scale

    def fill_context(self, layer: Any) -> None:
        starts = self.query_start_loc.tolist()
        for row, seq_len in enumerate(self.seq_lens.tolist()):
            position = torch.arange(seq_len - (starts[row + 1] - starts[row]))
            position = position.to(DEVICE)
            block = self.block_table[row][position // BLOCK_SIZE].long()
            slots = block * BLOCK_SIZE + position % BLOCK_SIZE
            shape = (2, len(slots), NUM_KV_HEADS, HEAD_SIZE)
            self.store(layer, slots, *torch.randn(shape, device=DEVICE))

    def check(self, layer: Any, metadata: Any) -> None:
        self.fill_context(layer)
        query, key, value = self.new_tokens(layer, metadata.num_actual_tokens)
        output = torch.full_like(query, SENTINEL)
        before = self.kv_cache.clone()
        run_layer(layer, query, key, value, metadata, output)
        written = self.kv_cache.clone()
        live = metadata.slot_mapping >= 0
        if layer.caches.key.dtype != INT4:  # whose sums in fp32 depend on their order
            self.kv_cache.copy_(before)
            rows = key[: len(live)][live], value[: len(live)][live]
            self.store(layer, metadata.slot_mapping[live], *rows)
            assert torch.equal(written, self.kv_cache)
        caches = layer.caches
        reference = paged_attention(
            query,
            dequantize(caches.key, caches.k_scale),
            dequantize(caches.value, caches.v_scale),
            metadata.query_start_loc,
            metadata.seq_lens,
            self.block_table,
            scale=layer.impl.scale,
        )
        tokens = int(self.query_start_loc[-1])
        reference = Attention(*(part[:tokens] for part in reference))
        if caches.key.dtype == INT4:
            reference = shared_out(reference)
        allowed = output_tolerance(reference, self.dtype)
        assert_close("output", output[:tokens], reference.output, allowed)
        assert bool((output[tokens:] == SENTINEL).all()), "padding rows were written"


# (query_len, tokens already in the cache) of each sequence.
MIXED = [(1, 30), (18, 13), (1, 0)]


@pytest.mark.parametrize("layout", [layout.name for layout in KVCacheLayout])
def test_every_layout(layout: str) -> None:
    engine = TokenHeadEngine("int8_per_token_head", layout)
    engine.step(MIXED, padded_reqs=1, padded_tokens=1)


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_every_format(layout: str, kv_cache_dtype: str) -> None:
    TokenHeadEngine(kv_cache_dtype, layout).step(MIXED)


def test_warm_up_leaves_the_cache_alone() -> None:
    engine = TokenHeadEngine("int4_per_token_head", "LBNHC")
    (layer,) = engine.layers
    before = engine.kv_cache.clone()
    layer.impl.run_dummy_batches(layer)
    assert torch.equal(engine.kv_cache, before)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", *FORMATS])
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_pages_are_as_large_as_tritons(head_size: int, kv_cache_dtype: str) -> None:
    if kv_cache_dtype == "auto":
        spec = FullAttentionSpec(16, num_kv_heads=2, head_size=80, dtype=torch.half)
    else:
        spec = make_spec(kv_cache_dtype, head_size)
    customized = ConchAttentionBackend.customize_spec(spec)
    assert customized == TritonAttentionBackend.customize_spec(spec)
    assert ConchAttentionBackend.customize_spec(customized) == customized


@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_head_sizes(kv_cache_dtype: str) -> None:
    """A scale, in fp32, begins where a row ends."""
    multiple = 8 if kv_cache_dtype.startswith("int4") else 4
    for head_size in (16, 80, 112, 512, 64 + multiple // 2):
        config = selector_config(head_size=head_size, kv_cache_dtype=kv_cache_dtype)
        reasons = ConchAttentionBackend.validate_configuration(**config)
        assert bool(reasons) == (head_size % multiple != 0)
        assert not reasons or f"must be a multiple of {multiple}" in reasons[0]
