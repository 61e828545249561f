# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quantises activations to fp8 with one scale per tensor or per token.

Bound by memory.  A given scale takes one pass.  A scale per token takes one pass too,
while a row fits into the registers of one program.  A scale for the whole tensor takes
two: programs leave one maximum each, and all programs of the second pass reduce those
few again instead of meeting at an atomic, which would first have to be cleared.  Maxima
do not depend on an order, so results are the same bits every time.

Scales and bytes are those of vLLM's own kernels, except that NaN stays NaN and that
an all-zero tensor gets a scale above zero.
"""

from functools import cache, lru_cache

import torch

from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

from .checks import (
    TensorSpec,
    check_device,
    check_dtype,
    check_last_stride,
    check_scale,
    check_shape,
    check_tensor,
    free_strides,
    reject,
    signature,
    specs_of,
    whole_number,
)
from .fp8 import FP8_DTYPES, divide_to_fp8, storage_view, to_fp8, triton_fp8
from .launch import Launch
from .plan import this_device

INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Elements that a program moves at a time, where there are few and where many.
SMALL_TILE = 1024
LARGE_TILE = 4096
ELEMENTS_PER_WARP = 512
FEW_WARPS_ELEMENTS = 8192  # 64 in a thread of 4 warps
# Tiles become large where that still leaves this many to each multiprocessor.
LARGE_TILE_MIN_PROGRAMS = 4
# Bytes of input from which a pass leaves the order to the cache; of fewer it has those
# replaced first that it has read. On an H200 16384 x 4096 in bf16 take 53.7 us so, 56.5
# the other way; 4096 x 4096 are faster with it.
STREAMED_BYTES = 64 * 2**20
# Programs that share the work of a dynamic scale: enough to fill a device, and so few
# that each can reduce the maxima of all.
MAX_PARTIALS = 1024
# Longest row that one program keeps in registers between the maximum and the division.
MAX_COLUMNS = 16384
# Floor of dynamic scales: per token what vLLM uses, per tensor the smallest number
# that has a reciprocal.
TOKEN_SCALE_DIVISOR = 512
SMALLEST_SCALE: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def magnitude(x):
    """|x| in fp32, 0 for NaN: a NaN stays visible in the output, not in the scale."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def tile_position(tile, tiles_per_row, num_cols, TILE: tl.constexpr):
    """Row, columns and mask of a tile."""
    col = (tile % tiles_per_row).to(tl.int64) * TILE + tl.arange(0, TILE)
    return (tile // tiles_per_row).to(tl.int64), col, col < num_cols


@triton.jit(do_not_specialize=["tiles_per_row", "num_tiles"])
def absmax_kernel(
    partials_ptr,  # [num_programs] fp32
    input_ptr,  # [num_rows, num_cols]
    num_cols: tl.int64,
    input_stride: tl.int64,
    tiles_per_row,
    num_tiles,
    TILE: tl.constexpr,
):
    largest = tl.zeros([TILE], tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row, col, mask = tile_position(tile, tiles_per_row, num_cols, TILE)
        x = tl.load(input_ptr + row * input_stride + col, mask=mask, other=0.0)
        largest = tl.maximum(largest, magnitude(x))
    tl.store(partials_ptr + tl.program_id(0), tl.max(largest, 0))


@triton.jit(do_not_specialize=["scale_ptr", "tiles_per_row", "num_tiles"])
def quantize_kernel(
    output_ptr,  # [num_rows, num_cols]
    input_ptr,  # [num_rows, num_cols]
    scale_ptr,  # [1]: read, or written where partials are given
    partials_ptr,  # [MAX_PARTIALS] fp32, as many maxima as programs; or None
    num_cols: tl.int64,
    input_stride: tl.int64,
    output_stride: tl.int64,
    tiles_per_row,
    num_tiles,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    TILE: tl.constexpr,
    MAX_PARTIALS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    if partials_ptr is None:
        scale = tl.load(scale_ptr)
    else:
        program = tl.arange(0, MAX_PARTIALS)
        written = program < tl.num_programs(0)
        largest = tl.max(tl.load(partials_ptr + program, mask=written, other=0.0), 0)
        scale = tl.maximum(tl.div_rn(largest, FP8_MAX), SMALLEST_SCALE)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr, scale)
    reciprocal = tl.div_rn(1.0, scale)
    # From the end, which was touched last and is what the L2 cache still holds.
    last = num_tiles - 1
    for done in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        row, col, mask = tile_position(last - done, tiles_per_row, num_cols, TILE)
        x = tl.load(
            input_ptr + row * input_stride + col,
            mask=mask,
            eviction_policy=EVICTION,
        )
        x = x.to(tl.float32) * reciprocal
        quantized = to_fp8(x, FP8, FP8_MAX, output_ptr.dtype.element_ty)
        tl.store(output_ptr + row * output_stride + col, quantized, mask=mask)


@triton.jit(do_not_specialize=["scale_ub_ptr", "num_rows"])
def quantize_rows_kernel(
    output_ptr,  # [num_rows, num_cols]
    scale_ptr,  # [num_rows]
    input_ptr,  # [num_rows, num_cols]
    scale_ub_ptr,  # [1] or None
    num_cols,
    input_stride: tl.int64,
    output_stride: tl.int64,
    num_rows,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,  # whether a row has no more than COLUMNS
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.arange(0, COLUMNS)[None, :]
    live = row < num_rows
    inputs = input_ptr + row * input_stride + col
    outputs = output_ptr + row * output_stride + col
    STORED: tl.constexpr = output_ptr.dtype.element_ty

    if IN_REGISTERS:
        mask = live & (col < num_cols)
        x = tl.load(inputs, mask=mask, other=0.0)
        largest = tl.max(magnitude(x), 1, keep_dims=True)
    else:
        running = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, num_cols, COLUMNS):
            mask = live & (start + col < num_cols)
            x = tl.load(inputs + start, mask=mask, other=0.0)
            running = tl.maximum(running, magnitude(x))
        largest = tl.max(running, 1, keep_dims=True)

    if scale_ub_ptr is not None:
        largest = tl.minimum(largest, tl.load(scale_ub_ptr))
    scale = tl.maximum(tl.div_rn(largest, FP8_MAX), MIN_SCALE)
    tl.store(scale_ptr + row, scale, mask=live)

    if IN_REGISTERS:
        tl.store(outputs, divide_to_fp8(x, scale, FP8, FP8_MAX, STORED), mask=mask)
    else:
        for start in range(0, num_cols, COLUMNS):
            mask = live & (start + col < num_cols)
            x = tl.load(inputs + start, mask=mask, eviction_policy="evict_first")
            quantized = divide_to_fp8(x, scale, FP8, FP8_MAX, STORED)
            tl.store(outputs + start, quantized, mask=mask)


def quantized_max(dtype: torch.dtype) -> float:
    """Largest value that quantisation gives.

    Of e4m3fnuz vLLM leaves the last step out, because the range of models calibrated
    for e4m3fn is halved and 240 would cost accuracy there.
    """
    return 224.0 if dtype == torch.float8_e4m3fnuz else torch.finfo(dtype).max


@cache
def default_dtype() -> torch.dtype:
    return current_platform.fp8_dtype()


def check_arguments(input: TensorSpec, output: TensorSpec) -> None:
    """Raises the ValueErrors about what is read and what is written."""
    advice = "Flatten the leading dimensions with input.flatten(0, -2)."
    dims = ("num_tokens", "hidden_size")
    check_shape("input", input, dims, (None, None), advice)
    check_dtype("input", input, INPUT_DTYPES)
    check_last_stride("input", input)
    check_shape("output", output, dims, (None, input.shape[1]))
    if output.shape[0] < input.shape[0]:
        reject(
            "output",
            f"shape {list(output.shape)}",
            f"at least {input.shape[0]} rows, those of input",
        )
    check_dtype("output", output, FP8_DTYPES)
    check_last_stride("output", output)
    check_device("output", output, "input", input)


def plan_tiles(
    input: TensorSpec, output: TensorSpec
) -> tuple[tuple[int, int, int], int, int, int]:
    """Cuts rows into tiles; rows without gaps count as one.

    Returns:
        (num_cols, input_stride, output_stride), tiles in a row, tiles in all, and the
        size of a tile.

    """
    num_rows, num_cols = input.shape
    input_stride, output_stride = free_strides(input)[0], free_strides(output)[0]
    gapless = num_rows == 1 or input_stride == output_stride == num_cols
    if gapless and num_cols % 16 == 0:
        num_rows, num_cols, input_stride, output_stride = 1, num_rows * num_cols, 0, 0
    num_units = this_device(input.device.index).num_units
    many = num_rows * num_cols >= LARGE_TILE * LARGE_TILE_MIN_PROGRAMS * num_units
    tile = LARGE_TILE if many else SMALL_TILE
    tile = min(tile, max(128, triton.next_power_of_2(num_cols)))
    tiles_per_row = triton.cdiv(num_cols, tile)
    layout = num_cols, input_stride, output_stride
    return layout, tiles_per_row, num_rows * tiles_per_row, tile


def eviction(input: TensorSpec) -> str:
    """The policy of loads that nothing reads again; see STREAMED_BYTES."""
    size = input.shape[0] * input.shape[1] * input.dtype.itemsize
    return "" if size >= STREAMED_BYTES else "evict_first"


def num_warps(elements: int) -> int:
    return min(16, max(1, elements // ELEMENTS_PER_WARP))


def row_warps(elements: int) -> int:
    """Warps for rows in registers: few, so that a multiprocessor has many rows.

    On an H200 16384 x 8192 in bf16 take 102.1 us with 4 warps, 109.5 with 16; 16384 x
    4096 take 55.0, with 8 57.9. Longer rows have 16, of which with loads that are
    evicted first 4096 x 14336 took 53.8, with 8 and without that 56.4.
    """
    most = 4 if elements <= FEW_WARPS_ELEMENTS else 16
    return min(most, num_warps(elements))


@lru_cache(maxsize=4096)
def prepare_static(*signatures: tuple) -> Launch | None:
    """Checks and plans one pass with a given scale."""
    input, output, scale = (TensorSpec(*sig) for sig in signatures)
    check_arguments(input, output)
    check_scale("scale", scale, "input", input)
    layout, tiles_per_row, num_tiles, tile = plan_tiles(input, output)
    if num_tiles == 0:
        return None
    return Launch(
        quantize_kernel,
        (num_tiles,),
        (*layout, tiles_per_row, num_tiles),
        dict(
            FP8=triton_fp8(output.dtype),
            FP8_MAX=quantized_max(output.dtype),
            TILE=tile,
            MAX_PARTIALS=MAX_PARTIALS,
            EVICTION=eviction(input),
            num_warps=num_warps(tile),
        ),
    )


@lru_cache(maxsize=4096)
def prepare_dynamic(*signatures: tuple) -> tuple[Launch, Launch]:
    """Checks and plans both passes for one scale of the whole tensor."""
    input, output = (TensorSpec(*sig) for sig in signatures)
    check_arguments(input, output)
    layout, tiles_per_row, num_tiles, tile = plan_tiles(input, output)
    num_cols, input_stride, _ = layout
    grid = (min(max(num_tiles, 1), MAX_PARTIALS),)
    warps = num_warps(tile)
    absmax = Launch(
        absmax_kernel,
        grid,
        (num_cols, input_stride, tiles_per_row, num_tiles),
        dict(TILE=tile, num_warps=warps),
    )
    quantize = Launch(
        quantize_kernel,
        grid,
        (*layout, tiles_per_row, num_tiles),
        dict(
            FP8=triton_fp8(output.dtype),
            FP8_MAX=quantized_max(output.dtype),
            TILE=tile,
            MAX_PARTIALS=MAX_PARTIALS,
            EVICTION=eviction(input),
            num_warps=warps,
        ),
    )
    return absmax, quantize


@lru_cache(maxsize=4096)
def prepare_per_token(*signatures: tuple | None) -> Launch | None:
    """Checks and plans one pass with a scale for each row."""
    input, output, scale_ub = specs_of(signatures)
    check_arguments(input, output)
    if scale_ub is not None:
        check_scale("scale_ub", scale_ub, "input", input)
    num_rows, num_cols = input.shape
    if num_rows == 0:
        return None
    columns = max(16, min(triton.next_power_of_2(num_cols), MAX_COLUMNS))
    rows = max(1, SMALL_TILE // columns)
    in_registers = num_cols <= columns
    fp8_max = quantized_max(output.dtype)
    return Launch(
        quantize_rows_kernel,
        (triton.cdiv(num_rows, rows),),
        (num_cols, free_strides(input)[0], free_strides(output)[0], num_rows),
        dict(
            FP8=triton_fp8(output.dtype),
            FP8_MAX=fp8_max,
            MIN_SCALE=1 / (fp8_max * TOKEN_SCALE_DIVISOR),
            ROWS=rows,
            COLUMNS=columns,
            IN_REGISTERS=in_registers,
            num_warps=(row_warps if in_registers else num_warps)(rows * columns),
        ),
    )


def scaled_fp8_quant(
    input: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    per_token: bool = False,
    scale_ub: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    num_token_padding: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises to fp8: input / scale, rounded to nearest even and saturated.

    Args:
        input: [num_tokens, hidden_size], fp16, bf16 or fp32; the last stride is 1.
        scale: fp32, one element, on the device.  None finds the scale: the largest
            magnitude, NaN aside, over the largest number of the format.
        per_token: Finds a scale for each row instead of one for all.
        scale_ub: fp32, one element: bounds the magnitude that a scale per token covers;
            what lies above saturates.
        output: [num_tokens or more, hidden_size] of an fp8 dtype, any row stride;
            None makes it.
        dtype: Of the output that is made; None is the platform's fp8 dtype.
        num_token_padding: The output that is made, and the scales per token, get at
            least this many rows; those past num_tokens stay uninitialised.

    Returns:
        The output, and scale: the one given, [1], or per token [num_tokens, 1].

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or stride, or is
            without effect beside the others.

    """
    check_tensor("input", input)
    for name, tensor in dict(scale=scale, scale_ub=scale_ub, output=output).items():
        if tensor is not None:
            check_tensor(name, tensor)
    if scale is not None and per_token:
        reject("scale", "a tensor", "None with per_token=True", "It finds its own.")
    if scale_ub is not None and not per_token:
        reject("scale_ub", "a tensor", "None without per_token=True")
    if output is None:
        rows = len(input) if input.dim() else 0
        if num_token_padding is not None:
            allowed = "a number of rows, 0 or more"
            padded = whole_number("num_token_padding", num_token_padding, allowed, 0)
            rows = max(rows, padded)
        if dtype is None:
            dtype = default_dtype()
        elif dtype not in FP8_DTYPES:
            reject("dtype", repr(dtype), ", ".join(map(str, FP8_DTYPES)))
        output = torch.empty((rows, *input.shape[1:]), dtype=dtype, device=input.device)
    elif num_token_padding is not None or dtype is not None:
        name = "dtype" if num_token_padding is None else "num_token_padding"
        reject(name, "a value", "None with output", "Output's own counts.")

    inputs, outputs = signature(input), signature(output)
    if scale is not None:
        quantize = prepare_static(inputs, outputs, signature(scale))
        if quantize is not None:
            quantize(storage_view(output), input, scale, None)
    elif per_token:
        quantize_rows = prepare_per_token(
            inputs, outputs, None if scale_ub is None else signature(scale_ub)
        )
        scale = torch.empty(
            (output.shape[0], 1), dtype=torch.float32, device=input.device
        )
        if quantize_rows is not None:
            quantize_rows(storage_view(output), scale, input, scale_ub)
    else:
        absmax, quantize = prepare_dynamic(inputs, outputs)
        scale = torch.empty(1, dtype=torch.float32, device=input.device)
        partials = torch.empty(MAX_PARTIALS, dtype=torch.float32, device=input.device)
        absmax(partials, input)
        quantize(storage_view(output), input, scale, partials)
    return output, scale
