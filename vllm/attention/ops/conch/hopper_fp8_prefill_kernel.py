# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Gluon kernel of `hopper_fp8_prefill`: Q, K, V and probabilities in fp8 e4m3. One
producer warp, two transposing warps, two or three consumer warpgroups, persistent over
a work list.

Every consumer owns 64 rows of a query tile and keeps their scores, probabilities and
output in registers. Its loop over key tiles, last tile first, does one thing after the
other: Q.K, softmax, P.V. The tensor cores work on one consumer's products while another
one takes exponentials. Q.K of a tile beside P.V of the tile before it, as in
`hopper_prefill_kernel`, gained nothing with two consumers, and leaves no registers for
a third. The producer follows the block table and feeds K and V through two rings of
shared memory with TMA, already for the next item while this one is being finished.

What 8 bits change:

The tensor cores take 8-bit operands only with the summed index contiguous. For P.V that
is the keys, while a cache has the head dimension contiguous, so two more warps turn
every tile of V around, from one ring of shared memory into another. They exchange pairs
of bytes: ldmatrix with transposition moves 16-bit pairs of dimensions, a byte
permutation makes pairs of keys of them, and stmatrix stores these. That leaves the keys
of a tile in the order in which a thread's probabilities already lie in registers (as in
FlashAttention-3, https://arxiv.org/abs/2407.08608), and the dimensions in an order that
only the final store has to know.

The tensor cores sum 8-bit products with about 14 bits. P.V of every tile therefore
starts from zero and is added to the output in fp32, by the same instruction that
rescales the output.

A tile of V past the sequence's end is cleared while it is turned around: e4m3 has NaN.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from .hopper_prefill_kernel import (
    cap_scores,
    first_max,
    lane_sums,
    load_page_ids,
    mask_scores,
    per_row,
)
from .hopper_tiles import (
    CONSUMER_ROWS,
    MASK_LOWER,
    MASK_UPPER,
    Batch,
    begin_next_launch,
    fence_async_shared,
    first_seen_page,
    is_split,
    load_item,
    make_barriers,
    mbarrier,
    state_rows,
    tile_range,
    tma,
    unmasked_range,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LN2 = gl.constexpr(0.6931471805599453)
# Probabilities are stored times 2^8, of at most 448: the smallest of 2^-17 remain.
P_SHIFT = gl.constexpr(8.0)
# Keys that the transposing warps hold in registers at a time.
TURNED_KEYS = gl.constexpr(16)
TURNING_WARPS = gl.constexpr(2)
# Of a thread of two consumers, of three, and of the other warps; the first of three
# gets what they leave, 168.
TWO_CONSUMERS_REGISTERS = gl.constexpr(240)
THREE_CONSUMERS_REGISTERS = gl.constexpr(160)
WORKER_REGISTERS = gl.constexpr(24)


@gluon.constexpr_function
def wgmma_layout(columns):
    """Accumulator of one warpgroup: [64, columns]."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32]
    )


@gluon.constexpr_function
def store_layout(columns):
    """The accumulator's layout with its columns in order: a thread has four
    neighbouring ones."""
    high = [[0, 1 << i] for i in range(4, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]] + high,
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, columns],
    )


@gluon.constexpr_function
def pairs_layout(pairs, keys, warps):
    """Of [pairs, keys] pairs of head dimensions, as ldmatrix with transposition loads
    them: a lane's register holds two neighbouring keys."""
    high = [[1 << i, 0] for i in range(3, pairs.bit_length() - 1)]
    cut = len(high) - (warps.bit_length() - 1)
    groups = [[0, 1 << i] for i in range(3, keys.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1]] + groups + high[:cut],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=high[cut:],
        block_bases=[],
        shape=[pairs, keys],
    )


