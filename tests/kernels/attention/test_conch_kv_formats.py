# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Caches with a scale for every token and head, and e4m3 by arithmetic."""

import dataclasses
import importlib
import importlib.util
import math

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    DTYPES,
    HALF_DTYPES,
    INTERPRETED,
    ON_GPU,
    Batch,
    assert_close,
    attend,
    call,
    check,
    compare,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
)
from tests.kernels.attention.conch_kv_formats import (
    INT4,
    PAGE_LAYOUTS,
    TokenHeadCaches,
    dequantize,
    make_pages,
    quantize,
    rotate,
    shared_out,
)
from tests.kernels.attention.conch_reference import (
    SENTINEL,
    Attention,
    output_tolerance,
)
from vllm.attention.ops.conch import reshape_and_cache
from vllm.attention.ops.conch.kv_format import decode_e4m3
from vllm.attention.ops.conch.rotation import prepare as prepare_rotation
from vllm.attention.ops.conch.rotation import rotate as rotate_heads
from vllm.attention.ops.conch.rotation import rotation_matrix, split_norm
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton

HALF = HALF_DTYPES[-1]
FP8 = current_platform.fp8_dtype()
FORMATS = {"int8": torch.int8, "fp8": FP8, "int4": INT4}
BATCHES = {
    "decode": [(1, 1), (1, 16), (1, 70)],
    "verify": [(2, 20), (5, 5), (4, 49)],
    "mixed": [(1, 33), (20, 20), (3, 20), (18, 41), (0, 7)],
}
SHORT = [(1, 40), (18, 33)]


@dataclasses.dataclass
class ScaledBatch(Batch):
    """A batch over a cache with a scale for every token and head."""

    def reference(self, dtype: torch.dtype = torch.float64) -> Attention:
        """Of the cache that the stored one stands for."""
        caches = (self.key_cache, self.k_scale), (self.value_cache, self.v_scale)
        key_cache, value_cache = (dequantize(*cache) for cache in caches)
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain |= dict(key_cache=key_cache, value_cache=value_cache)
        return Batch(**plain | dict(k_scale=None, v_scale=None)).reference(dtype)


def scaled_batch(
    lengths: list[tuple[int, int]],
    kv_dtype: torch.dtype,
    layout: str = "NHD",
    spread: float = 0.0,
    **options,
) -> ScaledBatch:
    """A batch whose cache is stored by definition; spread: of log2 of the scales."""
    batch = make_batch(lengths, **options)
    num_blocks, block_size, num_kv_heads, head_size = batch.key_cache.shape
    shape = (num_blocks, block_size, num_kv_heads, head_size, kv_dtype, DEVICE)
    caches = make_pages(layout, *shape)
    # Rows that make_batch has left NaN stay poisoned.
    for rows, stored, scales in (
        (batch.key_cache, caches.key, caches.k_scale),
        (batch.value_cache, caches.value, caches.v_scale),
    ):
        live = ~rows.isnan().any(-1).any(-1)
        factor = torch.exp2(spread * torch.randn(rows[live].shape[:2], device=DEVICE))
        if rows is batch.key_cache:
            factor.fill_(1.0)
        new = rows[live] * factor[..., None].to(rows.dtype)
        elements, scale = quantize(new, kv_dtype)
        as_bytes = stored.view(torch.uint8)  # torch cannot index fp8
        as_bytes[live] = elements.view(torch.uint8)
        scales[live] = scale
    plain = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    plain |= dict(key_cache=caches.key, value_cache=caches.value)
    return ScaledBatch(**plain | dict(k_scale=caches.k_scale, v_scale=caches.v_scale))


def query_as_rotated(batch: ScaledBatch) -> torch.Tensor:
    """The query that scores are made of, which may be rounded to either neighbour."""
    live, head_size = batch.num_live_tokens, batch.query.shape[-1]
    rotated = torch.zeros(batch.query.shape, dtype=batch.query.dtype, device=DEVICE)
    padded = max(32, triton.next_power_of_2(head_size))
    norm = split_norm(head_size)[0]
    rotate_heads(rotated, batch.query, batch.query_start_loc, padded, divisor=norm)
    assert not rotated[live:].any(), "rows of no sequence were written"
    exact = rotate(batch.query[:live]) / norm
    unit = torch.finfo(rotated.dtype).eps
    allowed = unit * exact.abs() + 2.0**-20 * exact.abs().amax(-1, keepdim=True)
    assert_close("rotated query", rotated[:live], exact, allowed)
    seen = torch.full(batch.query.shape, math.nan, dtype=torch.float64, device=DEVICE)
    seen[:live] = rotate(rotated[:live], inverse=True) * norm
    return seen


