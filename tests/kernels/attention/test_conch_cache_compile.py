# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the cache write and the quantisation compile to on every supported GPU.

Needs no GPU.  Bandwidth needs 16-byte accesses and many threads at once: a change that
loses either, or spills, shows here before anybody measures it.
"""

import pytest
import torch

from tests.kernels.attention.conch_compile import (
    TARGETS,
    Resources,
    compile_for,
    compile_on_all,
    resources,
)

BF16 = torch.bfloat16
WIDE_LOADS = {
    "cuda": {"LDG.E.128", "LDG.E.EF.128"},
    "hip": {"global_load_dwordx4", "buffer_load_dwordx4", "buffer_load_b128"},
}
WIDE_STORES = {
    "cuda": {"STG.E.128"},
    "hip": {"global_store_dwordx4", "buffer_store_dwordx4", "buffer_store_b128"},
}


def fp8_cache(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """An fp8 tensor as kernels get it on that target."""
    from vllm.attention.ops.conch.fp8 import converts_in_hardware
    from vllm.attention.ops.conch.plan import Device

    target = TARGETS[name]
    tensor = torch.zeros(shape, dtype=torch.uint8)
    device = Device(target.backend, target.arch, num_units=1, shared_memory=0)
    return tensor.view(dtype) if converts_in_hardware(dtype, device) else tensor


def compile_cache_write(name: str, cache_dtype: torch.dtype | None) -> Resources:
    """The large tile for 8 heads of 128, K and V packed in one page of 16."""
    from vllm.attention.ops.conch.fp8 import triton_fp8
    from vllm.attention.ops.conch.reshape_and_cache import (
        plan_tile,
        reshape_and_cache_kernel,
    )

    tile = plan_tile(10**6, 1024, 132)
    key = torch.zeros(4, 6144, dtype=BF16)[:, :1024].unflatten(1, (8, 128))
    pages = (2, 8, 16, 256)
    packed = torch.zeros(pages, dtype=BF16)
    if cache_dtype:
        packed = fp8_cache(name, cache_dtype, *pages)
    key_cache, value_cache = packed.transpose(1, 2).split(128, -1)
    scale = torch.ones(1) if cache_dtype else None
    compiled = compile_for(
        TARGETS[name],
        reshape_and_cache_kernel,
        4,
        *(key, key, torch.zeros(4, dtype=torch.int64), key_cache, value_cache),
        *(scale, scale),
        *(key.stride()[:2], key.stride()[:2]),
        *(key_cache.stride()[:3], value_cache.stride()[:3]),
        NUM_KV_HEADS=8,
        HEAD_SIZE=128,
        BLOCK_SIZE=16,
        FP8=triton_fp8(cache_dtype) if cache_dtype else None,
        FP8_MAX=torch.finfo(cache_dtype).max if cache_dtype else None,
        TOKENS=tile.tokens,
        ELEMENTS=tile.elements,
        num_warps=tile.num_warps,
    )
    return resources(compiled)


def compile_row_write(name: str, cache_dtype: torch.dtype) -> Resources:
    """8 heads of 128 with a scale each, pages of 16 as vLLM has them."""
    from vllm.attention.ops.conch.checks import TensorSpec, signature
    from vllm.attention.ops.conch.fp8 import FP8_DTYPES
    from vllm.attention.ops.conch.rotation import rotation_matrix
    from vllm.attention.ops.conch.token_head_cache import plan_launch

    is_int4 = cache_dtype == torch.uint8
    width = 64 if is_int4 else 128
    pages = torch.zeros(8, 16, 8, 2 * (width + 4), dtype=torch.uint8)
    rows = pages[..., :width], pages[..., width + 4 : -4]
    scales = (pages.view(torch.float32)[..., width // 4],) * 2
    key = torch.zeros(4, 6144, dtype=BF16)[:, :1024].unflatten(1, (8, 128))
    tensors = (key, key, *(part.view(cache_dtype) for part in rows), *scales)
    specs = tuple(TensorSpec(*signature(tensor)) for tensor in tensors)
    launch = plan_launch(specs, width + 4, 4)
    caches = tensors[2:4]
    if cache_dtype in FP8_DTYPES:
        caches = [fp8_cache(name, cache_dtype, 16)] * 2
    slots = torch.zeros(4, dtype=torch.int64)
    matrix = rotation_matrix(128, 128, BF16, torch.device("cpu")) if is_int4 else None
    return resources(
        compile_for(
            TARGETS[name],
            launch.kernel,
            *(key, key, *caches, slots, *scales, matrix),
            *launch.arguments,
            **launch.constants,
        )
    )


def compile_quantize(name: str, mode: str) -> Resources:
    """The large tile, a row of as many, or the longest row that few warps take."""
    from vllm.attention.ops.conch.fp8 import triton_fp8
    from vllm.attention.ops.conch.scaled_fp8_quant import (
        FEW_WARPS_ELEMENTS,
        LARGE_TILE,
        MAX_PARTIALS,
        absmax_kernel,
        num_warps,
        quantize_kernel,
        quantize_rows_kernel,
        row_warps,
    )

    dtype = torch.float8_e4m3fnuz if name == "gfx942" else torch.float8_e4m3fn
    x, output = torch.zeros(16, dtype=BF16), fp8_cache(name, dtype, 16)
    scale, partials = torch.ones(1), torch.zeros(16)
    options = {"num_warps": num_warps(LARGE_TILE)}
    fp8 = {"FP8": triton_fp8(dtype), "FP8_MAX": 448.0}
    if mode == "absmax":
        kernel, arguments = absmax_kernel, (partials, x, 2**24, 0, 64, 64)
        options["TILE"] = LARGE_TILE
    elif mode in ("per_token", "long_rows"):
        kernel = quantize_rows_kernel
        columns = LARGE_TILE if mode == "per_token" else FEW_WARPS_ELEMENTS
        arguments = (output, scale, x, None, columns, columns, columns, 64)
        row = {"ROWS": 1, "COLUMNS": columns, "IN_REGISTERS": True}
        options |= fp8 | row | {"MIN_SCALE": 1e-6, "num_warps": row_warps(columns)}
    else:
        kernel = quantize_kernel
        given = (scale, None) if mode == "static" else (scale, partials)
        arguments = (output, x, *given, 2**24, 0, 0, 64, 64)
        tile = {"TILE": LARGE_TILE, "MAX_PARTIALS": MAX_PARTIALS, "EVICTION": ""}
        options |= fp8 | tile
    return resources(compile_for(TARGETS[name], kernel, *arguments, **options))


def compile_all(name: str) -> dict[str, Resources]:
    """Everything for the GPUs that are tuned for, the essential for the others."""
    native = torch.float8_e4m3fnuz if name == "gfx942" else torch.float8_e4m3fn
    found = {
        "copy": compile_cache_write(name, None),
        "copy_fp8": compile_cache_write(name, native),
        "per_token": compile_quantize(name, "per_token"),
        "long_rows": compile_quantize(name, "long_rows"),
    }
    for dtype in (torch.int8, native, torch.uint8):
        found[f"rows {dtype}"] = compile_row_write(name, dtype)
    if name in ("sm90", "gfx942"):
        for mode in ("static", "absmax", "dynamic"):
            found[mode] = compile_quantize(name, mode)
    return found


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Resources]]:
    found = compile_on_all(compile_all)
    return {
        target: {kernel: Resources(*fields) for kernel, fields in kernels.items()}
        for target, kernels in found.items()
    }


def most_registers(name: str, kernel: str) -> int:
    """Of a thread: with more a multiprocessor has too few threads."""
    if name == "gfx1100":
        return 96  # of 1536 for a lane: 16 waves, as many as there can be
    if kernel == "long_rows":
        return 128  # 64 elements in a thread, see `row_warps`
    if kernel == "per_token":
        return 80 if name == "sm89" else 56  # 32 elements
    if TARGETS[name].backend == "cuda" and kernel != "copy_fp8":
        return 40  # three quarters of the threads at once
    return 64


@pytest.mark.parametrize("name", TARGETS)
def test_resources(name: str, compiled: dict[str, dict[str, Resources]]) -> None:
    backend = TARGETS[name].backend
    for kernel, found in compiled[name].items():
        if kernel.startswith("rows"):
            continue
        assert found.spilled_bytes == 0, (kernel, found)
        assert found.registers <= most_registers(name, kernel), (kernel, found)
        assert WIDE_LOADS[backend] & found.loads.keys(), (kernel, found)
        # A wavefront of 64 spreads the fp8 of a tile more thinly.
        if kernel == "copy" or (backend == "cuda" and kernel != "absmax"):
            assert WIDE_STORES[backend] & found.stores.keys(), (kernel, found)


@pytest.mark.parametrize("name", ["sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950"])
def test_hardware_converts(
    name: str, compiled: dict[str, dict[str, Resources]]
) -> None:
    """Conversion by integer arithmetic takes twice the instructions."""
    native = compiled[name]["copy_fp8"].instructions
    assert native < 0.6 * compiled["sm80"]["copy_fp8"].instructions


@pytest.mark.parametrize("name", TARGETS)
def test_rows_with_a_scale(
    name: str, compiled: dict[str, dict[str, Resources]]
) -> None:
    """Scales between rows leave addresses multiples of 4 or 8, and stores as wide."""
    for kernel, found in compiled[name].items():
        if kernel.startswith("rows"):
            assert found.spilled_bytes == 0, (kernel, found)
            assert found.shared_bytes <= 48 * 1024, (kernel, found)
            assert WIDE_LOADS[TARGETS[name].backend] & found.loads.keys(), found
            assert not any(s.endswith((".U8", "_b8")) for s in found.stores), found
