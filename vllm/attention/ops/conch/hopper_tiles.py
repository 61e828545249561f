# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the warps of Hopper's kernels share: the configuration, shared memory, the
batch, and which query rows and key tiles a work item is made of."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

# Hopper's instructions, as attributes: a release may wrap Gluon's import, not these.
fence_async_shared = gl.nvidia.hopper.fence_async_shared
mbarrier = gl.nvidia.hopper.mbarrier
tma = gl.nvidia.hopper.tma
warpgroup_mma = gl.nvidia.hopper.warpgroup_mma
warpgroup_mma_wait = gl.nvidia.hopper.warpgroup_mma_wait

# Rows of one consumer: the M of a warpgroup's matrix instruction.
CONSUMER_ROWS = gl.constexpr(64)
# Columns of a shared-memory panel: 128 bytes, the widest swizzle.
PANEL = gl.constexpr(64)
# int32 fields of a work item: sequence, query tile, first query row, query length,
# sequence length; if SPLIT, first key and end of its part of the keys, and the number
# of parts of the query tile, 0 in parts after the first.
ITEM_FIELDS = gl.constexpr(8)
# Which ends of the keys that a row sees may lie in a tile.
MASK_UPPER = gl.constexpr(1)
MASK_LOWER = gl.constexpr(2)


@gluon.constexpr_function
def wgmma_layout(columns, warpgroups=1):
    """Accumulator [64, columns] of one warpgroup, or of several side by side."""
    return gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[4, warpgroups],
        instr_shape=[16, columns // warpgroups, 16],
    )


@gluon.constexpr_function
def store_layout(columns, warpgroups=1):
    """The accumulator's layout with two column bits of lane and register exchanged:
    every thread has eight neighbouring columns, one 16-byte store."""
    bits = columns.bit_length() - 1
    high = [[0, 1 << i] for i in range(5, bits)]
    own = bits - 5 - (warpgroups.bit_length() - 1)
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]] + high[:own],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]] + high[own:],
        block_bases=[],
        shape=[64, columns],
    )


@gluon.constexpr_function
def padded_head(head_size):
    """Columns of a tile in shared memory and registers: a power of two."""
    return max(PANEL.value, 1 << (head_size - 1).bit_length())


@gluon.constexpr_function
def score_chunks(head_size):
    """Column ranges (start, width) whose products add up to Q.K: powers of two that
    start at panels and leave out most of the padding."""
    tail = head_size % PANEL.value
    tail = next((w for w in (16, 32) if 0 < tail <= w), 0)
    panels = head_size // PANEL.value
    if not tail:
        panels = (head_size + PANEL.value - 1) // PANEL.value
    chunks = []
    start = 0
    for width in (8, 4, 2, 1):
        if panels & width:
            chunks.append((start, width * PANEL.value))
            start += width * PANEL.value
    if tail:
        chunks.append((start, tail))
    return chunks


