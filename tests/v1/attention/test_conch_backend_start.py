# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What CONCH does at start-up, and keeps: profiling, warm-up, prepared calls."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch

from tests.kernels.attention.conch_devices import DEVICES, use_device
from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    ON_GPU,
    gpu_only,
    poisoned_scratch,
    use_hopper,
)
from tests.v1.attention import conch_backend_harness
from tests.v1.attention.conch_backend_harness import (
    BATCHES,
    BLOCK_SIZE,
    HEAD_SIZE,
    MAX_NUM_TOKENS,
    NUM_KV_HEADS,
    Engine,
    record_variants,
    variants_of_warm_up,
)
from tests.v1.attention.conch_release import (
    KV_LAYOUTS,
    bind_kv_cache,
    build_with_images,
    make_kv_cache,
    run_layer,
)
from vllm.attention.ops.conch import hopper_prefill
from vllm.attention.ops.conch import schedule as schedule_module
from vllm.attention.ops.conch.plan import make_plan
from vllm.platforms import current_platform
from vllm.v1.attention.backends import conch_attn
from vllm.v1.attention.backends.conch_attn import ConchAttentionMetadataBuilder
from vllm.v1.attention.backends.conch_base import bound_kv_cache, key_value_views


def test_profiling_has_no_cache_and_no_metadata() -> None:
    engine = Engine()
    (layer,) = engine.layers
    bind_kv_cache(layer, torch.tensor([]))
    query, key, value = engine.new_tokens(layer, 5)
    output = torch.full_like(query, math.nan)
    assert run_layer(layer, query, key, value, None, output) is output
    assert bool((output == 0).all())
    layer.impl.write_kv_cache(layer, key, value, torch.tensor([]), engine.slot_mapping)
    layer.impl.warm_up(layer)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_warm_up_leaves_the_cache_alone(kv_cache_dtype: str) -> None:
    engine = Engine(kv_cache_dtype=kv_cache_dtype)
    (layer,) = engine.layers
    before = [cache.clone().view(torch.uint8) for cache in layer.caches]
    layer.impl.run_dummy_batches(layer)
    for cache, old in zip(layer.caches, before):
        assert torch.equal(cache.contiguous().view(torch.uint8), old)
    assert not layer.impl.attentions  # nor is the schedule kept


