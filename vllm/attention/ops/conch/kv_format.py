# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a tile of a quantised KV cache stands for: elements, scales and zero points.

KV_FORMAT says how elements become numbers:

    None                    as their dtype converts
    "e4m3fn", "e4m3fnuz"    bytes that arithmetic turns into fp16, for devices
                            without an instruction for it
    "int8"                  integers
    "int4"                  two to a byte, the even element in the lower half; what is
                            in the cache has gone through `rotation`

Scales per token and head multiply scores and weights, not the tiles:

    q . (k_scale_j * k_j) = k_scale_j * (q . k_j)
    sum_j p_j * (v_scale_j * v_j) = sum_j (p_j * v_scale_j) * v_j

int4 has zero points as well, integers from 0 to 15 in the lowest 4 bits of the scale:
an element n stands for (n - zero_j) * scale_j.  The format is vLLM's, there named
int4_per_token_head.
"""

from vllm.triton_utils import tl, triton

# Nibbles and zero points lose this, so that sums of products stay small.
INT4_CENTRE: tl.constexpr = tl.constexpr(8)

# Bytes 0 to 3 as fp16, in order: 1024 + n has n in its lowest bits.
WIDEN_INT8: tl.constexpr = tl.constexpr("""{
    .reg .b32 bytes, low, high, bias;
    mov.b32 bias, 0x64806480;
    xor.b32 bytes, $2, 0x80808080;
    prmt.b32 low, bytes, 0x64646464, 0x4140;
    prmt.b32 high, bytes, 0x64646464, 0x4342;
    sub.f16x2 $0, low, bias;
    sub.f16x2 $1, high, bias;
}""")
# Of two pairs of int8, those at even places as two fp16, and the others.
UNPACK_INT8: tl.constexpr = tl.constexpr("""{
    .reg .b32 bytes, even, odd, bias;
    mov.b32 bias, 0x64806480;
    xor.b32 bytes, $2, 0x80808080;
    prmt.b32 even, bytes, 0x64646464, 0x4240;
    prmt.b32 odd, bytes, 0x64646464, 0x4341;
    sub.f16x2 $0, even, bias;
    sub.f16x2 $1, odd, bias;
}""")
# The lower halves of 4 bytes as fp16 less 8, in order, and the upper halves.
UNPACK_NIBBLES: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high, a, b, c, d, bias;
    mov.b32 bias, 0x64086408;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 a, low, 0x64646464, 0x4140;
    prmt.b32 b, low, 0x64646464, 0x4342;
    prmt.b32 c, high, 0x64646464, 0x4140;
    prmt.b32 d, high, 0x64646464, 0x4342;
    sub.f16x2 $0, a, bias;
    sub.f16x2 $1, b, bias;
    sub.f16x2 $2, c, bias;
    sub.f16x2 $3, d, bias;
}""")
# Of two groups of 4 nibbles, those at place 0 as two fp16 less 8, at place 1, 2 and 3.
UNPACK_QUADS: tl.constexpr = tl.constexpr("""{
    .reg .b32 low, high, a, b, c, d, bias;
    mov.b32 bias, 0x64086408;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 a, low, 0x64646464, 0x4240;
    prmt.b32 b, high, 0x64646464, 0x4240;
    prmt.b32 c, low, 0x64646464, 0x4341;
    prmt.b32 d, high, 0x64646464, 0x4341;
    sub.f16x2 $0, a, bias;
    sub.f16x2 $1, b, bias;
    sub.f16x2 $2, c, bias;
    sub.f16x2 $3, d, bias;
}""")


@triton.jit
def decode_e4m3(code, FNUZ: tl.constexpr):
    """fp16 of e4m3 bytes, exactly: subnormal numbers and NaN too.

    The fields of e4m3 moved to those of an fp16 leave a number that is too small by
    the difference of the biases; a subnormal one is a subnormal fp16.
    """
    bits = code.to(tl.uint16)
    bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    number = bits.to(tl.float16, bitcast=True)
    if FNUZ:
        number, is_nan = number * 128.0, code == 0x80
    else:
        number, is_nan = number * 256.0, (code & 0x7F) == 0x7F
    return tl.where(is_nan, float("nan"), number)


