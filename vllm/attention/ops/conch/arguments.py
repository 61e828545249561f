# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `varlen_attention` is given: tensors, options and batches that it rejects."""

import math

import torch

from .checks import (
    CACHE_SCALES,
    LENGTH,
    TensorSpec,
    check_device,
    check_dtype,
    check_last_stride,
    check_number,
    check_scale,
    check_shape,
    check_tensor,
    free_strides,
    reject,
    signature,
    whole_number,
)
from .fp8 import FP8_DTYPES
from .plan import (
    BLOCK_SIZE_MULTIPLE,
    HEAD_SIZES,
    INT4_HEAD_MULTIPLE,
    KV_INT4_DTYPE,
    KV_INTEGER_DTYPES,
    KV_SCALED_DTYPES,
    QUERY_DTYPES,
    QUERY_FP8_DTYPE,
    Shape,
    kv_dtypes_for,
    reads_e4m3,
    this_device,
)
from .schedule import Sight, VarlenSchedule

FEATURES = (
    "sinks",
    "alibi_slopes",
    "causal",
    "mm_prefix_range",
    "prefix_lens",
    "output_scale",
)
OPTIONAL = ("q_scale", "k_scale", "v_scale", "output_lse", *FEATURES)
# What is indexed by the sequence, and so may be longer than the batch.
PER_SEQUENCE = ("causal", "mm_prefix_range", "prefix_lens")
# What is the same for all batches, its first size included.
OF_A_LAYER = (
    "q_scale",
    "k_scale",
    "v_scale",
    "sinks",
    "alibi_slopes",
    "output_scale",
)
# Smaller ones overflow fp32; with larger ones tanh rounds logits away.
SOFTCAPS = (1e-3, 1e4)


def check_tensors(tensors: dict[str, torch.Tensor | None]) -> None:
    """Rejects what is no tensor."""
    for name, tensor in tensors.items():
        if tensor is not None or name not in OPTIONAL:
            check_tensor(name, tensor)


def check_arguments(tensors: dict[str, torch.Tensor | None]) -> dict[str, TensorSpec]:
    """The tensors' specs, or a ValueError of `varlen_attention`."""
    specs = {n: TensorSpec(*signature(t)) for n, t in tensors.items() if t is not None}
    query, key_cache = specs["query"], specs["key_cache"]
    rows = ("num_tokens", "num_query_heads", "head_size")
    check_shape("query", query, rows, (None, None, None))
    check_dtype("query", query, (*QUERY_DTYPES, QUERY_FP8_DTYPE))
    _, num_query_heads, head_size = query.shape
    if head_size not in HEAD_SIZES:
        allowed = f"{HEAD_SIZES.start} to {HEAD_SIZES.stop - 1}"
        reject("query", f"head_size {head_size}", allowed)
    check_shape("output", specs["output"], rows, query.shape)
    if "output_scale" in specs:
        check_dtype("output", specs["output"], FP8_DTYPES, "output_scale needs fp8.")
    elif query.dtype == QUERY_FP8_DTYPE:
        check_dtype("output", specs["output"], QUERY_DTYPES, "Or pass output_scale.")
    else:
        advice = "It needs query's dtype, or an output_scale."
        check_dtype("output", specs["output"], (query.dtype,), advice)

    pages = ("num_blocks", "block_size", "num_kv_heads", "head_size")
    advice = (
        "Pass a view with query's head size, such as cache.transpose(1, 2) of an HND"
        " cache or one half of a page that packs K and V."
    )
    row = head_size
    if key_cache.dtype == KV_INT4_DTYPE:
        row = head_size // 2
        advice = (
            "torch.uint8 stands for int4, two elements to a byte. View a cache of other"
            " bytes with cache.view(torch.float8_e4m3fn)."
        )
        if head_size % INT4_HEAD_MULTIPLE:
            allowed = f"a multiple of {INT4_HEAD_MULTIPLE} with an int4 cache"
            reject("query", f"head_size {head_size}", allowed)
    check_shape("key_cache", key_cache, pages, (None, None, None, row), advice)
    advice = "View a cache of bytes with cache.view(torch.float8_e4m3fn)."
    check_dtype("key_cache", key_cache, kv_dtypes_for(query.dtype), advice)
    _, block_size, num_kv_heads, _ = key_cache.shape
    if block_size == 0 or block_size % BLOCK_SIZE_MULTIPLE:
        allowed = f"a multiple of {BLOCK_SIZE_MULTIPLE}"
        reject("key_cache", f"block_size {block_size}", allowed)
    if num_kv_heads == 0 or num_query_heads % num_kv_heads:
        allowed = f"a divisor of query's {num_query_heads} heads"
        reject("key_cache", f"num_kv_heads {num_kv_heads}", allowed)
    value_cache = specs["value_cache"]
    check_shape("value_cache", value_cache, pages, key_cache.shape)
    advice = "K and V need caches of the same dtype."
    check_dtype("value_cache", value_cache, (key_cache.dtype,), advice)
    for name in ("query", "output", "key_cache", "value_cache"):
        check_last_stride(name, specs[name])
    for name in ("query", "output"):
        stride = free_strides(specs[name])[1]
        if stride * num_query_heads >= 2**31:
            allowed = f"less than 2^31 / {num_query_heads} from head to head"
            advice = f"Pass {name}.contiguous()."
            reject(name, f"stride {stride}", allowed, advice)
    if query.dtype == QUERY_FP8_DTYPE and not reads_e4m3(
        query.dtype, this_device(query.device.index)
    ):
        allowed = "a dtype of 16 or 32 bits: this device has no instruction for fp8"
        reject("query", query.dtype, allowed, "Its cache may stay in fp8.")

    check_integers("query_start_loc", specs, ("num_seqs + 1",))
    check_integers("seq_lens", specs, ("num_seqs",))
    check_integers("block_table", specs, ("num_seqs", "max_blocks"))
    if lse := specs.get("output_lse"):
        check_shape("output_lse", lse, rows[:2], query.shape[:2])
        check_dtype("output_lse", lse, (torch.float32,))
        check_last_stride("output_lse", lse)
    if sinks := specs.get("sinks"):
        check_shape("sinks", sinks, ("num_query_heads",), (num_query_heads,))
        check_dtype("sinks", sinks, QUERY_DTYPES)
        check_last_stride("sinks", sinks)
    if slopes := specs.get("alibi_slopes"):
        check_shape("alibi_slopes", slopes, ("num_query_heads",), (num_query_heads,))
        check_dtype("alibi_slopes", slopes, (torch.float32,))
        check_last_stride("alibi_slopes", slopes)
    if causal := specs.get("causal"):
        check_shape("causal", causal, ("num_seqs",), (None,))
        if causal.dtype not in (torch.uint8, torch.int32):  # bool came as uint8
            reject("causal", causal.dtype, "torch.bool, torch.int32")
        check_last_stride("causal", causal)
    if ranges := specs.get("mm_prefix_range"):
        check_integers("mm_prefix_range", specs, ("num_seqs", "num_ranges", "2"))
        dense = (2 * ranges.shape[1], 2, 1)
        if any(s not in (0, d) for s, d in zip(free_strides(ranges), dense)):
            got = f"strides {list(ranges.strides)}"
            reject("mm_prefix_range", got, f"{list(dense)}", "Pass a contiguous one.")
    if "prefix_lens" in specs:
        check_integers("prefix_lens", specs, ("num_seqs",))
    for name in ("q_scale", "output_scale"):
        if spec := specs.get(name):
            check_scale(name, spec, "query", query)
    check_cache_scales(specs)
    for name, spec in specs.items():
        check_device(name, spec, "query", query)
    return specs


