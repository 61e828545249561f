# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Writes the keys and values of new tokens into their slots of the paged KV cache.

Bound by memory, or by the latency of a launch when tokens are few.  One launch moves
K and V; a program takes some tokens and a run of their elements, all heads in a row,
so that a warp reads and writes whole lines, 16 bytes a thread.  Everything is loaded
before anything is stored, and keys do not wait for their slots: one round trip to
memory, not two.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from vllm.triton_utils import tl, triton

from .checks import (
    CACHE_SCALES,
    TensorSpec,
    check_device,
    check_dtype,
    check_last_stride,
    check_scale,
    check_shape,
    free_strides,
    reject,
    signatures_of,
    specs_of,
)
from .fp8 import FP8_DTYPES, divide_to_fp8, storage_view, triton_fp8
from .launch import BoundLaunch, Launch
from .plan import KV_INT4_DTYPE, KV_INTEGER_DTYPES, this_device
from .rotation import rotation_matrix
from .token_head_cache import (
    check_scales,
    offset_in_page,
    padded_head,
    plan_launch,
)

SOURCE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OPTIONAL = ("k_scale", "v_scale")

# Elements of K, and as many of V, that a program moves.  A thread moves 8 or 16.
SMALL_TILE = 1024
LARGE_TILE = 4096
# Tiles become large where that still leaves this many programs to each multiprocessor.
LARGE_TILE_MIN_PROGRAMS = 4
# Part of a row's elements that may be padding in the last of its tiles.
MAX_PADDING = 1 / 8


class Tile(NamedTuple):
    """One compiled variant for a given cache layout."""

    tokens: int
    elements: int  # of the num_kv_heads * head_size of a token
    num_warps: int


@triton.jit
def load_rows(
    source_ptr,  # [num_tokens, heads, head_size]
    strides,  # (token, head)
    tokens,  # int64
    head,  # int64
    dim,
    mask,
):
    """[tokens, elements] of K or V."""
    offsets = (tokens * strides[0])[:, None] + (head * strides[1] + dim)[None, :]
    return tl.load(source_ptr + offsets, mask=mask)


@triton.jit
def store_rows(
    cache_ptr,  # [num_blocks, page, heads, head_size]
    strides,  # (block, slot in the page, head)
    rows,  # [tokens, elements]
    block,  # int64
    slot,  # int64
    head,  # int64
    dim,
    mask,
):
    offsets = (block * strides[0] + slot * strides[1])[:, None]
    offsets += (head * strides[2] + dim)[None, :]
    tl.store(cache_ptr + offsets, rows, mask=mask)


