# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Writes keys and values into a cache with a scale for every token and head.

A program takes some (token, head) rows of K and of V whole, so that a row's scale, its
elements and what they are stored as come of one load.  Formats as in vLLM, which
rounds integers half away from zero and keeps scales from 1e-6 on:

    int8    scale = max |x| / 127          n = round(x / scale)
    fp8     scale = max |x| / largest      n = x / scale in e4m3, largest: 448, fnuz 224
    int4    scale = (max x - min x) / 15   n = round(x / scale + zero), x rotated,
            zero = round(-min x / scale)   both from 0 to 15

A row with a NaN gets the scale NaN where its elements cannot hold one.
"""

import math
from functools import lru_cache

import torch

from vllm.triton_utils import tl, triton

from .checks import TensorSpec, check_dtype, check_shape, free_strides, reject
from .fp8 import FP8_DTYPES, to_fp8, triton_fp8
from .kv_format import in_elements
from .launch import Launch
from .plan import (
    INT4_HEAD_MULTIPLE,
    KV_INT4_DTYPE,
    KV_SCALED_DTYPES,
    Shape,
)
from .rotation import rotate_rows

# What a row's largest magnitude becomes.
LARGEST_FP8 = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 224.0}
# Elements of K, and as many of V, that a program moves.
TILE = 2048
# Fewest rows of a matrix product.
MIN_ROWS_INT4 = 16
# Farther away V is in no page of K.
MAX_VALUE_OFFSET = 1024
SMALLEST_SCALE: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def round_half_away(x, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Integers nearest to x, as fp32 whose fraction is yet to be cut off, in limits."""
    return tl.clamp(tl.where(x >= 0, x + 0.5, x - 0.5), LOWEST, HIGHEST)


@triton.jit
def symmetric_scale(rows, LARGEST: tl.constexpr):
    """[R] scales with which the largest magnitude of a row becomes LARGEST."""
    scale = tl.div_rn(tl.max(tl.abs(rows), 1), LARGEST)
    return tl.maximum(scale, SMALLEST_SCALE)


@triton.jit
def spoil(scale, rows):
    """The scales, NaN for rows [R, D] with a NaN."""
    has_nan = tl.max((rows != rows).to(tl.int32), 1)
    return tl.where(has_nan != 0, float("nan"), scale)


