# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The only place that chooses: tiles, warps, stages and workers for a shape and device.

Pure Python, no tensors, no launches: everything here can be tested without a GPU.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from vllm.triton_utils import triton

from . import hopper_prefill
from .checks import reject

QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KV_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
HEAD_SIZES = range(16, 513)
BLOCK_SIZE_MULTIPLE = 16

# Batches whose longest query is at most this take the decode kernel altogether.
MAX_DECODE_QUERY_LEN = 16
# Largest tile of rows in decode; more rows than that become several tiles.
MAX_DECODE_BLOCK_M = 64


@dataclass(frozen=True)
class Device:
    """What the plan needs to know of a device."""

    backend: str  # "cuda", "hip" or "interpreter"
    arch: Any  # 90, "gfx942", ...
    num_units: int  # multiprocessors or compute units
    shared_memory: int  # bytes that one program may use


class Shape(NamedTuple):
    """What stays the same over all calls of a layer."""

    num_query_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    query_dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def head_padded(self) -> int:
        return max(16, triton.next_power_of_2(self.head_size))


def check_layer_shape(shape: Shape) -> None:
    """ValueErrors of a shape that no kernel takes."""
    if shape.num_kv_heads < 1:
        reject("num_kv_heads", shape.num_kv_heads, "1 or more")
    if shape.num_query_heads < 1 or shape.num_query_heads % shape.num_kv_heads:
        allowed = f"a multiple of num_kv_heads={shape.num_kv_heads}"
        reject("num_query_heads", shape.num_query_heads, allowed)
    if shape.head_size not in HEAD_SIZES:
        allowed = f"{HEAD_SIZES.start} to {HEAD_SIZES.stop - 1}"
        reject("head_size", shape.head_size, allowed)
    if shape.block_size < 1 or shape.block_size % BLOCK_SIZE_MULTIPLE:
        allowed = f"a multiple of {BLOCK_SIZE_MULTIPLE}"
        reject("block_size", shape.block_size, allowed)
    if shape.query_dtype not in QUERY_DTYPES:
        reject("query_dtype", shape.query_dtype, ", ".join(map(str, QUERY_DTYPES)))
    kv_dtypes = (shape.query_dtype, *KV_FP8_DTYPES)
    if shape.kv_dtype not in kv_dtypes:
        reject("kv_dtype", shape.kv_dtype, ", ".join(map(str, kv_dtypes)))


