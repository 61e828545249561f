# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Accuracy over lengths and sharpness of the softmax, where low precision shows.

Two bounds: that of FlashAttention's tests, twice the error of plain PyTorch in the
same dtype, which says little once that error is large; and `check`'s, which follows
from rounding alone and catches an accumulator, a maximum, a sum or a partial that
is not fp32.
"""

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    HALF_DTYPES,
    ON_GPU,
    assert_close,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)

LENGTHS = [1024, 8192, 32768] if ON_GPU else [1024, 8192]
KINDS = {"decode": 1, "verify": 5, "prefill": 24}


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("logit_std", [0.05, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("query_len", KINDS.values(), ids=KINDS.keys())
def test_precision_ladder(query_len, seq_len, logit_std, dtype):
    batch = make_batch(
        [(query_len, seq_len)],
        num_query_heads=2,
        num_kv_heads=1,
        head_size=64,
        block_size=64,
        dtype=dtype,
        logit_std=logit_std,
    )
    # A matrix unit takes 16 keys at a time; a split of a decode, few of them.
    truncated_sums = seq_len // 16 if ON_GPU and query_len == KINDS["prefill"] else 0
    output, _ = check(batch, truncated_sums=truncated_sums)
    live = slice(batch.num_live_tokens)
    exact = batch.reference().output[live]
    plain = batch.reference(dtype).output[live].double()
    rounded = exact.to(dtype)
    ulp = 2 * ((rounded + 0.3 - 0.3) - rounded).double().abs().max()
    bound = 2 * (plain - exact).abs().max() + ulp
    assert_close("output", output, exact, bound.expand_as(exact))


@pytest.mark.parametrize("num_workers", [2, 16])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_splitting_costs_no_precision(dtype, num_workers):
    """Partials are fp32: the bound does not grow with their number."""
    batch = make_batch(
        [(1, 4096)],
        num_query_heads=2,
        num_kv_heads=1,
        head_size=64,
        block_size=64,
        dtype=dtype,
        logit_std=0.05,
    )
    check(batch, update(make_schedule(batch, num_workers=num_workers), batch))


@pytest.mark.parametrize("query_len", [1, 20])
def test_long_uniform_average(query_len):
    """4096 equal weights: the sum and the accumulator may not stagnate."""
    batch = make_batch([(query_len, 4096)], dtype=HALF_DTYPES[-1], block_size=64)
    batch.key_cache[batch.key_cache.isfinite()] = 0
    batch.value_cache[batch.value_cache.isfinite()] = 1
    output, lse = check(batch)
    assert (output == 1).all()
    seen = torch.arange(4097 - query_len, 4097, device=lse.device).log()
    torch.testing.assert_close(lse, seen[:, None].expand_as(lse), rtol=0, atol=2e-6)
