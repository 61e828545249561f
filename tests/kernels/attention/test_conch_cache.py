# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`reshape_and_cache` against its definition, bit by bit.

Every test compares all bytes behind both caches, so that a write to a slot that no
token owns, or between the rows of a strided cache, fails as well.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    DTYPES,
    ON_GPU,
    gpu_only,
    poisoned_scratch,
)
from tests.kernels.attention.conch_reference import FP8_DTYPES, LAYOUTS, make_caches
from vllm.attention.ops.conch import reshape_and_cache
from vllm.attention.ops.conch.plan import this_device
from vllm.attention.ops.conch.reshape_and_cache import (
    LARGE_TILE,
    SMALL_TILE,
    Tile,
    min_large_tokens,
    plan_tile,
    reshape_and_cache_kernel,
    warm_up,
)

NUM_UNITS = this_device(torch.empty(0, device=DEVICE).device.index).num_units


@dataclass
class Write:
    """The arguments of one call."""

    key: torch.Tensor
    value: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    slot_mapping: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def run(self) -> None:
        reshape_and_cache(
            self.key,
            self.value,
            self.key_cache,
            self.value_cache,
            self.slot_mapping,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )


def make_write(
    num_tokens: int,
    *,
    num_kv_heads: int = 2,
    head_size: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float16,
    cache_dtype: torch.dtype | None = None,
    layout: str = "NHD",
    padding: int = 2,
    skipped: float = 0.2,
    scales: tuple[float, float] | None = None,
    seed: int = 0,
) -> Write:
    """K and V as parts of a fused QKV projection, for random slots of NaN caches.

    Args:
        padding: Rows of key beyond slot_mapping; they hold infinity.
        skipped: Part of the tokens that have no slot.
        scales: k_scale and v_scale.
        (the rest is as in the call)

    """
    generator = torch.Generator().manual_seed(seed)
    rows, width = num_tokens + padding, num_kv_heads * head_size
    fused = torch.randn(rows, 3 * width + 16, generator=generator)
    fused[num_tokens:] = math.inf
    fused = fused.to(DEVICE, dtype)
    key, value = (
        fused[:, begin : begin + width].unflatten(1, (num_kv_heads, head_size))
        for begin in (width, 2 * width)
    )
    num_blocks = num_tokens // block_size + 2
    caches = make_caches(
        layout,
        num_blocks,
        block_size,
        num_kv_heads,
        head_size,
        cache_dtype or dtype,
        DEVICE,
    )
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    slots[torch.rand(num_tokens, generator=generator) < skipped] = -1
    k_scale, v_scale = (
        torch.tensor([scale], device=DEVICE) if scale else None
        for scale in scales or (None, None)
    )
    return Write(key, value, *caches, slots.to(DEVICE), k_scale, v_scale)


