# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CONCH's attention beside FlashAttention-3, vLLM's Triton attention and cuDNN.

    python benchmarks/kernels/benchmark_conch_attention.py --suite decode
    python benchmarks/kernels/benchmark_conch_attention.py --cases 2q2k_32q1s1k,q8k
    python benchmarks/kernels/benchmark_conch_attention.py --suite prefill \
        --pages 16,128 --csv prefill.csv

A case is a batch and what its layer looks like:

    [COUNT]qQUERY[sSEQUENCE] joined by _    32q1s4k: 32 sequences, one new token each,
                                            4096 tokens with it; q8k: 8192 new tokens
                                            and no context; k is 1024
    @HEADS/KVHEADSxSIZE                     32/8x128 query heads, KV heads, head size
    @fp8 @fp8_e5m2                          the KV cache's dtype; else the query's
    @window4k @softcap30                    sliding window, soft cap of the logits
    @prefix32k                              so many first tokens in shared pages

Each case is checked against an fp64 reference, on some rows of some sequences and
heads, with what the timed graph wrote; a wrong result is reported and has no time.
The next columns are the rate over attended pairs, the rate of reading K and V, the
floor's share of the time and how often the rivals' time holds ours. The floor is the
larger of the case's FLOP at the rate of a matrix product and its K and V at what a
kernel takes that only reads as many bytes, both measured in the same run. The
provider "read" is such a kernel, timed among the others.

Scheduling work that a model does once a step, not once a layer, is not timed: CONCH's
schedule and FA3's scheduler metadata are made before. With an fp8 cache FA3 and
vLLM's Triton attention get fp8 queries, as their backends do; CONCH gets 16 bits.

Without a GPU, TRITON_INTERPRET=1 and CUDA_VISIBLE_DEVICES="" check small cases.
"""

import argparse
import math
import multiprocessing
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import regex as re
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for tests
import conch_bench as bench

from tests.kernels.attention.conch_reference import (
    LAYOUTS,
    Attention,
    attention,
    first_visible_key,
    gather_pages,
    output_tolerance,
    visible_keys,
)
from vllm.attention.ops.conch import VarlenSchedule, varlen_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# Powers of two: dividing by them is exact.
K_SCALE, V_SCALE = 0.5, 0.25
LAYOUT_NAMES = {
    "nhd": "NHD",
    "hnd": "HND",
    "interleaved": "interleaved",
    "packed": "packed_HND",
    "packed_nhd": "packed_NHD",
}

RAGGED = (
    "q64_q96s2k_q128_q192_q256s8k_q384_q512_q768s4k"
    "_q1k_q1536_q2ks16k_q3k_q4k_q6k_q8ks12k_q16k"
)
PREFILL = [
    *(f"q{n}@32/8x128" for n in ("1k", "2k", "8k", "32k", "128k")),
    *("4q1k", "16q1k", "8q2k"),
    *(f"q{n}@{h}x128" for h in ("64/8", "32/32", "8/1") for n in ("2k", "8k", "32k")),
    *("q1k@32/8x64", "q8k@32/8x64", "q32k@32/8x64"),
    *("q1k@16/8x256", "q8k@16/8x256", "q32k@16/8x256"),
    *("q512s4k", "4q512s16k", "q512s128k", "q2ks4k", "q2ks32k", "q2ks128k"),
    RAGGED,
]
VARIANTS = [
    *("q8k@window1k", "q32k@window1k", "q32k@window4k", "q8k@softcap30"),
    *("q8k@32/8x80", "q8k@32/8x96", "q8k@32/8x112", "q8k@16/8x512"),
    *("q32k@fp8", "q32k@fp8_e5m2", "16q1s8k@window1k", "16q1s8k@softcap30"),
]
DECODE = [
    *("1q1s1k", "1q1s8k", "1q1s32k", "1q1s128k", "8q1s1k", "8q1s8k", "8q1s32k"),
    *("64q1s1k", "64q1s8k", "64q1s32k", "256q1s1k", "256q1s8k"),
    *(f"16q1s8k@{h}" for h in ("64/8x128", "32/32x128", "8/1x128")),
    *(f"16q1s8k@{h}" for h in ("32/8x64", "16/8x256")),
    "16q5s8k",
]
FP8 = ["1q1s32k@fp8", "16q1s8k@fp8", "64q1s8k@fp8", "64q1s8k@fp8_e5m2"]
MIXED = [
    # Skewed, and a uniform batch of as many bytes.
    *("1q1s128k_31q1s4k", "32q1s8064"),
    # Prefill chunks among decodes, and their parts alone.
    *("q2k_64q1s4k", "q2k", "64q1s4k"),
    *("2q2k_32q1s1k", "2q2k", "32q1s1k"),
    *("q512s16k_64q1s4k", "q512s16k", "16q4s8k_q1k"),
    *("64q1s33k@prefix32k", "64q1s33k"),
]
SHORT = ["q1k", "q8k", "q2ks32k", "1q1s1k", "1q1s32k", "64q1s8k", "q2k_64q1s4k"]
SUITES = {
    "prefill": PREFILL,
    "decode": DECODE,
    "mixed": MIXED,
    "fp8": FP8,
    "variants": VARIANTS,
    "short": SHORT,
    "all": [*PREFILL, *DECODE, *MIXED, *FP8, *VARIANTS],
}


# ---------------------------------------------------------------- cases

SEGMENT = re.compile(r"(\d*)q(\d+k?)(?:s(\d+k?))?")
HEADS = re.compile(r"(\d+)/(\d+)x(\d+)")
OPTION = re.compile(r"(window|softcap|prefix)(\d+k?)")


@dataclass(frozen=True)
class Case:
    """A batch of (query length, sequence length) and the layer it meets."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    num_query_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    kv_dtype: str = "auto"
    window: int | None = None
    softcap: float = 0.0
    prefix: int = 0
    page: int = 16
    layout: str = "packed"

    @property
    def num_tokens(self) -> int:
        return sum(query_len for query_len, _ in self.lengths)

    @property
    def max_query_len(self) -> int:
        return max(query_len for query_len, _ in self.lengths)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        return sum(attended_pairs(q, s, self.window) for q, s in self.lengths)

    @property
    def flop(self) -> int:
        """Two products of two operations for every pair, head and element."""
        return 4 * self.num_query_heads * self.head_size * self.pairs

    @property
    def num_keys(self) -> int:
        """Keys that some query sees, those of a shared prefix once."""
        seen = (s - first_visible_key(q, s, self.window) for q, s in self.lengths)
        return sum(seen) - self.prefix * (len(self.lengths) - 1)

    def kv_bytes(self, element_size: int) -> int:
        return 2 * self.num_keys * self.num_kv_heads * self.head_size * element_size


