# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CUDA graphs and compilation: one capture serves every later batch.

vLLM captures a step with dummy lengths and replays it with others in the same
buffers: shorter and longer sequences, fewer of them, other pages, other data. In
the interpreter the step is simply called again: its host integers stay those of the
capture, and only the buffers' contents are new.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    HALF_DTYPES,
    KV_FP8_DTYPES,
    ON_GPU,
    Batch,
    HopperConfig,
    call,
    compare,
    gpu_only,
    hopper_config,
    make_batch,
    make_schedule,
    poison,
    poisoned_scratch,
    update,
)
from tests.kernels.attention.conch_reference import SENTINEL

SHAPE = {"num_query_heads": 4, "num_kv_heads": 1, "head_size": 16, "block_size": 16}
if ON_GPU:
    SHAPE |= {"num_query_heads": 8, "num_kv_heads": 2, "head_size": 64}
HALF = HALF_DTYPES[-1]


class StaticBatch:
    """Buffers of fixed addresses, as vLLM's model runner has, that batches fill."""

    def __init__(self, largest: Batch, max_query_len: int, num_blocks: int) -> None:
        """Makes buffers of the shapes of the largest batch."""
        self.batch = largest
        self.batch.max_query_len = max_query_len
        for name in ("key_cache", "value_cache"):
            cache = getattr(largest, name)
            setattr(largest, name, cache.new_empty(num_blocks, *cache.shape[1:]))
        dtype = largest.output_dtype or largest.query.dtype
        self.output = torch.empty_like(largest.query, dtype=dtype)
        self.lse = torch.empty(largest.query.shape[:2], device=DEVICE)

    def load(self, batch: Batch) -> None:
        """Copies a batch in; sequences that it lacks become empty, as padding does."""
        mine = self.batch
        for name in ("query", "key_cache", "value_cache"):
            source = getattr(batch, name)
            poison(getattr(mine, name))[: len(source)].copy_(source)
        num_seqs, width = batch.block_table.shape
        mine.query_start_loc.fill_(batch.num_live_tokens)
        mine.query_start_loc[: num_seqs + 1] = batch.query_start_loc
        mine.seq_lens.zero_()
        mine.seq_lens[:num_seqs] = batch.seq_lens
        mine.block_table.fill_(2**31 - 1)
        mine.block_table[:num_seqs, :width] = batch.block_table
        self.output.fill_(SENTINEL)
        self.lse.fill_(SENTINEL)

    def compare(self, hopper: HopperConfig | None) -> None:
        live = self.batch.num_live_tokens
        compare(self.batch, self.output[:live], self.lse[:live], hopper=hopper)
        assert bool((self.output[live:] == SENTINEL).all())
        assert bool((self.lse[live:] == SENTINEL).all())


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """What replays a step, after the eager run that compiles its kernels."""
    step()
    if not ON_GPU:
        return step
    torch.accelerator.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


