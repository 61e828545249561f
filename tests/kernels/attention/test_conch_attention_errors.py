# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every call that CONCH cannot serve is a ValueError that names the argument."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    ON_GPU,
    Batch,
    call,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)
from tests.kernels.attention.conch_reference import SENTINEL
from vllm.attention.ops.conch import VarlenSchedule


def strided_last(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape with a last stride of 2."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor on another device."""
    return tensor.to("cpu" if ON_GPU else "meta")


def heads_far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """Heads whose offsets need more than 32 bits; on no device."""
    shape, stride = tensor.shape, 2**29
    return torch.empty_strided(
        shape, (shape[2], stride, 1), dtype=tensor.dtype, device="meta"
    )


def change(name: str, how: Callable) -> Callable[[Batch], Batch]:
    """A batch with one field replaced by how(field)."""
    return lambda batch: dataclasses.replace(batch, **{name: how(getattr(batch, name))})


def made_for(**options) -> Callable[[Batch], Batch]:
    """A batch of another shape, whatever its lengths."""
    return lambda batch: make_batch([(1, 20), (3, 3)], **options)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=DEVICE)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=DEVICE)


def windowed(**fields) -> Callable[[Batch], Batch]:
    """A batch with a window of 8 and other fields replaced."""
    return lambda batch: dataclasses.replace(batch, sliding_window=8, **fields)


