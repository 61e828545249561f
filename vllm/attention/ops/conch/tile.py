# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the prefill and the decode kernel share: query rows and the loop over keys.

A *row* is one (query token, query head) pair.  PACK query heads that share a KV head
are packed into one tile, token by token, so that row r of a sequence is token
r // PACK and head r % PACK of them: a key is loaded once for all, whatever the ratio
of heads.

    |--------------- seq_len ---------------|
    |---- context ----|----- query_len -----|
                       token t sits at position context + t
"""

from vllm.triton_utils import tl, triton

from .fp8 import divide_to_fp8
from .kv_format import (
    halve_query,
    load_token_scales,
    scaled_softmax_step,
    take_zeros,
    unpack_bytes,
    unpack_nibbles,
    unpack_quads,
    widen,
)
from .limits import is_in_limits
from .softmax import (
    LN_2,
    add_sink,
    log_sum_exp,
    normalize,
    softcap,
    softmax_step,
    softmax_step_in_order,
)

# Of two pairs of fp8, bytes 0 to 3, those at even places as two fp16, and the others.
UNPACK_E4M3: tl.constexpr = tl.constexpr("""{
    .reg .b32 sorted;
    .reg .b16 even, odd;
    prmt.b32 sorted, $2, 0, 0x3120;
    mov.b32 {even, odd}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, even;
    cvt.rn.f16x2.e4m3x2 $1, odd;
}""")
# e5m2 is the upper byte of an fp16.
UNPACK_E5M2: tl.constexpr = tl.constexpr("""
    prmt.b32 $0, $2, 0, 0x2404;
    prmt.b32 $1, $2, 0, 0x3414;
""")


@triton.jit
def query_rows(m_block, query_len, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Token, packed head and validity, each [BLOCK_M], of a tile of rows."""
    row = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    return row // PACK, row % PACK, row < query_len * PACK


@triton.jit
def row_offsets(query_start, token, head, strides, dims):
    """[BLOCK_M, D] int64 offsets of query or output rows; strides: (token, head)."""
    token = (query_start + token).to(tl.int64)
    return (token * strides[0] + head * strides[1])[:, None] + dims[None, :]


@triton.jit
def query_for_fp8(query, BY_ROW: tl.constexpr):
    """The query in fp16, divided by a power of two, and that power.

    An fp8 key becomes fp16 in one instruction but bf16 in several slow ones. Divided
    by the power of two below its largest magnitude, any query fits fp16 and loses
    nothing that counts beside its largest element. BY_ROW: the powers are [M, 1], one
    for each row.
    """
    largest = tl.max(tl.abs(query.to(tl.float32)), 1, keep_dims=BY_ROW)
    if not BY_ROW:
        largest = tl.max(largest, 0)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(
        tl.float32, bitcast=True
    )
    power = tl.where((power > 0.0) & (power < float("inf")), power, 1.0)
    return (query.to(tl.float32) / power).to(tl.float16), power


@triton.jit
def load_query(
    query_ptr, offsets, mask, scales, KV_DTYPE: tl.constexpr, SOFTCAP: tl.constexpr,
    FIXED_ORDER: tl.constexpr = False,
):  # fmt: skip
    """Query rows, 0 where masked, in the dtype of the products, and their scales."""
    query = tl.load(query_ptr + offsets, mask=mask, other=0.0)
    if query.dtype.is_fp8():
        query = query.to(tl.float16)  # exact
    elif query.dtype != KV_DTYPE and query.dtype == tl.bfloat16:
        query, power = query_for_fp8(query, FIXED_ORDER)
        scales = fold(scales, power, SOFTCAP)
    return query, scales


@triton.jit
def fold(scales, factor, SOFTCAP: tl.constexpr):
    """Takes a factor of the raw scores into (softmax scale, softcap's inner scale)."""
    if SOFTCAP:
        folded = (scales[0], scales[1] * factor)
    else:
        folded = (scales[0] * factor, scales[1])
    return folded


