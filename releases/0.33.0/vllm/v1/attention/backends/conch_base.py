# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Base classes of the CONCH backend: what follows vLLM's attention interface closely.

The KV cache of a layer is one logical tensor [num_blocks, num_kv_heads, block_size,
2 * head_size] with the strides of whatever physical layout the engine chose; K is the
first half of the last dimension, V the second. Where each token and head has scales of
its own, each half ends with one, an fp32. vLLM writes the cache through
do_kv_cache_update before it calls forward.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.attention.backends.utils import compute_mm_prefix_range_tensor
from vllm.v1.attention.ops.conch.launch import compile_together
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    KVQuantMode,
)

__all__ = [
    "AttentionCGSupport",
    "AttentionLayer",
    "AttentionSpec",
    "AttentionType",
    "CommonAttentionMetadata",
    "ConchBackendBase",
    "ConchBuilderBase",
    "ConchImplBase",
    "ConchMetadataBase",
    "PAGE_MULTIPLE",
    "TOKEN_HEAD_FORMATS",
    "attends_both_ways",
    "bound_kv_cache",
    "conch_impls",
    "exchanges_all_to_all",
    "host_seq_lens",
    "is_batch_invariant",
    "key_value_views",
    "max_decode_query_len",
    "max_replayed_query_len",
    "mm_prefix_ranges",
    "rswa_prefix_lens",
    "rswa_window",
    "splits_batches",
    "token_head_dtype",
    "token_scale_views",
]

PAGE_MULTIPLE = 16  # pages hold a multiple of so many tokens

# Tokens per page where the user gave no --block-size.
PREFERRED_BLOCK_SIZE = 128

# Physical layouts of the KV cache, best first. None: any, as the engine prefers.
PREFERRED_KV_CACHE_LAYOUTS: tuple[KVCacheLayout, ...] | None = None


# Formats of the cache with a scale for each token and head.
TOKEN_HEAD_FORMATS = (
    "int8_per_token_head",
    "fp8_per_token_head",
    "int4_per_token_head",
)
SCALE_BYTES = 4


def token_head_dtype(kv_cache_dtype: str) -> torch.dtype | None:
    """How the elements of one of these formats are to be read; None of others."""
    if kv_cache_dtype == "fp8_per_token_head":
        return current_platform.fp8_dtype()
    if kv_cache_dtype in TOKEN_HEAD_FORMATS:
        return torch.int8 if kv_cache_dtype.startswith("int8") else torch.uint8
    return None


