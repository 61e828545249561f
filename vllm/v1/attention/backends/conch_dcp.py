# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decode context parallelism (DCP): the cached keys are shared out over some ranks.

The ranks of a DCP group have the same KV heads and each its own query heads. Of the
tokens in the cache each keeps every few, see `ops.conch.shares`. So, in a layer,

    1. queries are gathered: each rank gets those of all the group's heads;
    2. each rank attends them to its share of the context, which every query sees whole;
    3. results and LSE are exchanged: each rank gets all shares' for its own heads;
    4. it attends its own heads to the batch's new tokens, whose K and V it has,
       and joins all.

In a batch of single tokens each query sees the whole cache, with its own token in it,
and there is no step 4. In one without any context there is nothing else.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm.attention.ops.conch import (
    VarlenSchedule,
    reshape_and_cache,
    varlen_attention,
)
from vllm.attention.ops.conch.shares import count_keys, merge_shares, weigh_share
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_dcp_group
from vllm.v1.attention.backends.conch_base import (
    PAGE_MULTIPLE,
    AttentionLayer,
    AttentionType,
    exchanges_all_to_all,
    is_batch_invariant,
)
from vllm.v1.attention.backends.conch_pages import BatchPages, pages_of_batch

# Formats whose new tokens are rounded as those in the cache are.
CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