def to_cache_dtype(
    rows: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What a cache of `dtype` holds of rows, by definition."""
    if dtype not in FP8_DTYPES:
        return rows
    limit = torch.finfo(dtype).max
    # On the CPU, where torch divides and converts exactly.
    quotient = rows.cpu().float() / (1.0 if scale is None else scale.cpu())
    return quotient.clamp(-limit, limit).to(dtype).to(rows.device)


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes behind a view."""
    everything = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return everything.set_(tensor.untyped_storage())


def clone_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same view of a copy of all bytes behind it."""
    everything = storage(tensor).clone()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        everything.untyped_storage(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
    )


def canonical_nan(cache: torch.Tensor) -> torch.Tensor:
    """The values of an fp8 cache as bits, with one pattern for NaN."""
    bits = cache.contiguous().view(torch.uint8)
    return torch.where(cache.float().isnan(), 0x7F, bits)


def apply_definition(write: Write) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of both caches after the write, made row by row."""
    shared = (
        write.key_cache.untyped_storage().data_ptr()
        == write.value_cache.untyped_storage().data_ptr()
    )
    key_cache = clone_storage(write.key_cache)
    value_cache = clone_storage(write.value_cache)
    if shared:  # both views show one copy
        value_cache = torch.empty_like(value_cache, device=DEVICE).set_(
            key_cache.untyped_storage(),
            write.value_cache.storage_offset(),
            value_cache.shape,
            value_cache.stride(),
        )
    slots = write.slot_mapping
    tokens = torch.arange(len(slots), device=slots.device)[slots >= 0]
    block_size = write.key_cache.shape[1]
    block, place = slots[tokens] // block_size, slots[tokens] % block_size
    for rows, cache, scale in (
        (write.key, key_cache, write.k_scale),
        (write.value, value_cache, write.v_scale),
    ):
        new = to_cache_dtype(rows[tokens], scale, cache.dtype)
        as_bytes = cache.dtype in FP8_DTYPES  # torch cannot index fp8
        cache = cache.view(torch.uint8) if as_bytes else cache
        cache[block, place] = new.view(torch.uint8) if as_bytes else new
    return key_cache, value_cache


def check(write: Write) -> None:
    """Runs the write and compares every byte with the definition's."""
    expected = apply_definition(write)
    write.run()
    actual = write.key_cache, write.value_cache
    for name, got, want in zip(("key_cache", "value_cache"), actual, expected):
        different = storage(got) != storage(want)
        if bool(different.any()):
            raise AssertionError(
                f"{name}: {int(different.sum())} of {different.numel()} bytes differ, "
                f"the first at {int(different.nonzero()[0])}"
            )


CACHE_DTYPES = [None, *FP8_DTYPES]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(
    dtype: torch.dtype, cache_dtype: torch.dtype | None, layout: str
) -> None:
    """All layouts and dtypes; with slots -1 and fewer slots than rows of key."""
    scales = (0.5, 2.0) if cache_dtype else None
    check(
        make_write(
            21,
            num_kv_heads=3,
            head_size=48,
            dtype=dtype,
            cache_dtype=cache_dtype,
            layout=layout,
            scales=scales,
        )
    )


@pytest.mark.parametrize("layout", ["NHD", "packed_HND"])
@pytest.mark.parametrize(
    ("num_kv_heads", "head_size", "block_size"),
    [
        (8, 128, 16),
        (1, 128, 64),
        (1, 16, 16),
        (8, 80, 48),
        (5, 96, 528),
        (3, 112, 784),
        (2, 512, 1056),
        (1, 80, 128),
        (2, 40, 16),  # no multiple of 16
        (3, 25, 16),  # odd
    ],
)
def test_shapes(
    num_kv_heads: int, head_size: int, block_size: int, layout: str
) -> None:
    check(
        make_write(
            9,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            block_size=block_size,
            layout=layout,
        )
    )


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("num_kv_heads", "head_size"), [(8, 128), (1, 128), (8, 80)])
def test_many_tokens(
    num_kv_heads: int, head_size: int, cache_dtype: torch.dtype | None
) -> None:
    """Enough tokens for the large tile, and a number that it does not divide."""
    row_size = num_kv_heads * head_size
    fewest = min_large_tokens(row_size, NUM_UNITS)
    num_tokens = fewest + 1 - fewest % 2
    tile = plan_tile(num_tokens, row_size, NUM_UNITS)
    assert tile.tokens * tile.elements == LARGE_TILE
    tile = plan_tile(fewest - 1, row_size, NUM_UNITS)
    assert tile.tokens * tile.elements == SMALL_TILE
    check(
        make_write(
            num_tokens,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            cache_dtype=cache_dtype,
            layout="packed_NHD",
        )
    )


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
@pytest.mark.parametrize("padding", [0, 3])
def test_few_tokens(num_tokens: int, padding: int) -> None:
    check(make_write(num_tokens, padding=padding, skipped=0))


def test_all_slots_negative() -> None:
    write = make_write(20)
    write.slot_mapping[:] = torch.arange(-20, 0, device=DEVICE)
    check(write)


def test_strides_of_dimensions_of_size_one() -> None:
    """They address nothing and may be anything."""
    write = make_write(1, num_kv_heads=1, head_size=64, padding=0, skipped=0)
    anywhere = {"size": (1, 1, 64), "stride": (3, 2**40 + 1, 1)}
    key = write.key.as_strided(**anywhere)
    value = write.value.as_strided(**anywhere)
    caches = [
        cache[:1].as_strided((1, 16, 1, 64), (2**45 + 5, 64, 7, 1))
        for cache in (write.key_cache, write.value_cache)
    ]
    slots = torch.tensor([11], device=DEVICE)
    check(Write(key, value, *caches, slots))


def test_expanded_key() -> None:
    """A stride of 0: one head for all."""
    write = make_write(5, num_kv_heads=4)
    check(replace(write, key=write.key[:, :1].expand(-1, 4, -1)))


def special_values() -> torch.Tensor:
    """Everything that a conversion can get wrong, for a format of any range."""
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e4, -1e4, 3e38, 1e-45, 1e-38]
    for dtype in FP8_DTYPES:
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        codes = codes[codes.isfinite()].sort().values
        ties = (codes[1:] + codes[:-1]) / 2
        above = torch.nextafter(ties, torch.tensor(math.inf))
        below = torch.nextafter(ties, torch.tensor(-math.inf))
        values += torch.cat([codes, ties, above, below]).tolist()
    values += [0.0] * (-len(values) % 64)
    return torch.tensor(values)


