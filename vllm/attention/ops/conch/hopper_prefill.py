# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prefill attention for Hopper: TMA, asynchronous matrix products, specialised warps.

This file is the host side; the kernel is in `hopper_prefill_kernel`, imported only
where it can run, since Gluon is an experimental part of Triton that changes with it.

K, V and Q are read through TMA descriptors made on the host. Descriptors made on the
device would need an allocator whose memory outlives every captured graph; those made
on the host are kernel arguments, fixed when a graph is captured. They are cached by
address and shape, as the caches of a model never move.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import NamedTuple

import torch

from vllm.triton_utils import triton

from .checks import TensorSpec, signature
from .launch import Described, Launch
from .limits import WIDEST_WINDOW

CAPABILITY = (9, 0)
TRITON_VERSIONS = ("3.6.",)  # Gluon has no stable interface: what was tested
HEAD_SIZES = range(40, 513, 8)  # 8: TMA's strides; smaller ones waste half the tile
DTYPES = (torch.bfloat16, torch.float16)
SINK_DTYPES = (*DTYPES, torch.float32)
CONSUMER_ROWS = 64
PANEL = 64  # elements of 16 bits in 128 bytes, the widest swizzle
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class TileConfig:
    """Tile and pipeline of a Hopper kernel, for 16 bits or fp8."""

    consumers: int  # of 64 rows each
    block_n: int  # keys a tile
    stages: int  # tiles of K, and of V, in flight
    softcap: str = "approx"  # tanh by the hardware's, or exactly by "exp2"
    row_block: int | None = None  # see `rows_by_head`

    @property
    def block_m(self) -> int:
        """Packed query rows a work item."""
        return CONSUMER_ROWS * self.consumers


@dataclass(frozen=True)
class HopperConfig(TileConfig):
    """Those of the kernel for 16 bits."""

    warpgroups: int = 1  # of a consumer, which share its columns
    narrow_p: bool = False  # probabilities go around the loop in 16 bits, not 32
    turns: bool = False  # two consumers take exponentials in turns
    q_stages: int = 1  # query tiles in flight


# By head size, padded. Measured on an H200, causal, 8k tokens, pages of 128: 484, 669,
# 680 and 450 TFLOP/s. At 64 without turns 463, and 464 with two stages and fp32
# besides; over 32k 487, 458 and 454. At 128 probabilities in 16 bits 629, in turns
# besides 609, tiles of 64 keys 0.9 times as fast; at 512 with K held as long as V 366.
CONFIGS = {
    64: HopperConfig(consumers=2, block_n=128, stages=3, narrow_p=True, turns=True),
    128: HopperConfig(consumers=2, block_n=128, stages=2),
    256: HopperConfig(consumers=2, block_n=64, stages=2, narrow_p=True),
    512: HopperConfig(consumers=1, block_n=64, stages=1, warpgroups=2),
}
# Of batches with few query tiles: half as many rows, so twice as many tiles. On an
# H200, heads 8/1 x 128, 2k tokens take 26.7 us so, not 32.2, and with 32/8 512 tokens
# 15.0, not 16.3; but where two consumers fill the device, 1k tokens, 30.4 and not 24.7.
# Three stages take as long.
SMALL_CONFIGS = {
    64: HopperConfig(consumers=1, block_n=128, stages=3),
    128: HopperConfig(consumers=1, block_n=128, stages=2),
    256: HopperConfig(consumers=1, block_n=64, stages=2),
}
# Largest softcap with which powers of two of the logits themselves, up to 2^72, leave
# sums in fp32 and probabilities in bf16 all their bits. With a softcap of 30, measured
# as above at 128: 605 TFLOP/s, 585 without 16 bits, 531 with maxima.
MAX_BOUND = 50.0
# Bytes of K and V that all heads of one query tile read, from which heads are done
# one after the other: L2 has 50 MiB.
LONG_SEQUENCE_BYTES = 48 * 2**20


