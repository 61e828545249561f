# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The only place that chooses: tiles, warps, stages and workers for a shape and device.

Pure Python, no tensors, no launches: everything here can be tested without a GPU.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from vllm.triton_utils import triton

from . import hopper_decode, hopper_fp8_prefill, hopper_prefill
from .checks import reject

QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
QUERY_FP8_DTYPE = torch.float8_e4m3fn  # over a cache of the same
KV_FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
KV_INT4_DTYPE = torch.uint8  # two elements to a byte
# Those that need scales per token and head, and those that may have them.
KV_INTEGER_DTYPES = (torch.int8, KV_INT4_DTYPE)
KV_SCALED_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, *KV_INTEGER_DTYPES)
# Of elements that a product needs in another dtype.
KV_QUANTIZED_DTYPES = (*KV_FP8_DTYPES, *KV_INTEGER_DTYPES)
HEAD_SIZES = range(16, 513)
# Of head sizes with int4: what is read at once are four elements, and a row in vLLM's
# pages ends where an fp32 can begin.
INT4_HEAD_MULTIPLE = 8
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
    num_xcds: int = 1  # dies with an L2 each, to which programs are dealt in turn
    bandwidth: float = 0.0  # of memory, bytes/s; 0: not known


class Shape(NamedTuple):
    """What stays the same over all calls of a layer."""

    num_query_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    query_dtype: torch.dtype
    kv_dtype: torch.dtype
    token_scales: bool = False  # of K and V, one for every token and head

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def head_padded(self) -> int:
        # Products of halves of a head have 16 terms or more.
        least = 32 if self.kv_dtype == KV_INT4_DTYPE else 16
        return max(least, 1 << (self.head_size - 1).bit_length())  # a power of two

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K, or V, of one head, padded."""
        if self.kv_dtype == KV_INT4_DTYPE:
            return self.head_padded // 2
        return self.head_padded * self.kv_dtype.itemsize


def kv_dtypes_for(query_dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes of the caches that queries of this dtype can attend to."""
    if query_dtype == QUERY_FP8_DTYPE:
        return (QUERY_FP8_DTYPE,)
    return (query_dtype, *KV_QUANTIZED_DTYPES)


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
    query_dtypes = (*QUERY_DTYPES, QUERY_FP8_DTYPE)
    if shape.query_dtype not in query_dtypes:
        reject("query_dtype", shape.query_dtype, ", ".join(map(str, query_dtypes)))
    kv_dtypes = kv_dtypes_for(shape.query_dtype)
    if shape.kv_dtype not in kv_dtypes:
        reject("kv_dtype", shape.kv_dtype, ", ".join(map(str, kv_dtypes)))
    if shape.kv_dtype == KV_INT4_DTYPE and shape.head_size % INT4_HEAD_MULTIPLE:
        allowed = f"a multiple of {INT4_HEAD_MULTIPLE} with an int4 cache"
        reject("head_size", shape.head_size, allowed)
    if shape.token_scales and shape.kv_dtype not in KV_SCALED_DTYPES:
        reject("kv_dtype", shape.kv_dtype, ", ".join(map(str, KV_SCALED_DTYPES)))
    if shape.token_scales and shape.query_dtype == QUERY_FP8_DTYPE:
        reject("query_dtype", shape.query_dtype, "others with scales per token")


