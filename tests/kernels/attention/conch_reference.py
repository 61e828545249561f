# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The reference of the CONCH attention tests and benchmarks, and its KV caches.

`attention` is the definition in plain PyTorch for one sequence and
`paged_attention` applies it to every sequence of a paged KV cache. Both work in
fp64 unless told otherwise and share no code with the kernels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
SENTINEL = 17.0
"""Stands in every output element before a call; exact in every dtype."""


class Attention(NamedTuple):
    """Attention's result, and how sensitive each number of it is to rounding."""

    output: torch.Tensor
    """[num_tokens, num_query_heads, head_size]; 0 where no key is visible."""
    lse: torch.Tensor
    """[num_tokens, num_query_heads], natural logarithm; -inf where no key is."""
    output_noise: torch.Tensor
    """Like output: sqrt(sum p^2 v^2), its standard deviation when each probability
    carries an independent relative error of standard deviation 1."""
    output_size: torch.Tensor
    """Like output: sum p |v|, which no partial sum exceeds."""
    output_drift: torch.Tensor
    """Like output: bound of its error when each logit carries an error as large as
    the sum of the magnitudes that it is computed from."""
    lse_drift: torch.Tensor
    """The same for lse."""
    output_grain: torch.Tensor
    """Like output: bound of its error when each weight carries an error as large as
    the largest weight."""


