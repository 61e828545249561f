# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decodes beside prefills: on which multiprocessors which of them run.

Prefills keep the tensor cores busy and decodes the memory, so that each, alone on a
device, leaves idle what the other waits for. On Hopper the two kernels run at the same
time. Prefill's takes some of the multiprocessors, all of each, and decode's is launched
as dependent on it: it begins when all programs of prefill are running, on the others,
and ends after them (programmatic dependent launch). Where prefill's takes all, decode's
begins on those that have no more to do.

Both at once, in one kernel, is the idea of POD-Attention (Kamath et al. 2025,
https://arxiv.org/abs/2410.18038).

How many multiprocessors prefills need is estimated on the host, from lengths: an
estimate that is off costs time, never a result.
"""

import math
from typing import NamedTuple

import numpy as np

from .limits import WIDEST_WINDOW
from .plan import AttentionPlan, Device, Shape

# What follows is of an H200; others are near it if they have as many multiprocessors
# and as fast a memory, but an H20, or a part of a GPU, has not.
LEAST_UNITS = 100
LEAST_BANDWIDTH = 3e12
# What one multiprocessor does in prefills, FLOP/s, and seconds of an item beside its
# tiles.
PREFILL_RATE = 5.6e12
ITEM_SECONDS = 2.5e-6
# Items whose longest is no longer than so many of the mean are of about one size.
EQUAL_ITEMS = 1.3
# Parts of the memory's bandwidth that decodes reach, alone and beside prefills, bytes/s
# of the decodes on one multiprocessor, and seconds of their launch.
BANDWIDTH_ALONE, BANDWIDTH_BESIDE = 0.88, 0.80
DECODE_RATE = 62e9
DECODE_SECONDS = 8e-6
# Only where it is expected to take no more than so much of the time of both in turn.
# On an H200, 32/8 heads of 128, pages of 128, in turn and so, us: 2k tokens beside 64
# decodes at 4k 312 and 286, 256 over 32k 453 and 396, 64 over 32k beside 16 136 and
# 126; but 20 tokens beside 64 at 1k 80 and 82.
LARGEST_SHARE = 0.98
# Of shares that are expected to take so little longer than the best, prefills get the
# largest: they suffer more from too small a one.
ABOUT_THE_BEST = 1.02
# Multiprocessors that one may have more or less.
LEAST_STEP = 4


class Work(NamedTuple):
    """What there is to do for each head of a batch, as far as the host knows."""

    prefill_tokens: int
    prefill_pairs: int  # of a query and a key that it sees, about
    prefill_keys: int  # that the query seeing most sees
    decode_keys: int  # that are read


def count_work(
    query_lens: np.ndarray,
    seq_lens: np.ndarray,
    longest_decode: int,
    window: int | None,
) -> Work:
    """Counts the work of a batch.

    Args:
        query_lens: [num_seqs] new tokens.
        seq_lens: [num_seqs] all tokens, or a bound.
        longest_decode: new tokens up to which a sequence is a decode.
        window: keys that a query sees; None: all.
    """
    window = WIDEST_WINDOW if window is None else window
    is_prefill = query_lens > longest_decode
    queries = query_lens[is_prefill].astype(np.int64)
    ends = seq_lens[is_prefill]
    pairs = queries * ends - queries * (queries - 1) // 2  # if causal
    decodes = seq_lens[(query_lens > 0) & ~is_prefill]
    return Work(
        int(queries.sum()),
        int(np.minimum(pairs, queries * window).sum()),
        int(np.minimum(ends, window).max(initial=0)),
        int(np.minimum(decodes, window).sum()),
    )


class Prefills(NamedTuple):
    """How long items of prefills take, in seconds."""

    num_items: int
    mean: float
    longest: float
    are_split: bool  # over as many multiprocessors as there are

    def seconds(self, num_units: int) -> float:
        """How long they take on so many multiprocessors."""
        if self.num_items <= num_units:
            parts = num_units // self.num_items if self.are_split else 1
            return self.longest / parts
        rounds = self.num_items / num_units
        if self.longest <= EQUAL_ITEMS * self.mean:
            rounds = math.ceil(rounds)
        return max(rounds * self.mean, self.longest)


def prefill_units(
    work: Work, num_items: int, plan: AttentionPlan, shape: Shape, device: Device
) -> int | None:
    """Multiprocessors for the prefills of a batch, so that its decodes, on the others,
    end with them.

    Args:
        work: of the batch.
        num_items: its tiles of prefill rows, of all heads, were none split.
        plan: its plan.
        shape: of the layers.
        device: to run on.

    Returns:
        None where both have the device, one after the other: also where decodes have
        no kernel of Hopper's own, whose rate on a multiprocessor leaves none to spare.
    """
    if not (plan.overlaps and plan.hopper_decode):
        return None
    if not (work.prefill_tokens and work.decode_keys):
        return None
    if device.num_units < LEAST_UNITS or device.bandwidth < LEAST_BANDWIDTH:
        return None
    pair_seconds = 4 * shape.head_padded / PREFILL_RATE
    pairs = work.prefill_pairs * shape.num_query_heads
    prefills = Prefills(
        num_items,
        pair_seconds * pairs / num_items + ITEM_SECONDS,
        pair_seconds * work.prefill_keys * plan.prefill_rows + ITEM_SECONDS,
        plan.split is not None,
    )
    num_bytes = 2 * work.decode_keys * shape.num_kv_heads * shape.row_bytes

    def decode_seconds(rate: float) -> float:
        return num_bytes / rate + DECODE_SECONDS

    in_turn = prefills.seconds(device.num_units)
    in_turn += decode_seconds(BANDWIDTH_ALONE * device.bandwidth)
    most = BANDWIDTH_BESIDE * device.bandwidth
    # As many decode workers for each of the heads that go abreast.
    step = max(LEAST_STEP, shape.num_kv_heads // 2 if plan.abreast_tiles else 1)
    beside = {
        device.num_units - units: max(
            prefills.seconds(device.num_units - units),
            decode_seconds(min(most, units * DECODE_RATE)),
        )
        for units in range(step, device.num_units, step)
    }
    best = min(beside.values())
    if best > LARGEST_SHARE * in_turn:
        return None
    return max(u for u, seconds in beside.items() if seconds <= ABOUT_THE_BEST * best)
