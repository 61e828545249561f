# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What Hopper's own kernels compile to. Needs no GPU.

They run on a Hopper GPU alone, and what they compute is tested in `conch_gluon` too.
This tells without one whether they are still understood by the compiler, keep to their
registers and use Hopper's units.
"""

import importlib
from typing import NamedTuple

import pytest
import torch

from tests.kernels.attention.conch_compile import (
    TARGETS,
    Resources,
    compile_for,
    compile_on_all,
    resources,
)
from tests.kernels.attention.conch_devices import DEVICES

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
NUM_KV_HEADS, GROUP = 8, 4


class Case(NamedTuple):
    """Layers, and the most bytes that spill all the same."""

    head_size: int
    spills: int = 0
    block_size: int = 128
    dtype: torch.dtype = BF16
    has_sinks: bool = False
    has_lse: bool = False
    options: dict = {}


SPLIT = {"pack": GROUP, "split": True}
SMALL = {"small": True}
# Every config, a head size that is not all of a tile, and every option.
CASES = {
    "64": Case(64),
    "80": Case(80, spills=8),
    "128": Case(128, spills=8),
    "256": Case(256),
    "512": Case(512),
    "128_small_pages": Case(128, spills=8, block_size=16),
    "128_window": Case(128, spills=48, options={"sliding_window": 1000}),
    "128_softcap": Case(128, options={"softcap": 30.0}),
    "128_large_softcap": Case(128, spills=8, options={"softcap": 80.0}),
    "128_lse_not_causal": Case(128, has_lse=True, options={"causal": False}),
    "64_sinks": Case(64, has_sinks=True, options={"sliding_window": 128}),
    "fp8_64": Case(64, spills=24, dtype=E4M3),
    "fp8_128": Case(128, spills=120, dtype=E4M3),
    "fp8_256": Case(256, spills=112, dtype=E4M3),
    "fp8_128_window_softcap": Case(
        128,
        spills=144,
        dtype=E4M3,
        options={"sliding_window": 1000, "softcap": 30.0},
    ),
    # Of few tiles, which have the heads of a group in them.
    "64_split": Case(64, options=SPLIT),
    "128_split": Case(128, spills=8, has_lse=True, options=SPLIT),
    "128_split_sinks": Case(128, spills=8, has_sinks=True, options=SPLIT),
    "256_split": Case(256, options=SPLIT),
    "512_split": Case(512, spills=8, options=SPLIT),
    # Of few tiles that are not split, with half the rows.
    "64_small": Case(64, spills=8, options=SMALL),
    "80_small": Case(80, spills=8, options=SMALL),
    "128_small": Case(128, spills=8, options=SMALL),
    "128_small_window": Case(128, spills=8, options=SMALL | {"sliding_window": 1000}),
    "256_small": Case(256, spills=8, has_lse=True, options=SMALL),
    "fp8_128_split": Case(128, spills=136, dtype=E4M3, options=SPLIT),
    "fp8_256_split": Case(256, spills=128, dtype=E4M3, options=SPLIT),
}


class DecodeCase(NamedTuple):
    """Layers, the longest query, and the most bytes that spill all the same."""

    head_size: int
    spills: int = 0
    block_size: int = 16
    max_query_len: int = 1
    has_sinks: bool = False
    has_lse: bool = False
    options: dict = {}


DECODE_CASES = {
    "72": DecodeCase(72),
    "128": DecodeCase(128),
    "128_large_pages": DecodeCase(128, block_size=128),
    "128_window": DecodeCase(128, options={"sliding_window": 1000}),
    "128_sinks_lse": DecodeCase(128, has_sinks=True, has_lse=True),
    "128_not_causal": DecodeCase(128, options={"causal": False}),
    "128_long_queries": DecodeCase(128, max_query_len=16),
    "128_beside_prefills": DecodeCase(128, options={"overlaps": True}),
}


DECODE = {f"decode_{name}": case for name, case in DECODE_CASES.items()}
ALL_CASES: dict[str, Case | DecodeCase] = CASES | DECODE


def modules(*names: str) -> list:
    """Modules of the kernels' package; not imported by those that do not interpret."""
    package = "vllm.attention.ops.conch"
    return [importlib.import_module(f"{package}.{name}") for name in names]


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_decode(case: DecodeCase) -> Resources:
    checks, hopper, decode, plan = modules(
        "checks", "hopper_prefill", "hopper_decode", "plan"
    )
    heads = NUM_KV_HEADS * GROUP
    shape = plan.Shape(heads, NUM_KV_HEADS, case.head_size, case.block_size, BF16, BF16)
    chosen = plan.make_plan(shape, DEVICES["H200"], case.max_query_len)
    assert chosen.hopper_decode
    query = tensor(3000, heads, case.head_size, dtype=BF16)
    pages = (1000, case.block_size, NUM_KV_HEADS, case.head_size)
    caches = [tensor(*pages, dtype=BF16) for _ in range(2)]
    block_table = tensor(64, 512, dtype=torch.int32)
    lse = tensor(3000, heads, dtype=torch.float32) if case.has_lse else None
    sinks = tensor(heads, dtype=BF16) if case.has_sinks else None
    query_spec, cache_spec, table_spec = (
        checks.TensorSpec(*checks.signature(t)) for t in (query, caches[0], block_table)
    )
    planned = decode.plan_launch(
        query_spec,
        cache_spec,
        query_spec,
        checks.TensorSpec(*checks.signature(lse)) if case.has_lse else None,
        table_spec,
        block_m=chosen.decode.block_m,
        tile=chosen.decode.tile,
        workers=chosen.num_workers,
        **{"scale": 0.1, "causal": True, "sliding_window": None} | case.options,
    )
    integers, floats = (tensor(9, 9, dtype=d) for d in (torch.int32, torch.float32))
    arguments = (
        hopper.describe_tensor(query, planned.query_box),
        *(hopper.describe_pages(cache, planned.page_box) for cache in caches),
        *(query, lse, block_table, integers, integers),
        *(floats, floats, floats, integers, sinks),
        *planned.launch.arguments,
    )
    compiled = compile_for(
        TARGETS["sm90"], planned.launch.kernel, *arguments, **planned.launch.constants
    )
    return resources(compiled)


