# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""That `conch_gluon` computes what Gluon would, and finds what must not be."""

import pytest
import regex as re
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tests.kernels.attention.conch_harness import KNOWS_GLUON, ON_GPU

if ON_GPU or not KNOWS_GLUON:
    pytest.skip("runs kernels on a CPU, by Triton 3.6's Gluon", allow_module_level=True)

from tests.kernels.attention.conch_gluon import dtype_of, run_kernel  # noqa: E402
from vllm.attention.ops.conch.hopper_prefill import describe_tensor  # noqa: E402
from vllm.attention.ops.conch.hopper_prefill_kernel import (  # noqa: E402
    carried,
    to_operand,
)
from vllm.attention.ops.conch.hopper_tiles import (  # noqa: E402
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

SEEDS = range(20)
ROWS = gl.constexpr(64)
TILE_BYTES = gl.constexpr(64 * 64 * 2)
ACC = gl.constexpr(
    gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
)
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))


# ---------------------------------------------------- a pipeline, and its faults


@gluon.jit
def make_barrier(COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barriers.index(0), count=COUNT)
    return barriers.index(0)


@gluon.jit
def feed(desc, ring, full, free, num_tiles, FAULT: gl.constexpr):
    if FAULT == "one tile more":
        num_tiles += 1
    for i in range(num_tiles):
        if FAULT != "no wait for free":
            mbarrier.wait(free, i % 2 ^ 1)
        if FAULT == "half the bytes":
            mbarrier.expect(full, TILE_BYTES // 2)
        else:
            mbarrier.expect(full, TILE_BYTES)
        tma.async_copy_global_to_shared(desc, [i * ROWS, 0], full, ring.index(0))


@gluon.jit
def multiply(out, ring, full, free, num_tiles, FAULT: gl.constexpr):
    """Sums tile @ tile over the tiles."""
    acc = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    for i in range(num_tiles):
        if FAULT != "no wait for full":
            mbarrier.wait(full, i % 2)
        tile = ring.index(0)
        if FAULT == "stored without a fence":
            tile.store(tile.load(ACC))
        if FAULT == "stored":
            tile.store(tile.load(ACC))
            fence_async_shared()
        acc = warpgroup_mma(tile, tile, acc, is_async=True)
        if FAULT == "freed too early":
            mbarrier.arrive(free)
        if FAULT == "the result before the wait":
            warpgroup_mma_wait(0, deps=[])
        elif FAULT != "no wait for the product":
            acc = warpgroup_mma_wait(0, deps=[acc])
        if FAULT != "never freed" and FAULT != "freed too early":
            mbarrier.arrive(free)
        if FAULT == "freed twice":
            mbarrier.arrive(free)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    columns = gl.arange(0, ROWS, gl.SliceLayout(0, ACC))
    place = gl.expand_dims(rows * ROWS, 1) + gl.expand_dims(columns, 0)
    gl.store(out + place, acc)


@gluon.jit
def pipeline(desc, out, num_tiles, FAULT: gl.constexpr):
    ring = gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, ROWS], SHARED)
    full = make_barrier(1)
    free = make_barrier(1)
    gl.warp_specialize(
        [
            (multiply, (out, ring, full, free, num_tiles, FAULT)),
            (feed, (desc, ring, full, free, num_tiles, FAULT)),
        ],
        [1],
        [24],
    )