def check_fours(specs: dict[str, TensorSpec], address: int) -> None:
    """Rejects an int4 V whose rows cannot be read in fours of elements."""
    strides = free_strides(specs["value_cache"])[:-1]
    if any(number % 2 for number in (address, *strides)):
        got = f"strides {list(strides)}, address {address}"
        reject("value_cache", got, "even numbers with an int4 cache")


def check_cache_scales(specs: dict[str, TensorSpec]) -> None:
    """Rejects scales that are neither one for all nor one per token and head."""
    key_cache, query = specs["key_cache"], specs["query"]
    names = ("k_scale", "v_scale")
    if not has_token_scales(specs):
        if key_cache.dtype in KV_INTEGER_DTYPES:
            allowed = "one per token and head, as the cache is in integers"
            got = (
                f"shape {list(specs['k_scale'].shape)}" if "k_scale" in specs else None
            )
            reject("k_scale", got, f"[num_blocks, block_size, num_kv_heads], {allowed}")
        for name in names:
            if spec := specs.get(name):
                check_scale(name, spec, "query", query, CACHE_SCALES)
        return
    if key_cache.dtype not in KV_SCALED_DTYPES or query.dtype == QUERY_FP8_DTYPE:
        reject(
            "k_scale",
            f"shape {list(specs['k_scale'].shape)} with query {query.dtype}, "
            f"key_cache {key_cache.dtype}",
            "one element for query and cache of these dtypes",
            f"Scales per token go with {', '.join(map(str, KV_SCALED_DTYPES))}.",
        )
    dims = ("num_blocks", "block_size", "num_kv_heads")
    for name in names:
        if name not in specs:
            reject(name, None, "a tensor, as there are scales of K per token and head")
        check_shape(name, specs[name], dims, key_cache.shape[:3])
        check_dtype(name, specs[name], (torch.float32,))


def has_token_scales(specs: dict[str, TensorSpec]) -> bool:
    return "k_scale" in specs and len(specs["k_scale"].shape) == 3