@lru_cache
def is_available(device: torch.device) -> bool:
    """Whether this device and this Triton can run the kernel."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) == CAPABILITY
        and triton.__version__.startswith(TRITON_VERSIONS)
        and find_spec("triton.experimental.gluon") is not None
    )


def supports(
    *,
    head_size: int,
    block_size: int,
    query_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    softcap: float = 0.0,
) -> bool:
    """Whether the kernel covers a model's attention; else the portable one does.

    Causal or not, windows, packed views and sinks (see `check_sinks`) are covered with
    all of these. ALiBi, ranges of images and other masks are not.
    """
    return (
        head_size in HEAD_SIZES
        and block_size % 16 == 0
        and query_dtype in DTYPES
        and kv_dtype == query_dtype
        and softcap >= 0.0
    )


def packed_heads(group: int, is_short: bool = False) -> int:
    """Query heads of one KV head that share a query tile, for a model with `group` of
    them: 1, or for few and short queries up to 16, a power of two that divides the
    group, to fill tiles. Tiles of one head have been faster wherever queries are longer
    than a tile: 472 against 429 TFLOP/s at 16 x 1k tokens, 330 against 308 at 1k, 683
    against 667 at 4 x 512 tokens over 16k keys. Only one ragged batch, 577 against 572,
    was not."""
    return min(group & -group, 16) if is_short else 1


def padded_head(head_size: int) -> int:
    """Columns of a tile, as in `hopper_tiles`."""
    return max(PANEL, triton.next_power_of_2(head_size))


def has_small(head_size: int) -> bool:
    return padded_head(head_size) in SMALL_CONFIGS


def find_config(head_size: int, small: bool = False) -> HopperConfig:
    """The kernel's tile and pipeline, if small that of few query tiles."""
    configs = SMALL_CONFIGS if small else CONFIGS
    return configs[padded_head(head_size)]


