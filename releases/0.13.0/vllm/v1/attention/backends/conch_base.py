# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Base classes of the CONCH backend: what follows vLLM's attention interface closely.

The KV cache of a layer is one logical tensor [num_blocks, 2, block_size, num_kv_heads,
head_size], K before V, with the strides of the physical layout in use. forward writes
the new tokens' K and V into it before it attends.
"""

from abc import abstractmethod
from typing import Any

import torch

import vllm.envs as envs
from vllm.attention.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionType,
    MultipleOf,
)
from vllm.attention.ops.conch.launch import compile_together
from vllm.config import VllmConfig
from vllm.model_executor.layers.batch_invariant import vllm_is_batch_invariant
from vllm.v1.attention.backends.utils import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    get_kv_cache_layout,
)
from vllm.v1.kv_cache_interface import AttentionSpec

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

# Variants that are compiled at the same time.
WARM_UP_THREADS = 4

# Physical order of the logical KV cache dimensions (block, K or V, slot, head, dim).
PHYSICAL_ORDERS = {"NHD": (0, 1, 2, 3, 4), "HND": (0, 1, 3, 2, 4)}
# The same for one cache of all layers, whose logical first dimension is the layer:
# what belongs to a block, or to a head of a block, lies together.
CROSS_LAYER_ORDERS = {"NHD": (1, 0, 2, 3, 4, 5), "HND": (1, 4, 0, 2, 3, 5)}


# Formats of the cache with a scale for each token and head: vLLM has none here.
TOKEN_HEAD_FORMATS: tuple[str, ...] = ()


def token_head_dtype(kv_cache_dtype: str) -> torch.dtype | None:
    """How the elements of one of these formats are to be read; None of others."""
    return None


def token_scale_views(
    kv_cache: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of K and V of a cache in one of these formats."""
    raise NotImplementedError("vLLM has no cache with a scale per token and head.")


def key_value_views(
    kv_cache: torch.Tensor, head_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as [num_blocks, block_size, num_kv_heads, head_size] views."""
    key_cache, value_cache = kv_cache.unbind(1)
    return key_cache, value_cache


def bound_kv_cache(layer: AttentionLayer) -> torch.Tensor:
    """The layer's KV cache; without elements until the engine has bound one."""
    return layer.kv_cache[0]


def conch_impls(layer: Any) -> list["ConchImplBase"]:
    """The layer's implementation, if it is CONCH's."""
    impl = getattr(layer, "impl", None)
    return [impl] if isinstance(impl, ConchImplBase) else []


def max_decode_query_len(vllm_config: VllmConfig) -> int:
    """Tokens of a sequence that decodes: one, and what is speculated on."""
    speculative_config = vllm_config.speculative_config
    if speculative_config is None or not speculative_config.num_speculative_tokens:
        return 1
    return 1 + speculative_config.num_speculative_tokens


def max_replayed_query_len(vllm_config: VllmConfig) -> int:
    """Tokens of a sequence up to which CUDA graphs for decodes may be replayed."""
    return max_decode_query_len(vllm_config)


def attends_both_ways(vllm_config: VllmConfig) -> bool:
    """Whether the model's decoder layers may be asked for non-causal attention."""
    return False


def is_batch_invariant() -> bool:
    """Whether results must not depend on the batch (VLLM_BATCH_INVARIANT=1)."""
    return vllm_is_batch_invariant()


def splits_batches(vllm_config: VllmConfig) -> bool:
    """Whether batches may be run in parts, each with metadata of its own."""
    return vllm_config.parallel_config.enable_dbo


def mm_prefix_ranges(common: CommonAttentionMetadata) -> torch.Tensor | None:
    """None: metadata gets them when it is built (`ConchMetadataBase`)."""
    return None


def host_seq_lens(common: CommonAttentionMetadata) -> torch.Tensor | None:
    """[num_reqs] bounds of seq_lens that the host has without waiting, if any."""
    return common._seq_lens_cpu


def exchanges_all_to_all(vllm_config: VllmConfig) -> bool:
    """Whether DCP ranks send each other results: here they always add them up."""
    return False


def rswa_window(vllm_config: VllmConfig) -> int | None:
    """None: here no model has a reference sliding window."""
    return None


def rswa_prefix_lens(common: CommonAttentionMetadata) -> torch.Tensor | None:
    """None, as `rswa_window`."""
    return None


class ConchBackendBase(AttentionBackend):
    """The KV cache as CONCH wants it: one tensor, any physical layout."""

    accept_output_buffer: bool = True

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_MULTIPLE)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        if block_size % PAGE_MULTIPLE != 0:
            raise ValueError(
                f"CONCH cannot use pages of block_size {block_size}: the size must be "
                f"a multiple of {PAGE_MULTIPLE}. Give another --block-size."
            )
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def get_kv_cache_stride_order(
        include_num_layers_dimension: bool = False,
    ) -> tuple[int, ...]:
        layout = get_kv_cache_layout()
        if include_num_layers_dimension:
            return CROSS_LAYER_ORDERS[layout]
        return PHYSICAL_ORDERS[layout]


