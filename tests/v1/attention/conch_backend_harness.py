# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A group of CONCH layers, stepped as the engine steps them, beside plain PyTorch.

Every step goes the engine's way: persistent input buffers with garbage behind the
batch, a metadata builder for a group of layers, then each layer's calls.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.attention.conch_harness import (
    DEVICE,
    ON_GPU,
    assert_close,
    hopper_config,
    poison,
)
from tests.kernels.attention.conch_reference import (
    SENTINEL,
    Attention,
    fp8_output_tolerance,
    output_tolerance,
    paged_attention,
)
from tests.v1.attention.conch_release import (
    KV_LAYOUTS,
    AttentionSelectorConfig,
    bind_kv_cache,
    make_kv_cache,
    make_spec,
    run_layer,
)
from vllm.attention.ops.conch import hopper_fp8_prefill
from vllm.attention.ops.conch.launch import BoundLaunch
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.conch_attn import (
    ConchAttentionBackend,
    ConchAttentionImpl,
    ConchAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.conch_base import (
    CommonAttentionMetadata,
    key_value_views,
)

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
HEAD_SIZE = 128 if ON_GPU else 32  # on a GPU one that its fastest kernels take

needs_rswa = pytest.mark.skipif(
    not hasattr(ConchAttentionBackend, "supports_rswa"),
    reason="this release has no reference sliding window",
)


needs_diffusion = pytest.mark.skipif(
    "diffusion_config" not in VllmConfig.__dataclass_fields__,
    reason="this release has no models of diffusion",
)


def make_config(
    *,
    num_speculative_tokens: int | None = None,
    cudagraph_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    dtype: torch.dtype = torch.float32,
    rswa_window: int | None = None,
    canvas_length: int | None = None,
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
    if canvas_length is not None:
        config.diffusion_config = SimpleNamespace(canvas_length=canvas_length)
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


def discard_buffers(builder: ConchAttentionMetadataBuilder) -> None:
    """Fills all device memory of a builder with rubbish.

    So vLLM's sleep mode does to what it neither offloads nor finds in a model.
    """
    seen: set[int] = set()

    def discard(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            poison(value)
        elif isinstance(value, dict):
            for part in value.values():
                discard(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                discard(part)
        elif "conch" in type(value).__module__ and hasattr(value, "__dict__"):
            discard(vars(value))

    for name in ("schedules", "encoder_pages", "shares", "prefix_lens"):
        discard(getattr(builder, name))


def selector_config(**changes: Any) -> dict[str, Any]:
    """What a platform asks validate_configuration; changes of unknown fields drop."""
    usual = {"head_size": 64, "dtype": torch.float16, "kv_cache_dtype": "auto"}
    known = AttentionSelectorConfig(**usual, block_size=16)._asdict()
    known |= {name: value for name, value in changes.items() if name in known}
    return {"device_capability": DeviceCapability(9, 0)} | known


def record_variants(monkeypatch: pytest.MonkeyPatch, runs: bool = True) -> set[tuple]:
    """All that a launch's variant depends on but devices and addresses.

    runs: False: nothing is launched.
    """
    launched: set[tuple] = set()
    call = BoundLaunch.__call__

    def specialized(argument: Any) -> Any:
        """What Triton makes variants for."""
        if isinstance(argument, tuple):
            return tuple(map(specialized, argument))
        if isinstance(argument, int):
            return argument == 1, argument % 16 == 0
        return type(argument)

    def record(bound: BoundLaunch, *tensors: Any, **options: Any) -> None:
        launch = bound.launch
        kernel, constants = launch.kernel, launch.constants
        names = [name for name in kernel.arg_names if name not in constants]
        names = names[len(names) - len(launch.arguments) :]
        known = getattr(kernel, "kwargs", {})  # of one that is interpreted
        same = known.get("do_not_specialize") or getattr(
            kernel, "do_not_specialize", ()
        )
        numbers = [
            (name, specialized(argument))
            for name, argument in zip(names, launch.arguments)
            if name not in same
        ]
        given = [None if t is None else t.dtype for t in (*tensors, *bound.tensors)]
        fixed = sorted(constants.items())
        launched.add((kernel.__name__, str(fixed), str(given), str(numbers)))
        if runs:
            call(bound, *tensors, **options)

    monkeypatch.setattr(BoundLaunch, "__call__", record)
    return launched


def variants_of_warm_up(layers: Sequence[Any]) -> set[tuple]:
    """What warm-ups of layers launch, without doing so."""
    with pytest.MonkeyPatch.context() as patch:
        launched = record_variants(patch, runs=False)
        for layer in layers:
            layer.impl.run_dummy_batches(layer)
    return launched