@aggregate
class Config:
    """What one compiled kernel is made for."""

    HEAD_SIZE: gl.constexpr
    PADDED: gl.constexpr
    CHUNKS: gl.constexpr
    BLOCK_N: gl.constexpr
    PAGE: gl.constexpr
    BOX: gl.constexpr
    GROUP: gl.constexpr
    PACK: gl.constexpr
    HEAD_TILES: gl.constexpr
    CONSUMERS: gl.constexpr
    WARPGROUPS: gl.constexpr
    STAGES: gl.constexpr
    CAUSAL: gl.constexpr
    WINDOWED: gl.constexpr
    UPPER: gl.constexpr
    SOFTCAP: gl.constexpr
    BOUNDED: gl.constexpr
    NARROW_P: gl.constexpr
    TURNS: gl.constexpr
    ROW_BLOCK: gl.constexpr
    Q_STAGES: gl.constexpr
    SPLIT: gl.constexpr
    BLOCK_M: gl.constexpr
    S_LAYOUT: gl.constexpr
    O_LAYOUT: gl.constexpr
    P_LAYOUT: gl.constexpr
    KV_LAYOUT: gl.constexpr
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
        warpgroups,
        stages,
        causal,
        windowed,
        wide_window,
        softcap,
        bounded,
        narrow_p,
        turns,
        row_block,
        q_stages,
        split,
    ):
        padded = padded_head(head_size)
        self.HEAD_SIZE = gl.constexpr(head_size)
        self.PADDED = gl.constexpr(padded)
        self.CHUNKS = gl.constexpr(score_chunks(head_size))
        self.BLOCK_N = gl.constexpr(block_n)
        self.PAGE = gl.constexpr(page)
        self.BOX = gl.constexpr(box)
        self.GROUP = gl.constexpr(group)
        self.PACK = gl.constexpr(pack)
        self.HEAD_TILES = gl.constexpr(head_tiles)
        self.CONSUMERS = gl.constexpr(consumers)
        self.WARPGROUPS = gl.constexpr(warpgroups)
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
        self.BOUNDED = gl.constexpr(bounded)
        self.NARROW_P = gl.constexpr(narrow_p)
        self.TURNS = gl.constexpr(turns)
        self.ROW_BLOCK = gl.constexpr(row_block)
        self.Q_STAGES = gl.constexpr(q_stages)
        self.SPLIT = gl.constexpr(split)
        self.BLOCK_M = gl.constexpr(64 * consumers)
        self.S_LAYOUT = gl.constexpr(wgmma_layout(block_n, warpgroups))
        self.O_LAYOUT = gl.constexpr(wgmma_layout(padded, warpgroups))
        self.P_LAYOUT = gl.constexpr(
            gl.DotOperandLayout(0, wgmma_layout(padded, warpgroups), k_width=2)
        )
        self.KV_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
        self.STORE_LAYOUT = gl.constexpr(store_layout(padded, warpgroups))


@aggregate
class Batch:
    """The tensors of a call other than Q, K and V, which are TMA descriptors."""

    output: gl.tensor  # [num_tokens, num_query_heads, HEAD_SIZE]
    output_token_stride: gl.tensor
    output_head_stride: gl.tensor
    work: gl.tensor  # [max_items, ITEM_FIELDS] int32
    max_items: gl.tensor
    long_seq: gl.tensor  # keys from which a sequence is long, for ROW_BLOCK
    block_table: gl.tensor  # [num_seqs, max_blocks] int32
    block_table_stride: gl.tensor
    scale_log2: gl.tensor  # of a (capped) score: log2(e) and scale or softcap
    cap_scale: gl.tensor  # scale / softcap; unused if not SOFTCAP
    window: gl.tensor  # keys a query sees, itself included; unused if not WINDOWED

    @gluon.constexpr_function
    def __init__(
        self,
        output,
        output_token_stride,
        output_head_stride,
        work,
        max_items,
        long_seq,
        block_table,
        block_table_stride,
        scale_log2,
        cap_scale,
        window,
    ):
        self.output = output
        self.output_token_stride = output_token_stride
        self.output_head_stride = output_head_stride
        self.work = work
        self.max_items = max_items
        self.long_seq = long_seq
        self.block_table = block_table
        self.block_table_stride = block_table_stride
        self.scale_log2 = scale_log2
        self.cap_scale = cap_scale
        self.window = window


@aggregate
class Rings:
    """Shared memory, and the barriers that say full or free."""

    q: gl.shared_memory_descriptor  # [Q_STAGES * CONSUMERS, 64, PADDED]
    k: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, PADDED]
    v: gl.shared_memory_descriptor  # [STAGES, BLOCK_N, PADDED]
    q_full: gl.shared_memory_descriptor
    q_free: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor
    turns: gl.shared_memory_descriptor  # whose of two consumers it is; if TURNS

    @gluon.constexpr_function
    def __init__(self, q, k, v, q_full, q_free, k_full, k_free, v_full, v_free, turns):
        self.q = q
        self.k = k
        self.v = v
        self.q_full = q_full
        self.q_free = q_free
        self.k_full = k_full
        self.k_free = k_free
        self.v_full = v_full
        self.v_free = v_free
        self.turns = turns


