# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Gluon kernel of `hopper_prefill`: one producer warp, one to three consumer
warpgroups, persistent over a work list. With heads above 256 two warpgroups are one
consumer, which keeps half of the columns in each.

Every consumer owns 64 rows of a query tile and keeps their scores, probabilities
and output in registers. Its loop over key tiles, last tile first, is pipelined by
one: Q.K of a tile is issued together with P.V of the tile before it, and the softmax
of the new scores runs while the tensor cores still work on P.V, its own or that of
another consumer. With heads of 64, whose tiles keep the exponential unit as busy as the
tensor cores, two consumers take exponentials in turns; with larger ones that is slower.
The producer follows the block table and feeds K and V through two rings of shared
memory with TMA, already for the next item while this one is being finished.

The schedule (asynchronous pairs of products, setmaxnreg) is that of
FlashAttention-3, https://arxiv.org/abs/2407.08608; the code is not.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_tiles import (
    CONSUMER_ROWS,
    MASK_LOWER,
    MASK_UPPER,
    PANEL,
    Batch,
    Config,
    begin_next_launch,
    fence_async_shared,
    first_seen_page,
    is_split,
    load_item,
    make_rings,
    mbarrier,
    ring_phase,
    ring_slot,
    state_rows,
    tile_range,
    tma,
    unmasked_range,
    visible_keys,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
NO_PAGE = gl.constexpr(2**30)  # more than any cache has


@gluon.jit
def query_slot(cfg, CONSUMER: gl.constexpr, turn):
    """Which query tile of the ring holds a consumer's rows of the program's item
    number `turn`."""
    if cfg.Q_STAGES == 1:
        return CONSUMER
    else:
        return turn % cfg.Q_STAGES * cfg.CONSUMERS + CONSUMER


# --------------------------------------------------------------- producer


