# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Queries in fp8 over a cache in fp8: every kernel, and Hopper's own for them."""

import dataclasses

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    DTYPES,
    HALF_DTYPES,
    ON_GPU,
    Batch,
    assert_close,
    attend,
    call,
    check,
    compare,
    hopper,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)
from tests.kernels.attention.conch_reference import LAYOUTS, SENTINEL, Attention
from vllm.attention.ops.conch import schedule as schedule_module
from vllm.attention.ops.conch.plan import reads_e4m3, this_device

FP8 = torch.float8_e4m3fn
if not reads_e4m3(FP8, this_device(0 if ON_GPU else None)):
    pytest.skip("this device has no e4m3fn", allow_module_level=True)

HALF = HALF_DTYPES[-1]
SCALES = {"q_scale": 0.5, "k_scale": 0.25, "v_scale": 2.0}
BATCHES = {
    "prefill": [(1, 1), (5, 5), (16, 16), (33, 33)],
    "decode": [(1, 1), (1, 16), (1, 70)],
    "verify": [(2, 20), (5, 5), (16, 49)],
    "mixed": [(1, 33), (40, 40), (3, 20), (1, 1), (24, 55)],
    "padded": [(0, 40), (18, 20), (0, 0), (1, 30)],
    "capture_dummies": [(20, 1), (33, 17), (18, 0)],
}
DECODE_AND_MIXED = [BATCHES["decode"], BATCHES["mixed"]]


def fp8_batch(lengths: list[tuple[int, int]], dtype=HALF, **options) -> Batch:
    """Query and cache in fp8, an output of dtype."""
    options = {"dtype": dtype, "query_dtype": FP8, "kv_dtype": FP8} | options
    return make_batch(lengths, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_lengths(lengths, dtype):
    check(fp8_batch(lengths, dtype, **SCALES))


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("name", SCALES)
def test_each_scale(name, softcap, lengths):
    check(fp8_batch(lengths, softcap=softcap, **{name: 0.5}))


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
def test_a_scaled_query_of_16_bits(lengths):
    check(make_batch(lengths, dtype=HALF, q_scale=0.5))


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize("head_size", [16, 33, 48, 80, 128, 256])
def test_head_sizes(head_size, lengths):
    heads = {"num_query_heads": 4, "num_kv_heads": 1, "head_size": head_size}
    check(fp8_batch(lengths, **heads, **SCALES))


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, lengths):
    check(fp8_batch(lengths, layout=layout, block_size=48))


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize(
    "features",
    [
        {"sinks": torch.linspace(-3, 6, 4, device=DEVICE)},
        {"alibi_slopes": torch.linspace(0, 1, 4, device=DEVICE)},
        {"sliding_window": 20, "chunk_lookback": 1},
        {"sliding_window": 7},
        {"causal": False},
    ],
    ids=lambda features: "_".join(features),
)
def test_features(features, lengths):
    check(fp8_batch(lengths, **features))


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
def test_output_in_fp8(lengths):
    scale = torch.full((1,), 0.25, device=DEVICE)
    check(fp8_batch(lengths, output_scale=scale, output_dtype=FP8, **SCALES))