@dataclass(frozen=True)
class Config:
    """One compiled variant of a kernel."""

    block_m: int  # query rows
    tile: int  # keys
    num_warps: int
    num_stages: int
    precision: str = "ieee"  # of products of fp32
    masked_tile: int | None = None  # keys, where prefill masks a tile; None: tile
    max_registers: int | None = None  # of a thread; None: the compiler's choice
    fixed_order: bool = False  # see `fix_order`
    mfma_rows: int | None = None  # of AMD's matrix instructions; None: by the tile
    # Prefill: the program waits for its query in shared memory before the loop.
    synced: bool = False
    scale_columns: int = 0  # see `kv_format.load_token_scales`

    def constants(self) -> dict[str, object]:
        """As the kernels' constexprs and options."""
        options: dict[str, object] = dict(
            BLOCK_M=self.block_m,
            TILE=self.tile,
            PRECISION=self.precision,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        if self.fixed_order:
            options["enable_fp_fusion"] = False
        if self.mfma_rows is not None:
            options["matrix_instr_nonkdim"] = self.mfma_rows
        return options


class Split(NamedTuple):
    """Few tiles of prefill rows, whose keys are split to fill the device.

    On an H200, 32/8 heads of 128, pages of 128, 64 tokens over 32k take 66 us, and
    262 if each tile has all of its keys; 256 tokens over 32k 205 and 356.
    """

    keys: int  # parts are multiples of so many
    head_tiles: int  # that each tile stands for
    num_units: int  # multiprocessors to fill

    @property
    def max_tiles(self) -> int:
        """So many fill the device without being split."""
        return self.num_units // self.head_tiles

    @property
    def max_items(self) -> int:
        """Most parts of so many tiles: see `schedule.count_parts`."""
        return 2 * self.max_tiles


class Order(NamedTuple):
    """In which order programs take the tiles of prefill rows, each for all head tiles.

    Programs are dealt to lanes in turn, each of which has as many of the KV heads. A
    lane takes tiles block by block, of each block all that read one KV head before the
    next, and of a tile all head tiles of a KV head at once.

    XCDs have an L2 each (4 MiB on an MI300X), and programs are dealt to them in turn. A
    number of lanes that divides that of the XCDs keeps every lane on XCDs of its own:
    what shares a KV head finds its keys in one L2, one head at a time.

    Where one L2 serves all, a block has 128 rows for each multiprocessor, two programs
    of 64: what runs at once then reads the same. On an H200, 32/8 heads of 128, pages
    of 16, blocks of 264, 132 and 4 tiles take, in ms: 32k tokens 19.6, 20.3 and 20.9;
    2k tokens over 32k 2.35, 2.41 and 2.49. On others nobody has measured it.
    """

    lanes: int
    rows: int | None  # of a block; 0: tiles go one by one; None: all are one

    def tiles(self, config: Config) -> int | None:
        """Tiles of rows in a block."""
        return None if self.rows is None else max(1, self.rows // config.block_m)

    def whole_blocks(self, config: Config, num_tiles: int) -> int:
        """Blocks of so many tiles of rows, 0 where they are no two: then the last KV
        head's heavy tiles would begin when others are nearly done."""
        block = self.tiles(config)
        found = num_tiles // block if block else 0
        return found if found > 1 else 0


@dataclass(frozen=True)
class AttentionPlan:
    decode: Config
    prefill: Config  # the portable kernel's
    # With K and V read in boxes, where strides and addresses allow.
    prefill_boxes: Config | None
    prefill_pack: int  # query heads in a tile of prefill rows
    head_tiles: int  # such tiles for all query heads
    prefill_rows: int  # of a prefill item: one or more tiles of the portable kernel
    order: Order  # of the portable kernel's programs
    # "16-bit" or "fp8": that Hopper kernel does prefills, where strides and options
    # allow.
    hopper: str | None
    hopper_decode: bool  # decodes have a Hopper kernel too, where the same allow
    kv_format: str | None  # KV_FORMAT of kv_format.py
    unpacking: str  # of quantised K and V: "ptx" or "triton"; see kv_format.widen
    num_workers: int  # programs of the decode kernel, all resident at once
    abreast_tiles: int | None  # see plan_abreast
    # Batch invariance: keys of a segment (None: off), and rows of a decode tile that
    # may be valid; see `segments`.
    segment: int | None
    segment_rows: int
    split: Split | None  # None: all keys of a tile of prefill rows in one
    small: bool  # prefill items are of half as many rows as usual
    overlaps: bool  # launches behind that of prefills depend on it, see `overlap`


@cache
def this_device(index: int | None) -> Device:
    """Describes a GPU (index as in torch.device.index), or the interpreter (None)."""
    if index is None:
        return Device("interpreter", 0, num_units=4, shared_memory=1 << 30)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    num_units = properties["multiprocessor_count"]
    return Device(
        target.backend,
        target.arch,
        num_units,
        properties["max_shared_mem"],
        count_xcds(target.arch, num_units),
        memory_bandwidth(properties) if target.backend == "cuda" else 0.0,
    )


def memory_bandwidth(properties: dict[str, int]) -> float:
    """Bytes/s, of the driver's properties: kHz, at two transfers each, and bits."""
    return 2e3 * properties["mem_clock_rate"] * properties["mem_bus_width"] / 8


# Compute units of one die: an MI300X has 304 on 8, an MI355X 256 on 8.
XCD_UNITS = {"gfx942": 38, "gfx950": 32}


def count_xcds(arch: Any, num_units: int) -> int:
    """Dies of a GPU, or of the part of one that a partition shows."""
    return max(1, num_units // XCD_UNITS[arch]) if arch in XCD_UNITS else 1


def reads_e4m3(dtype: torch.dtype, device: Device) -> bool:
    """Whether the device has an instruction that widens this e4m3 format."""
    arch = str(device.arch)
    if device.backend == "cuda":
        return dtype == torch.float8_e4m3fn and device.arch >= 89
    if device.backend == "hip" and arch.startswith("gfx94"):
        return dtype == torch.float8_e4m3fnuz
    if device.backend == "hip":
        return dtype == torch.float8_e4m3fn and arch.startswith(("gfx95", "gfx12"))
    return True  # the interpreter


def plan_kv_format(kv_dtype: torch.dtype, device: Device) -> str | None:
    if kv_dtype in KV_INTEGER_DTYPES:
        return "int8" if kv_dtype == torch.int8 else "int4"
    if kv_dtype in KV_SCALED_DTYPES and not reads_e4m3(kv_dtype, device):
        return str(kv_dtype).removeprefix("torch.float8_")
    return None


def tile_bytes(shape: Shape, tile: int) -> int:
    """Bytes of one tile of K and one of V."""
    return 2 * tile * shape.row_bytes


def is_rdna(device: Device) -> bool:
    """AMD's GPUs with waves of 32: 256 registers a thread, no more for accumulators."""
    return device.backend == "hip" and str(device.arch).startswith("gfx1")


def all_registers(config: Config, device: Device) -> Config:
    """The config with as many registers as a CUDA thread can have.

    Left alone, ptxas may spill some to fit one more block in a multiprocessor.
    """
    if device.backend != "cuda":
        return config
    return replace(config, max_registers=min(255, 65536 // (32 * config.num_warps)))


def plan_fp32(shape: Shape, device: Device, rows: int) -> Config:
    """Tiles for products of fp32, of up to so many rows."""
    wide = shape.head_padded
    if is_rdna(device):
        return Config(16, 16, 8 if wide <= 64 else 16, 1)
    if device.backend == "hip":
        return Config(min(rows, 32 if wide <= 128 else 16), 16, 8, 1)
    # Three products in tf32 stand for one in fp32, which tensor cores do not have. Of
    # the wider heads a thread cannot hold the query twice, whole and rounded to tf32.
    precision = "tf32x3" if wide <= 128 else "ieee"
    # Fewer than 64 rows: see avoids_wgmma.
    config = Config(min(rows, 32 if wide <= 64 else 16), 16, 8, 1, precision)
    return all_registers(config, device)


def plan_decode(shape: Shape, device: Device, max_query_len: int) -> Config:
    rows = max(16, triton.next_power_of_2(shape.group * max_query_len))
    wide, width = shape.head_padded, shape.kv_dtype.itemsize
    if device.backend == "interpreter":
        return Config(min(rows, 32), 16, 4, 1)
    if shape.query_dtype.itemsize == 4:
        return plan_fp32(shape, device, rows)
    block_m = min(rows, decode_rows_limit(shape, device))
    # 16 KiB of K and of V, in flight twice in each of two programs, cover HBM's
    # latency: on an H200, 32/8 heads of 128, tiles of 64 keys read 4.33 TB/s at
    # 64 x 8k and are within 2% of the best from 1 x 1k to 256 x 1k. A third program
    # adds 4% to 8 x 8k and 18% to 1 x 8k.
    # An fp8 cache has half the bytes: 64 x 8k take 328 us with tiles of 128 keys, 381
    # with 64.
    tile = min(max(16384 // shape.row_bytes, 16), 128)
    if is_rdna(device):
        tile = 64 if wide <= 64 else 32 if width > 1 else 16
        num_warps = 16 if wide > 128 or (shape.token_scales and wide > 64) else 8
        return Config(block_m, tile, num_warps, 1)
    if device.backend == "hip":
        return Config(block_m, tile, 4, 1)
    # Not measured but compiled: what sm_89 and sm_120 and what more rows leave of the
    # registers.
    if wide <= 64 and device.shared_memory < 128 * 1024:
        tile = min(tile, 64)
    if shape.token_scales and shape.row_bytes > 64:
        # More spill. On an H200 64 x 8k with int8 took 635 us so, 757 with 3 stages and
        # 838 with 8 warps; with int4 and 128 keys 517, with 64 578. Since then
        # `kv_format.log2_of_scales` has made it 597 and 449.
        tile = min(tile, 64)
    if block_m > 16:
        tile = min(tile, 64 if block_m == 32 or width == 2 else 32)
    if block_m * wide > 8192:
        tile = 16
    num_warps = 4 if block_m <= 32 and block_m * wide <= 4096 else 8
    if device.arch == 90 and width == 2 and wide == 128 and block_m > 16:
        # One warpgroup's asynchronous products: 16 x 8k with 5 query tokens, 20 rows,
        # take 147 us on an H200, with 32 rows 157.
        block_m, num_warps = 64, 4
    stages = 5 if 2 * tile_bytes(shape, tile) <= device.shared_memory // 3 else 3
    config = Config(block_m, tile, num_warps, stages)
    let_alone = wide == 128 or (wide <= 64 and block_m != 32)
    if device.arch == 90 and (block_m == 16 or width == 2) and let_alone:
        return config
    return all_registers(config, device)


def decode_rows_limit(shape: Shape, device: Device) -> int:
    """Most query rows of a decode tile; more become several tiles."""
    wide = shape.head_padded
    if is_rdna(device):
        return 32 if wide <= 128 else 16
    # Accumulators of more than 64 x 256 spill.
    most = MAX_DECODE_BLOCK_M if wide <= 256 else MAX_DECODE_BLOCK_M // 2
    return min(most, 32) if avoids_wgmma(shape, device) else most


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
        shape.kv_dtype in (torch.float8_e5m2, *KV_INTEGER_DTYPES)
        or (shape.kv_dtype == torch.float8_e4m3fn and device.arch >= 89)
    ):
        return "ptx"
    return "triton"


def plan_prefill(shape: Shape, device: Device) -> Config:
    wide = shape.head_padded
    if device.backend == "interpreter":
        return Config(32, 16, 4, 1)
    if shape.query_dtype.itemsize == 4:
        return plan_fp32(shape, device, 32)
    if is_rdna(device):
        return plan_prefill_rdna(shape)
    if device.backend == "hip":
        # A quarter to all of 64 KiB of LDS for K and V; a second stage spills on
        # gfx942.
        if wide <= 128:
            return Config(128, 64, 4, 1)
        return Config(64, 32 if wide <= 256 else 16, 4, 1)
    if device.arch == 90:
        return plan_prefill_hopper(shape)
    if device.arch // 10 == 10:
        return all_registers(plan_prefill_blackwell(shape), device)
    return plan_prefill_mma(shape)


def plan_prefill_mma(shape: Shape) -> Config:
    """CUDA GPUs whose matrix products take registers: the largest without spills."""
    wide = shape.head_padded
    if wide <= 128:
        return Config(128 if wide <= 64 else 64, 64, 8, 2)
    return Config(64, 32, 8, 2) if wide <= 256 else Config(32, 16, 8, 2)


def plan_prefill_blackwell(shape: Shape) -> Config:
    """Accumulators are in tensor memory, if a tile has 64 rows or more."""
    wide = shape.head_padded
    if wide <= 128:
        return Config(128, 64, 8, 2)
    return Config(128, 32, 8, 2) if wide <= 256 else Config(32, 16, 8, 2)


def plan_prefill_rdna(shape: Shape) -> Config:
    """The largest tiles without spills; in heads over 256, or 128 in fp8, all spill."""
    wide = shape.head_padded
    converts = shape.kv_dtype != shape.query_dtype  # by arithmetic
    if wide <= 128:
        rows = 128 if wide <= 64 else 64
        tile = 32 if wide <= 64 and not converts else 16
        return Config(rows // 2 if converts else rows, tile, 8, 1)
    return Config(16 if converts or wide > 256 else 64, 16, 16, 1)


def avoids_wgmma(shape: Shape, device: Device) -> bool:
    """Whether tiles must have fewer than the 64 rows from which Hopper takes wgmma.

    With operands that are converted in registers, from fp8 here and by tf32x3 in
    fp32, Triton 3.6's wgmma gave wrong results and illegal accesses on an H200, and
    over int4 with 64 keys a tile's first rows still are wrong. Where prefills take it
    all the same, see `plan_prefill_converted`, their program waits for its query before
    the loop.
    """
    return device.arch == 90 and shape.kv_dtype in KV_QUANTIZED_DTYPES


def plan_prefill_converted(shape: Shape) -> Config:
    """Hopper's tiles for heads of 128 over quantised caches.

    On an H200 2k tokens over 8k take, in us: with scales per token, int8 1072 and fp8
    1058 (two stages 1256 and 1240; 128 keys 1158 and 1137, but 1321 and 1375 with pages
    of 128; 32 rows, without wgmma and `log2_of_scales`, 3429 and 3415); int4 1598 (two
    stages 1673, 128 rows 1736, 32 rows 6475); without scales, e5m2 747 (32 rows 1387).
    """
    if shape.kv_dtype == KV_INT4_DTYPE:
        return Config(64, 32, 4, 1, synced=True, scale_columns=4)
    if shape.token_scales:
        return Config(64, 64, 4, 1, synced=True, scale_columns=4)
    return Config(64, 128, 4, 2, synced=True)


# Two such programs or more run at once on a multiprocessor, each of one warpgroup: one
# has products while the other has exponentials. On one H200, pages of 16, heads of 128,
# q8k has 420 TFLOP/s and q32k 441, with 128 rows and keys, 8 warps 364 and 344. Heads
# of 64, on another: 373 and 375; 128 keys 323 and 301; with 128 registers a thread 396
# and 395, but some spill.
HOPPER_TILE = Config(64, 64, 4, 3)


def plan_prefill_hopper(shape: Shape) -> Config:
    """Measured on an H200 at 8k tokens, causal, bf16."""
    wide = shape.head_padded
    if shape.kv_dtype in KV_QUANTIZED_DTYPES:
        if wide == 128:
            return plan_prefill_converted(shape)
        if shape.token_scales and wide > 64:  # the largest without spills
            tile = 32 if shape.kv_dtype == KV_INT4_DTYPE else 64
            return Config(32, tile if wide <= 128 else 32, 8, 3)
        if wide <= 128:
            return Config(32, 64, 8 if wide <= 64 else 4, 3)
        return Config(32, 32, 8, 3)
    if wide <= 128:
        return HOPPER_TILE
    if wide <= 256:
        # 523 TFLOP/s with pages of 16; 32 keys: 424.
        return Config(128, 64, 8, 2, masked_tile=32)
    return Config(64, 32, 8, 2)


# By head size, padded. On those, with pages of 128: 414, 483 and 536 TFLOP/s. At 128
# HOPPER_TILE has 479, over 32k 494 for 502, but with 8/1 heads 511 for 552; where tiles
# are few it is faster: q1k 272 for 212, with 8/1 heads q2k 237 for 143. 128 keys and 8
# warps, of which only one program fits a multiprocessor, elsewhere 415 for 522.
HOPPER_BOXES = {
    64: HOPPER_TILE,
    128: Config(128, 64, 4, 2, masked_tile=32),
    256: Config(128, 64, 8, 2, masked_tile=32),
}


def plan_prefill_boxes(shape: Shape, device: Device, pointers: Config) -> Config | None:
    """Where K and V are read in boxes, each within a page; None: nowhere.

    A box is one instruction (TMA) and spares the threads all addresses. Elsewhere
    Triton makes plain loads with bounds checks of it, and on GPUs of compute
    capability 12 nobody has measured it. fp8 is converted in registers on its way.
    Blackwell has the tiles of `pointers`.
    """
    if device.backend != "cuda" or device.arch // 10 not in (9, 10):
        return None
    if shape.query_dtype.itemsize != 2 or shape.kv_dtype != shape.query_dtype:
        return None
    config = HOPPER_BOXES.get(shape.head_padded)
    if config and device.arch != 90:
        config = pointers
    return config if config and shape.block_size % config.tile == 0 else None


def with_rows(config: Config, rows: int) -> Config:
    """The config for tiles of so many rows: as many to a warp, and 4 warps or more."""
    num_warps = config.num_warps * rows // config.block_m
    return replace(config, block_m=rows, num_warps=max(4, num_warps))


def plan_order(shape: Shape, device: Device, pack: int, has_blocks: bool) -> Order:
    """The order of the programs of prefill.

    Args:
        shape: of the layers.
        device: to run on.
        pack: query heads in a tile of rows.
        has_blocks: whether there are blocks where there is one L2.

    """
    if device.num_xcds > 1:
        return Order(math.gcd(shape.num_kv_heads, device.num_xcds), None)
    # On an H200 q8k with heads of 256 takes 1206 us one by one, and 1267 in blocks.
    if not has_blocks or shape.head_padded > 128:
        return Order(1, 0)
    return Order(1, 128 * device.num_units * pack // shape.group)


def hopper_kernel(shape: Shape, device: Device) -> str | None:
    """The Hopper kernel for prefills of this shape, as `AttentionPlan.hopper`."""
    available = (
        device.backend == "cuda"
        and device.arch == 90
        and triton.__version__.startswith(hopper_prefill.TRITON_VERSIONS)
    )
    modules = {"16-bit": hopper_prefill, "fp8": hopper_fp8_prefill}
    for name, module in modules.items() if available else ():
        if module.supports(
            head_size=shape.head_size,
            block_size=shape.block_size,
            query_dtype=shape.query_dtype,
            kv_dtype=shape.kv_dtype,
        ):
            return name
    return None


def has_hopper_decode(shape: Shape, hopper: str | None) -> bool:
    """Whether decodes of this shape have a Hopper kernel, where prefills have."""
    return hopper == "16-bit" and hopper_decode.supports(
        head_size=shape.head_size,
        group=shape.group,
        block_size=shape.block_size,
        query_dtype=shape.query_dtype,
        kv_dtype=shape.kv_dtype,
    )


# Keys of a segment, where results do not depend on the batch. On an H200, 32/8 heads of
# 128 in bf16, segments of 256, 512, 1024 and 2048 keys take, in us: 1 x 8k 27, 26, 31
# and 49; 8 x 1k 23, 26, 27, 28; 1 x 32k 78, 63, 54, 64; 64 x 8k 545, 501, 497, 495.
SEGMENT = 512
# The states of segments that decode's workers leave.
SEGMENT_BYTES = 64 * 2**20
# Of parts of a sequence's keys; every tile of keys divides it.
SPLIT_KEYS = 128
# From so many tokens on a query fills Hopper's tiles with rows of one head: over 32k
# 64, 128 and 256 of them take 66, 114 and 206 us with four heads in a tile, 80, 111 and
# 205 with one; 300 without context 16.8 and 15.2.
SHORT_QUERY_LEN = 128
# Up to so many keys, or as many as the longest query has tokens, or twice as many where
# all run at once, few tiles have half as many rows and are not split. On an H200, split
# and so, in us: 100 without context 13.4 and 9.1; 64 of 1k 17.3 and 15.8, of 2k 19.0
# and 23.6; 256 of 1k 24.2 and 16.9; with heads 8/1 x 128 1k 23.6 and 16.2, of 2k 29.1
# and 24.2, of 4k both 40.
SHORT_SEQ_LEN = 1024


def fix_order(
    shape: Shape, device: Device, decode: Config, prefill: Config
) -> tuple[Config, Config]:
    """Decode and prefill with one order of all sums, whatever the number of rows.

    The same tiles of keys for any length of a query, and matrix instructions that add
    in the same order, without contraction of other products and sums.
    """
    wide = shape.head_padded
    is_hopper_tile = device.arch == 90 and prefill == HOPPER_TILE
    # The largest of 64 keys and 64 rows of decode that do not spill; see plan_decode.
    tile = min(64, max(16, 8192 // wide))
    decode_rows = min(decode.block_m, max(16, 8192 // wide))
    rows = prefill.block_m
    if device.backend == "interpreter" or shape.query_dtype.itemsize == 4:
        tile, decode_rows = decode.tile, decode.block_m
    elif is_rdna(device):
        tile = 16
    elif device.backend == "cuda" and (
        shape.kv_dtype in KV_FP8_DTYPES or device.arch // 10 == 10
    ):
        # V is read in pairs in tiles of fewer than 64 rows alone. From so many rows on
        # Blackwell has other matrix instructions.
        rows, decode_rows = min(rows, 32), min(decode_rows, 32)
    elif device.arch == 90 and wide == 128:
        rows = 64
    decode = replace(decode, block_m=decode_rows)
    prefill = with_rows(replace(prefill, masked_tile=None), rows)
    if device.backend == "hip":
        # Half the rows leave registers for the state of the segments before.
        prefill = replace(prefill, block_m=max(16, rows // 2))
    if device.arch == 90 and wide == 128:
        # On an H200 q8k with pages of 16 take 1712 us; in two stages 1786, with 128
        # rows 1819. Head size 256: 128 rows 1808, 64 rows 3714.
        prefill = replace(prefill, num_stages=3)
    elif is_hopper_tile:  # other stages were not measured
        prefill = replace(prefill, num_stages=2)
    decode, prefill = (
        replace(
            config,
            tile=tile,
            fixed_order=True,
            mfma_rows=16 if device.backend == "hip" and not is_rdna(device) else None,
        )
        for config in (decode, prefill)
    )
    return decode, prefill


@cache
def make_plan(
    shape: Shape,
    device: Device,
    max_query_len: int,
    portable: bool = False,
    batch_invariant: bool = False,
    split_query_len: int | None = None,
    small: bool = False,
    has_prefills: bool = False,
) -> AttentionPlan:
    """Chooses for batches whose decodes have at most max_query_len query tokens.

    Args:
        shape: of the layers.
        device: to run on.
        max_query_len: longest query of a decode.
        portable: leave out kernels made for one architecture.
        batch_invariant: see `segments`; implies portable.
        split_query_len: longest query of a batch with few tiles of prefill rows, whose
            keys are split, see `Split`; not if batch invariant. None: there are many.
        small: whether few tiles with few keys are for this batch: of half as many rows,
            where Hopper's kernel has such, or the portable one other pages.
        has_prefills: whether the batch may have prefills beside its decodes.

    """
    hopper = None if portable or batch_invariant else hopper_kernel(shape, device)
    prefill, pack = plan_prefill(shape, device), shape.group
    boxes = plan_prefill_boxes(shape, device, prefill)
    rows = max(config.block_m for config in (prefill, boxes) if config)
    if device.arch == 90 and prefill == HOPPER_TILE:
        # An item for both programs of a multiprocessor: few, which are split, fill all.
        rows = 2 * HOPPER_TILE.block_m
    if hopper is not None:
        module = hopper_fp8_prefill if hopper == "fp8" else hopper_prefill
        rows = module.CONFIGS[max(64, shape.head_padded)].block_m
        is_short = split_query_len is not None and split_query_len < SHORT_QUERY_LEN
        pack = hopper_prefill.packed_heads(shape.group, is_short)
    if hopper == "16-bit":
        small &= hopper_prefill.has_small(shape.head_size)
    else:
        # What boxes have more rows for, pages of another size have already.
        has_more = boxes is not None and boxes.block_m > prefill.block_m
        small &= hopper is None and has_more and not batch_invariant
    if small:
        rows //= 2
    if hopper == "16-bit" and prefill.block_m > rows:
        prefill = with_rows(prefill, rows)
    if boxes is not None and boxes.block_m > rows:
        boxes = prefill
    decode = plan_decode(shape, device, max_query_len)
    abreast, segment = plan_abreast(shape, device), None
    if batch_invariant:
        decode, prefill = fix_order(shape, device, decode, prefill)
        segment = 2 * decode.tile if device.backend == "interpreter" else SEGMENT
        rows = prefill.block_m
        if boxes is not None:
            # q8k with pages of 128 take 1268 us.
            is_measured = device.arch == 90 and boxes.tile == prefill.tile
            boxes = replace(prefill, num_stages=3) if is_measured else None
        if abreast is not None:
            abreast = max(1, abreast * decode.tile // segment)
    head_tiles = shape.num_query_heads // pack
    few = None
    if split_query_len and not batch_invariant and head_tiles <= device.num_units:
        keys = 32 if device.backend == "interpreter" else SPLIT_KEYS
        few = Split(keys, head_tiles, device.num_units)
    return AttentionPlan(
        decode=decode,
        prefill=prefill,
        prefill_boxes=boxes,
        prefill_pack=pack,
        head_tiles=head_tiles,
        prefill_rows=rows,
        # Few tiles are no two blocks, and with segments nobody has measured them.
        order=plan_order(shape, device, pack, not (few or batch_invariant)),
        hopper=hopper,
        hopper_decode=has_hopper_decode(shape, hopper),
        kv_format=plan_kv_format(shape.kv_dtype, device),
        unpacking=plan_unpacking(shape, device),
        num_workers=2 * device.num_units,
        abreast_tiles=abreast,
        segment=segment,
        segment_rows=min(
            decode.block_m,
            triton.next_power_of_2(shape.group * max(max_query_len, 1)),
        ),
        split=few,
        small=small,
        overlaps=has_prefills and hopper is not None,
    )
