# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Encoders with CONCH, and decoders that attend to them."""

from collections.abc import Sequence

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    HALF_DTYPES,
    assert_close,
    gpu_only,
    poisoned_scratch,
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
    MAX_MODEL_LEN,
    NUM_KV_HEADS,
    Engine,
    discard_buffers,
)
from tests.v1.attention.conch_release import bind_kv_cache, run_layer
from vllm.v1.attention.backends.conch_base import AttentionType

ENCODER_TYPES = [AttentionType.ENCODER, AttentionType.ENCODER_ONLY]
# Lengths of whole sequences; most begin in the middle of a page of 16 tokens.
ENCODER_BATCHES = {
    "one token": [1],
    "less than a page": [3, 5],
    "a page": [16],
    "ragged": [7, 33, 1, 50],
    "long": [100, 17, 70],
}


def check_encoder(engine: Engine, lengths: Sequence[int], **padding: int) -> None:
    """Every layer sees the batch alone: no cache is read or written."""
    common = engine.fill([(length, 0) for length in lengths], causal=False, **padding)
    common.seq_lens.fill_(MAX_MODEL_LEN)  # as dummy batches may claim
    metadata = engine.builder.build(0, common)
    for layer in engine.layers:
        # NaN in the cache, in padding rows and behind the batch's last token.
        query, key, value = engine.new_tokens(layer, metadata.num_actual_tokens)
        output = torch.full_like(query, SENTINEL)
        run_layer(layer, query, key, value, metadata, output)
        assert all(bool(cache.float().isnan().all()) for cache in layer.caches)
        rows = (sum(lengths), NUM_KV_HEADS, HEAD_SIZE)
        pages = torch.zeros(2, len(lengths), 112, *rows[1:], device=DEVICE)
        for cache, new in zip(pages, (key, value)):
            for page, tokens in zip(cache, new[: rows[0]].split(list(lengths))):
                page[: len(tokens)] = tokens
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE)
        reference = paged_attention(
            query,
            *pages,
            engine.query_start_loc[: len(lengths) + 1],
            torch.tensor(lengths),
            numbers[:, None],
            scale=layer.impl.scale,
            causal=False,
            softcap=layer.impl.softcap,
            sliding_window=layer.impl.sliding_window,
        )
        reference = Attention(*(part[: rows[0]] for part in reference))
        allowed = output_tolerance(reference, query.dtype)
        assert_close("output", output[: rows[0]], reference.output, allowed)
        assert bool((output[rows[0] :] == SENTINEL).all()), "padding was written"


@pytest.mark.parametrize("attn_type", ENCODER_TYPES)
@pytest.mark.parametrize("batch", ENCODER_BATCHES)
def test_encoder(batch: str, attn_type: str) -> None:
    check_encoder(Engine([{"attn_type": attn_type}]), ENCODER_BATCHES[batch])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_encoder_with_windows_and_softcap(dtype: torch.dtype) -> None:
    options = [{"sliding_window": 8}, {"logits_soft_cap": 5.0}, {"num_heads": 8}]
    layers = [{"attn_type": AttentionType.ENCODER_ONLY} | more for more in options]
    check_encoder(Engine(layers, dtype=dtype), ENCODER_BATCHES["ragged"])


def test_encoder_beside_an_fp8_cache() -> None:
    """What other layers' caches hold is nothing to a layer without one."""
    layers = [{"attn_type": AttentionType.ENCODER_ONLY}]
    check_encoder(Engine(layers, kv_cache_dtype="fp8"), ENCODER_BATCHES["ragged"])


def test_encoder_takes_consecutive_padded_batches() -> None:
    """Buffers of lengths and pages stay where they are, as a CUDA graph needs it."""
    engine = Engine([{"attn_type": AttentionType.ENCODER_ONLY}])
    for lengths in ([100, 17, 70], [5], [7, 33, 1, 50], [2, 2]):
        check_encoder(engine, lengths, padded_reqs=2, padded_tokens=3)
        pages = engine.builder.encoder_pages
        metadata = engine.builder.build(0, engine.fill([(9, 0)], causal=False))
        assert metadata.block_table.data_ptr() == pages.block_table.data_ptr()
        assert metadata.seq_lens.data_ptr() == pages.seq_lens.data_ptr()


def test_sleep_may_discard_an_encoders_buffers() -> None:
    engine = Engine([{"attn_type": AttentionType.ENCODER_ONLY}])
    for lengths in ([100, 17, 70], [7, 33, 1, 50]):
        check_encoder(engine, lengths)
        discard_buffers(engine.builder)


@gpu_only
def test_nothing_compiles_after_an_encoders_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton import knobs

    layers = [{"attn_type": AttentionType.ENCODER_ONLY, "sliding_window": 8}, {}]
    layers[1]["attn_type"] = AttentionType.ENCODER_ONLY
    engine = Engine(layers, dtype=torch.bfloat16)
    for layer in engine.layers:
        layer.impl.warm_up(layer)
    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime,
        "jit_post_compile_hook",
        lambda **event: compiled.append(event["fn"].name),
    )
    for lengths in ENCODER_BATCHES.values():
        check_encoder(engine, lengths)
    assert not compiled


def test_encoder_warm_up_needs_no_cache() -> None:
    engine = Engine([{"attn_type": AttentionType.ENCODER_ONLY}])
    (layer,) = engine.layers
    bind_kv_cache(layer, torch.tensor([]))
    layer.impl.run_dummy_batches(layer)


@pytest.mark.parametrize("num_new", [0, 2])
def test_cross_attention(num_new: int) -> None:
    """Queries of any length see all that an encoder left, new or from before.

    Encoders may be longer than the model, and shorter than the decoder's prompt.
    """
    engine = Engine([{"attn_type": AttentionType.ENCODER_DECODER}])
    (layer,) = engine.layers
    query_lens = [30, 20, 1, 1, 45, 5]
    seq_lens = [10, 3, MAX_MODEL_LEN + 9, 70, 41, 2]
    engine.fill([(1, seq_len - 1) for seq_len in seq_lens])  # deals out the pages
    pages = engine.block_table.clone()
    common = engine.fill([(query_len, 0) for query_len in query_lens], causal=False)
    engine.block_table.copy_(pages)
    engine.seq_lens[: len(seq_lens)] = torch.tensor(seq_lens)
    common.max_seq_len = max(seq_lens)
    metadata = engine.builder.build(0, common)
    assert metadata.seq_lens.tolist() == seq_lens
    slots = []
    for row, seq_len in enumerate(seq_lens):
        position = torch.arange(seq_len, device=DEVICE)
        slots.append(pages[row, position // BLOCK_SIZE].long() * BLOCK_SIZE)
        slots[-1] += position % BLOCK_SIZE
        if row >= num_new:  # cached in a step before
            for cache in layer.caches:
                rows = torch.randn(seq_len, NUM_KV_HEADS, HEAD_SIZE, device=DEVICE)
                cache[slots[-1] // BLOCK_SIZE, slots[-1] % BLOCK_SIZE] = rows
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    metadata.slot_mapping = torch.cat([nothing, *slots[:num_new]])
    key = value = None
    if num_new:
        num_states = len(metadata.slot_mapping)
        shape = (num_states, NUM_KV_HEADS, HEAD_SIZE)
        key, value = (torch.randn(shape, device=DEVICE) for _ in range(2))
    query = engine.new_tokens(layer, metadata.num_actual_tokens)[0]
    output = torch.full_like(query, SENTINEL)
    run_layer(layer, query, key, value, metadata, output)
    engine.check_output(layer, query, output, metadata)