def test_warm_up_launches_what_images_need(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine([{}, {"sliding_window": 16}])
    engine.config.model_config.is_mm_prefix_lm = True
    warm = variants_of_warm_up(engine.layers)
    launched = record_variants(monkeypatch)
    for batch, images in ("mixed", {1: [(2, 20), (22, 30)]}), ("decode", {0: [(0, 3)]}):
        common = engine.fill(BATCHES[batch])
        metadata = build_with_images(engine.builder, common, images, 2)
        for layer in engine.layers:
            engine.check(layer, metadata)
    assert launched <= warm


def warm_hopper_engine(
    monkeypatch: pytest.MonkeyPatch, num_units: int
) -> tuple[Engine, set[tuple], set[tuple]]:
    """An engine on a Hopper GPU, variants of its warm-up, and all that it launches."""
    use_hopper(monkeypatch, num_units)
    monkeypatch.setattr(conch_backend_harness, "HEAD_SIZE", 64)
    monkeypatch.setattr(conch_backend_harness, "MAX_MODEL_LEN", 512)
    monkeypatch.setattr(schedule_module, "SHORT_SEQ_LEN", 40)
    engine = Engine(dtype=torch.float16)
    warm = variants_of_warm_up(engine.layers)
    return engine, warm, record_variants(monkeypatch)


def test_warm_up_launches_what_hopper_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For few tiles of short sequences, few of long ones, and many."""
    engine, warm, launched = warm_hopper_engine(monkeypatch, num_units=12)
    batches = [[(20, 0)], [(20, 200)], [(130, 300)]]
    if not ON_GPU:  # whose multiprocessors so many tiles do not fill
        batches.append([(30, 0)] * 6)
    kinds = []
    for lengths in batches:
        engine.step(lengths)
        (schedule,) = engine.builder.schedules.values()
        kinds.append((schedule.plan.small, schedule.plan.split is not None))
    expected = [(True, False), (False, True), (False, True), (False, False)]
    assert kinds == expected[: len(batches)]
    assert launched <= warm


@pytest.mark.parametrize("num_units", [12, 200])
def test_warm_up_launches_decodes_beside_prefills(
    num_units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where so many multiprocessors are that all prefills are split."""
    engine, warm, launched = warm_hopper_engine(monkeypatch, num_units)
    for lengths in [(1, 50)], [(1, 50), (20, 0)], [(20, 200), (2, 7)]:
        engine.step(lengths)
    assert launched <= warm


@gpu_only
@pytest.mark.parametrize("layout", KV_LAYOUTS)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_nothing_compiles_after_warm_up(
    kv_cache_dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton import knobs

    windows = [{}, {"sliding_window": 40}, {"logits_soft_cap": 30.0}]
    engine = Engine(
        windows,
        dtype=torch.bfloat16,
        kv_cache_dtype=kv_cache_dtype,
        layout=layout,
        num_speculative_tokens=3,
    )
    for layer in engine.layers:
        layer.impl.warm_up(layer)
    compiled: list[str] = []

    def record(**event: Any) -> None:
        compiled.append(event["fn"].name)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", record)
    for lengths in (*BATCHES.values(), [(1, 0)], [(190, 1)], [(16, 0), (17, 1)]):
        engine.step(lengths)
        engine.step(lengths, padded_reqs=2, padded_tokens=1)
    engine.step([(1, 5)], padded_tokens=MAX_NUM_TOKENS - 1)
    assert not compiled


def random_batches(
    random: Random, count: int, longest_seq: int
) -> Iterator[tuple[list[tuple[int, int]], dict[str, int]]]:
    """Decodes, drafts, chunks and whole prompts, with padding as for CUDA graphs."""
    for _ in range(count):
        longest = random.choice([1, 4, 16, 200, 1500])
        most_context = random.choice([0, 200, longest_seq])
        lengths = []
        for _ in range(random.randint(1, 6)):
            query_len = random.randint(1, longest)
            most = min(most_context, longest_seq - query_len)
            lengths.append((query_len, random.randint(0, most)))
        padding = {"padded_reqs": random.randint(0, 2)}
        padding["padded_tokens"] = random.choice([0, 1, 13, 3000])
        yield lengths, padding


def run_on_random_rows(
    random: Random, engine: Engine, layer: Any, metadata: Any
) -> None:
    """Query, key and value each as a slice of a projection, or a tensor of its own."""
    query, key, value = (
        rows.contiguous() if random.random() < 0.5 else rows
        for rows in engine.new_tokens(layer, metadata.num_actual_tokens)
    )
    query = engine.as_passed(layer, query)
    output = torch.empty_like(query, dtype=engine.dtype)
    run_layer(layer, query, key, value, metadata, output)


@pytest.fixture
def without_hopper_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[], None]]:
    """Has plans made as with another version of Triton, once called."""

    def leave_out() -> None:
        monkeypatch.setattr(hopper_prefill, "TRITON_VERSIONS", ())
        make_plan.cache_clear()

    yield leave_out
    make_plan.cache_clear()


