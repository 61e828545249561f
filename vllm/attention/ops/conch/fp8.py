# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Division by a scale and conversion to the 8-bit floating-point formats.

Kernels store through a pointer of the fp8 type where the device converts in
hardware, and through a uint8 pointer where `encode_fp8` has to make the bits: GPUs
older than the format, a format of another vendor, and Triton's interpreter, whose own
conversion rounds wrongly.  Both ways give the same bits.
"""

from functools import cache

import torch

from vllm.triton_utils import tl, triton

from .plan import Device, this_device

# Triton's names of the formats.
_TRITON_NAMES = {
    torch.float8_e4m3fn: "float8e4nv",
    torch.float8_e4m3fnuz: "float8e4b8",
    torch.float8_e5m2: "float8e5",
}
FP8_DTYPES = tuple(_TRITON_NAMES)


def triton_fp8(dtype: torch.dtype) -> tl.dtype:
    """Triton's type for one of `FP8_DTYPES`."""
    return getattr(tl, _TRITON_NAMES[dtype])


def converts_in_hardware(dtype: torch.dtype, device: Device) -> bool:
    """Whether the device has an instruction from fp32 to this format."""
    if device.backend == "cuda":
        return device.arch >= 89 and dtype != torch.float8_e4m3fnuz
    if device.backend == "hip" and device.arch.startswith("gfx94"):
        return dtype == torch.float8_e4m3fnuz
    if device.backend == "hip" and device.arch.startswith("gfx95"):
        return dtype != torch.float8_e4m3fnuz
    return False


@cache
def is_stored_as_bytes(dtype: torch.dtype, device_index: int | None) -> bool:
    return not converts_in_hardware(dtype, this_device(device_index))


def storage_view(tensor: torch.Tensor) -> torch.Tensor:
    """The fp8 tensor as kernels write it: itself, or its bytes (see the module)."""
    if is_stored_as_bytes(tensor.dtype, tensor.device.index):
        return tensor.view(torch.uint8)
    return tensor


@triton.jit
def encode_fp8(x, FP8: tl.constexpr):
    """Bits of an fp32 within the range of FP8, rounded to nearest even."""
    MANTISSA: tl.constexpr = FP8.fp_mantissa_width
    BIAS: tl.constexpr = FP8.exponent_bias
    DROPPED: tl.constexpr = 23 - MANTISSA  # bits of an fp32 mantissa that go
    SMALLEST_NORMAL: tl.constexpr = (128 - BIAS) << 23  # its fp32 bits
    # Adding this power of two leaves multiples of the smallest subnormal in the
    # lowest bits, correctly rounded by the addition itself.
    SUBNORMAL_SHIFT: tl.constexpr = (151 - BIAS - MANTISSA) << 23

    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    odd = (magnitude >> DROPPED) & 1
    normal = (magnitude + ((1 << (DROPPED - 1)) - 1) + odd) >> DROPPED
    normal -= (127 - BIAS) << MANTISSA
    shift = tl.full([], SUBNORMAL_SHIFT, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (tl.abs(x) + shift).to(tl.int32, bitcast=True) - SUBNORMAL_SHIFT
    code = tl.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    if FP8.is_fp8e4b8():  # no negative zero: its bits are the one NaN
        code = tl.where(code == 0, 0, code | sign)
        code = tl.where(x == x, code, 0x80)
    else:
        code = tl.where(x == x, code, 0x7F) | sign
    return code.to(tl.uint8)


@triton.jit
def to_fp8(x, FP8: tl.constexpr, FP8_MAX: tl.constexpr, STORED: tl.constexpr):
    """Saturates fp32 to +-FP8_MAX and converts it; NaN stays NaN.

    STORED is the element type of the pointer that the result goes through.
    """
    x = tl.clamp(x, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(STORED) if STORED.is_fp8() else encode_fp8(x, FP8)


@triton.jit
def divide_to_fp8(
    x, scale, FP8: tl.constexpr, FP8_MAX: tl.constexpr, STORED: tl.constexpr
):
    """Quotient of x and scale, rounded to fp32 first, then as `to_fp8`.

    In hardware a multiplication by the reciprocal and one correction by fused
    multiply-adds gives that quotient (Markstein 1990) in a quarter of the
    instructions of a division.  The interpreter has no fused multiply-add.
    """
    x = x.to(tl.float32)
    if STORED.is_fp8():
        reciprocal = tl.div_rn(1.0, scale)
        # Saturated at once: an infinite quotient has no remainder to correct by.
        quotient = tl.clamp(
            x * reciprocal, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL
        )
        remainder = tl.fma(-quotient, scale, x)
        corrected = tl.fma(remainder, reciprocal, quotient)
        # The correction of -0 is +0.
        quotient = tl.where(quotient == 0.0, quotient, corrected)
    else:
        quotient = tl.div_rn(x, scale)
    return to_fp8(quotient, FP8, FP8_MAX, STORED)