class ConchMetadataBase:
    """Metadata to which the engine adds the ranges of images after it is built.

    It sets mm_prefix_range once for each layer, always to the same dict: of requests'
    rows to the (first, last) position of each image. What is kept is None or a tensor,
    [num_reqs, num_ranges, 2] int32, in which (0, 0) stands for no range.
    """

    seq_lens: torch.Tensor
    images: dict[int, list[tuple[int, int]]] | None = None

    @abstractmethod
    def update_schedules(self) -> None:
        """Recomputes the schedules, here for the ranges."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "mm_prefix_range" or not isinstance(value, dict):
            super().__setattr__(name, value)
        elif value is not self.images:
            self.images = value
            ranges = image_ranges(value, self.seq_lens)
            self.mm_prefix_range = ranges
            if ranges is not None:
                self.update_schedules()


def image_ranges(
    images: dict[int, list[tuple[int, int]]], seq_lens: torch.Tensor
) -> torch.Tensor | None:
    """The images of each of the batch's requests, padded to as many."""
    rows = [images.get(i, []) for i in range(len(seq_lens))]
    num_ranges = max(map(len, rows))
    if num_ranges == 0:
        return None
    padded = [row + [(0, 0)] * (num_ranges - len(row)) for row in rows]
    ranges = torch.tensor(padded, dtype=torch.int32)
    return ranges.to(seq_lens.device, non_blocking=True)


class ConchBuilderBase(AttentionMetadataBuilder):
    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        mode = vllm_config.compilation_config.cudagraph_mode
        if envs.VLLM_USE_V2_MODEL_RUNNER and mode and mode.has_full_cudagraphs():
            # It builds metadata without a graph's padding, and with the number of
            # tokens as max_query_len: no graph's launches can be told from that.
            raise ValueError(
                f"CONCH cannot run with cudagraph_mode {mode.name} on the experimental "
                "model runner that VLLM_USE_V2_MODEL_RUNNER=1 chooses. Unset it, or "
                'give --compilation-config \'{"cudagraph_mode": "NONE"}\'.'
            )


class ConchImplBase(AttentionImpl):
    """Connects vLLM's one call per layer to write_kv_cache() and attend()."""

    kv_sharing_target_layer_name: str | None
    is_encoder: bool

    def __init__(self) -> None:
        self.is_warm = False

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

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if output is None:
            raise ValueError("CONCH writes into a given output, but output is None.")
        if attn_metadata is None:
            # A dummy run: to profile, while there is no KV cache yet, or to warm up.
            # The engine makes one of the latter before it serves, with graphs or
            # without, so that this compiles the kernels in time.
            # Encoders have none at any time.
            if not self.is_warm and (self.is_encoder or kv_cache.numel() > 0):
                with compile_together(WARM_UP_THREADS):
                    self.warm_up(layer)
                self.warm_up(layer)
                self.is_warm = True
            self.reserve(query)
            return output.fill_(0)
        if output_block_scale is not None:
            raise ValueError(
                "CONCH cannot quantise its output in blocks: output_block_scale is "
                "given, only output_scale alone is supported. Leave fuse_attn_quant "
                "out of --compilation-config."
            )
        if (
            self.kv_sharing_target_layer_name is None
            and key is not None
            and value is not None
        ):
            self.write_kv_cache(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        self.attend(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale
        )
        return output