@pytest.mark.skipif(ON_GPU, reason="see the test with a GPU")
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize(
    "name, has_own", [("A100", True), ("H200", True), ("H200", False), ("MI300X", True)]
)
@pytest.mark.parametrize("head_size, num_kv_heads", [(128, 2), (72, 1)])
def test_random_batches_launch_what_warm_up_did(
    head_size: int,
    num_kv_heads: int,
    name: str,
    has_own: bool,
    kv_cache_dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    without_hopper_kernels: Callable[[], None],
) -> None:
    """On GPUs that are not here: no launch is made, each is looked at.

    One head of 72 is no multiple of 16, and a projection of four and two such heads is.
    Where Triton is one that Hopper's own kernels do not know, pages of 64 are read in
    boxes.
    """
    use_device(monkeypatch, DEVICES[name])
    if not has_own:
        without_hopper_kernels()
        monkeypatch.setattr(conch_backend_harness, "BLOCK_SIZE", 64)
    for constant, size in ("MAX_MODEL_LEN", 4096), ("MAX_NUM_TOKENS", 16384):
        monkeypatch.setattr(conch_backend_harness, constant, size)
    monkeypatch.setattr(conch_backend_harness, "HEAD_SIZE", head_size)
    monkeypatch.setattr(conch_backend_harness, "NUM_KV_HEADS", num_kv_heads)
    layers = [{}, {"sliding_window": 40}]
    engine = Engine(
        layers,
        dtype=torch.float16,
        kv_cache_dtype=kv_cache_dtype,
        num_speculative_tokens=3,
        num_blocks=1 + 6 * 4096 // BLOCK_SIZE,
    )
    warm = variants_of_warm_up(engine.layers)
    launched = record_variants(monkeypatch, runs=False)
    random = Random(0)
    for lengths, padding in random_batches(random, 100, 4096):
        metadata = engine.builder.build(0, engine.fill(lengths, **padding))
        for layer in engine.layers:
            run_on_random_rows(random, engine, layer, metadata)
        assert launched <= warm, (lengths, padding)
    if not has_own and kv_cache_dtype == "auto":
        prefills = [x for kernel, x, *_ in launched if kernel == "prefill_kernel"]
        for rows in 64, 128:  # of few tiles, and of many
            tile = f"('BLOCK_M', {rows})", "('ITEM_TILES', 1)"
            assert any(all(part in x for part in tile) for x in prefills)


def at_offset(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The tensor, in memory that begins so many elements after an aligned address."""
    flat = tensor.new_empty(tensor.numel() + offset)[offset:]
    return flat.view(tensor.shape).copy_(tensor)


@gpu_only
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_a_thousand_random_batches_compile_nothing(
    kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes, drafts, chunks and whole prompts; lengths and slots at any address."""
    from triton import knobs

    longest_seq = 4096  # whose keys are split, of short ones not
    monkeypatch.setattr(conch_backend_harness, "MAX_MODEL_LEN", longest_seq)
    layers = [{}, {"sliding_window": 40}]
    engine = Engine(
        layers,
        dtype=torch.bfloat16,
        kv_cache_dtype=kv_cache_dtype,
        num_speculative_tokens=3,
        num_blocks=1 + 6 * longest_seq // BLOCK_SIZE,
    )
    for layer in engine.layers:
        layer.impl.warm_up(layer)
    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime,
        "jit_post_compile_hook",
        lambda **event: compiled.append(event["fn"].name),
    )
    random = Random(0)
    for lengths, padding in random_batches(random, 1000, longest_seq):
        common = engine.fill(lengths, **padding)
        for name in (
            "query_start_loc",
            "seq_lens",
            "slot_mapping",
            "block_table_tensor",
        ):
            tensor = getattr(common, name)
            setattr(common, name, at_offset(tensor, random.randrange(4)))
        metadata = engine.builder.build(0, common)
        for layer in engine.layers:
            run_on_random_rows(random, engine, layer, metadata)
        assert not compiled, (compiled, lengths, padding)


def test_views_of_a_cache_are_made_once() -> None:
    engine = Engine(kv_cache_dtype="fp8")
    impl = engine.layers[0].impl
    kv_cache = make_kv_cache(
        KV_LAYOUTS[0], 4, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE, torch.float16, DEVICE
    ).view(torch.uint8)[..., ::2]
    other = kv_cache.clone()
    first = impl.key_value_caches(kv_cache)
    assert impl.key_value_caches(kv_cache) is first
    second = impl.key_value_caches(other)
    assert [v.data_ptr() for v in second[:2]] != [v.data_ptr() for v in first[:2]]
    assert all(view.dtype == current_platform.fp8_dtype() for view in first[:2])
    assert first.k_scale is first.v_scale is None