@triton.jit
def widen(tile, KV_FORMAT: tl.constexpr, DTYPE: tl.constexpr, HOW: tl.constexpr):
    """A tile of elements in the dtype of the products.

    HOW is "triton", or "ptx" for NVIDIA GPUs and fp16, with the same result.
    """
    if KV_FORMAT == "e4m3fn":
        wide = decode_e4m3(tile, False).to(DTYPE)
    elif KV_FORMAT == "e4m3fnuz":
        wide = decode_e4m3(tile, True).to(DTYPE)
    elif KV_FORMAT == "int8" and HOW == "ptx" and DTYPE.is_fp16():
        wide = tl.inline_asm_elementwise(
            WIDEN_INT8, "=r,=r,r", [tile], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        wide = tile.to(DTYPE)
    return wide


@triton.jit
def unpack_nibbles(packed, DTYPE: tl.constexpr, HOW: tl.constexpr):
    """The even and the odd elements of int4, less INT4_CENTRE."""
    if HOW == "ptx" and DTYPE.is_fp16():
        even, odd = tl.inline_asm_elementwise(
            UNPACK_NIBBLES,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        even = ((packed & 0xF).to(tl.int8) - INT4_CENTRE).to(DTYPE)
        odd = ((packed >> 4).to(tl.int8) - INT4_CENTRE).to(DTYPE)
    return even, odd


@triton.jit
def unpack_quads(quads, DTYPE: tl.constexpr, HOW: tl.constexpr):
    """Elements 0, 1, 2 and 3 of every 4 of int4, loaded as int16, less INT4_CENTRE."""
    if HOW == "ptx" and DTYPE.is_fp16():
        first, second, third, fourth = tl.inline_asm_elementwise(
            UNPACK_QUADS,
            "=r,=r,=r,=r,r",
            [quads],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        first = ((quads & 0xF) - INT4_CENTRE).to(DTYPE)
        second = ((quads >> 4 & 0xF) - INT4_CENTRE).to(DTYPE)
        third = ((quads >> 8 & 0xF) - INT4_CENTRE).to(DTYPE)
        fourth = ((quads >> 12 & 0xF) - INT4_CENTRE).to(DTYPE)
    return first, second, third, fourth


@triton.jit
def unpack_bytes(
    pairs, KV_FORMAT: tl.constexpr, DTYPE: tl.constexpr, HOW: tl.constexpr
):
    """The even and the odd elements of pairs of one byte, loaded as int16."""
    if KV_FORMAT == "int8" and HOW == "ptx" and DTYPE.is_fp16():
        even, odd = tl.inline_asm_elementwise(
            UNPACK_INT8,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif KV_FORMAT == "int8":
        even, odd = pairs.to(tl.int8).to(DTYPE), (pairs >> 8).to(DTYPE)
    else:
        even = widen((pairs & 0xFF).to(tl.uint8), KV_FORMAT, DTYPE, HOW)
        odd = widen((pairs >> 8 & 0xFF).to(tl.uint8), KV_FORMAT, DTYPE, HOW)
    return even, odd


@triton.jit
def load_token_scales(
    # Of K and of V: (pointer to one head's scales, strides of (page, slot, head))
    scales,
    page,  # [TILE], or a scalar: all of the tile is on it
    slot,  # [TILE]
    valid,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[TILE] scales of K and of V for a tile of keys; 1 where masked.

    COLUMNS, 4 if not 0: they are loaded as [TILE, COLUMNS]. What has as many
    elements as the program has threads Triton loads once, and hands on through shared
    memory; fewer are loaded by every thread that needs them, 32 each with 64 keys.
    """
    strides = scales[0][1], scales[1][1]
    keys = scales[0][0] + page * strides[0][0] + slot * strides[0][1]
    values = scales[1][0] + page * strides[1][0] + slot * strides[1][1]
    if COLUMNS == 0:
        if MASKED:
            key_scales = tl.load(keys, mask=valid, other=1.0)
            value_scales = tl.load(values, mask=valid, other=1.0)
        else:
            key_scales, value_scales = tl.load(keys), tl.load(values)
    else:
        is_key = (tl.arange(0, COLUMNS) % 2 == 0)[None, :]
        ptrs = tl.where(is_key, keys[:, None], values[:, None])
        if MASKED:
            both = tl.load(ptrs, mask=valid[:, None], other=1.0)
        else:
            both = tl.load(ptrs)
        key_twice, value_twice = tl.split(
            tl.reshape(both, [slot.shape[0], COLUMNS // 2, 2])
        )
        key_scales, _ = tl.split(key_twice)
        value_scales, _ = tl.split(value_twice)
    return key_scales, value_scales


@triton.jit
def take_zeros(scale):
    """Scales of int4 without their zero points, and these less INT4_CENTRE."""
    bits = scale.to(tl.int32, bitcast=True)
    zero = ((bits & 0xF) - INT4_CENTRE).to(tl.float32)
    return (bits & -16).to(tl.float32, bitcast=True), zero


@triton.jit
def in_elements(strides, UNIT: tl.constexpr):
    """Strides (page, slot, head) that were given in units of so many elements.

    Pages with a scale beside each row have strides such as 264 bytes, of which Triton,
    left to itself, sees only that they are no multiples of 16, and reads single bytes.
    """
    if UNIT > 1:
        unit = tl.full([], UNIT, tl.int64)
        strides = (strides[0] * unit, strides[1] * unit, strides[2] * unit)
    return strides


@triton.jit
def halve_query(query):
    """Even and odd elements of query rows, [M, D / 2] each, and their sums [M]."""
    M: tl.constexpr = query.shape[0]
    D: tl.constexpr = query.shape[1]
    even, odd = tl.split(tl.reshape(query, [M, D // 2, 2]))
    return even, odd, tl.sum(query.to(tl.float32), 1)


@triton.jit
def log2_of_scales(scales, HOW: tl.constexpr):
    """log2 of [TILE] scales, for the maximum of weights, from which errors cancel out.

    HOW is as in `widen`; with "ptx" it is one instruction, to which a subnormal scale
    is 0. On an H200 64 x 8k with int8 take 597 us so, 635 with tl.log2; a prefill of 2k
    tokens over 8k 1072 and 1428, as tl.log2 makes it spill.
    """
    if HOW == "ptx":
        logs = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [scales],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        logs = tl.log2(scales)
    return logs


@triton.jit
def scaled_softmax_step(
    scores, scale, value_scales, row_max, row_sum, HOW: tl.constexpr
):
    """`softmax_step` whose weights count the scales of V, which row_sum does not.

    The running maximum is that of the weights with their scales: they are at most 1,
    whatever unit V is in, and so fit fp16.  What row_max is cancels out of the output
    and of the LSE.
    """
    logits = scores * scale
    scaled = logits + log2_of_scales(value_scales, HOW)[None, :]
    new_max = tl.maximum(row_max, tl.max(scaled, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp2(row_max - shift)
    weights = tl.exp2(logits - shift[:, None])
    row_sum = row_sum * decay + tl.sum(weights, 1)
    return weights * value_scales[None, :], decay, new_max, row_sum
