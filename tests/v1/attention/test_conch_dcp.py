# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Decode context parallelism: ranks that share the keys give what one rank gives.

The ranks are threads of this process that take turns; each has a cache with its share
of the keys, an implementation and a builder, as vLLM would make them on it. What one
sends to the others goes through `Ranks`.
"""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.attention.conch_devices import use_device
from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    HALF_DTYPES,
    ON_GPU,
    assert_close,
    gpu_only,
    poisoned_scratch,
)
from tests.kernels.attention.conch_reference import (
    SENTINEL,
    attention,
    output_tolerance,
    visible_keys,
)
from tests.v1.attention.conch_backend_harness import (
    discard_buffers,
    record_variants,
    variants_of_warm_up,
)
from tests.v1.attention.conch_release import (
    KV_LAYOUTS,
    bind_kv_cache,
    make_kv_cache,
    make_spec,
    run_layer,
)
from vllm.attention.ops.conch.plan import this_device
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8StaticTensorSym,
)
from vllm.v1.attention.backends import conch_dcp
from vllm.v1.attention.backends.conch_attn import (
    ConchAttentionBackend,
    ConchAttentionImpl,
    ConchAttentionMetadata,
    ConchAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.conch_base import (
    AttentionType,
    CommonAttentionMetadata,
    exchanges_all_to_all,
    key_value_views,
)

# (query_len, tokens already in the cache) of each sequence. A context of 1 is on one
# rank alone, and so is the only key of the first token.
BATCHES = {
    "decode": [(1, 7), (1, 0), (1, 70)],
    "prefill": [(20, 0), (5, 0)],
    "chunked": [(17, 32), (18, 1)],
    "mixed": [(1, 50), (20, 13), (1, 1), (18, 0)],
    "verify": [(4, 30), (2, 1)],
}
NUM_HEADS, BLOCK_SIZE = 3, 16  # of a rank
HEAD_SIZE = 128 if ON_GPU else 16  # on a GPU one that its fastest kernels take
MAX_LEN, MAX_NUM_TOKENS, MAX_NUM_SEQS = 128, 128, 8
NUM_BLOCKS = 40
TIMEOUT = 120  # seconds that a rank waits for others before the test fails


class Ranks:
    """Runs a function on every rank, one at a time, and carries their tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT)
        self.turn = threading.Lock()
        self.sent: list[torch.Tensor] = [torch.empty(0)] * size

    def meet(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Gives a tensor to all and returns what every rank gave."""
        self.sent[rank] = tensor.clone()
        self.turn.release()
        try:
            self.barrier.wait()
            sent = list(self.sent)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return sent

    def run(self, function: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def on_rank(rank: int) -> None:
            with self.turn:
                try:
                    function(rank)
                except BaseException as error:
                    self.barrier.abort()
                    errors.append(error)

        threads = [
            threading.Thread(target=on_rank, args=(r,)) for r in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        broken = threading.BrokenBarrierError
        for error in sorted(errors, key=lambda error: isinstance(error, broken)):
            raise error


class Together(conch_dcp.Peers):
    """Peers that are threads of this process."""

    ranks: Ranks

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat(self.ranks.meet(self.rank, tensor), dim)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        total = sum(self.ranks.meet(self.rank, tensor))
        return total.chunk(self.size, 1)[self.rank].contiguous()

    def scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        sent = self.ranks.meet(self.rank, tensor)
        return torch.stack([parts[self.rank] for parts in sent])


def make_config(num_ranks: int, run: int, **options: Any) -> VllmConfig:
    config = VllmConfig()
    parallel = config.parallel_config
    parallel.decode_context_parallel_size = num_ranks
    parallel.cp_kv_cache_interleave_size = run
    if hasattr(parallel, "dcp_comm_backend"):
        parallel.dcp_comm_backend = options.get("dcp_comm_backend", "ag_rs")
    config.model_config = SimpleNamespace(
        max_model_len=MAX_LEN,
        is_mm_prefix_lm=False,
        rswa_window=None,
        dtype=torch.float32,
    )
    config.scheduler_config.max_num_seqs = MAX_NUM_SEQS
    config.scheduler_config.max_num_batched_tokens = MAX_NUM_TOKENS
    mode = options.get("cudagraph_mode", CUDAGraphMode.NONE)
    config.compilation_config.cudagraph_mode = mode
    return config


class Rank:
    """One rank's layer, cache and builder, and the engine's persistent buffers."""

    def __init__(
        self,
        config: VllmConfig,
        rank: int,
        dtype: torch.dtype,
        kv_cache_dtype: str,
        scales: tuple[float, float],
        **options: Any,
    ) -> None:
        size = config.parallel_config.decode_context_parallel_size
        self.run = config.parallel_config.cp_kv_cache_interleave_size
        self.rank, self.size = rank, size
        group = SimpleNamespace(world_size=size, rank_in_group=rank)
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        saved, parallel_state._DCP = parallel_state._DCP, group
        try:
            with set_current_vllm_config(config):
                impl = ConchAttentionImpl(
                    NUM_HEADS,
                    HEAD_SIZE,
                    1 / math.sqrt(HEAD_SIZE),
                    options.pop("num_kv_heads", 1),
                    kv_cache_dtype=kv_cache_dtype,
                    **options,
                )
        finally:
            parallel_state._DCP = saved
            torch.set_default_dtype(default_dtype)
        self.impl = impl
        self.layer = SimpleNamespace(
            impl=impl,
            _q_scale=torch.tensor(0.25, device=DEVICE),
            _k_scale=torch.tensor(scales[0], device=DEVICE),
            _v_scale=torch.tensor(scales[1], device=DEVICE),
        )
        cache_dtype = torch.uint8 if impl.fp8_dtype else dtype
        view_dtype = impl.fp8_dtype or dtype
        kv_cache = make_kv_cache(
            KV_LAYOUTS[0],
            NUM_BLOCKS,
            BLOCK_SIZE,
            1,
            HEAD_SIZE,
            view_dtype,
            DEVICE,
        )
        bind_kv_cache(self.layer, kv_cache.view(cache_dtype))
        self.caches = key_value_views(kv_cache, HEAD_SIZE)
        forward_context = {"layer": self.layer}
        config.compilation_config.static_forward_context = forward_context
        self.builder = ConchAttentionMetadataBuilder(
            make_spec(BLOCK_SIZE, 1, HEAD_SIZE, cache_dtype),
            ["layer"],
            config,
            torch.device(DEVICE),
        )
        integers = dict(dtype=torch.int32, device=DEVICE)
        width = MAX_LEN // (BLOCK_SIZE * size) + 1
        self.query_start_loc = torch.zeros(MAX_NUM_SEQS + 1, **integers)
        self.seq_lens = torch.zeros(MAX_NUM_SEQS, **integers)
        self.block_table = torch.full((MAX_NUM_SEQS, width), 2**30, **integers)
        self.slot_mapping = torch.full((MAX_NUM_TOKENS,), -1, device=DEVICE)

    def slots(self, row: int, positions: torch.Tensor) -> torch.Tensor:
        """Where this rank keeps keys; -1 for those of other ranks.

        A page of the block table stands for as many tokens as a page of every rank.
        """
        is_local = positions // self.run % self.size == self.rank
        local = positions // (self.size * self.run) * self.run + positions % self.run
        page = self.block_table[row].cpu()[local // BLOCK_SIZE].long()
        return torch.where(is_local, page * BLOCK_SIZE + local % BLOCK_SIZE, -1)

    def fill(
        self,
        lengths: Sequence[tuple[int, int]],
        pages: torch.Tensor,
        keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]],
        padded_reqs: int = 0,
        padded_tokens: int = 0,
    ) -> CommonAttentionMetadata:
        """Puts a batch into the buffers, and its context into the cache."""
        num_reqs = len(lengths) + padded_reqs
        query_lens = [query_len for query_len, _ in lengths]
        seq_lens = [query_len + context for query_len, context in lengths]
        starts = torch.tensor([0, *query_lens]).cumsum(0)
        self.query_start_loc.fill_(starts[-1])
        self.query_start_loc[: len(starts)] = starts
        self.seq_lens.zero_()
        self.seq_lens[: len(seq_lens)] = torch.tensor(seq_lens)
        self.block_table.fill_(2**30)
        self.slot_mapping.fill_(-1)
        for row, (query_len, context) in enumerate(lengths):
            count = -(-(query_len + context) // (BLOCK_SIZE * self.size))
            self.block_table[row, :count] = pages[:count].to(torch.int32)
            pages = pages[count:]
            slots = self.slots(row, torch.arange(query_len + context))
            start = int(starts[row])
            self.slot_mapping[start : start + query_len] = slots[context:]
            cached = slots[:context]
            for cache, rows in zip(self.caches, keys_values[row]):
                local = rows[:context][cached >= 0].to(cache.dtype)
                place = cached[cached >= 0].to(DEVICE)
                cache[place // BLOCK_SIZE, place % BLOCK_SIZE] = local
        num_tokens = int(starts[-1]) + padded_tokens
        return CommonAttentionMetadata(
            query_start_loc=self.query_start_loc[: num_reqs + 1],
            query_start_loc_cpu=self.query_start_loc[: num_reqs + 1].cpu(),
            seq_lens=self.seq_lens[:num_reqs],
            num_reqs=num_reqs,
            num_actual_tokens=num_tokens,
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            block_table_tensor=self.block_table[:num_reqs],
            slot_mapping=self.slot_mapping[:num_tokens],
            causal=True,
            **host_lengths(self.seq_lens[:num_reqs].cpu()),
        )


def host_lengths(seq_lens: torch.Tensor) -> dict[str, torch.Tensor]:
    """As this release's metadata has them on the host."""
    fields = CommonAttentionMetadata.__dataclass_fields__
    name = "seq_lens_cpu_upper_bound"
    return {name if name in fields else "_seq_lens_cpu": seq_lens}


class Batch:
    """Queries of all ranks' heads, and keys and values of whole sequences."""

    def __init__(
        self, group: "Group", lengths: Sequence[tuple[int, int]], padding: int = 0
    ) -> None:
        torch.manual_seed(1)
        self.lengths = lengths
        self.num_tokens = sum(query_len for query_len, _ in lengths)
        heads = NUM_HEADS * group.size
        rows = self.num_tokens + padding
        shape = (rows, heads, HEAD_SIZE)
        self.query = torch.full(shape, math.nan, dtype=group.dtype, device=DEVICE)
        live = torch.randn(self.num_tokens, *shape[1:], device=DEVICE)
        self.query[: self.num_tokens] = live.to(group.dtype)
        self.keys_values = []
        fp8, layer = group.ranks[0].impl.fp8_dtype, group.ranks[0].layer
        new: list[list[torch.Tensor]] = [[], []]
        for query_len, context in lengths:
            pair = []
            for i, scale in enumerate((layer._k_scale, layer._v_scale)):
                rows = torch.randn(query_len + context, 1, HEAD_SIZE, device=DEVICE)
                rows = rows.to(group.dtype)
                new[i].append(rows[context:])
                if fp8 is not None:
                    bound = torch.finfo(fp8).max
                    rows = (rows.float() / scale).clamp(-bound, bound).to(fp8)
                pair.append(rows)
            self.keys_values.append(tuple(pair))
        pad = torch.full((padding, 1, HEAD_SIZE), math.nan, device=DEVICE)
        self.key, self.value = (
            torch.cat([*parts, pad.to(group.dtype)]) for parts in new
        )

    def expected(self, group: "Group", sinks: torch.Tensor | None) -> list[Any]:
        """Each sequence's attention to all of its keys."""
        impl, layer = group.ranks[0].impl, group.ranks[0].layer
        results, start = [], 0
        for (query_len, context), (key, value) in zip(self.lengths, self.keys_values):
            seq_len = query_len + context
            if impl.fp8_dtype is not None:
                key = key.double() * layer._k_scale
                value = value.double() * layer._v_scale
            rule = dict(causal=True, sliding_window=None)
            visible = visible_keys(query_len, seq_len, 0, **rule, device=DEVICE)
            query = self.query[start : start + query_len]
            results.append(
                attention(
                    query,
                    key,
                    value,
                    visible,
                    scale=impl.scale,
                    softcap=impl.softcap,
                    sinks=sinks,
                )
            )
            start += query_len
        return results


class Group:
    """All ranks of a DCP group."""

    def __init__(
        self,
        size: int = 2,
        run: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        kv_cache_dtype: str = "auto",
        scales: tuple[float, float] = (1.0, 1.0),
        sinks: torch.Tensor | None = None,
        options: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        self.size, self.dtype, self.sinks = size, dtype, sinks
        self.threads = Ranks(size)
        self.ranks = []
        for rank in range(size):
            layer = dict(options or {})
            if sinks is not None:
                layer["sinks"] = sinks.chunk(size)[rank]
            made = Rank(
                make_config(size, run, **config),
                rank,
                dtype,
                kv_cache_dtype,
                scales,
                **layer,
            )
            self.connect(made)
            self.ranks.append(made)

    def connect(self, rank: Rank) -> None:
        peers = Together(**vars(rank.builder.shares.peers))
        peers.ranks = self.threads
        rank.builder.shares.peers = peers

    def step(
        self,
        lengths: Sequence[tuple[int, int]],
        padded_reqs: int = 0,
        padded_tokens: int = 0,
        metadata_of: Callable[[Rank, CommonAttentionMetadata], Any] | None = None,
        roundings: int = 0,
        slices: bool = False,
    ) -> list[ConchAttentionMetadata]:
        """Runs a batch on every rank and compares with attention to all keys.

        roundings: to 16 bits, of results of shares, besides those of one rank.
        slices: V is a slice of a projection, and K, which was rotated, is not.
        """
        batch = Batch(self, lengths, padded_tokens)
        if slices:
            batch.value = batch.value.repeat(1, 2, 1)[:, :1]
        pages = 1 + torch.randperm(NUM_BLOCKS - 1)
        outputs: list[Any] = [None] * self.size
        built: list[Any] = [None] * self.size

        def run(rank: int) -> None:
            this = self.ranks[rank]
            common = this.fill(
                lengths, pages, batch.keys_values, padded_reqs, padded_tokens
            )
            metadata = this.builder.build(0, common)
            if metadata_of is not None:
                metadata = metadata_of(this, metadata)
            own = slice(rank * NUM_HEADS, (rank + 1) * NUM_HEADS)
            query = batch.query[:, own]
            output = torch.full(query.shape, SENTINEL, dtype=self.dtype, device=DEVICE)
            run_layer(this.layer, query, batch.key, batch.value, metadata, output)
            outputs[rank], built[rank] = output, metadata

        self.threads.run(run)
        output, start = torch.cat(outputs, 1), 0
        for (query_len, _), expected in zip(lengths, batch.expected(self, self.sinks)):
            found = output[start : start + query_len]
            allowed = output_tolerance(expected, self.dtype)
            unit = torch.finfo(self.dtype).eps / 2
            allowed += roundings * unit * expected.output_size
            assert_close("output", found, expected.output, allowed)
            start += query_len
        padding = output[start:]
        is_empty = built[0].share.is_empty
        assert bool((padding == (SENTINEL if is_empty else 0)).all())
        return built


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch: str) -> None:
    built = Group().step(BATCHES[batch])
    for metadata in built:
        assert (metadata.share.new_tokens is None) == (batch == "decode")
        assert metadata.share.is_empty == (batch == "prefill")


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_sleep_may_discard_buffers(kv_cache_dtype: str) -> None:
    group = Group(kv_cache_dtype=kv_cache_dtype)
    for batch in ("mixed", "decode", "chunked"):
        group.step(BATCHES[batch])
        for rank in group.ranks:
            discard_buffers(rank.builder)


@pytest.mark.parametrize(
    ("size", "run", "batch"),
    [(3, 1, "mixed"), (2, 4, "decode"), (2, BLOCK_SIZE, "decode")],
)
def test_ranks_and_runs(size: int, run: int, batch: str) -> None:
    Group(size, run).step(BATCHES[batch])


def test_pages_of_runs() -> None:
    group = Group(2, BLOCK_SIZE)
    group.step([(3, 40), (20, 33)])


def test_contexts_of_every_remainder() -> None:
    """One key more in each step: the last one is on one rank, then on the other."""
    group = Group(2)
    for context in (15, 16, 17):
        group.step([(1, context), (1, 2 * context)])


@pytest.mark.parametrize("batch", ["decode", "mixed"])
def test_results_are_sent_to_all(batch: str) -> None:
    """The other way of exchange, where the release has it."""
    if not hasattr(VllmConfig().parallel_config, "dcp_comm_backend"):
        pytest.skip("this release has one way of exchange")
    group = Group(2, dcp_comm_backend="a2a")
    assert all(rank.builder.shares.peers.all_to_all for rank in group.ranks)
    group.step(BATCHES[batch])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("all_to_all", [False, True])
def test_16_bits(dtype: torch.dtype, all_to_all: bool) -> None:
    """Results of shares are rounded when they are sent, and once more when weighted."""
    group = Group(2, dtype=dtype)
    for rank in group.ranks:
        rank.builder.shares.peers.all_to_all = all_to_all
    for batch in ("decode", "chunked"):
        group.step(BATCHES[batch], roundings=1 if all_to_all else 3)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "batch"),
    [("fp8", "decode"), ("fp8", "mixed"), ("fp8_e5m2", "chunked"), ("fp8", "prefill")],
)
def test_fp8_cache(kv_cache_dtype: str, batch: str) -> None:
    """New tokens are seen rounded, as they will be when they are context."""
    scales = (0.5, 2.0)
    Group(kv_cache_dtype=kv_cache_dtype, scales=scales).step(BATCHES[batch])