LONG = 4096 if ON_GPU else 70
# Longest query of the graph, the batch of the capture and those of the replays.
GRAPHS = {
    "decode": (
        1,
        [(1, LONG)] * 8,
        [
            [(1, 1)] * 8,
            [(1, LONG // 7 * i + 1) for i in range(6)],
            [(1, LONG)],
            [(1, 17), (0, 0), (1, LONG - 1), (0, 0)],
            [(0, 0)],
        ],
    ),
    "verify": (
        5,
        [(5, LONG // 2)] * 6,
        [[(5, 5)] * 6, [(5, LONG - 1), (1, 30), (3, 3)], [(2, LONG)] * 5, [(5, 9)]],
    ),
    "mixed": (
        80,
        [(80, 80)] + [(1, LONG - 1)] * 5,
        [
            [(1, LONG)] * 6,
            [(40, 60), (1, 1), (20, 20), (5, LONG - 1), (1, LONG // 2)],
            [(80, LONG + 80)],
            [(14, 14)] * 6,
            [(17, 17)] * 5,
            [(1, 40)],
        ],
    ),
    "capture_dummies": (1, [(1, 0)] * 4, [[(1, LONG)] * 4, [(1, 3), (1, 65)]]),
}
# Inside the graph, or before each replay: as padded for it, or as the batch is.
UPDATES = ["graph", "padded batch"]
OPTIONS = {"plain": {}}
if ON_GPU:
    UPDATES.append("batch")
    OPTIONS["window"] = {"sliding_window": 100}
    # Whose decodes have a kernel of Hopper's own.
    OPTIONS["head_128"] = {"head_size": 128}
    OPTIONS["head_128_window"] = {"head_size": 128, "sliding_window": 100}
    OPTIONS["fp8_softcap"] = {
        "kv_dtype": KV_FP8_DTYPES[0],
        "k_scale": 0.5,
        "v_scale": 2.0,
        "softcap": 30.0,
    }
    if KV_FP8_DTYPES[0] == torch.float8_e4m3fn:
        scaled = OPTIONS["fp8_softcap"] | {"softcap": 0.0, "q_scale": 0.25}
        OPTIONS["fp8_query"] = scaled | {"query_dtype": KV_FP8_DTYPES[0]}


@pytest.mark.parametrize("update_from", UPDATES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name", GRAPHS)
def test_replay(name, options, update_from):
    max_query_len, captured, replays = GRAPHS[name]
    options = {**SHAPE, **options, "dtype": HALF, "padding": 0}
    # A block table and a pool that hold every batch of these tests.
    pages = LONG // SHAPE["block_size"] + 10
    widest = make_batch([*captured[1:], (captured[0][0], LONG + 100)], **options)
    static = StaticBatch(widest, max_query_len, num_blocks=len(captured) * pages)
    schedule = make_schedule(static.batch)

    def step() -> None:
        if update_from == "graph":
            update(schedule, static.batch)
        for _ in range(2):  # Two layers share the schedule.
            call(static.batch, static.output, static.lse, schedule)

    static.load(make_batch(captured, **options))
    update(schedule, static.batch)
    replay = capture(step)
    for seed, lengths in enumerate([*replays, captured, replays[0]]):
        batch = make_batch(lengths, seed=seed, **options)
        static.load(batch)
        batch.max_query_len = max_query_len
        if update_from != "graph":
            update(schedule, batch if update_from == "batch" else static.batch)
        replay()
        static.compare(hopper_config(schedule))


def test_replay_is_bitwise_repeatable():
    lengths = [(1, LONG // 8 * i + 1) for i in range(8)]
    batch = make_batch(lengths, **SHAPE, dtype=HALF)
    output, lse = (
        torch.empty_like(batch.query),
        torch.empty(batch.query.shape[:2], device=DEVICE),
    )
    schedule = update(make_schedule(batch), batch)
    replay = capture(lambda: call(batch, output, lse, schedule))
    replay()
    compare(batch, output[:8], lse[:8])
    expected = output.clone()
    for _ in range(100 if ON_GPU else 2):
        output.fill_(SENTINEL)
        replay()
        assert torch.equal(output[:8], expected[:8])


@gpu_only
def test_nothing_compiles_while_serving(monkeypatch):
    """After one batch of each kind, 200 random ones find every kernel compiled."""
    from vllm.triton_utils import triton

    compiled = []
    hook = lambda **event: compiled.append(event["fn"].name)  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    options = {**SHAPE, "head_size": 96, "block_size": 48, "dtype": HALF}
    rows, max_blocks, max_num_seqs = 1024, 64, 33
    random = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    pool = make_batch([(rows, 3000)], **options)
    schedule = make_schedule(pool, max_num_seqs=max_num_seqs, decode_query_len=5)
    table = torch.randint(1, len(pool.key_cache), (max_num_seqs, max_blocks))
    pool.key_cache.normal_()
    pool.value_cache.normal_()
    table = table.to(pool.block_table)
    output = torch.empty_like(pool.query)

    def serve(
        lengths: list[tuple[int, int]], max_query_len: int, is_known: bool = False
    ) -> None:
        ends = torch.tensor([0] + [q for q, _ in lengths]).cumsum(0)
        num_tokens = int(ends[-1])
        pool.query_start_loc = ends.to(pool.query_start_loc)
        pool.seq_lens = torch.tensor([s for _, s in lengths]).to(pool.seq_lens)
        pool.block_table = table[: len(lengths)]
        pool.max_query_len = max_query_len
        step = Batch(**{**vars(pool), "query": whole_query[:num_tokens]})
        known = {}
        if is_known:
            known = schedule.look_at(*np.array(lengths).T, may_overlap=True)._asdict()
        update(schedule, step, **known)
        call(step, output[:num_tokens], schedule=schedule)

    whole_query = pool.query
    for query_len in (1, 5, 16, 17, 128):
        serve([(query_len, 200)], query_len)
    serve([(17, 17)], 17, is_known=True)
    serve([(128, 3000)], 128, is_known=True)
    unsplit = schedule.least_unsplit_len()
    if unsplit is not None:
        serve([(unsplit, unsplit)], unsplit)
    warm = len(compiled)
    assert warm > 0
    for _ in range(200):
        longest = [1, 5, draw(1, 16), draw(17, 400)][draw(0, 3)]
        lengths = [(longest, draw(longest, 3000))]
        while len(lengths) < draw(1, max_num_seqs):
            query_len = draw(1, min(longest, 20))
            lengths.append((query_len, draw(query_len, 3000)))
        serve(lengths, longest, is_known=bool(draw(0, 1)))
    assert compiled[warm:] == []