@gluon.jit
def load_page_ids(cfg, pages, first_page, last_page, first_key):
    """Page of every box of a tile. Past the sequence's end the table may hold
    anything: repeat the last page; the consumers mask (K) or clear (V) its rows.
    Before the window pages may be somebody else's: none, which reads as zeros."""
    ids = ()
    for box in gl.static_range(cfg.BLOCK_N // cfg.BOX):
        page = (first_key + box * cfg.BOX) // cfg.PAGE
        page_id = gl.load(pages + gl.minimum(page, last_page))
        if cfg.WINDOWED:
            page_id = gl.where(page < first_page, NO_PAGE, page_id)
        ids = ids + (page_id,)  # type: ignore
    return ids


@gluon.jit
def load_tile(
    cfg, desc, ring, full, free, count, pages, first_page, last_page, kv_head, tile
):
    """Fetch key tile `tile` into the ring's next slot, one TMA box per page piece
    and panel. Columns past the head are 0 in the last panel and unset after it, where
    they only reach output columns that are not stored."""
    slot = ring_slot(cfg, count)
    PANELS: gl.constexpr = cfg.PADDED // PANEL
    LOADED: gl.constexpr = (cfg.HEAD_SIZE + PANEL - 1) // PANEL
    BOXES: gl.constexpr = cfg.BLOCK_N // cfg.BOX
    tile_bytes: gl.constexpr = cfg.BLOCK_N * LOADED * PANEL * 2
    panels = ring._reinterpret(
        ring.dtype, [cfg.STAGES * PANELS, cfg.BLOCK_N, PANEL], cfg.KV_LAYOUT
    )
    first_key = tile * cfg.BLOCK_N
    # Before the wait.
    page_ids = load_page_ids(cfg, pages, first_page, last_page, first_key)
    mbarrier.wait(free.index(slot), ring_phase(cfg, count) ^ 1)
    mbarrier.expect(full.index(slot), tile_bytes)
    for box in gl.static_range(BOXES):
        key = first_key + box * cfg.BOX
        for panel in gl.static_range(LOADED):
            rows = panels.index(slot * PANELS + panel).slice(box * cfg.BOX, cfg.BOX)
            tma.async_copy_global_to_shared(
                desc,
                [page_ids[box], key % cfg.PAGE, kv_head, panel * PANEL],
                full.index(slot),
                rows,
            )


@gluon.jit
def load_queries(cfg, rings, q_desc, item, turn):
    head = item.head_tile * cfg.PACK
    PANELS: gl.constexpr = cfg.PADDED // PANEL
    LOADED: gl.constexpr = (cfg.HEAD_SIZE + PANEL - 1) // PANEL
    q_bytes: gl.constexpr = CONSUMER_ROWS * LOADED * PANEL * 2
    QUERIES: gl.constexpr = cfg.Q_STAGES * cfg.CONSUMERS
    panels = rings.q._reinterpret(
        rings.q.dtype, [QUERIES * PANELS, CONSUMER_ROWS, PANEL], cfg.KV_LAYOUT
    )
    phase = turn // cfg.Q_STAGES % 2
    for c in gl.static_range(cfg.CONSUMERS):
        row = item.tile * cfg.BLOCK_M + c * CONSUMER_ROWS
        slot = query_slot(cfg, c, turn)
        mbarrier.wait(rings.q_free.index(slot), phase ^ 1)
        mbarrier.expect(rings.q_full.index(slot), q_bytes)
        for panel in gl.static_range(LOADED):
            tma.async_copy_global_to_shared(
                q_desc,
                [item.q_start + row // cfg.PACK, head, panel * PANEL],
                rings.q_full.index(slot),
                panels.index(slot * PANELS + panel),
            )


@gluon.jit
def producer(cfg, batch, rings, q_desc, k_desc, v_desc):
    """Feed K of a tile before V of the tile after it: the order of use."""
    turn = 0
    count = gl.to_tensor(0).to(gl.uint32)  # key tiles fetched so far
    item = load_item(cfg, batch, turn)
    while item.seq >= 0:
        begin, end = tile_range(cfg, batch, item)
        kv_head = item.head_tile * cfg.PACK // cfg.GROUP
        pages = batch.block_table + item.seq.to(gl.int64) * batch.block_table_stride
        first_page = first_seen_page(cfg, batch, item)
        last_page = gl.maximum(item.seq_len - 1, 0) // cfg.PAGE
        load_tile(
            cfg, k_desc, rings.k, rings.k_full, rings.k_free, count, pages,
            first_page, last_page, kv_head, end - 1,
        )  # fmt: skip
        # Second, as its place may be in use until the item before ends.
        load_queries(cfg, rings, q_desc, item, turn)
        for tile in range(end - 2, begin - 1, -1):
            load_tile(
                cfg, k_desc, rings.k, rings.k_full, rings.k_free, count + 1, pages,
                first_page, last_page, kv_head, tile,
            )  # fmt: skip
            load_tile(
                cfg, v_desc, rings.v, rings.v_full, rings.v_free, count, pages,
                first_page, last_page, kv_head, tile + 1,
            )  # fmt: skip
            count += 1
        load_tile(
            cfg, v_desc, rings.v, rings.v_full, rings.v_free, count, pages,
            first_page, last_page, kv_head, begin,
        )  # fmt: skip
        count += 1
        turn += 1
        item = load_item(cfg, batch, turn)


# --------------------------------------------------------------- consumer


@gluon.jit
def issue_scores(cfg, rings, q_slot, slot):
    """Start S = Q K^T.  Q: [64, PADDED], K: [BLOCK_N, PADDED]"""
    q = rings.q.index(q_slot)
    k = rings.k.index(slot)
    s = gl.zeros([CONSUMER_ROWS, cfg.BLOCK_N], gl.float32, cfg.S_LAYOUT)
    for i in gl.static_range(len(cfg.CHUNKS)):
        s = warpgroup_mma(
            q.slice(cfg.CHUNKS[i][0], cfg.CHUNKS[i][1], dim=1),
            k.slice(cfg.CHUNKS[i][0], cfg.CHUNKS[i][1], dim=1).permute((1, 0)),
            s,
            use_acc=i > 0,
            is_async=True,
        )
    return s


@gluon.jit
def cap_scores(cfg, batch, s):
    """tanh(s * scale / softcap); the factor softcap is part of scale_log2.
    s: [64, BLOCK_N]"""
    if cfg.SOFTCAP == "exp2":
        return 1.0 - 2.0 / (gl.exp2(s * (batch.cap_scale * (2.0 * LOG2E))) + 1.0)
    elif cfg.SOFTCAP == "approx":
        x = s * batch.cap_scale
        return gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
        )
    else:
        return s


@gluon.constexpr_function
def pair_asm(dtype):
    return f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"


@gluon.jit
def carried(cfg, p, dtype: gl.constexpr):
    """Probabilities as they go around the loop: in fp32, or to spare registers in 16
    bits, two neighbours to a word. As plain tensors of 16 bits they would be taken
    apart and put together again.  p: [64, BLOCK_N] fp32"""
    if cfg.NARROW_P:
        ASM: gl.constexpr = pair_asm(dtype)
        even, odd = gl.split(p.reshape([CONSUMER_ROWS, cfg.BLOCK_N // 2, 2]))
        return gl.inline_asm_elementwise(
            ASM, "=r,f,f", [even, odd], gl.int32, is_pure=True, pack=1
        )
    else:
        return p


@gluon.jit
def to_operand(cfg, p, dtype: gl.constexpr):
    """What is `carried` as the left operand of P.V: no data moves between threads."""
    if cfg.NARROW_P:
        p = gl.join(p, gl.zeros_like(p)).reshape([CONSUMER_ROWS, cfg.BLOCK_N])
        p = gl.inline_asm_elementwise(
            "or.b32 $0, $1, $2;", "=r,r,r", [p], dtype.value, is_pure=True, pack=2
        )
    else:
        p = p.to(dtype)
    return gl.convert_layout(p, cfg.P_LAYOUT)


@gluon.constexpr_function
def keep_asm(relation):
    return (
        f"{{ .reg .pred p; setp.{relation}.s32 p, $2, $3; "
        "selp.f32 $0, $1, 0fFF800000, p; }"
    )


@gluon.jit
def keep_if(RELATION: gl.constexpr, s, keys, bound):
    """S where keys < (or >=) bound, else -inf, as assembly: of a plain comparison
    ptxas makes bit masks before there is an s, at twice the instructions.
    s: [64, BLOCK_N], keys: [1, BLOCK_N], bound: [64]"""
    ASM: gl.constexpr = keep_asm(RELATION)
    keys, s = gl.broadcast(keys, s)
    bound, _ = gl.broadcast(gl.expand_dims(bound, 1), s)
    return gl.inline_asm_elementwise(
        ASM, "=f,f,r,r", [s, keys, bound], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def mask_scores(cfg, batch, item, s, FIRST_ROW: gl.constexpr, tile, MASK: gl.constexpr):
    """-inf where a row must not see a key.  s: [64, BLOCK_N]"""
    rows = item.tile * cfg.BLOCK_M + FIRST_ROW
    rows += gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, cfg.S_LAYOUT))
    begin, end = visible_keys(cfg, batch, item, rows // cfg.PACK)
    end += gl.zeros_like(rows)  # of every row, also if not causal
    keys = gl.arange(0, cfg.BLOCK_N, gl.SliceLayout(0, cfg.S_LAYOUT))
    keys = gl.expand_dims(keys, 0)
    if MASK & MASK_UPPER:
        s = keep_if("lt", s, keys, end - tile * cfg.BLOCK_N)
    if MASK & MASK_LOWER:
        s = keep_if("ge", s, keys, begin - tile * cfg.BLOCK_N)
    return s


@gluon.jit
def running_max(cfg, s, row_max, scale_log2):
    """Maximum of the rows so far, in powers of two. BOUNDED logits are small enough to
    do without: 0 stands for it.  s: [64, BLOCK_N], row_max: [64]"""
    if cfg.BOUNDED:
        return gl.zeros_like(row_max)
    else:
        return gl.maximum(row_max, gl.max(s, 1) * scale_log2)


@gluon.jit
def probabilities(cfg, s, row_max, new_max, scale_log2, MASKED: gl.constexpr):
    """Probabilities of a tile against the new maximum: [64, BLOCK_N] fp32, and the
    factor for what was summed against the one before: [64]."""
    if cfg.BOUNDED:
        return gl.exp2(s * scale_log2), gl.full_like(row_max, 1.0)
    else:
        base = new_max
        if MASKED:
            # A row that has seen no key yet: exp2(-inf - 0) = 0, not NaN.
            base = gl.where(new_max == float("-inf"), 0.0, new_max)
        p = gl.exp2(s * scale_log2 - gl.expand_dims(base, 1))
        return p, gl.exp2(row_max - base)


@gluon.jit
def zero_rows(cfg, tile, first):
    """Clear rows [first, BLOCK_N) of a V tile: a probability of 0 does not silence
    a NaN that an unused slot may hold.  tile: [BLOCK_N, PADDED]"""
    ROWS: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, cfg.WARPGROUPS], [1, 0])
    for start in gl.static_range(0, cfg.BLOCK_N, ROWS):
        if start + ROWS > first:
            part = tile.slice(start, ROWS)
            rows = start + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
            keep = gl.expand_dims(rows < first, 1)
            part.store(gl.where(keep, part.load(LAYOUT), 0.0))
    fence_async_shared()


@gluon.jit
def lane_sums(cfg, p):
    """Sums of the columns that a lane has: those of a row's lanes, four of each
    warpgroup, are added only at the item's end.

    p: [64, BLOCK_N], returns [64, LANES].
    """
    GROUPS: gl.constexpr = cfg.S_LAYOUT.warps_per_cta[1]
    p = p.reshape([CONSUMER_ROWS, GROUPS, cfg.BLOCK_N // GROUPS // 8, 4, 2])
    return gl.sum(gl.sum(p, 4), 2).reshape([CONSUMER_ROWS, GROUPS * 4])


@gluon.jit
def per_row(values, like):
    """values: [64], in the layout of like: [64, LANES]"""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, like.type.layout)
    return gl.expand_dims(gl.convert_layout(values, LAYOUT), 1)


@gluon.jit
def await_turn(rings, CONSUMER: gl.constexpr, number):
    """Until the other consumer has passed on what is this one's turn `number`."""
    mbarrier.wait(rings.turns.index(CONSUMER), (number + 1 - CONSUMER) % 2)


@gluon.jit
def here(x):
    """The same values, here: ptxas moves exponentials across barriers, but not what
    makes or needs the values across this."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 0, 0x1f, 0xffffffff;",
        "=f,f",
        [x],
        gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def pass_turn(rings, CONSUMER: gl.constexpr):
    mbarrier.arrive(rings.turns.index(1 - CONSUMER))


@gluon.jit
def consume_tile(
    cfg, batch, rings, item, CONSUMER: gl.constexpr, MASK: gl.constexpr,
    q_slot, tile, count, turn, acc, p, row_max, row_sum,
):  # fmt: skip
    """S of tile `tile` beside P.V of the tile before, then the softmax of S.

    acc: [64, PADDED] without the last tile, p: [64, BLOCK_N] of the last tile,
    row_max: [64], row_sum: [64, LANES] with it.
    """
    slot = ring_slot(cfg, count)
    v_slot = ring_slot(cfg, count - 1)
    v_phase = ring_phase(cfg, count - 1)
    mbarrier.wait(rings.k_full.index(slot), ring_phase(cfg, count))
    s = issue_scores(cfg, rings, q_slot, slot)
    operand = to_operand(cfg, p, rings.v.dtype)
    mbarrier.wait(rings.v_full.index(v_slot), v_phase)
    acc = warpgroup_mma(operand, rings.v.index(v_slot), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    if cfg.STAGES == 1:
        mbarrier.arrive(rings.k_free.index(slot))
    s = cap_scores(cfg, batch, s)
    if MASK:
        s = mask_scores(cfg, batch, item, s, CONSUMER * CONSUMER_ROWS, tile, MASK)
    new_max = running_max(cfg, s, row_max, batch.scale_log2)
    if cfg.TURNS:  # one for each tile but an item's first
        await_turn(rings, CONSUMER, count - turn)
        new_max = here(new_max)
    p_next, decay = probabilities(cfg, s, row_max, new_max, batch.scale_log2, MASK != 0)
    row_sum = row_sum * per_row(decay, row_sum) + lane_sums(cfg, p_next)
    # Passed long ago. It ends the basic block: ptxas would otherwise move what follows
    # in front of the exponentials, and P.V is to run under them.
    mbarrier.wait(rings.v_full.index(v_slot), v_phase)
    if cfg.TURNS:
        pass_turn(rings, CONSUMER)
    acc = warpgroup_mma_wait(0, deps=[acc])
    p_next = carried(cfg, p_next, rings.v.dtype)
    if cfg.STAGES > 1:  # one barrier of the warpgroup for both
        mbarrier.arrive(rings.k_free.index(slot))
    mbarrier.arrive(rings.v_free.index(v_slot))
    decay = gl.convert_layout(decay, gl.SliceLayout(1, cfg.O_LAYOUT))
    acc = acc * gl.expand_dims(decay, 1)
    return acc, p_next, new_max, row_sum


@gluon.jit
def first_max(cfg, batch, sinks, item, CONSUMER: gl.constexpr):
    """Running maximum before the first tile: the sinks of the rows' heads, in powers
    of two, or -inf.  Returns [64]"""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, cfg.S_LAYOUT)
    if sinks is None:
        return gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, LAYOUT)
    else:
        rows = item.tile * cfg.BLOCK_M + CONSUMER * CONSUMER_ROWS
        rows += gl.arange(0, CONSUMER_ROWS, LAYOUT)
        heads = item.head_tile * cfg.PACK + rows % cfg.PACK
        sink = gl.load(sinks + heads).to(gl.float32) * LOG2E
        if cfg.SPLIT:  # counts when parts are combined
            sink = gl.where(is_split(cfg, batch, item), float("-inf"), sink)
        return sink


@gluon.jit
def first_tile(
    cfg, batch, rings, sinks, item, CONSUMER: gl.constexpr, q_slot, tile, count
):
    """Softmax of an item's last key tile, the only one that may reach beyond the
    sequence's end.  Returns p: [64, BLOCK_N], row_max: [64], row_sum: [64, LANES]"""
    slot = ring_slot(cfg, count)
    phase = ring_phase(cfg, count)
    mbarrier.wait(rings.k_full.index(slot), phase)
    s = issue_scores(cfg, rings, q_slot, slot)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(rings.k_free.index(slot))
    s = cap_scores(cfg, batch, s)
    s = mask_scores(cfg, batch, item, s, CONSUMER * CONSUMER_ROWS, tile, cfg.UPPER)
    start = first_max(cfg, batch, sinks, item, CONSUMER)
    row_max = running_max(cfg, s, start, batch.scale_log2)
    p, decay = probabilities(cfg, s, start, row_max, batch.scale_log2, True)
    keys = item.seq_len - tile * cfg.BLOCK_N
    if keys < cfg.BLOCK_N:
        mbarrier.wait(rings.v_full.index(slot), phase)
        zero_rows(cfg, rings.v.index(slot), keys)
    row_sum = lane_sums(cfg, p)
    if sinks is not None:  # the sink counts once: in each lane its share
        row_sum += per_row(decay, row_sum) / row_sum.shape[1]
    return carried(cfg, p, rings.v.dtype), row_max, row_sum


@gluon.jit
def store_rows(cfg, batch, item, CONSUMER: gl.constexpr, acc, row_sum):
    """Write a consumer's rows that are queries of the sequence.  acc: [64, PADDED]"""
    total = gl.convert_layout(row_sum, gl.SliceLayout(1, cfg.O_LAYOUT))
    inverse = gl.where(total > 0.0, 1.0 / total, 0.0)
    out = (acc * gl.expand_dims(inverse, 1)).to(batch.output.dtype.element_ty)
    out = gl.convert_layout(out, cfg.STORE_LAYOUT)
    rows = item.tile * cfg.BLOCK_M + CONSUMER * CONSUMER_ROWS
    rows += gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, cfg.STORE_LAYOUT))
    columns = gl.arange(0, cfg.PADDED, gl.SliceLayout(0, cfg.STORE_LAYOUT))
    token = rows // cfg.PACK
    head = item.head_tile * cfg.PACK + rows % cfg.PACK
    offsets = (item.q_start + token).to(gl.int64) * batch.output_token_stride
    offsets += head * batch.output_head_stride
    pointers = batch.output + gl.expand_dims(offsets, 1) + gl.expand_dims(columns, 0)
    mask = gl.expand_dims(token < item.query_len, 1)
    if cfg.HEAD_SIZE != cfg.PADDED:
        mask = mask & gl.expand_dims(columns < cfg.HEAD_SIZE, 0)
    gl.store(pointers, out, mask=mask)


@gluon.jit
def store_lse(cfg, batch, lse, item, CONSUMER: gl.constexpr, row_max, row_sum):
    """Natural logarithm of a row's sum of exponentials; -inf if it saw nothing.
    lse: [num_tokens, num_query_heads] fp32"""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, cfg.S_LAYOUT)
    rows = item.tile * cfg.BLOCK_M + CONSUMER * CONSUMER_ROWS
    rows += gl.arange(0, CONSUMER_ROWS, LAYOUT)
    token = rows // cfg.PACK
    head = item.head_tile * cfg.PACK + rows % cfg.PACK
    value = (row_max + gl.log2(row_sum)) * LN2
    value = gl.where(row_sum > 0.0, value, float("-inf"))
    heads: gl.constexpr = cfg.HEAD_TILES * cfg.PACK
    offsets = (item.q_start + token).to(gl.int64) * heads + head
    gl.store(lse + offsets, value, mask=token < item.query_len)


