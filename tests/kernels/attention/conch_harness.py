# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the CONCH attention tests share: devices, poisoned batches, run and compare.

A test module imports `poisoned_scratch` so that every one of its tests runs with
NaN in the memory that CONCH allocates and does not initialise.
"""

import dataclasses
import importlib
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.kernels.attention.conch_reference import (
    FP8_DTYPES,
    SENTINEL,
    Attention,
    first_visible_key,
    fp8_lse_tolerance,
    fp8_output_tolerance,
    lse_tolerance,
    make_caches,
    nan_filled,
    output_tolerance,
    paged_attention,
    sequence_rule,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
if not (ON_GPU or INTERPRETED):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from tests.kernels.attention.conch_devices import use_device  # noqa: E402
from vllm.attention.ops.conch import (  # noqa: E402
    VarlenSchedule,
    hopper_fp8_prefill,
    hopper_prefill,
    varlen_attention,
)
from vllm.platforms import current_platform  # noqa: E402
from vllm.triton_utils import triton  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# On a GPU one that its fastest kernels take, here one that is quick to interpret.
HEAD_SIZE = 64 if ON_GPU else 32
# The interpreter computes wrongly in bf16.
HALF_DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
DTYPES = [torch.float32, *HALF_DTYPES]
KV_FP8_DTYPES = [current_platform.fp8_dtype(), torch.float8_e5m2]
HopperConfig = hopper_prefill.HopperConfig | hopper_fp8_prefill.Fp8Config
gpu_only = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
# Where there is none, `conch_gluon` runs what is for a Hopper GPU.
CONCH = {
    name: importlib.import_module(f"{hopper_prefill.__package__}.{name}")
    for name in ("launch", "plan", "schedule", "arguments")
}
KNOWS_GLUON = triton.__version__.startswith(hopper_prefill.TRITON_VERSIONS)
ON_HOPPER = ON_GPU and hopper_prefill.is_available(torch.device("cuda", 0))

ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
]


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors that CONCH allocates hold NaN, or a huge integer."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            is_conch = caller.startswith("vllm.") and "conch" in caller
            return poison(tensor) if is_conch else tensor

        return wrapper

    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def use_hopper(monkeypatch: pytest.MonkeyPatch, num_units: int = 3) -> None:
    """Plans for a Hopper GPU; where there is none, of so many multiprocessors, and
    `conch_gluon` runs its kernels."""
    if ON_HOPPER:
        return
    if ON_GPU or not KNOWS_GLUON:
        versions = " or ".join(f"{v}*" for v in hopper_prefill.TRITON_VERSIONS)
        pytest.skip(f"needs Triton {versions}, and a Hopper GPU or none")
    from tests.kernels.attention.conch_gluon import run_kernel

    launch = CONCH["launch"]
    device = CONCH["plan"].Device(
        "cuda", 90, num_units, shared_memory=227 * 1024, bandwidth=1e12
    )
    use_device(monkeypatch, device)
    monkeypatch.setattr(torch.version, "cuda", None)  # none of its launchers
    seeds = itertools.count()

    def launch_any(self, grid: tuple, arguments: tuple):
        if isinstance(self.kernel, triton.JITFunction):
            every = (*arguments, *self.arguments)
            seed = next(seeds)
            return run_kernel(self.kernel, grid[0], every, self.constants, seed)
        # Triton's interpreter knows no assembly, which has the same results.
        constants = {
            name: "triton" if how == "ptx" else how
            for name, how in self.constants.items()
        }
        constants |= {"OVERLAPS": False} if "OVERLAPS" in constants else {}
        return self.kernel[grid](*arguments, *self.arguments, **constants)

    monkeypatch.setattr(launch.Launch, "launch", launch_any)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `use_hopper`."""
    use_hopper(monkeypatch)


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that launches of attention are of, in their order."""
    names: list[str] = []
    call = CONCH["launch"].BoundLaunch.__call__

    def recorded(self, *args, **kwargs):
        names.append(self.launch.kernel.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(CONCH["launch"].BoundLaunch, "__call__", recorded)
    return names


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter add as matrix units do: each element in the same order.

    In NumPy's product the order depends on where a row stands in its matrix.
    """
    if ON_GPU:
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data
        rows = a.data.astype(total.dtype).T[:, :, None]
        for column, row in zip(rows, b.data.astype(total.dtype)):
            total = total + column * row
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor with NaN, or with what its dtype has that is as bad."""
    if tensor.dtype in FP8_DTYPES:
        return tensor.view(torch.uint8).fill_(0x7F).view(tensor.dtype)
    if tensor.dtype.is_floating_point:
        return tensor.fill_(math.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else 0x71)


POSITIONAL = (
    "query",
    "key_cache",
    "value_cache",
    "query_start_loc",
    "seq_lens",
    "block_table",
    "max_query_len",
)
NO_OPTIONS = (*POSITIONAL, "output_dtype")


MASK_FEATURES = (
    "mm_prefix_range",
    "mm_prefix_in_window",
    "prefix_lens",
    "chunk_lookback",
)


@dataclass
class Batch:
    """The tensors of one `varlen_attention` call and the options that shape them."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_query_len: int
    scale: float
    causal: bool | torch.Tensor = True
    softcap: float = 0.0
    sliding_window: int | None = None
    q_scale: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    alibi_sqrt: bool = False
    mm_prefix_range: torch.Tensor | None = None
    mm_prefix_in_window: bool = False
    prefix_lens: torch.Tensor | None = None
    chunk_lookback: int = -1
    output_scale: torch.Tensor | None = None
    output_dtype: torch.dtype | None = None
    """Of the output, if it or the query is quantised."""

    @property
    def num_live_tokens(self) -> int:
        return int(self.query_start_loc[-1])

    @property
    def options(self) -> dict:
        fields = dataclasses.fields(self)
        names = [field.name for field in fields if field.name not in NO_OPTIONS]
        return {name: getattr(self, name) for name in names}

    def reference(self, dtype: torch.dtype = torch.float64) -> Attention:
        return paged_attention(
            self.query,
            self.key_cache,
            self.value_cache,
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            **self.options,
            dtype=dtype,
        )


