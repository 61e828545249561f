# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention of ragged batches over a paged KV cache."""

import itertools
import math
from typing import NamedTuple

import torch

from vllm.triton_utils import triton

from . import hopper_decode, hopper_fp8_prefill, hopper_prefill
from .arguments import (
    FEATURES,
    OF_A_LAYER,
    PER_SEQUENCE,
    check_arguments,
    check_batch,
    check_fours,
    check_options,
    check_schedule,
    check_tensors,
    shape_of,
)
from .checks import TensorSpec, free_strides
from .combine import combine_kernel
from .decode import decode_kernel
from .fp8 import FP8_DTYPES, storage_view, triton_fp8
from .hopper_prefill import HopperLaunch, HopperOptions
from .launch import Described, Launch, dependent_options, describe_pages
from .plan import AttentionPlan, Config, Shape
from .prefill import prefill_kernel
from .rotation import block_size, rotate, split_norm
from .schedule import Sight, VarlenSchedule, count_ranges, make_sight
from .segments import segment_decode_kernel
from .softmax import LOG2_E
from .token_head_cache import offset_in_page

CACHES = ("key_cache", "value_cache")
# What the Hopper kernels do not take.
PORTABLE = {
    "16-bit": {"q_scale", "k_scale", "v_scale", *FEATURES} - {"sinks"},
    "fp8": set(FEATURES) - {"sinks"},
}
# Descriptors of queries that layers of one shape keep.
MAX_QUERIES = 256
# Rows whose parts one program combines at once, and elements of states, of all parts,
# that it has in flight; and what of a layer's variant it is told.
COMBINED_ROWS = 8
COMBINED_ELEMENTS = 16384
COMBINED_CONSTANTS = ("HEAD_SIZE", "HEAD_PADDED", "FP8", "FP8_MAX")
# Formats of the cache that kernels read as bytes.
BYTES = ("e4m3fn", "e4m3fnuz")


class Options(NamedTuple):
    """What is not in the tensors' specs, and what the schedule chose."""

    scale: float
    causal: bool
    softcap: float
    sight: Sight
    alibi_sqrt: bool
    odd_values: bool  # a cache begins at an odd address
    value_offset: int | None  # see `offset_in_page`
    shape: Shape
    plan: AttentionPlan
    num_workers: int
    segment_slots: int