def key_value_views(
    kv_cache: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as [num_blocks, block_size, num_kv_heads, width] views."""
    pages, half = kv_cache.transpose(1, 2), kv_cache.shape[-1] // 2
    return pages[..., :width], pages[..., half : half + width]


def token_scale_views(
    kv_cache: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of K and V as [num_blocks, block_size, num_kv_heads] views.

    Args:
        kv_cache: of elements of one byte.
        width: bytes of a row of K, or V.

    """
    scales = kv_cache.view(torch.float32).transpose(1, 2)
    place = width // SCALE_BYTES
    return scales[..., place], scales[..., 2 * place + 1]


def bound_kv_cache(layer: AttentionLayer) -> torch.Tensor:
    """The layer's KV cache; without elements until the engine has bound one."""
    return layer.kv_cache


def max_replayed_query_len(vllm_config: VllmConfig) -> int:
    """Tokens of a sequence up to which CUDA graphs for decodes may be replayed.

    A model of diffusion decodes a canvas at a time.
    """
    return max(max_decode_query_len(vllm_config), vllm_config.num_speculative_tokens)


def attends_both_ways(vllm_config: VllmConfig) -> bool:
    """Whether the model's decoder layers may be asked for non-causal attention."""
    return (
        vllm_config.attention_config.use_non_causal
        or vllm_config.diffusion_config is not None
    )


def is_batch_invariant() -> bool:
    """Whether results must not depend on the batch (VLLM_BATCH_INVARIANT=1)."""
    return envs.VLLM_BATCH_INVARIANT


def splits_batches(vllm_config: VllmConfig) -> bool:
    """Whether batches may be run in parts, each with metadata of its own."""
    return vllm_config.parallel_config.use_ubatching


def mm_prefix_ranges(common: CommonAttentionMetadata) -> torch.Tensor | None:
    """[num_reqs, num_ranges, 2] positions that see each other, None without any."""
    return compute_mm_prefix_range_tensor(
        common.mm_req_doc_ranges, common.num_reqs, common.seq_lens.device
    )


def host_seq_lens(common: CommonAttentionMetadata) -> torch.Tensor | None:
    """[num_reqs] bounds of seq_lens that the host has without waiting, if any."""
    return common.seq_lens_cpu_upper_bound


def exchanges_all_to_all(vllm_config: VllmConfig) -> bool:
    """Whether DCP ranks send each other results, instead of adding them up."""
    return vllm_config.parallel_config.dcp_comm_backend == "a2a"


def rswa_window(vllm_config: VllmConfig) -> int | None:
    """Keys that generated tokens see besides the prompt, themselves included (R-SWA).

    None: the model does without.
    """
    model_config = vllm_config.model_config
    return None if model_config is None else model_config.rswa_window


def rswa_prefix_lens(common: CommonAttentionMetadata) -> torch.Tensor | None:
    """[num_reqs] lengths of the prompts, on any device; None where not given."""
    return common.rswa_prefix_lens


class ConchBackendBase(AttentionBackend):
    """What CONCH takes part in, and what it prefers where vLLM asks."""

    forward_includes_kv_cache_update: bool = False
    # forward() reads K and V from the cache alone.
    supports_kv_cache_update_bypass: bool = True

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_MULTIPLE)]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Makes room for the scales of K and V beside their elements."""
        mode = spec.kv_quant_mode
        if spec.state_content_bytes is not None or not mode.is_per_token_head:
            return spec
        elements = spec.head_size + spec.head_size_v
        if mode == KVQuantMode.INT4_PER_TOKEN_HEAD:
            elements //= 2
        return replace(spec, state_content_bytes=elements + 2 * SCALE_BYTES)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return True

    @classmethod
    def supports_rswa(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(default_block_size, PREFERRED_BLOCK_SIZE)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        return PREFERRED_KV_CACHE_LAYOUTS


class ConchMetadataBase(ABC):
    """Metadata from which a model may drop the ranges of images.

    Gemma 4 does so for layers with full attention, which see in one direction.
    """

    @abstractmethod
    def update_schedules(self) -> None:
        """Recomputes the schedules, here without the ranges."""

    def __setattr__(self, name: str, value: Any) -> None:
        had_ranges = False
        if name == "mm_prefix_range":  # most are others
            had_ranges = getattr(self, name, None) is not None
        super().__setattr__(name, value)
        if had_ranges and value is None:
            self.update_schedules()


class ConchBuilderBase(AttentionMetadataBuilder):
    # Schedules are computed on the device from persistent tensors, so a speculator
    # can record their update in the CUDA graph of its draft steps.
    supports_draft_decode_metadata_update: bool = True

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if rswa_window(vllm_config) is not None:
            # Prefix lengths are of the batch that build() saw.
            self.supports_draft_decode_metadata_update = False
        if kv_cache_spec.head_size_v != kv_cache_spec.head_size:
            raise ValueError(
                f"CONCH cannot run layers {layer_names}: head_size_v "
                f"{kv_cache_spec.head_size_v} differs from head_size "
                f"{kv_cache_spec.head_size}, only equal sizes are supported. Choose "
                "another backend with --attention-backend."
            )

    def update_draft_decode_metadata(self, metadata: Any) -> None:
        metadata.host_lengths = None  # those of the draft's first step
        metadata.update_schedules()


class ConchImplBase(AttentionImpl):
    """Connects vLLM's two calls per layer to write_kv_cache() and attend()."""

    supports_dcp: bool = True

    def __init__(self) -> None:
        warm_up_kernel.register_warmup()

    @abstractmethod
    def write_kv_cache(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores K and V of the new tokens in the cache."""

    @abstractmethod
    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        """Writes the new tokens' attention to the cache, in encoders to the batch."""

    @abstractmethod
    def reserve(self, query: torch.Tensor) -> None:
        """Takes the memory of a step while vLLM measures how much there is."""

    @abstractmethod
    def warm_up(self, layer: AttentionLayer) -> None:
        """Launches every kernel that the layer can launch, which compiles it."""

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        self.write_kv_cache(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # profiling: there is no KV cache yet
            self.reserve(query)
            return output.fill_(0)
        if output_block_scale is not None:
            raise ValueError(
                "CONCH cannot quantise its output in blocks: output_block_scale is "
                "given, only output_scale alone is supported. Leave fuse_attn_quant "
                "out of --compilation-config."
            )
        self.attend(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale
        )
        return output


class ConchWarmUpKernel(VllmJitKernel[str]):
    """vLLM's JIT warm-up, one key for every layer that CONCH runs.

    vLLM asks for the keys once the KV caches are bound, before it captures CUDA
    graphs and serves.
    """

    CompileKey = str  # a layer's name

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, Any] = {}

    def get_warmup_keys(self, vllm_config: VllmConfig) -> list[str]:
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = {
            name: layer for name, layer in layers.items() if conch_impls(layer)
        }
        return list(self.layers)

    def compile_many(self, compile_keys: Iterable[str]) -> None:
        layers = [self.layers.pop(name) for name in compile_keys]
        with compile_together(envs.VLLM_TRITON_JIT_WARMUP_NUM_THREADS):
            self.warm_up(layers)
        self.warm_up(layers)

    def compile(self, compile_key: str) -> None:
        self.compile_many([compile_key])

    def warm_up(self, layers: list[Any]) -> None:
        for layer in layers:
            for impl in conch_impls(layer):
                impl.warm_up(layer)


def conch_impls(layer: Any) -> list["ConchImplBase"]:
    """The layer's implementations that are CONCH's: a composite backend has several."""
    impl = getattr(layer, "impl", None)
    variants = impl.get_impl_variants() if isinstance(impl, AttentionImpl) else ()
    return [variant for variant in variants if isinstance(variant, ConchImplBase)]


warm_up_kernel = ConchWarmUpKernel()