def check_scaled(batch: ScaledBatch) -> None:
    """`check`; with int4 errors are of the rotated output, and spread by rotation."""
    if batch.key_cache.dtype != INT4:
        check(batch)
        return
    output, lse = attend(batch)
    live, seen = batch.num_live_tokens, query_as_rotated(batch)
    exact = dataclasses.replace(batch, query=seen).reference()
    exact = shared_out(Attention(*(part[:live] for part in exact)))
    allowed = output_tolerance(exact, batch.query.dtype)
    expected = exact.output
    if batch.output_scale is not None:
        limits = torch.finfo(output.dtype)
        expected = (expected / batch.output_scale).clamp(limits.min, limits.max)
        allowed = allowed / batch.output_scale
        allowed += limits.eps / 2 * expected.abs().clamp(min=limits.smallest_normal)
    assert_close("output", output, expected, allowed)
    assert_close("LSE", lse, exact.lse, 16 * 2.0**-24 * exact.lse_drift)


def test_rotation_is_made_whatever_the_default_device():
    arguments = 24, 32, torch.float32, torch.device("cpu"), 4.0
    expected = rotation_matrix(*arguments)
    with torch.device("meta"):
        made = rotation_matrix.__wrapped__(*arguments)
    assert torch.equal(made, expected)


def test_rotations_of_each_dtype_have_a_launch_of_their_own():
    """A launch keeps what was compiled for the dtypes of its first call."""
    heads, strides = (8, 64, 64), ((512, 64), (512, 64))
    dtypes = [(dtype, dtype) for dtype in (torch.float16, torch.float32)]
    launches = {id(prepare_rotation(*heads, *strides, pair, None)) for pair in dtypes}
    assert len(launches) == len(dtypes)


@pytest.mark.parametrize("kv_dtype", FORMATS.values(), ids=FORMATS.keys())
def test_rows_before_the_first_sequence(kv_dtype):
    """They stay as they are, as all that are of no sequence."""
    batch = scaled_batch([(2, 20), (3, 9)], kv_dtype)
    rows = torch.cat([batch.query[:2], batch.query])
    shifted = dataclasses.replace(
        batch, query=rows, query_start_loc=batch.query_start_loc + 2
    )
    output = torch.full_like(rows, SENTINEL)
    call(shifted, output)
    assert (output[:2] == SENTINEL).all() and (output[2:7] != SENTINEL).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_lengths(lengths, kv_dtype, dtype):
    check_scaled(scaled_batch(lengths, kv_dtype, dtype=dtype))


