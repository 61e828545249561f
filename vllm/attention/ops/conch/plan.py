# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The only place that chooses: tiles, warps, stages and workers for a shape and device.

Pure Python, no tensors, no launches: everything here can be tested without a GPU.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from vllm.triton_utils import triton

QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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
    arch: int | str  # 90, "gfx942", ...
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


@dataclass(frozen=True)
class Config:
    """One compiled variant of a kernel."""

    block_m: int  # query rows
    tile: int  # keys
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """As the kernels' constexprs and options."""
        return dict(
            BLOCK_M=self.block_m,
            TILE=self.tile,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


@dataclass(frozen=True)
class AttentionPlan:
    decode: Config
    prefill: Config
    num_workers: int  # programs of the decode kernel, all resident at once


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
    if device.type == "cpu" or dtype not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        return None
    target = this_device(device.index)
    arch = str(target.arch)
    if target.backend == "cuda":
        native = torch.float8_e4m3fn if target.arch >= 89 else None
    else:
        native = torch.float8_e4m3fnuz if arch.startswith("gfx94") else torch.float8_e4m3fn
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


def plan_decode(shape: Shape, device: Device, max_query_len: int) -> Config:
    rows = triton.next_power_of_2(shape.group * max_query_len)
    block_m = min(max(rows, 16), MAX_DECODE_BLOCK_M)
    if device.backend == "interpreter":
        return Config(block_m, 16, 4, 1)
    # A tile of K and V of 32 KiB, three deep and two programs per multiprocessor,
    # keeps the 26 to 33 KiB in flight that HBM's latency asks for.
    tile = 128
    while tile > 16 and tile_bytes(shape, tile) > 32 * 1024:
        tile //= 2
    if shape.query_dtype.itemsize == 4:
        tile = min(tile, 32)  # fp32 products run on the FMA units, from registers
    stages = 3
    while stages > 1 and stages * tile_bytes(shape, tile) > device.shared_memory // 2:
        stages -= 1
    return Config(block_m, tile, 4, stages)


def plan_prefill(shape: Shape, device: Device) -> Config:
    if device.backend == "interpreter":
        return Config(32, 16, 4, 1)
    if shape.query_dtype.itemsize == 4:
        return Config(32 if shape.head_padded > 128 else 64, 16, 4, 1)
    if device.backend == "hip":
        # A third of the 64 KiB of LDS per tile; a second stage spills on gfx942.
        return Config(128 if shape.head_padded <= 128 else 64, 64, 4, 1)
    if shape.head_padded <= 64:
        return Config(128, 64, 4, 3)
    if shape.head_padded <= 128:
        return Config(128, 64, 4 if shape.block_size % 64 == 0 else 8, 3)
    if shape.head_padded <= 256:
        return Config(128, 64, 8, 2)
    return Config(64, 32, 8, 2)


@cache
def make_plan(shape: Shape, device: Device, max_query_len: int) -> AttentionPlan:
    """Chooses for batches whose decodes have at most max_query_len query tokens."""
    return AttentionPlan(
        decode=plan_decode(shape, device, max_query_len),
        prefill=plan_prefill(shape, device),
        num_workers=2 * device.num_units,
    )
