# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention backend CONCH: attention and KV-cache write wholly in Triton.

The kernels are in vllm.attention.ops.conch. Here is what connects them to vLLM:
which configurations are supported, the metadata of a step, and the calls of a layer.
conch_base.py holds what depends on the form of vLLM's interface.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from vllm.attention.ops.conch import (
    VarlenSchedule,
    reshape_and_cache,
    varlen_attention,
)
from vllm.attention.ops.conch.hopper_prefill import DTYPES as HOPPER_DTYPES
from vllm.attention.ops.conch.plan import (
    INT4_HEAD_MULTIPLE,
    KV_INT4_DTYPE,
    MAX_DECODE_QUERY_LEN,
    SHORT_QUERY_LEN,
    Shape,
    hopper_kernel,
    this_device,
)
from vllm.attention.ops.conch.reshape_and_cache import (
    PreparedWrite,
    min_large_tokens,
)
from vllm.attention.ops.conch.schedule import UNKNOWN
from vllm.attention.ops.conch.varlen_attention import PreparedAttention
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kFp8StaticTensorSym,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import conch_dcp
from vllm.v1.attention.backends.conch_base import (
    PAGE_MULTIPLE,
    TOKEN_HEAD_FORMATS,
    AttentionCGSupport,
    AttentionLayer,
    AttentionSpec,
    AttentionType,
    CommonAttentionMetadata,
    ConchBackendBase,
    ConchBuilderBase,
    ConchImplBase,
    ConchMetadataBase,
    attends_both_ways,
    bound_kv_cache,
    conch_impls,
    host_seq_lens,
    is_batch_invariant,
    key_value_views,
    max_decode_query_len,
    max_replayed_query_len,
    mm_prefix_ranges,
    rswa_prefix_lens,
    rswa_window,
    splits_batches,
    token_head_dtype,
    token_scale_views,
)
from vllm.v1.attention.backends.conch_pages import BatchPages, pages_of_batch

MIN_HEAD_SIZE = 16
MAX_HEAD_SIZE = 512

# A query length of a sequence alone for every variant of the attention kernels that a
# plan may choose; with SHORT_QUERY_LEN, batches too large for keys to be split, and one
# of which the host knows that it is short.
WARM_UP_QUERY_LENS = (1, 2, 4, 8, 16, 17)

# A prefix that holds every key: what a batch without prefix lengths is given.
WHOLE_SEQUENCE = 2**31 - 1

# Encoders attend to the keys and values of the batch itself, there is no cache.
ENCODER_TYPES = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
# Calls that a layer keeps: one for each kind of batch and each layout of its tensors.
MAX_PREPARED = 256

ATTENTION_TYPES = (
    AttentionType.DECODER,
    AttentionType.ENCODER_DECODER,
    *ENCODER_TYPES,
)


class ScheduleKey(NamedTuple):
    """Layers of one group that agree in this share a schedule."""

    num_heads: int
    sliding_window: int | None
    mm_prefix_in_window: bool
    chunk_lookback: int  # -1: a window, no chunks
    sees_prompt: bool  # behind the window, too: R-SWA


def fp8_cache_dtype(kv_cache_dtype: str) -> torch.dtype | None:
    """How an fp8 cache, allocated as bytes, is to be read; None if it is not fp8."""
    if kv_cache_dtype == "fp8_e5m2":
        return torch.float8_e5m2
    if kv_cache_dtype in ("fp8", "fp8_e4m3"):
        return current_platform.fp8_dtype()
    return None


def keep_prepared(calls: dict[tuple, Any], kind: tuple, call: Any) -> None:
    """Keeps a prepared call; without end only if something never comes back."""
    if len(calls) >= MAX_PREPARED:
        calls.clear()
    calls[kind] = call


def row_width(head_size: int, dtype: torch.dtype | None) -> int:
    """Elements of the cache that a token's K, or V, of one head takes."""
    return head_size // 2 if dtype == KV_INT4_DTYPE else head_size


class Caches(NamedTuple):
    """Views of a layer's cache; scales are those per token and head, if any."""

    key: torch.Tensor
    value: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