# Only addresses of K and V, here and in the cache, are worth a variant by alignment.
@triton.jit(
    do_not_specialize=["slot_mapping_ptr", "k_scale_ptr", "v_scale_ptr", "num_tokens"]
)
def reshape_and_cache_kernel(
    num_tokens,
    key_ptr,  # [num_tokens or more, NUM_KV_HEADS, HEAD_SIZE]
    value_ptr,
    slot_mapping_ptr,  # [num_tokens]
    key_cache_ptr,  # [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE]
    value_cache_ptr,
    k_scale_ptr,  # [1], or None where nothing is scaled
    v_scale_ptr,
    key_strides,
    value_strides,
    key_cache_strides,
    value_cache_strides,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr,  # the cache's format, None for a cache of the keys' dtype
    FP8_MAX: tl.constexpr,
    TOKENS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    head = (element // HEAD_SIZE).to(tl.int64)
    dim = element % HEAD_SIZE
    live = token < num_tokens
    in_row = (element < NUM_KV_HEADS * HEAD_SIZE)[None, :]
    slot = tl.load(slot_mapping_ptr + token, mask=live, other=-1).to(tl.int64)

    row = token.to(tl.int64)
    loaded = live[:, None] & in_row
    key = load_rows(key_ptr, key_strides, row, head, dim, loaded)
    value = load_rows(value_ptr, value_strides, row, head, dim, loaded)
    if FP8 is not None:
        STORED: tl.constexpr = key_cache_ptr.dtype.element_ty
        k_scale = 1.0 if k_scale_ptr is None else tl.load(k_scale_ptr)
        v_scale = 1.0 if v_scale_ptr is None else tl.load(v_scale_ptr)
        key = divide_to_fp8(key, k_scale, FP8, FP8_MAX, STORED)
        value = divide_to_fp8(value, v_scale, FP8, FP8_MAX, STORED)

    stored = (slot >= 0)[:, None] & in_row
    block = slot // BLOCK_SIZE
    slot = slot % BLOCK_SIZE
    store_rows(key_cache_ptr, key_cache_strides, key, block, slot, head, dim, stored)
    store_rows(
        value_cache_ptr, value_cache_strides, value, block, slot, head, dim, stored
    )


def min_large_tokens(row_size: int, num_units: int) -> int:
    """The fewest tokens that get the large tile; arguments as in `plan_tile`."""
    return triton.cdiv(LARGE_TILE * LARGE_TILE_MIN_PROGRAMS * num_units, row_size)


def plan_tile(num_tokens: int, row_size: int, num_units: int) -> Tile:
    """Chooses one of the two tiles that exist for a row of this size.

    Args:
        num_tokens: Tokens to write.
        row_size: num_kv_heads * head_size.
        num_units: Multiprocessors of the device.

    """
    elements = SMALL_TILE
    while elements > 64 and -row_size % elements > MAX_PADDING * row_size:
        elements //= 2
    if -row_size % elements > MAX_PADDING * row_size:  # such as one head of 80
        elements = min(SMALL_TILE, triton.next_power_of_2(row_size))
    if num_tokens >= min_large_tokens(row_size, num_units):
        return Tile(LARGE_TILE // elements, elements, num_warps=8)
    return Tile(SMALL_TILE // elements, elements, num_warps=4)


def check_arguments(
    key: TensorSpec,
    value: TensorSpec,
    key_cache: TensorSpec,
    value_cache: TensorSpec,
    slot_mapping: TensorSpec,
    k_scale: TensorSpec | None,
    v_scale: TensorSpec | None,
) -> None:
    """Raises the ValueErrors of `reshape_and_cache`."""
    rows = ("num_tokens", "num_kv_heads", "head_size")
    check_shape("key", key, rows, (None, None, None))
    check_dtype("key", key, SOURCE_DTYPES)
    check_last_stride("key", key)
    num_rows, num_kv_heads, head_size = key.shape
    if 0 in (num_kv_heads, head_size):
        some = "one head or more, of one element or more"
        reject("key", f"shape {list(key.shape)}", some)

    advice = "K and V need the same number of tokens, of heads and head size."
    check_shape("value", value, rows, key.shape, advice)
    check_dtype("value", value, (key.dtype,), "K and V need the same dtype.")
    check_last_stride("value", value)

    pages = ("num_blocks", "block_size", "num_kv_heads", "head_size")
    advice = (
        "Pass a view with the heads of key, such as cache.transpose(1, 2) of an HND"
        " cache or one half of a page that packs K and V."
    )
    width = head_size
    if key_cache.dtype == KV_INT4_DTYPE:
        width = head_size // 2
        advice = (
            "torch.uint8 stands for int4, two elements to a byte. View a cache of other"
            " bytes with cache.view(torch.float8_e4m3fn)."
        )
    check_shape(
        "key_cache", key_cache, pages, (None, None, num_kv_heads, width), advice
    )
    if key_cache.shape[1] == 0:
        reject("key_cache", f"shape {list(key_cache.shape)}", "pages of slots")
    advice = "View a cache of bytes with cache.view(torch.float8_e4m3fn)."
    allowed = (key.dtype, *FP8_DTYPES, *KV_INTEGER_DTYPES)
    check_dtype("key_cache", key_cache, allowed, advice)
    check_last_stride("key_cache", key_cache)
    advice = "K and V need pages of the same shape."
    check_shape("value_cache", value_cache, pages, key_cache.shape, advice)
    advice = "K and V need caches of the same dtype."
    check_dtype("value_cache", value_cache, (key_cache.dtype,), advice)
    check_last_stride("value_cache", value_cache)

    check_shape("slot_mapping", slot_mapping, ("num_tokens",), (None,))
    check_dtype("slot_mapping", slot_mapping, (torch.int64,))
    check_last_stride("slot_mapping", slot_mapping)
    if slot_mapping.shape[0] > num_rows:
        reject(
            "slot_mapping",
            f"{slot_mapping.shape[0]} slots",
            f"at most {num_rows}, the tokens of key",
            "Cut it with slot_mapping[:key.shape[0]].",
        )

    named = dict(
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
    )
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    named |= {name: scale for name, scale in scales.items() if scale is not None}
    for name, spec in named.items():
        check_device(name, spec, "key", key)
    if has_token_scales(key_cache.dtype, k_scale.shape if k_scale else None):
        check_scales(key, key_cache, k_scale, v_scale)
        return
    for name, scale in scales.items():
        if scale is not None:
            check_scale(name, scale, "key", key, CACHE_SCALES)


def has_token_scales(
    cache_dtype: torch.dtype, k_scale_shape: tuple[int, ...] | None
) -> bool:
    """Whether there is a scale for every token and head, or has to be."""
    return cache_dtype in KV_INTEGER_DTYPES or (
        k_scale_shape is not None and len(k_scale_shape) == 3
    )


@lru_cache(maxsize=4096)
def prepare_token_scales(
    value_offset: int | None, *signatures: tuple | None
) -> Launch | None:
    """As `prepare`, where every token and head has a scale; None without tokens.

    Args:
        value_offset: see `offset_in_page`.
        *signatures: of all tensors.

    """
    specs = specs_of(signatures)
    check_arguments(*specs)
    num_tokens = specs[4].shape[0]
    if num_tokens == 0:
        return None
    return plan_launch((*specs[:4], *specs[5:]), value_offset, num_tokens)


class Launches(NamedTuple):
    """The launches for all numbers of tokens, by the tile."""

    small: Launch
    large: Launch
    large_from: int  # tokens


@lru_cache(maxsize=4096)
def plan_launches(
    dtype: torch.dtype,
    device: torch.device,
    cache_dtype: torch.dtype,
    has_scales: tuple[bool, bool],
    row: tuple[int, int],
    block_size: int,
    strides: tuple[tuple[int, ...], ...],
) -> Launches:
    """Plans the launches for a layout.

    Args:
        dtype: of keys and values.
        device: where all is.
        cache_dtype: of the caches.
        has_scales: whether K and V come with a scale.
        row: num_kv_heads and head_size.
        block_size: slots of a page.
        strides: of key, value, key_cache and value_cache, without the last.

    """
    num_units = this_device(device.index).num_units
    row_size = math.prod(row)
    is_fp8 = cache_dtype in FP8_DTYPES

    def plan(tile: Tile) -> Launch:
        return Launch(
            reshape_and_cache_kernel,
            (1, triton.cdiv(row_size, tile.elements)),  # for up to tile.tokens
            strides,
            dict(
                NUM_KV_HEADS=row[0],
                HEAD_SIZE=row[1],
                BLOCK_SIZE=block_size,
                FP8=triton_fp8(cache_dtype) if is_fp8 else None,
                FP8_MAX=torch.finfo(cache_dtype).max if is_fp8 else None,
                TOKENS=tile.tokens,
                ELEMENTS=tile.elements,
                num_warps=tile.num_warps,
            ),
        )

    large_from = min_large_tokens(row_size, num_units)
    small, large = (
        plan(plan_tile(tokens, row_size, num_units)) for tokens in (1, large_from)
    )
    return Launches(small, large, large_from)


@lru_cache(maxsize=4096)
def prepare(*signatures: tuple | None) -> Launches:
    """Checks the arguments of `reshape_and_cache` and plans its launches."""
    specs = specs_of(signatures)
    check_arguments(*specs)
    key, _, key_cache = specs[:3]
    return plan_launches(
        key.dtype,
        key.device,
        key_cache.dtype,
        (specs[5] is not None, specs[6] is not None),
        key.shape[1:],
        key_cache.shape[1],
        tuple(free_strides(spec)[:-1] for spec in specs[:4]),
    )


class PreparedWrite:
    """A checked call of `reshape_and_cache`, to be repeated with other tokens.

    A repetition writes to the same caches. It is right for any number of tokens, as
    long as the caches and their scales stay where they are, and keys and values keep
    their dtype and strides; after a call with one token, whose stride counts for
    nothing, for one token alone. None of that is checked again.
    """

    def __init__(self, launches: Launches, *tensors: torch.Tensor | None) -> None:
        """Binds the launches to key_cache, value_cache, k_scale and v_scale."""
        *tiles, self.large_from = launches
        # Each with the tokens of a program, and the programs for so many tokens.
        bound: list[tuple[BoundLaunch, Any, int]] = [
            (launch.bind(*tensors), launch.constants["TOKENS"], launch.grid[1])
            for launch in tiles
        ]
        self.small, self.large = bound

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        num_tokens: int | None = None,
    ) -> None:
        """Writes; arguments as for `reshape_and_cache`, and their number if known."""
        if num_tokens is None:
            num_tokens = slot_mapping.shape[0]
        if num_tokens == 0:
            return
        is_small = num_tokens < self.large_from
        write, tokens, programs = self.small if is_small else self.large
        grid = (-(-num_tokens // tokens), programs)
        write(key, value, slot_mapping, varying=(num_tokens,), grid=grid)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> PreparedWrite | None:
    """Copies each token's key and value to its slot in the KV cache.

    Args:
        key: [num_tokens or more, num_kv_heads, head_size], fp16, bf16 or fp32.  Any
            strides with the last 1; rows past the end of slot_mapping are padding.
        value: As key, with its own strides.
        key_cache: [num_blocks, block_size, num_kv_heads, head_size], key's dtype or an
            fp8 dtype, int8, or uint8 [..., head_size / 2] for int4, two elements to a
            byte.  Any strides with the last 1: NHD, HND or half of a packed page.
        value_cache: As key_cache, with its own strides.
        slot_mapping: [num_tokens] int64, block * block_size + place in the block.
            Tokens with a negative slot are skipped.  Slots must lie within the cache
            and differ; neither is checked.
        k_scale: fp32, one element, on the device; None is 1.  An fp8 cache holds
            key / k_scale, saturated to the finite range of the dtype; NaN stays NaN.
            Without effect on caches of key's dtype.  Or fp32
            [num_blocks, block_size, num_kv_heads], any strides, for e4m3 and integers,
            which need it: receives a scale for every token and head that is written,
            see `token_head_cache`.
        v_scale: The same for values.

    Returns:
        What writes again, without checks, where only key, value and slot_mapping are
        others; None where every token and head has a scale, or there is no token.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or stride.

    """
    signatures = signatures_of(
        dict(
            key=key,
            value=value,
            key_cache=key_cache,
            value_cache=value_cache,
            slot_mapping=slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
        ),
        optional=OPTIONAL,
    )
    k_scale_shape = None if k_scale is None else k_scale.shape
    if has_token_scales(key_cache.dtype, k_scale_shape):
        value_offset = offset_in_page(key_cache, value_cache)
        launch = prepare_token_scales(value_offset, *signatures)
        rotation = None
        if key_cache.dtype == KV_INT4_DTYPE:
            padded = padded_head(key.shape[-1], KV_INT4_DTYPE)
            rotation = rotation_matrix(key.shape[-1], padded, key.dtype, key.device)
        elif key_cache.dtype in FP8_DTYPES:
            key_cache = storage_view(key_cache)
            value_cache = storage_view(value_cache)
        if launch is not None:
            caches = (key_cache, value_cache)
            launch(key, value, *caches, slot_mapping, k_scale, v_scale, rotation)
        return None
    launches = prepare(*signatures)
    if slot_mapping.shape[0] == 0:  # strides of no token are not those of others
        return None
    if key_cache.dtype == key.dtype:
        k_scale = v_scale = None
    else:
        key_cache = storage_view(key_cache)
        value_cache = storage_view(value_cache)
    prepared = PreparedWrite(launches, key_cache, value_cache, k_scale, v_scale)
    prepared(key, value, slot_mapping)
    return prepared


def warm_up(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    dtype: torch.dtype,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Compiles all that `reshape_and_cache` can need for these caches; writes nothing.

    Args:
        key_cache: As in `reshape_and_cache`.
        value_cache: As in `reshape_and_cache`.
        dtype: Of the keys to come.
        k_scale: None if it will be None, and otherwise any scale.
        v_scale: The same for values.

    """
    _, _, num_kv_heads, head_size = key_cache.shape
    if key_cache.dtype == KV_INT4_DTYPE:
        head_size *= 2
    device = key_cache.device
    num_units = this_device(device.index).num_units
    # One row for all tokens: only the number of tokens chooses the variant.
    row = torch.zeros(1, num_kv_heads, head_size, dtype=dtype, device=device)
    for num_tokens in (1, min_large_tokens(num_kv_heads * head_size, num_units)):
        rows = row.expand(num_tokens, -1, -1)
        no_slots = torch.full((num_tokens,), -1, dtype=torch.int64, device=device)
        reshape_and_cache(
            rows,
            rows,
            key_cache,
            value_cache,
            no_slots,
            k_scale=k_scale,
            v_scale=v_scale,
        )