def visible_keys(
    query_len: int,
    seq_len: int,
    first_key: int,
    *,
    causal: bool,
    sliding_window: int | None,
    ranges: Sequence[tuple[int, int]] = (),
    ranges_in_window: bool = False,
    prefix_len: int = 0,
    chunk_lookback: int = -1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The mask [query_len, seq_len - first_key] of who sees which key.

    Query i stands at position seq_len - query_len + i, behind the cached context.
    A window of w shows the w keys that end at that position; without causality
    also the w - 1 keys behind it, and always those of the prefix.  With a lookback of
    n it is cut into n + 1 chunks, of which a query sees its own and n before.  Whoever
    stands in a range (first, last) sees all of it.
    """
    position = seq_len - query_len + torch.arange(query_len, device=device)[:, None]
    key = torch.arange(first_key, seq_len, device=device)[None, :]
    distance = position - key
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if chunk_lookback >= 0:
        size = sliding_window // (chunk_lookback + 1)
        visible &= position // size - key // size <= chunk_lookback
    elif sliding_window is not None:
        visible &= (distance.abs() < sliding_window) | (key < prefix_len)
    for first, last in ranges:
        both = (first <= position) & (position <= last) & (first <= key) & (key <= last)
        if ranges_in_window and sliding_window is not None:
            both &= distance < sliding_window
        if first < last:
            visible |= both
    return visible


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Attention:
    """Attention of one sequence, computed in `dtype`.

    Args:
        query: [query_len, num_query_heads, head_size].
        key: [num_keys, num_kv_heads, head_size].
        value: Like key.
        visible: [query_len, num_keys] bool, see `visible_keys`.
        scale: Multiplies query @ key.
        softcap: Logits become softcap * tanh(logit / softcap); 0 for none.
        bias: [num_query_heads, query_len, num_keys], added to the logits.
        sinks: [num_query_heads] logits of a key whose value is 0.
        dtype: Of all arithmetic. The dtype of the query gives what a plain
            half-precision implementation reaches.

    """
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    query = query.to(dtype).unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    # Scaling one operand, not the sum, keeps half precision in range.
    key, value = key.to(dtype) * scale, value.to(dtype)
    logits = torch.einsum("qhgd,khd->qhgk", query, key)
    magnitude = torch.einsum("qhgd,khd->qhgk", query.abs(), key.abs())
    if softcap:
        capped = torch.tanh(logits / softcap)
        magnitude = magnitude * (1 - capped**2) + softcap
        logits = softcap * capped
    if bias is not None:
        bias = bias.to(dtype).movedim(0, 1).unflatten(1, logits.shape[1:3])
        logits, magnitude = logits + bias, magnitude + bias.abs()
    logits = logits.masked_fill(~visible[:, None, None, :], -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    if sinks is not None:
        sinks = sinks.to(dtype).unflatten(0, logits.shape[1:3])
        lse = torch.logaddexp(lse, sinks)
    # A row that sees nothing has lse -inf, and exp(-inf - -inf) would be NaN.
    finite_lse = lse.masked_fill(lse == -math.inf, 0)
    probability = torch.exp(logits - finite_lse[..., None])
    output = torch.einsum("qhgk,khd->qhgd", probability, value)
    noise = torch.einsum("qhgk,khd->qhgd", probability**2, value**2).sqrt()
    size = torch.einsum("qhgk,khd->qhgd", probability, value.abs())
    error = probability * (1 + magnitude)
    lse_drift = error.sum(-1)
    drift = torch.einsum("qhgk,khd->qhgd", error, value.abs())
    drift += output.abs() * lse_drift[..., None]
    lse_drift += finite_lse.abs()
    seen = visible[:, None, None, :].expand(logits.shape).to(dtype)
    grain = torch.einsum("qhgk,khd->qhgd", seen, value.abs())
    grain *= probability.amax(-1, keepdim=True) if probability.numel() else 0
    parts = (output, lse, noise, size, drift, lse_drift, grain)
    return Attention(*(t.flatten(1, 2) for t in parts))


def gather_pages(
    cache: torch.Tensor, blocks: torch.Tensor, begin: int, end: int
) -> torch.Tensor:
    """The cache's rows [end - begin, num_kv_heads, head_size] of one sequence."""
    position = torch.arange(begin, end, device=cache.device)
    block_size = cache.shape[1]
    return cache[blocks[position // block_size].long(), position % block_size]


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float,
    causal: bool | torch.Tensor = True,
    softcap: float = 0.0,
    sliding_window: int | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    alibi_sqrt: bool = False,
    mm_prefix_range: torch.Tensor | None = None,
    mm_prefix_in_window: bool = False,
    prefix_lens: torch.Tensor | None = None,
    chunk_lookback: int = -1,
    output_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Attention:
    """Attention of a batch over a paged cache; arguments as for `varlen_attention`.

    Reads nothing that no query sees: neither pages before the window nor slots
    past a sequence's end. Rows of no sequence come back as `SENTINEL`. The output is
    not divided by output_scale.
    """
    num_tokens, num_heads, _ = query.shape
    if q_scale is not None:
        query = query.to(dtype) * q_scale.to(dtype)
    wide = torch.full_like(query, SENTINEL, dtype=dtype)
    narrow = wide[..., 0]
    parts = (wide, narrow, wide, wide, wide, narrow, wide)
    whole = Attention(*(t.clone() for t in parts))
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for i, seq_len in enumerate(lengths):
        start, query_len = starts[i], starts[i + 1] - starts[i]
        rule = sequence_rule(
            i,
            causal=causal,
            sliding_window=sliding_window,
            mm_prefix_range=mm_prefix_range,
            mm_prefix_in_window=mm_prefix_in_window,
            prefix_lens=prefix_lens,
            chunk_lookback=chunk_lookback,
        )
        begin = first_visible_key(query_len, seq_len, **rule)
        key = gather_pages(key_cache, block_table[i], begin, seq_len).to(dtype)
        value = gather_pages(value_cache, block_table[i], begin, seq_len).to(dtype)
        key = key if k_scale is None else key * k_scale.to(dtype)
        value = value if v_scale is None else value * v_scale.to(dtype)
        visible = visible_keys(query_len, seq_len, begin, **rule, device=query.device)
        bias = None
        if alibi_slopes is not None:
            distance = alibi_distance(query_len, seq_len, begin, alibi_sqrt)
            bias = alibi_slopes.double()[:, None, None] * distance.to(query.device)
        # Logits of at most 2^26 elements at a time.
        step = max(1, 2**26 // max(1, num_heads * (seq_len - begin)))
        for row in range(0, query_len, step):
            rows = slice(start + row, start + min(row + step, query_len))
            part = attention(
                query[rows],
                key,
                value,
                visible[row : row + step],
                scale=scale,
                softcap=softcap,
                bias=None if bias is None else bias[:, row : row + step],
                sinks=sinks,
                dtype=dtype,
            )
            for target, source in zip(whole, part):
                target[rows] = source
    return whole


def sequence_rule(
    index: int,
    *,
    causal: bool | torch.Tensor,
    mm_prefix_range: torch.Tensor | None = None,
    mm_prefix_in_window: bool = False,
    prefix_lens: torch.Tensor | None = None,
    chunk_lookback: int = -1,
    **rule,
) -> dict:
    """What `visible_keys` asks of one sequence, from the arguments for a batch."""
    if isinstance(causal, torch.Tensor):
        causal = bool(causal[index])
    if mm_prefix_range is not None:
        rule["ranges"] = mm_prefix_range[index].tolist()
        rule["ranges_in_window"] = mm_prefix_in_window
    if prefix_lens is not None:
        rule["prefix_len"] = int(prefix_lens[index])
    if chunk_lookback >= 0:
        rule["chunk_lookback"] = chunk_lookback
    return rule | {"causal": causal}


def first_visible_key(query_len: int, seq_len: int, **rule) -> int:
    """The first key that any query of a sequence sees; rule as for `visible_keys`."""
    if rule["sliding_window"] is None:
        return 0
    if rule.keys() <= {"causal", "sliding_window"}:
        return min(max(seq_len - query_len - rule["sliding_window"] + 1, 0), seq_len)
    visible = visible_keys(query_len, seq_len, 0, **rule).any(0)
    return int(visible.int().argmax()) if visible.any() else seq_len


def alibi_distance(
    query_len: int, seq_len: int, first_key: int, sqrt: bool
) -> torch.Tensor:
    """What ALiBi multiplies the slopes by, [query_len, seq_len - first_key]."""
    position = torch.arange(seq_len - query_len, seq_len)[:, None]
    distance = (torch.arange(first_key, seq_len)[None, :] - position).double()
    return -(-distance).clamp(min=0).sqrt() if sqrt else distance


def _nhd(nb: int, bs: int, h: int, d: int, new) -> tuple[torch.Tensor, torch.Tensor]:
    return new(nb, bs, h, d), new(nb, bs, h, d)


def _hnd(nb: int, bs: int, h: int, d: int, new) -> tuple[torch.Tensor, torch.Tensor]:
    return new(nb, h, bs, d).transpose(1, 2), new(nb, h, bs, d).transpose(1, 2)


def _interleaved(nb: int, bs: int, h: int, d: int, new) -> tuple[torch.Tensor, ...]:
    return new(nb, 2, bs, h, d).unbind(1)


def _packed_nhd(nb: int, bs: int, h: int, d: int, new) -> tuple[torch.Tensor, ...]:
    return new(nb, bs, h, 2 * d).split(d, dim=-1)


def _packed_hnd(nb: int, bs: int, h: int, d: int, new) -> tuple[torch.Tensor, ...]:
    return new(nb, h, bs, 2 * d).transpose(1, 2).split(d, dim=-1)


def _unlike(nb: int, bs: int, h: int, d: int, new) -> tuple[torch.Tensor, torch.Tensor]:
    """Every stride of V differs from K's; NaN stands behind each row of both."""
    value = new(nb + 1, h + 1, bs + 2, d + 16)[1:, 1:, 1:-1, :d]
    return new(nb, bs, h, d + 32)[..., :d], value.transpose(1, 2)


LAYOUTS = {
    "NHD": _nhd,
    "HND": _hnd,
    "interleaved": _interleaved,
    "packed_NHD": _packed_nhd,
    "packed_HND": _packed_hnd,
    "unlike": _unlike,
}


def nan_filled(
    *shape: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """A tensor of NaN, in fp8 too."""
    if dtype in FP8_DTYPES:
        pattern = 0x80 if dtype == torch.float8_e4m3fnuz else 0x7F
        filled = torch.full(shape, pattern, dtype=torch.uint8, device=device)
        return filled.view(dtype)
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def make_caches(
    layout: str,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V views [num_blocks, block_size, num_kv_heads, head_size] of NaN."""

    def new(*shape: int) -> torch.Tensor:
        return nan_filled(*shape, dtype=dtype, device=device)

    key, value = LAYOUTS[layout](num_blocks, block_size, num_kv_heads, head_size, new)
    return key, value


def output_tolerance(
    reference: Attention,
    dtype: torch.dtype,
    truncated_sums: int = 0,
    weights: torch.dtype | None = None,
) -> torch.Tensor:
    """How far, element by element, an output of `dtype` may be from the reference.

    For an implementation that keeps logits, softmax state and accumulator in fp32
    and rounds twice: the probabilities before they meet V, to `weights` (None: to
    `dtype`), and the output to `dtype`. A rounding is off by at most u, with a
    standard deviation of u / sqrt 3, so four times the noise is seven standard
    deviations. What fp32 adds is a few units of 2^-24 of the magnitudes that went
    into it.

    Matrix units cut off the bits of a sum that fp32 cannot hold (Fasi et al. 2021,
    Numerical behavior of NVIDIA tensor cores), so the errors of `truncated_sums`
    additions to one accumulator, of 2^-23 each, all point to zero.
    """
    unit = torch.finfo(dtype).eps / 2
    # Below the smallest normal number the steps of a format no longer shrink.
    output = reference.output.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    rounding = unit * output
    rounding += torch.finfo(weights or dtype).eps / 2 * 4 * reference.output_noise
    truncation = truncated_sums * 2.0**-23 * reference.output_size
    return rounding + truncation + 8 * 2.0**-24 * reference.output_drift


def lse_tolerance(reference: Attention) -> torch.Tensor:
    """The same for the LSE, which no rounding to 16 bits touches."""
    return 8 * 2.0**-24 * reference.lse_drift


# Products of fp8 on Hopper keep 13 bits behind the largest term of a sum, and take 32
# terms at a time.
FP8_SUM_UNIT, FP8_SUM_TERMS = 2.0**-13, 32


def fp8_output_tolerance(
    reference: Attention, dtype: torch.dtype, head_size: int, block_n: int = 128
) -> torch.Tensor:
    """`output_tolerance` where Q, K, V and the probabilities are in e4m3.

    A row's weights are relative to the largest that it has seen and rounded times 2^8,
    while their sum is of unrounded ones.  Down to 2^-14, where the format's normal
    numbers end, u is 2^-4, half of 2^-3.  Below, a weight is off by half a step of
    2^-9 / 2^8 at most, whatever it is; these errors may all have one sign.

    A step of 32 terms cuts off what is below 2^-13 of the largest term or of the sum
    so far: head_size / 32 times for a logit, of the sum of its magnitudes; and
    block_n / 32 times for a tile of keys, after which sums are in fp32.
    """
    weights = torch.finfo(torch.float8_e4m3fn)
    rounding = weights.eps / 2 * 4 * reference.output_noise
    half_step = weights.smallest_normal * weights.eps / 2
    rounding += half_step / 2**8 * reference.output_grain
    output = reference.output.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    rounding += torch.finfo(dtype).eps / 2 * output
    cut = block_n / FP8_SUM_TERMS * FP8_SUM_UNIT * reference.output_size
    return rounding + cut + fp8_logit_error(head_size) * reference.output_drift


def fp8_logit_error(head_size: int) -> float:
    """Of a logit, relative to the sum of the magnitudes of its products."""
    return max(1, head_size / FP8_SUM_TERMS) * FP8_SUM_UNIT


def fp8_lse_tolerance(reference: Attention, head_size: int) -> torch.Tensor:
    return fp8_logit_error(head_size) * reference.lse_drift
