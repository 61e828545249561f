# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""varlen_attention against the reference: lengths, shapes, layouts and options.

Batches are lists of (query_len, seq_len). All memory that no query may see holds
NaN and all memory that nobody may write holds a sentinel, see `make_batch` and
`attend`.
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
    ON_GPU,
    assert_close,
    attend,
    call,
    check,
    compare,
    gpu_only,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)
from tests.kernels.attention.conch_reference import LAYOUTS, SENTINEL

BATCHES = {
    "prefill": [(1, 1), (5, 5), (16, 16), (33, 33)],
    "decode": [(1, 1), (1, 15), (1, 16), (1, 17), (1, 70)],
    "chunked_prefill": [(17, 40), (32, 64), (20, 53)],
    "speculative_verify": [(2, 20), (5, 5), (16, 49), (4, 17)],
    "mixed": [(1, 33), (40, 40), (3, 20), (1, 1), (24, 55)],
    "padded_decode": [(0, 0), (1, 20), (0, 33), (1, 9), (0, 0), (0, 0)],
    "padded_mixed": [(0, 40), (18, 20), (0, 0), (1, 30)],
    "capture_dummy_decode": [(8, 3), (4, 0), (1, 0), (2, 1)],
    "capture_dummy_prefill": [(20, 1), (33, 17), (18, 0)],
    "one_token": [(1, 1)],
    "nothing": [(0, 0)],
}
if ON_GPU:
    BATCHES |= {
        "long_prefill": [(1000, 1000), (129, 129), (2048, 2048)],
        "long_chunks": [(512, 8192), (300, 5001), (1, 32768)],
        "many_decodes": [(1, 37 * i + 1) for i in range(200)],
        "long_decode": [(1, 131072)],
        "long_verify": [(5, 32768), (16, 9001), (2, 100)],
        "long_mixed": [(1, 20000), (700, 700), (1, 8192), (64, 4096), (4, 11111)],
    }