class Checks:
    """Counts the calls that are checked; all others repeat one of them."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.names = engine, []
        for name in ("reshape_and_cache", "varlen_attention"):
            monkeypatch.setattr(conch_attn, name, self.count(name))

    def count(self, name: str) -> Any:
        function = getattr(conch_attn, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            return function(*args, **kwargs)

        return counted

    def of(self, lengths: Sequence[tuple[int, int]], **options: Any) -> list[str]:
        """What a step checks, whose results are compared with the reference."""
        self.names.clear()
        self.engine.step(lengths, **options)
        return self.names


BOTH = ["reshape_and_cache", "varlen_attention"]


def test_a_layer_checks_each_kind_of_batch_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    checks = Checks(engine, monkeypatch)
    assert checks.of(BATCHES["decode"]) == BOTH
    assert checks.of([(1, 3), (1, 90)], padded_reqs=1) == []
    # A GPU splits the keys of so few prefills: another kernel.
    assert checks.of(BATCHES["mixed"]) == (BOTH[1:] if ON_GPU else [])
    assert checks.of([(12, 30), (1, 7)]) == BOTH[1:]  # other tiles
    assert checks.of([(12, 3), (12, 50)]) == []
    assert checks.of(BATCHES["prefill"], causal=False) == BOTH[1:]
    assert checks.of(BATCHES["decode"]) == []
    engine.block_table = engine.block_table.clone()
    assert checks.of(BATCHES["decode"]) == BOTH[1:]
    rows = engine.new_tokens
    monkeypatch.setattr(
        engine, "new_tokens", lambda *args: [x.contiguous() for x in rows(*args)]
    )
    assert checks.of(BATCHES["decode"]) == BOTH
    (layer,) = engine.layers
    kv_cache = make_kv_cache(
        KV_LAYOUTS[-1],
        engine.num_blocks,
        BLOCK_SIZE,
        NUM_KV_HEADS,
        HEAD_SIZE,
        engine.dtype,
        DEVICE,
    )
    bind_kv_cache(layer, kv_cache)
    layer.caches = key_value_views(kv_cache, HEAD_SIZE)
    assert checks.of(BATCHES["decode"]) == BOTH
    assert len(layer.impl.attentions) == len(layer.impl.writes) == 1


def test_schedules_have_calls_of_their_own() -> None:
    """Microbatches have a builder each, and share the layers."""
    engine = Engine()
    engine.step(BATCHES["decode"])
    (layer,) = engine.layers
    other = ConchAttentionMetadataBuilder(
        engine.builder.kv_cache_spec, ["layer.0"], engine.config, engine.builder.device
    )
    first, engine.builder = engine.builder, other
    engine.step(BATCHES["decode"])
    engine.builder = first
    engine.step(BATCHES["verify"])
    schedules = {prepared.schedule for prepared in layer.impl.attentions.values()}
    expected = {*first.schedules.values(), *other.schedules.values()}
    assert schedules == expected and len(expected) == 2


def test_the_stride_of_one_token_or_none_is_not_that_of_more() -> None:
    engine = Engine()
    (layer,) = engine.layers
    common = engine.fill([(3, 0)])
    _, key, value = engine.new_tokens(layer, 1)
    before = [cache.clone() for cache in layer.caches]
    kv_cache = bound_kv_cache(layer)
    for count in (0, 1, 3):
        slots = common.slot_mapping[:count]
        layer.impl.write_kv_cache(layer, key[:count], value[:count], kv_cache, slots)
    assert key[:1].stride() == key.stride()
    engine.check_cache(layer, before, key, value, common.slot_mapping)


def test_calls_are_kept_in_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conch_attn, "MAX_PREPARED", 2)
    engine = Engine()
    (layer,) = engine.layers
    for _ in range(3):
        engine.block_table = torch.cat([engine.block_table] * 2)[:8].clone()
        engine.step([(1, 5)])
        assert 1 <= len(layer.impl.attentions) <= 2


def test_cache_is_freed_with_its_binding() -> None:
    """The engine profiles with a cache of gigabytes that must not stay."""
    engine = Engine()
    engine.step(BATCHES["decode"])
    (layer,) = engine.layers
    del layer.caches
    bound = weakref.ref(bound_kv_cache(layer))
    bind_kv_cache(layer, torch.tensor([]))
    gc.collect()
    assert bound() is None
    assert layer.impl.key_value is None
    assert not layer.impl.attentions and not layer.impl.writes


def test_schedules_are_made_for_the_group_and_the_configuration() -> None:
    engine = Engine(num_speculative_tokens=3)
    (schedule,) = engine.builder.schedules.values()
    assert schedule.max_num_seqs == 8
    assert schedule.max_num_tokens == MAX_NUM_TOKENS
    assert schedule.decode_query_len == engine.builder.decode_query_len == 4