@pytest.mark.parametrize("kv_dtype", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("layout", PAGE_LAYOUTS)
def test_layouts(layout, kv_dtype):
    options = {"block_size": 48, "head_size": 40, "dtype": HALF}
    check_scaled(scaled_batch(SHORT, kv_dtype, layout, **options))


@pytest.mark.parametrize("kv_dtype", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("head_size", [16, 24, 96, 128])
def test_head_sizes(head_size, kv_dtype):
    heads = {"num_query_heads": 6, "num_kv_heads": 2, "head_size": head_size}
    check_scaled(scaled_batch(SHORT, kv_dtype, dtype=HALF, **heads))


# Many tiles of Hopper's asynchronous products, or of the interpreter's small ones.
LONG = [(300, 1000), (70, 64), (129, 129), (1, 500), (0, 9)]
if not ON_GPU:
    LONG = [(20, 50), (5, 4), (18, 18), (1, 30), (0, 9)]


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize(
    "kv_dtype", [*FORMATS.values(), torch.float8_e5m2], ids=[*FORMATS, "e5m2"]
)
def test_many_tiles_give_the_same_again(kv_dtype, block_size):
    """What is converted on its way to a product arrives there before it, each time."""
    make = make_batch if kv_dtype == torch.float8_e5m2 else scaled_batch
    batch = make(
        LONG,
        kv_dtype=kv_dtype,
        dtype=HALF,
        head_size=128 if ON_GPU else 32,
        block_size=block_size,
    )
    check(batch) if make is make_batch else check_scaled(batch)
    first = attend(batch)
    for _ in range(20 if ON_GPU else 1):
        for one, other in zip(attend(batch), first):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("head_size", [17, 33, 34])
def test_head_sizes_of_tensors_apart(head_size, dtype):
    """8-bit elements in any number, where scales are in tensors of their own."""
    options = {"layout": "apart", "head_size": head_size, "dtype": dtype}
    check_scaled(scaled_batch(SHORT, torch.int8, **options))


FEATURES = {
    "softcap": {"softcap": 5.0},
    "window": {"sliding_window": 7},
    "chunks": {"sliding_window": 20, "chunk_lookback": 1},
    "non_causal": {"causal": False},
    "sinks": {"sinks": torch.linspace(-2, 2, 4, device=DEVICE)},
    "alibi": {"alibi_slopes": torch.linspace(0, 1, 4, device=DEVICE)},
    "q_scale": {"q_scale": 0.5},
    "fp8_output": {
        "output_scale": torch.full((1,), 0.25, device=DEVICE),
        "output_dtype": FP8,
    },
}


@pytest.mark.parametrize("kv_dtype", [torch.int8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_features(features, kv_dtype):
    lengths = [(1, 40), (3, 20), (18, 41)]
    check_scaled(scaled_batch(lengths, kv_dtype, dtype=HALF, **features))


@pytest.mark.parametrize("kv_dtype", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_values_of_any_size(kv_dtype, dtype):
    """Weights times scales of V are rounded to 16 bits, whatever unit V is in."""
    batch = scaled_batch(SHORT, kv_dtype, dtype=dtype, spread=4.0)
    check_scaled(batch)
    factor = 2.0**-16  # far below what fp16 holds
    bits = batch.v_scale.contiguous().view(torch.int32)
    low, high = bits & 15, (bits & -16).view(torch.float32) * factor
    tiny = (high.view(torch.int32) | low).view(torch.float32)
    live = batch.v_scale.isfinite()
    batch.v_scale[live] = tiny[live]
    if dtype == torch.float32:
        check_scaled(batch)
    else:  # results are subnormal in fp16, but not zero
        output, _ = attend(dataclasses.replace(batch, output_dtype=None))
        assert output.abs().amax() > 0 and output.isfinite().all()


def test_splits():
    """Rows cut among workers are combined from states with scales in them."""
    batch = scaled_batch([(1, 200), (2, 150)], torch.int8, dtype=HALF, spread=4.0)
    schedule = update(make_schedule(batch, num_workers=5), batch)
    output, lse = attend(batch, schedule)
    compare(batch, output, lse)


def scales_of(batch: Batch, change) -> Batch:
    """The batch with other scales."""
    return dataclasses.replace(batch, **change(batch))


BAD_SCALES = {
    "none": ("k_scale", lambda b: dict(k_scale=None, v_scale=None)),
    "one": ("k_scale", lambda b: dict(k_scale=b.k_scale[0, 0, :1])),
    "of K alone": ("v_scale", lambda b: dict(v_scale=None)),
    "too few": ("k_scale", lambda b: dict(k_scale=b.k_scale[1:])),
    "fp16": ("v_scale", lambda b: dict(v_scale=b.v_scale.half())),
    "elsewhere": ("v_scale", lambda b: dict(v_scale=b.v_scale.to("meta"))),
}


@pytest.mark.parametrize(("name", "change"), BAD_SCALES.values(), ids=BAD_SCALES.keys())
def test_bad_scales(name, change):
    batch = scales_of(scaled_batch([(1, 20)], torch.int8), change)
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        call(batch, torch.empty_like(batch.query))
    rows = torch.zeros(1, 2, batch.query.shape[-1], device=DEVICE)
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    caches = batch.key_cache, batch.value_cache
    with pytest.raises(ValueError, match=rf"^{name}: got .*allowed: "):
        scales = {"k_scale": batch.k_scale, "v_scale": batch.v_scale}
        reshape_and_cache(rows, rows, *caches, slots, **scales)


def test_formats_without_scales_per_token():
    scales = dict(k_scale=torch.ones(99, 16, 2), v_scale=torch.ones(99, 16, 2))
    batch = make_batch([(1, 20)], kv_dtype=torch.float8_e5m2)
    scales = {name: scale.to(DEVICE) for name, scale in scales.items()}
    with pytest.raises(ValueError, match=r"^k_scale: got .*e5m2"):
        call(dataclasses.replace(batch, **scales), torch.empty_like(batch.query))


def test_head_sizes_that_int4_cannot_have():
    batch = scaled_batch([(1, 20)], INT4, head_size=24)
    query = torch.zeros(1, 4, 20, device=DEVICE)
    caches = dict(key_cache=batch.key_cache[..., :10], value_cache=batch.value_cache)
    batch = dataclasses.replace(batch, query=query, **caches)
    with pytest.raises(ValueError, match="^query: got head_size 20, allowed: a mult"):
        call(batch, torch.empty_like(query))


# Writing

WRITTEN = FORMATS | {"fp8": torch.float8_e4m3fn, "fnuz": torch.float8_e4m3fnuz}


def aligned_rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random multiples of 1/16 below 8, whose sums are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-127, 128, shape, generator=generator) / 16
    return rows.to(DEVICE, dtype)


def fused_rows(num_tokens: int, heads: int, head_size: int, dtype: torch.dtype):
    """K and V as strided parts of one tensor, two rows of padding more."""
    fused = aligned_rows(num_tokens + 2, heads, 3 * head_size + 8, dtype=dtype)
    return fused[..., :head_size], fused[..., head_size : 2 * head_size]


def random_slots(num_tokens: int, num_slots: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens]
    slots[::4] = -1
    return slots.to(DEVICE)


def storage(tensor: torch.Tensor) -> torch.Tensor:
    everything = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return everything.set_(tensor.untyped_storage())


def write_by_definition(
    caches: TokenHeadCaches, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    block_size = caches.key.shape[1]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        place = slot // block_size, slot % block_size
        for rows, cache, scales in (
            (key, caches.key, caches.k_scale),
            (value, caches.value, caches.v_scale),
        ):
            stored, scale = quantize(rows[token], cache.dtype)
            cache.view(torch.uint8)[place] = stored.view(torch.uint8)
            scales[place] = scale


@pytest.mark.parametrize("layout", PAGE_LAYOUTS)
@pytest.mark.parametrize("kv_dtype", WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_that_is_written(dtype, kv_dtype, layout):
    """Elements, scales, and nothing else in the pages."""
    key, value = fused_rows(21, 3, 40, dtype)
    slots = random_slots(21, 64)
    caches, expected = (
        make_pages(layout, 4, 16, 3, 40, kv_dtype, DEVICE) for _ in range(2)
    )
    write_by_definition(expected, key, value, slots)
    scales = {"k_scale": caches.k_scale, "v_scale": caches.v_scale}
    reshape_and_cache(key, value, caches.key, caches.value, slots, **scales)
    for name, got, want in zip(caches._fields, caches, expected):
        different = storage(got) != storage(want)
        assert not different.any(), f"{name}: {int(different.sum())} bytes differ"


@pytest.mark.parametrize("kv_dtype", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("head_size", [16, 128, 256])
def test_written_head_sizes(head_size, kv_dtype):
    key, value = fused_rows(5, 2, head_size, HALF)
    slots = random_slots(5, 32)
    caches, expected = (
        make_pages("HND", 2, 16, 2, head_size, kv_dtype, DEVICE) for _ in range(2)
    )
    write_by_definition(expected, key, value, slots)
    scales = {"k_scale": caches.k_scale, "v_scale": caches.v_scale}
    reshape_and_cache(key, value, caches.key, caches.value, slots, **scales)
    assert torch.equal(storage(caches.key), storage(expected.key))


@pytest.mark.parametrize("kv_dtype", FORMATS.values(), ids=FORMATS.keys())
def test_rows_of_zeros_and_of_nan(kv_dtype):
    """The smallest scale; and a NaN spoils its own row, K and V apart."""
    key, value = fused_rows(3, 2, 32, HALF)
    key[1], value[1] = 0, 0
    key[2, 0, 3] = math.nan
    caches = make_pages("NHD", 1, 16, 2, 32, kv_dtype, DEVICE)
    slots = torch.arange(3, device=DEVICE)
    scales = {"k_scale": caches.k_scale, "v_scale": caches.v_scale}
    reshape_and_cache(key, value, caches.key, caches.value, slots, **scales)
    rows = [
        dequantize(cache[0, :3], scale[0, :3])
        for cache, scale in (
            (caches.key, caches.k_scale),
            (caches.value, caches.v_scale),
        )
    ]
    assert (rows[0][1] == 0).all() and (rows[1][1] == 0).all()
    assert caches.k_scale[0, 1, 0].item() == pytest.approx(1e-6, rel=1e-5)
    assert rows[0][2, 0].isnan().any()
    assert not rows[0][2, 1].isnan().any() and not rows[1].isnan().any()


has_vllms_own = importlib.util.find_spec("vllm.v1.attention.ops") is not None and (
    importlib.util.find_spec("vllm.v1.attention.ops.int4_per_token_head") is not None
)


@pytest.mark.skipif(not has_vllms_own, reason="this release has no such formats")
@pytest.mark.skipif(not INTERPRETED, reason="on a GPU it divides approximately")
@pytest.mark.parametrize("kv_dtype", [torch.int8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_bytes_that_vllms_own_kernel_writes(dtype, layout, kv_dtype):
    # Not in every release.
    vllms = importlib.import_module(
        "vllm.v1.attention.ops.triton_reshape_and_cache_flash"
    )
    interface = importlib.import_module("vllm.v1.kv_cache_interface")

    mode = {torch.int8: "INT8_PER_TOKEN_HEAD", INT4: "INT4_PER_TOKEN_HEAD"}[kv_dtype]
    key, value = fused_rows(21, 3, 96, dtype)
    key, value = key[:21], value[:21]
    slots = random_slots(21, 64)
    caches, expected = (
        make_pages(layout, 4, 16, 3, 96, kv_dtype, DEVICE) for _ in range(2)
    )
    vllms.triton_reshape_and_cache_flash_per_token_head_quant(
        key, value, *expected, slots, kv_quant_mode=interface.KVQuantMode[mode]
    )
    scales = {"k_scale": caches.k_scale, "v_scale": caches.v_scale}
    reshape_and_cache(key, value, caches.key, caches.value, slots, **scales)
    assert torch.equal(storage(caches.key), storage(expected.key))


# e4m3 by arithmetic


@triton.jit
def decode_kernel(out_ptr, code_ptr, FNUZ: tl.constexpr):
    index = tl.arange(0, 256)
    tl.store(out_ptr + index, decode_e4m3(tl.load(code_ptr + index), FNUZ))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_every_code_of_e4m3(dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(256, dtype=torch.float16, device=DEVICE)
    decode_kernel[(1,)](out, codes, FNUZ=dtype == torch.float8_e4m3fnuz)
    expected = codes.cpu().view(dtype).to(torch.float16)
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    bits = out.cpu().nan_to_num().view(torch.int16)
    assert torch.equal(bits, expected.nan_to_num().view(torch.int16))


def by_arithmetic(batch: Batch):
    """A schedule as for a device without an instruction for the batch's e4m3."""
    schedule = make_schedule(batch, portable=True)
    chosen = schedule.plan_for
    name = str(batch.key_cache.dtype).removeprefix("torch.float8_")

    def plan_for(max_query_len: int, **few: bool):
        plan = chosen(max_query_len, **few)
        return dataclasses.replace(plan, kv_format=name, unpacking="triton")

    schedule.plan_for = plan_for
    return update(schedule, batch)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_e4m3_by_arithmetic(dtype, kv_dtype):
    scales = {"k_scale": 0.25, "v_scale": 2.0}
    batch = make_batch(SHORT, dtype=dtype, kv_dtype=kv_dtype, **scales)
    output, lse = attend(batch, by_arithmetic(batch))
    compare(batch, output, lse)


def test_e4m3_by_arithmetic_with_scales_per_token():
    batch = scaled_batch(SHORT, torch.float8_e4m3fn, dtype=HALF)
    output, lse = attend(batch, by_arithmetic(batch))
    compare(batch, output, lse)
