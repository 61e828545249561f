# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Batch invariance: a token has the same bits alone, in any batch, and in prefill.

A pool of pages holds a few sequences and the queries of all their tokens. A step
computes some of these: the last tokens, up to some length, of some of the sequences.
Whatever the step, a token gets the output and LSE that it has where all sequences are
prefilled whole, which are compared with the reference.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    HALF_DTYPES,
    KV_FP8_DTYPES,
    ON_GPU,
    Batch,
    attend,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)

# Of the sequences. A segment has 512 keys on a GPU, 32 in the interpreter.
LENGTHS = [2600, 1030, 512, 40] if ON_GPU else [150, 70, 32, 5]
HALF = HALF_DTYPES[-1]
LONG, MIDDLE, EDGE, _ = LENGTHS


@pytest.fixture(autouse=True)
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter add as matrix units do: every element in the same order.

    In NumPy's product the order depends on where a row stands in its matrix.
    """
    if ON_GPU:
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data
        for i in range(a.data.shape[1]):
            column, row = a.data[:, i : i + 1], b.data[i : i + 1]
            total = total + column.astype(total.dtype) * row.astype(total.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


Part = tuple[int, int, int]
"""Sequence, query_len, seq_len."""

# Steps in which every sequence has all its keys.
STEPS: dict[str, list[Part]] = {
    "alone": [(0, 1, LONG)],
    "decodes": [(i, 1, n) for i, n in enumerate(LENGTHS)],
    "many_decodes": [(i, 1, n) for i, n in enumerate(LENGTHS)] * 5,
    "verify": [(3, 4, LENGTHS[3]), (0, 5, LONG), (1, 16, MIDDLE)],
    "chunk_and_decodes": [(1, 1, MIDDLE), (0, 41, LONG), (2, 1, EDGE), (3, 3, 5)],
}
STEPS["chunk_and_decodes"][-1] = (3, 3, LENGTHS[3])
# Steps on the way there.
EARLIER_STEPS: dict[str, list[Part]] = {
    "shorter": [(0, 1, n) for n in (1, EDGE - 1, EDGE, EDGE + 1, LONG // 2)],
    "shorter_chunks": [(0, 17, LONG - 9), (1, 30, MIDDLE - 3), (2, 1, 9), (0, 2, 4)],
}


def make_pool(**options: Any) -> Batch:
    return make_batch([(n, n) for n in LENGTHS], **options)


def rows_of(pool: Batch, part: Part) -> slice:
    sequence, query_len, seq_len = part
    end = int(pool.query_start_loc[sequence]) + seq_len
    return slice(end - query_len, end)


def make_step(pool: Batch, parts: Sequence[Part]) -> Batch:
    integers = {"dtype": torch.int32, "device": DEVICE}
    chosen = [sequence for sequence, _, _ in parts]
    query_lens = [query_len for _, query_len, _ in parts]
    per_sequence = {}
    if pool.mm_prefix_range is not None:
        per_sequence["mm_prefix_range"] = pool.mm_prefix_range[chosen]
    return dataclasses.replace(
        pool,
        query=torch.cat([pool.query[rows_of(pool, part)] for part in parts]),
        query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).to(**integers),
        seq_lens=torch.tensor([seq_len for *_, seq_len in parts], **integers),
        block_table=pool.block_table[chosen],
        max_query_len=max(query_lens),
        **per_sequence,
    )


def invariant_schedule(batch: Batch, **options: Any):
    return make_schedule(batch, **({"batch_invariant": True} | options))


def prefill(pool: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of all tokens, right and the ones to be found again."""
    return check(pool, update(invariant_schedule(pool, **options), pool))


def differing(
    pool: Batch,
    parts: Sequence[Part],
    expected: tuple[torch.Tensor, torch.Tensor],
    slots: int | None = None,
    **options: Any,
) -> int:
    """How many numbers of a step are not those expected, bit for bit.

    slots: segments that a worker can leave, other than by the schedule's choice.
    """
    step = make_step(pool, parts)
    schedule = update(invariant_schedule(step, **options), step)
    if slots is not None:
        schedule.segment_slots = slots
    found = attend(step, schedule)
    return sum(
        int((one != torch.cat([all_[rows_of(pool, part)] for part in parts])).sum())
        for one, all_ in zip(found, expected)
    )


E4M3 = {"kv_dtype": KV_FP8_DTYPES[0], "k_scale": 0.5, "v_scale": 2.0, "dtype": HALF}
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "half": {"dtype": HALF, "num_query_heads": 6, "block_size": 48},
    "window": {"sliding_window": LONG // 3},
    "softcap_sinks": {"softcap": 20.0, "sinks": torch.randn(4, device=DEVICE)},
    "alibi": {"alibi_slopes": torch.rand(4, device=DEVICE)},
    "fp8": E4M3,
    "fp8_window": E4M3 | {"sliding_window": 40},
}
if ON_GPU:
    OPTIONS |= {
        f"{d}_{group}_{name}": {"head_size": d, "num_query_heads": 2 * group} | extra
        for d, group in ((64, 4), (128, 4), (128, 7), (256, 2), (512, 1))
        for name, extra in (("half", {"dtype": HALF}), ("fp8", E4M3))
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_any_step(options):
    pool = make_pool(**options)
    expected = prefill(pool)
    for parts in (STEPS | EARLIER_STEPS).values():
        assert differing(pool, parts, expected) == 0, parts


# A token sees keys behind it, so that what it sees changes with seq_len.
BOTH_WAYS = {
    "not_causal": {"causal": False},
    "not_causal_window": {"causal": False, "sliding_window": 50},
    "ranges": {
        "sliding_window": 40,
        "mm_prefix_range": torch.tensor(
            [[[3, 60], [100, 130]], [[5, 69], [0, 0]], [[0, 0]] * 2, [[1, 4], [0, 0]]],
            dtype=torch.int32,
            device=DEVICE,
        ),
    },
}


@pytest.mark.parametrize("options", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_any_step_with_all_keys(options):
    pool = make_pool(**options)
    expected = prefill(pool)
    for parts in STEPS.values():
        assert differing(pool, parts, expected) == 0, parts


@pytest.mark.parametrize("slots", [None, 1])
@pytest.mark.parametrize("num_workers", [1, 3, 16, 41])
def test_any_number_of_workers(num_workers, slots):
    """However the segments are dealt, and whether shares leave rows whole."""
    pool = make_pool()
    expected = prefill(pool, num_workers=5)
    for name in ("alone", "decodes", "many_decodes", "verify"):
        options = {"slots": slots, "num_workers": num_workers}
        assert differing(pool, STEPS[name], expected, **options) == 0, name


def test_without_the_mode_bits_differ():
    pool = make_pool()
    expected = check(pool, update(make_schedule(pool), pool))
    assert any(
        differing(pool, parts, expected, batch_invariant=False)
        for parts in (STEPS | EARLIER_STEPS).values()
    )


def test_a_long_decode_keeps_all_workers_busy():
    """A row is cut: each worker has left states of it, in slots of its own."""
    pool = make_pool(num_query_heads=2, num_kv_heads=1)
    step = make_step(pool, STEPS["alone"])
    schedule = update(invariant_schedule(step, num_workers=3), step)
    check(step, schedule)
    segments = -(-LONG // schedule.plan.segment)
    share = -(-segments // 3)
    rows = schedule.partials[1].isfinite().sum()
    # The first worker's share is one state; two rows, one for each head.
    assert rows == 2 * (1 + segments - share)
