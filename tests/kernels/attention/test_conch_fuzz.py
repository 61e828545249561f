# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Random batches, shrunk by Hypothesis to the smallest that fails.

The same examples every time; without `derandomize` it searches on. On a GPU few
shapes and many batches, since each shape is compiled.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    HALF_DTYPES,
    KV_FP8_DTYPES,
    ON_GPU,
    check,
    make_batch,
    make_schedule,
    poisoned_scratch,
    update,
    use_hopper,
)
from tests.kernels.attention.conch_reference import LAYOUTS
from vllm.attention.ops.conch import schedule as schedule_module
from vllm.attention.ops.conch.overlap import Work

HALF = HALF_DTYPES[-1]
LONG = 5000 if ON_GPU else 80
committed = settings(
    derandomize=True,
    deadline=None,
    max_examples=200 if ON_GPU else 80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def sequence(draw) -> tuple[int, int]:
    """(query_len, seq_len): a decode, a verify, a chunk, padding or a dummy."""
    query_len = draw(
        st.one_of(st.just(1), st.integers(2, 16), st.integers(17, 40), st.just(0))
    )
    if draw(st.integers(0, 7)) == 7:
        return query_len, draw(st.integers(0, 40))
    context = st.one_of(st.integers(0, 80), st.integers(0, LONG))
    return query_len, query_len + draw(context)


SHAPES = st.sampled_from(
    [
        {"num_query_heads": 8, "num_kv_heads": 2, "head_size": 64, "block_size": 16},
        {"num_query_heads": 5, "num_kv_heads": 1, "head_size": 80, "block_size": 48},
        {"num_query_heads": 4, "num_kv_heads": 4, "head_size": 128, "block_size": 128},
    ]
)
if not ON_GPU:
    SHAPES = st.builds(
        lambda ratio, num_kv_heads, head_size, block_size: {
            "num_query_heads": ratio * num_kv_heads,
            "num_kv_heads": num_kv_heads,
            "head_size": head_size,
            "block_size": block_size,
        },
        st.sampled_from([1, 2, 4, 5, 6, 7, 8, 16]),
        st.integers(1, 2),
        st.sampled_from([16, 32, 40, 64, 80, 96, 128]),
        st.sampled_from([16, 32, 48, 64]),
    )


@committed
@given(
    st.lists(sequence(), min_size=1, max_size=6),
    SHAPES,
    st.sampled_from([(torch.float32, None), (HALF, None), (HALF, KV_FP8_DTYPES[0])]),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([None, 1, 30, 64]),
    st.booleans(),
    st.sampled_from([0.0, 20.0]),
    st.sampled_from([1, 5]),
    st.sampled_from([1, 2, 5, 33]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_random_batches(
    lengths,
    shape,
    dtypes,
    layout,
    sliding_window,
    causal,
    softcap,
    decode_query_len,
    num_workers,
    portable,
    seed,
):
    batch = make_batch(
        lengths,
        **shape,
        dtype=dtypes[0],
        kv_dtype=dtypes[1],
        k_scale=0.3 if dtypes[1] else None,
        v_scale=3.0 if dtypes[1] else None,
        layout=layout,
        sliding_window=sliding_window,
        causal=causal,
        softcap=softcap,
        seed=seed,
    )
    schedule = make_schedule(
        batch,
        decode_query_len=decode_query_len,
        num_workers=num_workers,
        portable=portable,
    )
    check(batch, update(schedule, batch))


HOPPER_LONG = 5000 if ON_GPU else 600
FP8 = torch.float8_e4m3fn


@pytest.fixture(params=[3] if ON_GPU else [3, 32])
def hopper_units(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiprocessors: few have several tiles each, many have few tiles."""
    use_hopper(monkeypatch, num_units=request.param)


@pytest.mark.usefixtures("hopper_units")
@settings(committed, max_examples=200 if ON_GPU else 60)
@given(
    st.lists(
        st.one_of(
            sequence(),
            st.tuples(st.integers(17, 140), st.integers(0, HOPPER_LONG)).map(
                lambda lengths: (lengths[0], sum(lengths))
            ),
        ),
        min_size=1,
        max_size=5,
    ),
    SHAPES.filter(lambda shape: shape["head_size"] in (64, 80, 96, 128)),
    st.sampled_from([torch.float16, FP8]),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([None, 1, 30, 200]),
    st.booleans(),
    st.sampled_from([0.0, 20.0]),
    st.booleans(),
    st.sampled_from([1, 3, 7]),
    st.booleans(),
    st.sampled_from([None, 1, 2, 20]),
    st.integers(0, 2**16),
)
def test_random_batches_on_hopper(
    lengths,
    shape,
    dtype,
    layout,
    sliding_window,
    causal,
    softcap,
    has_sinks,
    num_workers,
    is_known,
    share,
    seed,
):
    """In fp16, in which the interpreter runs what other kernels have to do."""
    sinks = torch.linspace(-2, 3, shape["num_query_heads"], device=DEVICE)
    batch = make_batch(
        lengths,
        **shape,
        dtype=torch.float16,
        query_dtype=dtype,
        kv_dtype=dtype,
        layout=layout,
        sliding_window=sliding_window,
        causal=causal,
        softcap=softcap,
        sinks=sinks if has_sinks else None,
        seed=seed,
    )
    schedule = make_schedule(batch, num_workers=num_workers)
    assert schedule.plan.hopper == ("fp8" if dtype == FP8 else "16-bit")
    longest = int(batch.seq_lens.max())
    known = {}
    if is_known:  # to the host: few tiles are split, or small
        prefills = sum(query_len > schedule.longest_decode for query_len, _ in lengths)
        known = {"num_prefills": prefills, "max_prefill_seq_len": longest}
        known["work"] = Work(1, 1, 1, 1)
    units = share and min(share, schedule.target.num_units - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "prefill_units", lambda *_: units)
        update(schedule, batch, **known)
    check(batch, schedule, truncated_sums=longest // 16)


@st.composite
def features(draw, num_seqs: int) -> dict:
    """What `make_batch` takes of the features of a few models, causality included."""

    def tensor(values, dtype=torch.int32) -> torch.Tensor:
        return torch.tensor(values, device=DEVICE).to(dtype)

    def per_sequence(element):
        return draw(st.lists(element, min_size=num_seqs, max_size=num_seqs))

    chosen = {"sliding_window": draw(st.sampled_from([None, 1, 30, 64]))}
    if draw(st.booleans()):
        chosen["sinks"] = tensor([-1.0, 0.5, 2.0, 3.0], torch.float32)
    if draw(st.booleans()):
        chosen["alibi_slopes"] = tensor([1.0, 0.2, 0.05, 0.01], torch.float32)
        chosen["alibi_sqrt"] = draw(st.booleans())
    if draw(st.booleans()):
        position = st.integers(0, 130)
        ranges = st.lists(st.tuples(position, position), min_size=2, max_size=2)
        chosen["mm_prefix_range"] = tensor(per_sequence(ranges))
        chosen["mm_prefix_in_window"] = draw(st.booleans())
    rule = draw(st.sampled_from(["causal", "both ways", "flags", "prefix", "chunks"]))
    if rule == "both ways":
        chosen["causal"] = False
    elif rule == "flags":
        chosen["causal"] = tensor(per_sequence(st.booleans()), torch.bool)
    elif rule == "prefix" and chosen["sliding_window"]:
        chosen["prefix_lens"] = tensor(per_sequence(st.integers(0, 90)))
    elif rule == "chunks" and chosen["sliding_window"]:
        lookback = draw(st.integers(0, 2))
        chosen["chunk_lookback"] = min(lookback, chosen["sliding_window"] - 1)
    return chosen


@committed
@given(
    st.lists(sequence(), min_size=1, max_size=6).flatmap(
        lambda lengths: st.tuples(st.just(lengths), features(len(lengths)))
    ),
    st.sampled_from([(torch.float32, None), (HALF, None), (HALF, KV_FP8_DTYPES[0])]),
    st.sampled_from([0.0, 20.0]),
    st.sampled_from([1, 5]),
    st.sampled_from([1, 5, 33]),
    st.integers(0, 2**16),
)
def test_random_features(
    lengths_and_features, dtypes, softcap, decode_query_len, num_workers, seed
):
    lengths, options = lengths_and_features
    batch = make_batch(
        lengths, dtype=dtypes[0], kv_dtype=dtypes[1], softcap=softcap, seed=seed,
        **options,
    )  # fmt: skip
    schedule = make_schedule(
        batch, decode_query_len=decode_query_len, num_workers=num_workers
    )
    check(batch, update(schedule, batch))
