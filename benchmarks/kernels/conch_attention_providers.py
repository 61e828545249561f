# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What CONCH's attention benchmark compares: CONCH and its rivals, on the same tensors.

Scheduling work that a model does once a step, not once a layer, is done in make() and
not timed: CONCH's schedule and FlashAttention-3's scheduler metadata. With an fp8
cache FlashAttention-3 and vLLM's Triton attention get fp8 queries, as their backends
give them, and so does CONCH where its backend does: where Hopper's prefill kernel for
them runs. "conch_q16" is CONCH with queries of 16 bits there. Quantising is not timed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import conch_bench as bench
import numpy as np
import torch
from conch_attention_cases import TOKEN_HEAD_OPTIONS, Case

from tests.kernels.attention.conch_kv_formats import make_pages
from tests.kernels.attention.conch_reference import LAYOUTS, gather_pages
from vllm.attention.ops.conch import (
    VarlenSchedule,
    reshape_and_cache,
    varlen_attention,
)
from vllm.attention.ops.conch.plan import Shape, hopper_kernel, this_device

FP8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
TOKEN_HEAD_DTYPES = dict(
    zip(TOKEN_HEAD_OPTIONS, (torch.int8, torch.float8_e4m3fn, torch.uint8))
)
# Powers of two: dividing by them is exact.
K_SCALE, V_SCALE = 0.5, 0.25
LAYOUT_NAMES = {
    "nhd": "NHD",
    "hnd": "HND",
    "interleaved": "interleaved",
    "packed": "packed_NHD",  # as vLLM 0.33 keeps its cache
    "packed_hnd": "packed_HND",
}


@dataclass
class Inputs:
    """A case's tensors, shared by all providers."""

    case: Case
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    output: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None

    @property
    def scale(self) -> float:
        """Gives logits of standard deviation 1."""
        return self.case.head_size**-0.5

    @property
    def max_seq_len(self) -> int:
        return max(seq_len for _, seq_len in self.case.lengths)

    @cached_property
    def quantized_query(self) -> torch.Tensor:
        """The query as backends give it that quantise it for an fp8 cache."""
        if self.k_scale is None or self.has_token_scales:
            return self.query
        return self.query.to(self.key_cache.dtype)

    @property
    def has_token_scales(self) -> bool:
        return self.case.kv_dtype in TOKEN_HEAD_OPTIONS

    def descale(self, value: float) -> torch.Tensor | None:
        """A scale for each sequence and KV head, as the rivals take it."""
        if self.k_scale is None:
            return None
        scale = torch.full((1,), value, device=self.query.device)
        return scale.expand(len(self.case.lengths), self.case.num_kv_heads)


def make_inputs(
    case: Case, dtype: torch.dtype, device: str, max_blocks: int | None = None
) -> Inputs:
    """Random queries, and K and V in pages of random order.

    With max_blocks sequences share pages, to save memory where only compiling matters.
    """
    torch.manual_seed(0)
    kv_dtype = FP8_DTYPES.get(case.kv_dtype, dtype)
    block_table, num_blocks = make_block_table(case)
    if max_blocks is not None:
        num_blocks = min(num_blocks, max_blocks)
        block_table %= num_blocks

    def new(*shape: int) -> torch.Tensor:
        # fp8 has no random numbers of its own.
        made = dtype if kv_dtype.itemsize == 1 else kv_dtype
        return torch.randn(shape, dtype=made, device=device).to(kv_dtype)

    scales: list[torch.Tensor | None] = [None, None]
    pages = (num_blocks, case.page, case.num_kv_heads, case.head_size)
    if case.kv_dtype in TOKEN_HEAD_OPTIONS:
        key_cache, value_cache, *scales = make_token_head_caches(case, pages, new)
    else:
        key_cache, value_cache = LAYOUTS[LAYOUT_NAMES[case.layout]](*pages, new)
    shape = (case.num_tokens, case.num_query_heads, case.head_size)
    query = torch.randn(shape, dtype=dtype, device=device)
    if case.kv_dtype in FP8_DTYPES:
        query /= K_SCALE  # logits stay as large as without a scale
        scales = [torch.full((1,), x, device=device) for x in (K_SCALE, V_SCALE)]
    starts = [0]
    for query_len, _ in case.lengths:
        starts.append(starts[-1] + query_len)
    integers = {"dtype": torch.int32, "device": device}
    return Inputs(
        case,
        query,
        key_cache,
        value_cache,
        torch.empty_like(query),
        query_start_loc=torch.tensor(starts, **integers),
        seq_lens=torch.tensor([s for _, s in case.lengths], **integers),
        block_table=block_table.to(device),
        k_scale=scales[0],
        v_scale=scales[1],
    )