@aggregate
class Item:
    """One query tile of BLOCK_M rows. Row r of it is packed row
    tile * BLOCK_M + r: token row // PACK, head head_tile * PACK + row % PACK."""

    seq: gl.tensor  # -1: the list has ended
    tile: gl.tensor
    q_start: gl.tensor
    query_len: gl.tensor
    seq_len: gl.tensor
    head_tile: gl.tensor
    place: gl.tensor  # on the list

    @gluon.constexpr_function
    def __init__(self, seq, tile, q_start, query_len, seq_len, head_tile, place):
        self.seq = seq
        self.tile = tile
        self.q_start = q_start
        self.query_len = query_len
        self.seq_len = seq_len
        self.head_tile = head_tile
        self.place = place


@gluon.jit
def make_barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def make_rings(cfg, dtype: gl.constexpr):
    kv_shape: gl.constexpr = [cfg.STAGES, cfg.BLOCK_N, cfg.PADDED]
    QUERIES: gl.constexpr = cfg.Q_STAGES * cfg.CONSUMERS
    q_shape: gl.constexpr = [QUERIES, CONSUMER_ROWS, cfg.PADDED]
    q = gl.allocate_shared_memory(dtype, q_shape, cfg.KV_LAYOUT)
    k = gl.allocate_shared_memory(dtype, kv_shape, cfg.KV_LAYOUT)
    v = gl.allocate_shared_memory(dtype, kv_shape, cfg.KV_LAYOUT)
    q_full = make_barriers(QUERIES, 1)
    q_free = make_barriers(QUERIES, 1)
    k_full = make_barriers(cfg.STAGES, 1)
    k_free = make_barriers(cfg.STAGES, cfg.CONSUMERS)
    v_full = make_barriers(cfg.STAGES, 1)
    v_free = make_barriers(cfg.STAGES, cfg.CONSUMERS)
    # Not made unless it is waited for: Triton would use its memory for something else
    # at once, and its initialisation could overwrite what is stored there.
    turns = q_free
    if cfg.TURNS:
        turns = make_barriers(cfg.CONSUMERS, 1)
    return Rings(q, k, v, q_full, q_free, k_full, k_free, v_full, v_free, turns)


@gluon.jit
def begin_next_launch():
    """Lets a dependent launch begin, once all programs have come so far; see
    `overlap`."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, False, 1
    )


@gluon.jit
def await_launch_before():
    """Waits for the end of the launch on which this one depends."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], gl.int32, False, 1
    )


@gluon.jit
def ring_slot(cfg, count):
    """Where a ring has the tile number `count`, which is unsigned: remainders of signed
    numbers take longer."""
    return (count % cfg.STAGES).to(gl.int32)


@gluon.jit
def ring_phase(cfg, count):
    return count // cfg.STAGES % 2


@gluon.jit
def item_place(cfg, batch, index):
    """Row of the list and head tile of a program's index-th item.

    All head tiles of a row come one after the other. Where what they read together
    outgrows L2, whole blocks of ROW_BLOCK rows go head by head instead, so that what
    runs at a time shares few KV heads.
    """
    row = index // cfg.HEAD_TILES
    head_tile = index % cfg.HEAD_TILES
    if cfg.ROW_BLOCK > 1:
        block = row // cfg.ROW_BLOCK * cfg.ROW_BLOCK
        last = block + cfg.ROW_BLOCK - 1
        if last < batch.max_items:
            fields = batch.work + last * ITEM_FIELDS
            keys = gl.load(fields + 4)
            if cfg.CAUSAL:  # of the block's lightest row
                keys += gl.load(fields + 1) * cfg.BLOCK_M // cfg.PACK
                keys -= gl.load(fields + 3)
            if (gl.load(fields) >= 0) & (keys >= batch.long_seq):
                place = index - block * cfg.HEAD_TILES
                row = block + place % cfg.ROW_BLOCK
                head_tile = place // cfg.ROW_BLOCK
    return row, head_tile


@gluon.jit
def load_item(cfg, batch, turn):
    """This program's item of a round over the list, items dealt out in snake order:
    the list is heaviest first, and who got the heaviest of one round gets the
    lightest of the next."""
    last = gl.num_programs(0) - 1
    program = gl.program_id(0)
    place = gl.where(turn % 2 == 0, program, last - program)
    row, head_tile = item_place(cfg, batch, turn * (last + 1) + place)
    fields = batch.work + gl.minimum(row, batch.max_items - 1) * ITEM_FIELDS
    seq = gl.where(row < batch.max_items, gl.load(fields), -1)
    return Item(
        seq,
        gl.load(fields + 1),
        gl.load(fields + 2),
        gl.load(fields + 3),
        gl.load(fields + 4),
        head_tile,
        row,
    )


