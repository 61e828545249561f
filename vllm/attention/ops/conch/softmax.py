# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Online softmax in base 2, as Triton helpers.

With s the raw scores of one query row (dot products of the query with the keys)
and c a positive scale in log2 units, softmax(ln(2) * c * s) needs only

    m = max(c * s)        row_max
    l = sum(2^(c*s - m))  row_sum
    o = sum(2^(c*s - m) * v) / l

and all three can be carried over tiles of keys (Milakov and Gimelshein 2018; Dao
et al. 2022).  Everything here is fp32.
"""

from vllm.triton_utils import tl, triton

LOG2_E = 1.4426950408889634
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_step(scores, scale, row_max, row_sum, MASKED: tl.constexpr):
    """Takes one tile of scores into the running softmax.

    Args:
        scores: [M, N] raw scores; -inf where a key is not visible.
        scale: positive factor that turns a score into log2 units.
        row_max: [M] of the tiles before, -inf at the start.
        row_sum: [M] of the tiles before, 0 at the start.
        MASKED: whether a row may have seen no visible key yet.

    Returns:
        Weights [M, N], the factor [M] for what was accumulated before, and the
        new row_max and row_sum.

    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    shift = new_max
    if MASKED:
        # -inf - -inf would be NaN; any finite shift gives the wanted zero weights.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(row_max - shift)
    if len(row_sum.shape) == 2:
        M: tl.constexpr = row_sum.shape[0]
        PARTS: tl.constexpr = row_sum.shape[1]
        parts = tl.reshape(weights, [M, weights.shape[1] // PARTS, PARTS])
        row_sum = row_sum * decay[:, None] + tl.sum(parts, 1)
    else:
        row_sum = row_sum * decay + tl.sum(weights, 1)
    return weights, decay, new_max, row_sum


@triton.jit
def sum_in_pairs(x):
    """[M] sums of x [M, N], N a power of two from 8 on, in an order of their own.

    Every addition is one of two numbers, so no layout of x over threads matters.
    The order suits matrix units: pairs of columns, then blocks of 8 columns, the
    farthest first, then the four pairs of a block.
    """
    M: tl.constexpr = x.shape[0]
    BLOCKS: tl.constexpr = x.shape[1] // 8
    x = tl.sum(tl.reshape(x, [M, BLOCKS, 4, 2]), 3)
    for _ in tl.static_range(8):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [M, 2, x.shape[1] // 2, 4]), 1)
    x = tl.sum(tl.reshape(x, [M, 2, 2]), 2)
    return tl.sum(x, 1)


@triton.jit
def softmax_step_in_order(scores, scale, row_max, row_sum):
    """As `softmax_step`, with the same bits in every kernel; see `segments`.

    scale may be [M, 1].
    """
    scores = scores * scale
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    return weights, decay, new_max, tl.fma(row_sum, decay, sum_in_pairs(weights))


@triton.jit
def softcap(scores, inner):
    """Tanh of the scores, from exp2 alone: 1 - 2 / (2^(inner * s) + 1).

    inner is 2 * log2(e) / cap times the softmax scale.  Large scores give exactly
    1 or -1: an infinite power leaves 1 - 0, a vanished one 1 - 2.
    """
    return 1.0 - 2.0 / (tl.exp2(scores * inner) + 1.0)


@triton.jit
def add_sink(acc, row_max, row_sum, sink):
    """Takes a key of logit sink [M], in log2 units, and value 0 into the state."""
    new_max = tl.maximum(row_max, sink)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp2(row_max - shift)
    return acc * decay[:, None], new_max, row_sum * decay + tl.exp2(sink - shift)


@triton.jit
def normalize(acc, row_sum, v_scale):
    """[M, D] weighted mean of V; 0 for a row that saw no key."""
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    return acc * (v_scale / divisor)[:, None]


@triton.jit
def log_sum_exp(row_max, row_sum):
    """[M] natural logarithm of the softmax denominator; -inf without a key."""
    return (row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum))) * LN_2