@pytest.mark.parametrize("scale", [None, 0.5, 2.0, 0.3, 1 / 448, 1234.5])
@pytest.mark.parametrize("cache_dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_bits(
    dtype: torch.dtype, cache_dtype: torch.dtype, scale: float | None
) -> None:
    """Saturation, ties, subnormals, signed zeros, infinity and NaN."""
    values = special_values() * (scale or 1.0)
    values = torch.cat([values, torch.randn(64 * 64) * 100]).to(dtype)
    rows = values.view(-1, 1, 64).to(DEVICE)
    num_blocks = -(-len(rows) // 16)
    shape = ("NHD", num_blocks, 16, 1, 64, cache_dtype, DEVICE)
    scales = None if scale is None else torch.tensor([scale], device=DEVICE)
    slots = torch.arange(len(rows), device=DEVICE)
    write = Write(rows, -rows, *make_caches(*shape), slots, scales, scales)
    write.run()
    for source, cache in ((rows, write.key_cache), (-rows, write.value_cache)):
        expected = canonical_nan(to_cache_dtype(source, scales, cache_dtype))
        actual = canonical_nan(cache.flatten(0, 1)[: len(rows)])
        wrong = actual != expected
        assert not bool(wrong.any()), (
            f"{source[wrong][:8].tolist()} became {actual[wrong][:8].tolist()}, "
            f"not {expected[wrong][:8].tolist()}"
        )


@pytest.mark.parametrize("cache_dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_value(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    values = torch.arange(2**16).to(torch.int16).view(dtype)
    rows = values.view(64, 8, 128).to(DEVICE)
    caches = make_caches("NHD", 4, 16, 8, 128, cache_dtype, DEVICE)
    Write(rows, rows, *caches, torch.arange(64, device=DEVICE)).run()
    expected = canonical_nan(to_cache_dtype(rows, None, cache_dtype))
    for cache in caches:
        assert torch.equal(canonical_nan(cache.flatten(0, 1)), expected)


def test_scale_is_read_on_the_device() -> None:
    """The scale that counts is the one at the time of the call, of each cache."""
    write = make_write(9, cache_dtype=torch.float8_e4m3fn, scales=(0.5, 2.0))
    check(write)
    write.k_scale.fill_(3.0)
    write.v_scale.fill_(0.25)
    check(write)
    check(replace(write, k_scale=torch.tensor(0.7, device=DEVICE), v_scale=None))


def test_scales_leave_other_caches_alone() -> None:
    check(make_write(9, scales=(0.5, 2.0)))


@pytest.mark.parametrize("stride", [2**28 + 64, 2**31 + 64])
def test_offsets_beyond_int32(stride: int) -> None:
    """Pages and tokens as far apart as the first that int32 cannot address.

    Once the stride itself fits int32, once it does not.  Memory is virtual: only a
    few pages of it are touched.
    """
    num = 2**31 // stride + 2
    caches = [
        torch.empty_strided(
            (num, 16, 1, 64), (stride, 64, 64, 1), dtype=torch.uint8, device=DEVICE
        ).view(torch.float8_e5m2)
        for _ in range(2)
    ]
    rows = torch.empty_strided(
        (num, 1, 64), (stride, 64, 1), dtype=torch.float16, device=DEVICE
    )
    rows.copy_(torch.randn(num, 1, 64))
    slots = torch.arange(num, device=DEVICE).flip(0) * 16 + 5
    Write(rows, rows, *caches, slots).run()
    expected = to_cache_dtype(rows, None, torch.float8_e5m2).view(torch.uint8)
    for cache in caches:
        for row, slot in zip(expected, slots.tolist()):
            assert torch.equal(cache[slot // 16, 5].view(torch.uint8), row)


@settings(max_examples=60 if ON_GPU else 25, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    cache_dtype = data.draw(st.sampled_from(CACHE_DTYPES), "cache_dtype")
    num_scales = data.draw(st.sampled_from([0, 2])) if cache_dtype else 0
    check(
        make_write(
            data.draw(st.integers(0, 40), "num_tokens"),
            num_kv_heads=data.draw(st.integers(1, 9), "num_kv_heads"),
            head_size=16 * data.draw(st.integers(1, 16), "head_size / 16"),
            block_size=16 * data.draw(st.integers(1, 40), "block_size / 16"),
            dtype=data.draw(st.sampled_from(DTYPES), "dtype"),
            cache_dtype=cache_dtype,
            layout=data.draw(st.sampled_from(list(LAYOUTS)), "layout"),
            padding=data.draw(st.integers(0, 5), "padding"),
            skipped=data.draw(st.sampled_from([0.0, 0.3, 1.0]), "skipped"),
            scales=(0.3, 7.0) if num_scales else None,
            seed=data.draw(st.integers(0, 99), "seed"),
        )
    )


@pytest.mark.parametrize(
    "row_size", [16, 80, 128, 400, 560, 640, 768, 896, 1024, 16384]
)
def test_tiles(row_size: int) -> None:
    """Two variants per row size, both powers of two that waste few lanes."""
    tiles = {plan_tile(n, row_size, 132) for n in (1, 7, 256, 4096, 10**5, 10**7)}
    assert len(tiles) == 2
    for tile in tiles:
        assert tile.tokens * tile.elements in (SMALL_TILE, LARGE_TILE)
        assert tile.elements & (tile.elements - 1) == 0
        lanes = -(-row_size // tile.elements) * tile.elements
        assert lanes <= max(1.125 * row_size, row_size + 63, 2 * row_size - 1)
    assert plan_tile(256, 1024, 132) == Tile(1, 1024, 4)


ERRORS = {
    "key": [
        (lambda w: replace(w, key=w.key[0]), "shape"),
        (lambda w: replace(w, key=w.key.double()), "float64"),
        (lambda w: replace(w, key=w.key[..., ::2]), "strides"),
        (lambda w: replace(w, key=w.key[:, :0], value=w.value[:, :0]), "shape"),
        (lambda w: replace(w, key=w.key.tolist()), "list"),
        (lambda w: replace(w, key=None), "NoneType"),
    ],
    "value": [
        (lambda w: replace(w, value=w.value[:3]), "shape"),
        (lambda w: replace(w, value=w.value[:, :1]), "shape"),
        (lambda w: replace(w, value=w.value.float()), "float32"),
        (
            lambda w: replace(w, value=w.value.transpose(1, 2).contiguous().mT),
            "strides",
        ),
        (lambda w: replace(w, value=w.value.to("meta")), "device meta"),
        (lambda w: replace(w, value=None), "NoneType"),
    ],
    "key_cache": [
        (lambda w: replace(w, key_cache=w.key_cache[0]), "shape"),
        (lambda w: replace(w, key_cache=w.key_cache.transpose(1, 2)), "shape"),
        (lambda w: replace(w, key_cache=w.key_cache.view(torch.int16)), "int16"),
        (lambda w: replace(w, key_cache=w.key_cache.float()), "float32"),
        (lambda w: replace(w, key_cache=w.key_cache[:, :0]), "shape"),
        (lambda w: replace(w, key_cache=w.key_cache.to("meta")), "device meta"),
        (lambda w: replace(w, key_cache=None), "NoneType"),
    ],
    "value_cache": [
        (lambda w: replace(w, value_cache=w.value_cache[1:]), "shape"),
        (lambda w: replace(w, value_cache=w.value_cache[..., :16]), "shape"),
        (
            lambda w: replace(w, value_cache=w.value_cache.to(torch.float8_e5m2)),
            "e5m2",
        ),
        (lambda w: replace(w, value_cache=None), "NoneType"),
    ],
    "slot_mapping": [
        (lambda w: replace(w, slot_mapping=w.slot_mapping[None]), "shape"),
        (lambda w: replace(w, slot_mapping=w.slot_mapping.tolist()), "list"),
        (lambda w: replace(w, slot_mapping=w.slot_mapping.int()), "int32"),
        (lambda w: replace(w, slot_mapping=w.slot_mapping.repeat(2)), "slots"),
        (lambda w: replace(w, slot_mapping=w.slot_mapping[::2]), "strides"),
        (lambda w: replace(w, slot_mapping=w.slot_mapping.to("meta")), "device meta"),
        (lambda w: replace(w, slot_mapping=None), "NoneType"),
    ],
    "k_scale": [
        (lambda w: replace(w, k_scale=torch.ones(2, device=DEVICE)), "shape"),
        (lambda w: replace(w, k_scale=0.5), "float"),
        (
            lambda w: replace(w, k_scale=torch.ones(1, device=DEVICE).half()),
            "float16",
        ),
    ],
    "v_scale": [
        (lambda w: replace(w, v_scale=torch.ones(1, device="meta")), "device meta"),
    ],
}


@pytest.mark.parametrize(
    ("name", "index"),
    [(n, i) for n, cases in ERRORS.items() for i in range(len(cases))],
)
def test_errors(name: str, index: int) -> None:
    """The message begins with the argument and says what came and what is allowed."""
    break_it, what_came = ERRORS[name][index]
    write = break_it(make_write(6))
    with pytest.raises(ValueError, match=rf"^{name}: got .*{what_came}.*allowed: "):
        write.run()


@gpu_only
def test_graph_replay() -> None:
    """A captured write follows slots, rows and scales that change afterwards."""
    write = make_write(33, cache_dtype=torch.float8_e4m3fn, scales=(0.5, 2.0))
    write.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write.run()
    for seed in (1, 2):
        other = make_write(33, skipped=0.5, seed=seed)
        write.slot_mapping.copy_(other.slot_mapping)
        write.key.copy_(other.key)
        write.value.copy_(other.value)
        write.k_scale.fill_(0.3 * seed)
        expected = apply_definition(write)
        graph.replay()
        assert torch.equal(storage(write.key_cache), storage(expected[0]))
        assert torch.equal(storage(write.value_cache), storage(expected[1]))


@gpu_only
def test_launches_of_all_alignments() -> None:
    """Repeated launches, and tensors that do not begin at a multiple of 16 bytes."""
    aligned = make_write(40)
    for shift in (0, 1, 4, 8, 0, 1):
        wide = torch.randn(42, 2 * 64 + 16, device=DEVICE).half()
        key = wide[:, shift : shift + 64].unflatten(1, (2, 32))
        check(replace(aligned, key=key))
        check(replace(aligned, value=key))


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=str)
def test_warm_up_writes_nothing(cache_dtype: torch.dtype | None) -> None:
    write = make_write(5, cache_dtype=cache_dtype, layout="packed_NHD")
    before = storage(write.key_cache).clone()
    warm_up(write.key_cache, write.value_cache, torch.float16)
    assert torch.equal(storage(write.key_cache), before)


@gpu_only
@pytest.mark.parametrize("layout", ["NHD", "packed_HND"])
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=str)
def test_nothing_compiles_after_warm_up(
    cache_dtype: torch.dtype | None, layout: str
) -> None:
    """Two variants serve all numbers of tokens, and contiguous and fused rows."""

    def compiled() -> int:
        caches = reshape_and_cache_kernel.device_caches[
            torch.accelerator.current_device_index()
        ]
        return len(caches[0])

    options = {"num_kv_heads": 8, "head_size": 128, "block_size": 80}
    options |= {"cache_dtype": cache_dtype, "layout": layout}
    options |= {"scales": (0.5, 2.0) if cache_dtype else None}
    write = make_write(5, **options)
    before = compiled()
    warm_up(
        write.key_cache,
        write.value_cache,
        torch.float16,
        k_scale=write.k_scale,
        v_scale=write.v_scale,
    )
    warm = compiled()
    assert warm - before <= 2
    for num_tokens in (1, 2, 3, 16, 17, 100, 1024, 5000, 8192):
        write = make_write(num_tokens, **options)
        write.run()
        key, value = write.key.contiguous(), write.value.contiguous()
        replace(write, key=key, value=value).run()
        slots = torch.cat([write.slot_mapping, write.slot_mapping])[num_tokens // 2 :]
        replace(write, slot_mapping=slots[:num_tokens]).run()
    assert compiled() == warm


@gpu_only
@pytest.mark.parametrize("kind", ["auto", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("layout", ["NHD", "HND", "interleaved", "packed_NHD"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_like_the_cuda_kernel(dtype: torch.dtype, layout: str, kind: str) -> None:
    """The same bits as vLLM's own kernel, where it is compiled."""
    pytest.importorskip("vllm._custom_ops")
    ops = getattr(torch.ops, "_C_cache_ops", None)
    if not hasattr(ops, "reshape_and_cache_flash"):
        pytest.skip("vLLM's CUDA kernels are not compiled")
    fp8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    write = make_write(
        300,
        num_kv_heads=8,
        head_size=128,
        dtype=dtype,
        cache_dtype=fp8.get(kind),
        layout=layout,
        scales=(0.3, 1.7),
    )
    theirs = make_write(300, num_kv_heads=8, head_size=128, layout=layout, dtype=dtype,
                        cache_dtype=fp8.get(kind))  # fmt: skip
    caches = theirs.key_cache, theirs.value_cache
    if kind in fp8:
        caches = [cache.view(torch.uint8) for cache in caches]
    ops.reshape_and_cache_flash(
        write.key,
        write.value,
        *caches,
        write.slot_mapping,
        kind,
        write.k_scale,
        write.v_scale,
    )
    write.run()
    assert torch.equal(storage(write.key_cache), storage(theirs.key_cache))
    assert torch.equal(storage(write.value_cache), storage(theirs.value_cache))