@pytest.mark.parametrize("query_len", [1, 17])
def test_every_value_of_a_query_counts(query_len):
    """One key, 1 where the query has its value: the LSE is the scaled value."""
    values = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(FP8)
    values = values[values.float().isfinite()]
    lengths = [(query_len, query_len)] * len(values)
    shape = {"num_query_heads": 1, "num_kv_heads": 1, "padding": 0}
    batch = fp8_batch(lengths, sliding_window=1, q_scale=0.5, **shape)
    batch.query.zero_()
    batch.query[:, 0, 0] = values.repeat_interleave(query_len)
    pages = batch.block_table[:, : -(-query_len // 16)].flatten().long()
    batch.key_cache[pages] = torch.zeros_like(batch.key_cache[pages])
    batch.key_cache[pages, ..., 0] = torch.ones_like(batch.key_cache[pages, ..., 0])
    _, lse = attend(batch)
    expected = batch.query[:, :, 0].double() * 0.5 * batch.scale
    # Hopper's kernel has 2^8 in its sums, and takes 8 off their logarithm.
    size = expected.abs() + (8.0 if ON_GPU and query_len > 1 else 0.0)
    assert_close("LSE", lse, expected, 2.0**-22 * size)


@pytest.mark.parametrize("item_tiles", [2, 3, 6])
@pytest.mark.parametrize("lengths", [BATCHES["mixed"], [(97, 120), (200, 200)]])
def test_prefill_items_of_several_tiles(lengths, item_tiles, monkeypatch):
    """As where Hopper's kernel has another tile than the portable one after it."""
    make_plan = schedule_module.make_plan

    def with_rows(*args):
        plan = make_plan(*args)
        rows = item_tiles * plan.prefill.block_m
        return dataclasses.replace(plan, prefill_rows=rows, hopper=None)

    monkeypatch.setattr(schedule_module, "make_plan", with_rows)
    batch = make_batch(lengths, dtype=HALF)
    schedule = update(make_schedule(batch), batch)
    assert schedule.plan.prefill_rows == item_tiles * schedule.plan.prefill.block_m
    check(batch, schedule)


# ---- Hopper's kernel


def runs_on_hopper(batch: Batch) -> bool:
    """Whether the plan has the kernel for it."""
    schedule = update(make_schedule(batch), batch)
    return schedule.plan.hopper == "fp8" and len(schedule.work) > 0


def hopper_batch(lengths: list[tuple[int, int]], **options) -> Batch:
    batch = fp8_batch(lengths, **options)
    assert runs_on_hopper(batch)
    return batch


on_hopper = pytest.mark.usefixtures("hopper")
RAGGED = [(1000, 1000), (1, 1500), (300, 2011), (0, 0), (129, 129), (700, 13), (17, 65)]
if not ON_GPU:
    RAGGED = [(200, 200), (1, 300), (40, 411), (0, 0), (129, 129), (150, 13), (17, 65)]


@on_hopper
@pytest.mark.parametrize("head_size", [48, 64, 80, 128, 192, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 128},
        {"block_size": 128, "causal": False},
        {"block_size": 64, "layout": "packed_HND", "padding": 0, **SCALES},
        {"block_size": 16, "num_query_heads": 7, "num_kv_heads": 1},
        {"block_size": 48, "num_query_heads": 8, "num_kv_heads": 8},
        {"block_size": 528, "layout": "unlike", "dtype": torch.float16},
        {"block_size": 128, "sliding_window": 200},
        {"block_size": 16, "sliding_window": 100, "causal": False},
        {"block_size": 16, "sliding_window": 60, "frees_pages": True},
        {"block_size": 64, "softcap": 20.0, "logit_std": 10.0, **SCALES},
    ],
    ids=str,
)
def test_hopper(options, head_size):
    check(hopper_batch(RAGGED, head_size=head_size, **options))


@on_hopper
@pytest.mark.parametrize("query_len", [63, 64, 65, 127, 128, 129, 191, 192, 193, 385])
def test_hopper_tails_of_queries(query_len):
    """Rows of tiles that are no queries, consumers without any."""
    for context in 0, 1, 127, 500:
        lengths = [(query_len, query_len + context), (20, 20 + context)]
        check(hopper_batch(lengths, head_size=128, block_size=16))


@on_hopper
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("logit_std", [1.0, 3.0, 30.0])
def test_hopper_error_is_that_of_the_format(logit_std, head_size):
    """Root mean square of all errors, which a wrong key in a thousand would raise.

    A rounding to e4m3 is off by up to 2^-4 and, spread evenly, by 2^-4 / sqrt 3, of the
    noise; one to the output's dtype likewise. What sums lose is small beside them.
    """
    lengths = [(1500, 1500), (500, 4000)] if ON_GPU else [(300, 300), (100, 800)]
    batch = hopper_batch(lengths, head_size=head_size, logit_std=logit_std)
    output, _ = check(batch)
    live = slice(batch.num_live_tokens)
    reference = Attention(*(part[live] for part in batch.reference()))

    def rms(tensor: torch.Tensor) -> float:
        return tensor.double().square().mean().sqrt().item()

    rounding = torch.finfo(output.dtype).eps / 2 * rms(reference.output)
    allowed = (2.0**-4 * rms(reference.output_noise) + rounding) / 3**0.5
    assert rms(output - reference.output) <= allowed


@on_hopper
def test_hopper_equal_weights_average_exactly():
    """Equal weights are 1: P and its sum lose nothing, over however many tiles."""
    num_pages = 64 if ON_GPU else 8
    batch = hopper_batch([(300, 128 * num_pages)], head_size=128, block_size=128)
    pages = batch.block_table[0, :num_pages].long()
    batch.key_cache[pages] = torch.zeros_like(batch.key_cache[pages])
    batch.value_cache[pages] = torch.ones_like(batch.value_cache[pages])
    output, _ = check(batch)
    assert (output == 1).all()


@on_hopper
def test_hopper_results_repeat():
    batch = hopper_batch(RAGGED, head_size=128, block_size=16)
    schedule = update(make_schedule(batch), batch)
    expected, expected_lse = attend(batch, schedule)
    for _ in range(20 if ON_GPU else 2):
        output, lse = attend(batch, schedule)
        assert torch.equal(output, expected) and torch.equal(lse, expected_lse)


@on_hopper
@pytest.mark.parametrize("kind", ["query", "key_cache", "lse"])
def test_what_tma_cannot_read_is_done_otherwise(kind):
    """Addresses off by a byte, and an LSE of strided rows."""
    batch = hopper_batch(RAGGED, head_size=128)
    schedule = update(make_schedule(batch), batch)
    num_tokens, num_heads = batch.query.shape[:2]
    lse = torch.full((num_tokens, num_heads + 3), SENTINEL, device=DEVICE)
    if kind == "lse":
        rows = lse[:, :num_heads]
    else:
        rows = lse[:, :num_heads].clone()
        tensor = getattr(batch, kind)
        storage = torch.empty(
            tensor.untyped_storage().nbytes() + 16, dtype=FP8, device=DEVICE
        )
        copy = storage[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        batch = dataclasses.replace(batch, **{kind: copy})
    output = torch.empty(batch.query.shape, dtype=HALF, device=DEVICE)
    call(batch, output, rows, schedule)
    live = batch.num_live_tokens
    compare(batch, output[:live], rows[:live])  # the portable kernel's bound
    assert (lse[:, num_heads:] == SENTINEL).all()