@gluon.jit
def leave_state(cfg, states, item, CONSUMER: gl.constexpr, acc, row_max, row_sum):
    """Store the softmax state of a part of an item's keys, as `combine` reads it.

    acc: [64, PADDED], row_max: [64], row_sum: [64].
    """
    LAYOUT: gl.constexpr = gl.SliceLayout(1, cfg.S_LAYOUT)
    FIRST_ROW: gl.constexpr = CONSUMER * CONSUMER_ROWS
    place = state_rows(cfg, item, FIRST_ROW, LAYOUT)
    gl.store(states[1] + place, row_max)
    gl.store(states[2] + place, row_sum)
    place = state_rows(cfg, item, FIRST_ROW, gl.SliceLayout(1, cfg.O_LAYOUT))
    columns = gl.arange(0, cfg.PADDED, gl.SliceLayout(0, cfg.O_LAYOUT))
    offsets = gl.expand_dims(place * cfg.PADDED, 1) + gl.expand_dims(columns, 0)
    gl.store(states[0] + offsets, acc)


@gluon.jit
def attend(
    cfg, batch, rings, lse, sinks, states, CONSUMER: gl.constexpr, q_slot, item, begin,
    end, count, turn,
):  # fmt: skip
    """A consumer's rows of an item. Returns its next item, and the count of key tiles
    used so far."""
    FIRST_ROW: gl.constexpr = CONSUMER * CONSUMER_ROWS
    full_begin, full_end = unmasked_range(cfg, batch, item, FIRST_ROW, begin, end)
    p, row_max, row_sum = first_tile(
        cfg, batch, rings, sinks, item, CONSUMER, q_slot, end - 1, count
    )
    acc = gl.zeros([CONSUMER_ROWS, cfg.PADDED], gl.float32, cfg.O_LAYOUT)
    for tile in range(end - 2, full_end - 1, -1):
        count += 1
        acc, p, row_max, row_sum = consume_tile(
            cfg, batch, rings, item, CONSUMER, cfg.UPPER, q_slot, tile, count, turn,
            acc, p, row_max, row_sum,
        )  # fmt: skip
    for tile in range(full_end - 1, full_begin - 1, -1):
        count += 1
        acc, p, row_max, row_sum = consume_tile(
            cfg, batch, rings, item, CONSUMER, 0, q_slot, tile, count, turn, acc, p,
            row_max, row_sum,
        )  # fmt: skip
    if cfg.WINDOWED:
        for tile in range(full_begin - 1, begin - 1, -1):
            count += 1
            acc, p, row_max, row_sum = consume_tile(
                cfg, batch, rings, item, CONSUMER, MASK_LOWER, q_slot, tile, count,
                turn, acc, p, row_max, row_sum,
            )  # fmt: skip
    mbarrier.arrive(rings.q_free.index(q_slot))
    slot = ring_slot(cfg, count)
    next_item = load_item(cfg, batch, turn)  # its latency passes under P.V
    mbarrier.wait(rings.v_full.index(slot), ring_phase(cfg, count))
    operand = to_operand(cfg, p, rings.v.dtype)
    acc = warpgroup_mma(operand, rings.v.index(slot), acc)
    mbarrier.arrive(rings.v_free.index(slot))
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, cfg.S_LAYOUT))
    is_whole = True
    if cfg.SPLIT:
        is_whole = not is_split(cfg, batch, item)
        if not is_whole:
            leave_state(cfg, states, item, CONSUMER, acc, row_max, row_sum)
    if is_whole:
        store_rows(cfg, batch, item, CONSUMER, acc, row_sum)
        if lse is not None:
            store_lse(cfg, batch, lse, item, CONSUMER, row_max, row_sum)
    return next_item, count + 1


