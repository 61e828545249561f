# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Gluon kernel of `hopper_decode`: one producer warp and one consumer warpgroup.

It does what `decode_kernel` does, by the same work list and with the same partials; see
there for pieces, rows and slots. What differs is how K and V come. The producer walks a
worker's whole piece, follows the block table and feeds two rings of shared memory with
TMA, while the consumer may still have the row before. No thread computes addresses of
keys, and few instructions stand between the start and the first tile, which in small
batches is what takes the time.

The consumer's loop is that of `hopper_prefill_kernel`: Q.K of a tile is issued beside
P.V of the tile before it. Query rows are all heads of a group, token by token. Of the
64 rows of a matrix instruction most are empty; memory takes longer all the same.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from .decode import SEQUENCE_FIELDS, WORKER_FIELDS
from .hopper_prefill_kernel import (
    LN2,
    LOG2E,
    issue_scores,
    keep_if,
    lane_sums,
    load_tile,
    per_row,
    probabilities,
    running_max,
    zero_rows,
)
from .hopper_tiles import (
    CONSUMER_ROWS,
    PANEL,
    await_launch_before,
    make_rings,
    mbarrier,
    padded_head,
    ring_phase,
    ring_slot,
    score_chunks,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
    wgmma_layout,
)

WARPS = gl.constexpr(4)  # of the consumer


@aggregate
class DecodeConfig:
    """What one compiled kernel is made for; see `hopper_tiles.Config`."""

    HEAD_SIZE: gl.constexpr
    PADDED: gl.constexpr
    CHUNKS: gl.constexpr
    BLOCK_M: gl.constexpr  # rows of a tile that may be valid
    BLOCK_N: gl.constexpr
    PAGE: gl.constexpr
    BOX: gl.constexpr
    GROUP: gl.constexpr
    NUM_KV_HEADS: gl.constexpr
    CONSUMERS: gl.constexpr
    WARPGROUPS: gl.constexpr
    STAGES: gl.constexpr
    Q_STAGES: gl.constexpr
    CAUSAL: gl.constexpr
    WINDOWED: gl.constexpr
    TURNS: gl.constexpr
    BOUNDED: gl.constexpr
    PARTS: gl.constexpr  # partials of a row that are loaded at once
    FEW_PARTS: gl.constexpr  # up to so many, twice as many rows are combined at once
    S_LAYOUT: gl.constexpr
    O_LAYOUT: gl.constexpr
    P_LAYOUT: gl.constexpr
    KV_LAYOUT: gl.constexpr
    COMBINE_LAYOUT: gl.constexpr
    STATS_LAYOUT: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self,
        head_size,
        block_m,
        block_n,
        page,
        box,
        group,
        num_kv_heads,
        stages,
        causal,
        windowed,
        parts,
        few_parts,
    ):
        padded = padded_head(head_size)
        self.HEAD_SIZE = gl.constexpr(head_size)
        self.PADDED = gl.constexpr(padded)
        self.CHUNKS = gl.constexpr(score_chunks(head_size))
        self.BLOCK_M = gl.constexpr(block_m)
        self.BLOCK_N = gl.constexpr(block_n)
        self.PAGE = gl.constexpr(page)
        self.BOX = gl.constexpr(box)
        self.GROUP = gl.constexpr(group)
        self.NUM_KV_HEADS = gl.constexpr(num_kv_heads)
        self.CONSUMERS = gl.constexpr(1)
        self.WARPGROUPS = gl.constexpr(1)
        self.STAGES = gl.constexpr(stages)
        self.Q_STAGES = gl.constexpr(1)
        self.CAUSAL = gl.constexpr(causal)
        self.WINDOWED = gl.constexpr(windowed)
        self.TURNS = gl.constexpr(False)
        self.BOUNDED = gl.constexpr(False)
        self.PARTS = gl.constexpr(parts)
        self.FEW_PARTS = gl.constexpr(few_parts)
        self.S_LAYOUT = gl.constexpr(wgmma_layout(block_n))
        self.O_LAYOUT = gl.constexpr(wgmma_layout(padded))
        self.P_LAYOUT = gl.constexpr(
            gl.DotOperandLayout(0, wgmma_layout(padded), k_width=2)
        )
        self.KV_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
        # [rows, parts, columns]: a warp has one row or two, a thread four neighbouring
        # columns.
        self.COMBINE_LAYOUT = gl.constexpr(
            gl.BlockedLayout([1, 1, 4], [1, 1, 32], [4, 1, 1], [2, 1, 0])
        )
        # [rows, parts]: a warp has one row or two, a lane a part; of few some the same.
        self.STATS_LAYOUT = gl.constexpr(
            gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        )


