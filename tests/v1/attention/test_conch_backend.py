# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The CONCH backend against plain PyTorch: builder, cache write and attention."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    HALF_DTYPES,
    poisoned_scratch,
    products_in_order,
)
from tests.kernels.attention.conch_reference import SENTINEL
from tests.v1.attention.conch_backend_harness import (
    BATCHES,
    BLOCK_SIZE,
    NUM_HEADS,
    Engine,
    discard_buffers,
    needs_diffusion,
    needs_rswa,
)
from tests.v1.attention.conch_release import (
    KV_LAYOUTS,
    bind_kv_cache,
    build_with_images,
    run_layer,
)
from vllm.attention.ops.conch import hopper_prefill
from vllm.attention.ops.conch.overlap import count_work
from vllm.attention.ops.conch.plan import Device
from vllm.attention.ops.conch.schedule import UNKNOWN, Known
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticTensorSym,
)
from vllm.platforms import current_platform
from vllm.triton_utils import triton
from vllm.v1.attention.backends import conch_attn
from vllm.v1.attention.backends.conch_attn import (
    ConchAttentionImpl,
    ConchAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.conch_base import bound_kv_cache


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch: str, dtype: torch.dtype) -> None:
    Engine(dtype=dtype).step(BATCHES[batch])


@pytest.mark.usefixtures("products_in_order")
def test_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token has the same bits in a batch's prefill and as a decode alone."""
    monkeypatch.setattr(conch_attn, "is_batch_invariant", lambda: True)
    engine = Engine()
    (schedule,) = engine.builder.schedules.values()
    assert schedule.batch_invariant
    engine.step(BATCHES["mixed"])
    (layer,) = engine.layers
    common = engine.fill([(20, 90), (9, 0), (1, 30)])
    engine.fill_context(layer)
    query, key, value = engine.new_tokens(layer, 30)
    output, alone = torch.zeros_like(query), torch.zeros_like(query)
    metadata = engine.builder.build(0, common)
    run_layer(layer, query, key, value, metadata, output)
    last = slice(19, 20)
    common = replace(
        common,
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        query_start_loc_cpu=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=common.seq_lens[:1],
        num_reqs=1,
        num_actual_tokens=1,
        max_query_len=1,
        block_table_tensor=common.block_table_tensor[:1],
        slot_mapping=common.slot_mapping[last],
    )
    metadata = engine.builder.build(0, common)
    new = (tensor[last] for tensor in (query, key, value))
    run_layer(layer, *new, metadata, alone[last])
    assert torch.equal(alone[last], output[last])
    engine.layers[0].impl.run_dummy_batches(engine.layers[0])


@pytest.mark.parametrize("layout", KV_LAYOUTS)
def test_every_kv_cache_layout(layout: str) -> None:
    Engine(layout=layout).step(BATCHES["mixed"])