@dataclass
class Peers:
    """The ranks that share the keys, as seen by one of them."""

    size: int
    rank: int
    run: int  # keys that follow each other on one rank
    all_to_all: bool  # how results are exchanged; else gather and reduce-scatter

    @classmethod
    def from_config(cls, size: int, rank: int, vllm_config: VllmConfig) -> "Peers":
        run = vllm_config.parallel_config.cp_kv_cache_interleave_size
        return cls(size, rank, run, exchanges_all_to_all(vllm_config))

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """All ranks' tensors side by side."""
        return get_dcp_group().all_gather(tensor, dim)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of the sum of all ranks' [num_tokens, heads, ...] this rank's heads."""
        group = get_dcp_group()
        pynccl = getattr(group.device_communicator, "pynccl_comm", None)
        if pynccl is not None and not pynccl.disabled:
            return group.reduce_scatter(tensor, 1)
        # vLLM's own would return memory that nobody has written.
        rows = tensor.movedim(1, 0).contiguous()
        own = torch.empty_like(rows[: len(rows) // self.size])
        torch.distributed.reduce_scatter_tensor(own, rows, group=group.device_group)
        return own.movedim(0, 1).contiguous()

    def scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """tensor[i] of this rank goes to rank i; returns what all sent to this one."""
        received = torch.empty_like(tensor)
        group = get_dcp_group().device_group
        torch.distributed.all_to_all_single(received, tensor, group=group)
        return received


class Echo(Peers):
    """Stands in for the others with this rank's own data, to warm kernels up."""

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([tensor] * self.size, dim)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(self.size, 1)[self.rank].contiguous()

    def scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def pack(result: torch.Tensor, lse: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[num_ranks, num_tokens, heads of a rank, head_size and more]: what each gets.

    The bytes of the LSE follow the result in the same row.
    """
    num_tokens, _, head_size = result.shape
    words = lse.itemsize // result.itemsize
    width = head_size + head_size % words + words
    rows = result.unflatten(1, (num_ranks, -1)).movedim(1, 0)
    lse = lse[..., None].view(result.dtype).unflatten(1, (num_ranks, -1))
    packed = result.new_empty(*rows.shape[:-1], width)
    packed[..., :head_size] = rows
    packed[..., -words:] = lse.movedim(1, 0)
    return packed


def unpack(packed: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the results and of the LSE in what all ranks have sent."""
    words = torch.float32.itemsize // packed.itemsize
    lses = packed[..., -words:].view(torch.float32)[..., 0]
    return packed[..., :head_size], lses


def exchange(
    peers: Peers, result: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `merge_shares` joins for this rank's heads.

    Args:
        peers: the ranks.
        result: [num_tokens, heads of all ranks, head_size] of this rank's share.
        lse: [num_tokens, heads of all ranks] float32.

    Returns:
        Results, of each rank or their weighted sum, and the LSE of each rank.

    """
    if peers.all_to_all:
        return unpack(peers.scatter(pack(result, lse, peers.size)), result.shape[-1])
    lses = peers.gather(lse, 0).unflatten(0, (peers.size, -1))
    weigh_share(result, lses, peers.rank)
    own = lses.unflatten(2, (peers.size, -1))[:, :, peers.rank]
    return peers.reduce_scatter(result)[None], own


@dataclass
class NewTokens:
    """A batch's new tokens as a paged cache, for attention among themselves."""

    pages: BatchPages
    seq_lens: torch.Tensor  # [num_reqs], the queries' lengths
    block_table: torch.Tensor  # [num_reqs, max_pages]
    schedules: dict[Any, VarlenSchedule]
    slots: torch.Tensor  # [max_num_tokens], 0, 1, 2, ...


@dataclass
class Share:
    """What of a step's batch is on this rank."""

    peers: Peers
    seq_lens: torch.Tensor  # [num_reqs] keys in this rank's cache that are attended to
    is_empty: bool  # no rank has any
    new_tokens: NewTokens | None  # None: they are counted in seq_lens

    def update(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        max_query_len: int,
        num_tokens: int,
    ) -> None:
        """Counts keys and fills schedules for the lengths that are on the device."""
        new = self.new_tokens
        if not self.is_empty:
            count_keys(
                query_start_loc,
                seq_lens,
                self.seq_lens,
                num_shares=self.peers.size,
                share=self.peers.rank,
                run=self.peers.run,
                context=new is not None,
            )
        if new is not None:
            new.seq_lens, new.block_table = new.pages.update(
                query_start_loc, max_query_len
            )
            torch.arange(len(new.slots), out=new.slots)  # sleep mode may discard them
            for schedule in new.schedules.values():
                schedule.update(
                    query_start_loc,
                    new.seq_lens,
                    max_query_len=max_query_len,
                    num_tokens=num_tokens,
                )


class Shares:
    """Persistent buffers of a metadata builder, from which it makes each `Share`."""

    def __init__(self, peers: Peers, schedule: VarlenSchedule) -> None:
        self.peers = peers
        max_num_seqs, max_num_tokens = schedule.max_num_seqs, schedule.max_num_tokens
        device = schedule.device
        self.seq_lens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        pages = BatchPages(max_num_seqs, max_num_tokens, device)
        slots = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.new_tokens = NewTokens(pages, pages.seq_lens, pages.block_table, {}, slots)
        self.has_sinks = False

    def add(self, impl: Any, device: torch.device) -> None:
        """Makes what a layer, and those that share its schedules, needs."""
        self.has_sinks |= impl.sinks is not None
        self.new_tokens.schedules[impl.schedule_key] = impl.make_schedule(
            PAGE_MULTIPLE, device, of_batch=True
        )

    def build(self, num_reqs: int, max_query_len: int, is_empty: bool) -> Share:
        """The share of a batch; lengths come with its update.

        Args:
            num_reqs: sequences.
            max_query_len: what kernels are chosen for.
            is_empty: all ranks agree that the batch has no context.

        """
        # Sinks are counted once, with the new tokens.
        whole = max_query_len == 1 and not self.has_sinks
        new_tokens = None if whole else replace(self.new_tokens)
        seq_lens = self.seq_lens[:num_reqs]
        return Share(self.peers, seq_lens, is_empty and not whole, new_tokens)


def unsupported(impl: Any) -> list[str]:
    """Every reason why a layer cannot run with DCP."""
    positions = "as a rank does not see its keys' distance"
    reasons = {
        f"sliding_window {impl.sliding_window}, {positions}": impl.sliding_window,
        f"ALiBi, {positions}": impl.alibi_slopes is not None,
        "images that are seen both ways": impl.sees_images,
        "KV sharing, as new keys are read from the layer's own": (
            impl.kv_sharing_target_layer_name
        ),
        f"{impl.num_kv_heads} KV heads on a rank, only with one": impl.num_kv_heads > 1,
        "batch invariance, as new tokens are summed apart": is_batch_invariant(),
        "cross-attention": impl.attn_type == AttentionType.ENCODER_DECODER,
        f"kv_cache_dtype {impl.kv_cache_dtype}": impl.kv_cache_dtype
        not in CACHE_DTYPES,
    }
    return [
        f"decode context parallelism (DCP) not supported with {reason}"
        for reason, applies in reasons.items()
        if applies
    ]


def new_keys_and_values(
    impl: Any, layer: AttentionLayer, key: torch.Tensor, value: torch.Tensor, slots
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new tokens' K and V as pages, rounded to fp8 where the cache is."""
    if impl.fp8_dtype is None:
        return pages_of_batch(key), pages_of_batch(value)
    # Two pages or more: fewer tokens than a page would be copied once more.
    num_pages = max(-(-len(slots) // PAGE_MULTIPLE), 2)
    size = (2, num_pages, PAGE_MULTIPLE, *key.shape[1:])
    rounded = torch.empty(size, dtype=impl.fp8_dtype, device=key.device)
    scales = dict(k_scale=layer._k_scale, v_scale=layer._v_scale)
    reshape_and_cache(key, value, rounded[0], rounded[1], slots, **scales)
    new_key, new_value = rounded.flatten(1, 2)
    return pages_of_batch(new_key), pages_of_batch(new_value)


def attend(
    impl: Any,
    layer: AttentionLayer,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    kv_cache: torch.Tensor,
    metadata: Any,
    output: torch.Tensor,
) -> None:
    """Writes the attention of this rank's heads to all ranks' keys.

    Rows of no sequence become 0.
    """
    share, num_tokens = metadata.share, metadata.num_actual_tokens
    peers, new = share.peers, share.new_tokens
    query, output = query[:num_tokens], output[:num_tokens]
    is_fp8 = impl.fp8_dtype is not None
    common = dict(
        max_query_len=metadata.max_query_len,
        scale=impl.scale,
        softcap=impl.softcap,
        k_scale=layer._k_scale if is_fp8 else None,
        v_scale=layer._v_scale if is_fp8 else None,
    )

    def no_lse(rows: torch.Tensor) -> torch.Tensor:
        size = rows.shape[:2]
        return torch.full(size, float("-inf"), dtype=torch.float32, device=rows.device)

    output_lse = None
    if new is not None:
        if key is None or value is None:
            raise ValueError(
                "CONCH reads the keys and values of new tokens from the layer with "
                "decode context parallelism, but there are none. Leave out "
                "--decode-context-parallel-size."
            )
        slots = new.slots[:num_tokens]
        output_lse = no_lse(output)  # always, for one variant of the kernels
        varlen_attention(
            query,
            *new_keys_and_values(impl, layer, key, value, slots),
            output,
            metadata.query_start_loc,
            new.seq_lens,
            new.block_table,
            causal=metadata.causal,
            schedule=new.schedules[impl.schedule_key],
            sinks=impl.sinks,
            output_lse=output_lse,
            **common,
        )
    if share.is_empty:
        return
    queries = peers.gather(query.contiguous(), 1)
    result, lse = torch.empty_like(queries), no_lse(queries)
    caches = impl.key_value_caches(kv_cache)
    varlen_attention(
        queries,
        caches.key,
        caches.value,
        result,
        metadata.query_start_loc,
        share.seq_lens,
        metadata.block_table,
        causal=False,
        schedule=metadata.schedules[impl.schedule_key],
        output_lse=lse,
        **common,
    )
    merge_shares(output, output_lse, *exchange(peers, result, lse))


def reserve(query: torch.Tensor, num_ranks: int) -> None:
    """Takes for a moment the memory that `attend` will need, for vLLM to measure."""
    num_tokens, num_heads, head_size = query.shape
    # Queries, results, and a copy of either for the exchange.
    query.new_empty(3, num_tokens, num_heads * num_ranks, head_size)