def rotated_specs(specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The specs that kernels see of an int4 cache: query, and output if in fp8, copied.

    The rotation at the end divides by output_scale.
    """
    query = specs["query"]
    _, num_heads, head_size = query.shape
    copy = query._replace(strides=(num_heads * head_size, head_size, 1))
    specs = specs | {"query": copy}
    if "output_scale" in specs:
        specs["output"] = copy
        del specs["output_scale"]
    return specs


def row_strides(spec: TensorSpec) -> tuple[int, int]:
    """Strides of tokens and heads; a batch of one token needs its stride for others."""
    return spec.strides[0], free_strides(spec)[1]


def layer_key(name: str, tensor: torch.Tensor | None) -> tuple | None:
    """All that matters of a tensor; its first size does not if it may change.

    Of one page, or sequence, the stride to the next is neither checked nor kept.
    """
    if tensor is None:
        return None
    shape = tensor.shape
    if name not in OF_A_LAYER or len(shape) == 3:  # scales of a cache's tokens
        is_one = shape[0] == 1 if name in (*PER_SEQUENCE, *CACHES) else None
        shape = (is_one, *shape[1:])
    return tensor.dtype, tensor.device, shape, tensor.stride()


# From as many rows on Hopper's matrix units take V from shared memory, where pairs
# gain nothing.
WGMMA_ROWS = 64


def reads_pairs(query: TensorSpec, value_cache: TensorSpec, odd: bool) -> bool:
    """Whether V, in 8 bits, can be read as pairs of elements; odd: its address is."""
    return (
        value_cache.dtype in (*FP8_DTYPES, torch.int8)
        and not odd
        and query.dtype != torch.float32
        and value_cache.shape[-1] % 2 == 0
        and all(stride % 2 == 0 for stride in value_cache.strides[:-1])
    )


def suits_lean_decode(options: Options, *caches: TensorSpec) -> bool:
    """Whether decode, with V in pairs, can read K so too, and both without masks.

    Fewer keys than threads would share the look-up of pages in a way that costs more.
    """
    plan, shape = options.plan, options.shape
    threads = 32 * plan.decode.num_warps
    is_measured = plan.unpacking == "ptx" and plan.decode.tile >= threads
    is_interpreted = not isinstance(decode_kernel, triton.JITFunction)
    return (
        (is_measured or is_interpreted)
        and plan.kv_format is None
        and not shape.token_scales
        and plan.decode.block_m < WGMMA_ROWS
        and shape.head_padded >= 32
        and all(
            all(stride % 2 == 0 for stride in cache.strides[:-1])
            and max(cache.strides[0], cache.strides[1] * shape.block_size) < 2**31
            for cache in caches
        )
    )


def strides_suit_tma(*specs: TensorSpec) -> bool:
    """Whether TMA, which steps in units of 16 bytes, can read them."""
    return all(
        stride * spec.dtype.itemsize % 16 == 0
        for spec in specs
        for stride in spec.strides[:-1]
    )


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether TMA can read them: it addresses units of 16 bytes."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


class Launches(NamedTuple):
    """How the kernels of one layer shape are launched."""

    decode: Launch
    prefill: Launch
    boxes: Launch | None  # prefill with K and V in boxes, where addresses suit
    # By Hopper's kernels, where addresses suit.
    hopper_decode: HopperLaunch | None
    hopper_prefill: HopperLaunch | None
    combine: Launch | None  # of prefills whose keys are split


# By what `layer_key` says of a call.
LAUNCHES: dict[tuple, Launches] = {}


def prepare(specs: dict[str, TensorSpec], options: Options) -> Launches:
    """Plans the launches for a layer shape."""
    shape, plan = options.shape, options.plan
    scale = options.scale
    if plan.kv_format == "int4":
        scale /= split_norm(shape.head_size)[1]
    score_scale, cap_scale = scale * LOG2_E, 0.0
    if options.softcap:
        score_scale = options.softcap * LOG2_E
        cap_scale = 2 * LOG2_E * scale / options.softcap
    lse = specs.get("output_lse")
    sight = options.sight
    strides = [free_strides(specs[name])[:3] for name in CACHES]
    scale_strides, stride_unit = None, 1
    if shape.token_scales:
        scale_strides = tuple(free_strides(specs[n]) for n in ("k_scale", "v_scale"))
        stride_unit = math.gcd(16, *strides[0], *strides[1])
        strides = [tuple(s // stride_unit for s in three) for three in strides]
    arguments = (
        row_strides(specs["output"]),
        lse.strides[0] if lse else 0,
        row_strides(specs["query"]),
        *strides,
        scale_strides,
        specs["block_table"].strides[0],
        score_scale,
        cap_scale,
        sight.window,
        sight.num_ranges,
    )
    quantized = "output_scale" in specs
    variant = dict(
        GROUP=shape.group,
        HEAD_SIZE=shape.head_size,
        HEAD_PADDED=shape.head_padded,
        BLOCK_SIZE=shape.block_size,
        CAUSAL=options.causal,
        SOFTCAP=options.softcap > 0,
        ALIBI_SQRT=options.alibi_sqrt,
        LIMITED=sight.chunk_lookback >= 0 or not specs.keys().isdisjoint(PER_SEQUENCE),
        FP8=triton_fp8(specs["output"].dtype) if quantized else None,
        FP8_MAX=torch.finfo(specs["output"].dtype).max if quantized else None,
        KV_FORMAT=plan.kv_format,
        WIDENING=plan.unpacking if plan.kv_format or shape.token_scales else None,
        **sight.constants(),
    )
    layout = dict(STRIDE_UNIT=stride_unit, VALUE_OFFSET=options.value_offset)
    pairs = None
    if reads_pairs(specs["query"], specs["value_cache"], options.odd_values):
        pairs = plan.unpacking
    kernel = decode_kernel
    behind_prefills = dependent_options(plan.overlaps)
    special = layout | dict(
        LEAN=pairs is not None
        and suits_lean_decode(options, specs["key_cache"], specs["value_cache"]),
        SAME_STRIDES=strides[0] == strides[1],
        **behind_prefills,
    )
    if plan.segment is not None:
        kernel = segment_decode_kernel
        special = dict(
            SEGMENT=plan.segment,
            SLOTS=options.segment_slots,
            ROWS=plan.segment_rows,
        )
    decode = Launch(
        kernel,
        (options.num_workers,),
        arguments,
        dict(
            NUM_KV_HEADS=shape.num_kv_heads,
            PAIRED_VALUES=pairs if plan.decode.block_m < WGMMA_ROWS else None,
            **special,
            **variant,
            **plan.decode.constants(),
        ),
    )

    def plan_prefill(config: Config) -> Launch:
        return Launch(
            prefill_kernel,
            (1,),  # for each head tile of each tile of rows
            arguments,
            dict(
                PACK=plan.prefill_pack,
                ITEM_TILES=plan.prefill_rows // config.block_m,
                HEAD_TILES=plan.head_tiles,
                LANES=plan.order.lanes,
                TILE_BLOCK=plan.order.tiles(config),
                MASKED_TILE=config.masked_tile or config.tile,
                SYNCED=config.synced,
                SCALE_COLUMNS=config.scale_columns,
                SEGMENT=plan.segment,
                PAIRED_VALUES=pairs if config.block_m < WGMMA_ROWS else None,
                **layout,
                **variant,
                **config.constants(),
            ),
        )

    boxes = None
    if plan.prefill_boxes and strides_suit_tma(
        specs["key_cache"], specs["value_cache"]
    ):
        boxes = plan_prefill(plan.prefill_boxes)
    on_hopper_decode = on_hopper_prefill = None
    if (
        plan.hopper is not None
        and sight.chunk_lookback < 0
        and specs.keys().isdisjoint(PORTABLE[plan.hopper])
        and specs["output"].dtype in hopper_prefill.DTYPES
        and strides_suit_tma(specs["query"], specs["key_cache"], specs["value_cache"])
    ):
        names = ("query", "key_cache", "output", "block_table")
        query, key_cache, output, block_table = (specs[name] for name in names)
        if plan.hopper_decode and options.softcap == 0:
            on_hopper_decode = hopper_decode.plan_launch(
                *(query, key_cache, output, lse, block_table),
                block_m=plan.decode.block_m,
                tile=plan.decode.tile,
                workers=options.num_workers,
                scale=options.scale,
                causal=options.causal,
                sliding_window=sight.sliding_window,
                overlaps=plan.overlaps,
            )
        if lse is None or lse.strides[0] == shape.num_query_heads:
            module = hopper_fp8_prefill if plan.hopper == "fp8" else hopper_prefill
            on_hopper_prefill = module.plan_launch(
                *(query, key_cache, output, block_table),
                HopperOptions(
                    plan.prefill_pack,
                    options.scale,
                    options.causal,
                    sight.sliding_window,
                    options.softcap,
                    plan.split is not None,
                    plan.small,
                ),
            )
    combine = None
    if plan.split is not None:
        combine = Launch(
            combine_kernel,
            (2 * plan.split.num_units,),
            arguments[:2],
            dict(
                PACK=plan.prefill_pack,
                HEAD_TILES=plan.split.head_tiles,
                BLOCK_M=plan.prefill_rows,
                ROWS=COMBINED_ROWS,
                PARTS=COMBINED_ELEMENTS // (COMBINED_ROWS * shape.head_padded),
                num_warps=4,
                **{name: variant[name] for name in COMBINED_CONSTANTS},
                **behind_prefills,
            ),
        )
    prefill = plan_prefill(plan.prefill)
    hopper = (on_hopper_decode, on_hopper_prefill)
    return Launches(decode, prefill, boxes, *hopper, combine)


class HopperAttention:
    """The launch of a Hopper kernel with all tensors given that calls have in common.

    It reads queries and pages through TMA.
    """

    def __init__(
        self,
        hopper: HopperLaunch,
        caches: tuple[torch.Tensor, torch.Tensor],
        *tensors: torch.Tensor | None,
    ) -> None:
        """Binds the launch to the caches, which TMA can read, and its last tensors."""
        launch, self.query_box, page_box, self.queries = hopper
        pages = (hopper_prefill.describe_pages(cache, page_box) for cache in caches)
        self.launch = launch.bind(*tensors, described=Described(*pages))

    def __call__(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        output_lse: torch.Tensor | None,
        varying: tuple[int, ...] = (),
        grid: tuple[int, int] | None = None,
    ) -> bool:
        """Launches, unless TMA cannot read queries at this address: then False."""
        address = query.data_ptr()
        if address % 16:
            return False
        queries = self.queries.get((address, query.numel()))
        if queries is None:
            queries = self.describe_queries(query)
        self.launch(output, output_lse, varying=varying, described=queries, grid=grid)
        return True

    def describe_queries(self, query: torch.Tensor) -> Described:
        """The query's descriptor, kept for other layers and steps.

        It is right for all of this dtype and these strides with as many elements at
        the same address, as it holds nothing else of the tensor.
        """
        if len(self.queries) >= MAX_QUERIES:
            self.queries.clear()
        queries = Described(hopper_prefill.describe_tensor(query, self.query_box))
        self.queries[query.data_ptr(), query.numel()] = queries
        return queries


class PreparedAttention:
    """A checked call of `varlen_attention`, to be repeated with other queries.

    A repetition attends to the same caches with the same options, through the same
    schedule and block table. It is right for every batch that the schedule is updated
    for while `schedule.choice` stays, as long as caches, block table and what the
    options name stay where they are, and queries and outputs keep their dtypes and
    strides. None of that is checked again.
    """

    def __init__(
        self,
        launches: Launches,
        schedule: VarlenSchedule,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_table: torch.Tensor,
        scales: tuple[torch.Tensor | None, ...],
        features: tuple[torch.Tensor | None, ...],
    ) -> None:
        """Binds the launches to what all calls have in common.

        Args:
            launches: of the layer's shape.
            schedule: updated for the first batch.
            key_cache: as for `varlen_attention`.
            value_cache: likewise.
            block_table: likewise.
            scales: those of query, keys and values.
            features: as in FEATURES.

        """
        self.schedule = schedule
        plan, shape = schedule.plan, schedule.shape
        caches, options = (key_cache, value_cache), (*scales, *features)
        decode_work = (
            block_table,
            schedule.workers,
            schedule.sequences,
            *schedule.partials,
            schedule.arrivals,
        )
        self.decode = launches.decode.bind(*caches, *decode_work, *options)
        self.combine = None
        states = schedule.states if plan.split is not None else (None, None, None)
        sinks, *_, output_scale = features
        if launches.combine is not None:
            v_scale = None if shape.token_scales else scales[2]
            work = (schedule.items, schedule.splits, *states)
            self.combine = launches.combine.bind(*work, v_scale, sinks, output_scale)
        self.hopper_decode = self.hopper_prefill = None
        prefill, boxes, config = launches.prefill, Described(None, None), plan.prefill
        aligned = is_aligned(*caches)
        if launches.hopper_decode and aligned:
            self.hopper_decode = HopperAttention(
                launches.hopper_decode, caches, *decode_work, sinks
            )
        if launches.hopper_prefill and aligned:
            self.hopper_prefill = HopperAttention(
                launches.hopper_prefill,
                caches,
                sinks,
                schedule.items,
                block_table,
                *states,
                *(scales if plan.hopper == "fp8" else ()),
            )
        if launches.boxes and plan.prefill_boxes and aligned:
            prefill, config = launches.boxes, plan.prefill_boxes
            box = config.tile, shape.head_padded
            boxes = Described(*(describe_pages(c, *box) for c in caches))
        self.prefill_config = config
        self.item_tiles = plan.prefill_rows // config.block_m
        work = (block_table, schedule.items, *states)
        self.prefill = prefill.bind(*caches, *work, *options, described=boxes)

    def __call__(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        output_lse: torch.Tensor | None = None,
    ) -> None:
        """Attends; arguments as for `varlen_attention`, an output in fp8 as bytes."""
        schedule = self.schedule
        num_items = schedule.num_items
        tensors = (query, output, output_lse)
        is_followed = int(schedule.has_decodes or self.combine is not None)
        if num_items and not (
            self.hopper_prefill
            and self.hopper_prefill(
                *tensors, (num_items, is_followed), schedule.prefill_grid
            )
        ):
            plan, num_tiles = schedule.plan, num_items * self.item_tiles
            tile_blocks = 0
            if schedule.knows_prefills:
                tile_blocks = plan.order.whole_blocks(self.prefill_config, num_tiles)
            self.prefill(
                *(output, output_lse, query),
                varying=(tile_blocks,),
                grid=(num_tiles * plan.head_tiles, 1),
            )
        # Behind prefills, as it may begin before they end: see `overlap`.
        decode_grid = schedule.decode_grid
        if schedule.has_decodes and not (
            self.hopper_decode and self.hopper_decode(*tensors, grid=decode_grid)
        ):
            self.decode(output, output_lse, query, grid=decode_grid)
        if num_items and self.combine is not None:
            self.combine(output, output_lse)


def varlen_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    max_query_len: int,
    scale: float,
    causal: bool | torch.Tensor = True,
    softcap: float = 0.0,
    sliding_window: int | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    output_lse: torch.Tensor | None = None,
    schedule: VarlenSchedule | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    alibi_sqrt: bool = False,
    mm_prefix_range: torch.Tensor | None = None,
    mm_prefix_in_window: bool = False,
    prefix_lens: torch.Tensor | None = None,
    chunk_lookback: int = -1,
    output_scale: torch.Tensor | None = None,
) -> PreparedAttention | None:
    """Attends every sequence's new tokens to all of its keys and values.

    The last query_len of a sequence's seq_len tokens are new; those before are its
    context. The new tokens' keys and values are in the cache already. What lies past
    a sequence's end, in unused slots and in unused entries of the block table, may
    hold anything.

    Args:
        query: [num_tokens, num_query_heads, head_size] float16, bfloat16 or float32, or
            float8_e4m3fn over a cache of the same; rows past query_start_loc[-1] are
            padding.
        key_cache: [num_blocks, block_size, num_kv_heads, head_size] of query's dtype
            or float8, int8, or for int4 uint8 [..., head_size / 2] as `kv_format`
            says; any strides but 1 in the last dimension.
        value_cache: as key_cache, with strides of its own.
        output: [num_tokens, num_query_heads, head_size] of query's dtype, for a query
            in float8 of float16, bfloat16 or float32; written in place, rows of no
            sequence stay as they are.
        query_start_loc: [num_seqs + 1] int32, first row of each sequence in query.
        seq_lens: [num_seqs] int32, context and new tokens.
        block_table: [num_seqs, max_blocks] int32, the pages of each sequence.
        max_query_len: no sequence has more new tokens than this; decides which
            kernels are launched.
        scale: factor of the logits before the softmax, positive.
        causal: a token sees the keys up to its own; False: all seq_len keys. Or a
            flag for each sequence, [num_seqs] bool or int32.
        softcap: logits become softcap * tanh(logits / softcap), 1e-3 to 1e4; 0: they
            stay.
        sliding_window: a token sees only this many keys, its own included; if not
            causal, keys less than this far away on both sides. None: all.
        q_scale: [1] float32, what the query was divided by.
        k_scale: [1] float32, what the cached keys were divided by, or with e4m3, and
            always with integers, [num_blocks, block_size, num_kv_heads] float32, any
            strides: what each token's key was divided by, positive.
        v_scale: the same of the cached values.
        output_lse: [num_tokens, num_query_heads] float32, receives the natural
            logarithm of each row's softmax denominator, the sink included; -inf where
            that is 0.
        schedule: work lists, already updated for this batch; None: made here, at the
            cost of allocations and a launch.
        sinks: [num_query_heads] float, for each head the logit of one key more, which
            every query sees and whose value is 0. Where results over shares of the
            keys are merged by their LSE, only one of the shares may have it.
        alibi_slopes: [num_query_heads] float32; logits get, after a softcap, slope *
            (key position - query position) more.
        alibi_sqrt: what they get is -slope * sqrt(query position - key position), and
            nothing for keys behind the query.
        mm_prefix_range: [num_seqs, num_ranges, 2] int32, first and last position of
            ranges; a token within one sees all of it as well. Unused are those whose
            first position is not before the last.
        mm_prefix_in_window: of its range a token does not see what lies before its
            window.
        prefix_lens: [num_seqs] int32; tokens see so many keys from the beginning,
            besides those in the window. Only with a window, and causal. The keys and
            values between are not seen, but are read: they must be finite.
        chunk_lookback: 0 or more: the window is not that of each token; the sequence
            is cut into chunks of sliding_window // (chunk_lookback + 1) keys, and a
            token sees its own and so many before. Only if causal. -1: no chunks.
        output_scale: [1] float32; output is float8 and gets the result divided by this,
            limited to the format's finite numbers.

    Returns:
        What attends again, without checks, where only query and output are others; None
        for an empty batch without a schedule, and with an int4 cache.

    Raises:
        ValueError: naming the argument that is not supported.

    """
    flags = causal if isinstance(causal, torch.Tensor) else None
    if flags is not None and flags.dtype == torch.bool:
        flags = flags.view(torch.uint8)
    all_causal = causal if flags is None else False
    features = (sinks, alibi_slopes, flags, mm_prefix_range, prefix_lens, output_scale)
    tensors = dict(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=output,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=block_table,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        output_lse=output_lse,
    )
    has_features = not (
        sinks is alibi_slopes is flags is mm_prefix_range is prefix_lens is None
        and output_scale is None
    )
    if has_features:
        tensors.update(zip(FEATURES, features))
    check_tensors(tensors)
    num_ranges = None if mm_prefix_range is None else count_ranges(mm_prefix_range)
    sight = make_sight(
        sliding_window,
        chunk_lookback,
        num_ranges,
        mm_prefix_in_window,
        prefix_lens is not None,
    )
    has_slopes = alibi_slopes is not None
    if schedule is None:
        check_options(
            scale, softcap, all_causal, sight, max_query_len, alibi_sqrt, has_slopes
        )
        check_arguments(tensors)
        num_seqs, num_tokens = seq_lens.shape[0], query.shape[0]
        if num_seqs == 0 or num_tokens == 0:
            return None
        schedule = VarlenSchedule(
            max_num_seqs=num_seqs,
            max_num_tokens=num_tokens,
            **shape_of(query, key_cache, k_scale)._asdict(),
            device=query.device,
            sliding_window=sliding_window,
            chunk_lookback=chunk_lookback,
        )
        schedule.update(
            query_start_loc,
            seq_lens,
            max_query_len=max_query_len,
            num_tokens=num_tokens,
            mm_prefix_range=mm_prefix_range,
            mm_prefix_in_window=mm_prefix_in_window,
            prefix_lens=prefix_lens,
        )
    check_batch(tensors, max_query_len, sight, schedule)
    shape, plan = schedule.shape, schedule.plan
    value_offset = None
    if shape.token_scales:
        value_offset = offset_in_page(key_cache, value_cache)
    options = Options(
        scale,
        all_causal,
        softcap,
        sight,
        alibi_sqrt,
        (key_cache.data_ptr() | value_cache.data_ptr()) % 2 == 1,
        value_offset,
        shape,
        plan,
        schedule.num_workers,
        schedule.segment_slots,
    )
    key = (options, *itertools.starmap(layer_key, tensors.items()))
    try:
        launches = LAUNCHES.get(key)
    except TypeError:  # an option that has no hash is none, see `check_options`
        launches = None
    if launches is None:
        check_options(
            scale, softcap, all_causal, sight, max_query_len, alibi_sqrt, has_slopes
        )
        specs = check_arguments(tensors)
        check_schedule(specs, shape)
        if plan.kv_format == "int4":
            check_fours(specs, value_cache.data_ptr())
            specs = rotated_specs(specs)
        launches = LAUNCHES[key] = prepare(specs, options)
    output_dtype = output.dtype
    if output_scale is not None:
        output = storage_view(output)
    attended, is_int4 = output, plan.kv_format == "int4"
    if is_int4:
        rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        divisor = split_norm(shape.head_size)[0]
        rotate(rotated, query, query_start_loc, shape.head_padded, divisor=divisor)
        if output_scale is not None:
            attended = torch.empty_like(rotated)
            features = (*features[:-1], None)
        query = rotated
    elif plan.kv_format in BYTES:
        key_cache = key_cache.view(torch.uint8)
        value_cache = value_cache.view(torch.uint8)
    prepared = PreparedAttention(
        launches,
        schedule,
        key_cache,
        value_cache,
        block_table,
        (q_scale, k_scale, v_scale),
        features,
    )
    prepared(query, attended, output_lse)
    if is_int4:
        rotate(
            output,
            attended,
            query_start_loc,
            shape.head_padded,
            divisor=float(block_size(shape.head_size)),
            inverse=True,
            scale=output_scale,
            fp8=output_dtype if output_scale is not None else None,
        )
        return None  # it would be without the rotations
    return prepared