@triton.jit
def load_scales(
    q_scale_ptr, k_scale_ptr, v_scale_ptr, scale_strides, scales, SOFTCAP: tl.constexpr
):
    """The scales with q_scale and the cache's k_scale in them, and its v_scale.

    Scales per token and head, those that have strides, are left for `attend_tiles`.
    """
    v_scale = 1.0
    if q_scale_ptr is not None:
        scales = fold(scales, tl.load(q_scale_ptr), SOFTCAP)
    if k_scale_ptr is not None and scale_strides is None:
        scales = fold(scales, tl.load(k_scale_ptr), SOFTCAP)
    if v_scale_ptr is not None and scale_strides is None:
        v_scale = tl.load(v_scale_ptr)
    return scales, v_scale


@triton.jit
def scales_of_head(k_scale_ptr, v_scale_ptr, scale_strides, kv_head):
    """One head's scales per token of K and of V, for `load_token_scales`."""
    key_strides, value_strides = scale_strides
    kv_head = kv_head.to(tl.int64)
    return (
        (k_scale_ptr + kv_head * key_strides[2], key_strides),
        (v_scale_ptr + kv_head * value_strides[2], value_strides),
    )


@triton.jit
def load_slopes(slopes_ptr, head, row_valid):
    """[M] ALiBi slopes of the rows in log2 units."""
    return tl.load(slopes_ptr + head, mask=row_valid, other=0.0) / LN_2


@triton.jit
def alibi(slopes, keys, position, SQRT: tl.constexpr):
    """[M, TILE] bias of the logits, falling with the distance to the key."""
    distance = (keys[None, :] - position[:, None]).to(tl.float32)
    if SQRT:
        distance = -tl.sqrt(tl.maximum(-distance, 0.0))
    return slopes[:, None] * distance


