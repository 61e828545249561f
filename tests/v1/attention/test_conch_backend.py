# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The CONCH backend against plain PyTorch: builder, cache write and attention.

Every step goes the engine's way: persistent input buffers with garbage behind the
batch, a metadata builder for a group of layers, then each layer's calls.
"""

import gc
import inspect
import math
import weakref
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from tests.v1.attention.conch_release import (
    KV_LAYOUTS,
    AttentionSelectorConfig,
    bind_kv_cache,
    make_kv_cache,
    make_spec,
    run_layer,
)

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    HALF_DTYPES,
    ON_GPU,
    assert_close,
    gpu_only,
    hopper_config,
    poisoned_scratch,
    products_in_order,
)
from tests.kernels.attention.conch_reference import (
    SENTINEL,
    Attention,
    fp8_output_tolerance,
    output_tolerance,
    paged_attention,
)
from vllm.attention.ops.conch import hopper_fp8_prefill, hopper_prefill
from vllm.attention.ops.conch.plan import Device
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticTensorSym,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.triton_utils import triton
from vllm.v1.attention.backends import conch_attn
from vllm.v1.attention.backends.conch_attn import (
    ConchAttentionBackend,
    ConchAttentionImpl,
    ConchAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.conch_base import (
    TOKEN_HEAD_FORMATS,
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
    bound_kv_cache,
    key_value_views,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

# (query_len, tokens already in the cache) of each sequence.
BATCHES = {
    "decode": [(1, 7), (1, 0), (1, 40), (1, 100)],
    "prefill": [(20, 0), (5, 0), (33, 0)],
    "chunked": [(17, 32), (40, 25)],
    "mixed": [(1, 50), (20, 13), (1, 3), (37, 0)],
    "verify": [(4, 30), (4, 1), (2, 17)],
}
MAX_MODEL_LEN = 256
# On a GPU enough for the cache write that is made for many tokens.
MAX_NUM_TOKENS = 65536 if ON_GPU else 192
NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE = 4, 2, 16
HEAD_SIZE = 64 if ON_GPU else 32  # on a GPU one that its fastest kernels take


def make_config(
    *,
    num_speculative_tokens: int | None = None,
    cudagraph_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    dtype: torch.dtype = torch.float32,
    rswa_window: int | None = None,
) -> VllmConfig:
    config = VllmConfig()
    config.model_config = SimpleNamespace(
        max_model_len=MAX_MODEL_LEN,
        is_mm_prefix_lm=False,
        dtype=dtype,
        rswa_window=rswa_window,
    )
    config.scheduler_config.max_num_seqs = 8
    config.scheduler_config.max_num_batched_tokens = MAX_NUM_TOKENS
    config.compilation_config.cudagraph_mode = cudagraph_mode
    if num_speculative_tokens is not None:
        config.speculative_config = SimpleNamespace(
            num_speculative_tokens=num_speculative_tokens, parallel_drafting=False
        )
    return config


class Engine:
    """A group of attention layers, their builder and the engine's input buffers."""

    def __init__(
        self,
        layers: Sequence[dict[str, Any]] = ({},),
        *,
        dtype: torch.dtype = torch.float32,
        kv_cache_dtype: str = "auto",
        layout: str = KV_LAYOUTS[0],
        scales: tuple[float, float] = (1.0, 1.0),
        num_blocks: int = 64,
        **config: Any,
    ) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.config = make_config(dtype=dtype, **config)
        self.num_blocks = num_blocks
        cache_dtype = dtype if kv_cache_dtype == "auto" else torch.uint8
        self.layers = []
        names = [f"layer.{i}" for i in range(len(layers))]
        for name, options in zip(names, layers):
            layer = SimpleNamespace(
                impl=self.make_impl(kv_cache_dtype, **options),
                _q_scale=torch.tensor(0.25, device=DEVICE),
                _k_scale=torch.tensor(scales[0], device=DEVICE),
                _v_scale=torch.tensor(scales[1], device=DEVICE),
            )
            view_dtype = layer.impl.fp8_dtype or dtype
            kv_cache = make_kv_cache(
                layout,
                num_blocks,
                BLOCK_SIZE,
                NUM_KV_HEADS,
                HEAD_SIZE,
                view_dtype,
                DEVICE,
            )
            bind_kv_cache(layer, kv_cache.view(cache_dtype))
            layer.caches = key_value_views(kv_cache, HEAD_SIZE)
            self.layers.append(layer)
            self.config.compilation_config.static_forward_context[name] = layer
        self.builder = ConchAttentionMetadataBuilder(
            make_spec(BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE, cache_dtype),
            names,
            self.config,
            torch.device(DEVICE),
        )
        # The engine's persistent buffers: a batch fills their beginnings.
        self.query_start_loc = torch.zeros(9, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.zeros(8, dtype=torch.int32, device=DEVICE)
        self.block_table = torch.full(
            (8, MAX_MODEL_LEN // BLOCK_SIZE + 1),
            2**30,
            dtype=torch.int32,
            device=DEVICE,
        )
        self.slot_mapping = torch.full(
            (MAX_NUM_TOKENS,), -1, dtype=torch.int64, device=DEVICE
        )

    def make_impl(self, kv_cache_dtype: str, **options: Any) -> ConchAttentionImpl:
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with set_current_vllm_config(self.config):
                return ConchAttentionImpl(
                    options.pop("num_heads", NUM_HEADS),
                    HEAD_SIZE,
                    1 / math.sqrt(HEAD_SIZE),
                    NUM_KV_HEADS,
                    kv_cache_dtype=kv_cache_dtype,
                    **options,
                )
        finally:
            torch.set_default_dtype(default_dtype)

    def fill(
        self,
        lengths: Sequence[tuple[int, int]],
        *,
        padded_reqs: int = 0,
        padded_tokens: int = 0,
        causal: bool | torch.Tensor = True,
    ) -> CommonAttentionMetadata:
        """Puts a batch into the persistent buffers, padded as for a CUDA graph."""
        num_reqs = len(lengths) + padded_reqs
        query_lens = [query_len for query_len, _ in lengths]
        seq_lens = [query_len + context for query_len, context in lengths]
        starts = torch.tensor([0, *query_lens]).cumsum(0)
        self.query_start_loc.fill_(starts[-1])
        self.query_start_loc[: len(starts)] = starts
        self.seq_lens.zero_()
        self.seq_lens[: len(seq_lens)] = torch.tensor(seq_lens)
        # Pages at random; block 0 is nobody's.
        free = 1 + torch.randperm(self.num_blocks - 1)
        self.block_table.fill_(2**30)
        self.slot_mapping.fill_(-1)
        token = 0
        for row, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens)):
            count = -(-seq_len // BLOCK_SIZE)
            pages, free = free[:count], free[count:]
            self.block_table[row, :count] = pages.to(torch.int32)
            position = torch.arange(seq_len - query_len, seq_len)
            slots = pages[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            self.slot_mapping[token : token + query_len] = slots
            token += query_len
        num_tokens = token + padded_tokens
        return CommonAttentionMetadata(
            query_start_loc=self.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=self.query_start_loc[: num_reqs + 1].cpu(),
            seq_lens=self.seq_lens[:num_reqs],
            num_reqs=num_reqs,
            num_actual_tokens=num_tokens,
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            block_table_tensor=self.block_table[:num_reqs],
            slot_mapping=self.slot_mapping[:num_tokens],
            causal=causal,
        )

    def fill_context(self, layer: Any) -> None:
        """Random keys and values for what the batch finds in the cache."""
        starts = self.query_start_loc.tolist()
        for row, seq_len in enumerate(self.seq_lens.tolist()):
            context = seq_len - (starts[row + 1] - starts[row])
            position = torch.arange(context, device=DEVICE)
            block = self.block_table[row][position // BLOCK_SIZE].long()
            for cache in layer.caches:
                rows = torch.randn(context, NUM_KV_HEADS, HEAD_SIZE, device=DEVICE)
                cache[block, position % BLOCK_SIZE] = rows.to(cache.dtype)

    def new_tokens(self, layer: Any, num_tokens: int) -> tuple[torch.Tensor, ...]:
        """Query, key, value as slices of one projection; more rows than tokens."""
        heads = (layer.impl.num_heads, NUM_KV_HEADS, NUM_KV_HEADS)
        rows = torch.full(
            (num_tokens + 2, sum(heads), HEAD_SIZE),
            math.nan,
            dtype=self.dtype,
            device=DEVICE,
        )
        live = int(self.query_start_loc[-1])
        rows[:live] = torch.randn(rows[:live].shape, device=DEVICE).to(self.dtype)
        return rows.split(heads, dim=1)

    def as_passed(self, layer: Any, query: torch.Tensor) -> torch.Tensor:
        """The query as vLLM's layer passes it, quantised where that is asked for."""
        if not layer.impl.supports_quant_query_input:
            return query
        bound = torch.finfo(layer.impl.fp8_dtype).max
        scaled = (query.float() / layer._q_scale).clamp(-bound, bound)
        return scaled.to(layer.impl.fp8_dtype)

    def reference(self, layer: Any, query: torch.Tensor, metadata: Any) -> Attention:
        impl = layer.impl
        is_fp8 = impl.fp8_dtype is not None
        in_window = getattr(layer, "mm_prefix_clamp_sliding_window", False)
        return paged_attention(
            query,
            *layer.caches,
            self.query_start_loc[: len(metadata.seq_lens) + 1],
            self.seq_lens[: len(metadata.seq_lens)],
            self.block_table,
            scale=impl.scale,
            causal=metadata.causal,
            softcap=impl.softcap,
            sliding_window=impl.sliding_window,
            q_scale=layer._q_scale if query.dtype == impl.fp8_dtype else None,
            k_scale=layer._k_scale if is_fp8 else None,
            v_scale=layer._v_scale if is_fp8 else None,
            sinks=impl.sinks,
            alibi_slopes=impl.alibi_slopes,
            alibi_sqrt=impl.alibi_sqrt,
            mm_prefix_range=metadata.mm_prefix_range,
            mm_prefix_in_window=in_window,
            prefix_lens=metadata.prefix_lens,
            chunk_lookback=impl.schedule_key.chunk_lookback,
        )

    def check(self, layer: Any, metadata: Any) -> None:
        """Runs one layer on the filled batch: cache, output and nothing else."""
        self.fill_context(layer)
        query, key, value = self.new_tokens(layer, metadata.num_actual_tokens)
        output = torch.full_like(query, SENTINEL)
        query = self.as_passed(layer, query)
        before = [cache.clone() for cache in layer.caches]
        assert run_layer(layer, query, key, value, metadata, output) is output
        self.check_cache(layer, before, key, value, metadata.slot_mapping)
        self.check_output(layer, query, output, metadata)

    def check_cache(
        self,
        layer: Any,
        before: Sequence[torch.Tensor],
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """The new tokens are in their slots and every other byte is as it was."""
        live = slot_mapping[slot_mapping >= 0]
        scales = (layer._k_scale, layer._v_scale)
        for cache, old, new, scale in zip(layer.caches, before, (key, value), scales):
            expected = old
            if layer.impl.kv_sharing_target_layer_name is None:
                rows = new[: len(live)]
                if layer.impl.fp8_dtype is not None:
                    bound = torch.finfo(cache.dtype).max
                    rows = (rows.float() / scale).clamp(-bound, bound)
                expected[live // BLOCK_SIZE, live % BLOCK_SIZE] = rows.to(cache.dtype)
            size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.itemsize]
            assert torch.equal(cache.view(size), expected.view(size))

    def check_output(
        self, layer: Any, query: torch.Tensor, output: torch.Tensor, metadata: Any
    ) -> None:
        live = int(self.query_start_loc[-1])
        reference = self.reference(layer, query, metadata)
        reference = Attention(*(part[:live] for part in reference))
        hopper = hopper_config(metadata.schedules[layer.impl.schedule_key])
        if isinstance(hopper, hopper_fp8_prefill.Fp8Config):
            allowed = fp8_output_tolerance(reference, self.dtype, HEAD_SIZE)
        else:
            allowed = output_tolerance(reference, self.dtype)
        assert_close("output", output[:live], reference.output, allowed)
        assert bool((output[live:] == SENTINEL).all()), "padding rows were written"

    def step(self, lengths: Sequence[tuple[int, int]], **options: Any) -> None:
        """Builds metadata for a batch and checks every layer on it."""
        metadata = self.builder.build(0, self.fill(lengths, **options))
        for layer in self.layers:
            self.check(layer, metadata)


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


def test_some_sequences_of_a_batch_are_causal() -> None:
    flags = torch.tensor([True, False, False, True], device=DEVICE)
    Engine([{}, {"sliding_window": 16}]).step(BATCHES["mixed"], causal=flags)


@pytest.mark.skipif(
    not ConchAttentionBackend.supports_mm_prefix(),
    reason="with this release such models are refused",
)
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
    common.mm_req_doc_ranges = {1: [(2, 20), (22, 30)], 3: [(5, 36)]}
    metadata = builder.build(0, common)
    assert metadata.mm_prefix_range.shape == (4, 2, 2)
    for layer in engine.layers:
        engine.check(layer, metadata)
    common.mm_req_doc_ranges = None
    assert builder.build(0, common).mm_prefix_range is None


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


needs_rswa = pytest.mark.skipif(
    not hasattr(ConchAttentionBackend, "supports_rswa"),
    reason="this release has no reference sliding window",
)


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
def test_rswa_refuses_what_would_not_be_it() -> None:
    engine = Engine(rswa_window=24)
    with pytest.raises(ValueError, match="only one of sliding_window 16"):
        engine.make_impl("auto", sliding_window=16)
    engine.config.attention_config.use_non_causal = True
    with pytest.raises(ValueError, match="non-causal attention with R-SWA"):
        engine.make_impl("auto")

    config = selector_config(use_rswa=True, use_non_causal=True)
    (reason,) = ConchAttentionBackend.validate_configuration(**config)
    assert reason == "non-causal attention with R-SWA not supported"


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


def test_largest_batch() -> None:
    """As many sequences and tokens as the engine is configured for."""
    engine = Engine(num_blocks=200)
    engine.step([(24, 8 * i) for i in range(8)])


# ---- encoders, and decoders that attend to them

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


# ---- CUDA graphs: metadata of a capture, replayed with other batches


def capture(engine: Engine, num_reqs: int, num_tokens: int, uniform: bool) -> Any:
    """Metadata as for the capture of a graph of padded size num_reqs, num_tokens."""
    base, extra = divmod(num_tokens, num_reqs)
    lengths = [(base + (i < extra), 0) for i in range(num_reqs)]
    common = engine.fill(lengths)
    common.max_query_len = base if uniform else num_tokens
    common.max_seq_len = MAX_MODEL_LEN
    return engine.builder.build_for_cudagraph_capture(common)


# The first batch fills the list of work far beyond what the others need.
LARGE_REPLAYS = [
    [(41, 0), *[(17, 0)] * 7],
    [(160, 50)],
    [(1, 9)] * 8,
    [(41, 0), *[(17, 0)] * 7],
    [(1, 9), (2, 30)],
]
MIXED_REPLAYS = [
    [(40, 17)],
    [(1, 30), (1, 3), (1, 77), (1, 0)],
    [(1, 30), (20, 9), (1, 3)],
    [(8, 3), (2, 40), (16, 16), (1, 5)],
    [(5, 0), (6, 1)],
]


@pytest.mark.parametrize("window", [None, 16])
def test_mixed_graph_replays_any_batch(window: int | None) -> None:
    """A graph of 40 tokens serves every batch of up to so many, whatever its split.

    The launches keep what they were captured with; the step's build only fills the
    same buffers.
    """
    engine = Engine([{"sliding_window": window}], cudagraph_mode=CUDAGraphMode.FULL)
    captured = capture(engine, num_reqs=8, num_tokens=40, uniform=False)
    assert captured.seq_lens.tolist() == [1] * 8
    replay(engine, captured, MIXED_REPLAYS, num_reqs=8)


def test_mixed_graph_replays_unpadded_requests() -> None:
    """Some releases pad a mixed graph's tokens only: fewer rows than at capture."""
    engine = Engine(cudagraph_mode=CUDAGraphMode.FULL)
    captured = capture(engine, num_reqs=8, num_tokens=40, uniform=False)
    replay(engine, captured, MIXED_REPLAYS, num_reqs=None)


@pytest.mark.parametrize("num_reqs", [8, None])
def test_large_mixed_graph_replays_any_batch(num_reqs: int | None) -> None:
    engine = Engine(cudagraph_mode=CUDAGraphMode.FULL)
    captured = capture(engine, num_reqs=8, num_tokens=160, uniform=False)
    replay(engine, captured, LARGE_REPLAYS, num_reqs)


def test_small_mixed_graph_replays_any_batch() -> None:
    """Up to 16 tokens every batch takes the decode kernel alone."""
    engine = Engine(cudagraph_mode=CUDAGraphMode.FULL)
    captured = capture(engine, num_reqs=8, num_tokens=16, uniform=False)
    replay(engine, captured, [[(16, 9)], [(1, 3), (7, 30)], [(1, 99)]], num_reqs=8)


@pytest.mark.parametrize("num_speculative_tokens", [None, 3])
def test_decode_graph_replays_decodes(num_speculative_tokens: int | None) -> None:
    """Eight query heads a KV head: how they are packed depends on the query length."""
    engine = Engine(
        [{"num_heads": 8 * NUM_KV_HEADS}],
        num_speculative_tokens=num_speculative_tokens,
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
    )
    longest = 1 + (num_speculative_tokens or 0)
    captured = capture(engine, num_reqs=4, num_tokens=4 * longest, uniform=True)
    batches = [[(1, 30), (1, 3)], [(1, 0), (1, 99), (1, 16)]]
    if num_speculative_tokens:
        batches += [[(4, 30), (4, 3)], [(2, 20), (1, 9), (4, 50)]]
    replay(engine, captured, batches, num_reqs=4)


def replay(
    engine: Engine,
    captured: Any,
    batches: list[list[tuple[int, int]]],
    num_reqs: int | None,
) -> None:
    """Replays launches with the captured metadata for each batch.

    On a GPU a real CUDA graph; elsewhere the same calls, made with what was on the
    host at capture.
    """
    (layer,) = engine.layers
    num_tokens = captured.num_actual_tokens
    frozen = {key: copy(schedule) for key, schedule in captured.schedules.items()}
    captured = replace(captured, schedules=frozen)
    rows = engine.new_tokens(layer, num_tokens)
    output = torch.full_like(rows[0], SENTINEL)

    def launch() -> None:
        run_layer(layer, *rows, captured, output)

    if ON_GPU:
        launch()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        launch = graph.replay
    for lengths in batches:
        padded_reqs = 0 if num_reqs is None else num_reqs - len(lengths)
        padded_tokens = num_tokens - sum(query_len for query_len, _ in lengths)
        common = engine.fill(
            lengths, padded_reqs=padded_reqs, padded_tokens=padded_tokens
        )
        metadata = engine.builder.build(0, common)
        assert metadata.num_actual_tokens == num_tokens
        engine.fill_context(layer)
        for part, new in zip(rows, engine.new_tokens(layer, num_tokens)):
            part.copy_(new)
        output.fill_(SENTINEL)
        launch()
        engine.check_output(layer, rows[0], output, metadata)


@pytest.mark.skipif(
    not hasattr(ConchAttentionMetadataBuilder, "update_draft_decode_metadata"),
    reason="speculators of this release rebuild the metadata of every draft step",
)
def test_draft_steps_update_their_metadata() -> None:
    """A speculator advances seq_lens on the device and updates what it built once."""
    engine = Engine(num_speculative_tokens=3)
    assert engine.builder.supports_draft_decode_metadata_update
    metadata = engine.builder.build(0, engine.fill([(1, 13), (1, 40), (1, 0)]))
    # Pages for all that the sequences will grow to.
    pages = torch.arange(1, 25, dtype=torch.int32, device=DEVICE).view(3, 8)
    engine.block_table[:3, :8] = pages
    for _ in range(3):
        engine.seq_lens[:3] += 17
        last = (engine.seq_lens[:3] - 1).long()
        page = pages.gather(1, (last // BLOCK_SIZE)[:, None])[:, 0]
        engine.slot_mapping[:3] = page * BLOCK_SIZE + last % BLOCK_SIZE
        engine.builder.update_draft_decode_metadata(metadata)
        engine.check(engine.layers[0], metadata)


def test_every_cuda_graph_mode_is_supported() -> None:
    support = ConchAttentionMetadataBuilder.get_cudagraph_support(
        make_config(), make_spec(16, 1, 32, torch.float16)
    )
    assert support == AttentionCGSupport.ALWAYS


def test_images_keep_out_of_graphs_of_mixed_batches() -> None:
    """Such graphs are captured without images: theirs would be seen causally."""
    config = make_config()
    config.model_config.is_mm_prefix_lm = True
    support = ConchAttentionMetadataBuilder.get_cudagraph_support(
        config, make_spec(16, 1, 32, torch.float16)
    )
    assert support == AttentionCGSupport.UNIFORM_BATCH


def test_dummy_batches_stay_within_block_tables() -> None:
    """A dummy run may claim sequences longer than the model's length."""
    engine = Engine()
    common = engine.fill([(1, 3), (1, 9)])
    common.seq_lens.fill_(4 * MAX_MODEL_LEN)
    common.max_seq_len = 4 * MAX_MODEL_LEN
    metadata = engine.builder.build(0, common)
    longest = engine.block_table.shape[1] * BLOCK_SIZE
    assert metadata.seq_lens.tolist() == [longest] * 2


# ---- start-up: profiling, warm-up, what is refused


def test_profiling_has_no_cache_and_no_metadata() -> None:
    engine = Engine()
    (layer,) = engine.layers
    bind_kv_cache(layer, torch.tensor([]))
    query, key, value = engine.new_tokens(layer, 5)
    output = torch.full_like(query, math.nan)
    assert run_layer(layer, query, key, value, None, output) is output
    assert bool((output == 0).all())
    layer.impl.write_kv_cache(layer, key, value, torch.tensor([]), engine.slot_mapping)
    layer.impl.warm_up(layer)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_warm_up_leaves_the_cache_alone(kv_cache_dtype: str) -> None:
    engine = Engine(kv_cache_dtype=kv_cache_dtype)
    (layer,) = engine.layers
    before = [cache.clone().view(torch.uint8) for cache in layer.caches]
    layer.impl.run_dummy_batches(layer)
    for cache, old in zip(layer.caches, before):
        assert torch.equal(cache.contiguous().view(torch.uint8), old)
    assert not layer.impl.attentions  # nor is the schedule kept


@gpu_only
@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_nothing_compiles_after_warm_up(
    kv_cache_dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    windows = [{}, {"sliding_window": 40}, {"logits_soft_cap": 30.0}]
    engine = Engine(
        windows,
        dtype=torch.bfloat16,
        kv_cache_dtype=kv_cache_dtype,
        layout=layout,
        num_speculative_tokens=3,
    )
    for layer in engine.layers:
        layer.impl.warm_up(layer)
    compiled: list[str] = []

    def record(**event: Any) -> None:
        compiled.append(event["fn"].name)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    for lengths in (*BATCHES.values(), [(1, 0)], [(190, 1)], [(16, 0), (17, 1)]):
        engine.step(lengths)
        engine.step(lengths, padded_reqs=2, padded_tokens=1)
    engine.step([(1, 5)], padded_tokens=MAX_NUM_TOKENS - 1)
    assert not compiled


def at_offset(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The tensor, in memory that begins so many elements after an aligned address."""
    flat = tensor.new_empty(tensor.numel() + offset)[offset:]
    return flat.view(tensor.shape).copy_(tensor)


@gpu_only
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_a_thousand_random_batches_compile_nothing(
    kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes, drafts, chunks and whole prompts; lengths and slots at any address."""
    from triton import knobs

    layers = [{}, {"sliding_window": 40}]
    engine = Engine(
        layers,
        dtype=torch.bfloat16,
        kv_cache_dtype=kv_cache_dtype,
        num_speculative_tokens=3,
        num_blocks=160,
    )
    for layer in engine.layers:
        layer.impl.warm_up(layer)
    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime,
        "jit_post_compile_hook",
        lambda **event: compiled.append(event["fn"].name),
    )
    random = Random(0)
    for _ in range(1000):
        longest = random.choice([1, 4, 16, 200])
        lengths = []
        for _ in range(random.randint(1, 6)):
            query_len = random.randint(1, longest)
            lengths.append((query_len, random.randint(0, MAX_MODEL_LEN - query_len)))
        padding = {"padded_reqs": random.randint(0, 2)}
        padding["padded_tokens"] = random.choice([0, 1, 13, 3000])
        common = engine.fill(lengths, **padding)
        for name in (
            "query_start_loc",
            "seq_lens",
            "slot_mapping",
            "block_table_tensor",
        ):
            tensor = getattr(common, name)
            setattr(common, name, at_offset(tensor, random.randrange(4)))
        metadata = engine.builder.build(0, common)
        for layer in engine.layers:
            query, key, value = engine.new_tokens(layer, common.num_actual_tokens)
            if random.random() < 0.5:  # tensors of their own
                query, key, value = query.clone(), key.contiguous(), value.clone()
            query = engine.as_passed(layer, query)
            output = torch.empty_like(query, dtype=engine.dtype)
            run_layer(layer, query, key, value, metadata, output)
        assert not compiled, (compiled, lengths, padding)


def test_views_of_a_cache_are_made_once() -> None:
    engine = Engine(kv_cache_dtype="fp8")
    impl = engine.layers[0].impl
    kv_cache = make_kv_cache(
        KV_LAYOUTS[0], 4, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE, torch.float16, DEVICE
    ).view(torch.uint8)[..., ::2]
    other = kv_cache.clone()
    first = impl.key_value_caches(kv_cache)
    assert impl.key_value_caches(kv_cache) is first
    second = impl.key_value_caches(other)
    assert [v.data_ptr() for v in second[:2]] != [v.data_ptr() for v in first[:2]]
    assert all(view.dtype == current_platform.fp8_dtype() for view in first[:2])
    assert first.k_scale is first.v_scale is None


class Checks:
    """Counts the calls that are checked; all others repeat one of them."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.names = engine, []
        for name in ("reshape_and_cache", "varlen_attention"):
            monkeypatch.setattr(conch_attn, name, self.count(name))

    def count(self, name: str) -> Any:
        function = getattr(conch_attn, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return function(*args, **kwargs)

        return counted

    def of(self, lengths: Sequence[tuple[int, int]], **options: Any) -> list[str]:
        """What a step checks, whose results are compared with the reference."""
        self.names.clear()
        self.engine.step(lengths, **options)
        return self.names


BOTH = ["reshape_and_cache", "varlen_attention"]


def test_a_layer_checks_each_kind_of_batch_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    checks = Checks(engine, monkeypatch)
    assert checks.of(BATCHES["decode"]) == BOTH
    assert checks.of([(1, 3), (1, 90)], padded_reqs=1) == []
    assert checks.of(BATCHES["mixed"]) == []
    assert checks.of([(12, 30), (1, 7)]) == BOTH[1:]  # other tiles
    assert checks.of([(12, 3), (12, 50)]) == []
    assert checks.of(BATCHES["prefill"], causal=False) == BOTH[1:]
    assert checks.of(BATCHES["decode"]) == []
    engine.block_table = engine.block_table.clone()
    assert checks.of(BATCHES["decode"]) == BOTH[1:]
    rows = engine.new_tokens
    monkeypatch.setattr(
        engine, "new_tokens", lambda *args: [x.contiguous() for x in rows(*args)]
    )
    assert checks.of(BATCHES["decode"]) == BOTH
    (layer,) = engine.layers
    kv_cache = make_kv_cache(
        KV_LAYOUTS[-1],
        engine.num_blocks,
        BLOCK_SIZE,
        NUM_KV_HEADS,
        HEAD_SIZE,
        engine.dtype,
        DEVICE,
    )
    bind_kv_cache(layer, kv_cache)
    layer.caches = key_value_views(kv_cache, HEAD_SIZE)
    assert checks.of(BATCHES["decode"]) == BOTH
    assert len(layer.impl.attentions) == len(layer.impl.writes) == 1


def test_schedules_have_calls_of_their_own() -> None:
    """Microbatches have a builder each, and share the layers."""
    engine = Engine()
    engine.step(BATCHES["decode"])
    (layer,) = engine.layers
    other = ConchAttentionMetadataBuilder(
        engine.builder.kv_cache_spec, ["layer.0"], engine.config, engine.builder.device
    )
    first, engine.builder = engine.builder, other
    engine.step(BATCHES["decode"])
    engine.builder = first
    engine.step(BATCHES["verify"])
    schedules = {prepared.schedule for prepared in layer.impl.attentions.values()}
    expected = {*first.schedules.values(), *other.schedules.values()}
    assert schedules == expected and len(expected) == 2


def test_one_tokens_stride_is_not_that_of_more() -> None:
    engine = Engine()
    (layer,) = engine.layers
    common = engine.fill([(3, 0)])
    _, key, value = engine.new_tokens(layer, 1)
    before = [cache.clone() for cache in layer.caches]
    kv_cache = bound_kv_cache(layer)
    for count in (1, 3):
        slots = common.slot_mapping[:count]
        layer.impl.write_kv_cache(layer, key[:count], value[:count], kv_cache, slots)
    assert key[:1].stride() == key.stride()
    engine.check_cache(layer, before, key, value, common.slot_mapping)


def test_calls_are_kept_in_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conch_attn, "MAX_PREPARED", 2)
    engine = Engine()
    (layer,) = engine.layers
    for _ in range(3):
        engine.block_table = torch.cat([engine.block_table] * 2)[:8].clone()
        engine.step([(1, 5)])
        assert 1 <= len(layer.impl.attentions) <= 2


def test_cache_is_freed_with_its_binding() -> None:
    """The engine profiles with a cache of gigabytes that must not stay."""
    engine = Engine()
    engine.step(BATCHES["decode"])
    (layer,) = engine.layers
    del layer.caches
    bound = weakref.ref(bound_kv_cache(layer))
    bind_kv_cache(layer, torch.tensor([]))
    gc.collect()
    assert bound() is None
    assert layer.impl.key_value is None
    assert not layer.impl.attentions and not layer.impl.writes


def test_schedules_are_made_for_the_group_and_the_configuration() -> None:
    engine = Engine(num_speculative_tokens=3)
    (schedule,) = engine.builder.schedules.values()
    assert schedule.max_num_seqs == 8
    assert schedule.max_num_tokens == MAX_NUM_TOKENS
    assert schedule.decode_query_len == engine.builder.decode_query_len == 4


def selector_config(**changes: Any) -> dict[str, Any]:
    """What a platform asks validate_configuration; changes of unknown fields drop."""
    usual = {"head_size": 64, "dtype": torch.float16, "kv_cache_dtype": "auto"}
    known = AttentionSelectorConfig(**usual, block_size=16)._asdict()
    known |= {name: value for name, value in changes.items() if name in known}
    return {"device_capability": DeviceCapability(9, 0)} | known


SUPPORTED = [
    {"head_size": head_size} for head_size in (16, 64, 80, 96, 112, 128, 256, 512)
] + [
    {"block_size": block_size} for block_size in (None, 16, 48, 128, 528, 784, 1056)
] + [
    {"dtype": torch.float16},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float32},
    {"kv_cache_dtype": None},
    {"kv_cache_dtype": "fp8"},
    {"kv_cache_dtype": "fp8_e4m3"},
    {"kv_cache_dtype": "fp8_e5m2"},
    {"kv_cache_dtype": "bfloat16", "dtype": torch.bfloat16},
    *({"kv_cache_dtype": name} for name in TOKEN_HEAD_FORMATS),
    {"has_sliding_window": True},
    {"use_non_causal": True},
    {"use_kv_connector": True},
    {"use_adaptive_verification": True},
    {"use_dcp": True},
    {"use_batch_invariant": True},
    {"has_sink": True},
    {"use_rswa": True},
    *([{"use_mm_prefix": True}] if ConchAttentionBackend.supports_mm_prefix() else []),
    {"attn_type": AttentionType.DECODER},
    {"attn_type": AttentionType.ENCODER},
    {"attn_type": AttentionType.ENCODER_ONLY},
    {"attn_type": AttentionType.ENCODER_DECODER},
]  # fmt: skip

UNSUPPORTED = [
    ({"head_size": 8}, "head_size 8 not supported: it must be from 16 to 512"),
    ({"head_size": 576}, "head_size 576 not supported: it must be from 16 to 512"),
    ({"block_size": 24}, "block_size 24 not supported: it must be a multiple of 16"),
    ({"dtype": torch.float64}, "dtype torch.float64 not supported"),
    ({"kv_cache_dtype": "fp8_inc"}, "kv_cache_dtype fp8_inc not supported"),
    *(
        ({"kv_cache_dtype": name}, f"kv_cache_dtype {name} not supported")
        for name in ("int8_per_token_head", "int4_per_token_head")
        if name not in TOKEN_HEAD_FORMATS
    ),
    (
        {"kv_cache_dtype": "bfloat16"},
        "kv_cache_dtype bfloat16 not supported with dtype torch.float16",
    ),
    ({"use_mla": True}, "MLA not supported"),
    ({"use_sparse": True}, "sparse not supported"),
    *(
        []
        if ConchAttentionBackend.supports_mm_prefix()
        else [({"use_mm_prefix": True}, "partial multimodal token full attention")]
    ),
    ({"use_per_head_quant_scales": True}, "per-head quant scales not supported"),
    ({"use_pcp": True}, "PCP not supported"),
    ({"attn_type": "prefix"}, "attention type prefix not supported"),
]


@pytest.mark.parametrize("changes", SUPPORTED, ids=str)
def test_supported_configurations(changes: dict[str, Any]) -> None:
    assert (
        ConchAttentionBackend.validate_configuration(**selector_config(**changes)) == []
    )


@pytest.mark.parametrize(("changes", "reason"), UNSUPPORTED, ids=str)
def test_unsupported_configurations(changes: dict[str, Any], reason: str) -> None:
    config = selector_config(**changes)
    if not changes.keys() <= config.keys():
        pytest.skip("this release does not ask for it")
    (only,) = ConchAttentionBackend.validate_configuration(**config)
    assert reason in only


def test_every_question_of_the_selector_is_asked_above() -> None:
    """A release that asks for something new has to be answered for."""
    asked = {name for changes in SUPPORTED for name in changes}
    asked |= {name for changes, _ in UNSUPPORTED for name in changes}
    assert asked >= set(AttentionSelectorConfig._fields)


def test_every_cache_format_is_taken_or_refused() -> None:
    for kv_cache_dtype in get_args(CacheDType):
        dtype = getattr(torch, kv_cache_dtype, torch.float16)
        dtype = dtype if dtype.itemsize == 2 else torch.float16
        config = selector_config(kv_cache_dtype=kv_cache_dtype, dtype=dtype)
        reasons = ConchAttentionBackend.validate_configuration(**config)
        taken = kv_cache_dtype in ConchAttentionBackend.supported_kv_cache_dtypes
        named = [f"kv_cache_dtype {kv_cache_dtype} not" in reason for reason in reasons]
        assert named == ([] if taken else [True])


@pytest.mark.skipif(
    "head_size_v" not in inspect.signature(FullAttentionSpec).parameters,
    reason="with this release all layers have K and V of one size",
)
def test_keys_and_values_of_two_sizes_are_refused() -> None:
    engine = Engine()
    spec = replace(engine.builder.kv_cache_spec, head_size_v=HEAD_SIZE // 2)
    with pytest.raises(ValueError, match="head_size_v .* differs from head_size"):
        ConchAttentionMetadataBuilder(
            spec, ["layer.0"], engine.config, torch.device(DEVICE)
        )


def test_all_reasons_at_once() -> None:
    expected = {}
    for changes, reason in UNSUPPORTED:
        (name, *_) = changes
        if name in selector_config() and reason not in expected.values():
            expected[name] = (changes[name], reason)
    config = selector_config(**{name: value for name, (value, _) in expected.items()})
    reasons = ConchAttentionBackend.validate_configuration(**config)
    expected.pop("kv_cache_dtype")  # refused for itself, not with its dtype
    for _, reason in expected.values():
        assert any(reason in one for one in reasons), (reason, reasons)
    assert len(reasons) == len(set(reasons))


@pytest.mark.parametrize(
    ("capability", "changes", "reason"),
    [
        ((7, 5), {"dtype": torch.bfloat16}, "compute capability 8.0"),
        ((8, 0), {"kv_cache_dtype": "fp8"}, None),
        ((7, 5), {"kv_cache_dtype": "fp8_e4m3"}, None),
        ((8, 9), {"kv_cache_dtype": "fp8_e4m3"}, None),
        ((8, 0), {"kv_cache_dtype": "fp8_e5m2"}, None),
        ((7, 5), {"dtype": torch.float16}, None),
    ],
)
def test_what_a_cuda_device_lacks(
    capability: tuple[int, int],
    changes: dict[str, Any],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    config = selector_config(**changes)
    config["device_capability"] = DeviceCapability(*capability)
    reasons = ConchAttentionBackend.validate_configuration(**config)
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]


def test_layer_refuses_with_every_reason() -> None:
    """What the selector does not see is refused when the layer is made."""
    engine = Engine()
    with pytest.raises(ValueError) as error:
        engine.make_impl(
            "fp8_inc",
            attn_type="prefix",
            attention_bias=torch.zeros(1),
        )
    for reason in (
        "kv_cache_dtype fp8_inc not supported",
        "attention type prefix not supported",
        "attention_bias not supported",
        "--attention-backend",
    ):
        assert reason in str(error.value)


def test_layer_refuses_unknown_arguments() -> None:
    with pytest.raises(ValueError, match="attention_bias not supported"):
        Engine().make_impl("auto", attention_bias=True)


def test_layer_accepts_arguments_that_ask_for_nothing() -> None:
    Engine().make_impl("auto", sinks=None)


def test_layer_refuses_prefill_context_parallelism(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = ConchAttentionImpl.__new__

    def create_on_two_ranks(cls: type, *args: Any, **kwargs: Any) -> Any:
        impl = create(cls, *args, **kwargs)
        impl.pcp_world_size = 2
        return impl

    monkeypatch.setattr(ConchAttentionImpl, "__new__", create_on_two_ranks)
    with pytest.raises(ValueError, match="PCP.* not supported"):
        Engine()


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
