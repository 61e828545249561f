# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decodes beside prefills: on which multiprocessors which of them run.

Prefills keep the tensor cores busy and decodes the memory, so that each, alone on a
device, leaves idle what the other waits for. On Hopper the two kernels run at the same
time. Prefill's takes some of the multiprocessors, all of each, and decode's is launched
as dependent on it: it begins when all programs of prefill are running, on the others,
and ends after them (programmatic dependent launch).

Both at once, in one kernel, is the idea of POD-Attention (Kamath et al. 2025,
https://arxiv.org/abs/2410.18038).

How many multiprocessors each needs is estimated on the host, from lengths: an estimate
that is off costs time, never a result.
"""

from typing import NamedTuple

import numpy as np

from .plan import AttentionPlan, Device, Shape

# What one multiprocessor of an H200 does in long causal prefills, FLOP/s by padded head
# size, and with Q, K and V in fp8; and an item of theirs beside its tiles, seconds.
PREFILL_RATES = {64: 3.7e12, 128: 5.3e12, 256: 5.4e12, 512: 3.4e12}
FP8_PREFILL_RATE = 7.4e12
ITEM_SECONDS = 2.5e-6
# Part of the memory's bandwidth that decodes reach, and bytes/s that those of one
# multiprocessor do.
DECODE_SHARE = 0.88
DECODE_UNIT_RATE = 68e9


class Work(NamedTuple):
    """What there is to do for each head of a batch, as far as the host knows."""

    prefill_tokens: int
    prefill_pairs: int  # of a query and a key that it sees
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
    is_prefill = query_lens > longest_decode
    seen = seq_lens if window is None else np.minimum(seq_lens, window + query_lens)
    queries = query_lens[is_prefill].astype(np.int64)
    keys = seen[is_prefill] - queries // 2  # on average, if causal
    if window is not None:
        keys = np.minimum(keys, window)
    decode_keys = seen[~is_prefill & (query_lens > 0)]
    return Work(int(queries.sum()), int((queries * keys).sum()), int(decode_keys.sum()))


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
    if not (plan.overlaps and plan.hopper_decode):
        return None
    if not (work.prefill_tokens and work.decode_keys):
        return None
    num_bytes = 2 * work.decode_keys * shape.num_kv_heads * shape.row_bytes
    bandwidth = DECODE_SHARE * device.bandwidth
    rate = PREFILL_RATES[max(64, shape.head_padded)]
    if plan.hopper == "fp8":
        rate = FP8_PREFILL_RATE
    flops = 4 * work.prefill_pairs * shape.num_query_heads * shape.head_padded
    item_seconds = flops / rate / num_items
    # As many decode workers for each of the heads that go abreast.
    step = max(1, shape.num_kv_heads // 2) if plan.abreast_tiles else 1
    best, best_seconds = None, float("inf")
    for decode_units in range(step, device.num_units, step):
        units = device.num_units - decode_units
        if units >= num_items:
            parts = units // num_items if plan.split else 1
            seconds = item_seconds / parts + ITEM_SECONDS
        else:
            rounds = -(-num_items // units)
            seconds = rounds * (item_seconds + ITEM_SECONDS)
        reading = num_bytes / min(bandwidth, decode_units * DECODE_UNIT_RATE)
        seconds = max(seconds, reading)
        if seconds < best_seconds:
            best, best_seconds = units, seconds
    return best
