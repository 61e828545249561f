# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decodes beside prefills: who gets which multiprocessors, and what comes of it."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from tests.kernels.attention.conch_devices import DEVICES
from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    ON_GPU,
    ON_HOPPER,
    call,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
    use_hopper,
)
from vllm.attention.ops.conch import hopper_prefill
from vllm.attention.ops.conch import schedule as schedule_module
from vllm.attention.ops.conch.launch import BoundLaunch
from vllm.attention.ops.conch.overlap import Work, count_work, prefill_units
from vllm.attention.ops.conch.plan import AttentionPlan, Shape, make_plan

H200 = DEVICES["H200"]
BF16 = torch.bfloat16


# ---------------------------------------------------------------- estimates


def hopper_plan(monkeypatch, shape: Shape, **options) -> AttentionPlan:
    """A plan for prefills and decodes on an H200, whatever Triton there is."""
    monkeypatch.setattr(hopper_prefill, "TRITON_VERSIONS", ("",))
    make_plan.cache_clear()
    plan = make_plan(shape, H200, 1, **{"has_prefills": True} | options)
    make_plan.cache_clear()
    return plan


def layer(num_heads=32, num_kv_heads=8, head_size=128, kv_dtype=BF16) -> Shape:
    query_dtype = kv_dtype if kv_dtype.itemsize == 1 else BF16
    return Shape(num_heads, num_kv_heads, head_size, 128, query_dtype, kv_dtype)


def items(lengths: Sequence[tuple[int, int]], plan: AttentionPlan) -> int:
    """Tiles of prefill rows, of all heads."""
    rows = (-(-q * plan.prefill_pack // plan.prefill_rows) for q, _ in lengths if q > 4)
    return sum(rows) * plan.head_tiles


def work_of(lengths: Sequence[tuple[int, int]], shape: Shape) -> Work:
    query_lens, seq_lens = np.array(lengths).T
    return count_work(query_lens, seq_lens, query_lens > 4, 64 / shape.group, None)


@pytest.mark.parametrize(
    "lengths, heads, least, most",
    [
        # Within 2% of the best that was measured on an H200.
        ([(2048, 2048)] + [(1, 4096)] * 64, (32, 8), 60, 68),
        ([(2048, 16384)] + [(1, 4096)] * 64, (32, 8), 104, 112),
        ([(512, 8192)] * 4 + [(1, 8192)] * 64, (32, 8), 76, 88),
        ([(2048, 2048)] + [(1, 4096)] * 16, (8, 1), 76, 104),
        ([(1024, 1024)] + [(4, 8192)] * 16, (32, 8), 48, 68),
        # Tiles of 20 rows, of which 64 are computed: not measured.
        ([(20, 8192)] * 32 + [(1, 4096)] * 64, (32, 8), 92, 112),
    ],
)
def test_shares_that_were_measured(lengths, heads, least, most, monkeypatch):
    shape = layer(*heads)
    plan = hopper_plan(monkeypatch, shape)
    work = work_of(lengths, shape)
    units = prefill_units(work, items(lengths, plan), plan, shape, H200)
    assert units is not None and least <= units <= most


@pytest.mark.parametrize(
    "lengths, least, most",
    [
        # 80 have five parts of 16 items: no fewer have as many.
        ([(64, 32768)] + [(1, 4096)] * 16, 80, 84),
        ([(256, 32768)] + [(1, 4096)] * 64, 84, 92),
    ],
)
def test_shares_of_split_prefills(lengths, least, most, monkeypatch):
    shape = layer()
    plan = hopper_plan(monkeypatch, shape, split_query_len=lengths[0][0])
    assert plan.split is not None
    work = work_of(lengths, shape)
    units = prefill_units(work, items(lengths, plan), plan, shape, H200)
    assert units is not None and least <= units <= most


@pytest.mark.parametrize(
    "lengths",
    [
        # In turn they were as fast or faster.
        [(20, 20)] + [(1, 1024)] * 64,
        [(8192, 8192), (1, 8192)],
        # There is but one of both.
        [(2048, 2048)],
        [(1, 4096)] * 64,
    ],
)
def test_batches_that_are_done_in_turn(lengths, monkeypatch):
    shape = layer()
    plan = hopper_plan(monkeypatch, shape)
    work = work_of(lengths, shape)
    num_items = max(items(lengths, plan), 1)
    assert prefill_units(work, num_items, plan, shape, H200) is None


MIXED = Work(2048, 2048 * 1024, 2048, 64 * 4096)


@pytest.mark.parametrize(
    "shape, options, device",
    [
        (layer(head_size=64), {}, H200),
        (layer(head_size=256), {}, H200),
        (layer(kv_dtype=torch.float8_e4m3fn), {}, H200),
        (layer(), {"portable": True}, H200),
        (layer(), {"batch_invariant": True}, H200),
        (layer(), {"has_prefills": False}, H200),
        (layer(), {}, replace(H200, num_units=78)),  # as an H20
        (layer(), {}, replace(H200, bandwidth=2e12)),  # as an H100 with PCIe
        (layer(), {}, replace(H200, bandwidth=0.0)),
    ],
)
def test_where_no_share_was_measured(shape, options, device, monkeypatch):
    plan = hopper_plan(monkeypatch, layer())
    assert prefill_units(MIXED, 512, plan, layer(), H200) is not None
    plan = hopper_plan(monkeypatch, shape, **options)
    assert prefill_units(MIXED, 512, plan, shape, device) is None


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 4, 6, 8, 16, 32])
def test_shares_leave_something_and_as_much_for_each_head(num_kv_heads, monkeypatch):
    shape = layer(4 * num_kv_heads, num_kv_heads)
    plan = hopper_plan(monkeypatch, shape)
    random = Random(0)
    found = 0
    for _ in range(200):
        tokens, context = random.randint(20, 8192), random.randint(0, 65536)
        lengths = [(tokens, tokens + context)]
        lengths += [(1, random.randint(1, 20000))] * random.randint(1, 200)
        work = work_of(lengths, shape)
        num_items = items(lengths, plan)
        units = prefill_units(work, num_items, plan, shape, H200)
        if units is not None:
            found += 1
            assert 0 < units < 132
            assert 2 * (132 - units) % num_kv_heads == 0
    assert found