# Argument that the message names, what is wrong, and how a good batch becomes bad.
BAD_BATCHES = [
    ("query", "2-D", change("query", lambda t: t.flatten(1))),
    ("query", "int32", change("query", lambda t: t.int())),
    ("query", "float64", change("query", lambda t: t.double())),
    ("query", "last stride", change("query", strided_last)),
    ("query", "head size 8", made_for(head_size=8)),
    ("query", "head size 528", made_for(head_size=528)),
    ("key_cache", "head ratio", change("query", lambda t: t[:, :3])),
    ("key_cache", "3-D", change("key_cache", lambda t: t[:, :, 0])),
    ("key_cache", "other dtype", change("key_cache", lambda t: t.half())),
    ("key_cache", "raw fp8 bytes", change("key_cache", lambda t: t.to(torch.uint8))),
    ("key_cache", "last stride", change("key_cache", strided_last)),
    ("key_cache", "head size", change("key_cache", lambda t: t[..., :16])),
    ("key_cache", "page of 8", change("key_cache", lambda t: t[:, :8])),
    ("key_cache", "page of 24", made_for(block_size=24)),
    ("key_cache", "device", change("key_cache", elsewhere)),
    ("value_cache", "shape", change("value_cache", lambda t: t[:, :, :1])),
    ("value_cache", "pages", change("value_cache", lambda t: t[1:])),
    ("value_cache", "dtype", change("value_cache", lambda t: t.half())),
    ("value_cache", "last stride", change("value_cache", strided_last)),
    ("value_cache", "device", change("value_cache", elsewhere)),
    ("query_start_loc", "int64", change("query_start_loc", lambda t: t.long())),
    ("query_start_loc", "2-D", change("query_start_loc", lambda t: t[None])),
    ("query_start_loc", "too short", change("query_start_loc", lambda t: t[:-1])),
    ("query_start_loc", "stride", change("query_start_loc", strided_last)),
    ("query_start_loc", "device", change("query_start_loc", elsewhere)),
    ("seq_lens", "int64", change("seq_lens", lambda t: t.long())),
    ("seq_lens", "2-D", change("seq_lens", lambda t: t[None])),
    ("seq_lens", "stride", change("seq_lens", strided_last)),
    ("seq_lens", "device", change("seq_lens", elsewhere)),
    ("block_table", "int64", change("block_table", lambda t: t.long())),
    ("block_table", "1-D", change("block_table", lambda t: t[0])),
    ("block_table", "rows", change("block_table", lambda t: t[:-1])),
    ("block_table", "last stride", change("block_table", strided_last)),
    ("block_table", "device", change("block_table", elsewhere)),
    ("max_query_len", "negative", change("max_query_len", lambda n: -1)),
    ("scale", "zero", change("scale", lambda x: 0.0)),
    ("scale", "negative", change("scale", lambda x: -x)),
    ("scale", "NaN", change("scale", lambda x: math.nan)),
    ("scale", "infinite", change("scale", lambda x: math.inf)),
    ("softcap", "negative", change("softcap", lambda x: -1.0)),
    ("softcap", "NaN", change("softcap", lambda x: math.nan)),
    ("softcap", "tiny", change("softcap", lambda x: 1e-40)),
    ("softcap", "so large that tanh is 0", change("softcap", lambda x: 1e6)),
    ("softcap", "None", change("softcap", lambda x: None)),
    ("scale", "a word", change("scale", lambda x: "x")),
    ("max_query_len", "None", change("max_query_len", lambda n: None)),
    ("sliding_window", "a tensor", change("sliding_window", lambda n: torch.tensor(8))),
    ("chunk_lookback", "None", windowed(chunk_lookback=None)),
    ("alibi_sqrt", "no slopes", change("alibi_sqrt", lambda _: True)),
    ("sliding_window", "a fraction", change("sliding_window", lambda n: 1.5)),
    ("sliding_window", "a list", change("sliding_window", lambda n: [8])),
    ("query", "heads far apart", change("query", heads_far_apart)),
    ("sliding_window", "zero", change("sliding_window", lambda n: 0)),
    ("sliding_window", "negative", change("sliding_window", lambda n: -1)),
    ("q_scale", "two", change("q_scale", lambda t: ones(2))),
    ("q_scale", "device", change("q_scale", lambda t: elsewhere(ones(1)))),
    ("k_scale", "two", change("k_scale", lambda t: torch.ones(2, device=DEVICE))),
    ("k_scale", "fp16", change("k_scale", lambda t: torch.ones(1).half().to(DEVICE))),
    ("k_scale", "a number", change("k_scale", lambda t: 2.0)),
    ("sinks", "heads", change("sinks", lambda t: ones(5))),
    ("sinks", "2-D", change("sinks", lambda t: ones(4, 1))),
    ("sinks", "int32", change("sinks", lambda t: ones(4).int())),
    ("sinks", "stride", change("sinks", lambda t: ones(8)[::2])),
    ("sinks", "device", change("sinks", lambda t: elsewhere(ones(4)))),
    ("alibi_slopes", "heads", change("alibi_slopes", lambda t: ones(5))),
    ("alibi_slopes", "fp16", change("alibi_slopes", lambda t: ones(4).half())),
    ("alibi_slopes", "stride", change("alibi_slopes", lambda t: ones(8)[::2])),
    ("alibi_slopes", "device", change("alibi_slopes", lambda t: elsewhere(ones(4)))),
    ("causal", "a word", change("causal", lambda _: "no")),
    ("causal", "None", change("causal", lambda _: None)),
    ("causal", "a list", change("causal", lambda _: [True, False])),
    ("causal", "float", change("causal", lambda t: ones(2))),
    ("causal", "2-D", change("causal", lambda t: ones(2, 1).int())),
    ("causal", "rows", change("causal", lambda t: ones(1).int())),
    ("causal", "device", change("causal", lambda t: elsewhere(ones(2).int()))),
    ("mm_prefix_range", "2-D", change("mm_prefix_range", lambda t: zeros(2, 2))),
    ("mm_prefix_range", "triples", change("mm_prefix_range", lambda t: zeros(2, 1, 3))),
    ("mm_prefix_range", "rows", change("mm_prefix_range", lambda t: zeros(1, 1, 2))),
    (
        "mm_prefix_range",
        "int64",
        change("mm_prefix_range", lambda t: zeros(2, 1, 2).long()),
    ),
    (
        "mm_prefix_range",
        "stride",
        change("mm_prefix_range", lambda t: zeros(2, 2, 2)[:, :1]),
    ),
    (
        "mm_prefix_range",
        "stride of ranges",
        change("mm_prefix_range", lambda t: zeros(2, 1, 4)[..., :2]),
    ),
    ("mm_prefix_range", "a list", change("mm_prefix_range", lambda t: [[(0, 1)]] * 2)),
    ("prefix_lens", "no window", change("prefix_lens", lambda t: zeros(2))),
    ("prefix_lens", "int64", windowed(prefix_lens=zeros(2).long())),
    ("prefix_lens", "rows", windowed(prefix_lens=zeros(1))),
    ("prefix_lens", "not causal", windowed(prefix_lens=zeros(2), causal=False)),
    ("prefix_lens", "chunks", windowed(prefix_lens=zeros(2), chunk_lookback=1)),
    ("chunk_lookback", "no window", change("chunk_lookback", lambda n: 0)),
    ("chunk_lookback", "empty chunks", windowed(chunk_lookback=8)),
    ("chunk_lookback", "not causal", windowed(chunk_lookback=1, causal=False)),
    ("chunk_lookback", "flags", windowed(chunk_lookback=1, causal=zeros(2))),
    (
        "sliding_window",
        "of unequal chunks",
        windowed(
            chunk_lookback=2,
            mm_prefix_range=zeros(2, 1, 2),
            mm_prefix_in_window=True,
        ),
    ),
    ("output_scale", "two", change("output_scale", lambda t: ones(2))),
    ("output_scale", "device", change("output_scale", lambda t: elsewhere(ones(1)))),
    ("output", "not fp8", change("output_scale", lambda t: ones(1))),
    ("v_scale", "two", change("v_scale", lambda t: torch.ones(2, device=DEVICE))),
    ("v_scale", "device", change("v_scale", lambda t: elsewhere(torch.ones(1)))),
]
FP8 = torch.float8_e4m3fn
BAD_FP8_BATCHES = [
    ("query", "e5m2", {"query_dtype": torch.float8_e5m2}),
    ("key_cache", "16 bits", {"kv_dtype": torch.float16}),
    ("key_cache", "e5m2", {"kv_dtype": torch.float8_e5m2}),
    ("output", "fp8 without a scale", {"output_dtype": FP8}),
    ("output", "float64", {"output_dtype": torch.float64}),
]
# What is wrong with the output, with the LSE.
BAD_OUTPUTS = [
    ("shape", lambda t: t[:, :-1]),
    ("rows", lambda t: t[:-1]),
    ("dtype", lambda t: t.half()),
    ("last stride", strided_last),
    ("device", elsewhere),
]


