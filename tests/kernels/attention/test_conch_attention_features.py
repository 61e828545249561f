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
