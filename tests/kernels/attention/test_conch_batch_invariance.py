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
    call,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    products_in_order,
    update,
)
from tests.kernels.attention.test_conch_cuda_graph import capture
from vllm.attention.ops.conch import VarlenSchedule

pytestmark = pytest.mark.usefixtures("products_in_order")

# Of the sequences. A segment has 512 keys on a GPU, 32 in the interpreter.
LENGTHS = [2600, 1030, 512, 40] if ON_GPU else [105, 40, 32, 5]
LONG, MIDDLE, EDGE, SHORT = LENGTHS
HALF = HALF_DTYPES[-1]

Part = tuple[int, int, int]
"""Sequence, query_len, seq_len."""

# Steps in which every sequence has all its keys.
STEPS: dict[str, list[Part]] = {
    "alone": [(0, 1, LONG)],
    "decodes": [(i, 1, n) for i, n in enumerate(LENGTHS)] * (5 if ON_GPU else 2),
    "verify": [(3, 4, SHORT), (0, 5, LONG), (1, 16, MIDDLE)],
    "chunks_and_decodes": [(1, 1, MIDDLE), (0, 41, LONG), (2, 1, EDGE), (3, 3, SHORT)],
}
# Steps on the way there.
EARLIER_STEPS: dict[str, list[Part]] = {
    "decodes": [(0, 1, n) for n in (1, EDGE - 1, EDGE + 1, LONG // 2)] + [(1, 1, EDGE)],
    "chunks": [(0, 17, LONG - 9), (1, 30, MIDDLE - 3), (2, 1, 9), (0, 2, 4)],
}


def make_pool(**options: Any) -> Batch:
    shape = {"num_query_heads": 2, "num_kv_heads": 1}
    return make_batch([(n, n) for n in LENGTHS], **shape | options)


def rows_of(pool: Batch, parts: Sequence[Part]) -> torch.Tensor:
    """The rows of the pool that a step computes, one after the other."""
    starts = pool.query_start_loc.tolist()
    ends = [(starts[sequence] + seq_len, n) for sequence, n, seq_len in parts]
    return torch.cat([torch.arange(end - n, end, device=DEVICE) for end, n in ends])


def integers(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_step(pool: Batch, parts: Sequence[Part]) -> Batch:
    chosen = [sequence for sequence, _, _ in parts]
    query_lens = [query_len for _, query_len, _ in parts]
    ranges = pool.mm_prefix_range
    return dataclasses.replace(
        pool,
        query=pool.query[rows_of(pool, parts)],
        query_start_loc=integers([0, *query_lens]).cumsum(0, dtype=torch.int32),
        seq_lens=integers([seq_len for *_, seq_len in parts]),
        block_table=pool.block_table[chosen],
        max_query_len=max(query_lens),
        mm_prefix_range=None if ranges is None else ranges[chosen],
    )


def invariant_schedule(batch: Batch, **options: Any) -> VarlenSchedule:
    return make_schedule(batch, **{"batch_invariant": True} | options)


def prefill(pool: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of all tokens: right, and what steps must find again."""
    return check(pool, update(invariant_schedule(pool, **options), pool))


def differing(
    pool: Batch,
    parts: Sequence[Part],
    expected: tuple[torch.Tensor, torch.Tensor],
    slots: int | None = None,
    **options: Any,
) -> int:
    """How many numbers of a step are not those expected, bit for bit.

    slots: segments that a worker can leave; None: as many as the schedule has.
    """
    step, rows = make_step(pool, parts), rows_of(pool, parts)
    schedule = update(invariant_schedule(step, **options), step)
    if slots is not None:
        schedule.segment_slots = slots
    found = attend(step, schedule)
    return sum(int((a != b[rows]).sum()) for a, b in zip(found, expected))


FP8 = {"kv_dtype": KV_FP8_DTYPES[0], "k_scale": 0.5, "v_scale": 2.0, "dtype": HALF}
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {"num_query_heads": 4, "num_kv_heads": 2},
    "half_window": {"dtype": HALF, "num_query_heads": 3, "sliding_window": LONG // 3},
    "fp8": FP8 | {"block_size": 48},
    "features": {
        "softcap": 20.0,
        "sinks": torch.tensor([0.5, -1.0], device=DEVICE),
        "alibi_slopes": torch.tensor([0.1, 0.02], device=DEVICE),
    },
}
if ON_GPU:
    # Pages of a tile or more, which prefill on Hopper reads in boxes.
    OPTIONS["boxes"] = {"head_size": 128, "dtype": HALF, "block_size": 128}
    OPTIONS |= {
        f"{d}_{group}_{name}": {"head_size": d, "num_query_heads": group} | extra
        for d, group in ((64, 4), (128, 4), (128, 7), (256, 2), (512, 1))
        for name, extra in (("half", {"dtype": HALF}), ("fp8", FP8))
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_any_step(options):
    pool = make_pool(**options)
    expected = prefill(pool)
    for parts in (*STEPS.values(), *EARLIER_STEPS.values()):
        assert differing(pool, parts, expected) == 0, parts


# A token sees keys behind it, so that what it sees changes with seq_len.
BOTH_WAYS = {
    "not_causal": {"causal": False, "sliding_window": 50},
    "ranges": {
        "sliding_window": 40,
        "mm_prefix_range": torch.tensor(
            [[[3, 60], [70, 99]], [[5, 39], [0, 0]], [[0, 0]] * 2, [[1, 4], [0, 0]]],
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


@pytest.mark.parametrize(
    ("num_workers", "slots"), [(1, None), (3, None), (3, 1), (16, None)]
)
def test_any_number_of_workers(num_workers, slots):
    """However segments are dealt, and where shares are too large to cut rows."""
    pool = make_pool()
    expected = prefill(pool, num_workers=5)
    for name in ("decodes", "verify"):
        options = {"slots": slots, "num_workers": num_workers}
        assert differing(pool, STEPS[name], expected, **options) == 0, name


def test_without_the_mode_bits_differ():
    pool = make_pool()
    expected = check(pool, update(make_schedule(pool), pool))
    assert any(
        differing(pool, parts, expected, batch_invariant=False)
        for parts in (*STEPS.values(), *EARLIER_STEPS.values())
    )


def test_a_long_decode_keeps_all_workers_busy():
    """A row is cut, and each worker leaves states of its own."""
    pool = make_pool()
    step = make_step(pool, STEPS["alone"])
    schedule = update(invariant_schedule(step, num_workers=3), step)
    check(step, schedule)
    segments = -(-LONG // schedule.plan.segment)
    share = -(-segments // 3)
    left = schedule.partials[1].isfinite().sum()
    # That of the first worker's share, and those of the later segments; of two heads.
    assert left == 2 * (1 + segments - share)


def test_replay():
    """A captured step computes other ones, with the same bits as ever."""
    pool = make_pool(dtype=HALF)
    expected = prefill(pool)
    steps = [STEPS["verify"], [(0, 1, LONG)], [(1, 2, EDGE), (0, 5, LONG - 1)]]
    longest, most = 16, 32
    static = make_step(pool, [(0, longest, LONG)] * 3)
    static = dataclasses.replace(
        static,
        query=static.query[:most].clone(),
        block_table=static.block_table.clone(),
    )
    output = torch.zeros_like(static.query)
    lse = torch.zeros(output.shape[:2], device=DEVICE)
    schedule = invariant_schedule(static)

    def load(parts: Sequence[Part]) -> None:
        step = make_step(pool, parts)
        static.query[: len(step.query)] = step.query
        static.query_start_loc.fill_(len(step.query))
        static.query_start_loc[: len(parts)] = step.query_start_loc[:-1]
        static.seq_lens.zero_()
        static.seq_lens[: len(parts)] = step.seq_lens
        static.block_table[: len(parts)] = step.block_table

    def run() -> None:
        update(schedule, static)
        call(static, output, lse, schedule)

    load(steps[1])
    replay = capture(run)
    for parts in steps:
        load(parts)
        replay()
        rows = rows_of(pool, parts)
        for found, right in zip((output, lse), expected):
            assert torch.equal(found[: len(rows)], right[rows])