def ids(case) -> str:
    return case.replace(" ", "_") if isinstance(case, str) else ""


def assert_refused(argument: str, batch: Batch, **tensors) -> None:
    output = torch.full(batch.query.shape, SENTINEL, device=DEVICE)
    output = tensors.pop("output", output.to(batch.query.dtype))
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        call(batch, output, **tensors)
    assert output.device.type == "meta" or (output == SENTINEL).all()


def attend_plainly(batch: Batch, schedule: VarlenSchedule) -> None:
    """As `assert_refused` calls, so that what is kept of this call is found there."""
    call(batch, torch.empty(batch.query.shape, device=DEVICE), schedule=schedule)


@pytest.mark.parametrize("argument, what, spoil", BAD_BATCHES, ids=ids)
def test_bad_batches(argument, what, spoil):
    assert_refused(argument, spoil(make_batch([(1, 20), (3, 3)])))


MESSAGES = [
    ("scale", torch.tensor(0.1), "got Tensor.* Pass float.scale."),
    ("scale", np.float32(0.1), "got float32.* Pass float.scale."),
    ("softcap", np.float32(20.0), "got float32.* Pass float.softcap."),
    ("max_query_len", torch.tensor(3), "got Tensor.* Pass int.max_query_len."),
    ("causal", "no", "got str, allowed: a bool"),
    ("causal", ones(2), "got torch.float32, allowed: torch.bool, torch.int32.$"),
]


@pytest.mark.parametrize("argument, value, message", MESSAGES, ids=ids)
def test_what_may_come_instead(argument, value, message):
    batch = change(argument, lambda _: value)(make_batch([(1, 20), (3, 3)]))
    with pytest.raises(ValueError, match=f"^{argument}: {message}"):
        call(batch, torch.empty(batch.query.shape, device=DEVICE))


@pytest.mark.parametrize("schedule", [3, "good", VarlenSchedule], ids=str)
def test_what_is_no_schedule(schedule):
    batch = make_batch([(1, 20), (3, 3)])
    with pytest.raises(ValueError, match="^schedule: got .*a VarlenSchedule or None"):
        call(batch, torch.empty(batch.query.shape, device=DEVICE), schedule=schedule)


def test_numbers_of_numpy():
    """Integers count as Python's, with a schedule and without."""
    batch = make_batch([(1, 20), (3, 3)], sliding_window=8)
    options = dict(sliding_window=np.int64(8), max_query_len=np.int32(3))
    same = dataclasses.replace(batch, **options)
    sizes = dict(max_num_seqs=np.int64(2), max_num_tokens=np.int32(len(batch.query)))
    results = [torch.zeros(batch.query.shape, device=DEVICE) for _ in range(3)]
    schedule = update(make_schedule(same, **sizes), same)
    assert type(schedule.max_query_len) is type(schedule.sight.sliding_window) is int
    call(batch, results[0])
    call(same, results[1])
    call(same, results[2], schedule=schedule)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_good_window_after_a_bad_one():
    """Of a bad one, equal as it may be, nothing is kept."""
    batch = make_batch([(1, 20), (3, 3)])
    good = dataclasses.replace(batch, sliding_window=177)
    assert_refused("sliding_window", dataclasses.replace(batch, sliding_window=177.0))
    attend_plainly(good, update(make_schedule(good), good))