@triton.jit
def load_tile(
    ptrs, keys_valid, dims_valid, MASK_KEYS: tl.constexpr, MASK_DIMS: tl.constexpr
):
    """Loads a tile of K or V; what is masked reads as 0 whatever memory holds."""
    if MASK_KEYS and MASK_DIMS:
        return tl.load(ptrs, mask=keys_valid & dims_valid, other=0.0)
    elif MASK_KEYS:
        return tl.load(ptrs, mask=keys_valid, other=0.0)
    elif MASK_DIMS:
        return tl.load(ptrs, mask=dims_valid, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def page_and_slot(
    block_row, start, keys_range, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):
    """Where the keys of a tile lie: page number (int64) and slot in the page.

    Entries of the block table for pages outside keys_range are not read. Where a tile
    is whole pages, indices are clamped rather than masked: a masked look-up would go
    through shared memory.
    """
    lane = tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:  # the tile is part of one page
        page = tl.load(block_row + start // BLOCK_SIZE).to(tl.int64)
        slot = start % BLOCK_SIZE + lane
    elif TILE % BLOCK_SIZE == 0:  # the tile is some whole pages
        first = keys_range[0] // BLOCK_SIZE
        last = tl.maximum((keys_range[1] - 1) // BLOCK_SIZE, first)
        page = tl.zeros([TILE], tl.int64)
        for i in tl.static_range(TILE // BLOCK_SIZE):
            entry = tl.minimum(tl.maximum(start // BLOCK_SIZE + i, first), last)
            number = tl.load(block_row + entry).to(tl.int64)
            page = tl.where(lane // BLOCK_SIZE == i, number, page)
        slot = lane % BLOCK_SIZE
    else:  # pages begin anywhere in the tile
        keys = start + lane
        needed = (keys >= keys_range[0]) & (keys < keys_range[1])
        entries = block_row + keys // BLOCK_SIZE
        page = tl.load(entries, mask=needed, other=0).to(tl.int64)
        slot = keys % BLOCK_SIZE
    return page, slot.to(tl.int64)


@triton.jit
def clamped_page_and_slot(
    block_row, start, keys_range, WINDOWED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `page_and_slot`, but keys outside keys_range lie where the nearest in it does.

    So a tile can be read without masks: a key that has no slot has another's numbers.
    """
    keys = tl.minimum(start + tl.arange(0, TILE), keys_range[1] - 1)
    if WINDOWED:
        keys = tl.maximum(keys, keys_range[0])
    keys = keys.to(tl.uint32)  # division and widening of such take one instruction
    page = tl.load(block_row + keys // BLOCK_SIZE).to(tl.uint32)
    return page.to(tl.int64), (keys % BLOCK_SIZE).to(tl.int32)


@triton.jit
def page_numbers(block_row, tile, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The pages of a tile, all of whose keys exist, one scalar each; 0 from end on.

    Scalars can be carried from turn to turn at little cost, so that a turn's loads of K
    and V need not wait for the block table.
    """
    entry = block_row + tile * TILE // BLOCK_SIZE
    exists = tile < end
    numbers: tl.tuple = (tl.load(entry, mask=exists, other=0),)
    for i in tl.static_range(1, TILE // BLOCK_SIZE):
        numbers = numbers + (tl.load(entry + i, mask=exists, other=0),)
    return numbers


@triton.jit
def slots_of_pages(numbers, start, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """As `page_and_slot`, of a tile on the pages of these numbers."""
    lane = tl.arange(0, TILE)
    if BLOCK_SIZE >= TILE:
        page = numbers[0]
        slot = start % BLOCK_SIZE + lane
    else:
        page = tl.zeros([TILE], tl.int32)
        for i in tl.static_range(TILE // BLOCK_SIZE):
            page = tl.where(lane // BLOCK_SIZE == i, numbers[i], page)
        slot = lane % BLOCK_SIZE
    return page.to(tl.int64), slot.to(tl.int64)


@triton.jit
def load_box(
    descriptor, kv_head, number, slot, TILE: tl.constexpr, HEAD_PADDED: tl.constexpr
):
    """[TILE, D] of K or V from one page; what lies behind HEAD_SIZE reads as 0."""
    box = descriptor.load([number, kv_head, slot, 0])
    return tl.reshape(box, [TILE, HEAD_PADDED])


@triton.jit
def weigh_tile(
    start,  # first key of the tile
    row_max,  # [M]
    row_sum,
    query,  # [M, D]
    key,  # [D, TILE]
    position,  # [M] position of each row's token in its sequence
    keys_range,  # (first, end): keys outside are neither read nor weighed
    scales,  # (softmax scale in log2 units, softcap's inner scale)
    sight,  # (window: keys that a query sees, itself included; slopes [M] or None;
    # the rows' limits, which replace causality and window, or None)
    # (scales of K, of V, zero points of an int4 K), [TILE] each, or None: one for all;
    # of int4 query and key are halves, see `weigh_halves`
    token_scales,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI_SQRT: tl.constexpr,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    WIDENING: tl.constexpr,
    FIXED_ORDER: tl.constexpr,
    LEAN: tl.constexpr = False,  # query and key are pairs, see `attend_tiles`
):
    """Weights [M, TILE] of a tile of keys, and the new softmax state.

    With scales per token the weights are multiplied by those of V.
    """
    keys = start + tl.arange(0, TILE)
    valid = (keys >= keys_range[0]) & (keys < keys_range[1])
    # scores: [M, TILE]
    if KV_FORMAT == "int4":
        scores = weigh_halves(query, key, token_scales[2], PRECISION)
    elif LEAN:
        scores = tl.dot(query[0], key[0])
        scores = tl.dot(query[1], key[1], scores)
    else:
        scores = tl.dot(query, key.to(query.dtype), input_precision=PRECISION)
    if token_scales is not None:
        scores = scores * token_scales[0][None, :]
    if SOFTCAP:
        scores = softcap(scores, scales[1])
    window, slopes, limits = sight
    scale = scales[0]
    if slopes is not None:
        scores = scores * scale + alibi(slopes, keys, position, ALIBI_SQRT)
        scale = 1.0
    if MASKED and LEAN and CAUSAL and limits is None:
        # No row sees further than its sequence's last key, so one comparison will do.
        lane = tl.arange(0, TILE)[None, :]
        visible = lane <= (position - start)[:, None]
        if WINDOWED:
            visible = visible & (lane > (position - window - start)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    elif MASKED:
        visible = valid[None, :]
        if limits is not None:
            visible = visible & is_in_limits(keys, limits)
        elif CAUSAL:
            visible = visible & (keys[None, :] <= position[:, None])
        if WINDOWED and limits is None:
            visible = visible & (keys[None, :] > position[:, None] - window)
            if not CAUSAL:
                visible = visible & (keys[None, :] < position[:, None] + window)
        scores = tl.where(visible, scores, float("-inf"))
    if FIXED_ORDER:
        tl.static_assert(token_scales is None)
        step = softmax_step_in_order(scores, scale, row_max, row_sum)
    elif token_scales is None:
        step = softmax_step(scores, scale, row_max, row_sum, MASKED)
    else:
        step = scaled_softmax_step(
            scores, scale, token_scales[1], row_max, row_sum, WIDENING
        )
    return step


@triton.jit
def weigh_halves(query, key, zeros, PRECISION: tl.constexpr):
    """Scores [M, TILE] of keys that are zeros [TILE] too large.

    Args:
        query: even and odd elements [M, D / 2] of the rows, and their sums [M].
        key: even and odd elements [D / 2, TILE].
        zeros: [TILE].
        PRECISION: of products of fp32.

    """
    scores = tl.dot(query[0], key[0], input_precision=PRECISION)
    scores = tl.dot(query[1], key[1], scores, input_precision=PRECISION)
    return scores - query[2][:, None] * zeros[None, :]


@triton.jit
def unpack_pairs(pairs, FP8: tl.constexpr, DTYPE: tl.constexpr, HOW: tl.constexpr):
    """The even and the odd elements of fp8 pairs that were loaded as int16.

    HOW is "triton", or "ptx" for NVIDIA GPUs and fp16, with the same result.
    """
    if HOW == "triton":
        even = (pairs & 0xFF).to(tl.int8).to(FP8, bitcast=True).to(DTYPE)
        odd = (pairs >> 8).to(tl.int8).to(FP8, bitcast=True).to(DTYPE)
    else:
        tl.static_assert(DTYPE.is_fp16())
        tl.static_assert(FP8.is_fp8e5() or FP8.is_fp8e4nv())
        even, odd = tl.inline_asm_elementwise(
            UNPACK_E5M2 if FP8.is_fp8e5() else UNPACK_E4M3,
            constraints="=r,=r,r",
            args=[pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@triton.jit
def split_query(query):
    """The even and the odd elements of query rows, [M, D / 2] each.

    By sums: behind tl.split Triton would still see a query in fp8, and choose for it an
    order of registers that takes moves before every product.
    """
    M: tl.constexpr = query.shape[0]
    D: tl.constexpr = query.shape[1]
    pairs = tl.reshape(query, [M, D // 2, 2])
    is_odd = (tl.arange(0, 2) == 1)[None, None, :]
    even = tl.sum(tl.where(is_odd, 0.0, pairs), 2).to(query.dtype)
    return even, tl.sum(tl.where(is_odd, pairs, 0.0), 2).to(query.dtype)


@triton.jit
def attend_tiles(
    state,  # acc [M, D], row_max [M], row_sum [M]; see PAIRED_VALUES
    query,
    position,
    key_ptr,
    value_ptr,
    key_strides,
    value_strides,
    block_row,  # this sequence's row of the block table
    tiles,  # (first, end): tiles of TILE keys to visit
    keys_range,
    scales,
    sight,
    boxes,  # (descriptor of K, of V, KV head) for tiles within a page; None: pointers
    token_scales,  # those of K and of V, see `load_token_scales`; None: one for all
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI_SQRT: tl.constexpr,
    MASKED: tl.constexpr,  # False: every row sees every key of these tiles
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    PAIRED_VALUES: tl.constexpr,
    KV_FORMAT: tl.constexpr,  # see the module of this name, as for how to widen it
    WIDENING: tl.constexpr,
    FIXED_ORDER: tl.constexpr = False,  # see `segments`
    LEAN: tl.constexpr = False,
    SAME_STRIDES: tl.constexpr = False,  # of LEAN: value_strides are key_strides
    SYNCED: tl.constexpr = False,  # see `plan.Config.synced`
    SCALE_COLUMNS: tl.constexpr = 0,  # see `plan.Config.scale_columns`
):
    """Attends a tile of query rows to consecutive tiles of keys; see `weigh_tile`.

    PAIRED_VALUES, for fp8: matrix units want keys side by side, which shared memory
    can turn around for elements of 16 bits only. V is read in pairs of elements, and
    acc is a pair of [M, D / 2], of the even and of the odd elements. The value, if not
    None, says how `unpack_pairs` takes them apart.

    int4 is read in fours of elements, and acc is four of [M, D / 4].

    LEAN, for fp8 in pairs, which the number of instructions bounds, not memory: K is
    read in pairs too, tiles are read without masks, and sums of weights stay apart in
    [M, TILE / 4] until the end. A turn takes 643 instructions on sm_90 (e4m3, 128 keys,
    4 warps), without LEAN 930. K and V have even strides below 2**31.
    """
    acc, row_max, row_sum = state
    if LEAN:
        row_sum = tl.zeros([query.shape[0], TILE // 4], tl.float32)
        # An empty sequence has no key in whose place others could be read.
        tiles = (tiles[0], tl.where(keys_range[1] > 0, tiles[1], tiles[0]))
        position = tl.minimum(position, keys_range[1] - 1)  # of rows that do not exist
        if SAME_STRIDES:
            value_strides = key_strides
    MASK_KEYS: tl.constexpr = MASKED and not LEAN
    MASK_DIMS: tl.constexpr = HEAD_SIZE != HEAD_PADDED
    AHEAD: tl.constexpr = not MASKED and (
        BLOCK_SIZE % TILE == 0 or TILE % BLOCK_SIZE == 0
    )
    dims = tl.arange(0, HEAD_PADDED)
    # Bytes of a row of K, as loaded and without padding
    KEY_WIDTH: tl.constexpr = HEAD_SIZE // 2 if KV_FORMAT == "int4" else HEAD_SIZE
    if KV_FORMAT == "int4":
        query_halves = halve_query(query)
        dims = tl.arange(0, HEAD_PADDED // 2)
        quad_dims = tl.arange(0, HEAD_PADDED // 4)
        quad_ptr = value_ptr.to(tl.pointer_type(tl.int16))
    if PAIRED_VALUES is not None:
        even, odd = acc
        pair_dims = tl.arange(0, HEAD_PADDED // 2)
        pair_ptr = value_ptr.to(tl.pointer_type(tl.int16))
    if LEAN:
        # As unsigned numbers: a product of 64 bits is one instruction.
        key_strides = (
            (key_strides[0] // 2).to(tl.uint32).to(tl.int64),
            key_strides[1] // 2,
        )
        value_strides = (
            (value_strides[0] // 2).to(tl.uint32).to(tl.int64),
            value_strides[1] // 2,
        )
        key_pair_ptr = key_ptr.to(tl.pointer_type(tl.int16))
        query_pair = split_query(query)
    if boxes is not None:
        key_box, value_box, kv_head = boxes
    if SYNCED:
        # Else Triton has a barrier in the loop for the query that was stored before it,
        # between the stores of a converted operand and the fence behind them.
        tl.debug_barrier()
    if AHEAD:
        coming = page_numbers(block_row, tiles[0], tiles[1], BLOCK_SIZE, TILE)
    for tile in tl.range(tiles[0], tiles[1]):
        start = tile * TILE
        if AHEAD:
            numbers = coming
            page, slot = slots_of_pages(numbers, start, BLOCK_SIZE, TILE)
        elif LEAN:
            page, slot = clamped_page_and_slot(
                block_row, start, keys_range, WINDOWED, BLOCK_SIZE, TILE
            )
        else:
            page, slot = page_and_slot(block_row, start, keys_range, BLOCK_SIZE, TILE)
        keys = start + tl.arange(0, TILE)
        valid = (keys >= keys_range[0]) & (keys < keys_range[1])
        # K: [D, TILE]
        if LEAN:
            offsets = page * key_strides[0] + slot * key_strides[1]
            key = load_tile(
                key_pair_ptr + offsets[None, :] + pair_dims[:, None],
                valid[None, :],
                (pair_dims < HEAD_SIZE // 2)[:, None],
                False,
                MASK_DIMS,
            )
        elif boxes is None:
            offsets = page * key_strides[0] + slot * key_strides[1]
            key = load_tile(
                key_ptr + offsets[None, :] + dims[:, None],
                valid[None, :],
                (dims < KEY_WIDTH)[:, None],
                MASK_KEYS,
                MASK_DIMS,
            )
        else:
            key = load_box(
                key_box, kv_head, numbers[0], start % BLOCK_SIZE, TILE, HEAD_PADDED
            ).T
        if token_scales is None:
            tile_scales: tl.constexpr = None
        else:
            key_scales, value_scales = load_token_scales(
                token_scales, page, slot, valid, MASK_KEYS, SCALE_COLUMNS
            )
            if KV_FORMAT == "int4":
                key_scales, key_zeros = take_zeros(key_scales)
                value_scales, value_zeros = take_zeros(value_scales)
                tile_scales = (key_scales, value_scales, key_zeros)
            else:
                tile_scales = (key_scales, value_scales)
        if KV_FORMAT == "int4":
            weights, decay, row_max, row_sum = weigh_tile(
                start, row_max, row_sum, query_halves,
                unpack_nibbles(key, query.dtype, WIDENING),
                position, keys_range, scales, sight, tile_scales,
                CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, MASKED, TILE, PRECISION,
                KV_FORMAT, WIDENING, FIXED_ORDER, LEAN,
            )  # fmt: skip
        elif LEAN:
            key_pair = unpack_pairs(
                key, value_ptr.dtype.element_ty, query.dtype, PAIRED_VALUES
            )
            weights, decay, row_max, row_sum = weigh_tile(
                start, row_max, row_sum, query_pair, key_pair,
                position, keys_range, scales, sight, tile_scales,
                CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, MASKED, TILE, PRECISION,
                KV_FORMAT, WIDENING, FIXED_ORDER, LEAN,
            )  # fmt: skip
        else:
            if KV_FORMAT is not None:
                key = widen(key, KV_FORMAT, query.dtype, WIDENING)
            weights, decay, row_max, row_sum = weigh_tile(
                start, row_max, row_sum, query, key,
                position, keys_range, scales, sight, tile_scales,
                CAUSAL, WINDOWED, SOFTCAP, ALIBI_SQRT, MASKED, TILE, PRECISION,
                KV_FORMAT, WIDENING, FIXED_ORDER, LEAN,
            )  # fmt: skip
        weights = weights.to(query.dtype)
        # V: [TILE, D], or [TILE, D / 2] pairs
        offsets = (page * value_strides[0] + slot * value_strides[1])[:, None]
        if KV_FORMAT == "int4":
            quads = load_tile(
                quad_ptr + offsets // 2 + quad_dims[None, :],
                valid[:, None],
                (quad_dims < HEAD_SIZE // 4)[None, :],
                MASK_KEYS,
                MASK_DIMS,
            )
            acc = attend_quads(
                weights, unpack_quads(quads, query.dtype, WIDENING), value_zeros,
                acc, decay, PRECISION,
            )  # fmt: skip
        elif PAIRED_VALUES is not None:
            pairs = load_tile(
                pair_ptr + (offsets if LEAN else offsets // 2) + pair_dims[None, :],
                valid[:, None],
                (pair_dims < HEAD_SIZE // 2)[None, :],
                MASK_KEYS,
                MASK_DIMS,
            )
            if KV_FORMAT is None:
                value, value_odd = unpack_pairs(
                    pairs, value_ptr.dtype.element_ty, query.dtype, PAIRED_VALUES
                )
            else:
                value, value_odd = unpack_bytes(
                    pairs, KV_FORMAT, query.dtype, PAIRED_VALUES
                )
            even = tl.dot(weights, value, even * decay[:, None])
            odd = tl.dot(weights, value_odd, odd * decay[:, None])
        else:
            if boxes is None:
                value = load_tile(
                    value_ptr + offsets + dims[None, :],
                    valid[:, None],
                    (dims < HEAD_SIZE)[None, :],
                    MASK_KEYS,
                    MASK_DIMS,
                )
                value = widen(value, KV_FORMAT, query.dtype, WIDENING)
            else:
                value = load_box(
                    value_box, kv_head, numbers[0], start % BLOCK_SIZE,
                    TILE, HEAD_PADDED,
                )  # fmt: skip
            acc = tl.dot(
                weights, value, acc * decay[:, None], input_precision=PRECISION
            )
        if AHEAD:
            coming = page_numbers(block_row, tile + 1, tiles[1], BLOCK_SIZE, TILE)
    if PAIRED_VALUES is not None:
        acc = (even, odd)
    if LEAN:
        row_sum = tl.sum(row_sum, 1)
    return acc, row_max, row_sum


@triton.jit
def attend_quads(weights, values, zeros, acc, decay, PRECISION: tl.constexpr):
    """The accumulator after one tile of an int4 V that is zeros [TILE] too large.

    Args:
        weights: [M, TILE], rounded as the products take them.
        values: four of [TILE, D / 4], the elements at places 0, 1, 2 and 3 of four.
        zeros: [TILE].
        acc: four of [M, D / 4].
        decay: [M] factor of acc.
        PRECISION: of products of fp32.

    """
    excess = tl.sum(weights.to(tl.float32) * zeros[None, :], 1)[:, None]
    decay = decay[:, None]
    return (
        tl.dot(weights, values[0], acc[0] * decay - excess, input_precision=PRECISION),
        tl.dot(weights, values[1], acc[1] * decay - excess, input_precision=PRECISION),
        tl.dot(weights, values[2], acc[2] * decay - excess, input_precision=PRECISION),
        tl.dot(weights, values[3], acc[3] * decay - excess, input_precision=PRECISION),
    )


@triton.jit
def start_state(
    BLOCK_M: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAIRED_VALUES: tl.constexpr,
    KV_FORMAT: tl.constexpr,
):
    """What `attend_tiles` starts from."""
    if KV_FORMAT == "int4":
        quarter = tl.zeros([BLOCK_M, HEAD_PADDED // 4], tl.float32)
        acc: tl.tuple = (quarter, quarter, quarter, quarter)
    elif PAIRED_VALUES is not None:
        half = tl.zeros([BLOCK_M, HEAD_PADDED // 2], tl.float32)
        acc = (half, half)
    else:
        acc = tl.zeros([BLOCK_M, HEAD_PADDED], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return acc, row_max, tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def whole(
    acc,
    BLOCK_M: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAIRED_VALUES: tl.constexpr,
    KV_FORMAT: tl.constexpr,
):
    """[M, D] accumulator of the state of `attend_tiles`."""
    if KV_FORMAT == "int4":
        fours = tl.join(tl.join(acc[0], acc[2]), tl.join(acc[1], acc[3]))
        joined = tl.reshape(fours, [BLOCK_M, HEAD_PADDED])
    elif PAIRED_VALUES is not None:
        joined = tl.reshape(tl.join(acc[0], acc[1]), [BLOCK_M, HEAD_PADDED])
    else:
        joined = acc
    return joined


@triton.jit
def write_rows(
    # (output, lse or None, output strides, lse stride, sinks or None, scale or None)
    target,
    acc, row_max, row_sum, v_scale,  # [M, D], [M], [M]
    query_start, token, head, row_valid,  # [M] each but query_start
    HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr,
    FP8: tl.constexpr, FP8_MAX: tl.constexpr,
):  # fmt: skip
    """Normalises a tile of rows and writes it, in FP8 divided by the scale.

    A row is written once, however its keys were split: its sink is counted here.
    """
    output_ptr, lse_ptr, output_strides, lse_stride, sinks_ptr, scale_ptr = target
    dims = tl.arange(0, HEAD_PADDED)
    mask = row_valid[:, None] & (dims < HEAD_SIZE)[None, :]
    offsets = row_offsets(query_start, token, head, output_strides, dims)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=row_valid, other=0.0).to(tl.float32)
        acc, row_max, row_sum = add_sink(acc, row_max, row_sum, sink / LN_2)
    STORED: tl.constexpr = output_ptr.dtype.element_ty
    out = normalize(acc, row_sum, v_scale)
    if FP8 is not None:
        out = divide_to_fp8(out, tl.load(scale_ptr), FP8, FP8_MAX, STORED)
    tl.store(output_ptr + offsets, out.to(STORED), mask=mask)
    if lse_ptr is not None:
        lse_row = (query_start + token).to(tl.int64) * lse_stride + head
        tl.store(lse_ptr + lse_row, log_sum_exp(row_max, row_sum), mask=row_valid)