@pytest.mark.parametrize("batch", ["decode", "chunked"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_fp8_cache(kv_cache_dtype: str, batch: str) -> None:
    """The cache is allocated as bytes, written and read as the fp8 format."""
    engine = Engine(kv_cache_dtype=kv_cache_dtype, scales=(0.5, 2.0))
    engine.step(BATCHES[batch])


def test_scales_that_are_calculated_at_the_first_step() -> None:
    """VLLM writes them into the layer's tensors, which are read on the device."""
    engine = Engine(kv_cache_dtype="fp8")
    engine.step(BATCHES["prefill"])
    (layer,) = engine.layers
    layer._k_scale.fill_(0.5)
    layer._v_scale.fill_(2.0)
    engine.step(BATCHES["mixed"])


@pytest.mark.parametrize("batch", BATCHES)
def test_fp8_queries(batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the layer passes them where the implementation asks for them."""
    monkeypatch.setattr(ConchAttentionImpl, "prefers_fp8_queries", lambda self: True)
    options = {"dtype": HALF_DTYPES[-1], "kv_cache_dtype": "fp8"}
    engine = Engine([{}, {"sliding_window": 16}], scales=(0.5, 2.0), **options)
    for schedule in engine.builder.schedules.values():
        assert schedule.shape.query_dtype == current_platform.fp8_dtype()
    engine.step(BATCHES[batch])
    engine.layers[0].impl.run_dummy_batches(engine.layers[0])


@pytest.mark.parametrize(
    ("capability", "dtype", "kv_cache_dtype", "expected"),
    [
        (90, torch.bfloat16, "fp8", True),
        (90, torch.float16, "fp8_e4m3", True),
        (90, torch.float32, "fp8", False),
        (90, torch.bfloat16, "fp8_e5m2", False),
        (90, torch.bfloat16, "auto", False),
        (89, torch.bfloat16, "fp8", False),
        (100, torch.bfloat16, "fp8", False),
    ],
)
def test_fp8_queries_are_for_hoppers_kernel(
    capability: int,
    dtype: torch.dtype,
    kv_cache_dtype: str,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    impl = Engine(dtype=dtype).make_impl("auto")
    impl.head_size, impl.fp8_dtype = 128, conch_attn.fp8_cache_dtype(kv_cache_dtype)
    device = Device("cuda", capability, 132, 227 * 1024)
    versions = {"0.": False, triton.__version__: expected}
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(conch_attn, "this_device", lambda index: device)
    for version, prefers in versions.items():
        monkeypatch.setattr(hopper_prefill, "TRITON_VERSIONS", (version,))
        assert impl.prefers_fp8_queries() == prefers
    monkeypatch.setattr(conch_attn, "is_batch_invariant", lambda: True)
    assert not impl.prefers_fp8_queries()
    monkeypatch.setattr(conch_attn, "is_batch_invariant", lambda: False)
    impl.head_size = 512
    assert not impl.prefers_fp8_queries()


@pytest.mark.parametrize("batch", BATCHES)
def test_layers_with_different_windows_share_a_group(batch: str) -> None:
    """Without the hybrid KV cache manager one group holds all of a model's layers."""
    windows = [None, 16, 40, 16]
    engine = Engine([{"sliding_window": window} for window in windows])
    windows_of_schedules = {key.sliding_window for key in engine.builder.schedules}
    assert windows_of_schedules == {None, 16, 40}
    assert len(engine.builder.schedules) == 3
    engine.step(BATCHES[batch])


def test_layers_with_different_query_heads_share_a_group() -> None:
    """A drafter's layer may join the target's group with query heads of its own."""
    engine = Engine([{}, {"num_heads": 2}, {"num_heads": 8}])
    engine.step(BATCHES["mixed"])


def test_one_update_per_schedule_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine([{"sliding_window": window} for window in [None, 16] * 3])
    updates = []
    for key, schedule in engine.builder.schedules.items():
        update = schedule.update

        def counted(*args: Any, key: Any = key, update: Any = update, **kw: Any):
            updates.append(key)
            return update(*args, **kw)

        monkeypatch.setattr(schedule, "update", counted)
    engine.step(BATCHES["mixed"])
    assert sorted(key.sliding_window or 0 for key in updates) == [0, 16]


@pytest.mark.parametrize(
    "batch, mode, has_decodes",
    [
        ("decode", "NONE", True),
        ("mixed", "NONE", True),
        ("chunked", "NONE", False),
        ("chunked", "FULL_DECODE_ONLY", False),
        ("chunked", "FULL", True),  # its graph may replay decodes
    ],
)
def test_decodes_are_launched_where_there_may_be_some(
    batch: str, mode: str, has_decodes: bool
) -> None:
    engine = Engine(cudagraph_mode=CUDAGraphMode[mode])
    engine.step(BATCHES[batch])
    for schedule in engine.builder.schedules.values():
        assert schedule.has_decodes == has_decodes
    engine.step(BATCHES["mixed"])  # what the step before left out


@pytest.mark.parametrize(
    "batch, mode, longest",
    [
        ("chunked", "NONE", 65),
        ("mixed", "FULL_DECODE_ONLY", 37),  # a decode has 51
        ("chunked", "FULL", None),  # its graph may replay other batches
    ],
)
@pytest.mark.parametrize("has_bounds", [False, True])
def test_what_schedules_know_of_a_batch(
    has_bounds: bool,
    batch: str,
    mode: str,
    longest: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(cudagraph_mode=CUDAGraphMode[mode])
    (schedule,) = engine.builder.schedules.values()
    schedule.may_share = True  # as on a Hopper GPU
    update, given = schedule.update, {}

    def record(*args: Any, **options: Any) -> None:
        given.update(options)
        update(*args, **options)

    monkeypatch.setattr(schedule, "update", record)
    seq_lens = [sum(lengths) for lengths in BATCHES[batch]]
    bounds = torch.tensor([*seq_lens, 999]) if has_bounds else None
    monkeypatch.setattr(conch_attn, "host_seq_lens", lambda common: bounds)
    engine.step(BATCHES[batch])
    known = UNKNOWN
    if longest is not None:
        query_lens = np.array([query_len for query_len, _ in BATCHES[batch]])
        work = None
        if has_bounds and min(query_lens) <= 1:  # else of all only the longest
            both = (query_lens, np.array(seq_lens), query_lens > 1)
            work = count_work(*both, schedule.tokens_per_tile, None)
        longest = longest if has_bounds else max(seq_lens)
        known = Known(min(query_lens), 2, longest, work)
    assert given["known"] == known


@pytest.mark.parametrize(
    "layer, may_overlap",
    [
        ({}, True),
        ({"sliding_window": 40}, True),
        ({"logits_soft_cap": 30.0}, False),  # decodes have no kernel of Hopper's own
        ({"alibi_slopes": [0.5] * NUM_HEADS}, False),
        ({"sliding_window": 40, "chunk_lookback": 1}, False),
    ],
    ids=str,
)
def test_what_keeps_layers_from_hoppers_kernels(
    layer: dict[str, Any], may_overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside another, decodes would have a part of the device for nothing."""
    bounds = torch.tensor([sum(lengths) for lengths in BATCHES["mixed"]])
    monkeypatch.setattr(conch_attn, "host_seq_lens", lambda common: bounds)
    engine = Engine([{}, layer])
    common = engine.fill(BATCHES["mixed"])
    assert engine.builder.build(0, common).host_lengths.may_overlap == may_overlap
    causal = torch.ones(len(BATCHES["mixed"]), dtype=torch.bool, device=DEVICE)
    common = engine.fill(BATCHES["mixed"], causal=causal)
    assert not engine.builder.build(0, common).host_lengths.may_overlap


@pytest.mark.parametrize("what", ["images", "quantized"])
def test_models_that_are_kept_from_hoppers_kernels(what: str) -> None:
    engine = Engine()
    (layer,) = engine.layers
    assert layer.impl.may_overlap
    if what == "images":
        engine.config.model_config.is_mm_prefix_lm = True
    else:
        engine.config.compilation_config.pass_config.fuse_attn_quant = True
    assert not layer.impl.may_overlap


@needs_diffusion
@pytest.mark.parametrize("longest, has_decodes", [(20, True), (21, False)])
def test_graphs_for_decodes_hold_a_canvas(longest: int, has_decodes: bool) -> None:
    """What the host knows of a batch decides nothing that a graph could keep."""
    engine = Engine(canvas_length=20, cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE)
    engine.step([(longest, 33), (18, 0)])
    for schedule in engine.builder.schedules.values():
        assert schedule.has_decodes == has_decodes


def test_softcap() -> None:
    Engine([{"logits_soft_cap": 5.0}]).step(BATCHES["mixed"])


def test_non_causal() -> None:
    engine = Engine([{}, {"sliding_window": 16}])
    engine.step(BATCHES["mixed"], causal=False)


@pytest.mark.parametrize("batch", ["decode", "mixed"])
def test_sinks(batch: str) -> None:
    """gpt-oss: one logit more for each head, in layers with a window and without."""
    sinks = torch.linspace(-1, 3, NUM_HEADS, device=DEVICE)
    engine = Engine([{"sinks": sinks}, {"sinks": sinks, "sliding_window": 16}, {}])
    engine.step(BATCHES[batch])


@pytest.mark.parametrize("batch", ["decode", "mixed"])
@pytest.mark.parametrize("use_sqrt", [False, True])
def test_alibi(use_sqrt: bool, batch: str) -> None:
    slopes = [2.0**-i for i in range(1, NUM_HEADS + 1)]
    options = {"use_alibi_sqrt": True} if use_sqrt else {}
    Engine([{"alibi_slopes": slopes} | options]).step(BATCHES[batch])


def test_slopes_are_a_buffer_of_their_layer() -> None:
    """Which vLLM's sleep mode keeps."""
    engine = Engine([{"alibi_slopes": [0.5] * NUM_HEADS}])
    impl, layer = engine.layers[0].impl, torch.nn.Module()
    impl.see_layer(layer, engine.builder.kv_cache_spec)
    assert [slopes is impl.alibi_slopes for slopes in layer.buffers()] == [True]
    assert not layer.state_dict()


@pytest.mark.parametrize("mode", ["NONE", "FULL"])
def test_tokens_counted_in_numpy(mode: str) -> None:
    """As some drafts count them."""
    engine = Engine(cudagraph_mode=CUDAGraphMode[mode])
    common = engine.fill(BATCHES["mixed"])
    common.num_actual_tokens = np.int32(common.num_actual_tokens)
    metadata = engine.builder.build(0, common)
    assert type(metadata.num_actual_tokens) is type(metadata.max_query_len) is int
    engine.check(engine.layers[0], metadata)


def test_some_sequences_of_a_batch_are_causal() -> None:
    flags = torch.tensor([True, False, False, True], device=DEVICE)
    Engine([{}, {"sliding_window": 16}]).step(BATCHES["mixed"], causal=flags)


@pytest.mark.parametrize("in_window", [False, True])
def test_images_are_seen_both_ways(in_window: bool) -> None:
    """Tokens of an image see all of it, in window layers too."""
    engine = Engine([{}, {"sliding_window": 16}])
    for layer in engine.layers:
        layer.mm_prefix_clamp_sliding_window = in_window
    builder = ConchAttentionMetadataBuilder(
        engine.builder.kv_cache_spec,
        ["layer.0", "layer.1"],
        engine.config,
        torch.device(DEVICE),
    )
    common = engine.fill(BATCHES["mixed"])
    # Sequence 1 has keys 0 to 32, 20 of them new; sequence 3 has 37 new ones.
    images = {1: [(2, 20), (22, 30)], 3: [(5, 36)]}
    metadata = build_with_images(builder, common, images, len(engine.layers))
    assert metadata.mm_prefix_range.shape == (4, 2, 2)
    for layer in engine.layers:
        engine.check(layer, metadata)
    for none in ({}, {1: []}):
        metadata = build_with_images(builder, common, none, len(engine.layers))
        assert metadata.mm_prefix_range is None
        engine.check(engine.layers[0], metadata)


@pytest.mark.parametrize("batch", ["decode", "mixed", "verify"])
def test_chunks_with_lookback(batch: str) -> None:
    """Chunks of 20 and of 8 keys, beside a window: three schedules."""
    chunks = {"sliding_window": 40, "chunk_lookback": 1}
    short = {"attention_chunk_size": 8}
    layers = [chunks, {"sliding_window": 40}, short, chunks]
    engine = Engine(layers)
    assert len(engine.builder.schedules) == 3
    engine.step(BATCHES[batch])


def test_chunks_without_a_window_are_none() -> None:
    """As with --disable-sliding-window: the whole sequence is seen."""
    engine = Engine([{"chunk_lookback": 1}])
    assert engine.layers[0].impl.schedule_key.chunk_lookback == -1
    engine.step(BATCHES["decode"])


def keep_prompt_and_window(
    engine: Engine, prompts: Sequence[int], window: int, num_computed: Sequence[int]
) -> None:
    """Frees the pages between, as vLLM's manager does: block 0 stands in for them."""
    for row, (prompt, computed) in enumerate(zip(prompts, num_computed)):
        first = -(-prompt // BLOCK_SIZE)
        end = max(prompt, computed - window) // BLOCK_SIZE
        engine.block_table[row, first : max(first, end)] = 0


@needs_rswa
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_prompts_stay_in_sight_behind_a_window(kv_cache_dtype: str) -> None:
    """R-SWA; prompts are whole, chunked, generated from, shorter than a page."""
    lengths = [(1, 190), (30, 0), (1, 130), (20, 33), (3, 90)]
    prompts = [37, 30, 5, 90, 16]
    engine = Engine(rswa_window=24, kv_cache_dtype=kv_cache_dtype)
    common = engine.fill(lengths)
    common.rswa_prefix_lens = torch.tensor(prompts, dtype=torch.int32)
    metadata = engine.builder.build(0, common)
    assert metadata.prefix_lens.tolist() == prompts
    (layer,) = engine.layers
    engine.check(layer, metadata)
    # Nothing is missed of the pages between prompt and window.
    pages = engine.block_table.clone()
    query, key, value = engine.new_tokens(layer, metadata.num_actual_tokens)
    query, outputs = engine.as_passed(layer, query), []
    for cache in layer.caches:
        cache[0] = 100.0
    for _ in range(2):
        outputs.append(torch.full(query.shape, SENTINEL, device=DEVICE))
        run_layer(layer, query, key, value, metadata, outputs[-1])
        keep_prompt_and_window(engine, prompts, 24, [c for _, c in lengths])
    assert not torch.equal(engine.block_table, pages)
    assert torch.equal(*outputs)


@needs_rswa
def test_batches_without_prompt_lengths_see_all() -> None:
    """What dummy and draft batches get; a graph captured so replays with lengths."""
    engine = Engine(rswa_window=24)
    metadata = engine.builder.build(0, engine.fill(BATCHES["decode"]))
    buffer = metadata.prefix_lens.data_ptr()
    engine.check(engine.layers[0], metadata)
    common = engine.fill(BATCHES["decode"], padded_reqs=2)
    common.rswa_prefix_lens = torch.tensor([3, 1, 9, 40], dtype=torch.int32)
    metadata = engine.builder.build(0, common)
    assert metadata.prefix_lens.data_ptr() == buffer
    assert not engine.builder.supports_draft_decode_metadata_update
    engine.check(engine.layers[0], metadata)
    engine.layers[0].impl.run_dummy_batches(engine.layers[0])


@needs_rswa
def test_prefix_lm_is_warmed_up_as_it_runs() -> None:
    """All of a prompt sees itself, in decoders too: no causal kernels to compile."""
    engine = Engine()
    (layer,) = engine.layers
    assert layer.impl.causal_modes(torch.device(DEVICE)) == (True,)
    spec = replace(engine.builder.kv_cache_spec, non_causal=True)
    layer.impl.see_layer(layer, spec)
    assert layer.impl.causal_modes(torch.device(DEVICE)) == (False,)


@needs_rswa
def test_chunks_refuse_non_causal_attention() -> None:
    engine = Engine()
    engine.config.attention_config.use_non_causal = True
    with pytest.raises(ValueError, match="non-causal attention with chunks"):
        engine.make_impl("auto", sliding_window=16, chunk_lookback=1)


def test_shared_cache_is_not_written() -> None:
    """A layer that shares another's cache attends to it and leaves it as it is."""
    engine = Engine([{}, {"kv_sharing_target_layer_name": "layer.0"}])
    target, sharing = engine.layers
    sharing.kv_cache, sharing.caches = target.kv_cache, target.caches
    metadata = engine.builder.build(0, engine.fill(BATCHES["mixed"]))
    engine.check(target, metadata)
    before = [cache.clone() for cache in target.caches]
    query, key, value = engine.new_tokens(sharing, metadata.num_actual_tokens)
    output = torch.full_like(query, SENTINEL)
    run_layer(sharing, query, key, value, metadata, output)
    engine.check_output(sharing, query, output, metadata)
    for cache, old in zip(target.caches, before):
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))
    # Models may pass no keys and values at all.
    output.fill_(SENTINEL)
    run_layer(sharing, query, None, None, metadata, output)
    engine.check_output(sharing, query, output, metadata)


@pytest.mark.parametrize(
    "lengths", [[(1, 30), (1, 3)], [(3, 30), (1, 3)], [(20, 5), (1, 3)]]
)
def test_padded_batches(lengths: list[tuple[int, int]]) -> None:
    """Padding requests have neither query nor keys, padding tokens no slot."""
    Engine(num_speculative_tokens=2).step(lengths, padded_reqs=4, padded_tokens=11)


def test_buffers_hold_consecutive_batches() -> None:
    """What one step leaves in the schedules does not show in the next."""
    engine = Engine(num_speculative_tokens=3)
    for batch in ("mixed", "decode", "prefill", "verify", "decode", "chunked"):
        engine.step(BATCHES[batch])


@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_a_cache_of_one_block_is_replaced(kv_cache_dtype: str, layout: str) -> None:
    """As vLLM does that of a profiled CUDA graph, with one sequence at a time."""
    engine = Engine(kv_cache_dtype=kv_cache_dtype, layout=layout)
    (layer,) = engine.layers
    whole = bound_kv_cache(layer)
    blocks = whole.shape.index(engine.num_blocks)
    bind_kv_cache(layer, whole.narrow(blocks, 0, 1))
    common = engine.fill([(1, 0)])
    engine.block_table.zero_()
    rows = engine.new_tokens(layer, 1)
    run_layer(layer, *rows, engine.builder.build(0, common), torch.empty_like(rows[0]))
    bind_kv_cache(layer, whole)
    engine.step([(1, 40)])
    engine.step([(20, 50)])


def test_sleep_may_discard_buffers() -> None:
    engine = Engine(num_speculative_tokens=3)
    for batch in ("mixed", "decode", "prefill", "verify", "decode", "chunked"):
        engine.step(BATCHES[batch])
        discard_buffers(engine.builder)


def test_largest_batch() -> None:
    """As many sequences and tokens as the engine is configured for."""
    engine = Engine(num_blocks=200)
    engine.step([(24, 8 * i) for i in range(8)])


def quantised(
    engine: Engine, metadata: Any, **scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the engine's first layer: its query and its output in fp8."""
    layer = engine.layers[0]
    engine.fill_context(layer)
    query, key, value = engine.new_tokens(layer, metadata.num_actual_tokens)
    output = torch.zeros(query.shape, dtype=current_platform.fp8_dtype(), device=DEVICE)
    run_layer(layer, query, key, value, metadata, output, **scales)
    return query, output


def test_output_in_fp8() -> None:
    """Divided by output_scale; half a step of e4m3 is the sixteenth of a number."""
    engine = Engine()
    assert engine.layers[0].impl.fused_output_quant_supported(kFp8StaticTensorSym)
    assert not engine.layers[0].impl.fused_output_quant_supported(kFp8DynamicTokenSym)
    metadata = engine.builder.build(0, engine.fill(BATCHES["mixed"]))
    scale = torch.full((1,), 0.25, device=DEVICE)
    query, output = quantised(engine, metadata, output_scale=scale)
    reference = engine.reference(engine.layers[0], query, metadata).output
    live = int(engine.query_start_loc[-1])
    difference = output[:live].float() * scale - reference[:live]
    assert bool((difference.abs() <= reference[:live].abs() / 16 + 1e-3).all())
    assert bool((output[:live].float() != 0).any())


def test_output_is_not_quantised_in_blocks() -> None:
    engine = Engine()
    metadata = engine.builder.build(0, engine.fill([(1, 3)]))
    scale = torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match="output_block_scale"):
        quantised(engine, metadata, output_scale=scale, output_block_scale=scale)