@pytest.mark.parametrize("batch", ["decode", "chunked", "prefill"])
def test_sinks_are_counted_once(batch: str) -> None:
    sinks = torch.linspace(-1, 4, 2 * NUM_HEADS, device=DEVICE)
    Group(sinks=sinks).step(BATCHES[batch])


def test_softcap() -> None:
    group = Group(options={"logits_soft_cap": 1.5})
    group.step(BATCHES["chunked"])


@pytest.mark.parametrize("batch", ["decode", "mixed"])
def test_padding(batch: str) -> None:
    Group().step(BATCHES[batch], padded_reqs=2, padded_tokens=5)


# ---- CUDA graphs: metadata of a capture, with the lengths of other batches


def capture(group: Group, lengths: Sequence[tuple[int, int]]) -> list[Any]:
    """Each rank's metadata as it is kept in a graph of that size."""
    pages = 1 + torch.randperm(NUM_BLOCKS - 1)
    batch = Batch(group, lengths)
    kept = []
    for rank in group.ranks:
        common = rank.fill(lengths, pages, batch.keys_values)
        kept.append(rank.builder.build_for_cudagraph_capture(common))
    return kept


@pytest.mark.parametrize(
    ("mode", "captured", "replayed"),
    [
        (
            CUDAGraphMode.FULL_DECODE_ONLY,
            [(1, 0)] * 4,
            [[(1, 7), (1, 0), (1, 40)], [(1, 1)]],
        ),
        (
            CUDAGraphMode.FULL,
            [(9, 0)] * 4,
            [[(20, 13), (1, 50)], [(33, 0)], [(1, 9)]],
        ),
    ],
    ids=str,
)
def test_graphs_replay_other_batches(
    mode: CUDAGraphMode, captured: list, replayed: list
) -> None:
    """A graph has the launches of its capture; lengths come from buffers."""
    group = Group(cudagraph_mode=mode)
    kept = dict(zip(group.ranks, capture(group, captured)))
    num_reqs, num_tokens = len(captured), sum(length for length, _ in captured)
    for lengths in replayed:

        def of_graph(rank: Rank, metadata: ConchAttentionMetadata) -> Any:
            old, share = kept[rank], metadata.share
            assert not old.share.is_empty
            assert not share.is_empty
            assert old.max_query_len == metadata.max_query_len
            assert old.share.seq_lens.data_ptr() == share.seq_lens.data_ptr()
            assert (old.share.new_tokens is None) == (share.new_tokens is None)
            return old

        group.step(
            lengths,
            padded_reqs=num_reqs - len(lengths),
            padded_tokens=num_tokens - sum(length for length, _ in lengths),
            metadata_of=of_graph,
        )