@pytest.mark.parametrize("argument, what, options", BAD_FP8_BATCHES, ids=ids)
def test_bad_fp8_queries(argument, what, options):
    options = {"query_dtype": FP8, "kv_dtype": FP8, "dtype": torch.float16} | options
    batch = make_batch([(1, 20), (3, 3)], **options)
    output = torch.full(batch.query.shape, 16.0, device=DEVICE)
    output = output.to(batch.output_dtype)
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        call(batch, output)
    assert (output.float() == 16.0).all()


@pytest.mark.parametrize("argument", ["output", "output_lse"])
@pytest.mark.parametrize("what, spoil", BAD_OUTPUTS, ids=ids)
def test_bad_outputs(what, spoil, argument):
    batch = make_batch([(1, 20), (3, 3)])
    if argument == "output":
        output = torch.full(batch.query.shape, SENTINEL, device=DEVICE)
        assert_refused(argument, batch, output=spoil(output))
    else:
        lse = torch.full(batch.query.shape[:2], SENTINEL, device=DEVICE)
        assert_refused(argument, batch, lse=spoil(lse))


# What is wrong, the argument, and it in a good call, that the bad one follows.
BAD_AFTER_GOOD = [
    ("heads", "sinks", ones(4), ones(2)),
    ("a list", "sinks", ones(4), [1.0] * 4),
    ("heads", "alibi_slopes", ones(4), ones(2)),
    ("a list", "alibi_slopes", ones(4), [1.0] * 4),
    ("a word", "causal", True, "no"),
    ("a list", "causal", True, [True, False]),
    ("no slopes", "alibi_sqrt", False, True),
    ("two", "k_scale", ones(1), ones(2)),
    ("a number", "k_scale", ones(1), 2.0),
    ("two", "v_scale", ones(1), ones(2)),
    ("two", "q_scale", ones(1), ones(2)),
]


@pytest.mark.parametrize("what, argument, good, bad", BAD_AFTER_GOOD, ids=ids)
def test_bad_batches_after_good_ones(what, argument, good, bad):
    """With a schedule, and launches that are planned already."""
    batch = make_batch([(1, 20), (3, 3)])
    schedule = update(make_schedule(batch), batch)
    attend_plainly(dataclasses.replace(batch, **{argument: good}), schedule)
    spoilt = dataclasses.replace(batch, **{argument: bad})
    assert_refused(argument, spoilt, schedule=schedule)


@pytest.mark.parametrize("name", ["causal", "prefix_lens"])
def test_gaps_between_flags_after_a_batch_of_one(name):
    """Of one sequence the stride is anything."""
    flags = zeros(8)[::2]
    field = {name: flags[:1], "sliding_window": None if name == "causal" else 8}
    one = dataclasses.replace(make_batch([(3, 20)]), **field)
    attend_plainly(one, update(make_schedule(one), one))
    field[name] = zeros(2)
    two = dataclasses.replace(make_batch([(3, 20), (3, 3)]), **field)
    schedule = update(make_schedule(two), two)
    spoilt = dataclasses.replace(two, **{name: flags[:2]})
    assert_refused(name, spoilt, schedule=schedule)


def test_fewer_rows_and_pages_after_a_good_batch():
    batch = make_batch([(1, 20), (3, 3)])
    schedule = update(make_schedule(batch), batch)
    attend_plainly(batch, schedule)
    output = torch.full(batch.query.shape, SENTINEL, device=DEVICE)
    lse = torch.full(batch.query.shape[:2], SENTINEL, device=DEVICE)
    assert_refused("output", batch, output=output[:2], schedule=schedule)
    assert_refused("output_lse", batch, lse=lse[:2], schedule=schedule)
    fewer = dataclasses.replace(batch, value_cache=batch.value_cache[1:])
    assert_refused("value_cache", fewer, schedule=schedule)
    none = dataclasses.replace(batch, block_table=None)
    assert_refused("block_table", none, schedule=schedule)


@pytest.mark.parametrize(
    "other",
    [
        {"num_query_heads": 2},
        {"num_kv_heads": 1},
        {"head_size": 48},
        {"block_size": 32},
        {"dtype": torch.float16},
        {"kv_dtype": torch.float8_e5m2},
        {"kv_dtype": FP8, "query_dtype": FP8},
        {"sliding_window": 5},
    ],
    ids=str,
)
def test_a_schedule_of_another_layer(other):
    lengths = [(1, 20), (3, 3)]
    theirs = make_batch(lengths, **other)
    schedule = update(make_schedule(theirs), theirs)
    assert_refused("schedule", make_batch(lengths), schedule=schedule)


