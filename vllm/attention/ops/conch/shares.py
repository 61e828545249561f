# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Keys that are shared out over several devices: who has which, and how results join.

Key j of a sequence is on device (j // R) % N, R keys in a run, N devices. Each attends
all query heads to its own keys, and with the LSE of every device the results join as
the pieces of a decode do (FlashDecoding, Dao et al. 2023; Liu et al. 2023, Ring
attention): they are weighted means of V whose weights are exp(LSE). A device that has
no key of a sequence has an LSE of -inf and counts for nothing, whatever its result is.
"""

from functools import lru_cache

import torch

from vllm.triton_utils import tl, triton

from .checks import (
    TensorSpec,
    check_device,
    check_dtype,
    check_last_stride,
    check_shape,
    check_tensor,
    reject,
    signature,
    specs_of,
)
from .launch import Launch
from .plan import QUERY_DTYPES

# Sequences of one program that counts keys, and elements of one that joins results.
SEQUENCES = 128
ELEMENTS = 4096


# Microbatches slice the lengths anywhere: their alignment must make no variant.
@triton.jit(
    do_not_specialize=["query_start_loc_ptr", "seq_lens_ptr", "num_seqs", "share"]
)
def count_keys_kernel(
    query_start_loc_ptr,  # [num_seqs + 1]
    seq_lens_ptr,  # [num_seqs]
    counts_ptr,  # [num_seqs]
    num_seqs,
    share,
    NUM_SHARES: tl.constexpr,
    RUN: tl.constexpr,
    CONTEXT: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    sequence = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    valid = sequence < num_seqs
    query_start = tl.load(query_start_loc_ptr + sequence, mask=valid, other=0)
    query_end = tl.load(query_start_loc_ptr + sequence + 1, mask=valid, other=0)
    query_len = query_end - query_start
    keys = tl.load(seq_lens_ptr + sequence, mask=valid, other=0)
    if CONTEXT:
        keys -= query_len
    keys = tl.where(query_len > 0, tl.maximum(keys, 0), 0)
    rest = keys % (NUM_SHARES * RUN) - share * RUN
    count = keys // (NUM_SHARES * RUN) * RUN + tl.minimum(tl.maximum(rest, 0), RUN)
    tl.store(counts_ptr + sequence, count, mask=valid)


@triton.jit
def load_lse(lses, share, row):
    """[ROWS] LSE of one share.

    lses: pointer, stride of shares, strides of (token, head).
    row: token, head and validity.
    """
    lses_ptr, share_stride, strides = lses
    token, head, valid = row
    offsets = tl.cast(share, tl.int64) * share_stride
    offsets += token * strides[0] + head * strides[1]
    return tl.load(lses_ptr + offsets, mask=valid, other=float("-inf"))


@triton.jit
def largest_lse(lses, row, NUM_SHARES: tl.constexpr):
    """[ROWS] largest LSE of all shares, -inf where none has a key."""
    largest = load_lse(lses, 0, row)
    for share in tl.static_range(1, NUM_SHARES):
        largest = tl.maximum(largest, load_lse(lses, share, row))
    return largest


@triton.jit
def finite(largest):
    """What exponents are relative to: -inf - -inf would be NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def total_weight(lses, shift, row, NUM_SHARES: tl.constexpr):
    """[ROWS] sum over all shares of exp(LSE - shift)."""
    total = tl.exp(load_lse(lses, 0, row) - shift)
    for share in tl.static_range(1, NUM_SHARES):
        total += tl.exp(load_lse(lses, share, row) - shift)
    return total


@triton.jit
def weigh(rows, weight):
    """[ROWS, D] rows in fp32 times weight; 0 for a weight of 0, whatever they hold."""
    weight = weight[:, None]
    return tl.where(weight == 0.0, 0.0, rows.to(tl.float32) * weight)


@triton.jit
def tile_of_rows(num_tokens, NUM_HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Token and head, int64, and validity of the rows of this program, [ROWS] each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // NUM_HEADS).to(tl.int64)
    return token, (row % NUM_HEADS).to(tl.int64), row < num_tokens * NUM_HEADS


# What depends on the number of tokens must make no variant.
@triton.jit(do_not_specialize=["lse_share_stride", "num_tokens", "share"])
def weigh_share_kernel(
    output_ptr,  # [num_tokens, num_heads, head_size]
    lses_ptr,  # [NUM_SHARES, num_tokens, num_heads]
    output_strides,  # (token, head)
    lse_share_stride,
    lse_strides,  # (token, head)
    num_tokens,
    share,
    NUM_SHARES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, head, valid = tile_of_rows(num_tokens, NUM_HEADS, ROWS)
    row = (token, head, valid)
    lses = (lses_ptr, lse_share_stride, lse_strides)
    shift = finite(largest_lse(lses, row, NUM_SHARES))
    total = total_weight(lses, shift, row, NUM_SHARES)
    weight = tl.exp(load_lse(lses, share, row) - shift)
    weight /= tl.where(total == 0.0, 1.0, total)
    dims = tl.arange(0, HEAD_PADDED)
    mask = valid[:, None] & (dims < HEAD_SIZE)[None, :]
    offsets = token * output_strides[0] + head * output_strides[1]
    offsets = offsets[:, None] + dims[None, :]
    rows = weigh(tl.load(output_ptr + offsets, mask=mask, other=0.0), weight)
    tl.store(output_ptr + offsets, rows.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["result_stride", "lse_share_stride", "num_tokens"])
def merge_shares_kernel(
    output_ptr,  # [num_tokens, num_heads, head_size]
    output_lse_ptr,  # [num_tokens, num_heads] or None
    results_ptr,  # [NUM_RESULTS, num_tokens, num_heads, head_size]
    lses_ptr,  # [NUM_SHARES, num_tokens, num_heads]
    output_strides,  # (token, head)
    output_lse_stride,  # token
    result_stride,
    result_strides,  # (token, head)
    lse_share_stride,
    lse_strides,  # (token, head)
    num_tokens,
    NUM_RESULTS: tl.constexpr,  # NUM_SHARES, or 1: their weighted sum
    NUM_SHARES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, head, valid = tile_of_rows(num_tokens, NUM_HEADS, ROWS)
    dims = tl.arange(0, HEAD_PADDED)
    mask = valid[:, None] & (dims < HEAD_SIZE)[None, :]
    output_offsets = token * output_strides[0] + head * output_strides[1]
    output_ptrs = output_ptr + output_offsets[:, None] + dims[None, :]
    row = (token, head, valid)
    lses = (lses_ptr, lse_share_stride, lse_strides)
    largest = largest_lse(lses, row, NUM_SHARES)
    if output_lse_ptr is not None:
        own_lse = tl.load(
            output_lse_ptr + token * output_lse_stride + head,
            mask=valid,
            other=float("-inf"),
        )
        largest = tl.maximum(largest, own_lse)
    shift = finite(largest)
    total = total_weight(lses, shift, row, NUM_SHARES)

    acc = tl.zeros([ROWS, HEAD_PADDED], tl.float32)
    offsets = token * result_strides[0] + head * result_strides[1]
    offsets = offsets[:, None] + dims[None, :]
    for i in tl.static_range(NUM_RESULTS):
        weight = total
        if NUM_RESULTS > 1:
            weight = tl.exp(load_lse(lses, i, row) - shift)
        result = results_ptr + tl.cast(i, tl.int64) * result_stride
        acc += weigh(tl.load(result + offsets, mask=mask, other=0.0), weight)
    if output_lse_ptr is not None:
        own_weight = tl.exp(own_lse - shift)
        acc += weigh(tl.load(output_ptrs, mask=mask, other=0.0), own_weight)
        total += own_weight
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(output_ptrs, acc.to(output_ptr.dtype.element_ty), mask=mask)


def count_keys(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    counts: torch.Tensor,
    *,
    num_shares: int,
    share: int,
    run: int,
    context: bool,
) -> None:
    """Counts the keys of each sequence that are in one share: no synchronisation.

    Args:
        query_start_loc: [num_seqs + 1] int32.
        seq_lens: [num_seqs] int32, context and new tokens.
        counts: [num_seqs] int32, written in place; 0 for a sequence without a query.
        num_shares: devices that have keys.
        share: which of them, from 0.
        run: keys that follow each other in one share.
        context: count the context alone, without the new tokens.

    Raises:
        ValueError: if tensors are not of int32, or sizes or numbers do not fit.

    """
    if not 0 <= share < num_shares:
        reject("share", share, f"0 to {num_shares - 1}")
    if run < 1:
        reject("run", run, "1 or more")
    tensors = dict(query_start_loc=query_start_loc, seq_lens=seq_lens, counts=counts)
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    num_seqs = seq_lens.shape[0] if seq_lens.dim() else 0
    for name, tensor in tensors.items():
        spec = TensorSpec(*signature(tensor))
        size = num_seqs + 1 if name == "query_start_loc" else num_seqs
        check_shape(name, spec, ("num_seqs",), (size,))
        check_dtype(name, spec, (torch.int32,))
        check_last_stride(name, spec)
    if num_seqs == 0:
        return
    count_keys_kernel[(triton.cdiv(num_seqs, SEQUENCES),)](
        query_start_loc,
        seq_lens,
        counts,
        num_seqs,
        share,
        NUM_SHARES=num_shares,
        RUN=run,
        CONTEXT=context,
        SEQUENCES=SEQUENCES,
    )


def check_results(
    output: TensorSpec, results: TensorSpec | None, lses: TensorSpec
) -> None:
    rows = ("num_tokens", "num_heads", "head_size")
    check_shape("output", output, rows, (None, None, None))
    check_dtype("output", output, QUERY_DTYPES)
    check_last_stride("output", output)
    check_shape("lses", lses, ("num_shares", *rows[:2]), (None, *output.shape[:2]))
    check_dtype("lses", lses, (torch.float32,))
    check_device("lses", lses, "output", output)
    if results is not None:
        num_results = results.shape[0] if results.shape else 0
        if num_results not in (1, lses.shape[0]):
            allowed = f"{lses.shape[0]} as lses has, or 1, their weighted sum"
            reject("results", f"{num_results} results", allowed)
        check_shape("results", results, ("num_results", *rows), (None, *output.shape))
        check_dtype("results", results, (output.dtype,))
        check_last_stride("results", results)
        check_device("results", results, "output", output)


def tile_constants(output: TensorSpec, lses: TensorSpec) -> dict[str, object]:
    """The constexprs that both kernels have."""
    head_padded = triton.next_power_of_2(output.shape[2])
    return dict(
        NUM_SHARES=lses.shape[0],
        NUM_HEADS=output.shape[1],
        HEAD_SIZE=output.shape[2],
        HEAD_PADDED=head_padded,
        ROWS=ELEMENTS // head_padded,
    )


def num_programs(output: TensorSpec, constants: dict[str, object]) -> int:
    return triton.cdiv(output.shape[0] * output.shape[1], constants["ROWS"])


@lru_cache(maxsize=4096)
def prepare_weighing(share: int, *signatures: tuple) -> Launch | None:
    """Checks the arguments of `weigh_share` and plans its launch."""
    output, lses = specs_of(signatures)
    check_results(output, None, lses)
    if not 0 <= share < lses.shape[0]:
        reject("share", share, f"0 to {lses.shape[0] - 1}")
    constants = tile_constants(output, lses)
    programs = num_programs(output, constants)
    if programs == 0:
        return None
    share_stride, *lse_strides = lses.strides
    arguments = (
        output.strides[:2],
        share_stride,
        tuple(lse_strides),
        output.shape[0],
        share,
    )
    return Launch(weigh_share_kernel, (programs,), arguments, constants)


@lru_cache(maxsize=4096)
def prepare_merge(*signatures: tuple | None) -> Launch | None:
    """Checks the arguments of `merge_shares` and plans its launch."""
    output, output_lse, results, lses = specs_of(signatures)
    check_results(output, results, lses)
    if output_lse is not None:
        dims = ("num_tokens", "num_heads")
        check_shape("output_lse", output_lse, dims, output.shape[:2])
        check_dtype("output_lse", output_lse, (torch.float32,))
        check_last_stride("output_lse", output_lse)
        check_device("output_lse", output_lse, "output", output)
    constants = tile_constants(output, lses)
    programs = num_programs(output, constants)
    if programs == 0:
        return None
    arguments = (
        output.strides[:2],
        output_lse.strides[0] if output_lse else 0,
        results.strides[0],
        results.strides[1:3],
        lses.strides[0],
        lses.strides[1:],
        output.shape[0],
    )
    constants["NUM_RESULTS"] = results.shape[0]
    return Launch(merge_shares_kernel, (programs,), arguments, constants)


def weigh_share(output: torch.Tensor, lses: torch.Tensor, share: int) -> None:
    """Multiplies one share's result by its weight, so that the sum of all is the mean.

    Args:
        output: [num_tokens, num_heads, head_size] float16, bfloat16 or float32, of this
            share; weighted in place. Rows of LSE -inf become 0.
        lses: [num_shares, num_tokens, num_heads] float32, natural logarithms, of all
            shares; -inf where a share has no key.
        share: which is this one.

    Raises:
        ValueError: naming the argument that does not fit.

    """
    check_tensor("output", output)
    check_tensor("lses", lses)
    launch = prepare_weighing(share, signature(output), signature(lses))
    if launch is not None:
        launch(output, lses)


def merge_shares(
    output: torch.Tensor,
    output_lse: torch.Tensor | None,
    results: torch.Tensor,
    lses: torch.Tensor,
) -> None:
    """Joins attention over disjoint shares of the keys; arithmetic is in fp32.

    Args:
        output: [num_tokens, num_heads, head_size] float16, bfloat16 or float32; holds
            the result over keys that are in no share, if output_lse is given, and
            receives the result over all. Rows without any key become 0.
        output_lse: [num_tokens, num_heads] float32, of the result in output. None:
            there is none yet.
        results: [num_shares, num_tokens, num_heads, head_size] of output's dtype, of
            each share; or [1, ...], the sum of all that `weigh_share` has weighted.
        lses: [num_shares, num_tokens, num_heads] float32, natural logarithms, of all
            shares; -inf where a share has no key: what its result is does not matter.

    Raises:
        ValueError: naming the argument that does not fit.

    """
    tensors = (output, output_lse, results, lses)
    for name, tensor in zip(("output", "output_lse", "results", "lses"), tensors):
        if tensor is not None or name != "output_lse":
            check_tensor(name, tensor)
    launch = prepare_merge(*(None if t is None else signature(t) for t in tensors))
    if launch is not None:
        launch(*tensors)
