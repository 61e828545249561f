# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The reference against PyTorch's attention and results known in advance."""

import math

import pytest
import torch

from tests.kernels.attention.conch_harness import make_batch
from tests.kernels.attention.conch_reference import (
    LAYOUTS,
    attention,
    make_caches,
    visible_keys,
)


def random_sequence(query_len, seq_len, heads=(6, 2), head_size=8):
    torch.manual_seed(0)
    query = torch.randn(query_len, heads[0], head_size, dtype=torch.float64)
    key, value = torch.randn(2, seq_len, heads[1], head_size, dtype=torch.float64)
    return query, key, value


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("query_len, seq_len", [(7, 7), (1, 9), (4, 9)])
def test_agrees_with_sdpa(query_len, seq_len, window, causal):
    query, key, value = random_sequence(query_len, seq_len)
    rule = {"causal": causal, "sliding_window": window}
    visible = visible_keys(query_len, seq_len, 0, **rule)
    for i, j in torch.cartesian_prod(torch.arange(query_len), torch.arange(seq_len)):
        distance = seq_len - query_len + i - j
        reach = math.inf if window is None else window
        assert visible[i, j] == (
            abs(distance) < reach and not (causal and distance < 0)
        )
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (query, key, value)),
        attn_mask=visible,
        scale=0.3,
        enable_gqa=True,
    )
    actual = attention(query, key, value, visible, scale=0.3)
    torch.testing.assert_close(actual.output, expected[0].transpose(0, 1))


def test_known_results():
    query, key, value = random_sequence(3, 5)
    everything = torch.ones(3, 5, dtype=torch.bool)
    uniform = attention(query, 0 * key, value, everything, scale=1.0)
    torch.testing.assert_close(uniform.output[1, 0], value.mean(0)[0])
    assert (uniform.lse - math.log(5)).abs().max() < 1e-12
    nothing = attention(query, key, value, ~everything, scale=1.0)
    assert (nothing.output == 0).all() and (nothing.lse == -math.inf).all()
    capped = attention(query, key, value, everything, scale=1e6, softcap=2.0)
    assert capped.lse.max() <= 2 + math.log(5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_disjoint_views(layout):
    key, value = make_caches(layout, 3, 16, 2, 8, torch.float32, "cpu")
    assert key.shape == value.shape == (3, 16, 2, 8)
    assert key.stride(-1) == value.stride(-1) == 1
    assert key.isnan().all() and value.isnan().all()
    key.copy_(torch.arange(768.0).view(key.shape))
    value.copy_(-1 - torch.arange(768.0).view(key.shape))
    assert (key.flatten() == torch.arange(768.0)).all()
    if layout == "unlike":
        assert all(a != b for a, b in zip(key.stride()[:3], value.stride()))


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.float8_e5m2])
def test_batches_are_poisoned(kv_dtype):
    lengths = [(1, 50), (0, 0), (3, 20), (20, 1)]
    batch = make_batch(lengths, kv_dtype=kv_dtype, sliding_window=10)
    held = batch.key_cache.float().isnan().logical_not().all(-1).all(-1)
    # (1, 50) sees 40..49 and holds 32..49, (3, 20) sees 8..19 and holds 0..19.
    assert held.sum() == 18 + 20 + 1
    assert not held[0].any()
    used = batch.block_table < len(batch.key_cache)
    assert used.sum(1).tolist() == [2, 0, 2, 1]
    assert not used[0, :2].any()
    assert batch.query[:24].isfinite().all() and batch.query[24:].isnan().all()
    assert batch.reference().output[:24].isfinite().all()