def run_pipeline(fault: str | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel made of four tiles, the last beyond the tensor, and what not."""
    torch.manual_seed(seed)
    tiles = torch.randn(200, 64, dtype=torch.bfloat16)
    out = torch.empty(64, 64)
    desc = describe_tensor(tiles, (64, 64))
    run_kernel(pipeline, 1, (desc, out, 4), {"FAULT": fault, "num_warps": 4}, seed)
    padded = torch.zeros(256, 64)
    padded[:200] = tiles.float()
    expected = sum(tile @ tile for tile in padded.split(64))
    return out, expected


@pytest.mark.parametrize("fault", [None, "stored"])
@pytest.mark.parametrize("seed", SEEDS)
def test_pipeline(fault, seed):
    torch.testing.assert_close(*run_pipeline(fault, seed))


@pytest.mark.parametrize(
    "fault, message",
    [
        ("half the bytes", r"barrier 0\.0: 4096 bytes too many"),
        ("stored without a fence", "multiply 0 stored an operand without a fence"),
        ("one tile more", "1 copies land after the program"),
        ("no wait for the product", "used before it is awaited"),
        ("the result before the wait", "used before it is awaited"),
        (
            "never freed",
            "nobody can go on: multiply 0 awaits barrier 0.0's phase.*feed",
        ),
    ],
)
def test_faults_that_are_named(fault, message):
    """By many schedules; by others nothing goes wrong, or something else first."""
    found = 0
    for seed in SEEDS:
        try:
            run_pipeline(fault, seed)
        except RuntimeError as error:
            found += re.search(message, str(error)) is not None
    assert found > len(SEEDS) // 4


@pytest.mark.parametrize(
    "fault", ["no wait for full", "no wait for free", "freed too early", "freed twice"]
)
def test_races_spoil_the_result(fault):
    """By one of the schedules at least."""
    spoilt = 0
    for seed in SEEDS:
        try:
            out, expected = run_pipeline(fault, seed)
        except RuntimeError:
            spoilt += 1  # a barrier is found in a state that it never has
        else:
            spoilt += not torch.allclose(out, expected, rtol=1e-3, atol=1e-3)
    assert spoilt > 0


# ------------------------------------------------------------------- arithmetic


@gluon.jit
def arithmetic(integers, unsigned, out, one_past):
    a = gl.load(integers)
    b = gl.load(integers + 1)
    gl.store(out, a // b)
    gl.store(out + 1, a % b)
    gl.store(out + 2, gl.minimum(a, b) * 1000 + gl.maximum(a, b))
    gl.store(out + 3, gl.where(a < b, a, b))
    count = gl.load(unsigned).to(gl.uint32)
    gl.store(out + 4, (count % 3).to(gl.int32))
    gl.store(out + 5, gl.cdiv(b, 2))
    total = 0
    for i in range(b, 0, -1):
        total += i
    gl.store(out + 6, total)
    if one_past:
        gl.store(out + 7 + one_past, total)


def run_arithmetic(a: int, b: int, one_past: int = 0) -> list[int]:
    integers = torch.tensor([a, b], dtype=torch.int32)
    out = torch.zeros(8, dtype=torch.int32)
    run_kernel(arithmetic, 1, (integers, integers[1:], out, one_past), {})
    return out.tolist()


def test_arithmetic():
    """Division rounds towards zero, as C's."""
    assert run_arithmetic(-7, 2) == [-3, -1, -6998, -7, 2, 1, 3, 0]
    assert run_arithmetic(7, 5) == [1, 2, 5007, 5, 2, 3, 15, 0]


def test_accesses_outside_a_tensor():
    with pytest.raises(IndexError, match="element 8 of 8"):
        run_arithmetic(1, 1, one_past=1)


def test_overflow():
    with pytest.raises(OverflowError, match="as int32"):
        run_arithmetic(2**31 - 1, 1)


@gluon.jit
def through_words(values, out, DTYPE: gl.constexpr, cfg: gl.constexpr):
    rows = gl.arange(0, 64, None)
    place = gl.expand_dims(rows * 64, 1) + gl.expand_dims(gl.arange(0, 64, None), 0)
    words = carried(cfg, gl.load(values + place), DTYPE)
    gl.store(out + place, to_operand(cfg, words, DTYPE))


class Config:
    NARROW_P = True
    BLOCK_N = 64
    P_LAYOUT = None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_words_of_two_halves(dtype):
    """What assembly packs and takes apart."""
    values = torch.randn(64, 64)
    out = torch.empty(64, 64, dtype=dtype)
    constants = {"DTYPE": dtype_of(dtype), "cfg": Config}
    run_kernel(through_words, 1, (values, out), constants)
    assert torch.equal(out, values.to(dtype))
