# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The definition of caches with scales per token and head, in plain PyTorch.

What a row becomes, what it stands for, and pages that hold rows and scales as vLLM
lays them out. Shares no code with the kernels.
"""

import math
from typing import NamedTuple

import torch

from tests.kernels.attention.conch_reference import FP8_DTYPES, Attention

INT4 = torch.uint8  # two elements to a byte
SMALLEST_SCALE = 1e-6


class TokenHeadCaches(NamedTuple):
    """K and V, [num_blocks, block_size, num_kv_heads, width], and their scales."""

    key: torch.Tensor
    value: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor


def width_of(head_size: int, dtype: torch.dtype) -> int:
    return head_size // 2 if dtype == INT4 else head_size


def hadamard_signs(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0x9E3779B9)
    return 2.0 * torch.bernoulli(torch.full((size,), 0.5), generator=generator) - 1.0


def rotate(rows: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """The randomised Hadamard transform of int4, in fp64, unnormalised, by butterflies.

    Of each block of the largest power of two that divides the last size.
    """
    size = rows.shape[-1]
    block = size & -size
    signs = hadamard_signs(block).to(rows.device, torch.float64)
    x = rows.double().unflatten(-1, (-1, block))
    if not inverse:
        x = x * signs
    step = 1
    while step < block:
        pairs = x.unflatten(-1, (-1, 2, step))
        low, high = pairs.unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        step *= 2
    if inverse:
        x = x * signs / block
    return x.flatten(-2)


def rounded_as_rotated(query: torch.Tensor) -> torch.Tensor:
    """The query that an int4 cache meets, in fp64: rounded where it is rotated."""
    block = query.shape[-1] & -query.shape[-1]
    norm = 2.0 ** ((block.bit_length() - 1) // 2)
    return rotate((rotate(query) / norm).to(query.dtype), inverse=True) * norm


def shared_out(result: Attention) -> Attention:
    """With errors as of an output that is rounded as rotated, and then rotated back.

    That shares the errors of a block out to all of its elements.
    """
    block = result.output.shape[-1] & -result.output.shape[-1]

    def spread(part: torch.Tensor) -> torch.Tensor:
        squares = part.unflatten(-1, (-1, block)).square()
        return squares.mean(-1, keepdim=True).sqrt().expand_as(squares).flatten(-2)

    return result._replace(
        output_noise=spread(result.output_noise) + spread(result.output),
        output_drift=result.output_drift + spread(result.output_drift),
    )


def half_away(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (x + torch.copysign(torch.full_like(x, 0.5), x)).trunc().clamp(low, high)


def quantize(
    rows: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache of dtype holds of rows [..., head_size], and scales [...] fp32."""
    x, device = rows.cpu().float(), rows.device  # where torch divides exactly
    if dtype == INT4:
        x = rotate(rows.cpu()).to(rows.dtype).float()
        low, high = x.amin(-1), x.amax(-1)
        scale = ((high - low) / 15).clamp(min=SMALLEST_SCALE)
        zero = half_away(-low / scale, 0, 15)
        steps = half_away(x * (1 / scale)[..., None] + zero[..., None], 0, 15)
        even, odd = steps.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        bits = (scale.view(torch.int32) & -16) | zero.int()
        return (even | odd << 4).to(device), bits.view(torch.float32).to(device)
    largest = torch.finfo(dtype).max if dtype in FP8_DTYPES else 127
    if dtype == torch.float8_e4m3fnuz:
        largest = 224.0  # not 240
    scale = (x.abs().amax(-1) / largest).clamp(min=SMALLEST_SCALE)
    quotient = x * (1 / scale)[..., None]
    if dtype in FP8_DTYPES:
        stored = quotient.clamp(-largest, largest).to(dtype)
    else:
        stored = half_away(quotient, -128, 127).to(torch.int8)
    return stored.to(device), scale.to(device)


def dequantize(stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The rows [..., head_size], in fp64, that a cache stands for."""
    if stored.dtype != INT4:
        return stored.double() * scale[..., None].double()
    bits = scale.contiguous().view(torch.int32)
    zero = (bits & 15).double()
    scale = (bits & -16).view(torch.float32).double()
    steps = torch.stack((stored & 15, stored >> 4), -1).flatten(-2).double()
    return rotate((steps - zero[..., None]) * scale[..., None], inverse=True)


def poisoned(*shape: int, device: torch.device | str) -> torch.Tensor:
    """Bytes that are NaN as fp8, as fp16 and as fp32, and huge as integers."""
    return torch.full(shape, 0x7F, dtype=torch.uint8, device=device)


def make_pages(
    layout: str,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> TokenHeadCaches:
    """Poisoned pages in which [K | scale | V | scale] stand for each token and head.

    Layouts are those of vLLM, "NHD" and "HND", and "apart": scales in tensors of their
    own, with gaps everywhere, K and V with unlike strides.
    """
    width = width_of(head_size, dtype)
    if layout == "apart":
        key = poisoned(num_blocks, block_size, num_kv_heads, width + 6, device=device)
        value = poisoned(
            num_blocks + 1, num_kv_heads, block_size, width + 2, device=device
        )
        value = value[1:].transpose(1, 2)
        scales = torch.full((2, num_kv_heads + 1, num_blocks, block_size), math.nan)
        k_scale, v_scale = scales.to(device)[:, 1:].permute(0, 2, 3, 1)
        parts = [part[..., :width].view(dtype) for part in (key, value)]
        return TokenHeadCaches(*parts, k_scale, v_scale)
    content = 2 * (width + 4)
    if layout == "NHD":
        pages = poisoned(num_blocks, block_size, num_kv_heads, content, device=device)
    else:
        pages = poisoned(num_blocks, num_kv_heads, block_size, content, device=device)
        pages = pages.transpose(1, 2)
    half = width + 4
    views = [pages[..., :width], pages[..., half : half + width]]
    scales = pages.view(torch.float32)
    return TokenHeadCaches(
        *(view.view(dtype) for view in views),
        scales[..., width // 4],
        scales[..., (half + width) // 4],
    )


PAGE_LAYOUTS = ["NHD", "HND", "apart"]
