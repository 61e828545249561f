# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What only callers of the Hopper prefill kernel itself can ask for."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    ON_GPU,
    Batch,
    assert_close,
    make_batch,
    poisoned_scratch,
)
from tests.kernels.attention.conch_reference import (
    SENTINEL,
    Attention,
    lse_tolerance,
    output_tolerance,
)
from vllm.attention.ops.conch import hopper_prefill

on_hopper = pytest.mark.skipif(
    not (ON_GPU and hopper_prefill.is_available(torch.device("cuda", 0))),
    reason="needs a Hopper GPU and a Triton that the kernel is written for",
)
# Queries longer and shorter than a tile; rows before the first key see nothing.
LENGTHS = [(129, 1000), (300, 301), (5, 700), (1, 1), (200, 40), (140, 0)]


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