@aggregate
class Config:
    """What one compiled kernel is made for. Names as in `hopper_tiles.Config`."""

    HEAD_SIZE: gl.constexpr
    PADDED: gl.constexpr
    PANEL: gl.constexpr
    PANELS: gl.constexpr
    BLOCK_N: gl.constexpr
    PAGE: gl.constexpr
    BOX: gl.constexpr
    GROUP: gl.constexpr
    PACK: gl.constexpr
    HEAD_TILES: gl.constexpr
    CONSUMERS: gl.constexpr
    STAGES: gl.constexpr
    CAUSAL: gl.constexpr
    WINDOWED: gl.constexpr
    UPPER: gl.constexpr
    SOFTCAP: gl.constexpr
    ROW_BLOCK: gl.constexpr
    SPLIT: gl.constexpr
    BLOCK_M: gl.constexpr
    S_LAYOUT: gl.constexpr
    O_LAYOUT: gl.constexpr
    P_LAYOUT: gl.constexpr
    KV_LAYOUT: gl.constexpr
    KV_PAIRS_LAYOUT: gl.constexpr
    T_LAYOUT: gl.constexpr
    T_PAIRS_LAYOUT: gl.constexpr
    TURN_LAYOUT: gl.constexpr
    STORE_LAYOUT: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        head_size,
        block_n,
        page,
        box,
        group,
        pack,
        head_tiles,
        consumers,
        stages,
        causal,
        windowed,
        wide_window,
        softcap,
        row_block,
        split,
    ):
        padded = max(64, 1 << (head_size - 1).bit_length())
        panel = min(padded, 128)
        keys = min(block_n, 128)
        self.HEAD_SIZE = gl.constexpr(head_size)
        self.PADDED = gl.constexpr(padded)
        self.PANEL = gl.constexpr(panel)
        self.PANELS = gl.constexpr(padded // panel)
        self.BLOCK_N = gl.constexpr(block_n)
        self.PAGE = gl.constexpr(page)
        self.BOX = gl.constexpr(box)
        self.GROUP = gl.constexpr(group)
        self.PACK = gl.constexpr(pack)
        self.HEAD_TILES = gl.constexpr(head_tiles)
        self.CONSUMERS = gl.constexpr(consumers)
        self.STAGES = gl.constexpr(stages)
        self.CAUSAL = gl.constexpr(causal)
        self.WINDOWED = gl.constexpr(windowed)
        # How to mask the first tiles of an item: no row's window begins in them if it
        # is wide.
        self.UPPER = gl.constexpr(
            MASK_UPPER.value
            if wide_window or not windowed
            else MASK_UPPER.value | MASK_LOWER.value
        )
        self.SOFTCAP = gl.constexpr(softcap)
        self.ROW_BLOCK = gl.constexpr(row_block)
        self.SPLIT = gl.constexpr(split)
        self.BLOCK_M = gl.constexpr(64 * consumers)
        self.S_LAYOUT = gl.constexpr(wgmma_layout(block_n))
        self.O_LAYOUT = gl.constexpr(wgmma_layout(panel))
        self.P_LAYOUT = gl.constexpr(
            gl.DotOperandLayout(0, wgmma_layout(panel), k_width=4)
        )
        self.KV_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(panel, 8, rank=2))
        self.KV_PAIRS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(panel, 16, rank=2))
        self.T_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(keys, 8, rank=2))
        self.T_PAIRS_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(keys, 16, rank=2))
        self.TURN_LAYOUT = gl.constexpr(
            pairs_layout(panel // 2, TURNED_KEYS.value, TURNING_WARPS.value)
        )
        self.STORE_LAYOUT = gl.constexpr(store_layout(panel))


@aggregate
class Rings:
    """Shared memory, and the barriers that say full or free."""

    q: gl.shared_memory_descriptor  # [CONSUMERS, 64, PADDED]
    k: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, PADDED]
    v: gl.shared_memory_descriptor  # [STAGES * PANELS, BLOCK_N, PANEL]
    t: gl.shared_memory_descriptor  # V turned around: [STAGES * PANELS, PANEL, BLOCK_N]
    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor
    t_full: gl.shared_memory_descriptor
    t_free: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, q, k, v, t, q_full, q_free, k_full, k_free, v_full, v_free, t_full, t_free
    ):
        self.q = q
        self.k = k
        self.v = v
        self.t = t
        self.q_full = q_full
        self.q_free = q_free
        self.k_full = k_full
        self.k_free = k_free
        self.v_full = v_full
        self.v_free = v_free
        self.t_full = t_full
        self.t_free = t_free