def unsupported(
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    attn_type: str,
    capability: DeviceCapability | None,
) -> list[str]:
    """Every reason, with what would do, why CONCH cannot run such a layer here."""
    backend = ConchAttentionBackend
    reasons = []
    if not backend.supports_head_size(head_size):
        reasons.append(
            f"head_size {head_size} not supported: it must be from {MIN_HEAD_SIZE} "
            f"to {MAX_HEAD_SIZE}"
        )
    if not backend.supports_dtype(dtype):
        reasons.append(
            f"dtype {dtype} not supported: it must be one of {backend.supported_dtypes}"
        )
    if not backend.supports_kv_cache_dtype(kv_cache_dtype):
        reasons.append(
            f"kv_cache_dtype {kv_cache_dtype} not supported: it must be one of "
            f"{backend.supported_kv_cache_dtypes}"
        )
    elif kv_cache_dtype in ("float16", "bfloat16") and str(dtype) != (
        f"torch.{kv_cache_dtype}"
    ):
        reasons.append(
            f"kv_cache_dtype {kv_cache_dtype} not supported with dtype {dtype}: it "
            "must be auto, the same or a quantised format"
        )
    elif kv_cache_dtype in TOKEN_HEAD_FORMATS:
        # Where the row of a head ends a scale begins, which is an fp32.
        is_int4 = token_head_dtype(kv_cache_dtype) == KV_INT4_DTYPE
        multiple = INT4_HEAD_MULTIPLE if is_int4 else 4
        if head_size % multiple:
            reasons.append(
                f"kv_cache_dtype {kv_cache_dtype} not supported with head_size "
                f"{head_size}: the size must be a multiple of {multiple}"
            )
        if is_batch_invariant():
            reasons.append(
                f"kv_cache_dtype {kv_cache_dtype} not supported with batch invariance: "
                "use --kv-cache-dtype auto or fp8"
            )
    if not backend.supports_attn_type(attn_type):
        reasons.append(
            f"attention type {attn_type} not supported: it must be one of "
            f"{', '.join(ATTENTION_TYPES)}"
        )
    return reasons + unsupported_by_device(dtype, capability)


def unsupported_by_device(
    dtype: torch.dtype, capability: DeviceCapability | None
) -> list[str]:
    """The reasons that lie in the device: number formats that it lacks."""
    reasons = []
    if current_platform.is_cuda() and capability is not None:
        version = capability.as_version_str()
        if dtype == torch.bfloat16 and capability < DeviceCapability(8, 0):
            reasons.append(
                f"dtype torch.bfloat16 needs compute capability 8.0, this device has "
                f"{version}: use --dtype float16"
            )
    return reasons


NON_CAUSAL_RSWA = "non-causal attention with R-SWA not supported"

# vLLM's short reasons, in whose place `unsupported` gives the whole ones.
BRIEF_REASONS = (
    "head_size not supported",
    "dtype not supported",
    "kv_cache_dtype not supported",
)


class ConchAttentionBackend(ConchBackendBase):
    """What CONCH supports; everything else is refused when the engine starts."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
        "fp8_e5m2",
        *TOKEN_HEAD_FORMATS,
    ]

    @staticmethod
    def get_name() -> str:
        return "CONCH"

    @staticmethod
    def get_impl_cls() -> type["ConchAttentionImpl"]:
        return ConchAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["ConchAttentionMetadataBuilder"]:
        return ConchAttentionMetadataBuilder

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or (
            block_size > 0 and block_size % PAGE_MULTIPLE == 0
        )

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in ATTENTION_TYPES

    @classmethod
    def validate_configuration(cls, **configuration: Any) -> list[str]:
        """Every reason why this configuration cannot run, none if it can."""
        attn_type = configuration["attn_type"]
        brief = (*BRIEF_REASONS, f"attention type {attn_type} not supported")
        reasons = unsupported(
            configuration["head_size"],
            configuration["dtype"],
            configuration["kv_cache_dtype"],
            attn_type,
            configuration["device_capability"],
        )
        for reason in super().validate_configuration(**configuration):
            if reason == "block_size not supported":
                reason = (
                    f"block_size {configuration['block_size']} not supported: it must "
                    f"be a multiple of {PAGE_MULTIPLE}"
                )
            if reason not in brief:
                reasons.append(reason)
        if configuration.get("use_rswa") and configuration.get("use_non_causal"):
            reasons.append(NON_CAUSAL_RSWA)
        return reasons


class HostLengths(NamedTuple):
    """A batch's lengths as far as the host knows them; see `VarlenSchedule.look_at`."""

    query_lens: np.ndarray
    seq_lens: np.ndarray | None  # or bounds
    may_overlap: bool