def test_metadata_of_draft_steps_is_updated_in_place() -> None:
    """Draft steps move lengths on the device; counts of keys follow."""
    builders = ConchAttentionMetadataBuilder
    if not getattr(builders, "supports_draft_decode_metadata_update", False):
        pytest.skip("this release builds the metadata of draft steps anew")
    group = Group()

    def moved(rank: Rank, metadata: ConchAttentionMetadata) -> Any:
        lengths = rank.seq_lens.clone()
        rank.seq_lens[:] = 1
        rank.builder.update_draft_decode_metadata(metadata)
        rank.seq_lens[:] = lengths
        rank.builder.update_draft_decode_metadata(metadata)
        return metadata

    group.step(BATCHES["decode"], metadata_of=moved)
    group.step([(2, 9)], metadata_of=moved)


def test_ranks_agree_that_there_is_no_context() -> None:
    """A rank without keys of a context that others have does not leave them alone."""
    group = Group(2, 16)
    built = group.step([(20, 1), (19, 0)])
    assert [metadata.share.is_empty for metadata in built] == [False, False]
    assert [metadata.share.seq_lens.tolist() for metadata in built] == [[1, 0], [0, 0]]


# ---- What vLLM asks, and what is refused


def test_answers() -> None:
    assert getattr(ConchAttentionBackend, "supports_dcp", lambda: True)()
    (rank, _) = Group().ranks
    assert rank.impl.need_to_return_lse_for_decode
    assert rank.impl.supports_mtp_with_cp_non_trivial_interleave_size
    assert not rank.impl.supports_quant_query_input
    assert not rank.impl.fused_output_quant_supported(kFp8StaticTensorSym)
    assert rank.builder.shares.peers.size == 2
    assert not exchanges_all_to_all(rank.impl.vllm_config)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sliding_window": 16}, "sliding_window 16"),
        ({"alibi_slopes": [0.5] * NUM_HEADS}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "other"}, "KV sharing"),
        ({"num_kv_heads": 3}, "3 KV heads on a rank"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "cross-attention"),
    ],
    ids=str,
)
def test_refused_layers(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"\(DCP\) not supported with {reason}"):
        Group(options=options)