@dataclass(frozen=True)
class Config:
    """One compiled variant of a kernel."""

    block_m: int  # query rows
    tile: int  # keys
    num_warps: int
    num_stages: int
    precision: str = "ieee"  # of products of fp32

    def constants(self) -> dict[str, object]:
        """As the kernels' constexprs and options."""
        return dict(
            BLOCK_M=self.block_m,
            TILE=self.tile,
            PRECISION=self.precision,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


@dataclass(frozen=True)
class AttentionPlan:
    decode: Config
    prefill: Config  # the portable kernel's, with the same rows as Hopper's
    prefill_pack: int  # query heads in a tile of prefill rows
    hopper: bool  # the Hopper kernel does prefills, where strides allow
    unpacking: str  # of an fp8 V that is read in pairs; see tile.unpack_pairs
    num_workers: int  # programs of the decode kernel, all resident at once
    abreast_tiles: int | None  # see plan_abreast


@cache
def this_device(index: int | None) -> Device:
    """Describes a GPU (index as in torch.device.index), or the interpreter (None)."""
    if index is None:
        return Device("interpreter", 0, num_units=4, shared_memory=1 << 30)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    return Device(
        target.backend,
        target.arch,
        properties["multiprocessor_count"],
        properties["max_shared_mem"],
    )


def unsupported_kv_dtype(
    dtype: torch.dtype, device: torch.device
) -> tuple[str, str] | None:
    """Why a device cannot read an fp8 cache: what it can, and what to do; or None."""
    if device.type == "cpu" or dtype not in (
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
    ):
        return None
    target = this_device(device.index)
    arch = str(target.arch)
    if target.backend == "cuda":
        native = torch.float8_e4m3fn if target.arch >= 89 else None
    else:
        native = (
            torch.float8_e4m3fnuz if arch.startswith("gfx94") else torch.float8_e4m3fn
        )
        if not arch.startswith(("gfx94", "gfx95", "gfx12")):
            native = None
    if dtype == native:
        return None
    allowed = "torch.float8_e5m2 and the 16-bit dtypes"
    if native is not None:
        allowed = f"{native}, {allowed}"
    return f"{allowed} on {arch}", "Choose another --kv-cache-dtype."


def tile_bytes(shape: Shape, tile: int) -> int:
    """Bytes of one tile of K and one of V."""
    return 2 * tile * shape.head_padded * shape.kv_dtype.itemsize


def fp32_precision(device: Device) -> str:
    """Three products in tf32 stand for one in fp32 where tensor cores have no fp32."""
    return "tf32x3" if device.backend == "cuda" else "ieee"


def plan_decode(shape: Shape, device: Device, max_query_len: int) -> Config:
    rows = triton.next_power_of_2(shape.group * max_query_len)
    wide = shape.head_padded
    # Accumulators of more than 64 x 256 spill; twice that costs in fp32.
    most = MAX_DECODE_BLOCK_M if wide <= 256 else MAX_DECODE_BLOCK_M // 2
    if shape.query_dtype.itemsize == 4:
        most = 32 if wide <= 128 else 16
    elif avoids_wgmma(shape, device):
        most = min(most, 32)
    block_m = min(max(rows, 16), most)
    if device.backend == "interpreter":
        return Config(block_m, 16, 4, 1)
    if shape.query_dtype.itemsize == 4:
        return Config(block_m, 16, 8, 1, fp32_precision(device))
    # 16 KiB of K and of V, in flight twice in each of two programs, cover HBM's
    # latency: on an H200, 32/8 heads of 128, tiles of 64 keys read 4.33 TB/s at
    # 64 x 8k and are within 2% of the best from 1 x 1k to 256 x 1k. A third program
    # adds 4% to 8 x 8k and 18% to 1 x 8k.
    # An fp8 cache has half the bytes: 64 x 8k take 328 us with tiles of 128 keys, 381
    # with 64.
    tile = min(max(16384 // (wide * shape.kv_dtype.itemsize), 16), 128)
    if device.backend == "hip":
        return Config(block_m, tile, 4, 1)
    stages = 5 if 2 * tile_bytes(shape, tile) <= device.shared_memory // 3 else 3
    return Config(block_m, tile, 4 if block_m * wide <= 4096 else 8, stages)


def plan_abreast(shape: Shape, device: Device) -> int | None:
    """Tiles per decode worker from which workers side by side take a head each.

    Together they then read all heads of the same tokens, which lie side by side too: on
    an H200, 32/8 heads of 128 in bf16, 64 x 8k (248 tiles per worker) take 499 us, not
    506, and 16 x 8k with 5 query tokens (62) 152, not 156, but 8 x 8k (31) 82, not 80.
    With an fp8 cache 64 x 8k take 1% longer.
    """
    if shape.num_kv_heads == 1 or shape.kv_dtype.itemsize == 1:
        return None
    return 4 if device.backend == "interpreter" else 48


def plan_unpacking(shape: Shape, device: Device) -> str:
    """With PTX 64 x 8k with an fp8 cache take 300 us on an H200, without it 340."""
    if device.backend == "cuda" and (
        shape.kv_dtype == torch.float8_e5m2
        or (shape.kv_dtype == torch.float8_e4m3fn and device.arch >= 89)
    ):
        return "ptx"
    return "triton"


def plan_prefill(shape: Shape, device: Device) -> Config:
    wide = shape.head_padded
    if device.backend == "interpreter":
        return Config(32, 16, 4, 1)
    if shape.query_dtype.itemsize == 4:
        # Fewer than 64 rows: see avoids_wgmma.
        return Config(32 if wide <= 128 else 16, 16, 8, 1, fp32_precision(device))
    if device.backend == "hip":
        # A third of the 64 KiB of LDS per tile; a second stage spills on gfx942.
        return Config(128 if wide <= 128 else 64, 64 if wide <= 128 else 32, 4, 1)
    if device.arch == 90:
        return plan_prefill_hopper(shape)
    if wide <= 128:
        return Config(128, 64, 8, 2)
    if device.shared_memory < 160 * 1024:
        return Config(64, 32, 8, 2) if wide <= 256 else Config(32, 16, 8, 2)
    return Config(128, 32, 8, 2) if wide <= 256 else Config(64, 16, 8, 2)


def avoids_wgmma(shape: Shape, device: Device) -> bool:
    """Whether tiles must have fewer than the 64 rows from which Hopper takes wgmma.

    With operands that are converted in registers, from fp8 here and by tf32x3 in
    fp32, Triton 3.6's wgmma gave wrong results and illegal accesses on an H200.
    """
    return device.arch == 90 and shape.kv_dtype != shape.query_dtype


def plan_prefill_hopper(shape: Shape) -> Config:
    """Measured on an H200 at 8k tokens, causal, bf16."""
    wide = shape.head_padded
    if shape.kv_dtype != shape.query_dtype:
        return Config(32, 64 if wide <= 128 else 32, 4 if wide <= 128 else 8, 3)
    if wide <= 64:
        # 369 TFLOP/s with pages of 128 and 378 with 16; 128 rows: 359 and 358.
        return Config(64, 64, 4, 3)
    if wide <= 128:
        # 431 TFLOP/s with pages of 128 and 368 with 16; 64 keys: 411 and 335.
        return Config(128, 128, 8, 2)
    if wide <= 256:
        # 441 TFLOP/s with pages of 128 and 463 with 16; two stages: 440 and 443.
        return Config(128, 64, 8, 3)
    return Config(64, 32, 8, 2)


@cache
def make_plan(
    shape: Shape, device: Device, max_query_len: int, portable: bool = False
) -> AttentionPlan:
    """Chooses for batches whose decodes have at most max_query_len query tokens.

    Args:
        shape: of the layers.
        device: to run on.
        max_query_len: longest query of a decode.
        portable: leave out kernels made for one architecture.
    """
    hopper = (
        not portable
        and device.backend == "cuda"
        and device.arch == 90
        and triton.__version__.startswith(hopper_prefill.TRITON_VERSIONS)
        and hopper_prefill.supports(
            head_size=shape.head_size,
            block_size=shape.block_size,
            query_dtype=shape.query_dtype,
            kv_dtype=shape.kv_dtype,
        )
    )
    prefill, pack = plan_prefill(shape, device), shape.group
    if hopper:
        pack = hopper_prefill.packed_heads(shape.group)
        rows = hopper_prefill.CONFIGS[shape.head_padded].block_m
        prefill = replace(prefill, block_m=rows)
    return AttentionPlan(
        decode=plan_decode(shape, device, max_query_len),
        prefill=prefill,
        prefill_pack=pack,
        hopper=hopper,
        unpacking=plan_unpacking(shape, device),
        num_workers=2 * device.num_units,
        abreast_tiles=plan_abreast(shape, device),
    )