@gluon.jit
def make_rings(cfg, dtype: gl.constexpr):
    SLOTS: gl.constexpr = cfg.STAGES * cfg.PANELS
    return Rings(
        gl.allocate_shared_memory(
            dtype, [cfg.CONSUMERS, CONSUMER_ROWS, cfg.PADDED], cfg.KV_LAYOUT
        ),
        gl.allocate_shared_memory(
            dtype, [cfg.STAGES, cfg.BLOCK_N, cfg.PADDED], cfg.KV_LAYOUT
        ),
        gl.allocate_shared_memory(
            dtype, [SLOTS, cfg.BLOCK_N, cfg.PANEL], cfg.KV_LAYOUT
        ),
        gl.allocate_shared_memory(dtype, [SLOTS, cfg.PANEL, cfg.BLOCK_N], cfg.T_LAYOUT),
        make_barriers(cfg.CONSUMERS, 1),
        make_barriers(cfg.CONSUMERS, 1),
        make_barriers(cfg.STAGES, 1),
        make_barriers(cfg.STAGES, cfg.CONSUMERS),
        make_barriers(cfg.STAGES, 1),
        make_barriers(cfg.STAGES, 1),
        make_barriers(cfg.STAGES, 1),
        make_barriers(cfg.STAGES, cfg.CONSUMERS),
    )


# --------------------------------------------------------------- producer