@triton.jit
def quantize_int4(rows, HEAD_SIZE: tl.constexpr):
    """Bytes [R, D / 2] and scales [R], with the zero points in their lowest bits."""
    R: tl.constexpr = rows.shape[0]
    D: tl.constexpr = rows.shape[1]
    exists = (tl.arange(0, D) < HEAD_SIZE)[None, :]
    lowest = tl.min(tl.where(exists, rows, float("inf")), 1)
    highest = tl.max(tl.where(exists, rows, float("-inf")), 1)
    scale = tl.maximum(tl.div_rn(highest - lowest, 15.0), SMALLEST_SCALE)
    zero = round_half_away(tl.div_rn(-lowest, scale), 0.0, 15.0).to(tl.int32)
    steps = rows * tl.div_rn(1.0, scale)[:, None] + zero.to(tl.float32)[:, None]
    steps = round_half_away(steps, 0.0, 15.0).to(tl.uint8)
    even, odd = tl.split(tl.reshape(steps, [R, D // 2, 2]))
    bits = (spoil(scale, rows).to(tl.int32, bitcast=True) & -16) | zero
    return even | (odd << 4), bits.to(tl.float32, bitcast=True)


@triton.jit
def quantize(
    rows,  # [R, D] fp32, 0 behind the head
    HEAD_SIZE: tl.constexpr,
    INT4: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    STORED: tl.constexpr,
):
    """What is stored of the rows, [R, D] or of int4 [R, D / 2], and scales [R]."""
    if INT4:
        stored, scale = quantize_int4(rows, HEAD_SIZE)
    elif FP8 is not None:
        scale = symmetric_scale(rows, FP8_MAX)
        quotient = rows * tl.div_rn(1.0, scale)[:, None]
        stored = to_fp8(quotient, FP8, FP8_MAX, STORED)
    else:
        scale = symmetric_scale(rows, 127.0)
        quotient = rows * tl.div_rn(1.0, scale)[:, None]
        stored = round_half_away(quotient, -128.0, 127.0).to(tl.int8)
        scale = spoil(scale, rows)
    return stored, scale


@triton.jit
def load_rows(
    source_ptr,  # [num_tokens, NUM_KV_HEADS, HEAD_SIZE]
    strides,  # (token, head)
    token,  # [R] int64
    head,
    live,
    matrix_ptr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    INT4: tl.constexpr,
):
    """[R, HEAD_PADDED] fp32 rows of K or V, for int4 rotated."""
    row_ptrs = source_ptr + token * strides[0] + head * strides[1]
    if INT4:
        rows = rotate_rows(row_ptrs, live, matrix_ptr, HEAD_SIZE, HEAD_PADDED)
        rows = rows.to(source_ptr.dtype.element_ty)  # as vLLM rounds them
    else:
        dims = tl.arange(0, HEAD_PADDED)
        rows = tl.load(
            row_ptrs[:, None] + dims[None, :],
            mask=live[:, None] & (dims < HEAD_SIZE)[None, :],
            other=0.0,
        )
    return rows.to(tl.float32)


@triton.jit
def store_rows(
    cache,  # (pointer to [num_blocks, page, heads, width], its strides)
    scales,  # (pointer to [num_blocks, page, heads], its strides)
    stored,  # [R, W]
    scale,  # [R]
    block,  # [R] int64
    slot,
    head,
    owned,
    WIDTH: tl.constexpr,
):
    W: tl.constexpr = stored.shape[1]
    element = tl.arange(0, W)
    offsets = block * cache[1][0] + slot * cache[1][1] + head * cache[1][2]
    tl.store(
        cache[0] + offsets[:, None] + element[None, :],
        stored,
        mask=owned[:, None] & (element < WIDTH)[None, :],
    )
    offsets = block * scales[1][0] + slot * scales[1][1] + head * scales[1][2]
    tl.store(scales[0] + offsets, scale, mask=owned)


@triton.jit(do_not_specialize=["slot_mapping_ptr", "num_tokens"])
def token_head_cache_kernel(
    key_ptr,  # [num_tokens or more, NUM_KV_HEADS, HEAD_SIZE]
    value_ptr,
    key_cache_ptr,  # [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE or half of it]
    value_cache_ptr,
    slot_mapping_ptr,  # [num_tokens]
    k_scale_ptr,  # [num_blocks, BLOCK_SIZE, NUM_KV_HEADS]
    v_scale_ptr,
    matrix_ptr,  # [HEAD_PADDED, HEAD_PADDED] rotation of int4, or None
    key_strides,
    value_strides,
    key_cache_strides,
    value_cache_strides,
    k_scale_strides,
    v_scale_strides,
    num_tokens,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INT4: tl.constexpr,
    FP8: tl.constexpr,  # format of an fp8 cache, or None
    FP8_MAX: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,  # elements that the caches' strides are given in
    VALUE_OFFSET: tl.constexpr,  # of V behind K in a page of both; None: elsewhere
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // NUM_KV_HEADS).to(tl.int64)
    head = (row % NUM_KV_HEADS).to(tl.int64)
    live = token < num_tokens
    slot = tl.load(slot_mapping_ptr + token, mask=live, other=-1).to(tl.int64)
    key = load_rows(
        key_ptr, key_strides, token, head, live, matrix_ptr,
        HEAD_SIZE, HEAD_PADDED, INT4,
    )  # fmt: skip
    value = load_rows(
        value_ptr, value_strides, token, head, live, matrix_ptr,
        HEAD_SIZE, HEAD_PADDED, INT4,
    )  # fmt: skip
    STORED: tl.constexpr = key_cache_ptr.dtype.element_ty
    WIDTH: tl.constexpr = HEAD_SIZE // 2 if INT4 else HEAD_SIZE
    key, k_scale = quantize(key, HEAD_SIZE, INT4, FP8, FP8_MAX, STORED)
    value, v_scale = quantize(value, HEAD_SIZE, INT4, FP8, FP8_MAX, STORED)
    key_cache_strides = in_elements(key_cache_strides, STRIDE_UNIT)
    value_cache_strides = in_elements(value_cache_strides, STRIDE_UNIT)
    if VALUE_OFFSET is not None:
        value_cache_ptr = key_cache_ptr + VALUE_OFFSET
    owned = slot >= 0
    block = slot // BLOCK_SIZE
    slot = slot % BLOCK_SIZE
    store_rows(
        (key_cache_ptr, key_cache_strides), (k_scale_ptr, k_scale_strides),
        key, k_scale, block, slot, head, owned, WIDTH,
    )  # fmt: skip
    store_rows(
        (value_cache_ptr, value_cache_strides), (v_scale_ptr, v_scale_strides),
        value, v_scale, block, slot, head, owned, WIDTH,
    )  # fmt: skip


def check_scales(
    key: TensorSpec,
    key_cache: TensorSpec,
    k_scale: TensorSpec | None,
    v_scale: TensorSpec | None,
) -> None:
    """Raises the ValueErrors of scales per token and head, and of int4."""
    check_dtype("key_cache", key_cache, KV_SCALED_DTYPES, "Or pass one scale.")
    dims = ("num_blocks", "block_size", "num_kv_heads")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            reject(name, None, f"[{', '.join(dims)}], one per token and head")
        check_shape(name, scale, dims, key_cache.shape[:3])
        check_dtype(name, scale, (torch.float32,))
    if key_cache.dtype == KV_INT4_DTYPE and key.shape[-1] % INT4_HEAD_MULTIPLE:
        allowed = f"a multiple of {INT4_HEAD_MULTIPLE} with an int4 cache"
        reject("key", f"head_size {key.shape[-1]}", allowed)


def padded_head(head_size: int, cache_dtype: torch.dtype) -> int:
    return Shape(1, 1, head_size, 16, torch.float16, cache_dtype).head_padded


def offset_in_page(key_cache: torch.Tensor, value_cache: torch.Tensor) -> int | None:
    """Elements from each row of K to that of V, where pages hold both; else None.

    For kernels a constant: what they know of the alignment of K is then true of V.
    """
    if key_cache.stride() != value_cache.stride():
        return None
    offset = value_cache.data_ptr() - key_cache.data_ptr()
    return offset if 0 < offset < MAX_VALUE_OFFSET else None


@lru_cache(maxsize=4096)
def plan_launch(
    specs: tuple[TensorSpec, ...], value_offset: int | None, num_tokens: int
) -> Launch:
    """Launch for K, V, their caches and their scales, in this order."""
    key, _, key_cache = specs[:3]
    _, num_kv_heads, head_size = key.shape
    head_padded = padded_head(head_size, key_cache.dtype)
    is_int4 = key_cache.dtype == KV_INT4_DTYPE
    rows = max(TILE // head_padded, MIN_ROWS_INT4 if is_int4 else 1)
    is_fp8 = key_cache.dtype in FP8_DTYPES
    strides = [free_strides(spec) for spec in specs]
    caches = [s[:-1] for s in strides[2:4]]
    unit = math.gcd(16, *caches[0], *caches[1])
    caches = [tuple(stride // unit for stride in three) for three in caches]
    return Launch(
        token_head_cache_kernel,
        (triton.cdiv(num_tokens * num_kv_heads, rows),),
        (*(s[:-1] for s in strides[:2]), *caches, *strides[4:], num_tokens),
        dict(
            NUM_KV_HEADS=num_kv_heads,
            HEAD_SIZE=head_size,
            HEAD_PADDED=head_padded,
            BLOCK_SIZE=key_cache.shape[1],
            INT4=is_int4,
            FP8=triton_fp8(key_cache.dtype) if is_fp8 else None,
            FP8_MAX=LARGEST_FP8[key_cache.dtype] if is_fp8 else None,
            STRIDE_UNIT=unit,
            VALUE_OFFSET=value_offset,
            ROWS=rows,
            num_warps=4 if head_padded <= 256 else 8,
            num_stages=1,
            # A product and a sum in one rounding would store other bytes at ties.
            enable_fp_fusion=False,
        ),
    )