@dataclass
class ConchAttentionMetadata(ConchMetadataBase):
    """One step's batch, for all layers of a group.

    |------------------- seq_len -------------------|
    |---- context, cached ----|----- query_len -----|
    """

    num_actual_tokens: int  # CUDA-graph padding included
    max_query_len: int  # what the kernels are chosen for, no query is longer
    query_start_loc: torch.Tensor  # [num_reqs + 1]
    seq_lens: torch.Tensor  # [num_reqs]
    block_table: torch.Tensor  # [num_reqs, max_blocks]; of encoders: of the batch
    slot_mapping: torch.Tensor  # [num_actual_tokens]; cross-attention: of K and V
    causal: bool | torch.Tensor  # a tensor: [num_reqs], a flag for each sequence
    mm_prefix_range: torch.Tensor | None  # [num_reqs, num_ranges, 2] seen both ways
    prefix_lens: torch.Tensor | None  # [num_reqs] of R-SWA: tokens that all see
    schedules: dict[ScheduleKey, VarlenSchedule]
    share: conch_dcp.Share | None = None  # where ranks share the keys
    host_lengths: HostLengths | None = None  # if the host may decide by them
    # What all layers with one schedule have in common, see `step_kind`.
    kinds: dict[ScheduleKey, tuple] = field(default_factory=dict)

    def step_kind(self, key: ScheduleKey) -> tuple:
        """All of the step that a prepared attention depends on, but for the layer.

        It is the same for all layers, and made anew where that is another: for
        schedules also serve other metadata, of microbatches or drafts.
        """
        schedule, block_table, causal = (
            self.schedules[key],
            self.block_table,
            self.causal,
        )
        known = self.kinds.get(key)
        if known is not None:
            kind, table = known
            if (
                table is block_table
                and kind[0] is schedule
                and kind[1] == schedule.choice
                and kind[2] is causal
            ):
                return kind
        kind = (
            *(schedule, schedule.choice, causal),
            *(block_table.data_ptr(), block_table.stride()),
        )
        self.kinds[key] = kind, block_table
        return kind

    def update_schedules(self) -> None:
        """Recomputes the schedules from the lengths that are now on the device."""
        seq_lens, share = self.seq_lens, self.share
        if share is not None:
            share.update(
                self.query_start_loc,
                seq_lens,
                self.max_query_len,
                self.num_actual_tokens,
            )
            seq_lens = share.seq_lens
            if share.is_empty:
                return
        for key, schedule in self.schedules.items():
            known = UNKNOWN
            if self.host_lengths is not None:
                known = schedule.look_at(*self.host_lengths)
            schedule.update(
                self.query_start_loc,
                seq_lens,
                max_query_len=self.max_query_len,
                num_tokens=self.num_actual_tokens,
                known=known,
                mm_prefix_range=self.mm_prefix_range,
                mm_prefix_in_window=key.mm_prefix_in_window,
                prefix_lens=self.prefix_lens if key.sees_prompt else None,
            )