@gluon.jit
def load_tile(cfg, desc, panels, full, free, count, page_ids, first_key, kv_head):
    """Fetch a key tile into the ring's next slot, one TMA box per page piece and panel.
    Columns past the head are 0.  panels: [STAGES * PANELS, BLOCK_N, PANEL]"""
    slot = count % cfg.STAGES
    tile_bytes: gl.constexpr = cfg.BLOCK_N * cfg.PADDED
    mbarrier.wait(free.index(slot), (count // cfg.STAGES) % 2 ^ 1)
    mbarrier.expect(full.index(slot), tile_bytes)
    for box in gl.static_range(cfg.BLOCK_N // cfg.BOX):
        key = first_key + box * cfg.BOX
        for panel in gl.static_range(cfg.PANELS):
            rows = panels.index(slot * cfg.PANELS + panel).slice(box * cfg.BOX, cfg.BOX)
            tma.async_copy_global_to_shared(
                desc,
                [page_ids[box], key % cfg.PAGE, kv_head, panel * cfg.PANEL],
                full.index(slot),
                rows,
            )


@gluon.jit
def load_queries(cfg, rings, q_desc, item, phase):
    head = item.head_tile * cfg.PACK
    q_bytes: gl.constexpr = CONSUMER_ROWS * cfg.PADDED
    panels = rings.q._reinterpret(
        rings.q.dtype,
        [cfg.CONSUMERS * cfg.PANELS, CONSUMER_ROWS, cfg.PANEL],
        cfg.KV_LAYOUT,
    )
    for c in gl.static_range(cfg.CONSUMERS):
        row = item.tile * cfg.BLOCK_M + c * CONSUMER_ROWS
        mbarrier.wait(rings.q_free.index(c), phase ^ 1)
        mbarrier.expect(rings.q_full.index(c), q_bytes)
        for panel in gl.static_range(cfg.PANELS):
            tma.async_copy_global_to_shared(
                q_desc,
                [item.q_start + row // cfg.PACK, head, panel * cfg.PANEL],
                rings.q_full.index(c),
                panels.index(c * cfg.PANELS + panel),
            )


@gluon.jit
def producer(cfg, batch, rings, q_desc, k_desc, v_desc):
    turn = 0
    count = 0  # key tiles fetched so far
    k_panels = rings.k._reinterpret(
        rings.k.dtype, [cfg.STAGES * cfg.PANELS, cfg.BLOCK_N, cfg.PANEL], cfg.KV_LAYOUT
    )
    item = load_item(cfg, batch, turn)
    while item.seq >= 0:
        begin, end = tile_range(cfg, batch, item)
        kv_head = item.head_tile * cfg.PACK // cfg.GROUP
        pages = batch.block_table + item.seq.to(gl.int64) * batch.block_table_stride
        first_page = first_seen_page(cfg, batch, item)
        last_page = gl.maximum(item.seq_len - 1, 0) // cfg.PAGE
        load_queries(cfg, rings, q_desc, item, turn % 2)
        for tile in range(end - 1, begin - 1, -1):
            first_key = tile * cfg.BLOCK_N
            page_ids = load_page_ids(cfg, pages, first_page, last_page, first_key)
            load_tile(
                cfg, k_desc, k_panels, rings.k_full, rings.k_free, count, page_ids,
                first_key, kv_head,
            )  # fmt: skip
            load_tile(
                cfg, v_desc, rings.v, rings.v_full, rings.v_free, count, page_ids,
                first_key, kv_head,
            )  # fmt: skip
            count += 1
        turn += 1
        item = load_item(cfg, batch, turn)


# ------------------------------------------------------------- transposer


@gluon.jit
def exchange_bytes(a, b):
    """Pairs of neighbouring dimensions at keys a and b to pairs of keys at one
    dimension. Registers of two pairs each: (a0 a1), (b0 b1) with the keys 0 and 1, give
    (a0 a1, b0 b1) of the first dimension, and the same of the second."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;",
        "=&r,=r,r,r",
        [a, b],
        (gl.int16, gl.int16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def turn_tile(cfg, source, target, valid, CLEAR: gl.constexpr):
    """V [BLOCK_N, PANEL] to V^T [PANEL, BLOCK_N], both as 16-bit pairs.

    Of 16 keys, key 8h + 2t + e goes to place 4t + 2h + e: the order of `to_operand`.
    Of 16 dimensions, 2g + j goes to row 8j + g: the order of `store_rows`.
    CLEAR: keys from `valid` on become 0.
    """
    PAIRS: gl.constexpr = cfg.PANEL // 2
    GROUPS: gl.constexpr = TURNED_KEYS // 16
    for start in gl.static_range(0, cfg.BLOCK_N, TURNED_KEYS):
        x = source.slice(start, TURNED_KEYS).permute((1, 0)).load(cfg.TURN_LAYOUT)
        if CLEAR:
            keys = gl.arange(0, TURNED_KEYS, gl.SliceLayout(0, cfg.TURN_LAYOUT))
            keep = gl.expand_dims(start + keys < valid, 0)
            keep, x = gl.broadcast(keep, x)
            x = gl.where(keep, x, gl.zeros_like(x))
        x = x.reshape([PAIRS, GROUPS, 2, 8]).permute((0, 1, 3, 2))
        a, b = gl.split(x)  # [PAIRS, GROUPS, 8], keys 0 to 7 and 8 to 15
        even, odd = exchange_bytes(a, b)
        y = gl.join(even, odd).reshape([PAIRS // 8, 8, GROUPS * 8, 2])
        y = y.permute((0, 3, 1, 2)).reshape([cfg.PANEL, GROUPS * 8])
        target.slice(start // 2, TURNED_KEYS // 2, dim=1).store(y)


@gluon.jit
def transposer(cfg, batch, rings):
    SLOTS: gl.constexpr = cfg.STAGES * cfg.PANELS
    source = rings.v._reinterpret(
        gl.int16, [SLOTS, cfg.BLOCK_N, cfg.PANEL // 2], cfg.KV_PAIRS_LAYOUT
    )
    target = rings.t._reinterpret(
        gl.int16, [SLOTS, cfg.PANEL, cfg.BLOCK_N // 2], cfg.T_PAIRS_LAYOUT
    )
    turn = 0
    count = 0  # key tiles turned so far
    item = load_item(cfg, batch, turn)
    while item.seq >= 0:
        begin, end = tile_range(cfg, batch, item)
        for tile in range(end - 1, begin - 1, -1):
            slot = count % cfg.STAGES
            phase = count // cfg.STAGES % 2
            valid = item.seq_len - tile * cfg.BLOCK_N
            mbarrier.wait(rings.t_free.index(slot), phase ^ 1)
            mbarrier.wait(rings.v_full.index(slot), phase)
            for panel in gl.static_range(cfg.PANELS):
                place = slot * cfg.PANELS + panel
                if valid < cfg.BLOCK_N:
                    turn_tile(
                        cfg, source.index(place), target.index(place), valid, True
                    )
                else:
                    turn_tile(
                        cfg, source.index(place), target.index(place), valid, False
                    )
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(rings.t_full.index(slot))
            mbarrier.arrive(rings.v_free.index(slot))
            count += 1
        turn += 1
        item = load_item(cfg, batch, turn)


# --------------------------------------------------------------- consumer


@gluon.jit
def issue_scores(cfg, rings, CONSUMER: gl.constexpr, slot):
    """Start S = Q K^T.  Q: [64, PADDED], K: [BLOCK_N, PADDED]"""
    s = gl.zeros([CONSUMER_ROWS, cfg.BLOCK_N], gl.float32, cfg.S_LAYOUT)
    return warpgroup_mma(
        rings.q.index(CONSUMER),
        rings.k.index(slot).permute((1, 0)),
        s,
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def issue_output(cfg, rings, operand, place):
    """Start P V from zero.  operand: [64, BLOCK_N], V^T: [PANEL, BLOCK_N]"""
    zero = gl.zeros([CONSUMER_ROWS, cfg.PANEL], gl.float32, cfg.O_LAYOUT)
    v = rings.t.index(place).permute((1, 0))
    return warpgroup_mma(operand, v, zero, use_acc=False, is_async=True)


@gluon.jit
def pack_probabilities(cfg, p):
    """Probabilities in e4m3, four to a word, as the operand of P.V has them: of 16
    columns of the accumulator, a thread's 8h + 2t + e make its word t.

    p: [64, BLOCK_N] fp32, returns [64, BLOCK_N / 4] int32.
    """
    p = p.reshape([CONSUMER_ROWS, cfg.BLOCK_N // 16, 2, 4, 2])
    low, high = gl.split(p.permute((0, 1, 3, 4, 2)))
    p0, p1 = gl.split(low)
    p2, p3 = gl.split(high)
    words = gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [p0, p1, p2, p3],
        gl.int32,
        is_pure=True,
        pack=1,
    )
    return words.reshape([CONSUMER_ROWS, cfg.BLOCK_N // 4])


@gluon.jit
def to_operand(cfg, words):
    """Words as the left operand of P.V: renamed, not moved.

    words: [64, BLOCK_N / 4] int32, returns [64, BLOCK_N] fp8
    """
    none = gl.zeros_like(words)
    words = gl.join(gl.join(words, none), gl.join(none, none))
    words = words.reshape([CONSUMER_ROWS, cfg.BLOCK_N])
    p = gl.inline_asm_elementwise(
        "or.b32 $0, $1, $2;", "=r,r,r,r,r", [words], gl.float8e4nv, is_pure=True, pack=4
    )
    return gl.convert_layout(p, cfg.P_LAYOUT, assert_trivial=True)


@gluon.jit
def softmax_step(cfg, s, row_max, scale_log2, MASKED: gl.constexpr):
    """Probabilities of a tile against the running maximum, both in powers of two.

    Returns p * 2^P_SHIFT: [64, BLOCK_N] fp32, the factor for what was summed before:
    [64], the new maximum: [64].
    """
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)
    base = new_max
    if MASKED:
        # A row that has seen no key yet: exp2(-inf - 0) = 0, not NaN.
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(base - P_SHIFT, 1))
    return p, gl.exp2(row_max - base), new_max


@gluon.jit
def scores(
    cfg, batch, rings, item, CONSUMER: gl.constexpr, MASK: gl.constexpr, tile, s,
    row_max,
):  # fmt: skip
    """Mask and softmax of finished scores.  s: [64, BLOCK_N]"""
    s = cap_scores(cfg, batch, s)
    if MASK:
        s = mask_scores(cfg, batch, item, s, CONSUMER * CONSUMER_ROWS, tile, MASK)
    return softmax_step(cfg, s, row_max, batch.scale_log2, MASK)


@gluon.jit
def add_output(cfg, acc, decay, pv):
    """Returns acc * decay + pv.  acc, pv: [64, PANEL], decay: [64]"""
    decay = gl.convert_layout(decay, gl.SliceLayout(1, cfg.O_LAYOUT))
    return acc * gl.expand_dims(decay, 1) + pv


@gluon.jit
def weigh_values(cfg, rings, acc, p, decay, count):
    """P.V of a tile, added to what was summed before, times decay.

    acc: PANELS times [64, PANEL], p: [64, BLOCK_N] fp32, decay: [64]
    """
    slot = count % cfg.STAGES
    operand = to_operand(cfg, pack_probabilities(cfg, p))
    mbarrier.wait(rings.t_full.index(slot), count // cfg.STAGES % 2)
    new = ()
    for panel in gl.static_range(cfg.PANELS):
        pv = issue_output(cfg, rings, operand, slot * cfg.PANELS + panel)
        pv = warpgroup_mma_wait(0, deps=[pv])
        if panel + 1 == cfg.PANELS:
            mbarrier.arrive(rings.t_free.index(slot))
        new = new + (add_output(cfg, acc[panel], decay, pv),)  # type: ignore
    return new


@gluon.jit
def weigh_keys(
    cfg, batch, rings, item, CONSUMER: gl.constexpr, MASK: gl.constexpr, tile, count,
    row_max,
):  # fmt: skip
    """Q.K of a tile, and its softmax; returns as `softmax_step`.  row_max: [64]"""
    slot = count % cfg.STAGES
    mbarrier.wait(rings.k_full.index(slot), count // cfg.STAGES % 2)
    s = issue_scores(cfg, rings, CONSUMER, slot)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(rings.k_free.index(slot))
    return scores(cfg, batch, rings, item, CONSUMER, MASK, tile, s, row_max)


@gluon.jit
def first_tile(cfg, batch, rings, item, CONSUMER: gl.constexpr, tile, count):
    """State after an item's last key tile, the only one that may reach beyond the
    sequence's end.  Returns acc: PANELS times [64, PANEL], row_max: [64],
    row_sum: [64, 4]"""
    none = gl.full(
        [CONSUMER_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, cfg.S_LAYOUT)
    )
    p, decay, row_max = weigh_keys(
        cfg, batch, rings, item, CONSUMER, cfg.UPPER, tile, count, none
    )
    acc = ()
    for _ in gl.static_range(cfg.PANELS):
        zero = gl.zeros([CONSUMER_ROWS, cfg.PANEL], gl.float32, cfg.O_LAYOUT)
        acc = acc + (zero,)  # type: ignore
    acc = weigh_values(cfg, rings, acc, p, decay, count)
    return acc, row_max, lane_sums(cfg, p)


@gluon.jit
def consume_tile(
    cfg, batch, rings, item, CONSUMER: gl.constexpr, MASK: gl.constexpr,
    tile, count, acc, row_max, row_sum,
):  # fmt: skip
    """State after one tile more; as `first_tile` returns it."""
    p, decay, row_max = weigh_keys(
        cfg, batch, rings, item, CONSUMER, MASK, tile, count, row_max
    )
    row_sum = row_sum * per_row(decay, row_sum) + lane_sums(cfg, p)
    acc = weigh_values(cfg, rings, acc, p, decay, count)
    return acc, row_max, row_sum


@gluon.jit
def join_sinks(cfg, batch, sinks, item, CONSUMER: gl.constexpr, row_max, row_sum):
    """A row's maximum and sum with its head's sink, and the factor for what was summed
    before. They join last: a large sink costs probabilities none of their bits."""
    if sinks is None:
        return 1.0, row_max, row_sum
    else:
        sink = first_max(cfg, batch, sinks, item, CONSUMER)
        new_max = gl.maximum(row_max, sink)
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
        weight = gl.exp2(row_max - base)
        return weight, new_max, row_sum * weight + gl.exp2(sink - base + P_SHIFT)


@gluon.jit
def in_order(cfg, panel):
    """A panel [64, PANEL] of the accumulator with its columns in order."""
    panel = panel.reshape([CONSUMER_ROWS, cfg.PANEL // 16, 2, 8])
    panel = panel.permute((0, 1, 3, 2)).reshape([CONSUMER_ROWS, cfg.PANEL])
    return gl.convert_layout(panel, cfg.STORE_LAYOUT, assert_trivial=True)


@gluon.jit
def leave_state(cfg, states, item, FIRST_ROW: gl.constexpr, acc, row_max, row_sum):
    """As that of the kernel for 16 bits.  acc: as for `store_rows`"""
    place = state_rows(cfg, item, FIRST_ROW, gl.SliceLayout(1, cfg.S_LAYOUT))
    gl.store(states[1] + place, row_max - P_SHIFT)
    gl.store(states[2] + place, row_sum)
    place = state_rows(cfg, item, FIRST_ROW, gl.SliceLayout(1, cfg.STORE_LAYOUT))
    columns = gl.arange(0, cfg.PANEL, gl.SliceLayout(0, cfg.STORE_LAYOUT))
    offsets = gl.expand_dims(place * cfg.PADDED, 1) + gl.expand_dims(columns, 0)
    for panel in gl.static_range(cfg.PANELS):
        pointers = states[0] + offsets + panel * cfg.PANEL
        gl.store(pointers, in_order(cfg, acc[panel]))


@gluon.jit
def store_rows(cfg, batch, item, FIRST_ROW: gl.constexpr, acc, factor):
    """Write a consumer's rows that are queries of the sequence, times factor: [64].
    acc: PANELS times [64, PANEL], the columns in the order of `turn_tile`"""
    LAYOUT: gl.constexpr = cfg.STORE_LAYOUT
    factor = gl.convert_layout(factor, gl.SliceLayout(1, cfg.O_LAYOUT))
    for panel in gl.static_range(cfg.PANELS):
        out = (acc[panel] * gl.expand_dims(factor, 1)).to(batch.output.dtype.element_ty)
        out = in_order(cfg, out)
        rows = item.tile * cfg.BLOCK_M + FIRST_ROW
        rows += gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, LAYOUT))
        columns = gl.arange(0, cfg.PANEL, gl.SliceLayout(0, LAYOUT))
        columns += panel * cfg.PANEL
        token = rows // cfg.PACK
        head = item.head_tile * cfg.PACK + rows % cfg.PACK
        offsets = (item.q_start + token).to(gl.int64) * batch.output_token_stride
        offsets += head * batch.output_head_stride
        pointers = batch.output + gl.expand_dims(offsets, 1)
        pointers = pointers + gl.expand_dims(columns, 0)
        mask = gl.expand_dims(token < item.query_len, 1)
        if cfg.HEAD_SIZE != cfg.PADDED:
            mask = mask & gl.expand_dims(columns < cfg.HEAD_SIZE, 0)
        gl.store(pointers, out, mask=mask)


@gluon.jit
def store_lse(cfg, batch, lse, item, FIRST_ROW: gl.constexpr, row_max, row_sum):
    """Natural logarithm of a row's sum of exponentials; -inf if it saw nothing.
    lse: [num_tokens, num_query_heads] fp32"""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, cfg.S_LAYOUT)
    rows = item.tile * cfg.BLOCK_M + FIRST_ROW
    rows += gl.arange(0, CONSUMER_ROWS, LAYOUT)
    token = rows // cfg.PACK
    head = item.head_tile * cfg.PACK + rows % cfg.PACK
    value = (row_max + gl.log2(row_sum) - P_SHIFT) * LN2
    value = gl.where(row_sum > 0.0, value, float("-inf"))
    heads: gl.constexpr = cfg.HEAD_TILES * cfg.PACK
    offsets = (item.q_start + token).to(gl.int64) * heads + head
    gl.store(lse + offsets, value, mask=token < item.query_len)


@gluon.jit
def attend(
    cfg, batch, rings, lse, sinks, states, v_scale, CONSUMER: gl.constexpr, item, begin,
    end, count, turn,
):  # fmt: skip
    """A consumer's rows of an item. Returns its next item, and the count of key tiles
    used so far."""
    FIRST_ROW: gl.constexpr = CONSUMER * CONSUMER_ROWS
    full_begin, full_end = unmasked_range(cfg, batch, item, FIRST_ROW, begin, end)
    acc, row_max, row_sum = first_tile(
        cfg, batch, rings, item, CONSUMER, end - 1, count
    )
    for tile in range(end - 2, full_end - 1, -1):
        count += 1
        acc, row_max, row_sum = consume_tile(
            cfg, batch, rings, item, CONSUMER, cfg.UPPER, tile, count, acc, row_max,
            row_sum,
        )  # fmt: skip
    for tile in range(full_end - 1, full_begin - 1, -1):
        count += 1
        acc, row_max, row_sum = consume_tile(
            cfg, batch, rings, item, CONSUMER, 0, tile, count, acc, row_max, row_sum
        )
    if cfg.WINDOWED:
        for tile in range(full_begin - 1, begin - 1, -1):
            count += 1
            acc, row_max, row_sum = consume_tile(
                cfg, batch, rings, item, CONSUMER, MASK_LOWER, tile, count, acc,
                row_max, row_sum,
            )  # fmt: skip
    mbarrier.arrive(rings.q_free.index(CONSUMER))
    next_item = load_item(cfg, batch, turn)
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, cfg.S_LAYOUT))
    weight, row_max, row_sum = join_sinks(
        cfg, batch, sinks, item, CONSUMER, row_max, row_sum
    )
    is_whole = True
    if cfg.SPLIT:
        is_whole = not is_split(cfg, batch, item)
        if not is_whole:
            leave_state(cfg, states, item, FIRST_ROW, acc, row_max, row_sum)
    if is_whole:
        factor = gl.where(row_sum > 0.0, weight * v_scale / row_sum, 0.0)
        store_rows(cfg, batch, item, FIRST_ROW, acc, factor)
        if lse is not None:
            store_lse(cfg, batch, lse, item, FIRST_ROW, row_max, row_sum)
    return next_item, count + 1


@gluon.jit
def pass_over(cfg, rings, count, tiles):
    """Give back key tiles that a consumer has no use for: all its rows are past the
    sequence's queries. Returns the count of key tiles used so far."""
    for _ in range(tiles):
        slot = count % cfg.STAGES
        phase = count // cfg.STAGES % 2
        mbarrier.wait(rings.k_full.index(slot), phase)
        mbarrier.arrive(rings.k_free.index(slot))
        mbarrier.wait(rings.t_full.index(slot), phase)
        mbarrier.arrive(rings.t_free.index(slot))
        count += 1
    return count


@gluon.jit
def consumer(cfg, batch, rings, lse, sinks, states, v_scale, CONSUMER: gl.constexpr):
    FIRST_ROW: gl.constexpr = CONSUMER * CONSUMER_ROWS
    turn = 0
    count = 0  # key tiles used so far
    item = load_item(cfg, batch, turn)
    while item.seq >= 0:
        begin, end = tile_range(cfg, batch, item)
        first_token = (item.tile * cfg.BLOCK_M + FIRST_ROW) // cfg.PACK
        mbarrier.wait(rings.q_full.index(CONSUMER), turn % 2)
        turn += 1
        if first_token < item.query_len:
            item, count = attend(
                cfg, batch, rings, lse, sinks, states, v_scale, CONSUMER, item, begin,
                end, count, turn,
            )  # fmt: skip
        else:
            mbarrier.arrive(rings.q_free.index(CONSUMER))
            count = pass_over(cfg, rings, count, end - begin)
            item = load_item(cfg, batch, turn)


# ----------------------------------------------------------------- kernel


@gluon.jit
def load_scale(pointer):
    """A scale in device memory; None: 1."""
    if pointer is None:
        return 1.0
    else:
        return gl.load(pointer)


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
def hopper_fp8_prefill_kernel(
    max_items,
    is_followed,  # 1: by a dependent launch, which may begin already; see `overlap`
    q_desc,  # [num_tokens, num_query_heads, HEAD_SIZE], box [64 / PACK, PACK, PANEL]
    k_desc,  # [num_blocks, PAGE, num_kv_heads, HEAD_SIZE], box [1, BOX, 1, PANEL]
    v_desc,  # like k_desc
    output,
    lse,
    sinks,
    work,
    block_table,
    acc_states,  # as in `combine_kernel`, if SPLIT
    max_states,
    sum_states,
    q_scale,
    k_scale,
    v_scale,
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
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
    WIDE_WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr,
    ROW_BLOCK: gl.constexpr,
    SPLIT: gl.constexpr,
):
    # In slots that are one page's; where pages overlap, each is a page's first.
    BOX: gl.constexpr = k_desc.block_shape[0] * k_desc.block_shape[1]
    cfg = Config(
        HEAD_SIZE, BLOCK_N, PAGE, BOX, GROUP, PACK, HEAD_TILES, CONSUMERS, STAGES,
        CAUSAL, WINDOWED, WIDE_WINDOW, SOFTCAP, ROW_BLOCK, SPLIT,
    )  # fmt: skip
    score_scale = load_scale(q_scale) * load_scale(k_scale)
    if SOFTCAP is None:
        scale_log2 *= score_scale
    else:
        cap_scale *= score_scale
    out_scale = gl.to_tensor(load_scale(v_scale))
    batch = Batch(
        output, output_token_stride, output_head_stride, work, max_items, long_seq,
        block_table, block_table_stride, scale_log2, cap_scale, window,
    )  # fmt: skip
    states = (acc_states, max_states, sum_states)
    if is_followed > 0:
        begin_next_launch()
    rings = make_rings(cfg, k_desc.dtype)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (cfg, batch, rings, lse, sinks, states, out_scale, 0)),
                (consumer, (cfg, batch, rings, lse, sinks, states, out_scale, 1)),
                (transposer, (cfg, batch, rings)),
                (producer, (cfg, batch, rings, q_desc, k_desc, v_desc)),
            ],
            [4, TURNING_WARPS, 1],
            [TWO_CONSUMERS_REGISTERS, WORKER_REGISTERS, WORKER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (cfg, batch, rings, lse, sinks, states, out_scale, 0)),
                (consumer, (cfg, batch, rings, lse, sinks, states, out_scale, 1)),
                (consumer, (cfg, batch, rings, lse, sinks, states, out_scale, 2)),
                (transposer, (cfg, batch, rings)),
                (producer, (cfg, batch, rings, q_desc, k_desc, v_desc)),
            ],
            [4, 4, TURNING_WARPS, 1],
            [
                THREE_CONSUMERS_REGISTERS,
                THREE_CONSUMERS_REGISTERS,
                WORKER_REGISTERS,
                WORKER_REGISTERS,
            ],
        )