def compile_case(case: Case | DecodeCase) -> Resources:
    if isinstance(case, DecodeCase):
        return compile_decode(case)
    checks, hopper, hopper_fp8 = modules(
        "checks", "hopper_prefill", "hopper_fp8_prefill"
    )
    is_fp8 = case.dtype == E4M3
    heads = NUM_KV_HEADS * GROUP
    query = tensor(3000, heads, case.head_size, dtype=case.dtype)
    pages = (1000, case.block_size, NUM_KV_HEADS, case.head_size)
    caches = [tensor(*pages, dtype=case.dtype) for _ in range(2)]
    output = tensor(3000, heads, case.head_size, dtype=BF16)
    block_table = tensor(64, 512, dtype=torch.int32)
    work = tensor(100, 8, dtype=torch.int32)
    sinks = tensor(heads, dtype=BF16) if case.has_sinks else None
    scales = [tensor(1, dtype=torch.float32)] * 3 if is_fp8 else []
    specs = (
        checks.TensorSpec(*checks.signature(t))
        for t in (query, caches[0], output, block_table)
    )
    module = hopper_fp8 if is_fp8 else hopper
    options = hopper.HopperOptions(1, 0.1, True, None, 0.0)._replace(**case.options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "num_programs", lambda device: 132)
        planned = module.plan_launch(*specs, options)
    descriptors = (
        hopper.describe_tensor(query, planned.query_box),
        *(hopper.describe_pages(cache, planned.page_box) for cache in caches),
    )
    launch = planned.launch
    lse = tensor(3000, heads, dtype=torch.float32) if case.has_lse else None
    states: list[torch.Tensor | None] = [None] * 3
    if options.split:
        states = [tensor(1, dtype=torch.float32)] * 3
    tensors = (*descriptors, output, lse, sinks, work, block_table, *states, *scales)
    arguments = (len(work), 1, *tensors, *launch.arguments)
    compiled = compile_for(
        TARGETS["sm90"], launch.kernel, *arguments, **launch.constants
    )
    return resources(compiled)


def compile_all(name: str) -> dict[str, Resources]:
    if name != "sm90":
        return {}
    return {case_name: compile_case(case) for case_name, case in ALL_CASES.items()}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    found = compile_on_all(compile_all)["sm90"]
    return {name: Resources(*fields) for name, fields in found.items()}


@pytest.mark.parametrize("name", ALL_CASES)
def test_resources(name: str, compiled: dict[str, Resources]) -> None:
    found = compiled[name]
    assert found.spilled_bytes <= ALL_CASES[name].spills, found
    programs = 2 if name in DECODE else 1  # on a multiprocessor
    kept = 1024  # by CUDA, of each program's shared memory
    available = (DEVICES["H200"].shared_memory + kept) // programs - kept
    assert found.shared_bytes <= available, found
    assert name not in DECODE or found.registers <= 65536 // (programs * 256), found


@pytest.mark.parametrize("name", ALL_CASES)
def test_hoppers_units(name: str, compiled: dict[str, Resources]) -> None:
    """Products are asynchronous, and Q, K and V come by TMA."""
    found = compiled[name]
    is_fp8 = name in CASES and CASES[name].dtype == E4M3
    products = "QGMMA" if is_fp8 else "HGMMA"
    assert found.products.keys() == {products}, found
    boxes = {load for load in found.loads if load.startswith("UTMALDG")}
    assert boxes == {"UTMALDG.3D", "UTMALDG.4D"}, found


@pytest.mark.parametrize("name", ALL_CASES)
def test_dependent_launches(name: str, compiled: dict[str, Resources]) -> None:
    """Decodes beside prefills end after them; those alone wait for nothing."""
    expected = {"PREEXIT": 1} if name in CASES else {}
    if name == "decode_128_beside_prefills":
        expected = {"ACQBULK": 1}
    assert compiled[name].launches == expected