@aggregate
class Line:
    """A worker's line of tiles and how it is cut: the same for all of its rows."""

    tiles_per_piece: gl.tensor
    abreast: gl.tensor
    piece: gl.tensor
    first_of_line: gl.tensor

    @gluon.constexpr_function
    def __init__(self, tiles_per_piece, abreast, piece, first_of_line):
        self.tiles_per_piece = tiles_per_piece
        self.abreast = abreast
        self.piece = piece
        self.first_of_line = first_of_line


@aggregate
class Place:
    """Where a worker is: in which row, at which of its tiles, with how many to do."""

    seq: gl.tensor
    q_start: gl.tensor
    query_len: gl.tensor
    seq_len: gl.tensor
    entry: gl.tensor  # of the list of sequences
    kv_head: gl.tensor
    m_block: gl.tensor  # tile of query rows
    tile: gl.tensor
    remaining: gl.tensor

    @gluon.constexpr_function
    def __init__(
        self, seq, q_start, query_len, seq_len, entry, kv_head, m_block, tile, remaining
    ):
        self.seq = seq
        self.q_start = q_start
        self.query_len = query_len
        self.seq_len = seq_len
        self.entry = entry
        self.kv_head = kv_head
        self.m_block = m_block
        self.tile = tile
        self.remaining = remaining


@gluon.jit
def load_worker(workers):
    record = workers + gl.program_id(0) * WORKER_FIELDS
    place = Place(
        gl.load(record),
        gl.load(record + 1),
        gl.load(record + 2),
        gl.load(record + 3),
        gl.load(record + 4),
        gl.load(record + 5),
        gl.load(record + 6),
        gl.load(record + 7),
        gl.load(record + 8),
    )
    line = Line(
        gl.load(record + 9),
        gl.load(record + 10),
        gl.load(record + 11),
        gl.load(record + 12),
    )
    return place, line


@gluon.jit
def next_row(cfg, place, line, sequences, num_tiles):
    """The place after num_tiles tiles: the beginning of another row, if any remain."""
    remaining = place.remaining - num_tiles
    kv_head = place.kv_head + line.abreast
    is_past = kv_head >= cfg.NUM_KV_HEADS
    kv_head = gl.where(is_past, kv_head - cfg.NUM_KV_HEADS, kv_head)
    m_block = gl.where(is_past, place.m_block + 1, place.m_block)
    seq = place.seq
    q_start = place.q_start
    query_len = place.query_len
    seq_len = place.seq_len
    entry = place.entry
    if (remaining > 0) & (m_block * cfg.BLOCK_M >= query_len * cfg.GROUP):
        m_block = m_block * 0
        entry += 1
        record = sequences + entry * SEQUENCE_FIELDS
        seq = gl.load(record)
        q_start = gl.load(record + 1)
        query_len = gl.load(record + 2)
        seq_len = gl.load(record + 3)
    return Place(
        seq, q_start, query_len, seq_len, entry, kv_head, m_block, place.tile * 0,
        remaining,
    )  # fmt: skip


@gluon.jit
def first_seen_key(cfg, place, window):
    """The first key that any query of the sequence sees."""
    key = place.tile * 0
    if cfg.WINDOWED:
        position = place.seq_len - place.query_len
        key = gl.maximum(position - window + 1, 0)
    return key


@gluon.jit
def row_tiles(cfg, place, window):
    """The first tile of the row's keys, their number, and how many of them are the
    worker's."""
    first = first_seen_key(cfg, place, window) // cfg.BLOCK_N
    total = gl.maximum(gl.cdiv(place.seq_len, cfg.BLOCK_N) - first, 1)
    return first, total, gl.minimum(place.remaining, total - place.tile)