class ConchAttentionMetadataBuilder(ConchBuilderBase):
    """Turns a batch into metadata: host integers and persistent device buffers.

    Lengths are read on the device alone, in one small kernel per schedule, so there
    is no synchronisation and any batch can replay a CUDA graph that it fits.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.schedules: dict[ScheduleKey, VarlenSchedule] = {}
        self.encoder_pages: BatchPages | None = None
        self.shares: conch_dcp.Shares | None = None
        self.prefix_lens: torch.Tensor | None = None
        self.may_overlap = True
        positions = 1
        layers = vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            for impl in conch_impls(layers[name]):
                impl.see_layer(layers[name], kv_cache_spec)
                positions = max(positions, impl.positions)
                self.may_overlap &= impl.may_overlap
                if impl.schedule_key not in self.schedules:
                    schedule = impl.make_schedule(kv_cache_spec.block_size, device)
                    self.schedules[impl.schedule_key] = schedule
                    if impl.is_encoder and self.encoder_pages is None:
                        self.encoder_pages = BatchPages(
                            schedule.max_num_seqs, schedule.max_num_tokens, device
                        )
                    if impl.num_shares > 1:
                        if self.shares is None:
                            self.shares = conch_dcp.Shares(impl.peers(), schedule)
                        self.shares.add(impl, device)
                    if impl.schedule_key.sees_prompt and self.prefix_lens is None:
                        self.prefix_lens = torch.zeros(
                            schedule.max_num_seqs, dtype=torch.int32, device=device
                        )
        self.decode_query_len = positions * max_decode_query_len(vllm_config)
        self.replayed_query_len = positions * max_replayed_query_len(vllm_config)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        model_config = vllm_config.model_config
        if model_config is not None and model_config.is_mm_prefix_lm:
            # A graph of mixed batches is captured without images and would replay
            # without their ranges; no query of a decode is in one.
            return AttentionCGSupport.UNIFORM_BATCH
        return cls._cudagraph_support

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ConchAttentionMetadata:
        common = common_attn_metadata
        seq_lens, block_table = common.seq_lens, common.block_table_tensor
        if self.encoder_pages is not None:
            seq_lens, block_table = self.encoder_pages.update(
                common.query_start_loc, common.max_query_len
            )
        else:
            longest = block_table.shape[1] * self.kv_cache_spec.block_size
            if self.shares is not None:
                longest *= self.shares.peers.size
            if common.max_seq_len > longest:
                # Only dummy batches claim more than block tables have entries for.
                seq_lens.clamp_(max=longest)
        max_query_len = self.launch_query_len(common)
        share = None
        if self.shares is not None:
            is_empty = self.has_no_context(common)
            share = self.shares.build(len(seq_lens), max_query_len, is_empty)
        metadata = ConchAttentionMetadata(
            # Drafts may count in NumPy.
            num_actual_tokens=int(common.num_actual_tokens),
            max_query_len=max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=seq_lens,
            block_table=block_table,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            mm_prefix_range=mm_prefix_ranges(common),
            prefix_lens=self.update_prefix_lens(common),
            schedules=self.schedules,
            share=share,
            host_lengths=self.host_lengths(common),
        )
        metadata.update_schedules()
        return metadata

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> ConchAttentionMetadata:
        # Nothing depends on the lengths at capture; the shortest are the fastest.
        # The schedules are computed from the lengths, so these come first.
        common_attn_metadata.seq_lens.fill_(1)
        return self.build(0, common_attn_metadata)

    def update_prefix_lens(
        self, common: CommonAttentionMetadata
    ) -> torch.Tensor | None:
        """The batch's prefix lengths in a buffer that CUDA graphs can keep.

        A batch without them, as for a graph's capture, sees all keys: by the same
        kernels, which can so replay any other.
        """
        if self.prefix_lens is None:
            return None
        prefix_lens = self.prefix_lens[: common.seq_lens.shape[0]]
        lengths = rswa_prefix_lens(common)
        if lengths is None:
            return prefix_lens.fill_(WHOLE_SEQUENCE)
        # Padding requests may have no length, and need none.
        prefix_lens[: lengths.shape[0]].copy_(lengths, non_blocking=True)
        return prefix_lens

    def launch_query_len(self, common: CommonAttentionMetadata) -> int:
        """The query length that a batch's kernels are chosen for.

        A CUDA graph keeps the kernels of its capture, so all batches that can replay
        it must ask for the same ones. A graph of mixed batches serves any batch with
        as many tokens. Other full graphs serve decodes, of up to decode_query_len
        tokens.
        """
        if self.graphs_hold_any_batch():
            return int(common.num_actual_tokens)
        return max(common.max_query_len, self.decode_query_len)

    def host_lengths(self, common: CommonAttentionMetadata) -> HostLengths | None:
        """Lengths from which the host decides what is launched.

        The kernel for decodes is left out where there are none. Where prefills are few,
        keys are split, or tiles smaller if sequences are short. Decodes run beside
        prefills. None where a CUDA graph could keep that for others, or ranks share the
        keys.
        """
        # Also where a KV-sharing layer attends the last tokens of prompts alone, the
        # lengths of which are still on their way to the host.
        is_replayed = common.max_query_len <= self.replayed_query_len
        if is_replayed or self.shares is not None or self.graphs_hold_any_batch():
            return None
        starts = common.query_start_loc_cpu.numpy()
        query_lens = starts[1:] - starts[:-1]
        bounds = host_seq_lens(common)
        if bounds is None:
            seq_lens = np.full_like(query_lens, common.max_seq_len)
            return HostLengths(query_lens, seq_lens, may_overlap=False)
        may_overlap = self.may_overlap and isinstance(common.causal, bool)
        seq_lens = bounds[: len(query_lens)].numpy()
        return HostLengths(query_lens, seq_lens, may_overlap)

    def graphs_hold_any_batch(self) -> bool:
        """Whether CUDA graphs of mixed batches have the attention in them."""
        mode = self.vllm_config.compilation_config.cudagraph_mode
        return mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL

    def has_no_context(self, common: CommonAttentionMetadata) -> bool:
        """Whether the host knows of a batch that it is the beginning of sequences.

        All ranks find the same. Never where a CUDA graph could keep it for others.
        """
        seq_lens = host_seq_lens(common)
        is_replayed = common.max_query_len <= self.replayed_query_len
        if seq_lens is None or is_replayed or self.graphs_hold_any_batch():
            return False
        query_lens = common.query_start_loc_cpu.diff()
        return bool((seq_lens[: len(query_lens)] <= query_lens).all())


class DummyBatch(NamedTuple):
    """A sequence that is attended to before vLLM serves.

    Attributes:
        query_len: its length.
        alone: whether the host knows that there are no other prefills.
        short: whether it knows, besides, that there is no context.
        causal: whether attention is causal, or a tensor that says it.
        slices: whether query, key and value each are a slice of a projection, as many
            models pass them, or a tensor of their own: kernels are compiled for the
            alignment of strides, and some for K and V of the same.
        quantized: whether the output is quantised to fp8.
        has_images: whether there are ranges that are seen both ways.

    """

    query_len: int
    alone: bool
    short: bool
    causal: bool | torch.Tensor
    slices: tuple[bool, bool, bool]
    quantized: bool
    has_images: bool


class ConchAttentionImpl(ConchImplBase):
    """One layer's attention.

    Raises:
        ValueError: with every reason, if CONCH cannot run the layer.

    """

    can_return_lse_for_decode: bool = True
    # New tokens are attended to apart from the shares of the context.
    supports_mtp_with_cp_non_trivial_interleave_size: bool = True
    num_shares: int = 1  # ranks that share the keys of the layer
    positions: int = 1  # for each token that vLLM schedules

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        use_alibi_sqrt: bool = False,
        chunk_lookback: int = -1,
        attention_chunk_size: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.softcap = logits_soft_cap or 0.0
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.is_encoder = attn_type in ENCODER_TYPES
        self.fp8_dtype = None if self.is_encoder else fp8_cache_dtype(kv_cache_dtype)
        # Of a cache with a scale for each token and head.
        self.token_head_dtype = (
            None if self.is_encoder else token_head_dtype(kv_cache_dtype)
        )
        self.dtype = torch.get_default_dtype()  # the model's, while it is built
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self.alibi_sqrt = use_alibi_sqrt and alibi_slopes is not None
        self.alibi_slopes: torch.Tensor | None = None
        self.vllm_config = get_current_vllm_config()
        reference_window = None
        if attn_type == AttentionType.DECODER:
            reference_window = rswa_window(self.vllm_config)
        sees_prompt = reference_window is not None
        windows = (sliding_window, attention_chunk_size, reference_window)
        if sliding_window is None:
            chunk_lookback = -1  # chunks are parts of a window
        if attention_chunk_size is not None:
            chunk_lookback = 0
        self.sliding_window = next((w for w in windows if w is not None), None)
        self.schedule_key = ScheduleKey(
            num_heads, self.sliding_window, False, chunk_lookback, sees_prompt
        )
        if alibi_slopes is not None:
            self.alibi_slopes = torch.tensor(
                alibi_slopes,
                dtype=torch.float32,
                device=self.vllm_config.device_config.device,
            )
        if not self.is_encoder:
            self.num_shares = self.dcp_world_size
        self.supports_quant_query_input = self.prefers_fp8_queries()
        self.is_never_causal = attn_type != AttentionType.DECODER
        # K and V views of the bound cache, which would cost every call anew. The
        # engine gives up the cache that it profiles with, and so do these.
        self.kv_cache: Callable[[], torch.Tensor | None] = lambda: None
        self.key_value: Caches | None = None
        # Checked calls on these views, to be repeated.
        self.attentions: dict[tuple, PreparedAttention] = {}
        self.writes: dict[tuple, PreparedWrite] = {}

        reasons = unsupported(
            head_size,
            self.dtype,
            kv_cache_dtype,
            attn_type,
            current_platform.get_device_capability(),
        )
        if splits_batches(self.vllm_config) and (
            self.sees_images or sees_prompt or attends_both_ways(self.vllm_config)
        ):
            # The engine does not split these among the parts of a batch.
            reasons.append(
                "microbatches (--enable-dbo) not supported with images seen both ways, "
                "R-SWA or non-causal attention"
            )
        if self.num_shares > 1:
            reasons += conch_dcp.unsupported(self)
        if self.pcp_world_size > 1:
            reasons.append("prefill context parallelism (PCP) not supported")
        if windows.count(None) < len(windows) - 1:
            reasons.append(
                f"only one of sliding_window {sliding_window}, attention_chunk_size "
                f"{attention_chunk_size} and R-SWA window {reference_window} supported"
            )
        if attends_both_ways(self.vllm_config):
            if sees_prompt:
                reasons.append(NON_CAUSAL_RSWA)
            if chunk_lookback >= 0:
                reasons.append("non-causal attention with chunks not supported")
        reasons += [
            f"{name} not supported"
            for name, value in arguments.items()
            if value is not None
        ]
        if reasons:
            raise ValueError(
                "CONCH cannot run this model's attention: "
                + "; ".join(reasons)
                + ". Choose another backend with --attention-backend."
            )

    @property
    def sees_images(self) -> bool:
        """Whether tokens of the model's images see each other both ways."""
        model_config = self.vllm_config.model_config
        return model_config is not None and model_config.is_mm_prefix_lm

    def prefers_fp8_queries(self) -> bool:
        """Whether vLLM's layer should quantise queries, with its q_scale.

        Where the prefill kernel for Q, K and V in fp8 runs, which takes neither
        ALiBi nor chunks nor a prefix, and is left out where results must not depend on
        the batch. Elsewhere a query of 16 bits is no slower, and more accurate.
        """
        if not current_platform.is_cuda() or self.dtype not in HOPPER_DTYPES:
            return False
        if is_batch_invariant():
            return False
        if self.alibi_slopes is not None:
            return False
        if self.schedule_key.chunk_lookback >= 0 or self.schedule_key.sees_prompt:
            return False
        if self.num_shares > 1:  # queries are gathered, and ranks may scale unlike
            return False
        fp8 = self.fp8_dtype
        shape = Shape(
            self.num_heads, self.num_kv_heads, self.head_size, PAGE_MULTIPLE, fp8, fp8
        )
        device = this_device(torch.accelerator.current_device_index())
        return fp8 is not None and hopper_kernel(shape, device) == "fp8"

    @property
    def may_overlap(self) -> bool:
        """Whether the layer has nothing that keeps it from Hopper's own kernels, the
        one for prefills and that for decodes which could run beside it."""
        pass_config = self.vllm_config.compilation_config.pass_config
        return (
            self.alibi_slopes is None
            and not self.softcap
            and self.schedule_key.chunk_lookback < 0
            and not self.schedule_key.sees_prompt
            and not self.sees_images
            and not pass_config.fuse_attn_quant
        )

    @property
    def decode_query_len(self) -> int:
        """Positions of the longest query of a decode."""
        return self.positions * max_decode_query_len(self.vllm_config)

    @property
    def query_dtype(self) -> torch.dtype:
        """What the layer passes as query."""
        is_fp8 = self.supports_quant_query_input
        return self.fp8_dtype if is_fp8 and self.fp8_dtype else self.dtype

    def see_layer(self, layer: AttentionLayer, spec: AttentionSpec) -> None:
        """Takes over what models set on a layer after they have made it."""
        # A decoder of a prefix LM has all of its prompts see each other.
        self.is_never_causal |= getattr(spec, "non_causal", False)
        if self.alibi_slopes is not None and isinstance(layer, torch.nn.Module):
            # Of what is no weight, sleep mode keeps buffers alone.
            layer.register_buffer("conch_slopes", self.alibi_slopes, persistent=False)
        self.positions = getattr(layer, "block_pool_size", 1)
        in_window = getattr(layer, "mm_prefix_clamp_sliding_window", False)
        self.schedule_key = self.schedule_key._replace(mm_prefix_in_window=in_window)

    def fused_output_quant_supported(self, quant_key: QuantKey) -> bool:
        # Shares are joined in the model's dtype.
        return quant_key == kFp8StaticTensorSym and self.num_shares == 1

    def peers(self) -> conch_dcp.Peers:
        """The ranks that share the keys."""
        return conch_dcp.Peers.from_config(
            self.num_shares, self.dcp_rank, self.vllm_config
        )

    def reserve(self, query: torch.Tensor) -> None:
        """Takes the memory of a step while vLLM measures how much there is."""
        if self.num_shares > 1:
            conch_dcp.reserve(query, self.num_shares)

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the elements of the cache are to be read as."""
        return self.token_head_dtype or self.fp8_dtype or self.dtype

    def key_value_caches(self, kv_cache: torch.Tensor) -> Caches:
        """Views of the layer's cache, in the dtype that its bytes stand for."""
        if kv_cache is not self.kv_cache() or self.key_value is None:
            self.forget_views()
            # Views of .data: views of the tensor itself would keep it alive.
            width = row_width(self.head_size, self.token_head_dtype)
            key_cache, value_cache = key_value_views(kv_cache.data, width)
            if self.fp8_dtype is not None or self.token_head_dtype is not None:
                key_cache = key_cache.view(self.stored_dtype)
                value_cache = value_cache.view(self.stored_dtype)
            k_scale = v_scale = None
            if self.token_head_dtype is not None:
                k_scale, v_scale = token_scale_views(kv_cache.data, width)
            self.key_value = Caches(key_cache, value_cache, k_scale, v_scale)
            self.kv_cache = weakref.ref(kv_cache, self.forget_views)
        return self.key_value

    def scales_of(
        self, layer: AttentionLayer, caches: Caches | None
    ) -> dict[str, torch.Tensor | None]:
        """k_scale and v_scale of a layer with these caches."""
        if self.fp8_dtype is not None:
            return {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
        if caches is None:
            return {"k_scale": None, "v_scale": None}
        return {"k_scale": caches.k_scale, "v_scale": caches.v_scale}

    def forget_views(self, _: Any = None) -> None:
        self.key_value = None
        self.attentions.clear()
        self.writes.clear()

    def write_kv_cache(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if kv_cache is not self.kv_cache():
            if self.is_encoder or kv_cache.numel() == 0:  # none: profiling
                return
            self.key_value_caches(kv_cache)
        # One token's stride counts for nothing.
        num_tokens = slot_mapping.numel()  # half the time of shape[0]
        layout = (key.dtype, key.stride(), value.stride(), num_tokens == 1)
        prepared = self.writes.get(layout)
        if prepared is not None:
            prepared(key, value, slot_mapping, num_tokens)
            return
        caches = self.key_value_caches(kv_cache)
        prepared = reshape_and_cache(
            key,
            value,
            caches.key,
            caches.value,
            slot_mapping,
            **self.scales_of(layer, caches),
        )
        if prepared is not None:
            keep_prepared(self.writes, layout, prepared)

    def attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        metadata: ConchAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        if metadata.share is not None:
            conch_dcp.attend(self, layer, query, key, value, kv_cache, metadata, output)
            return
        # Neither K and V nor a flag or a scale are tensors of this batch alone.
        is_repeatable = (
            not self.is_encoder
            and metadata.mm_prefix_range is None
            and output_scale is None
            and isinstance(metadata.causal, bool)
        )
        caches = None
        if self.is_encoder:
            key_cache, value_cache = pages_of_batch(key), pages_of_batch(value)
        else:
            caches = self.key_value_caches(kv_cache)
            key_cache, value_cache = caches.key, caches.value
        if is_repeatable:
            kind = (
                metadata.step_kind(self.schedule_key),
                *(query.dtype, query.stride(), output.dtype, output.stride()),
            )
            prepared = self.attentions.get(kind)
            if prepared is not None:
                prepared(query, output)
                return
        prepared = varlen_attention(
            query,
            key_cache,
            value_cache,
            output,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            max_query_len=metadata.max_query_len,
            scale=self.scale,
            causal=metadata.causal,
            softcap=self.softcap,
            sliding_window=self.sliding_window,
            q_scale=layer._q_scale if query.dtype == self.fp8_dtype else None,
            **self.scales_of(layer, caches),
            schedule=metadata.schedules[self.schedule_key],
            sinks=self.sinks,
            alibi_slopes=self.alibi_slopes,
            alibi_sqrt=self.alibi_sqrt,
            mm_prefix_range=metadata.mm_prefix_range,
            mm_prefix_in_window=self.schedule_key.mm_prefix_in_window,
            prefix_lens=metadata.prefix_lens if self.schedule_key.sees_prompt else None,
            chunk_lookback=self.schedule_key.chunk_lookback,
            output_scale=output_scale,
        )
        if is_repeatable and prepared is not None:
            keep_prepared(self.attentions, kind, prepared)

    def make_schedule(
        self, block_size: int, device: torch.device, of_batch: bool = False
    ) -> VarlenSchedule:
        """A schedule for this layer and all that share its schedule_key.

        Args:
            block_size: tokens of a page of the cache.
            device: where it runs.
            of_batch: for keys of the batch, and not of a cache that ranks share.

        """
        of_batch |= self.is_encoder
        scheduler_config = self.vllm_config.scheduler_config
        max_num_seqs = scheduler_config.max_num_seqs
        return VarlenSchedule(
            max_num_seqs=max_num_seqs,
            max_num_tokens=max(
                self.positions * scheduler_config.max_num_batched_tokens,
                max_num_seqs * self.decode_query_len,
            ),
            num_query_heads=self.num_heads * (1 if of_batch else self.num_shares),
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            block_size=PAGE_MULTIPLE if of_batch else block_size,
            query_dtype=self.query_dtype,
            kv_dtype=self.stored_dtype,
            token_scales=self.token_head_dtype is not None,
            device=device,
            sliding_window=self.sliding_window,
            chunk_lookback=self.schedule_key.chunk_lookback,
            decode_query_len=self.decode_query_len,
            # TMA would read all slots of pages that end behind the batch.
            portable=of_batch,
            batch_invariant=is_batch_invariant(),
        )

    def warm_up(self, layer: AttentionLayer) -> None:
        if self.device(layer).type != "cpu":  # the interpreter compiles nothing
            self.run_dummy_batches(layer)

    def device(self, layer: AttentionLayer) -> torch.device:
        """Where the layer runs."""
        if self.is_encoder:  # nothing is bound to it
            return torch.empty(0, device=self.vllm_config.device_config.device).device
        return bound_kv_cache(layer).device

    def run_dummy_batches(self, layer: AttentionLayer) -> None:
        """Runs batches that between them need every kernel of this layer.

        They read the page that vLLM keeps free of data and write to no slot.
        """
        block_size = PAGE_MULTIPLE
        if not self.is_encoder:
            kv_cache = bound_kv_cache(layer)
            block_size = self.key_value_caches(kv_cache).key.shape[1]
        schedule = self.make_schedule(block_size, self.device(layer))
        shares = None
        if self.num_shares > 1:
            peers = conch_dcp.Echo(**vars(self.peers()))
            shares = conch_dcp.Shares(peers, schedule)
            shares.add(self, schedule.device)
        quantizes = self.vllm_config.compilation_config.pass_config.fuse_attn_quant
        quantizes &= self.num_shares == 1
        lengths = [(x, True, False) for x in self.warm_up_query_lens(schedule.device)]
        shortest_prefill = max(MAX_DECODE_QUERY_LEN, schedule.longest_decode) + 1
        lengths.append((shortest_prefill, True, True))
        # Not alone: also what decodes beside prefills need.
        unsplit = {schedule.least_unsplit_len() or shortest_prefill}
        if shares is not None:
            own_heads = shares.new_tokens.schedules[self.schedule_key]
            unsplit.add(own_heads.least_unsplit_len() or shortest_prefill)
        lengths += [(length, False, False) for length in sorted(unsplit)]
        # Query and key are rotated alike.
        slices = [(qk, qk, v) for qk, v in product((False, True), repeat=2)]
        for length, *options in product(
            lengths,
            self.causal_modes(schedule.device),
            slices,
            (False, True) if quantizes else (False,),
            (False, True) if self.sees_images else (False,),
        ):
            batch = DummyBatch(*length, *options)
            if batch.query_len <= schedule.max_num_tokens:
                self.run_dummy_batch(layer, schedule, shares, batch)
        self.attentions.clear()  # they would keep the schedule, which has megabytes

    def causal_modes(self, device: torch.device) -> tuple[bool | torch.Tensor, ...]:
        """What a batch of one sequence may have as `causal`."""
        if self.is_never_causal:
            return (False,)
        if not attends_both_ways(self.vllm_config):
            return (True,)
        return True, False, torch.ones(1, dtype=torch.bool, device=device)

    def warm_up_query_lens(self, device: torch.device) -> list[int]:
        """Lengths of a query, one for every choice that kernels make by it."""
        shortest = self.decode_query_len
        many_to_write = min_large_tokens(
            self.num_kv_heads * self.head_size, this_device(device.index).num_units
        )
        lengths = (*WARM_UP_QUERY_LENS, SHORT_QUERY_LEN, many_to_write)
        return sorted({max(length, shortest) for length in lengths})

    def run_dummy_batch(
        self,
        layer: AttentionLayer,
        schedule: VarlenSchedule,
        shares: conch_dcp.Shares | None,
        batch: DummyBatch,
    ) -> None:
        """Writes and attends one sequence.

        Args:
            layer: the layer of this implementation.
            schedule: made for the layer.
            shares: likewise, if ranks share its keys.
            batch: the sequence and what is asked for.

        """
        query_len = batch.query_len
        device = schedule.device
        # Fewer tokens that are read as pages are copied, see `pages_of_batch`.
        reads_batch = self.is_encoder or shares is not None
        num_tokens = max(query_len, 2 * PAGE_MULTIPLE if reads_batch else 0)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        projection = torch.zeros(
            num_tokens, sum(heads), self.head_size, dtype=self.dtype, device=device
        )
        query, key, value = (
            rows if is_slice else rows.contiguous()
            for rows, is_slice in zip(projection.split(heads, dim=1), batch.slices)
        )

        def integers(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        max_blocks = -(-query_len // schedule.shape.block_size)
        metadata = ConchAttentionMetadata(
            num_actual_tokens=query_len,
            max_query_len=query_len,
            query_start_loc=integers(0, query_len),
            seq_lens=integers(query_len),
            block_table=integers(0).expand(1, max_blocks).contiguous(),
            slot_mapping=torch.full((query_len,), -1, device=device),
            causal=batch.causal,
            mm_prefix_range=integers(0, 0).view(1, 1, 2) if batch.has_images else None,
            prefix_lens=integers(1) if self.schedule_key.sees_prompt else None,
            schedules={self.schedule_key: schedule},
        )
        if shares is None and batch.alone:
            query_lens = np.array([query_len])
            seq_lens = query_lens if batch.short else None
            metadata.host_lengths = HostLengths(query_lens, seq_lens, False)
        if shares is not None:
            metadata.share = shares.build(1, query_len, is_empty=False)
        metadata.update_schedules()
        kv_cache = bound_kv_cache(layer)
        self.write_kv_cache(layer, key, value, kv_cache, metadata.slot_mapping)
        output_scale = torch.ones(1, device=device) if batch.quantized else None
        dtype = current_platform.fp8_dtype() if batch.quantized else self.dtype
        output = torch.empty_like(query, dtype=dtype)
        query = query.to(self.query_dtype)
        self.attend(layer, query, key, value, kv_cache, metadata, output, output_scale)
