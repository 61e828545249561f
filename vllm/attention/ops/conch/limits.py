# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which keys a row sees, where causality and one window for all do not say it.

Causality by sequence, chunks, ranges of tokens that see each other (images) and a
prefix that stays in sight behind a window.  All of them leave a row with one run of
consecutive keys, its own among them, and the prefix: the key's own position is in
the window, in the chunk and in the range, so the union of these has no gap.
"""

from vllm.triton_utils import tl, triton

# Wider windows show no more: no sequence has more keys. Sums of positions and windows
# stay within 32 bits.
WIDEST_WINDOW = 2**30


@triton.jit
def window_start(position, window, CHUNK_LOOKBACK: tl.constexpr):
    """First key of the window, below 0 where it begins before the sequence.

    With a lookback, window is the size of a chunk.
    """
    if CHUNK_LOOKBACK >= 0:
        start = (position // window - CHUNK_LOOKBACK) * window
    else:
        start = position - window + 1
    return start


@triton.jit
def range_start(
    range_first, position, window, CHUNK_LOOKBACK: tl.constexpr,
    RANGES_IN_WINDOW: tl.constexpr,
):  # fmt: skip
    """First key of its range that a position sees: window as in `window_start`."""
    start = range_first
    if RANGES_IN_WINDOW:
        # The whole window, of which the chunks are parts.
        keys = window * (CHUNK_LOOKBACK + 1) if CHUNK_LOOKBACK >= 0 else window
        start = tl.maximum(start, position - keys + 1)
    return start


@triton.jit
def load_range(ranges, sequence, index, mask):
    """First and last position of a sequence's range; the first is larger if unused."""
    ranges_ptr, num_ranges = ranges
    field = ranges_ptr + (sequence * num_ranges + index) * 2
    first = tl.load(field, mask=mask, other=0)
    last = tl.load(field + 1, mask=mask, other=0)
    return tl.where(first < last, first, last + 1), last


@triton.jit
def row_limits(
    position,  # [M]
    sequence,
    seq_len,
    window,
    causal_ptr,  # [num_seqs] or None
    ranges,  # ([num_seqs, num_ranges, 2] or None, num_ranges)
    prefix_ptr,  # [num_seqs] or None
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNK_LOOKBACK: tl.constexpr,
    RANGES_IN_WINDOW: tl.constexpr,
):
    """First key, end key (both [M]) and prefix length: what each row sees."""
    first = position * 0
    end = position * 0 + seq_len
    if WINDOWED:
        first = window_start(position, window, CHUNK_LOOKBACK)
        if CHUNK_LOOKBACK < 0:
            end = position + window
    if causal_ptr is not None:
        is_causal = tl.load(causal_ptr + sequence) != 0
        end = tl.where(is_causal, position + 1, end)
    elif CAUSAL:
        end = position + 1
    if ranges[0] is not None:
        for i in tl.range(ranges[1]):
            range_first, range_last = load_range(ranges, sequence, i, True)
            inside = (position >= range_first) & (position <= range_last)
            # A window that ranges stay in begins before whatever they show of it.
            if CHUNK_LOOKBACK >= 0 or not RANGES_IN_WINDOW:
                start = range_start(
                    range_first, position, window, CHUNK_LOOKBACK, RANGES_IN_WINDOW
                )
                first = tl.where(inside, tl.minimum(first, start), first)
            end = tl.where(inside, tl.maximum(end, range_last + 1), end)
    prefix = 0
    if prefix_ptr is not None:
        prefix = tl.load(prefix_ptr + sequence)
    return first, tl.minimum(end, seq_len), prefix


@triton.jit
def is_in_limits(keys, limits):
    """[M, TILE] whether each row sees each key."""
    first, end, prefix = limits
    within = (keys[None, :] >= first[:, None]) | (keys < prefix)[None, :]
    return within & (keys[None, :] < end[:, None])


@triton.jit
def first_seen_key(
    query_len, seq_len, sequence, window, ranges, prefix_ptr,
    WINDOWED: tl.constexpr, CHUNK_LOOKBACK: tl.constexpr,
    RANGES_IN_WINDOW: tl.constexpr,
):  # fmt: skip
    """First key that any of a sequence's queries sees; scalars, or tensors of them."""
    first_key = query_len * 0
    if WINDOWED:
        position = seq_len - query_len
        first_key = tl.maximum(window_start(position, window, CHUNK_LOOKBACK), 0)
        exists = query_len > 0
        if ranges[0] is not None and (CHUNK_LOOKBACK >= 0 or not RANGES_IN_WINDOW):
            for i in tl.range(ranges[1]):
                range_first, range_last = load_range(ranges, sequence, i, exists)
                is_seen = (
                    (range_first <= range_last)
                    & (range_first < seq_len)
                    & (range_last >= position)
                )
                start = range_start(
                    range_first, position, window, CHUNK_LOOKBACK, RANGES_IN_WINDOW
                )
                earlier = tl.minimum(first_key, start)
                first_key = tl.where(is_seen, earlier, first_key)
        if prefix_ptr is not None:
            prefix = tl.load(prefix_ptr + sequence, mask=exists, other=0)
            first_key = tl.where(prefix > 0, 0, first_key)
    return first_key