def make_query(
    num_tokens: int,
    padding: int,
    num_query_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    scale: float,
    device: torch.device | str,
) -> torch.Tensor:
    """The query third of a fused QKV projection, divided by a scale; padding rows and
    K, V are NaN."""
    width = (num_query_heads + 2 * num_kv_heads) * head_size
    fused = nan_filled(num_tokens + padding, width, dtype=dtype, device=device)
    query = fused[:, : num_query_heads * head_size].unflatten(1, (-1, head_size))
    rows = torch.randn(query[:num_tokens].shape, device=device)
    query[:num_tokens] = (rows / scale).to(dtype)
    return query


def make_block_table(
    page_ranges: Sequence[tuple[int, int]], shared_pages: int, frees_pages: bool
) -> tuple[torch.Tensor, int]:
    """Random pages for each sequence's [begin, end) pages, and the pool's size.

    Block 0 belongs to nobody; entries outside the range are random huge numbers, or
    those before it 0 if `frees_pages`. The first `shared_pages` pages are the same for
    all sequences.
    """
    width = max((end for _, end in page_ranges), default=0) + 2
    table = torch.randint(2**30, 2**31 - 1, (len(page_ranges), width))
    num_blocks = 2 + shared_pages + sum(end for _, end in page_ranges)
    shared, free = (1 + torch.randperm(num_blocks - 1)).tensor_split([shared_pages])
    for row, (begin, end) in zip(table, page_ranges):
        if frees_pages:
            row[:begin] = 0
        row[begin:end], free = free[: end - begin], free[end - begin :]
        reused = slice(begin, min(end, shared_pages))
        row[reused] = shared[reused]
    return table, num_blocks