def check_integers(
    name: str, specs: dict[str, TensorSpec], dims: tuple[str, ...]
) -> None:
    spec = specs[name]
    check_shape(name, spec, dims, (None,) * len(dims))
    check_dtype(name, spec, (torch.int32,), f"Pass {name}.to(torch.int32).")
    check_last_stride(name, spec)


def check_options(
    scale: float,
    softcap: float,
    causal: bool,
    sight: Sight,
    max_query_len: int,
    alibi_sqrt: bool,
    has_slopes: bool,
) -> None:
    """ValueErrors of numbers and of what does not go together.

    causal: of every sequence.
    """
    allowed = "a positive number"
    check_number("scale", scale, allowed)
    if not (math.isfinite(scale) and scale > 0):
        reject("scale", scale, allowed)
    smallest, largest = SOFTCAPS
    allowed = f"{smallest} to {largest}, or 0 for none"
    check_number("softcap", softcap, allowed)
    if not (softcap == 0 or smallest <= softcap <= largest):
        reject("softcap", softcap, allowed)
    if not isinstance(causal, bool):
        reject("causal", type(causal).__name__, "a bool, or a tensor of flags")
    if alibi_sqrt and not has_slopes:
        reject("alibi_sqrt", alibi_sqrt, "False without alibi_slopes")
    if sight.chunk_lookback >= 0 and not causal:
        reject("chunk_lookback", sight.chunk_lookback, "-1 where causal is not True")
    if sight.has_prefix and (sight.sliding_window is None or sight.chunk_lookback >= 0):
        got = f"sliding_window={sight.sliding_window}, "
        got += f"chunk_lookback={sight.chunk_lookback}"
        reject("prefix_lens", got, "a sliding_window, and no chunks")
    if sight.has_prefix and not causal:
        reject("prefix_lens", "causal that is not True", "None, or causal=True")
    if sight.ranges_in_window and sight.chunk_lookback >= 0:
        # The kernels know the size of a chunk, and of the window that it is a part of.
        chunks, window = sight.chunk_lookback + 1, sight.sliding_window or 0
        if window % chunks:
            allowed = f"a multiple of {chunks}, its chunks, with mm_prefix_in_window"
            reject("sliding_window", window, allowed)
    whole_number("max_query_len", max_query_len, LENGTH, 0)


def check_schedule(specs: dict[str, TensorSpec], shape: Shape) -> None:
    given = shape_of(*(specs.get(name) for name in ("query", "key_cache", "k_scale")))
    if given != shape:
        reject("schedule", f"one made for {shape}", f"one made for {given}")


def shape_of(query, key_cache, k_scale) -> Shape:
    """The layer's shape, from tensors or from their specs."""
    return Shape(
        query.shape[1],
        key_cache.shape[2],
        query.shape[2],
        key_cache.shape[1],
        query.dtype,
        key_cache.dtype,
        k_scale is not None and len(k_scale.shape) == 3,
    )


def first_size(tensor: torch.Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 0


def check_batch(
    tensors: dict[str, torch.Tensor | None],
    max_query_len: int,
    sight: Sight,
    schedule: VarlenSchedule,
) -> None:
    """Raises the ValueErrors that depend on the batch, checked in every call.

    Those are about first sizes, which launches are not planned for.
    """
    if not isinstance(schedule, VarlenSchedule):
        reject("schedule", type(schedule).__name__, "a VarlenSchedule or None")
    sizes = {n: first_size(t) for n, t in tensors.items() if t is not None}
    num_seqs = sizes["seq_lens"]
    if sizes["query_start_loc"] != num_seqs + 1:
        got = f"{sizes['query_start_loc']} elements"
        reject("query_start_loc", got, f"{num_seqs + 1}, one more than seq_lens")
    if sizes["block_table"] < num_seqs:
        got = f"{sizes['block_table']} rows"
        reject("block_table", got, f"{num_seqs} or more, one per sequence")
    alike = {"output": "query", "output_lse": "query", "value_cache": "key_cache"}
    if schedule.shape.token_scales:
        alike |= {"k_scale": "key_cache", "v_scale": "key_cache"}
    for name, other in alike.items():
        if name in sizes and sizes[name] != sizes[other]:
            allowed = f"{sizes[other]}, as many as {other} has"
            reject(name, f"{sizes[name]} in its first dimension", allowed)
    updated = schedule.max_query_len, schedule.num_seqs, schedule.sight
    if updated != (max_query_len, num_seqs, sight):
        got = "one updated for max_query_len {}, {} sequences, {}".format(*updated)
        allowed = f"{max_query_len}, {num_seqs} sequences, {sight}"
        reject("schedule", got, allowed, "Call schedule.update with this batch.")
    for name in PER_SEQUENCE:
        if sizes.get(name, num_seqs) < num_seqs:
            reject(name, f"{sizes[name]} rows", f"{num_seqs}, one per sequence")