@gluon.jit
def valid_rows(cfg, place):
    """How many rows of the tile are queries: the first ones."""
    rows = place.query_len * cfg.GROUP - place.m_block * cfg.BLOCK_M
    return gl.minimum(rows, cfg.BLOCK_M)


# --------------------------------------------------------------- producer


@gluon.jit
def load_queries(cfg, rings, q_desc, place, turn):
    PANELS: gl.constexpr = cfg.PADDED // PANEL
    LOADED: gl.constexpr = (cfg.HEAD_SIZE + PANEL - 1) // PANEL
    panels = rings.q._reinterpret(
        rings.q.dtype, [PANELS, CONSUMER_ROWS, PANEL], cfg.KV_LAYOUT
    )
    token = place.q_start + place.m_block * (cfg.BLOCK_M // cfg.GROUP)
    head = place.kv_head * cfg.GROUP
    mbarrier.wait(rings.q_free.index(0), turn % 2 ^ 1)
    mbarrier.expect(rings.q_full.index(0), cfg.BLOCK_M * LOADED * PANEL * 2)
    for panel in gl.static_range(LOADED):
        tma.async_copy_global_to_shared(
            q_desc,
            [token, head, panel * PANEL],
            rings.q_full.index(0),
            panels.index(panel).slice(0, cfg.BLOCK_M),
        )


@gluon.jit
def producer(
    cfg, rings, q_desc, k_desc, v_desc, block_table, block_table_stride, place, line,
    sequences, window,
):  # fmt: skip
    """Feed all tiles of a worker's piece, those of each row last one first."""
    turn = 0
    count = gl.to_tensor(0).to(gl.uint32)  # key tiles fetched so far
    while place.remaining > 0:
        first, _, num_tiles = row_tiles(cfg, place, window)
        pages = block_table + place.seq.to(gl.int64) * block_table_stride
        first_page = first_seen_key(cfg, place, window) // cfg.PAGE
        last_page = gl.maximum(place.seq_len - 1, 0) // cfg.PAGE
        begin = first + place.tile
        last = begin + num_tiles - 1
        load_tile(
            cfg, k_desc, rings.k, rings.k_full, rings.k_free, count, pages,
            first_page, last_page, place.kv_head, last,
        )  # fmt: skip
        # Second, as its place may be in use until the row before ends.
        load_queries(cfg, rings, q_desc, place, turn)
        load_tile(
            cfg, v_desc, rings.v, rings.v_full, rings.v_free, count, pages,
            first_page, last_page, place.kv_head, last,
        )  # fmt: skip
        count += 1
        for tile in range(last - 1, begin - 1, -1):
            load_tile(
                cfg, k_desc, rings.k, rings.k_full, rings.k_free, count, pages,
                first_page, last_page, place.kv_head, tile,
            )  # fmt: skip
            load_tile(
                cfg, v_desc, rings.v, rings.v_full, rings.v_free, count, pages,
                first_page, last_page, place.kv_head, tile,
            )  # fmt: skip
            count += 1
        turn += 1
        place = next_row(cfg, place, line, sequences, num_tiles)


# --------------------------------------------------------------- consumer


@gluon.jit
def mask_scores(cfg, s, position, seq_len, window, first_key):
    """-inf where a row must not see a key.  s: [64, BLOCK_N], position: [64]"""
    end = position * 0 + seq_len
    if cfg.CAUSAL:
        end = gl.minimum(end, position + 1)
    elif cfg.WINDOWED:
        end = gl.minimum(end, position + window)
    keys = gl.arange(0, cfg.BLOCK_N, gl.SliceLayout(0, cfg.S_LAYOUT))
    keys = gl.expand_dims(keys, 0)
    s = keep_if("lt", s, keys, end - first_key)
    if cfg.WINDOWED:
        s = keep_if("ge", s, keys, position - window + 1 - first_key)
    return s


@gluon.jit
def mask_where_needed(cfg, s, place, position, seen_by_all, tile, window):
    """Masks a tile unless all rows see all of it: keys below `seen_by_all`, and with a
    window those that the last query sees."""
    first_key = tile * cfg.BLOCK_N
    is_cut = first_key + cfg.BLOCK_N > seen_by_all
    if cfg.WINDOWED:
        is_cut = is_cut | (first_key < place.seq_len - window)
    if is_cut:
        s = mask_scores(cfg, s, position, place.seq_len, window, first_key)
    return s


@gluon.jit
def weigh(cfg, s, row_max, row_sum, scale_log2):
    """Probabilities of a tile of scores [64, BLOCK_N], the factor [64] for what was
    summed before, and the new maximum [64] and sums [64, LANES]."""
    new_max = running_max(cfg, s, row_max, scale_log2)
    p, decay = probabilities(cfg, s, row_max, new_max, scale_log2, True)
    row_sum = row_sum * per_row(decay, row_sum) + lane_sums(cfg, p)
    return p, decay, new_max, row_sum


@gluon.jit
def attend_row(cfg, rings, place, count, turn, begin, num_tiles, scale_log2, window):
    """Softmax state of tiles [begin, begin + num_tiles) of a row, last one first:
    [64, PADDED], [64], [64]; and the count of tiles used so far."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, cfg.S_LAYOUT)
    position = place.seq_len - place.query_len
    position += place.m_block * (cfg.BLOCK_M // cfg.GROUP)
    seen_by_all = place.seq_len
    if cfg.CAUSAL:
        seen_by_all = gl.minimum(seen_by_all, position + 1)
    elif cfg.WINDOWED:
        seen_by_all = gl.minimum(seen_by_all, position + window)
    position += gl.arange(0, CONSUMER_ROWS, LAYOUT) // cfg.GROUP
    tile = begin + num_tiles - 1
    slot = ring_slot(cfg, count)
    phase = ring_phase(cfg, count)
    mbarrier.wait(rings.q_full.index(0), turn % 2)
    mbarrier.wait(rings.k_full.index(slot), phase)
    s = issue_scores(cfg, rings, 0, slot)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(rings.k_free.index(slot))
    s = mask_where_needed(cfg, s, place, position, seen_by_all, tile, window)
    row_max = gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, LAYOUT)
    row_sum = lane_sums(cfg, gl.zeros_like(s))
    p, _, row_max, row_sum = weigh(cfg, s, row_max, row_sum, scale_log2)
    keys = place.seq_len - tile * cfg.BLOCK_N
    if keys < cfg.BLOCK_N:  # no tile but a row's last reaches beyond the sequence
        mbarrier.wait(rings.v_full.index(slot), phase)
        zero_rows(cfg, rings.v.index(slot), keys)
    acc = gl.zeros([CONSUMER_ROWS, cfg.PADDED], gl.float32, cfg.O_LAYOUT)
    for i in range(1, num_tiles):
        v_slot = slot
        v_phase = phase
        slot = ring_slot(cfg, count + i)
        phase = ring_phase(cfg, count + i)
        mbarrier.wait(rings.k_full.index(slot), phase)
        s = issue_scores(cfg, rings, 0, slot)
        operand = gl.convert_layout(p.to(rings.v.dtype), cfg.P_LAYOUT)
        mbarrier.wait(rings.v_full.index(v_slot), v_phase)
        acc = warpgroup_mma(operand, rings.v.index(v_slot), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        s = mask_where_needed(cfg, s, place, position, seen_by_all, tile - i, window)
        p, decay, row_max, row_sum = weigh(cfg, s, row_max, row_sum, scale_log2)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(rings.k_free.index(slot))
        mbarrier.arrive(rings.v_free.index(v_slot))
        decay = gl.convert_layout(decay, gl.SliceLayout(1, cfg.O_LAYOUT))
        acc = acc * gl.expand_dims(decay, 1)
    mbarrier.arrive(rings.q_free.index(0))
    operand = gl.convert_layout(p.to(rings.v.dtype), cfg.P_LAYOUT)
    mbarrier.wait(rings.v_full.index(slot), phase)
    acc = warpgroup_mma(operand, rings.v.index(slot), acc)
    mbarrier.arrive(rings.v_free.index(slot))
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), LAYOUT)
    return acc, row_max, row_sum, count + num_tiles


@gluon.jit
def write_rows(cfg, place, target, sinks, acc, row_max, row_sum, rows, columns):
    """Normalise rows of a tile and write those that are queries.

    acc: [R, PADDED]; row_max, row_sum, rows: [R], columns: [PADDED], in its layout.
    """
    output, lse, token_stride, head_stride, lse_stride = target
    row = place.m_block * cfg.BLOCK_M + rows
    token = (place.q_start + row // cfg.GROUP).to(gl.int64)
    head = place.kv_head * cfg.GROUP + row % cfg.GROUP
    valid = rows < valid_rows(cfg, place)
    if sinks is not None:
        sink = gl.load(sinks + head).to(gl.float32) * LOG2E
        new_max = gl.maximum(row_max, sink)
        decay = gl.exp2(row_max - new_max)
        acc = acc * gl.expand_dims(decay, 1)
        row_sum = row_sum * decay + gl.exp2(sink - new_max)
        row_max = new_max
    inverse = gl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)
    out = (acc * gl.expand_dims(inverse, 1)).to(output.dtype.element_ty)
    offsets = gl.expand_dims(token * token_stride + head * head_stride, 1)
    mask = gl.expand_dims(valid, 1)
    if cfg.HEAD_SIZE != cfg.PADDED:
        mask = mask & gl.expand_dims(columns < cfg.HEAD_SIZE, 0)
    gl.store(output + offsets + gl.expand_dims(columns, 0), out, mask=mask)
    if lse is not None:
        value = (row_max + gl.log2(row_sum)) * LN2
        value = gl.where(row_sum > 0.0, value, float("-inf"))
        gl.store(lse + token * lse_stride + head, value, mask=valid)


@gluon.jit
def leave_partial(cfg, place, partials, slot, acc, row_max, row_sum):
    """Leave the state of a share of a row's keys, as `combine.leave_partial` does.

    acc: [64, PADDED]; row_max, row_sum: [64].
    """
    LAYOUT: gl.constexpr = gl.SliceLayout(1, cfg.O_LAYOUT)
    rows = gl.arange(0, CONSUMER_ROWS, LAYOUT)
    columns = gl.arange(0, cfg.PADDED, gl.SliceLayout(0, cfg.O_LAYOUT))
    valid = rows < valid_rows(cfg, place)
    stat = slot.to(gl.int64) * cfg.BLOCK_M + rows
    offsets = gl.expand_dims(stat * cfg.PADDED, 1) + gl.expand_dims(columns, 0)
    gl.store(partials[0] + offsets, acc, mask=gl.expand_dims(valid, 1))
    gl.store(partials[1] + stat, gl.convert_layout(row_max, LAYOUT), mask=valid)
    gl.store(partials[2] + stat, gl.convert_layout(row_sum, LAYOUT), mask=valid)


@gluon.jit
def write_combined(cfg, place, target, sinks, partials, first_place, num_parts):
    """Combine the partials of a row of the line in the order of the keys, and write its
    query rows, more of them at once where they have few parts."""
    if num_parts <= cfg.FEW_PARTS:
        combine_rows(
            cfg, place, target, sinks, partials, first_place, num_parts,
            2 * WARPS, cfg.FEW_PARTS,
        )  # fmt: skip
    else:
        combine_rows(
            cfg, place, target, sinks, partials, first_place, num_parts,
            WARPS, cfg.PARTS,
        )  # fmt: skip


@gluon.jit
def combine_rows(
    cfg, place, target, sinks, partials, first_place, num_parts,
    AT_ONCE: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As `write_combined`, AT_ONCE query rows and PARTS partials of each at a time."""
    STATS: gl.constexpr = cfg.STATS_LAYOUT
    STAT_ROWS: gl.constexpr = gl.SliceLayout(1, STATS)
    ACC_STATS: gl.constexpr = gl.SliceLayout(2, cfg.COMBINE_LAYOUT)
    SUMMED: gl.constexpr = gl.SliceLayout(1, cfg.COMBINE_LAYOUT)
    ROWS: gl.constexpr = gl.SliceLayout(1, SUMMED)
    ACC_COLUMNS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, cfg.COMBINE_LAYOUT))
    acc_columns = gl.arange(0, cfg.PADDED, ACC_COLUMNS)
    num_rows = valid_rows(cfg, place)
    first_stat = 2 * first_place.to(gl.int64) * cfg.BLOCK_M
    columns = gl.arange(0, cfg.PADDED, gl.SliceLayout(0, SUMMED))
    for first_row in range(0, num_rows, AT_ONCE):
        acc = gl.zeros([AT_ONCE, cfg.PADDED], gl.float32, SUMMED)
        row_max = gl.full([AT_ONCE], float("-inf"), gl.float32, STAT_ROWS)
        row_sum = gl.zeros([AT_ONCE], gl.float32, STAT_ROWS)
        for start in range(0, num_parts, PARTS):
            stat, valid = partial_stats(
                cfg, first_row, start, num_rows, num_parts, AT_ONCE, PARTS, ACC_STATS
            )
            offsets = gl.expand_dims(stat * cfg.PADDED, 2)
            offsets += gl.expand_dims(gl.expand_dims(acc_columns, 0), 0)
            part_acc = gl.load(
                partials[0] + first_stat * cfg.PADDED + offsets,
                mask=gl.expand_dims(valid, 2),
                other=0.0,
                cache_modifier=".cg",
            )  # [AT_ONCE, PARTS, PADDED]
            # Maxima and sums once a warp, not once a thread.
            stat, valid = partial_stats(
                cfg, first_row, start, num_rows, num_parts, AT_ONCE, PARTS, STATS
            )
            part_max = gl.load(
                partials[1] + first_stat + stat,
                mask=valid,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            part_sum = gl.load(
                partials[2] + first_stat + stat,
                mask=valid,
                other=0.0,
                cache_modifier=".cg",
            )
            new_max = gl.maximum(row_max, gl.max(part_max, 1))
            base = gl.where(new_max == float("-inf"), 0.0, new_max)
            decay = gl.exp2(row_max - base)
            weight = gl.exp2(part_max - gl.expand_dims(base, 1))
            row_sum = row_sum * decay + gl.sum(part_sum * weight, 1)
            row_max = new_max
            weight = gl.expand_dims(gl.convert_layout(weight, ACC_STATS), 2)
            acc = acc * gl.expand_dims(gl.convert_layout(decay, ROWS), 1)
            acc += gl.sum(part_acc * weight, 1)
        write_rows(
            cfg, place, target, sinks, acc,
            gl.convert_layout(row_max, ROWS), gl.convert_layout(row_sum, ROWS),
            first_row + gl.arange(0, AT_ONCE, ROWS), columns,
        )  # fmt: skip


@gluon.jit
def partial_stats(
    cfg, first_row, start, num_rows, num_parts,
    AT_ONCE: gl.constexpr, PARTS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where partials of some rows lie, counted in rows from slot 0 of the first piece,
    and which exist.  [AT_ONCE, PARTS] each"""
    rows = first_row + gl.arange(0, AT_ONCE, gl.SliceLayout(1, LAYOUT))
    parts = start + gl.arange(0, PARTS, gl.SliceLayout(0, LAYOUT))
    # Slot 1 of the piece that starts the row, slot 0 of those that go on.
    slots = 2 * parts + gl.where(parts == 0, 1, 0)
    stat = gl.expand_dims(slots * cfg.BLOCK_M, 0) + gl.expand_dims(rows, 1)
    valid = gl.expand_dims(parts < num_parts, 0) & gl.expand_dims(rows < num_rows, 1)
    return stat, valid


@gluon.jit
def consumer(
    cfg, rings, target, sinks, partials, arrivals, place, line, sequences, scale_log2,
    window,
):  # fmt: skip
    """Attend a worker's piece, row by row; see `decode_kernel`."""
    turn = 0
    count = gl.to_tensor(0).to(gl.uint32)  # key tiles used so far
    position = line.piece * line.tiles_per_piece  # on the line of tiles
    while place.remaining > 0:
        first, total, num_tiles = row_tiles(cfg, place, window)
        acc, row_max, row_sum, count = attend_row(
            cfg, rings, place, count, turn, first + place.tile, num_tiles, scale_log2,
            window,
        )  # fmt: skip
        if num_tiles == total:
            ROWS: gl.constexpr = gl.SliceLayout(1, cfg.O_LAYOUT)
            write_rows(
                cfg, place, target, sinks, acc,
                gl.convert_layout(row_max, ROWS), gl.convert_layout(row_sum, ROWS),
                gl.arange(0, CONSUMER_ROWS, ROWS),
                gl.arange(0, cfg.PADDED, gl.SliceLayout(0, cfg.O_LAYOUT)),
            )  # fmt: skip
        else:
            row_begin = position - place.tile
            first_piece = row_begin // line.tiles_per_piece
            last_piece = (row_begin + total - 1) // line.tiles_per_piece
            first_place = line.first_of_line + first_piece
            slot = 2 * (line.first_of_line + line.piece)
            slot += gl.where(place.tile == 0, 1, 0)
            leave_partial(cfg, place, partials, slot, acc, row_max, row_sum)
            gl.thread_barrier()  # every thread's stores come before the arrival
            arrived = gl.atomic_add(arrivals + first_place, 1, sem="acq_rel")
            if arrived == last_piece - first_piece:
                gl.store(arrivals + first_place, 0)
                write_combined(
                    cfg, place, target, sinks, partials, first_place,
                    last_piece - first_piece + 1,
                )  # fmt: skip
        position += num_tiles
        turn += 1
        place = next_row(cfg, place, line, sequences, num_tiles)


# ----------------------------------------------------------------- kernel


# Microbatches slice what is per sequence anywhere: alignment must make no variant.
@gluon.jit(
    do_not_specialize=["block_table", "block_table_stride", "lse_stride", "window"],
)
def hopper_decode_kernel(
    # [num_tokens, num_query_heads, HEAD_SIZE], box [BLOCK_M / GROUP, GROUP, 64]
    q_desc,
    k_desc,  # [num_blocks, PAGE, NUM_KV_HEADS, HEAD_SIZE], box [1, BOX, 1, 64]
    v_desc,  # like k_desc
    output,  # [num_tokens, num_query_heads, HEAD_SIZE]
    lse,  # [num_tokens, num_query_heads] or None
    block_table,  # [num_seqs, max_blocks]
    workers,  # [num_workers, WORKER_FIELDS]
    sequences,  # [num_seqs, SEQUENCE_FIELDS]
    acc_partials,  # [2 * num_workers, BLOCK_M, PADDED] fp32
    max_partials,  # [2 * num_workers, BLOCK_M] fp32
    sum_partials,
    arrivals,  # [num_workers], zero between launches
    sinks,  # [num_query_heads] or None
    output_token_stride,
    output_head_stride,
    lse_stride,
    block_table_stride,
    scale_log2,
    window,
    HEAD_SIZE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE: gl.constexpr,
    GROUP: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
    PARTS: gl.constexpr,
    FEW_PARTS: gl.constexpr,
    OVERLAPS: gl.constexpr,  # the launch before may still run; see `overlap`
):
    # In slots that are one page's; where pages overlap, each is a page's first.
    BOX: gl.constexpr = k_desc.block_shape[0] * k_desc.block_shape[1]
    cfg = DecodeConfig(
        HEAD_SIZE, BLOCK_M, BLOCK_N, PAGE, BOX, GROUP, NUM_KV_HEADS, STAGES, CAUSAL,
        WINDOWED, PARTS, FEW_PARTS,
    )  # fmt: skip
    place, line = load_worker(workers)  # on their way while barriers are made
    rings = make_rings(cfg, k_desc.dtype)
    target = (output, lse, output_token_stride, output_head_stride, lse_stride)
    partials = (acc_partials, max_partials, sum_partials)
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    cfg, rings, target, sinks, partials, arrivals, place, line,
                    sequences, scale_log2, window,
                ),
            ),
            (
                producer,
                (
                    cfg, rings, q_desc, k_desc, v_desc, block_table,
                    block_table_stride, place, line, sequences, window,
                ),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
    if OVERLAPS:  # what follows may read what prefills write
        await_launch_before()