@gluon.jit
def query_tokens(cfg, item, FIRST_ROW: gl.constexpr, ROWS: gl.constexpr):
    """Tokens [begin, end) of the sequence's queries with rows in a part of the tile;
    empty parts count as the last token, so that bounds stay meaningful."""
    row = item.tile * cfg.BLOCK_M + FIRST_ROW
    begin = gl.minimum(row // cfg.PACK, item.query_len - 1)
    end = gl.minimum((row + ROWS - 1) // cfg.PACK + 1, item.query_len)
    return begin, end


@gluon.jit
def visible_keys(cfg, batch, item, token):
    """Keys [begin, end) that a query token of the item sees."""
    position = item.seq_len - item.query_len + token
    begin = 0
    end = item.seq_len
    if cfg.WINDOWED:
        begin = gl.maximum(position - batch.window + 1, 0)
    if cfg.CAUSAL:
        end = gl.minimum(end, position + 1)
    elif cfg.WINDOWED:
        end = gl.minimum(end, position + batch.window)
    return begin, gl.maximum(end, 0)


@gluon.jit
def tile_range(cfg, batch, item):
    """Key tiles [begin, end) of an item; at least one, if only to find that nothing
    is visible."""
    first, last = query_tokens(cfg, item, 0, cfg.BLOCK_M)
    begin_key, _ = visible_keys(cfg, batch, item, first)
    _, end_key = visible_keys(cfg, batch, item, last - 1)
    end = gl.maximum(gl.cdiv(end_key, cfg.BLOCK_N), 1)
    begin = gl.minimum(begin_key // cfg.BLOCK_N, end - 1)
    if cfg.SPLIT:
        # A part behind the last key that is seen has one tile, of which no row sees
        # any: masks are complete, as there is no window.
        fields = batch.work + item.place * ITEM_FIELDS
        begin = gl.maximum(begin, gl.load(fields + 5) // cfg.BLOCK_N)
        end = gl.minimum(end, gl.load(fields + 6) // cfg.BLOCK_N)
        end = gl.maximum(end, begin + 1)
    return begin, end


@gluon.jit
def first_seen_page(cfg, batch, item):
    """The page of the first key that any query token of the item sees."""
    token, _ = query_tokens(cfg, item, 0, cfg.BLOCK_M)
    begin, _ = visible_keys(cfg, batch, item, token)
    return begin // cfg.PAGE


@gluon.jit
def is_split(cfg, batch, item):
    """Whether an item has a part of its keys: its state is left to be combined."""
    return gl.load(batch.work + item.place * ITEM_FIELDS + 7) != 1


@gluon.jit
def state_rows(cfg, item, FIRST_ROW: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the states of a consumer's rows are left: [64] int64"""
    rows = gl.arange(0, CONSUMER_ROWS, LAYOUT) + FIRST_ROW
    tile = item.place * cfg.HEAD_TILES + item.head_tile
    return tile.to(gl.int64) * cfg.BLOCK_M + rows


@gluon.jit
def unmasked_range(cfg, batch, item, FIRST_ROW: gl.constexpr, begin, end):
    """Key tiles of [begin, end - 1) that all rows of a consumer see whole."""
    first, last = query_tokens(cfg, item, FIRST_ROW, CONSUMER_ROWS)
    _, seen_by_first = visible_keys(cfg, batch, item, first)
    seen_from_last, _ = visible_keys(cfg, batch, item, last - 1)
    full_end = gl.minimum(seen_by_first // cfg.BLOCK_N, end - 1)
    full_end = gl.maximum(full_end, begin)
    full_begin = begin
    if cfg.WINDOWED:
        full_begin = gl.maximum(begin, gl.cdiv(seen_from_last, cfg.BLOCK_N))
        full_begin = gl.minimum(full_begin, full_end)
    return full_begin, full_end