def test_refused_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conch_dcp, "is_batch_invariant", lambda: True)
    with pytest.raises(ValueError, match=r"\(DCP\) .* batch invariance"):
        Group()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"\(DCP\) .* kv_cache_dtype int8"):
        Group(kv_cache_dtype="int8")


@pytest.mark.parametrize("pynccl", ["works", "disabled", "missing"])
def test_results_are_summed_without_pynccl(
    pynccl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is disabled, what vLLM returns is memory that nobody has written."""
    size, rank = 2, 1
    tensor = torch.randn(5, size * NUM_HEADS, HEAD_SIZE, device=DEVICE)
    expected = size * tensor[:, rank * NUM_HEADS :]

    def of_vllm(whole: torch.Tensor, dim: int) -> torch.Tensor:
        own = size * whole.chunk(size, dim)[rank].contiguous()
        return own if pynccl == "works" else own * math.nan

    def of_torch(own: torch.Tensor, whole: torch.Tensor, group: str) -> None:
        assert (group, pynccl == "works") == ("all ranks", False)
        assert own.is_contiguous()
        assert whole.is_contiguous()
        own.copy_(size * whole.chunk(size)[rank])

    communicator = SimpleNamespace()
    if pynccl != "missing":
        communicator.pynccl_comm = SimpleNamespace(disabled=pynccl == "disabled")
    group = SimpleNamespace(
        device_communicator=communicator,
        device_group="all ranks",
        reduce_scatter=of_vllm,
    )
    monkeypatch.setattr(conch_dcp, "get_dcp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", of_torch)
    peers = conch_dcp.Peers(size, rank, 1, all_to_all=False)
    found = peers.reduce_scatter(tensor)
    assert found.is_contiguous()
    assert torch.equal(found, expected)


def test_new_keys_are_needed() -> None:
    rank = Group().ranks[0]
    batch = Batch(Group(), [(5, 0)])
    pages = torch.arange(1, NUM_BLOCKS)
    common = rank.fill(batch.lengths, pages, batch.keys_values)
    metadata = rank.builder.build(0, common)
    query = batch.query[:, :NUM_HEADS]
    with pytest.raises(ValueError, match="--decode-context-parallel-size"):
        run_layer(rank.layer, query, None, None, metadata, torch.empty_like(query))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_warm_up_launches_what_steps_do(
    kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, as other ranks may be elsewhere."""
    rank = Group(kv_cache_dtype=kv_cache_dtype).ranks[0]
    calls = []
    attend = conch_dcp.varlen_attention

    def recorded(query: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        calls.append((query.shape[1], kwargs["causal"], kwargs["max_query_len"] > 1))
        attend(query, *args, **kwargs)

    monkeypatch.setattr(conch_dcp, "varlen_attention", recorded)
    monkeypatch.setattr(ConchAttentionImpl, "warm_up_query_lens", lambda *_: [1, 20])
    rank.impl.run_dummy_batches(rank.layer)
    both, own = 2 * NUM_HEADS, NUM_HEADS
    assert set(calls) == {(both, False, False), (both, False, True), (own, True, True)}


@pytest.mark.parametrize("slices", [False, True])
def test_warm_up_has_every_variant(
    slices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the keys of context and new tokens are split, of one of these, of none."""
    monkeypatch.setattr(f"{__name__}.MAX_LEN", 256)
    monkeypatch.setattr(f"{__name__}.MAX_NUM_TOKENS", 200)
    device = replace(this_device(0 if ON_GPU else None), num_units=20)
    use_device(monkeypatch, device)
    group = Group()
    warm = variants_of_warm_up([rank.layer for rank in group.ranks])
    launched = record_variants(monkeypatch)
    are_split = []
    for query_len in (20, 100, 170):
        group.step([(1, 9), (query_len, 40)], slices=slices)
        builder = group.ranks[0].builder
        (context,) = builder.schedules.values()
        (own,) = builder.shares.new_tokens.schedules.values()
        plans = context.plan, own.plan
        are_split.append([plan.split is not None for plan in plans])
    assert ON_GPU or are_split == [[True, True], [False, True], [False, False]]
    assert launched <= warm


@gpu_only
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("all_to_all", [False, True])
def test_nothing_compiles_after_warm_up(
    all_to_all: bool, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    group = Group(dtype=torch.bfloat16, kv_cache_dtype=kv_cache_dtype)
    for rank in group.ranks:
        rank.builder.shares.peers.all_to_all = all_to_all
        monkeypatch.setattr(conch_dcp, "exchanges_all_to_all", lambda _: all_to_all)
        rank.impl.warm_up(rank.layer)
    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime,
        "jit_post_compile_hook",
        lambda **event: compiled.append(event["fn"].name),
    )
    for batch in BATCHES.values():
        group.step(batch, roundings=3)
    assert not compiled


def test_memory_of_a_step_is_reserved() -> None:
    rank = Group().ranks[0]
    query = torch.zeros(5, NUM_HEADS, HEAD_SIZE, device=DEVICE)
    output = torch.ones_like(query)
    run_layer(rank.layer, query, query[:, :1], query[:, :1], None, output)
    assert bool((output == 0).all())
