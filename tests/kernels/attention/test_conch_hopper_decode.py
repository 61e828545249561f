# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decodes that a kernel of Hopper's own does."""

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    HALF_DTYPES,
    ON_GPU,
    Batch,
    attend,
    check,
    compare,
    hopper,
    make_batch,
    make_schedule,
    poisoned_scratch,
    record_launches,
    update,
)

pytestmark = pytest.mark.usefixtures("hopper")

LONG, SHORT, MANY = (20000, 2000, 150) if ON_GPU else (1500, 400, 40)
# Rows that workers share, share out or have to themselves, and empty ones.
BATCHES = {
    "one": [(1, LONG)],
    "short": [(1, 5), (1, 64), (1, 65), (1, 1), (1, 128)],
    "even": [(1, SHORT)] * 8,
    "ragged": [(1, LONG), (0, 0), (1, 1), (1, 17), (0, 9), (1, LONG // 3), (1, 0)],
    "verify": [(5, LONG // 2), (16, 40), (2, 700), (16, 16), (3, 65), (1, 1)],
    "many": [(1, 1 + 37 * i % SHORT) for i in range(MANY)],
}
BF16, FP16 = torch.bfloat16, torch.float16
# Of the portable kernel, which the interpreter computes wrongly in bf16.
HALF = HALF_DTYPES[-1]
HOPPER, PORTABLE = "hopper_decode_kernel", "decode_kernel"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record_launches(monkeypatch)


def make(lengths, group: int = 4, num_kv_heads: int = 2, **options) -> Batch:
    options = {"head_size": 128, "dtype": BF16} | options
    heads = {"num_query_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads}
    return make_batch(lengths, **heads, **options)


def check_batch(batch: Batch, schedule=None) -> None:
    # The tensor cores cut off sums, of 16 terms each; see `output_tolerance`.
    longest = int(batch.seq_lens.max())
    check(batch, schedule, truncated_sums=-(-longest // 16))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": FP16, "block_size": 128},
        {"block_size": 48, "layout": "packed_NHD"},
        {"block_size": 32, "layout": "HND"},
        {"head_size": 72},
        {"head_size": 96, "sliding_window": 700},
        {"head_size": 112, "causal": False},
        {"sliding_window": 1},
        {"sliding_window": 60, "frees_pages": True},
        {"sliding_window": 2**31 - 1},
        {"sliding_window": 100, "causal": False},
        {"logit_std": 20.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", BATCHES)
def test_against_the_reference(name, options, launched):
    batch = make(BATCHES[name], **options)
    check_batch(batch)
    assert HOPPER in launched and PORTABLE not in launched


@pytest.mark.parametrize("group", [1, 2, 8, 16, 32, 64])
@pytest.mark.parametrize("name", ["short", "ragged", "verify"])
def test_heads_of_a_group(name, group, launched):
    """Of 64 and 16 query tokens there are 1024 rows: 16 tiles."""
    batch = make(BATCHES[name], group=group)
    check_batch(batch)
    assert HOPPER in launched


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7, 41])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 4])
@pytest.mark.parametrize("name", ["even", "ragged", "verify", "many"])
def test_any_number_of_workers(name, num_kv_heads, num_workers, launched):
    batch = make(BATCHES[name], num_kv_heads=num_kv_heads)
    schedule = make_schedule(batch, num_workers=num_workers)
    check_batch(batch, update(schedule, batch))
    assert HOPPER in launched


def test_heads_abreast(launched):
    count = 12 if ON_GPU else 4
    batch = make([(1, LONG // 2), (1, LONG // 4)] * count, num_kv_heads=8)
    schedule = make_schedule(batch, num_workers=None if ON_GPU else 8)
    update(schedule, batch)
    assert schedule.workers[0, 10] == 8
    check_batch(batch, schedule)
    assert HOPPER in launched


@pytest.mark.parametrize("sliding_window", [None, 300])
@pytest.mark.parametrize("name", ["short", "ragged", "verify"])
def test_sinks(name, sliding_window, launched):
    sinks = torch.linspace(-3, 6, 8, device=DEVICE).to(BF16)
    batch = make(BATCHES[name], sliding_window=sliding_window, sinks=sinks)
    check_batch(batch)
    assert HOPPER in launched


@pytest.mark.parametrize("name", ["one", "even", "ragged", "verify"])
def test_bitwise_repeatable(name, launched):
    batch = make(BATCHES[name])
    schedule = update(make_schedule(batch), batch)
    expected, expected_lse = attend(batch, schedule)
    for _ in range(100 if ON_GPU else 2):
        output, lse = attend(batch, schedule)
        assert torch.equal(output, expected) and torch.equal(lse, expected_lse)
    assert set(launched) == {HOPPER, "schedule_kernel"}


def test_decodes_beside_prefills(launched):
    batch = make([(1, 9000), (300, 1000), (1, 70), (2, 3000), (20, 20)])
    check_batch(batch)
    assert HOPPER in launched


@pytest.mark.parametrize(
    "options", [{"softcap": 30.0}, {"alibi_slopes": True}, {"group": 3}], ids=str
)
def test_what_the_portable_kernel_does(options, launched):
    if "alibi_slopes" in options:
        options = {"alibi_slopes": torch.linspace(0.01, 0.5, 8, device=DEVICE)}
    check(make(BATCHES["short"], dtype=HALF, **options))
    assert PORTABLE in launched and HOPPER not in launched


def test_queries_that_tma_cannot_read(launched):
    """At an address between two units of 16 bytes: the portable kernel's."""
    batch = make(BATCHES["verify"], dtype=HALF)
    rows = torch.empty(batch.query.numel() + 4, dtype=HALF, device=DEVICE)[4:]
    shifted = rows.view(batch.query.shape)
    batch.query = shifted.copy_(batch.query)
    check(batch)
    assert PORTABLE in launched and HOPPER not in launched


def test_one_schedule_serves_changing_batches(launched):
    largest = make([(16, 16)] * 7)
    schedule = make_schedule(largest, num_workers=5)
    steps = ["ragged", "short", "verify", "one"]
    for seed, name in enumerate(steps + steps[::-1]):
        batch = make(BATCHES[name], seed=seed)
        update(schedule, batch)
        output, lse = attend(batch, schedule)
        compare(batch, output, lse, truncated_sums=-(-LONG // 16))
    assert HOPPER in launched and PORTABLE not in launched
