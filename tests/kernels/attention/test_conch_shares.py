# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Shares of the keys: who has which, and results that join to attention over all."""

import math

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    DTYPES,
    assert_close,
    poisoned_scratch,
)
from vllm.attention.ops.conch.shares import count_keys, merge_shares, weigh_share

FP32_UNIT = torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize(("num_shares", "run"), [(2, 1), (3, 1), (2, 16), (4, 3)])
def test_every_key_is_in_one_share(num_shares: int, run: int) -> None:
    lengths = [(1, n) for n in range(1, 70)] + [(0, 40), (5, 5), (9, 30), (7, 3)]
    lengths += [(1, 2**31 - 1)] * 70
    query_lens = torch.tensor([query_len for query_len, _ in lengths])
    integers = {"dtype": torch.int32, "device": DEVICE}
    starts = torch.cat([torch.zeros(1), query_lens.cumsum(0)]).to(**integers)
    seq_lens = torch.tensor([seq_len for _, seq_len in lengths], **integers)
    for context in (False, True):
        counts = torch.full((num_shares, len(lengths)), -7, **integers)
        for share, row in enumerate(counts):
            options = dict(num_shares=num_shares, share=share, run=run)
            count_keys(starts, seq_lens, row, **options, context=context)
        for (query_len, seq_len), found in zip(lengths, counts.T.tolist()):
            # Without a query nothing is attended to; dummies may claim no context.
            keys = max(seq_len - query_len * context, 0) if query_len else 0
            if keys < 1000:
                owners = [j // run % num_shares for j in range(keys)]
                expected = [owners.count(share) for share in range(num_shares)]
                assert found == expected
            assert sum(found) == keys


def shares(
    num_shares: int, num_tokens: int, num_heads: int, head_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results and LSE of shares; NaN is the result of those that have no key.

    Token 0 has keys everywhere, token 1 in the last share alone, token 2 in none.
    """
    torch.manual_seed(0)
    size = (num_shares, num_tokens, num_heads)
    results = torch.randn(*size, head_size, device=DEVICE).to(dtype)
    lses = 30 * torch.randn(size, device=DEVICE)
    lses[:-1, 1] = lses[:, 2] = -math.inf
    results[lses == -math.inf] = math.nan
    return results, lses


def joined(results: list[torch.Tensor], lses: list[torch.Tensor]) -> torch.Tensor:
    """What shares join to, in fp64; 0 where there is no key."""
    lse = torch.stack(list(lses)).double()
    weights = torch.softmax(lse, 0).nan_to_num(0)[..., None]
    rows = torch.stack(list(results)).double()
    return torch.where(weights == 0, 0, rows * weights).sum(0)


@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_shares", "head_size"), [(2, 32), (3, 80), (5, 17)])
def test_shares_join(
    num_shares: int, head_size: int, dtype: torch.dtype, summed: bool, with_output: bool
) -> None:
    num_tokens, num_heads = 11, 3
    results, lses = shares(num_shares, num_tokens, num_heads, head_size, dtype)
    own, own_lse = shares(1, num_tokens, num_heads, head_size, dtype)
    output, output_lse = own[0].clone(), own_lse[0]
    parts, part_lses = list(results), list(lses)
    # Weights are of fp32 differences of LSEs; 16 bits round results and the sum.
    largest = torch.where(results.isnan(), 0, results.abs()).amax(0).double()
    if with_output:
        parts, part_lses = [*parts, own[0]], [*part_lses, output_lse]
        largest = largest.maximum(own[0].nan_to_num(0).abs().double())
    expected = joined(parts, part_lses)
    unit = torch.finfo(dtype).eps / 2
    roundings = 1 + num_shares if summed else 1
    allowed = largest * (roundings * unit + 2**8 * FP32_UNIT)
    if summed:
        weighted = results.clone()
        for share, result in enumerate(weighted):
            weigh_share(result, lses, share)
        assert not weighted.isnan().any()
        results = weighted.sum(0, keepdim=True)
    merge_shares(output, output_lse if with_output else None, results, lses)
    assert_close("output", output, expected, allowed)
    assert bool((output[2] == 0).all())


def test_strided_rows() -> None:
    """As they come from an exchange: results and LSE in one row, heads of others."""
    results, lses = shares(2, 5, 3, 24, torch.float32)
    rows = torch.full((2, 5, 3, 40), math.nan, device=DEVICE)
    rows[..., :24] = results
    all_lses = torch.full((2, 5, 9), math.nan, device=DEVICE)
    all_lses[..., 3:6] = lses
    buffer = torch.full((5, 3, 32), math.nan, device=DEVICE)
    merge_shares(buffer[..., :24], None, rows[..., :24], all_lses[..., 3:6])
    plain = torch.empty(5, 3, 24, device=DEVICE)
    merge_shares(plain, None, results, lses)
    assert torch.equal(buffer[..., :24], plain)
    assert bool(buffer[..., 24:].isnan().all())


def test_no_tokens() -> None:
    results, lses = torch.empty(2, 0, 3, 16), torch.empty(2, 0, 3)
    output = torch.empty(0, 3, 16)
    tensors = (t.to(DEVICE) for t in (output, results, lses))
    output, results, lses = tensors
    merge_shares(output, None, results, lses)
    weigh_share(output, lses, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": (3, 4, 2, 16)}, "results: got 3 results, allowed: 2"),
        ({"results": (2, 4, 2, 8)}, "results: got shape"),
        ({"lses": (2, 4, 3)}, "lses: got shape"),
        ({"output_lse": (5, 2)}, "output_lse: got shape"),
        ({"output": (4, 2)}, "output: got shape"),
    ],
)
def test_errors_of_merging(changes: dict, message: str) -> None:
    sizes = dict(output=(4, 2, 16), output_lse=(4, 2), results=(2, 4, 2, 16))
    sizes = sizes | dict(lses=(2, 4, 2)) | changes
    tensors = {name: torch.zeros(size, device=DEVICE) for name, size in sizes.items()}
    with pytest.raises(ValueError, match=message):
        merge_shares(**tensors)


def test_errors_of_numbers_and_types() -> None:
    integers = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    counts = integers[:2].clone()
    options = dict(num_shares=2, share=0, run=1, context=False)
    for wrong in ({"share": 2}, {"run": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
            count_keys(integers, integers[:2], counts, **options | wrong)
    with pytest.raises(ValueError, match="counts: got torch.int64"):
        count_keys(integers, integers[:2], counts.long(), **options)
    with pytest.raises(ValueError, match="query_start_loc: got shape"):
        count_keys(integers[:2], integers[:2], counts, **options)
    with pytest.raises(ValueError, match="seq_lens: got NoneType"):
        count_keys(integers, None, counts, **options)
    rows = torch.zeros(2, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="share: got 2"):
        weigh_share(rows, torch.zeros(2, 2, 2, device=DEVICE), 2)
    with pytest.raises(ValueError, match="results: got torch.float16"):
        merge_shares(rows, None, rows[None].half(), rows[None, ..., 0])