def make_token_head_caches(
    case: Case,
    pages: tuple[int, ...],
    new: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """K, V and their scales, of random rows, in the pages that vLLM has for them."""
    num_blocks, page, *heads = pages
    name = LAYOUT_NAMES[case.layout].removeprefix("packed_")
    if name not in ("NHD", "HND"):
        raise ValueError(f"{case.kv_dtype} goes with layouts packed and packed_hnd")
    device = new(1).device
    caches = make_pages(name, *pages, TOKEN_HEAD_DTYPES[case.kv_dtype], device)
    chunk = max(1, 2**24 // (page * math.prod(heads)))
    for first in range(0, num_blocks, chunk):
        last = min(first + chunk, num_blocks)
        slots = torch.arange(first * page, last * page, device=device)
        rows = (new(len(slots), *heads) for _ in "kv")
        scales = {"k_scale": caches.k_scale, "v_scale": caches.v_scale}
        reshape_and_cache(*rows, caches.key, caches.value, slots, **scales)
    return tuple(caches)


def make_block_table(case: Case) -> tuple[torch.Tensor, int]:
    """Random pages for each sequence, those of the prefix shared; and the pool's size.

    Block 0 is nobody's, as in vLLM.
    """
    shared = case.prefix // case.page
    counts = [-(-seq_len // case.page) for _, seq_len in case.lengths]
    num_blocks = 1 + shared + sum(count - shared for count in counts)
    pages = 1 + torch.randperm(num_blocks - 1, dtype=torch.int32)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    table[:, :shared] = pages[:shared]
    used = shared
    for row, count in zip(table, counts):
        row[shared:count] = pages[used : used + count - shared]
        used += count - shared
    return table, num_blocks


class Unavailable(Exception):
    """A provider cannot run here, or not this case."""


class Provider(ABC):
    """Something that computes a case."""

    name: str
    checked = True
    compiles = False  # Triton kernels, before the first call

    @abstractmethod
    def make(self, inputs: Inputs) -> Callable[[], object]:
        """What to time, prepared as far as a model prepares it once a step.

        Raises:
            Unavailable: with the reason.

        """

    def query(self, inputs: Inputs) -> torch.Tensor:
        """The query that it is given."""
        return inputs.query

    def output(self, inputs: Inputs) -> torch.Tensor:
        """Where its result is after a call."""
        return inputs.output


class Conch(Provider):
    name = "conch"
    compiles = True
    portable = False

    def query(self, inputs: Inputs) -> torch.Tensor:
        case, query = inputs.case, inputs.quantized_query
        heads = (case.num_query_heads, case.num_kv_heads, case.head_size)
        shape = Shape(*heads, case.page, query.dtype, inputs.key_cache.dtype)
        device = this_device(query.device.index)
        on_hopper = not self.portable and hopper_kernel(shape, device) == "fp8"
        return query if on_hopper else inputs.query

    def make_schedule(self, inputs: Inputs) -> VarlenSchedule:
        case = inputs.case
        schedule = VarlenSchedule(
            max_num_seqs=len(case.lengths),
            max_num_tokens=case.num_tokens,
            num_query_heads=case.num_query_heads,
            num_kv_heads=case.num_kv_heads,
            head_size=case.head_size,
            block_size=case.page,
            query_dtype=self.query(inputs).dtype,
            kv_dtype=inputs.key_cache.dtype,
            device=inputs.query.device,
            sliding_window=case.window,
            token_scales=inputs.has_token_scales,
            portable=self.portable,
        )
        query_lens, seq_lens = np.array(case.lengths).T
        # With a softcap decodes have another kernel, as in the backend.
        known = schedule.look_at(query_lens, seq_lens, may_overlap=not case.softcap)
        schedule.update(
            inputs.query_start_loc,
            inputs.seq_lens,
            max_query_len=case.max_query_len,
            num_tokens=case.num_tokens,
            known=known,
        )
        return schedule

    def make(self, inputs: Inputs) -> Callable[[], object]:
        case, schedule = inputs.case, self.make_schedule(inputs)
        query = self.query(inputs)
        attend = partial(
            varlen_attention,
            query,
            inputs.key_cache,
            inputs.value_cache,
            inputs.output,
            inputs.query_start_loc,
            inputs.seq_lens,
            inputs.block_table,
            max_query_len=case.max_query_len,
            scale=inputs.scale,
            softcap=case.softcap,
            sliding_window=case.window,
            k_scale=inputs.k_scale,
            v_scale=inputs.v_scale,
            schedule=schedule,
        )
        again = attend()
        if again is None:  # int4: each call rotates queries and outputs
            return attend
        # As the backend calls it: checked once.
        return lambda: again(query, inputs.output)


class ConchPortable(Conch):
    """CONCH with only the kernels that every device runs."""

    name = "conch_portable"

    portable = True


class Conch16(Conch):
    """CONCH with queries of 16 bits where the backend quantises them."""

    name = "conch_q16"

    def query(self, inputs: Inputs) -> torch.Tensor:
        return inputs.query

    def make(self, inputs: Inputs) -> Callable[[], object]:
        if super().query(inputs) is inputs.query:
            raise Unavailable("the query is not quantised")
        return super().make(inputs)


class FlashAttention3(Provider):
    """FlashAttention-3 as in vLLM's FLASH_ATTN backend."""

    name = "fa3"

    def query(self, inputs: Inputs) -> torch.Tensor:
        return inputs.quantized_query

    def make(self, inputs: Inputs) -> Callable[[], object]:
        try:
            from vllm.vllm_flash_attn import (
                fa_version_unsupported_reason,
                flash_attn_varlen_func,
                get_scheduler_metadata,
            )
        except ImportError as error:
            raise Unavailable(f"this vLLM has no FlashAttention: {error}") from error
        if reason := fa_version_unsupported_reason(3):
            raise Unavailable(reason)
        case, query = inputs.case, self.query(inputs)
        if case.kv_dtype == "fp8_e5m2" or inputs.has_token_scales:
            raise Unavailable(f"no {case.kv_dtype}")
        if case.head_size > 256:
            raise Unavailable("no head size above 256")
        window = (-1, -1) if case.window is None else (case.window - 1, 0)
        metadata = get_scheduler_metadata(
            batch_size=len(case.lengths),
            max_seqlen_q=case.max_query_len,
            max_seqlen_k=inputs.max_seq_len,
            num_heads_q=case.num_query_heads,
            num_heads_kv=case.num_kv_heads,
            headdim=case.head_size,
            cache_seqlens=inputs.seq_lens,
            qkv_dtype=query.dtype,
            cu_seqlens_q=inputs.query_start_loc,
            page_size=case.page,
            causal=True,
            window_size=window,
            has_softcap=case.softcap > 0,
        )
        descales = [inputs.descale(x) for x in (1.0, K_SCALE, V_SCALE)]
        return lambda: flash_attn_varlen_func(
            q=query,
            k=inputs.key_cache,
            v=inputs.value_cache,
            out=inputs.output,
            max_seqlen_q=case.max_query_len,
            cu_seqlens_q=inputs.query_start_loc,
            max_seqlen_k=inputs.max_seq_len,
            seqused_k=inputs.seq_lens,
            block_table=inputs.block_table,
            softmax_scale=inputs.scale,
            causal=True,
            window_size=list(window),
            softcap=case.softcap,
            scheduler_metadata=metadata,
            q_descale=descales[0],
            k_descale=descales[1],
            v_descale=descales[2],
            fa_version=3,
        )


class VllmTriton(Provider):
    """The kernel of vLLM's TRITON_ATTN backend, with the backend's choices."""

    name = "triton"
    compiles = True
    RELEASE = "0.33."
    MAX_FLOP = 2e13  # a quarter of a second on an H200
    SEGMENTS = 16
    MIN_GRID = 128
    MAX_SPLIT_QUERY_LEN = 8
    CAPTURE_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]

    def query(self, inputs: Inputs) -> torch.Tensor:
        return inputs.quantized_query

    def make(self, inputs: Inputs) -> Callable[[], object]:
        found = bench.package_version("vllm")
        if not found.startswith(self.RELEASE):
            raise Unavailable(f"its signature is that of vLLM 0.33; this is {found}")
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        from vllm.v1.kv_cache_interface import KVQuantMode

        case, device = inputs.case, inputs.query.device
        if case.flop > self.MAX_FLOP:
            raise Unavailable("takes too long")
        threshold = self.MIN_GRID // case.num_kv_heads
        threshold = min(self.CAPTURE_SIZES, key=lambda size: abs(size - threshold))
        rows = threshold * min(case.max_query_len, self.MAX_SPLIT_QUERY_LEN)
        scratch = (rows, case.num_query_heads, self.SEGMENTS)
        padded = 2 ** math.ceil(math.log2(case.head_size))
        segment_output = torch.empty(*scratch, padded, device=device)
        segment_max, segment_sum = (torch.empty(scratch, device=device) for _ in "ms")
        ones = torch.ones(1, device=device)
        one = ones.expand(len(case.lengths), case.num_kv_heads)
        quantized = case.kv_dtype in FP8_DTYPES
        mode = KVQuantMode.FP8_PER_TENSOR if quantized else KVQuantMode.NONE
        token_scales = {}
        if inputs.has_token_scales:
            mode = KVQuantMode[case.kv_dtype.upper()]
            token_scales["k_scale_cache"] = inputs.k_scale
            token_scales["v_scale_cache"] = inputs.v_scale
        query = self.query(inputs)
        return lambda: unified_attention(
            q=query,
            k=inputs.key_cache,
            v=inputs.value_cache,
            out=inputs.output,
            cu_seqlens_q=inputs.query_start_loc,
            max_seqlen_q=case.max_query_len,
            seqused_k=inputs.seq_lens,
            max_seqlen_k=inputs.max_seq_len,
            softmax_scale=inputs.scale,
            causal=True,
            window_size=(-1, -1) if case.window is None else (case.window - 1, 0),
            block_table=inputs.block_table,
            softcap=case.softcap,
            q_descale=ones if quantized else None,
            k_descale=inputs.descale(K_SCALE) if quantized else one,
            v_descale=inputs.descale(V_SCALE) if quantized else one,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=self.SEGMENTS,
            softmax_segm_output=segment_output,
            softmax_segm_max=segment_max,
            softmax_segm_expsum=segment_sum,
            kv_quant_mode=mode,
            **token_scales,
        )


class Cudnn(Provider):
    """cuDNN through torch, on contiguous K and V with all heads: no pages to follow."""

    name = "cudnn"
    result: torch.Tensor

    def make(self, inputs: Inputs) -> Callable[[], object]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        case = inputs.case
        if inputs.query.device.type != "cuda":
            raise Unavailable("needs a GPU")
        query_len, seq_len = case.lengths[0]
        uniform = len(set(case.lengths)) == 1 and query_len == seq_len
        if not uniform or case.window or case.softcap or inputs.k_scale is not None:
            raise Unavailable("only whole prompts of one length, without options")
        if case.head_size > 256:
            raise Unavailable("no head size above 256")
        group = case.num_query_heads // case.num_kv_heads
        key, value = (
            torch.stack(
                [gather_pages(cache, row, 0, seq_len) for row in inputs.block_table]
            )
            .transpose(1, 2)
            .repeat_interleave(group, 1)
            .contiguous()
            for cache in (inputs.key_cache, inputs.value_cache)
        )
        query = inputs.query.unflatten(0, (-1, query_len)).transpose(1, 2).contiguous()

        def run() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                self.result = torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=inputs.scale
                )

        return run

    def output(self, inputs: Inputs) -> torch.Tensor:
        return self.result.transpose(1, 2).flatten(0, 1)


class Read(Provider):
    """Only reads as many bytes as the case has of K and V."""

    name = "read"
    checked = False
    source: torch.Tensor | None = None

    def make(self, inputs: Inputs) -> Callable[[], object]:
        if inputs.query.device.type != "cuda":
            raise Unavailable("without a GPU there is nothing to time")
        num_bytes = inputs.case.kv_bytes(inputs.key_cache.element_size())
        if self.source is None or self.source.nbytes < num_bytes + 2**16:
            self.source = bench.read_source(num_bytes)
        # The best for a small and for a large read on an H200.
        config = bench.READ_CONFIGS[1 if num_bytes > 2**26 else 0]
        return bench.read_call(self.source, num_bytes, config)


PROVIDERS = {
    provider.name: provider
    for provider in (
        *(Conch, ConchPortable, Conch16),
        *(FlashAttention3, VllmTriton, Cudnn, Read),
    )
}