def rows_by_head(group: int, pack: int, is_local: bool) -> int:
    """Rows of the work list that go head by head where K and V outgrow L2: as many as
    let 128 programs share a KV head, or two. A window's keys never outgrow L2, and few
    tiles run all at once: 1."""
    return 1 if is_local else max(1, min(64, 128 * pack // group))


@lru_cache(maxsize=4096)
def describe(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
):
    """TMA descriptor of a strided tensor; holds the address, not the memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    base = SimpleNamespace(dtype=dtype, data_ptr=lambda: address)
    swizzled = box[-1] * dtype.itemsize
    layout = NVMMASharedLayout(swizzled, 8 * dtype.itemsize, rank=len(box))
    return TensorDescriptor(base, list(shape), list(strides), list(box), layout)


def describe_tensor(tensor: torch.Tensor, box: tuple[int, ...]):
    return describe(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), box)


def describe_pages(cache: torch.Tensor, box: tuple[int, ...]):
    """TMA descriptor of K or V, of which a box lies within a page.

    Pages may overlap, each beginning a slot behind the one before, as those of keys
    that no cache holds. The last ones are then not counted in the shape, past which TMA
    reads zeros, though all slots that are used exist. So each slot stands for the page
    that begins there, and a box is of slots.

    Args:
        cache: [num_blocks, block_size, num_kv_heads, head_size].
        box: [1, slots, 1, dims].

    """
    num_blocks, block_size, *heads = cache.shape
    page, slot, *_ = cache.stride()
    if page != slot:
        return describe_tensor(cache, box)
    if box[1] != block_size:
        raise ValueError(
            f"pages of {block_size} slots overlap; boxes of {box[1]} slots cannot read "
            "them. Use pages of 16."
        )
    shape = (num_blocks + block_size - 1, 1, *heads)
    box = (block_size, 1, *box[2:])
    return describe(cache.data_ptr(), cache.dtype, shape, cache.stride(), box)


@lru_cache
def num_programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_alignment(name: str, tensor: torch.Tensor) -> None:
    """TMA reads 16-byte units: ValueError where address or strides are not."""
    unit = 16 // tensor.element_size()
    if tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {tensor.stride(-1)} in its last dimension; it must be "
            "1. Pass a view with contiguous heads."
        )
    if tensor.data_ptr() % 16 or any(s % unit for s in tensor.stride()[:-1]):
        raise ValueError(
            f"{name} has address {tensor.data_ptr():#x} and strides {tensor.stride()}; "
            f"the address must be a multiple of 16 bytes and the strides of {unit} "
            "elements. Use the portable kernel for this view."
        )


def check_sinks(sinks: torch.Tensor, query: torch.Tensor) -> None:
    """ValueError where sinks are not one float of each query head, in a row."""
    num_heads = query.shape[1]
    if sinks.shape != (num_heads,):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}; it must be ({num_heads},), one "
            "logit of each query head."
        )
    if sinks.dtype not in SINK_DTYPES:
        raise ValueError(
            f"sinks is {sinks.dtype}; it must be one of {SINK_DTYPES}. Convert it."
        )
    if sinks.device != query.device:
        raise ValueError(
            f"sinks is on {sinks.device}; it must be on {query.device}, as query is. "
            "Move it there."
        )
    if not sinks.is_contiguous():
        raise ValueError(
            f"sinks has stride {sinks.stride(0)}; it must be 1. Pass "
            "sinks.contiguous()."
        )


class HopperOptions(NamedTuple):
    """Of an attention, as for `hopper_prefill`."""

    pack: int
    scale: float
    causal: bool
    sliding_window: int | None
    softcap: float
    split: bool = False  # keys of an item may be split
    small: bool = False  # items of one consumer


class HopperLaunch(NamedTuple):
    """A launch, and the boxes in which it reads queries and pages through TMA.

    What varies, in prefill: the number of work items, and whether a dependent launch
    follows. Descriptors: of query, keys and values.
    """

    launch: Launch
    query_box: tuple[int, ...]
    page_box: tuple[int, ...]
    queries: dict[tuple[int, int], Described]  # by address and elements


def plan_kernel(
    kernel,
    query: TensorSpec,
    key_cache: TensorSpec,
    output: TensorSpec,
    block_table: TensorSpec,
    config: TileConfig,
    options: HopperOptions,
    panel: int,
    **own: object,
) -> HopperLaunch:
    """Plans the launch of either Hopper kernel.

    Args:
        kernel: `hopper_prefill_kernel` or `hopper_fp8_prefill_kernel`.
        query: as for `hopper_prefill`.
        key_cache: likewise.
        output: likewise.
        block_table: likewise.
        config: the kernel's.
        options: of the attention.
        panel: elements of a head that a box holds.
        own: constants that only this kernel has, and num_warps.

    """
    _, block_size, num_kv_heads, head_size = key_cache.shape
    num_query_heads = query.shape[1]
    group = num_query_heads // num_kv_heads
    pack, scale, causal, sliding_window, softcap, split, _ = options
    row_block = config.row_block
    if row_block is None:
        is_local = split or sliding_window is not None
        row_block = rows_by_head(group, pack, is_local)
    key_bytes = 2 * key_cache.dtype.itemsize * head_size * num_kv_heads  # K and V
    launch = Launch(
        kernel,
        (num_programs(query.device),),
        (
            *output.strides[:2],
            LONG_SEQUENCE_BYTES // key_bytes,
            block_table.strides[0],
            (softcap or scale) * LOG2E,
            scale / softcap if softcap else 0.0,
            min(sliding_window or 0, WIDEST_WINDOW),
        ),
        dict(
            HEAD_SIZE=head_size,
            BLOCK_N=config.block_n,
            PAGE=block_size,
            GROUP=group,
            PACK=pack,
            HEAD_TILES=num_query_heads // pack,
            CONSUMERS=config.consumers,
            STAGES=config.stages,
            CAUSAL=causal,
            WINDOWED=sliding_window is not None,
            WIDE_WINDOW=(sliding_window or 0) >= CONSUMER_ROWS + config.block_n,
            SOFTCAP=config.softcap if softcap else None,
            ROW_BLOCK=row_block,
            SPLIT=split,
            **own,
        ),
    )
    page_box = (1, min(block_size & -block_size, config.block_n), 1, panel)
    query_box = (CONSUMER_ROWS // pack, pack, panel)
    return HopperLaunch(launch, query_box, page_box, queries={})


def plan_launch(
    query: TensorSpec,
    key_cache: TensorSpec,
    output: TensorSpec,
    block_table: TensorSpec,
    options: HopperOptions,
    config: HopperConfig | None = None,
) -> HopperLaunch:
    """Plans what `hopper_prefill` launches, with the tensors output, output_lse, sinks,
    work and block_table. Arguments as there."""
    from .hopper_prefill_kernel import hopper_prefill_kernel

    if config is None:
        config = find_config(key_cache.shape[3], options.small)
    bounded = 0 < options.softcap <= MAX_BOUND and query.dtype == torch.bfloat16
    return plan_kernel(
        hopper_prefill_kernel,
        *(query, key_cache, output, block_table, config, options, PANEL),
        WARPGROUPS=config.warpgroups,
        BOUNDED=bounded,
        NARROW_P=config.narrow_p or bounded,
        TURNS=config.turns,
        Q_STAGES=config.q_stages,
        num_warps=4 * config.warpgroups,
    )


def hopper_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    work: torch.Tensor,
    *,
    pack: int,
    scale: float,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    output_lse: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    config: HopperConfig | None = None,
) -> None:
    """Attention of the queries on a work list to their sequences' paged keys.

    Plans its launch anew in every call, unlike `varlen_attention`.

    Args:
        query: [num_tokens, num_query_heads, head_size], bf16 or fp16.
        key_cache: view [num_blocks, block_size, num_kv_heads, head_size], any strides
            that are multiples of 16 bytes, the last 1.
        value_cache: like key_cache, own strides.
        output: like query; rows of queries that are not on the list stay untouched.
        block_table: [num_seqs, max_blocks] int32; unused entries may hold anything.
        work: [max_items, 8] int32, heaviest item first: sequence, query tile, first
            row of the sequence in query, query length, sequence length, three fields
            of no meaning here; sequence -1 ends the list. A query tile is
            config.block_m rows of the sequence's query_len * pack packed rows,
            row r = token r // pack, head r % pack of `pack` neighbouring heads. The
            kernel does each item for every one of num_query_heads / pack head tiles.
        pack: heads in a query tile, a power of two that divides the heads per KV head
            and 64; 1: a tile is rows of one head. See `packed_heads`.
        scale: factor of the logits, above 0.
        causal: key position <= context + query index; False: all of the sequence.
        sliding_window: keys a query sees, itself included; non-causal: both ways.
        softcap: logits become softcap * tanh(logits / softcap); 0: they do not.
        output_lse: optional [num_tokens, num_query_heads] fp32, contiguous.
        sinks: optional [num_query_heads] float, contiguous: for each head the logit of
            one key more, which every query sees and whose value is 0. It counts in
            output_lse.
        config: tile and pipeline, default by head size.

    """
    for name, tensor in (
        ("query", query), ("key_cache", key_cache), ("value_cache", value_cache)
    ):  # fmt: skip
        check_alignment(name, tensor)
    if sinks is not None:
        check_sinks(sinks, query)
    tensors = (query, key_cache, output, block_table)
    q, k, o, pages = (TensorSpec(*signature(tensor)) for tensor in tensors)
    options = HopperOptions(pack, scale, causal, sliding_window, softcap)
    hopper = plan_launch(q, k, o, pages, options, config)
    hopper.launch(
        output,
        output_lse,
        sinks,
        work,
        block_table,
        *(None, None, None),  # states: keys are not split
        varying=(work.shape[0], 0),
        described=Described(
            describe_tensor(query, hopper.query_box),
            describe_pages(key_cache, hopper.page_box),
            describe_pages(value_cache, hopper.page_box),
        ),
    )