@pytest.mark.parametrize(
    "features",
    [
        {"chunk_lookback": 1},
        {"mm_prefix_range": zeros(2, 1, 2)},
        {"mm_prefix_range": zeros(2, 3, 2)},
        {"mm_prefix_range": zeros(2, 2, 2), "mm_prefix_in_window": True},
        {"prefix_lens": zeros(2)},
    ],
    ids=["chunks", "one_range", "three_ranges", "in_window", "prefix"],
)
def test_a_schedule_updated_for_other_limits(features):
    lengths = [(1, 20), (3, 3)]
    theirs = make_batch(lengths, sliding_window=8, **features)
    schedule = update(make_schedule(theirs), theirs)
    for ours in {}, {"mm_prefix_range": zeros(2, 2, 2)}:
        batch = make_batch(lengths, sliding_window=8, **ours)
        assert_refused("schedule", batch, schedule=schedule)


def test_a_schedule_that_was_not_updated():
    batch = make_batch([(1, 20), (3, 3)])
    assert_refused("schedule", batch, schedule=make_schedule(batch))


@pytest.mark.parametrize("max_query_len", [1, 20])
def test_a_schedule_updated_for_another_max_query_len(max_query_len):
    batch = make_batch([(1, 20), (3, 3)])
    schedule = update(make_schedule(batch), batch)
    batch.max_query_len = max_query_len
    assert_refused("max_query_len", batch, schedule=schedule)


def test_a_schedule_updated_for_another_number_of_sequences():
    batch, fewer = make_batch([(1, 20), (3, 3)]), make_batch([(3, 9)])
    schedule = update(make_schedule(batch), fewer)
    assert_refused("schedule", batch, schedule=schedule)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("max_num_seqs", 0),
        ("max_num_seqs", None),
        ("num_workers", 1.5),
        ("max_num_tokens", 0),
        ("num_query_heads", 3),
        ("num_kv_heads", 0),
        ("head_size", 8),
        ("head_size", 528),
        ("block_size", 24),
        ("query_dtype", torch.float64),
        ("query_dtype", torch.float8_e5m2),
        ("kv_dtype", torch.int16),
        ("token_scales", True),
        ("decode_query_len", 0),
        ("sliding_window", 0),
        ("chunk_lookback", 0),
        ("device", None),
        ("device", "nowhere"),
    ],
)
def test_bad_schedules(argument, value):
    named = "kv_dtype" if argument == "token_scales" else argument
    with pytest.raises(ValueError, match=rf"^{named}: got "):
        make_schedule(make_batch([(1, 20)]), **{argument: value})


@pytest.mark.parametrize("argument", ["max_num_seqs", "max_num_tokens"])
def test_a_batch_larger_than_the_schedule(argument):
    batch = make_batch([(1, 20), (3, 3)])
    schedule = make_schedule(batch, **{argument: 1})
    with pytest.raises(ValueError, match=f"up to 1. Make .* larger {argument}"):
        update(schedule, batch)


@pytest.mark.parametrize("spoil", [torch.Tensor.long, elsewhere, lambda t: t[:1]])
@pytest.mark.parametrize("argument", ["mm_prefix_range", "prefix_lens"])
def test_bad_limits_of_an_update(argument, spoil):
    batch = make_batch([(1, 20), (3, 3)], sliding_window=8)
    schedule = make_schedule(batch)
    shape = (2, 1, 2) if argument == "mm_prefix_range" else (2,)
    batch = dataclasses.replace(batch, **{argument: spoil(zeros(*shape))})
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        update(schedule, batch)


@pytest.mark.parametrize("argument", ["query_start_loc", "seq_lens"])
@pytest.mark.parametrize(
    "spoil", [torch.Tensor.long, strided_last, elsewhere, torch.Tensor.tolist]
)
def test_bad_updates(spoil, argument):
    batch = change(argument, spoil)(make_batch([(1, 20), (3, 3)]))
    schedule = make_schedule(batch)
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        update(schedule, batch)


@pytest.mark.parametrize("argument", ["max_query_len", "num_tokens"])
@pytest.mark.parametrize("value", [None, -1, 2.5, torch.tensor(3)], ids=str)
def test_bad_numbers_of_an_update(value, argument):
    batch = make_batch([(1, 20), (3, 3)])
    numbers = {"max_query_len": 3, "num_tokens": 4, argument: value}
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        make_schedule(batch).update(batch.query_start_loc, batch.seq_lens, **numbers)
