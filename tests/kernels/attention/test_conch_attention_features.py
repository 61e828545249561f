# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Features of a few models' attention, each against the reference and in its limits.

Every kernel takes part: prefills, decodes and, with as many workers as there are
tiles, decodes whose keys are split.
"""

import dataclasses
import math

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    DTYPES,
    HALF_DTYPES,
    KV_FP8_DTYPES,
    attend,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)

DECODES = [(1, 70), (4, 133), (1, 1), (0, 0), (16, 49)]
MIXED = [(1, 90), (40, 40), (3, 20), (24, 75), (0, 0), (1, 1)]
BATCHES = {"decodes": DECODES, "mixed": MIXED, "dummy": [(20, 1), (8, 3), (1, 0)]}
all_batches = pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
# In the order of num_workers: no row is split, some are, every tile is alone.
WORKERS = [1, 5, 64]


def check_splits(batch) -> None:
    """Compares with the reference however the decodes' keys are split."""
    for num_workers in WORKERS:
        schedule = make_schedule(batch, num_workers=num_workers)
        check(batch, update(schedule, batch))


def per_head(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


OPTIONS = [
    {"sliding_window": 10},
    {"softcap": 5.0, "logit_std": 4.0},
    {"kv_dtype": KV_FP8_DTYPES[0], "k_scale": 0.5, "v_scale": 2.0},
    {"causal": False},
    {"num_query_heads": 8, "num_kv_heads": 1},
]

SINKS = (1.5, -2.0, 0.0, 6.0)


@pytest.mark.parametrize("dtype", DTYPES)
@all_batches
def test_sinks(lengths, dtype):
    check_splits(make_batch(lengths, dtype=dtype, sinks=per_head(*SINKS, dtype=dtype)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@all_batches
def test_sinks_with_other_options(lengths, options):
    heads = options.get("num_query_heads", 4)
    sinks = torch.linspace(-3, 3, heads, device=DEVICE)
    check_splits(make_batch(lengths, dtype=HALF_DTYPES[-1], sinks=sinks, **options))


@pytest.mark.parametrize("logit", [-math.inf, -1000.0, 1000.0])
@all_batches
def test_sinks_that_take_nothing_or_everything(lengths, logit):
    batch = make_batch(lengths, sinks=per_head(*[logit] * 4))
    output, lse = check(batch)
    if logit < 0:
        plain, plain_lse = attend(dataclasses.replace(batch, sinks=None))
        assert (output == plain).all()
        seen = plain_lse > -math.inf
        assert (lse[seen] == plain_lse[seen]).all()
    else:
        assert (output == 0).all() and (lse == logit).all()


SLOPES = (0.5, 0.25, 0.0625, -0.1)
sqrt_or_not = pytest.mark.parametrize("alibi_sqrt", [False, True])


@pytest.mark.parametrize("dtype", DTYPES)
@sqrt_or_not
@all_batches
def test_alibi(lengths, alibi_sqrt, dtype):
    alibi = {"alibi_slopes": per_head(*SLOPES), "alibi_sqrt": alibi_sqrt}
    check_splits(make_batch(lengths, dtype=dtype, **alibi))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@sqrt_or_not
@all_batches
def test_alibi_with_other_options(lengths, alibi_sqrt, options):
    heads = options.get("num_query_heads", 4)
    options = options | {"alibi_sqrt": alibi_sqrt}
    options["alibi_slopes"] = 2.0 ** -torch.arange(heads, device=DEVICE)
    check(make_batch(lengths, dtype=HALF_DTYPES[-1], **options))


def test_alibi_of_keys_that_are_all_alike():
    """Zero keys: weights fall by e^-slope a key, or by e^-(slope * sqrt(distance))."""
    slope = 0.5
    for alibi_sqrt in (False, True):
        alibi = {"alibi_slopes": per_head(*[slope] * 4), "alibi_sqrt": alibi_sqrt}
        batch = make_batch([(1, 9), (18, 18)], **alibi)
        batch.key_cache[batch.key_cache.isfinite()] = 0
        _, lse = attend(batch)
        for row, num_keys in (0, 9), (1, 1), (18, 18):
            distance = torch.arange(num_keys).double()
            bias = -slope * (distance.sqrt() if alibi_sqrt else distance)
            assert abs(lse[row, 2].item() - bias.logsumexp(0).item()) < 1e-5


def test_alibi_slopes_of_zero_change_nothing():
    batch = make_batch(MIXED)
    expected, expected_lse = attend(batch)
    for alibi_sqrt in (False, True):
        batch.alibi_slopes, batch.alibi_sqrt = per_head(0, 0, 0, 0), alibi_sqrt
        output, lse = check(batch)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


def flags(*values: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("values", [(1, 0, 1, 0, 0, 1), (0, 1, 0, 1, 1, 0)])
@all_batches
def test_causal_flags(lengths, values, window, dtype):
    causal = flags(*values[: len(lengths)], dtype=dtype)
    check_splits(make_batch(lengths, causal=causal, sliding_window=window))


@all_batches
def test_causal_flags_that_agree(lengths):
    for causal in True, False:
        batch = make_batch(lengths, causal=flags(*[causal] * len(lengths)))
        output, lse = check(batch)
        plain = dataclasses.replace(batch, causal=causal)
        for one, other in zip((output, lse), attend(plain)):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# Of each sequence; a range of one token is none, and one may end behind the sequence.
RANGES = [
    [(3, 40), (60, 69), (0, 0)],
    [(5, 5), (120, 300), (0, 0)],
    [(0, 5), (7, 19), (10, 25)],
    [(50, 60), (62, 70), (9, 47)],
    [(0, 0), (35, 45), (0, 0)],
    [(0, 2), (0, 0), (2**20, 2**21)],
]


def ranges_of(lengths) -> torch.Tensor:
    rows = RANGES[: len(lengths)]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("window", [None, 1, 12, 40])
@pytest.mark.parametrize("in_window", [False, True])
@all_batches
def test_mm_prefix_range(lengths, in_window, window):
    check_splits(
        make_batch(
            lengths,
            sliding_window=window,
            mm_prefix_range=ranges_of(lengths),
            mm_prefix_in_window=in_window,
        )
    )


@pytest.mark.parametrize("seen", [(0, 0), (30, 30), (19, 3)])
def test_mm_prefix_ranges_that_are_unused(seen):
    ranges = torch.tensor([[seen, (0, 0)]] * 6, dtype=torch.int32, device=DEVICE)
    for window in None, 12:
        batch = make_batch(MIXED, sliding_window=window, mm_prefix_range=ranges)
        output, _ = check(batch)
        plain, _ = attend(dataclasses.replace(batch, mm_prefix_range=None))
        torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-6)


def test_an_image_in_a_prompt_is_seen_whole_by_its_first_token():
    """The first token of the image averages the values of prompt and image."""
    batch = make_batch([(40, 40)], sliding_window=None)
    batch.mm_prefix_range = torch.tensor([[(10, 29)]], dtype=torch.int32).to(DEVICE)
    batch.key_cache[batch.key_cache.isfinite()] = 0
    _, lse = check(batch)
    seen = [i + 1 for i in range(10)] + [30] * 20 + [i + 1 for i in range(30, 40)]
    expected = torch.tensor(seen, device=DEVICE).log()[:, None].expand(-1, 4)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


def lens(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("window", [1, 12, 40])
@pytest.mark.parametrize("prefix", [(0, 5, 1, 7, 0, 1), (70, 33, 0, 70, 3, 0)])
@all_batches
def test_prefix_lens(lengths, prefix, window):
    prefix = lens(*prefix[: len(lengths)])
    batch = make_batch(lengths, sliding_window=window, prefix_lens=prefix)
    check_splits(batch)


@pytest.mark.parametrize(
    "window, lookback", [(16, 0), (32, 1), (30, 1), (9, 2), (1, 0), (2**32, 3)]
)
@all_batches
def test_chunk_lookback(lengths, window, lookback):
    check_splits(make_batch(lengths, sliding_window=window, chunk_lookback=lookback))


@pytest.mark.parametrize("window, lookback", [(16, 0), (30, 1), (9, 2)])
@pytest.mark.parametrize("in_window", [False, True])
@all_batches
def test_ranges_and_chunks(lengths, in_window, window, lookback):
    """Ranges stay in the whole window, not in the chunks that it is cut into."""
    check_splits(
        make_batch(
            lengths,
            sliding_window=window,
            chunk_lookback=lookback,
            mm_prefix_range=ranges_of(lengths),
            mm_prefix_in_window=in_window,
        )
    )


@pytest.mark.parametrize("kv_dtype", [None, KV_FP8_DTYPES[0]])
@pytest.mark.parametrize("block_size", [16, 48])
@all_batches
def test_features_together(lengths, block_size, kv_dtype):
    check_splits(
        make_batch(
            lengths,
            dtype=HALF_DTYPES[-1],
            kv_dtype=kv_dtype,
            block_size=block_size,
            sliding_window=20,
            softcap=8.0,
            causal=flags(*(1, 0, 1, 0, 1, 0)[: len(lengths)]),
            sinks=per_head(*SINKS),
            alibi_slopes=per_head(*SLOPES),
            mm_prefix_range=ranges_of(lengths),
        )
    )


def test_longer_buffers_than_the_batch():
    """Persistent buffers have rows for sequences that are not there."""
    longer = MIXED + [(1, 1)] * 3
    ranges = torch.tensor(RANGES + RANGES[:3], dtype=torch.int32, device=DEVICE)
    assert len(ranges) == len(longer)
    check(make_batch(MIXED, mm_prefix_range=ranges, causal=flags(*[1, 0, 0] * 3)))
    check(make_batch(MIXED, prefix_lens=lens(*[2, 0, 30] * 3), sliding_window=9))


def quantized(dtype: torch.dtype, scale: float) -> dict:
    return {"output_dtype": dtype, "output_scale": per_head(scale)}


@pytest.mark.parametrize("output_dtype", KV_FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@all_batches
def test_output_scale(lengths, dtype, output_dtype):
    check_splits(make_batch(lengths, dtype=dtype, **quantized(output_dtype, 0.01)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@all_batches
def test_output_scale_with_other_options(lengths, options):
    options = options | quantized(KV_FP8_DTYPES[0], 0.1)
    check(make_batch(lengths, dtype=HALF_DTYPES[-1], **options))


@pytest.mark.parametrize("output_dtype", KV_FP8_DTYPES)
@all_batches
def test_output_scale_rounds_the_output_once_and_saturates(lengths, output_dtype):
    """As torch rounds the quotient of the fp32 output; the largest saturate."""
    batch = make_batch(lengths)
    output, _ = attend(batch)
    limit = torch.finfo(output_dtype).max
    scale = output.abs().max()[None] / (2 * limit)
    quantized = {"output_dtype": output_dtype, "output_scale": scale}
    actual, _ = attend(dataclasses.replace(batch, **quantized))
    expected = (output / scale).clamp(-limit, limit).to(output_dtype)
    assert (actual.float() == expected.float()).all()
    assert (actual.float().abs() == limit).any()