def attended_pairs(query_len: int, seq_len: int, window: int | None) -> int:
    """Visible (query, key) pairs of one sequence, causal."""
    context = seq_len - query_len
    # So many first queries see all keys before them, the others `window` keys.
    rising = query_len
    if window is not None:
        rising = min(max(window - context, 0), query_len)
    pairs = rising * context + rising * (rising + 1) // 2
    return pairs + (query_len - rising) * (window or 0)


def parse_size(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def parse_case(text: str, defaults: Case) -> Case:
    """Reads a case as the module's docstring describes it.

    Raises:
        ValueError: naming the part that cannot be read.
    """
    batch, *options = text.strip().split("@")
    lengths: list[tuple[int, int]] = []
    for segment in batch.split("_"):
        found = SEGMENT.fullmatch(segment)
        if found is None:
            raise ValueError(
                f"cases: segment {segment!r} of {text!r} is not [count]qLEN[sLEN], "
                "such as 32q1s4k or q8k; a length may end in k"
            )
        count, query_len = int(found[1] or 1), parse_size(found[2])
        seq_len = parse_size(found[3]) if found[3] else query_len
        if not (count and 0 < query_len <= seq_len):
            raise ValueError(
                f"cases: segment {segment!r} of {text!r} needs a count and a query of "
                "1 or more, and a sequence that holds the query"
            )
        lengths += [(query_len, seq_len)] * count
    case = replace(defaults, name=text.strip(), lengths=tuple(lengths))
    for option in options:
        case = apply_option(case, option)
    if case.prefix and (case.window or case.prefix > min(s for _, s in lengths)):
        raise ValueError(
            f"cases: the prefix of {text!r} must fit the shortest sequence, and there "
            "must be no window"
        )
    return case


def apply_option(case: Case, option: str) -> Case:
    if found := HEADS.fullmatch(option):
        heads, kv_heads, head_size = map(int, found.groups())
        if not heads or not kv_heads or heads % kv_heads:
            raise ValueError(
                f"cases: {option!r} of {case.name!r}: query heads must be a multiple "
                "of KV heads"
            )
        return replace(
            case, num_query_heads=heads, num_kv_heads=kv_heads, head_size=head_size
        )
    if option in FP8_DTYPES:
        return replace(case, kv_dtype=option)
    if found := OPTION.fullmatch(option):
        return replace(case, **{found[1]: parse_size(found[2])})
    raise ValueError(
        f"cases: option {option!r} of {case.name!r} is none of 32/8x128, "
        f"{', '.join(FP8_DTYPES)}, window4k, softcap30, prefix32k"
    )


# ---------------------------------------------------------------- inputs


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
        if self.k_scale is None:
            return self.query
        return self.query.to(self.key_cache.dtype)

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

    key_cache, value_cache = LAYOUTS[LAYOUT_NAMES[case.layout]](
        num_blocks, case.page, case.num_kv_heads, case.head_size, new
    )
    shape = (case.num_tokens, case.num_query_heads, case.head_size)
    query = torch.randn(shape, dtype=dtype, device=device)
    scales = [None, None]
    if case.kv_dtype != "auto":
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


# ---------------------------------------------------------------- correctness


class Probe(NamedTuple):
    """Some rows and heads of the output and what they must be."""

    rows: slice
    heads: list[int]
    expected: Attention


BLOCK_ROWS = 4


def probe_blocks(query_len: int) -> list[tuple[int, int]]:
    """[begin, end) of some queries at the beginning, in the middle and at the end."""
    last = max(query_len - BLOCK_ROWS, 0)
    begins = sorted({0, last // 2, last})
    return [(begin, min(begin + BLOCK_ROWS, query_len)) for begin in begins]


def make_probes(inputs: Inputs, query: torch.Tensor) -> list[Probe]:
    """The reference on the first, the longest and the last sequence."""
    case = inputs.case
    lengths = case.lengths
    longest = max(range(len(lengths)), key=lambda i: lengths[i][1])
    kv_heads = sorted({0, case.num_kv_heads - 1})
    group = case.num_query_heads // case.num_kv_heads
    heads = [group * h + i for h in kv_heads for i in range(group)]
    starts = inputs.query_start_loc.tolist()
    probes = []
    for i in sorted({0, longest, len(lengths) - 1}):
        query_len, seq_len = lengths[i]
        key, value = (
            scale
            * gather_pages(cache, inputs.block_table[i], 0, seq_len)[
                :, kv_heads
            ].double()
            for cache, scale in (
                (inputs.key_cache, 1.0 if inputs.k_scale is None else K_SCALE),
                (inputs.value_cache, 1.0 if inputs.v_scale is None else V_SCALE),
            )
        )
        for begin, end in probe_blocks(query_len):
            # The sequence as it was when its last token was query end - 1.
            length = seq_len - query_len + end
            first = first_visible_key(end - begin, length, case.window)
            visible = visible_keys(
                end - begin,
                length,
                first,
                causal=True,
                sliding_window=case.window,
                device=query.device,
            )
            rows = slice(starts[i] + begin, starts[i] + end)
            expected = attention(
                query[rows, heads].double(),
                key[first:length],
                value[first:length],
                visible,
                scale=inputs.scale,
                softcap=case.softcap,
            )
            probes.append(Probe(rows, heads, expected))
    return probes


def check(output: torch.Tensor, probes: Sequence[Probe], unit: torch.dtype) -> float:
    """The largest error of an output.

    Args:
        output: [num_tokens, num_query_heads, head_size].
        probes: what parts of it must be.
        unit: dtype whose rounding the probabilities may have.

    Raises:
        WrongResult: an element is not finite, or off by more than the tolerance.
    """
    if not bool(torch.isfinite(output).all()):
        raise WrongResult("not finite, or rows were not written")
    largest = 0.0
    for rows, heads, expected in probes:
        error = (output[rows, heads].double() - expected.output).abs()
        largest = max(largest, error.max().item())
        excess = (error / output_tolerance(expected, unit)).max().item()
        if excess > 1:
            raise WrongResult(
                f"error {error.max().item():.2g} in rows {rows.start} to "
                f"{rows.stop - 1}, {excess:.1f} times the tolerance"
            )
    return largest


class WrongResult(Exception):
    """A provider computed something else."""


# ---------------------------------------------------------------- providers


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

    def make_schedule(self, inputs: Inputs) -> VarlenSchedule:
        case = inputs.case
        schedule = VarlenSchedule(
            max_num_seqs=len(case.lengths),
            max_num_tokens=case.num_tokens,
            num_query_heads=case.num_query_heads,
            num_kv_heads=case.num_kv_heads,
            head_size=case.head_size,
            block_size=case.page,
            query_dtype=inputs.query.dtype,
            kv_dtype=inputs.key_cache.dtype,
            device=inputs.query.device,
            sliding_window=case.window,
        )
        schedule.update(
            inputs.query_start_loc,
            inputs.seq_lens,
            max_query_len=case.max_query_len,
            num_tokens=case.num_tokens,
        )
        return schedule

    def make(self, inputs: Inputs) -> Callable[[], object]:
        case, schedule = inputs.case, self.make_schedule(inputs)
        return lambda: varlen_attention(
            inputs.query,
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


class ConchPortable(Conch):
    """CONCH without its Hopper kernel."""

    name = "conch_portable"

    def make_schedule(self, inputs: Inputs) -> VarlenSchedule:
        raise Unavailable("this CONCH has no switch between prefill kernels")


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
        if case.kv_dtype == "fp8_e5m2":
            raise Unavailable("no e5m2")
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
        quantized = inputs.k_scale is not None
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
            kv_quant_mode=(
                KVQuantMode.FP8_PER_TENSOR if quantized else KVQuantMode.NONE
            ),
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
    for provider in (Conch, ConchPortable, FlashAttention3, VllmTriton, Cudnn, Read)
}


# ---------------------------------------------------------------- measuring


@dataclass
class Floors:
    """The device's measured limits."""

    flops: dict[str, float]  # by a case's KV dtype, "auto" for the query's
    read: bench.ReadFloor

    def us(self, case: Case, kv_bytes: int) -> float:
        compute = case.flop / self.flops.get(case.kv_dtype, self.flops["auto"]) * 1e6
        return max(compute, self.read.us(kv_bytes))

    @classmethod
    def measure(cls, cases: Iterable[Case], dtype: torch.dtype, warm_l2: bool):
        flops = {"auto": bench.gemm_flops(dtype)}
        if any(case.kv_dtype == "fp8" for case in cases):
            flops["fp8"] = bench.gemm_flops(FP8_DTYPES["fp8"])
        largest = max(case.kv_bytes(dtype.itemsize) for case in cases)
        return cls(flops, bench.ReadFloor.measure(largest, warm_l2))


CASE_FIELDS = ("case", "heads", "dtype", "kv_dtype", "page", "layout")
FIELDS = (
    *CASE_FIELDS,
    *("provider", "us", "TFLOP/s", "TB/s", "floor_us", "of_floor"),
    *("vs_fa3", "vs_triton", "host_us", "max_error", "note"),
)
WIDTHS = {"case": 20, "heads": 9, "dtype": 5, "kv_dtype": 8, "page": 4, "layout": 6}
WIDTHS |= {"provider": 14, "note": 4}


def describe(case: Case, inputs: Inputs) -> dict[str, object]:
    return {
        "case": case.name.partition("@")[0] + option_text(case),
        "heads": f"{case.num_query_heads}/{case.num_kv_heads}x{case.head_size}",
        "dtype": str(inputs.query.dtype).removeprefix("torch."),
        "kv_dtype": case.kv_dtype,
        "page": case.page,
        "layout": case.layout,
    }


def option_text(case: Case) -> str:
    parts = {"window": case.window, "softcap": case.softcap, "prefix": case.prefix}
    return "".join(f"@{name}{value:g}" for name, value in parts.items() if value)


def verify(
    inputs: Inputs, provider: Provider, run: Callable, probes: dict, repeats: int
) -> float:
    """Runs into a poisoned output and checks it; further runs must repeat it bitwise.

    Returns:
        The largest error.

    Raises:
        WrongResult: with what is wrong.
    """
    query = provider.query(inputs)
    if query.dtype not in probes:
        probes[query.dtype] = make_probes(inputs, query)
    inputs.output.fill_(math.nan)
    run()
    largest = check(provider.output(inputs), probes[query.dtype], query.dtype)
    first = provider.output(inputs).clone() if repeats else None
    for _ in range(repeats):
        run()
        if not torch.equal(first, provider.output(inputs)):
            raise WrongResult("a second run gave other bits")
    return largest


def measure(
    case: Case,
    providers: Sequence[Provider],
    floors: Floors | None,
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    """A row for each provider; without floors, which need a GPU, there are no times."""
    inputs = make_inputs(case, options.dtype, DEVICE)
    on_gpu = floors is not None
    rows, graphs, calls, probes = [], {}, {}, {}
    for provider in providers:
        row = describe(case, inputs) | {"provider": provider.name}
        rows.append(row)
        try:
            call = provider.make(inputs)
            run = call
            if on_gpu:
                graphs[provider.name] = bench.capture(call)
                run = graphs[provider.name].replay
            if provider.checked:
                repeats = 5 if options.repro else 0
                row["max_error"] = verify(inputs, provider, run, probes, repeats)
            calls[provider.name] = call
        except Unavailable as reason:
            row["note"] = f"skipped: {reason}"
        except WrongResult as reason:
            row["note"] = f"WRONG: {reason}"
            graphs.pop(provider.name, None)
        except Exception as error:  # one that fails must not end the others' run
            text = str(error).strip().partition("\n")[0]
            row["note"] = f"FAILED: {type(error).__name__}: {text[:200]}"
            graphs.pop(provider.name, None)
    if not on_gpu:
        return rows
    times = bench.take_turns(graphs, options.budget_ms, options.warm_l2)
    kv_bytes = case.kv_bytes(inputs.key_cache.element_size())
    floor = floors.us(case, kv_bytes)
    for row in rows:
        us = times.get(row["provider"])
        if us is None:
            continue
        row |= rates(case, us, kv_bytes, floor)
        if row["provider"] == "read":
            row["TFLOP/s"] = None
        for rival in ("fa3", "triton"):
            if rival in times:
                row[f"vs_{rival}"] = times[rival] / us
        if options.host and row["provider"] != "read":
            repeats = min(max(int(20_000 / us), 3), 100)
            row["host_us"] = bench.host_us(calls[row["provider"]], repeats)
    return rows


def rates(case: Case, us: float, kv_bytes: int, floor_us: float) -> dict[str, float]:
    return {
        "us": us,
        "TFLOP/s": case.flop / us / 1e6,
        "TB/s": kv_bytes / us / 1e6,
        "floor_us": floor_us,
        "of_floor": floor_us / us,
    }


def sums_of_parts(rows: Iterable[dict[str, object]]) -> list[str]:
    """Mixed batches beside the sum of their parts, where those were measured too."""
    times = {
        tuple(row[k] for k in (*CASE_FIELDS, "provider")): row["us"]
        for row in rows
        if row.get("us") is not None and row["provider"] != "read"
    }
    lines = []
    for (name, *rest, provider), us in times.items():
        parts = [times.get((part, *rest, provider)) for part in name.split("_")]
        if len(parts) > 1 and None not in parts:
            total = sum(parts)
            lines.append(
                f"{name} page {rest[3]} {provider}: {us:.1f} us, its parts alone "
                f"{' + '.join(f'{x:.1f}' for x in parts)} = {total:.1f} us: "
                f"{us / total:.2f}"
            )
    return lines


# ---------------------------------------------------------------- compiling

COMPILE_BLOCKS = 256


def distinct_variants(cases: Iterable[Case]) -> list[Case]:
    """The least work of those cases that need the same compiled kernels."""
    chosen: dict[tuple, Case] = {}
    for case in sorted(cases, key=lambda case: case.flop):
        num_seqs = (len(case.lengths) - 1).bit_length()
        layer = replace(case, name="", lengths=(), window=case.window and 1, prefix=0)
        chosen.setdefault((layer, num_seqs, min(case.max_query_len, 17)), case)
    return list(chosen.values())


def compile_variant(case: Case, provider: str, dtype: torch.dtype) -> None:
    """Runs a case once, for what it leaves in Triton's cache on disk."""
    try:
        PROVIDERS[provider]().make(make_inputs(case, dtype, DEVICE, COMPILE_BLOCKS))()
        torch.accelerator.synchronize()
    except Exception:
        return  # the measurement will say what is wrong


def compile_all(options: argparse.Namespace) -> None:
    """Fills Triton's cache on disk from several processes at once."""
    names = [name for name in options.providers if PROVIDERS[name].compiles]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        for case in distinct_variants(options.cases):
            for name in names:
                pool.submit(compile_variant, case, name, options.dtype)


# ---------------------------------------------------------------- command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commas = lambda text: text.split(",")
    parser.add_argument("--suite", type=commas, default=[], metavar="NAMES")
    parser.add_argument("--cases", type=commas, default=[], help="comma-separated")
    parser.add_argument("--heads", default="32/8x128", help="where a case says none")
    parser.add_argument("--dtype", choices=DTYPES, help="of queries; default bf16")
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", *FP8_DTYPES])
    parser.add_argument("--pages", type=commas, default=["16"], help="such as 16,128")
    parser.add_argument("--layout", type=str.lower, default="packed")
    parser.add_argument("--window", type=parse_size, help="where a case says none")
    parser.add_argument("--softcap", type=float, default=0.0)
    parser.add_argument("--providers", type=commas, default=[], metavar="NAMES")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    parser.add_argument("--warm-l2", action="store_true", help="do not flush the L2")
    parser.add_argument("--host", action="store_true", help="host time of eager calls")
    parser.add_argument(
        "--repro", action="store_true", help="results must repeat bit for bit"
    )
    parser.add_argument(
        "--budget-ms", type=float, default=40.0, help="replays of a case and provider"
    )
    parser.add_argument(
        "--jobs", type=int, default=0, help="processes that compile kernels before"
    )
    parser.add_argument("--commit", help="for the table's head; default: asks git")
    options = parser.parse_args(arguments)
    for flag, names, known in (
        ("--suite", options.suite, SUITES),
        ("--providers", options.providers, PROVIDERS),
        ("--layout", [options.layout], LAYOUT_NAMES),
    ):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{flag} {unknown[0]!r}: choose from {', '.join(known)}")
    if not options.cases and not options.suite:
        options.suite = ["short"]
    options.dtype = DTYPES[options.dtype or ("bf16" if DEVICE == "cuda" else "fp32")]
    if not options.providers:
        options.providers = ["conch", "fa3", "triton", "read"]
    try:
        options.cases = select_cases(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def select_cases(options: argparse.Namespace) -> list[Case]:
    """The cases of all suites and of --cases, for each page size; each once."""
    defaults = Case(
        name="",
        lengths=(),
        kv_dtype=options.kv_dtype,
        window=options.window,
        softcap=options.softcap,
        layout=options.layout,
    )
    defaults = apply_option(defaults, options.heads)
    texts = [text for suite in options.suite for text in SUITES[suite]]
    texts += options.cases
    cases = []
    for page in options.pages:
        if not page.isdecimal() or int(page) % 16 or int(page) == 0:
            raise ValueError(f"--pages {page!r} is not a multiple of 16")
        for text in texts:
            cases.append(parse_case(text, replace(defaults, page=int(page))))
    return list(dict.fromkeys(cases))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    began = time.perf_counter()
    if options.jobs and DEVICE == "cuda":
        compile_all(options)
        print(f"# compiled in {time.perf_counter() - began:.0f} s", flush=True)
    head = bench.environment(options.commit)
    head["L2"] = "warm" if options.warm_l2 else "flushed"
    floors = None
    if DEVICE == "cuda":
        floors = Floors.measure(options.cases, options.dtype, options.warm_l2)
        for name, flops in floors.flops.items():
            name = str(options.dtype) if name == "auto" else name
            head[f"matrix product {name}"] = f"{flops / 1e12:.0f} TFLOP/s"
        head["read"] = ", ".join(
            f"{size / 1e6:.1f} MB {us:.1f} us" for size, us in floors.read.points
        )
        head["empty kernel"] = f"{bench.empty_us(options.warm_l2):.2f} us"
    providers = [PROVIDERS[name]() for name in options.providers]
    table = bench.Table(FIELDS, head, options.csv, WIDTHS)
    for case in options.cases:
        for row in measure(case, providers, floors, options):
            table.add(row)
    for line in sums_of_parts(table.rows):
        print(line)
    print(f"# {len(options.cases)} cases in {time.perf_counter() - began:.0f} s")
    return int(any(is_failure(row) for row in table.rows))


def is_failure(row: dict[str, object]) -> bool:
    """Whether CONCH could not do a case."""
    bad = str(row.get("note", "")).startswith(("WRONG", "FAILED"))
    return bad and str(row["provider"]).startswith("conch")


if __name__ == "__main__":
    raise SystemExit(main())