@pytest.mark.parametrize("window", [None, 1, 50, 1000])
@pytest.mark.parametrize("group, block_m", [(4, 64), (32, 16)])
def test_work_is_counted(group, block_m, window):
    random = Random(0)
    lengths = [(0, 0), (0, 7)]
    for _ in range(50):
        query_len = random.choice([1, 3, 4, 5, 40, 300])
        lengths.append((query_len, query_len + random.randint(0, 500)))
    both = np.array(lengths, dtype=np.int32).T
    work = count_work(*both, both[0] > 4, block_m / group, window)
    tokens = pairs = decode_keys = most = 0
    for query_len, seq_len in lengths:
        seen = [
            min(seq_len - query_len + i + 1, window or seq_len)
            for i in range(query_len)
        ]
        if query_len > 4:
            tokens += query_len
            pairs += sum(seen)
            # Rows of a tile that are none see as much as the last.
            pairs += -query_len % 64 * seen[-1]
            most = max(most, *seen)
        elif query_len:
            decode_keys += seen[-1] * -(-query_len * group // block_m)
    assert work.prefill_tokens == tokens
    assert work.prefill_keys == most
    assert work.decode_keys == decode_keys
    # With a window as if all queries saw as much: a bound.
    assert pairs <= work.prefill_pairs <= (1.3 if window else 1) * pairs


def test_work_of_dummy_sequences():
    """Of fewer tokens than queries."""
    query_lens = np.array([300, 1])
    work = count_work(query_lens, np.array([1, 0]), query_lens > 4, 16, None)
    assert work == (300, 320 * 300 - 300 * 299 // 2, 300, 0)


# ------------------------------------------------------------------ kernels


def share(monkeypatch, units: int | None) -> None:
    """Gives prefills so many multiprocessors wherever work is known."""
    monkeypatch.setattr(schedule_module, "prefill_units", lambda *_: units)


def record_grids(monkeypatch) -> list[tuple[str, int, bool]]:
    """Kernels, programs, and whether they may begin before the launch before ends."""
    launched = []
    call = BoundLaunch.__call__

    def recorded(self, *args, grid=None, **options):
        name = self.launch.kernel.fn.__name__
        programs = (grid or self.launch.grid)[0]
        launched.append((name, programs, "launch_pdl" in self.launch.constants))
        return call(self, *args, grid=grid, **options)

    monkeypatch.setattr(BoundLaunch, "__call__", recorded)
    return launched


LENGTHS = [(1, 90), (100, 300), (0, 0), (2, 200), (33, 33), (1, 1), (1, 400)]
KNOWN = {"num_prefills": 2, "work": MIXED}


def num_units() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if ON_GPU else 8


@pytest.mark.parametrize("head_size, decode", [(64, "decode_kernel"), (128, None)])
@pytest.mark.parametrize("units", [None, 1, 3, 7])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 60}], ids=str)
def test_shares(options, units, head_size, decode, monkeypatch):
    use_hopper(monkeypatch, num_units=num_units())
    share(monkeypatch, units)
    batch = make_batch(
        LENGTHS, num_kv_heads=2, head_size=head_size, dtype=torch.float16, **options
    )
    schedule = update(make_schedule(batch), batch, **KNOWN)
    launched = record_grids(monkeypatch)
    check(batch, schedule, truncated_sums=400 // 16)
    prefill = ("hopper_prefill_kernel", units or num_units(), False)
    workers = 2 * (num_units() - (units or 0))
    assert launched[:2] == [
        prefill,
        (decode or "hopper_decode_kernel", workers, True),
    ]


@pytest.mark.parametrize("units", [2, 20])
def test_split_prefills_have_parts_for_their_share(units, monkeypatch):
    use_hopper(monkeypatch, num_units=32)
    share(monkeypatch, units)
    batch = make_batch(
        [(20, 2000), (1, 300), (1, 70)],
        num_query_heads=2,
        num_kv_heads=2,
        dtype=torch.float16,
        head_size=128,
    )
    schedule = update(make_schedule(batch), batch, num_prefills=1, work=MIXED)
    assert schedule.plan.split is not None
    parts = schedule.items[schedule.items[:, 0] >= 0].shape[0]
    # Of each of two heads: as many as there are multiprocessors, of 128 keys or more.
    assert parts == min(units // 2, 16 // 2)
    launched = record_grids(monkeypatch)
    check(batch, schedule, truncated_sums=2000 // 16)
    assert [(name, may) for name, _, may in launched] == [
        ("hopper_prefill_kernel", False),
        ("hopper_decode_kernel", True),
        ("combine_kernel", True),
    ]


def test_a_share_ends_with_its_batch(monkeypatch):
    """The next has all multiprocessors, if nothing says otherwise."""
    use_hopper(monkeypatch, num_units=num_units())
    share(monkeypatch, 3)
    batch = make_batch(LENGTHS, num_kv_heads=2, dtype=torch.float16, head_size=128)
    schedule = make_schedule(batch)
    launched = record_grids(monkeypatch)
    for known in (KNOWN, {}, KNOWN):
        update(schedule, batch, **known)
        check(batch, schedule, truncated_sums=400 // 16)
    programs = [count for name, count, _ in launched if "decode" in name]
    rest = 2 * (num_units() - 3)
    assert programs == [rest, 2 * num_units(), rest]


def test_long_decodes_depend_on_a_prefill(monkeypatch):
    """Though there is none: what is launched behind it may begin before it ends."""
    use_hopper(monkeypatch, num_units=8)
    batch = make_batch(
        [(17, 90)], dtype=torch.float16, head_size=128, sliding_window=60, padding=0
    )
    schedule = update(make_schedule(batch, decode_query_len=17), batch)
    launched = record_grids(monkeypatch)
    check(batch, schedule, truncated_sums=90 // 16)
    assert [(name, may) for name, _, may in launched] == [
        ("hopper_prefill_kernel", False),
        ("hopper_decode_kernel", True),
    ]


@pytest.mark.parametrize("lengths, follows", [([(100, 300)], 0), (LENGTHS, 1)])
def test_prefills_alone_let_nothing_begin(lengths, follows, monkeypatch):
    """What follows them is not CONCH's. With a window no parts are combined."""
    use_hopper(monkeypatch, num_units=num_units())
    batch = make_batch(
        lengths,
        dtype=torch.float16,
        head_size=64,
        num_kv_heads=2,
        sliding_window=500,
    )
    known = {"min_query_len": min(query_len for query_len, _ in lengths)}
    schedule = update(make_schedule(batch), batch, **known)
    varying = []
    call = BoundLaunch.__call__

    def recorded(self, *args, **options):
        if "prefill" in self.launch.kernel.fn.__name__:
            varying.append(options["varying"])
        return call(self, *args, **options)

    monkeypatch.setattr(BoundLaunch, "__call__", recorded)
    check(batch, schedule, truncated_sums=400 // 16)
    assert varying == [(schedule.num_items, follows)]


def test_decodes_alone_begin_when_the_launch_before_has_ended(monkeypatch):
    use_hopper(monkeypatch)
    batch = make_batch([(1, 90), (4, 60)], dtype=torch.float16, head_size=128)
    schedule = update(make_schedule(batch), batch, work=MIXED)
    launched = record_grids(monkeypatch)
    check(batch, schedule, truncated_sums=90 // 16)
    assert [may for _, _, may in launched] == [False]


def test_other_devices_have_no_shares(monkeypatch):
    if ON_HOPPER:
        pytest.skip("needs another device")
    share(monkeypatch, 1)
    batch = make_batch(LENGTHS, num_kv_heads=2)
    schedule = update(make_schedule(batch), batch, **KNOWN)
    launched = record_grids(monkeypatch)
    check(batch, schedule)
    assert not schedule.plan.overlaps
    assert not any(may for _, _, may in launched)


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(
    "lengths, units",
    [
        ([(4000, 20000), (1, 100)], 4),
        ([(64, 20000), (1, 100)], 16),
        ([(4000, 20000), (1, 100)], None),
        ([(64, 20000)], None),  # split, and no decodes
    ],
)
def test_what_follows_sees_all(lengths, units, head_size, in_graph, monkeypatch):
    """A launch behind them waits for both, though it depends on the last alone."""
    share(monkeypatch, units)
    batch = make_batch(lengths, dtype=BF16, num_kv_heads=2, head_size=head_size)
    known = {"min_query_len": min(query_len for query_len, _ in lengths)}
    schedule = update(make_schedule(batch), batch, num_prefills=1, work=MIXED, **known)
    assert schedule.has_decodes == (len(lengths) > 1)
    output = torch.empty_like(batch.query)
    copy = torch.empty_like(output)

    def run() -> None:
        output.fill_(7.0)
        call(batch, output, schedule=schedule)
        copy.copy_(output)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        if in_graph:
            with torch.cuda.graph(graph, stream=stream):
                run()
        for _ in range(5):
            copy.fill_(3.0)
            graph.replay() if in_graph else run()
            stream.synchronize()
            assert torch.equal(copy, output)
    torch.cuda.current_stream().wait_stream(stream)
    share(monkeypatch, None)
    expected, _ = check(batch)
    torch.testing.assert_close(copy[: len(expected)], expected, atol=1e-2, rtol=0)