def make_batch(
    lengths: Sequence[tuple[int, int]],
    *,
    num_query_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = HEAD_SIZE,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    query_dtype: torch.dtype | None = None,
    layout: str = "NHD",
    padding: int = 3,
    shared_pages: int = 0,
    frees_pages: bool = False,
    logit_std: float = 1.0,
    value_mean: float = 0.5,
    causal: bool | torch.Tensor = True,
    softcap: float = 0.0,
    sliding_window: int | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    seed: int = 0,
    device: torch.device | str = DEVICE,
    **features,
) -> Batch:
    """A batch of sequences of (query_len, seq_len) with poison wherever none reads.

    NaN stands in block 0, in every slot past a sequence's end, in every page
    before the window and in the padding rows of the query; the block-table
    entries of such pages are huge, or with frees_pages, before the window, block 0's,
    as vLLM's are. Features are further fields of `Batch`. dtype is the output's where
    query_dtype is given.
    """
    torch.manual_seed(seed)
    pages = []
    rules = {n: features[n] for n in MASK_FEATURES if n in features}
    rules |= {"causal": causal, "sliding_window": sliding_window}
    for i, (query_len, seq_len) in enumerate(lengths):
        begin = first_visible_key(query_len, seq_len, **sequence_rule(i, **rules))
        pages.append((begin // block_size, -(-seq_len // block_size)))
    table, num_blocks = make_block_table(pages, shared_pages, frees_pages)
    cache_shape = (layout, num_blocks, block_size, num_kv_heads, head_size)
    caches = make_caches(*cache_shape, kv_dtype or dtype, device)
    means, scales = (0.0, value_mean), (k_scale, v_scale)
    for cache, mean, cache_scale in zip(caches, means, scales):
        for (begin, _), (_, seq_len), row in zip(pages, lengths, table):
            position = torch.arange(min(begin * block_size, seq_len), seq_len)
            rows = torch.randn(len(position), num_kv_heads, head_size, device=device)
            rows = (rows + mean) / (cache_scale or 1.0)
            block, slot = row[position // block_size], position % block_size
            cache[block.to(device), slot.to(device)] = rows.to(cache.dtype)
    # Rows and entries that vLLM's persistent buffers have beyond this batch.
    buffer = torch.full((len(table) + 1, table.shape[1] + 3), 2**31 - 1)
    buffer[:-1, :-3] = table
    query_lens = [query_len for query_len, _ in lengths]
    heads = (num_query_heads, num_kv_heads, head_size)
    integers = {"dtype": torch.int32, "device": device}

    def scalar(value: float | None) -> torch.Tensor | None:
        return None if value is None else torch.tensor([value], device=device)

    if query_dtype is not None:
        features = {"output_dtype": dtype} | features
    query_like = (*heads, query_dtype or dtype, q_scale or 1.0, device)
    return Batch(
        make_query(sum(query_lens), padding, *query_like),
        *caches,
        query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).to(**integers),
        seq_lens=torch.tensor([seq_len for _, seq_len in lengths], **integers),
        block_table=buffer.to(**integers)[:-1, :-3],
        max_query_len=max(query_lens, default=0),
        scale=logit_std / math.sqrt(head_size),
        causal=causal,
        softcap=softcap,
        sliding_window=sliding_window,
        q_scale=scalar(q_scale),
        k_scale=scalar(k_scale),
        v_scale=scalar(v_scale),
        **features,
    )


def make_schedule(batch: Batch, **options) -> VarlenSchedule:
    """A schedule that batches up to this one's size share."""
    options = {
        "max_num_seqs": len(batch.seq_lens),
        "max_num_tokens": len(batch.query),
        "num_query_heads": batch.query.shape[1],
        "num_kv_heads": batch.key_cache.shape[2],
        "head_size": batch.query.shape[2],
        "block_size": batch.key_cache.shape[1],
        "query_dtype": batch.query.dtype,
        "kv_dtype": batch.key_cache.dtype,
        "device": batch.query.device,
        "sliding_window": batch.sliding_window,
        "chunk_lookback": batch.chunk_lookback,
        "token_scales": batch.k_scale is not None and batch.k_scale.dim() == 3,
    } | options
    return VarlenSchedule(**options)


def with_tiles(
    schedule: VarlenSchedule,
    tile: int,
    masked_tile: int | None = None,
    *,
    boxes: bool = False,
    halves: bool = False,
) -> VarlenSchedule:
    """The schedule with other numbers of keys per tile than its plan chooses.

    Args:
        schedule: not updated yet.
        tile: keys.
        masked_tile: keys, where prefill masks a tile.
        boxes: prefill reads K and V in boxes where it can; else never.
        halves: where it cannot, its tiles have half as many rows.

    """
    chosen = schedule.plan_for

    def plan_for(max_query_len: int, **few: bool):
        plan = chosen(max_query_len, **few)
        prefill = dataclasses.replace(plan.prefill, tile=tile, masked_tile=masked_tile)
        half = dataclasses.replace(prefill, block_m=prefill.block_m // 2)
        return dataclasses.replace(
            plan,
            decode=dataclasses.replace(plan.decode, tile=tile),
            prefill=half if halves else prefill,
            prefill_boxes=prefill if boxes else None,
        )

    schedule.plan_for = plan_for
    return schedule


def update(schedule: VarlenSchedule, batch: Batch, **known: Any) -> VarlenSchedule:
    """Tells a schedule the lengths of this batch, as a metadata builder does.

    known: what the host knows besides, fields of `Known`.
    """
    schedule.update(
        batch.query_start_loc,
        batch.seq_lens,
        max_query_len=batch.max_query_len,
        num_tokens=len(batch.query),
        known=CONCH["schedule"].Known(**known),
        mm_prefix_range=batch.mm_prefix_range,
        mm_prefix_in_window=batch.mm_prefix_in_window,
        prefix_lens=batch.prefix_lens,
    )
    return schedule


def call(
    batch: Batch,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
    schedule: VarlenSchedule | None = None,
) -> None:
    """`varlen_attention` with the arguments of a batch."""
    varlen_attention(
        batch.query,
        batch.key_cache,
        batch.value_cache,
        output,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        max_query_len=batch.max_query_len,
        **batch.options,
        output_lse=lse,
        schedule=schedule,
    )


def attend(
    batch: Batch, schedule: VarlenSchedule | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of CONCH; fails if anything but the live rows was written."""
    num_tokens, num_heads, head_size = batch.query.shape
    # A head more than the output has: its rows are strided.
    buffer = torch.full(
        (num_tokens, num_heads + 1, head_size),
        SENTINEL,
        dtype=batch.output_dtype or batch.query.dtype,
        device=batch.query.device,
    )
    sentinel = torch.tensor(SENTINEL).to(buffer.dtype).float()
    output = buffer[:, :num_heads]
    lse = torch.full((num_tokens, num_heads), SENTINEL, device=batch.query.device)
    call(batch, output, lse, schedule)
    live = batch.num_live_tokens
    for name, untouched in (
        ("output rows of no sequence", output[live:].float() == sentinel),
        ("memory between output rows", buffer[:, num_heads:].float() == sentinel),
        ("LSE rows of no sequence", lse[live:] == SENTINEL),
    ):
        assert bool(untouched.all()), f"{name} were written"
    return output[:live], lse[:live]


def assert_close(
    name: str, actual: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor
) -> None:
    """Fails with the worst element; infinities must match, NaN never does."""
    actual = actual.double()
    error = (actual - expected).abs()
    good = (error <= allowed) | (actual == expected)
    if bool(good.all()):
        return
    excess = torch.where(good, 0.0, (error / allowed).nan_to_num(math.inf))
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{name}: {int((~good).sum())} of {good.numel()} elements differ; "
        f"worst at {worst}: {actual[worst].item()}, expected {expected[worst].item()} "
        f"within {allowed[worst].item():.3g}"
    )


def check(
    batch: Batch,
    schedule: VarlenSchedule | None = None,
    *,
    truncated_sums: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs CONCH, compares output and LSE with the reference and returns them."""
    output, lse = attend(batch, schedule)
    device = CONCH["plan"].this_device(0 if ON_GPU else None)
    if schedule is None and device.arch == 90 and len(batch.query):
        schedule = update(make_schedule(batch), batch)
    compare(
        batch,
        output,
        lse,
        truncated_sums=truncated_sums,
        hopper=hopper_config(schedule),
    )
    return output, lse


def hopper_config(schedule: VarlenSchedule | None) -> HopperConfig | None:
    """That of the Hopper kernel, if it has a part in the batch of the last update."""
    if schedule is None or not (schedule.plan.hopper and len(schedule.work)):
        return None
    is_fp8 = schedule.plan.hopper == "fp8"
    module = hopper_fp8_prefill if is_fp8 else hopper_prefill
    return module.CONFIGS[max(64, schedule.shape.head_padded)]


def compare(
    batch: Batch,
    output: torch.Tensor,
    lse: torch.Tensor,
    *,
    truncated_sums: int = 0,
    hopper: HopperConfig | None = None,
) -> None:
    """Compares the live rows with the reference.

    The LSE moves at most as far as the farthest logit. The outputs keep their bound:
    an error of all logits alike does not move them.
    """
    reference = Attention(*(t[: batch.num_live_tokens] for t in batch.reference()))
    expected = reference.output
    allowed_lse = lse_tolerance(reference)
    dtype = weights = batch.query.dtype
    if dtype in FP8_DTYPES:
        weights = torch.float16  # as the query in products
        is_wide = batch.output_scale is not None
        dtype = torch.float32 if is_wide else batch.output_dtype
    if isinstance(hopper, hopper_fp8_prefill.Fp8Config):
        head_size = batch.query.shape[2]
        allowed = fp8_output_tolerance(reference, dtype, head_size, hopper.block_n)
        allowed_lse += fp8_lse_tolerance(reference, head_size)
    else:
        allowed = output_tolerance(reference, dtype, truncated_sums, weights)
    if batch.output_scale is not None:
        # Before it is rounded to fp8 the output is still in fp32.
        limits = torch.finfo(batch.output_dtype)
        expected, allowed = expected / batch.output_scale, allowed / batch.output_scale
        expected = expected.clamp(limits.min, limits.max)
        allowed += limits.eps / 2 * expected.abs().clamp(min=limits.smallest_normal)
    assert_close("output", output, expected, allowed)
    if hopper is not None and hopper.softcap == "approx":
        allowed_lse += batch.softcap * 2.0**-11  # the hardware's tanh
    assert_close("LSE", lse, reference.lse, allowed_lse)
