# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The rotation of queries, keys and values that an int4 cache goes with.

Sixteen steps from a row's smallest to its largest element serve a row with outliers
badly.  A randomised Hadamard transform, x -> H S x, spreads them (QuIP#, Tseng et al.
2024; QuaRot, Ashkboos et al. 2024): S changes the signs of some elements, H has 1 and
-1 everywhere and H H = b.  So scores of rotated queries and rotated keys are b times
those of the others, and the rotated output, transformed once more, is b times the
output.  H is of the largest power of two b that divides the head size, and applied to
each b elements of a head.

Signs, order and norm are those of vLLM's int4_per_token_head.  As a matrix the rotation
is a product like any other, of 1 and -1, which every dtype holds exactly.
"""

from functools import lru_cache

import torch

from vllm.triton_utils import tl, triton

from .fp8 import divide_to_fp8, triton_fp8
from .launch import Launch

# What vLLM seeds the signs with.
SIGN_SEED = 0x9E3779B9
ROWS = 32  # of a program
# Elements of a row that are multiplied at once.
CHUNK: tl.constexpr = tl.constexpr(32)


def block_size(head_size: int) -> int:
    """Elements that are rotated together."""
    return head_size & -head_size


def split_norm(head_size: int) -> tuple[float, float]:
    """Powers of two, of product b: by what rotated queries, and scores, are divided.

    Divided by about sqrt(b) rotated queries are as large as they were.
    """
    exponent = block_size(head_size).bit_length() - 1
    return 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)


def signs(size: int) -> torch.Tensor:
    """[size] the diagonal of S, on the CPU whatever the default device is."""
    generator = torch.Generator("cpu").manual_seed(SIGN_SEED)
    halves = torch.full((size,), 0.5, device="cpu")
    return 2 * torch.bernoulli(halves, generator=generator) - 1


def hadamard(size: int) -> torch.Tensor:
    """[size, size] H in Sylvester's order, on the CPU."""
    matrix = torch.ones(1, 1, device="cpu")
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    while len(matrix) < size:
        matrix = torch.kron(step, matrix)
    return matrix


@lru_cache(maxsize=64)
def rotation_matrix(
    head_size: int,
    head_padded: int,
    dtype: torch.dtype,
    device: torch.device,
    divisor: float = 1.0,
    inverse: bool = False,
) -> torch.Tensor:
    """[head_padded, head_padded] M with x @ M the rotated row; 0 behind the head.

    Args:
        head_size: elements of a row.
        head_padded: of the matrix, at least as many.
        dtype: of the matrix.
        device: of the matrix.
        divisor: power of two by which the result is to be divided.
        inverse: M takes rotated rows to b times the others.

    """
    block = block_size(head_size)
    one = hadamard(block) * signs(block) / divisor  # H S
    matrix = torch.zeros(head_padded, head_padded, device="cpu")
    for first in range(0, head_size, block):
        matrix[first : first + block, first : first + block] = one if inverse else one.T
    return matrix.to(device, dtype)


@triton.jit
def rotate_rows(
    row_ptrs,  # [R]
    row_valid,  # [R]
    matrix_ptr,  # [HEAD_PADDED, HEAD_PADDED]
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """[R, HEAD_PADDED] products in fp32 of rows and matrix."""
    R: tl.constexpr = row_ptrs.shape[0]
    dims = tl.arange(0, HEAD_PADDED)
    acc = tl.zeros([R, HEAD_PADDED], tl.float32)
    for first in range(0, HEAD_SIZE, CHUNK):
        part = first + tl.arange(0, CHUNK)
        rows = tl.load(
            row_ptrs[:, None] + part[None, :],
            mask=row_valid[:, None] & (part < HEAD_SIZE)[None, :],
            other=0.0,
        )
        matrix = tl.load(matrix_ptr + part[:, None] * HEAD_PADDED + dims[None, :])
        acc = tl.dot(rows, matrix, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["first_token_ptr", "end_token_ptr"])
def rotate_kernel(
    target_ptr,  # [num_tokens, NUM_HEADS, HEAD_SIZE]; may be the source
    source_ptr,
    matrix_ptr,  # [HEAD_PADDED, HEAD_PADDED]
    first_token_ptr,  # [1] of the tokens that count
    end_token_ptr,  # [1] one past the last
    scale_ptr,  # [1] by which the result is divided; None: 1
    target_strides,  # (token, head)
    source_strides,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    FP8: tl.constexpr,  # format of a result that is divided, or None
    FP8_MAX: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // NUM_HEADS).to(tl.int64)
    head = row % NUM_HEADS
    valid = (token >= tl.load(first_token_ptr)) & (token < tl.load(end_token_ptr))
    rotated = rotate_rows(
        source_ptr + token * source_strides[0] + head * source_strides[1],
        valid,
        matrix_ptr,
        HEAD_SIZE,
        HEAD_PADDED,
    )
    STORED: tl.constexpr = target_ptr.dtype.element_ty
    if FP8 is not None:
        rotated = divide_to_fp8(rotated, tl.load(scale_ptr), FP8, FP8_MAX, STORED)
    dims = tl.arange(0, HEAD_PADDED)
    offsets = token * target_strides[0] + head * target_strides[1]
    tl.store(
        target_ptr + offsets[:, None] + dims[None, :],
        rotated.to(STORED),
        mask=valid[:, None] & (dims < HEAD_SIZE)[None, :],
    )


@lru_cache(maxsize=1024)
def prepare(
    num_heads: int,
    head_size: int,
    head_padded: int,
    target_strides: tuple[int, int],
    source_strides: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    fp8: torch.dtype | None,
) -> Launch:
    """The launch for a layout and for these dtypes of target and source."""
    return Launch(
        rotate_kernel,
        (1,),
        (target_strides, source_strides),
        dict(
            NUM_HEADS=num_heads,
            HEAD_SIZE=head_size,
            HEAD_PADDED=head_padded,
            ROWS=ROWS,
            FP8=None if fp8 is None else triton_fp8(fp8),
            FP8_MAX=None if fp8 is None else torch.finfo(fp8).max,
            num_warps=4,
            num_stages=1,
        ),
    )


def rotate(
    target: torch.Tensor,
    source: torch.Tensor,
    query_start_loc: torch.Tensor,
    head_padded: int,
    *,
    divisor: float,
    inverse: bool = False,
    scale: torch.Tensor | None = None,
    fp8: torch.dtype | None = None,
) -> None:
    """Rotates the heads of all tokens, see `rotation_matrix`.

    Args:
        target: [num_tokens, num_heads, head_size], the bytes of fp8 if that is given.
            It may be the source.
        source: the same shape, float16, bfloat16 or float32.
        query_start_loc: [num_seqs + 1] int32, rows of no sequence are neither read nor
            written.
        head_padded: head_size padded to a power of two, 32 or more.
        divisor: power of two by which the result is divided.
        inverse: rotates back.
        scale: [1] float32 by which a result in fp8 is divided too.
        fp8: format of the target, None: its dtype.

    """
    tokens, num_heads, head_size = source.shape
    launch = prepare(
        num_heads,
        head_size,
        head_padded,
        target.stride()[:2],
        source.stride()[:2],
        (target.dtype, source.dtype),
        fp8,
    )
    matrix = rotation_matrix(
        head_size, head_padded, source.dtype, source.device, divisor, inverse
    )
    programs = triton.cdiv(tokens * num_heads, ROWS)
    bounds = query_start_loc[:1], query_start_loc[-1:]
    launch(target, source, matrix, *bounds, scale, grid=(programs, 1))
