# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Hopper kernel for prefills in 16 bits: in batches, and what only callers of its
own can ask for."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    ON_HOPPER,
    Batch,
    assert_close,
    check,
    hopper,
    make_batch,
    make_schedule,
    poisoned_scratch,
    record_launches,
    update,
    use_hopper,
)
from tests.kernels.attention.conch_reference import (
    SENTINEL,
    Attention,
    lse_tolerance,
    output_tolerance,
)
from vllm.attention.ops.conch import hopper_prefill

on_hopper = pytest.mark.usefixtures("hopper")
# Queries longer and shorter than a tile; rows before the first key see nothing.
LENGTHS = [(129, 1000), (300, 301), (5, 700), (1, 1), (200, 40), (140, 0)]
BF16, FP16 = torch.bfloat16, torch.float16
PREFILL = "hopper_prefill_kernel"


# ---------------------------------------------------------------- batches


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return record_launches(monkeypatch)


@on_hopper
@pytest.mark.parametrize("head_size", [40, 64, 80, 96, 128, 192, 256, 512])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 128, "dtype": FP16},
        {"block_size": 48, "layout": "packed_NHD", "num_query_heads": 5},
        {"block_size": 32, "layout": "HND", "causal": False, "num_query_heads": 2},
        {"sliding_window": 200, "padding": 0},
        {"sliding_window": 60, "frees_pages": True},
        {"sliding_window": 1},
        {"sliding_window": 2**31 - 1},
        {"sliding_window": 100, "causal": False},
        {"softcap": 20.0, "logit_std": 10.0},
        {"softcap": 80.0, "logit_std": 10.0, "dtype": FP16},
        {"logit_std": 20.0},
    ],
    ids=str,
)
def test_batches(options, head_size, launched):
    options = {"num_query_heads": 4, "num_kv_heads": 1, "dtype": BF16} | options
    batch = make_batch(
        [(129, 300), (0, 0), (150, 40), (17, 65), (64, 64)],
        head_size=head_size,
        **options,
    )
    # The tensor cores cut off sums, of 16 terms each; see `output_tolerance`.
    check(batch, truncated_sums=300 // 16)
    assert PREFILL in launched


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "block_size": 48},
        {"softcap": 20.0, "logit_std": 10.0},
        {"sinks": torch.tensor([1.5, -2.0, 0.0, 6.0], device=DEVICE)},
    ],
    ids=lambda options: "_".join(options),
)
def test_split_keys(options, head_size, monkeypatch):
    """Of few query tiles, over several programs."""
    use_hopper(monkeypatch, num_units=32)
    launched = record_launches(monkeypatch)
    batch = make_batch(
        [(40, 1500), (17, 700), (20, 20)],
        num_kv_heads=1,
        head_size=head_size,
        dtype=FP16,  # in which the interpreter can combine them
        **options,
    )
    schedule = update(make_schedule(batch), batch, num_prefills=3)
    assert schedule.plan.split is not None and int(schedule.splits[0]) > 0
    check(batch, schedule, truncated_sums=1500 // 16)
    assert PREFILL in launched and "combine_kernel" in launched


@pytest.mark.parametrize("head_size", [40, 64, 80, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "block_size": 48},
        {"sliding_window": 60, "frees_pages": True},
        {"softcap": 20.0, "logit_std": 10.0},
        {"sinks": torch.tensor([1.5, -2.0, 0.0, 6.0], device=DEVICE)},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.06], device=DEVICE)},
    ],
    ids=lambda options: "_".join(options),
)
def test_small_tiles(options, head_size, monkeypatch):
    """Of few query tiles of short sequences, and decodes beside them."""
    use_hopper(monkeypatch, num_units=32)
    launched = record_launches(monkeypatch)
    batch = make_batch(
        [(65, 300), (1, 90), (128, 128), (0, 0), (40, 20)],
        num_kv_heads=1,
        head_size=head_size,
        dtype=FP16,  # in which the interpreter runs what other kernels have to do
        **options,
    )
    known = {"num_prefills": 3, "max_prefill_seq_len": 300}
    schedule = update(make_schedule(batch), batch, **known)
    assert schedule.plan.small and schedule.plan.split is None
    check(batch, schedule, truncated_sums=300 // 16)
    is_portable = "alibi_slopes" in options
    assert ("prefill_kernel" if is_portable else PREFILL) in launched
    assert "combine_kernel" not in launched


@on_hopper
@pytest.mark.parametrize("options", [{}, {"sliding_window": 60}])
@pytest.mark.parametrize("is_small", [True, False])
def test_tiles_of_the_portable_kernel(is_small, options, monkeypatch):
    """In boxes, of 128 rows or, where they are few, of 64; and of 64 by pointers."""
    use_hopper(monkeypatch, num_units=32)
    shape = {"head_size": 128, "num_kv_heads": 1, "dtype": FP16} | options
    lengths = [(65, 300), (1, 90), (128, 128), (0, 0), (40, 20)]
    known = {"num_prefills": 3, "max_prefill_seq_len": 300} if is_small else {}
    for block_size, rows in (64, 64 if is_small else 128), (16, 64):
        batch = make_batch(lengths, block_size=block_size, **shape)
        schedule = update(make_schedule(batch, portable=True), batch, **known)
        chosen = schedule.plan
        assert chosen.small == (is_small and block_size == 64)
        assert (chosen.prefill_boxes or chosen.prefill).block_m == rows
        check(batch, schedule, truncated_sums=300 // 16)


@on_hopper
@pytest.mark.parametrize(
    "is_small, lengths, options",
    [
        (True, [(2048, 2048)], {}),  # 128 tiles for 132 multiprocessors
        (False, [(2049, 2049)], {}),
        (False, [(1024, 1024), (1024, 1024)], {}),  # 17 tiles of rows, for all we know
        (True, [(960, 960), (960, 960), (1, 9000)], {}),
        (True, [(20, 1024)], {}),
        (False, [(20, 1025)], {}),
        (True, [(1024, 2048)], {}),
        (False, [(1024, 2049)], {}),
        (True, [(1100, 1100)], {}),  # 144 tiles of half as many rows
        (False, [(1100, 1101)], {}),
        (True, [(600, 1024), (600, 700)], {}),
        (True, [(20, 5000)], {"sliding_window": 1000}),
        (False, [(20, 5000)], {"sliding_window": 1010}),
        (True, [(2048, 2048)], {"sliding_window": 1000}),
        (False, [(200, 200)], {"head_size": 512}),
        (False, [(200, 200)], {"dtype": torch.float32}),
    ],
)
def test_which_batches_have_small_tiles(is_small, lengths, options, monkeypatch):
    if not ON_HOPPER:
        use_hopper(monkeypatch, num_units=132)
    shape = {"num_query_heads": 8, "num_kv_heads": 1, "head_size": 64, "dtype": BF16}
    batch = make_batch(lengths, padding=0, **shape | options)
    schedule = make_schedule(batch)
    num_prefills = sum(query_len > 1 for query_len, _ in lengths)
    longest = max(seq_len for query_len, seq_len in lengths if query_len > 1)
    known = {"num_prefills": num_prefills, "max_prefill_seq_len": longest}
    update(schedule, batch, **known)
    assert schedule.plan.small == is_small
    tiles = sum(
        -(-query_len // schedule.plan.prefill_rows)
        for query_len, _ in lengths
        if query_len > 1
    )
    if schedule.plan.split is None and schedule.plan.prefill_pack == 1:
        listed = int((schedule.items[:, 0] >= 0).sum())
        assert tiles == listed <= schedule.num_items <= len(schedule.items)
    # What the host does not know decides nothing.
    for name, value in known.items():
        assert not update(schedule, batch, **{name: value}).plan.small


@on_hopper
@pytest.mark.parametrize(
    "is_small, query_len, options",
    [
        (True, 1056, {}),  # 264 tiles of 128 rows, for 132 multiprocessors
        (False, 1057, {}),
        (False, 1056, {"portable": False}),
        (False, 1056, {"block_size": 16}),
    ],
)
def test_which_batches_have_small_tiles_in_boxes(
    is_small, query_len, options, monkeypatch
):
    if not ON_HOPPER:
        use_hopper(monkeypatch, num_units=132)
    options = {"block_size": 128, "portable": True} | options
    shape = {"num_query_heads": 32, "num_kv_heads": 8, "head_size": 128, "dtype": BF16}
    lengths = [(query_len, query_len)]
    batch = make_batch(lengths, padding=0, block_size=options["block_size"], **shape)
    schedule = make_schedule(batch, portable=options["portable"])
    update(schedule, batch, num_prefills=1, max_prefill_seq_len=query_len)
    assert schedule.plan.small == is_small
    listed = int((schedule.items[:, 0] >= 0).sum())
    assert listed <= schedule.num_items <= len(schedule.items)


# ------------------------------------------------------------------ the kernel alone


def make_work(batch: Batch, block_m: int) -> torch.Tensor:
    """A work list of all query tiles, and what ends it."""
    starts, seq_lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    items = []
    for seq, seq_len in enumerate(seq_lens):
        query_len = starts[seq + 1] - starts[seq]
        for tile in range(-(-query_len // block_m)):
            items.append([seq, tile, starts[seq], query_len, seq_len, 0, 0, 0])
    return torch.tensor([*items, [-1] * 8], dtype=torch.int32, device=DEVICE)


def attend(
    batch: Batch, sinks: torch.Tensor | None, changes: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of all rows, with so many changes of the head size's config."""
    head_size = batch.query.shape[2]
    config = replace(hopper_prefill.CONFIGS[head_size], **changes)
    output = torch.full_like(batch.query, SENTINEL)
    lse = torch.full(batch.query.shape[:2], SENTINEL, device=DEVICE)
    hopper_prefill.hopper_prefill(
        batch.query,
        batch.key_cache,
        batch.value_cache,
        output,
        batch.block_table,
        make_work(batch, config.block_m),
        pack=1,
        scale=batch.scale,
        causal=batch.causal,
        sliding_window=batch.sliding_window,
        softcap=batch.softcap,
        output_lse=lse,
        sinks=sinks,
        config=config,
    )
    return output, lse


def with_sinks(reference: Attention, sinks: torch.Tensor) -> Attention:
    """The result with exp(sink) more in the sum of a row's exponentials."""
    lse = torch.logaddexp(reference.lse, sinks.double())
    share = (reference.lse - lse).exp()  # that the keys keep
    scaled = {
        name: tensor * share.unsqueeze(-1)
        for name, tensor in reference._asdict().items()
        if tensor.dim() == 3
    }
    drift = reference.lse_drift * share + sinks.double().abs() + 1
    return reference._replace(lse=lse, lse_drift=drift, **scaled)


@on_hopper
@pytest.mark.parametrize(
    "options, changes, sink_dtype",
    [
        ({"head_size": 64}, {}, torch.float32),
        ({"head_size": 64, "sliding_window": 128}, {"q_stages": 2}, torch.bfloat16),
        ({"head_size": 64}, {"turns": False, "narrow_p": False}, None),
        ({"head_size": 128}, {"q_stages": 2}, torch.float16),
        ({"head_size": 128, "sliding_window": 300}, {"turns": True}, None),
        ({"head_size": 256, "causal": False}, {}, torch.float32),
        ({"head_size": 512}, {}, torch.float32),
        ({"head_size": 512, "sliding_window": 100}, {}, None),
    ],
    ids=str,
)
def test_sinks_and_configs(options, changes, sink_dtype):
    batch = make_batch(
        LENGTHS, num_query_heads=8, dtype=torch.bfloat16, block_size=32, **options
    )
    sinks = None
    if sink_dtype is not None:
        sinks = torch.linspace(-3, 6, 8, device=DEVICE).to(sink_dtype)
    output, lse = attend(batch, sinks, changes)
    live = batch.num_live_tokens
    assert bool((output[live:] == SENTINEL).all())
    assert bool((lse[live:] == SENTINEL).all())
    reference = Attention(*(t[:live] for t in batch.reference()))
    if sinks is not None:
        reference = with_sinks(reference, sinks)
    truncated_sums = max(seq_len for _, seq_len in LENGTHS) // 16
    allowed = output_tolerance(reference, torch.bfloat16, truncated_sums)
    assert_close("output", output[:live], reference.output, allowed)
    assert_close("LSE", lse[:live], reference.lse, lse_tolerance(reference))


@on_hopper
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("softcap", [5.0, hopper_prefill.MAX_BOUND, 60.0])
def test_softcaps_at_their_limits(softcap, side):
    """All logits of a row at the cap, of one sign: with small caps no maximum is
    taken off, and weights and sums are as small or as large as they can be."""
    batch = make_batch(
        LENGTHS, num_query_heads=8, dtype=torch.bfloat16, head_size=128, softcap=softcap
    )
    batch.query[: batch.num_live_tokens] = side * 64.0
    batch.key_cache[:] = batch.key_cache.abs()
    output, lse = attend(batch, None, {"softcap": "exp2"})
    live = batch.num_live_tokens
    reference = Attention(*(t[:live] for t in batch.reference()))
    allowed = output_tolerance(reference, torch.bfloat16, 1000 // 16)
    if softcap <= hopper_prefill.MAX_BOUND:
        # Equal weights are 2^y, not 1: rounded all alike, which a sum does not average.
        allowed += torch.finfo(torch.bfloat16).eps / 2 * reference.output.abs()
    assert_close("output", output[:live], reference.output, allowed)
    assert_close("LSE", lse[:live], reference.lse, lse_tolerance(reference))


def overlapping_pages(tokens: torch.Tensor) -> torch.Tensor:
    """[num_pages, 16, num_kv_heads, head_size]: page i begins at token i."""
    return tokens.unfold(0, 16, 1).movedim(-1, 1)


def test_boxes_of_overlapping_pages():
    """Every token lies in the shape, past which TMA reads zeros."""
    pages = overlapping_pages(torch.zeros(40, 2, 64, dtype=torch.bfloat16))
    described = hopper_prefill.describe_pages(pages, (1, 16, 1, 64))
    assert described.shape == [40, 1, 2, 64]
    assert described.block_shape == [16, 1, 1, 64]
    assert described.strides == [128, 128, 64, 1]
    with pytest.raises(ValueError, match="16 slots overlap; boxes of 8"):
        hopper_prefill.describe_pages(pages, (1, 8, 1, 64))
    apart = hopper_prefill.describe_pages(pages[::16].contiguous(), (1, 16, 1, 64))
    assert apart.shape == [2, 16, 2, 64]
    assert apart.block_shape == [1, 16, 1, 64]


@on_hopper
@pytest.mark.parametrize("num_tokens", [129, 143, 144, 145])
def test_keys_of_the_batch_itself(num_tokens):
    """As an encoder's: the last page reaches behind the last token."""
    new = torch.randn(2, num_tokens, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    query = torch.randn(num_tokens, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    starts = torch.arange(0, num_tokens + 15, 16, dtype=torch.int32, device=DEVICE)
    config = hopper_prefill.CONFIGS[64]
    tiles = range(-(-num_tokens // config.block_m))
    work = [[0, tile, 0, num_tokens, num_tokens, 0, 0, 0] for tile in tiles]
    output = torch.full_like(query, SENTINEL)
    hopper_prefill.hopper_prefill(
        query,
        *map(overlapping_pages, new),
        output,
        starts[None],
        torch.tensor([*work, [-1] * 8], dtype=torch.int32, device=DEVICE),
        pack=1,
        scale=0.125,
        causal=False,
        sliding_window=17,
    )
    key, value = new.double()
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) / 8
    place = torch.arange(num_tokens, device=DEVICE)
    hidden = (place[:, None] - place).abs() >= 17
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, value)
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda sinks: sinks[:-1], r"sinks has shape \(7,\); it must be \(8,\)"),
        (lambda sinks: sinks[None], r"sinks has shape \(1, 8\)"),
        (torch.Tensor.double, "sinks is torch.float64"),
        (torch.Tensor.int, "sinks is torch.int32"),
        (lambda sinks: sinks.to("meta"), "sinks is on meta"),
        (lambda sinks: torch.stack([sinks, sinks], 1)[:, 0], "sinks has stride 2"),
    ],
)
def test_bad_sinks(spoil, message):
    query = torch.zeros(3, 8, 64, dtype=torch.bfloat16)
    sinks = torch.zeros(8)
    hopper_prefill.check_sinks(sinks, query)
    with pytest.raises(ValueError, match=message):
        hopper_prefill.check_sinks(spoil(sinks), query)
