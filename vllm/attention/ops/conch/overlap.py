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
estimate that is off costs time. Like all else that says how keys are split, it decides
the order of sums.
"""

import math
from functools import lru_cache
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
# decodes at 4k 311 and 286, 256 over 32k 454 and 398, 64 over 32k beside 16 136 and
# 125; but 20 tokens beside 64 at 1k 80 and 82.
LARGEST_SHARE = 0.98
# Of shares that are expected to take so little longer than the best, prefills get the
# largest: they suffer more from too small a one.
ABOUT_THE_BEST = 1.02
# Multiprocessors that one may have more or less.
LEAST_STEP = 4
# Rows of a tile that are computed though fewer are queries.
LEAST_ROWS = 64


class Work(NamedTuple):
    """What there is to do for each head of a batch, as far as the host knows."""

    prefill_tokens: int
    prefill_pairs: int  # of a query, or a row without one, and a key that it sees
    prefill_keys: int  # that the query seeing most sees
    decode_keys: int  # that are read, by each tile of query rows anew


def can_share(plan: AttentionPlan, device: Device) -> bool:
    """Whether decodes may run beside prefills: on devices like the one that was
    measured, where they have Hopper's own kernel. Any other reads too little on a
    multiprocessor."""
    is_known = device.num_units >= LEAST_UNITS and device.bandwidth >= LEAST_BANDWIDTH
    return plan.overlaps and plan.hopper_decode and is_known


def count_work(
    query_lens: np.ndarray,
    seq_lens: np.ndarray,
    is_prefill: np.ndarray,
    tokens_per_tile: float,
    window: int | None,
) -> Work:
    """Counts the work of a batch, as if it were causal.

    Args:
        query_lens: [num_seqs] new tokens.
        seq_lens: [num_seqs] all tokens, or a bound.
        is_prefill: [num_seqs] bool; others with new tokens are decodes.
        tokens_per_tile: new tokens of a decode in a tile of rows; may be less than 1.
        window: keys that a query sees; None: all.

    """
    window = WIDEST_WINDOW if window is None else window
    queries = query_lens[is_prefill].astype(np.int64)
    ends = np.maximum(seq_lens[is_prefill], queries)
    rows = queries + -queries % LEAST_ROWS
    pairs = rows * ends - queries * (queries - 1) // 2
    is_decode = (query_lens > 0) & ~is_prefill
    tiles = np.ceil(query_lens[is_decode] / tokens_per_tile)
    decode_keys = np.minimum(seq_lens[is_decode], window) * tiles
    return Work(
        int(queries.sum()),
        int(np.minimum(pairs, rows * window).sum()),
        int(np.minimum(ends, window).max(initial=0)),
        int(decode_keys.sum()),
    )


class Prefills(NamedTuple):
    """How long items of prefills take, in seconds."""

    num_items: int
    mean: float
    longest: float
    are_split: bool  # over as many multiprocessors as there are

    def seconds(self, num_units: np.ndarray) -> np.ndarray:
        """How long they take on so many multiprocessors, for each number of these."""
        rounds = self.num_items / num_units
        if self.longest <= EQUAL_ITEMS * self.mean:
            rounds = np.ceil(rounds)
        parts = np.maximum(num_units // self.num_items, 1) if self.are_split else 1
        return np.where(
            num_units < self.num_items,
            np.maximum(rounds * self.mean, self.longest),
            self.longest / parts,
        )


@lru_cache
def divisions(device: Device, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Multiprocessors that prefills may have, and bytes/s that decodes then read: first
    of all those of the device, in turn, then with as many others, by steps."""
    decode_units = np.arange(step, device.num_units, step)
    units = device.num_units - decode_units
    beside = np.minimum(BANDWIDTH_BESIDE * device.bandwidth, decode_units * DECODE_RATE)
    in_turn = BANDWIDTH_ALONE * device.bandwidth
    return np.append(device.num_units, units), np.append(in_turn, beside)


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
        None where both have the device, one after the other.

    """
    if not (can_share(plan, device) and work.prefill_tokens and work.decode_keys):
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
    step = LEAST_STEP
    if plan.abreast_tiles:  # as many decode workers for each head
        step = math.lcm(step, shape.num_kv_heads // math.gcd(shape.num_kv_heads, 2))
    units, rates = divisions(device, step)
    prefill_seconds = prefills.seconds(units)
    decode_seconds = num_bytes / rates + DECODE_SECONDS
    in_turn = prefill_seconds[0] + decode_seconds[0]
    units = units[1:]
    beside = np.maximum(prefill_seconds[1:], decode_seconds[1:])
    best = beside.min(initial=math.inf)
    if best > LARGEST_SHARE * in_turn:
        return None
    return int(units[beside <= ABOUT_THE_BEST * best].max())