DECODE_AND_MIXED = [[(1, 35), (4, 20)], [(1, 35), (20, 37)]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_lengths(lengths, dtype):
    check(make_batch(lengths, dtype=dtype))


@pytest.mark.parametrize("lengths", [[(5, 37), (1, 40), (2, 33)], [(20, 52), (1, 40)]])
def test_prefix_hit_shares_pages(lengths):
    batch = make_batch(lengths, shared_pages=2)
    assert (batch.block_table[:, :2] == batch.block_table[0, :2]).all()
    check(batch)


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize(
    "num_query_heads, num_kv_heads",
    [
        (1, 1),
        (3, 3),
        (8, 2),
        (10, 2),
        (6, 1),
        (7, 1),
        (16, 2),
        (16, 1),
        (64, 1),
        (71, 1),
    ],
)
def test_head_ratios(num_query_heads, num_kv_heads, lengths):
    check(
        make_batch(
            lengths,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            dtype=HALF_DTYPES[-1],
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_heads_than_a_tile_has_rows(dtype):
    """The heads of one token are spread over tiles, of prefill and of decode."""
    heads = {"num_query_heads": 130, "num_kv_heads": 1}
    heads["head_size"] = 512 if ON_GPU else 16
    for lengths in [(1, 35), (4, 20)], [(20, 37), (1, 35), (18, 37)]:
        check(make_batch(lengths, **heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 32, 64, 80, 96, 112, 128, 192, 256, 512])
def test_head_sizes(head_size, dtype):
    heads = {"num_query_heads": 4, "num_kv_heads": 1, "head_size": head_size}
    for lengths in DECODE_AND_MIXED:
        check(make_batch(lengths, **heads, dtype=dtype, layout="unlike"))


@pytest.mark.parametrize("head_size", [24, 33, 40, 72, 120, 511])
def test_uncommon_head_sizes(head_size):
    for lengths in DECODE_AND_MIXED:
        check(make_batch(lengths, head_size=head_size, dtype=HALF_DTYPES[-1]))


@pytest.mark.parametrize("query_len", [1, 20])
@pytest.mark.parametrize("page", [16, 32, 48, 64, 128, 528, 784, 1056])
def test_page_sizes(page, query_len):
    check(
        make_batch(
            [(query_len, page - 1), (1, page), (query_len, page + 1), (1, 1)],
            num_query_heads=2,
            num_kv_heads=1,
            block_size=page,
            dtype=HALF_DTYPES[-1],
        )
    )


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e5m2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, kv_dtype, lengths):
    check(make_batch(lengths, layout=layout, dtype=HALF_DTYPES[-1], kv_dtype=kv_dtype))


@pytest.mark.parametrize("query_len", [1, 18])
def test_strides_of_single_elements_are_not_used(query_len):
    """PyTorch lets a dimension of size 1 have any stride."""

    def restride(tensor: torch.Tensor) -> torch.Tensor:
        strides = [
            stride if size > 1 else 2**40 + 1
            for size, stride in zip(tensor.shape, tensor.stride())
        ]
        return tensor.as_strided(tensor.shape, strides)

    batch = make_batch([(query_len, 40)], num_query_heads=1, num_kv_heads=1, padding=0)
    batch.query = restride(batch.query)
    batch.key_cache = restride(batch.key_cache)
    batch.value_cache = restride(batch.value_cache)
    batch.block_table = restride(batch.block_table)
    assert batch.key_cache.stride(2) > 2**40
    check(batch)


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize("kv_dtype", [None, KV_FP8_DTYPES[0]])
def test_misaligned_tensors(kv_dtype, lengths):
    """After an aligned call of the same strides, every address is off by an element."""
    options = {"dtype": torch.float16, "kv_dtype": kv_dtype, "num_query_heads": 2}
    aligned = make_batch(lengths, **options)
    check(aligned)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.new_empty(tensor.untyped_storage().nbytes() + 16)
        copy = storage[1:].as_strided(tensor.shape, tensor.stride())
        return copy.copy_(tensor)

    names = ("query", "key_cache", "value_cache", "seq_lens", "block_table")
    shifts = {name: shifted(getattr(aligned, name)) for name in names}
    for name in names:
        check(dataclasses.replace(aligned, **{name: shifts[name]}))
    check(dataclasses.replace(aligned, **shifts))


def far_apart(*tensors: torch.Tensor, stride: int) -> list[torch.Tensor]:
    """Copies whose rows lie `stride` elements apart, in one mostly unused memory."""
    first, rows = tensors[0], len(tensors[0])
    size = (rows - 1) * stride + len(tensors) * first[0].numel()
    storage = torch.empty(size, dtype=first.dtype, device=first.device)
    copies = []
    for i, tensor in enumerate(tensors):
        contiguous = tensor.contiguous()
        strides = (stride, *contiguous.stride()[1:])
        copy = storage.as_strided(tensor.shape, strides, i * tensor[0].numel())
        copies.append(copy.copy_(contiguous))
    return copies


@pytest.mark.parametrize("query_len", [1, 20])
@pytest.mark.parametrize("stride", [2**30 + 4096, 2**31 + 4096])
def test_pages_beyond_int32(stride, query_len):
    batch = make_batch([(query_len, 40)], dtype=torch.float16)
    pages, order = batch.block_table[0, :3].long(), torch.tensor([1, 2, 0])
    caches = (cache[pages[order]] for cache in (batch.key_cache, batch.value_cache))
    batch.key_cache, batch.value_cache = far_apart(*caches, stride=stride)
    batch.block_table[0, :3] = order.argsort()
    check(batch)


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("lengths", [[(1, 20), (1, 30), (1, 40)], [(20, 20)]])
def test_rows_beyond_int32(lengths, multiple):
    """Strides of any multiple, and such as TMA takes."""
    batch = make_batch(lengths, dtype=torch.float16, padding=0)
    stride = (2**31 // (len(batch.query) - 1) // 64 + 1) * 64 + multiple
    filled = torch.full_like(batch.query, SENTINEL)
    batch.query, output = far_apart(batch.query, filled, stride=stride)
    lse = torch.full(batch.query.shape[:2], SENTINEL, device=DEVICE)
    call(batch, output, lse)
    compare(batch, output, lse)


@pytest.mark.parametrize("kv_dtype", [None, *KV_FP8_DTYPES])
@pytest.mark.parametrize("query_len", [1, 20])
def test_a_cache_of_one_page_before_a_larger_one(query_len, kv_dtype):
    """As while vLLM measures memory: launches are planned by what has no stride yet."""
    options = {"head_size": 48, "block_size": 48, "kv_dtype": kv_dtype}
    batch = make_batch([(query_len, 190)], **options)
    small = make_batch([(query_len, 40)], **options)
    page = small.block_table[0, :1].long()
    caches = {
        name: getattr(small, name)[page].as_strided(
            getattr(small, name)[:1].shape, getattr(small, name).stride()
        )
        for name in ("key_cache", "value_cache")
    }
    table = torch.zeros_like(batch.block_table)
    check(dataclasses.replace(small, block_table=table, **caches))
    check(batch)


WINDOWS = [1, 2, 15, 16, 17, 40, 1000]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("block_size", [16, 48])
def test_sliding_window(block_size, window, causal):
    """Pages before the window are freed: NaN, with a garbage block-table entry."""
    for lengths in [(1, 150), (4, 133), (16, 16)], [(1, 150), (70, 150), (20, 20)]:
        check(
            make_batch(
                lengths,
                block_size=block_size,
                sliding_window=window,
                causal=causal,
                dtype=torch.float16,
                num_query_heads=2,
                num_kv_heads=1,
            )
        )


@pytest.mark.parametrize("window", [2, 17, 40])
@pytest.mark.parametrize("lengths", [[(1, 150), (4, 133)], [(70, 150), (1, 149)]])
def test_pages_before_the_window_are_block_0(lengths, window):
    """As in vLLM, whose block table has 0 where pages were freed; there it is NaN."""
    options = {"frees_pages": True, "sliding_window": window, "dtype": torch.float16}
    check(make_batch(lengths, num_query_heads=2, num_kv_heads=1, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["prefill", "speculative_verify", "mixed"])
def test_non_causal(name, dtype):
    check(make_batch(BATCHES[name], causal=False, dtype=dtype))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_windows_wider_than_any_sequence(name, causal):
    """Of positions and windows of 32 bits sums have more."""
    check(make_batch(BATCHES[name], sliding_window=2**31 - 1, causal=causal))


@pytest.mark.parametrize("name", ["padded_mixed", "capture_dummy_decode"])
def test_non_causal_padding(name):
    check(make_batch(BATCHES[name], causal=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize("softcap, logit_std", [(1.0, 1), (30.0, 20), (50.0, 4000)])
def test_softcap(softcap, logit_std, lengths, dtype):
    batch = make_batch(lengths, softcap=softcap, logit_std=logit_std, dtype=dtype)
    _, lse = check(batch)
    uncapped = make_batch(lengths, logit_std=logit_std, dtype=dtype)
    if logit_std == 4000:
        assert uncapped.reference().lse.max() > 1e4
        assert lse.max() <= softcap + math.log(40)


@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize("k_scale, v_scale", [(None, None), (0.5, 2.0), (2.0, 0.5)])
@pytest.mark.parametrize("kv_dtype", KV_FP8_DTYPES)
def test_fp8_cache(kv_dtype, k_scale, v_scale, lengths):
    options = {"kv_dtype": kv_dtype, "k_scale": k_scale, "v_scale": v_scale}
    check(make_batch(lengths, dtype=HALF_DTYPES[-1], **options))
    check(make_batch(lengths, dtype=HALF_DTYPES[-1], softcap=3.0, **options))


@pytest.mark.parametrize("layout", ["HND", "packed_NHD"])
@pytest.mark.parametrize("head_size", [16, 33, 80, 256])
def test_fp8_cache_head_sizes(head_size, layout):
    options = {"kv_dtype": KV_FP8_DTYPES[0], "layout": layout, "v_scale": 0.5}
    for lengths in DECODE_AND_MIXED:
        check(
            make_batch(lengths, head_size=head_size, dtype=HALF_DTYPES[-1], **options)
        )


@pytest.mark.parametrize("kv_dtype", KV_FP8_DTYPES)
def test_fp8_cache_decodes_every_value(kv_dtype):
    """One key per sequence: the output is its value, exactly, for every byte."""
    values = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(kv_dtype)
    values = values[values.float().isfinite()]
    if not ON_GPU:  # The interpreter converts subnormal e5m2 numbers wrongly.
        values = values[values.float().abs() >= torch.finfo(kv_dtype).smallest_normal]
    values = torch.cat([values, values[: -len(values) % 32]]).view(-1, 32)
    batch = make_batch(
        [(1, 1)] * len(values),
        num_query_heads=1,
        num_kv_heads=1,
        head_size=32,
        dtype=torch.float16,
        kv_dtype=kv_dtype,
    )
    batch.value_cache[batch.block_table[:, 0].long(), 0, 0] = values
    output, lse = attend(batch)
    assert (output[:, 0] == values.half()).all()


@gpu_only
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("lengths", DECODE_AND_MIXED)
@pytest.mark.parametrize("kv_dtype", KV_FP8_DTYPES)
def test_fp8_values_are_the_same_however_they_are_taken_apart(kv_dtype, lengths, dtype):
    batch = make_batch(lengths, kv_dtype=kv_dtype, dtype=dtype)
    schedule = update(make_schedule(batch), batch)
    if schedule.plan.unpacking != "ptx":
        pytest.skip("taken apart by Triton on this device")
    outputs = []
    for unpacking in ("ptx", "triton"):
        schedule.plan = dataclasses.replace(schedule.plan, unpacking=unpacking)
        outputs.append(attend(batch, schedule)[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[(1, 1), (1, 70), (3, 40)], [(1, 1), (30, 70)]])
def test_zero_keys_average_the_values(lengths, dtype):
    batch = make_batch(lengths, dtype=dtype)
    batch.key_cache[batch.key_cache.isfinite()] = 0
    output, lse = check(batch)
    row = 0
    for query_len, seq_len in lengths:
        seen = torch.arange(seq_len - query_len, seq_len, device=DEVICE) + 1
        logarithm = seen.double().log()[:, None].expand(-1, lse.shape[1])
        rounding = torch.full_like(logarithm, 1e-6)
        assert_close("LSE", lse[row : row + query_len], logarithm, rounding)
        row += query_len


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[(1, 9), (3, 40)], [(30, 70), (1, 1)]])
def test_a_single_visible_key_gives_its_value_exactly(lengths, dtype):
    batch = make_batch(lengths, sliding_window=1, logit_std=30.0, dtype=dtype)
    output, _ = attend(batch)
    row = 0
    for (query_len, seq_len), pages in zip(lengths, batch.block_table.long()):
        for position in range(seq_len - query_len, seq_len):
            value = batch.value_cache[pages[position // 16], position % 16]
            value = value.repeat_interleave(2, dim=0).double()
            # A GPU's products of fp32 are three of tf32, which keep 21 bits of V.
            lost = 2.0**-21 if ON_GPU and dtype == torch.float32 else 0.0
            assert_close("output", output[row], value, lost * value.abs())
            row += 1


def test_lse_is_optional():
    batch = make_batch(BATCHES["mixed"])
    expected, _ = attend(batch)
    output = torch.zeros(batch.query.shape, device=DEVICE)
    call(batch, output)
    assert (output[: len(expected)] == expected).all()


def test_max_query_len_is_only_an_upper_bound():
    for bound in (17, 40, 100):
        batch = make_batch([(3, 20), (1, 30), (12, 12)])
        batch.max_query_len = bound
        check(batch)


@gpu_only
@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("head_size", [64, 80, 128, 192, 256])
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 128},
        {"block_size": 64, "layout": "packed_HND", "padding": 0},
        {"block_size": 16, "num_query_heads": 7, "num_kv_heads": 1},
        {"block_size": 48, "num_query_heads": 8, "num_kv_heads": 8},
        {"block_size": 128, "sliding_window": 200},
        {"block_size": 16, "sliding_window": 100, "causal": False},
        {"block_size": 16, "sliding_window": 60, "frees_pages": True},
        {"block_size": 16, "sliding_window": 2**31 - 1},
        {"block_size": 64, "softcap": 20.0, "logit_std": 10.0},
        {"block_size": 64, "kv_dtype": KV_FP8_DTYPES[0], "v_scale": 2.0},
    ],
    ids=str,
)
def test_long_batches_on_every_kernel(options, head_size, portable):
    lengths = [(1000, 1000), (1, 1500), (300, 2011), (0, 0), (129, 129), (700, 13)]
    batch = make_batch(lengths, head_size=head_size, dtype=HALF_DTYPES[-1], **options)
    check(batch, update(make_schedule(batch, portable=portable), batch))