@gluon.jit
def pass_over(cfg, rings, CONSUMER: gl.constexpr, count, turn, tiles):
    """Give back key tiles that a consumer has no use for: all its rows are past the
    sequence's queries. Returns the count of key tiles used so far."""
    for i in range(tiles):
        slot = ring_slot(cfg, count)
        phase = ring_phase(cfg, count)
        mbarrier.wait(rings.k_full.index(slot), phase)
        mbarrier.arrive(rings.k_free.index(slot))
        mbarrier.wait(rings.v_full.index(slot), phase)
        mbarrier.arrive(rings.v_free.index(slot))
        if cfg.TURNS and i > 0:
            await_turn(rings, CONSUMER, count - turn)
            pass_turn(rings, CONSUMER)
        count += 1
    return count


@gluon.jit
def consumer(cfg, batch, rings, lse, sinks, states, CONSUMER: gl.constexpr):
    FIRST_ROW: gl.constexpr = CONSUMER * CONSUMER_ROWS
    turn = 0
    count = gl.to_tensor(0).to(gl.uint32)  # key tiles used so far
    item = load_item(cfg, batch, turn)
    while item.seq >= 0:
        begin, end = tile_range(cfg, batch, item)
        first_token = (item.tile * cfg.BLOCK_M + FIRST_ROW) // cfg.PACK
        q_slot = query_slot(cfg, CONSUMER, turn)
        mbarrier.wait(rings.q_full.index(q_slot), turn // cfg.Q_STAGES % 2)
        turn += 1
        if first_token < item.query_len:
            item, count = attend(
                cfg, batch, rings, lse, sinks, states, CONSUMER, q_slot, item, begin,
                end, count, turn,
            )  # fmt: skip
        else:
            mbarrier.arrive(rings.q_free.index(q_slot))
            count = pass_over(cfg, rings, CONSUMER, count, turn, end - begin)
            item = load_item(cfg, batch, turn)


# ----------------------------------------------------------------- kernel


@gluon.jit(
    do_not_specialize=[
        "max_items",
        "is_followed",
        "block_table",  # microbatches slice it anywhere
        "long_seq",
        "block_table_stride",
        "window",
    ],
)
def hopper_prefill_kernel(
    max_items,
    is_followed,  # 1: by a dependent launch, which may begin already; see `overlap`
    q_desc,  # [num_tokens, num_query_heads, HEAD_SIZE], box [64 / PACK, PACK, 64]
    k_desc,  # [num_blocks, PAGE, num_kv_heads, HEAD_SIZE], box [1, BOX, 1, 64]
    v_desc,  # like k_desc
    output,
    lse,
    sinks,
    work,
    block_table,
    acc_states,  # as in `combine_kernel`, if SPLIT
    max_states,
    sum_states,
    output_token_stride,
    output_head_stride,
    long_seq,
    block_table_stride,
    scale_log2,
    cap_scale,
    window,
    HEAD_SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE: gl.constexpr,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_TILES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
    WIDE_WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
    BOUNDED: gl.constexpr,
    NARROW_P: gl.constexpr,
    TURNS: gl.constexpr,
    ROW_BLOCK: gl.constexpr,
    Q_STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
):
    # In slots that are one page's; where pages overlap, each is a page's first.
    BOX: gl.constexpr = k_desc.block_shape[0] * k_desc.block_shape[1]
    IS_BOUNDED: gl.constexpr = BOUNDED and sinks is None  # a sink may be any number
    cfg = Config(
        HEAD_SIZE, BLOCK_N, PAGE, BOX, GROUP, PACK, HEAD_TILES, CONSUMERS, WARPGROUPS,
        STAGES, CAUSAL, WINDOWED, WIDE_WINDOW, SOFTCAP, IS_BOUNDED, NARROW_P, TURNS,
        ROW_BLOCK, Q_STAGES, SPLIT,
    )  # fmt: skip
    batch = Batch(
        output, output_token_stride, output_head_stride, work, max_items, long_seq,
        block_table, block_table_stride, scale_log2, cap_scale, window,
    )  # fmt: skip
    states = (acc_states, max_states, sum_states)
    if is_followed > 0:
        begin_next_launch()
    rings = make_rings(cfg, k_desc.dtype)
    # Three warpgroups share 504 registers a thread lane, four 512.
    CONSUMER_REGISTERS: gl.constexpr = 232 if cfg.PADDED == 64 else 240
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (consumer, (cfg, batch, rings, lse, sinks, states, 0)),
                (producer, (cfg, batch, rings, q_desc, k_desc, v_desc)),
            ],
            [1],
            [24],  # what two warpgroups leave: 240 for each of their threads
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (cfg, batch, rings, lse, sinks, states, 0)),
                (consumer, (cfg, batch, rings, lse, sinks, states, 1)),
                (producer, (cfg, batch, rings, q_desc, k_desc, v_desc)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 504 - 2 * CONSUMER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (cfg, batch, rings, lse, sinks, states, 0)),
                (consumer, (cfg, batch, rings, lse, sinks, states, 1)),
                (consumer, (cfg, batch, rings, lse, sinks, states, 2)),
                (producer, (cfg, batch, rings, q_desc, k_desc, v_desc)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
