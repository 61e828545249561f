# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What attention compiles to on every supported GPU.

Needs no GPU. A call of `varlen_attention` plans for a device that is not there, and its
launches are compiled instead of made: what the plan picks must not spill, must fit the
device's shared memory and must use its matrix units.

Representatives: every head size class, the tiles of 16, 32 and 64 decode rows of the
common ones, pages smaller and larger than a tile of keys, every class of cache dtypes.
Left out: float16, which compiles as bfloat16 does, and head sizes that are padded to
these, but for one.
"""

import importlib
from dataclasses import dataclass, field, replace

import pytest
import torch

from tests.kernels.attention.conch_compile import (
    TARGETS,
    Resources,
    compile_for,
    compile_on_all,
    resources,
)
from tests.kernels.attention.conch_devices import DEVICES, use_device

BF16, E5M2, E4M3 = torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn
INT8, INT4 = torch.int8, torch.uint8
NUM_KV_HEADS = 8


@dataclass(frozen=True)
class Case:
    """Layers, and how long their decodes are."""

    head_size: int
    group: int = 4
    decode_query_len: int = 1
    block_size: int = 16
    dtype: torch.dtype = BF16
    kv_dtype: torch.dtype = BF16
    batch_invariant: bool = False
    token_scales: bool = False  # one for every token and head, beside its elements
    tokens: int = 3000  # of a batch; few: the keys of its prefills are split
    # Few tiles as Hopper's kernel has them, which does not take these options.
    small: bool = False
    # As where Hopper's kernels are, which do not take these options.
    behind_prefills: bool = False
    options: dict = field(default_factory=dict)
    targets: tuple[str, ...] | None = None  # None: all


CASES = {
    "64": Case(64),
    "64_verify": Case(64, decode_query_len=5),
    "64_page": Case(64, block_size=128),
    "64_rows": Case(64, group=8, decode_query_len=16),
    "80": Case(80),
    "128": Case(128),
    "128_verify": Case(128, decode_query_len=5),
    "128_rows": Case(128, group=8, decode_query_len=16),
    "128_page": Case(128, block_size=128),
    "128_masks": Case(128, options={"sliding_window": 500, "softcap": 30.0}),
    "128_fp8": Case(128, kv_dtype=E5M2),
    "128_fp8_rows": Case(128, group=8, decode_query_len=16, kv_dtype=E5M2),
    # By arithmetic there.
    "128_e4m3": Case(128, kv_dtype=E4M3, targets=("sm80", "gfx90a")),
    "128_e4m3_scales": Case(128, kv_dtype=E4M3, token_scales=True, targets=("sm90",)),
    "128_int8": Case(
        128,
        kv_dtype=INT8,
        token_scales=True,
        targets=("sm80", "sm90", "sm100", "gfx942", "gfx1100"),
    ),
    # Whole tiles in a page.
    "128_int8_page": Case(
        128, kv_dtype=INT8, token_scales=True, block_size=128, targets=("sm90",)
    ),
    "128_int4": Case(128, kv_dtype=INT4, token_scales=True, targets=("sm90", "gfx942")),
    "128_fp32": Case(128, dtype=torch.float32, kv_dtype=torch.float32),
    "64_split": Case(64, tokens=20),
    "128_split": Case(128, tokens=20),
    "128_split_page": Case(128, block_size=128, tokens=20, targets=("sm90", "sm100")),
    "256_split": Case(256, tokens=20),
    **{
        f"{head_size}_small": Case(
            head_size,
            block_size=128,
            tokens=20,
            small=True,
            options={"alibi_slopes": torch.empty(4 * NUM_KV_HEADS, device="meta")},
            targets=("sm90",),
        )
        for head_size in (64, 128, 256)
    },
    # On Hopper, by the portable kernels all the same.
    "128_behind_prefills": Case(
        128,
        tokens=20,
        behind_prefills=True,
        options={"alibi_slopes": torch.empty(4 * NUM_KV_HEADS, device="meta")},
        targets=("sm90",),
    ),
    "256": Case(256),
    "256_page": Case(256, block_size=128),
    "256_verify": Case(256, decode_query_len=5),
    "256_rows": Case(256, group=8, decode_query_len=16),
    "256_fp8": Case(256, kv_dtype=E5M2),
    "512": Case(512),
    "128_invariant": Case(128, batch_invariant=True),
    "128_invariant_fp8": Case(128, kv_dtype=E5M2, batch_invariant=True),
}
# Most bytes that spill all the same, by target and kernel.
SPILLS = {
    # Of batch invariance what is not needed within a segment may spill.
    "sm80": {
        "128_int8 decode_kernel": 64,
        "128_invariant segment_decode_kernel": 8,
        "128_invariant prefill_kernel": 8,
        "128_invariant_fp8 segment_decode_kernel": 8,
    },
    "sm89": {
        "128_invariant segment_decode_kernel": 8,
        "128_invariant prefill_kernel": 32,
    },
    "sm100": {
        "128_int8 decode_kernel": 8,
        "128_invariant segment_decode_kernel": 40,
        "128_invariant prefill_kernel": 24,
        "128_invariant_fp8 segment_decode_kernel": 64,
    },
    "sm120": {
        "128_invariant segment_decode_kernel": 8,
        "128_invariant prefill_kernel": 40,
    },
    # Tiles whose rates are known; others have to be measured first.
    "sm90": {
        "128_page prefill_kernel": 112,
        "128_split_page prefill_kernel": 160,
        "256_split prefill_kernel": 96,
        "256_small prefill_kernel": 8,
        "128_fp8 prefill_kernel": 32,
        "128_e4m3_scales decode_kernel": 16,
        "128_int8 decode_kernel": 16,
        "256 prefill_kernel": 96,
        "512 prefill_kernel": 192,
        "128_invariant segment_decode_kernel": 16,
        "128_invariant prefill_kernel": 88,
        "128_invariant_fp8 segment_decode_kernel": 16,
    },
    "gfx90a": {"128_invariant_fp8 prefill_kernel": 8},
    "gfx942": {"128_invariant_fp8 prefill_kernel": 8},
    "gfx950": {"128_invariant_fp8 prefill_kernel": 8},
    # 16 rows of a query of 256 take half of the registers of waves of 32.
    "gfx1100": {
        "128_invariant_fp8 segment_decode_kernel": 472,
        "128_invariant_fp8 prefill_kernel": 228,
        "128_int8 decode_kernel": 56,
        "256_fp8 decode_kernel": 160,
        "256_fp8 prefill_kernel": 32,
        "512 decode_kernel": 900,
        "512 prefill_kernel": 900,
    },
}


def device_of(name: str):
    """The plan's device for one of `TARGETS`."""
    target = TARGETS[name]
    return next(d for d in DEVICES.values() if d.arch == target.arch)


def record(case: Case, device) -> list[tuple]:
    """(Kernel, arguments, constants) of a mixed batch: schedule, decode, prefill, and
    what combines its parts."""
    conch = "vllm.attention.ops.conch"
    attention, schedule, launch = (
        importlib.import_module(f"{conch}.{name}")
        for name in ("varlen_attention", "schedule", "launch")
    )
    launches: list[tuple] = []

    def call(self, *tensors, varying=(), described=launch.NOTHING, grid=None):
        varying += described.descriptors + self.described.descriptors
        args = (*varying, *tensors, *self.tensors, *self.launch.arguments)
        launches.append((self.launch.kernel, args, self.launch.constants))

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    heads, tokens = case.group * NUM_KV_HEADS, case.tokens
    max_query_len = min(tokens, 1000)
    query = torch.empty(tokens, heads, case.head_size, dtype=case.dtype, device="meta")
    # More than 2 GiB, up to which AMD's compiler counts on 32-bit offsets.
    pages = (2**22 // case.block_size, case.block_size, NUM_KV_HEADS)
    scales, half = [None, None], 0
    if case.token_scales:
        width = case.head_size // 2 if case.kv_dtype == INT4 else case.head_size
        half = width + 4
        content = torch.empty(*pages, 2 * half, dtype=torch.uint8, device="meta")
        parts = content[..., :width], content[..., half : half + width]
        caches = [part.view(case.kv_dtype) for part in parts]
        numbers = content.view(torch.float32)
        scales = [numbers[..., width // 4], numbers[..., half // 2 - 1]]
    else:
        shape = (*pages, case.head_size)
        caches = torch.empty(2, *shape, dtype=case.kv_dtype, device="meta").unbind(0)
        if case.kv_dtype != case.dtype:
            scales = [torch.empty(1, device="meta")] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.BoundLaunch, "__call__", call)
        use_device(patch, device)
        # Tensors without memory have no addresses.
        patch.setattr(attention, "offset_in_page", lambda *args: half)
        work = schedule.VarlenSchedule(
            max_num_seqs=64,
            max_num_tokens=tokens,
            num_query_heads=heads,
            num_kv_heads=NUM_KV_HEADS,
            head_size=case.head_size,
            block_size=case.block_size,
            query_dtype=case.dtype,
            kv_dtype=case.kv_dtype,
            device="meta",
            sliding_window=case.options.get("sliding_window"),
            decode_query_len=case.decode_query_len,
            token_scales=case.token_scales,
            portable=not (case.small or case.behind_prefills),
            batch_invariant=case.batch_invariant,
        )
        lengths = integers(65), integers(64)
        known = schedule.UNKNOWN
        if case.small:
            known = schedule.Known(num_prefills=1, max_prefill_seq_len=tokens)
        work.update(
            *lengths, max_query_len=max_query_len, num_tokens=tokens, known=known
        )
        assert work.plan.small == case.small
        attention.varlen_attention(
            query,
            *caches,
            torch.empty_like(query),
            *lengths,
            integers(64, 512),
            max_query_len=max_query_len,
            scale=0.1,
            k_scale=scales[0],
            v_scale=scales[1],
            schedule=work,
            **case.options,
        )
    return launches


def compile_all(name: str) -> dict[str, Resources]:
    """Resources of every variant, once, by case and kernel."""
    found: dict[str, Resources] = {}
    seen = set()
    for case_name, case in CASES.items():
        if case.targets is not None and name not in case.targets:
            continue
        for kernel, args, constants in record(case, device_of(name)):
            if kernel.__name__ == "schedule_kernel":
                variant = (kernel.__name__, case.tokens)
            else:
                # A prefill does not depend on the decodes beside it.
                layer = replace(case, group=1, decode_query_len=1, options={})
                sizes = constants.get("BLOCK_M"), constants.get("TILE")
                variant = (kernel.__name__, str(layer), *sizes, len(case.options))
            if variant not in seen:
                seen.add(variant)
                compiled = compile_for(TARGETS[name], kernel, *args, **constants)
                found[f"{case_name} {kernel.__name__}"] = resources(compiled)
    return found


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Resources]]:
    return {
        target: {kernel: Resources(*fields) for kernel, fields in kernels.items()}
        for target, kernels in compile_on_all(compile_all).items()
    }


def of_kernel(kernels: dict[str, Resources], kernel: str):
    """(Case name, case, resources) of one kernel's variants."""
    for name, found in kernels.items():
        case_name, kernel_name = name.split()
        if kernel_name == kernel:
            yield case_name, CASES[case_name], found


@pytest.mark.parametrize("name", TARGETS)
def test_registers_and_shared_memory(name, compiled):
    device = device_of(name)
    assert len(compiled[name]) > len([c for c in CASES.values() if not c.targets])
    for kernel, found in compiled[name].items():
        assert found.shared_bytes <= device.shared_memory, (kernel, found)
        most = SPILLS.get(name, {}).get(kernel, 0)
        assert found.spilled_bytes <= most, (kernel, found)


MATRIX_UNITS = {
    "sm80": {"HMMA"},
    "sm89": {"HMMA"},
    "sm90": {"HMMA", "HGMMA"},
    "sm100": {"HMMA", "UTCHMMA"},
    "sm120": {"HMMA"},
    "gfx90a": {"v_mfma"},
    "gfx942": {"v_mfma"},
    "gfx950": {"v_mfma"},
    "gfx1100": {"v_wmma"},
}


@pytest.mark.parametrize(
    "kernel", ["decode_kernel", "segment_decode_kernel", "prefill_kernel"]
)
@pytest.mark.parametrize("name", TARGETS)
def test_matrix_units(name, kernel, compiled):
    """Also a sign that the compiler has kept the loops at all."""
    for case_name, case, found in of_kernel(compiled[name], kernel):
        if case.dtype == torch.float32 and name == "gfx1100":
            assert not found.products, (case_name, found)  # its units take 16 bits
        else:
            assert found.products, (case_name, found)
            assert found.products.keys() <= MATRIX_UNITS[name], (case_name, found)


CONVERTED_BY_WGMMA = {
    "128_fp8",
    "128_fp8_rows",
    "128_e4m3_scales",
    "128_int8",
    "128_int8_page",
    "128_int4",
}


def test_wgmma_on_hopper(compiled):
    """Where operands are converted in registers it has given wrong results: of those
    only prefills that `plan_prefill_converted` is for take it."""
    for kernel in ("decode_kernel", "prefill_kernel"):
        for case_name, case, found in of_kernel(compiled["sm90"], kernel):
            if kernel == "prefill_kernel" and case_name in CONVERTED_BY_WGMMA:
                assert found.products.keys() == {"HGMMA"}, (case_name, found)
            elif case.dtype == torch.float32 or case.kv_dtype != case.dtype:
                assert "HGMMA" not in found.products, (case_name, found)
            elif kernel == "prefill_kernel" and case.head_size <= 256:
                assert found.products.keys() == {"HGMMA"}, (case_name, found)


@pytest.mark.parametrize("name", TARGETS)
def test_one_kind_of_products_for_batch_invariance(name, compiled):
    """Of Hopper's two, a test on it tells that they add alike."""
    products = {
        product
        for kernel in ("segment_decode_kernel", "prefill_kernel")
        for _, case, found in of_kernel(compiled[name], kernel)
        for product in found.products
        if case.batch_invariant
    }
    assert products == {"HMMA", "HGMMA"} if name == "sm90" else len(products) == 1


def test_tensor_memory_on_blackwell(compiled):
    for case_name, case, found in of_kernel(compiled["sm100"], "prefill_kernel"):
        if case.batch_invariant:
            continue
        if case.dtype == BF16 and case.head_size <= 256:
            assert "UTCHMMA" in found.products, (case_name, found)


@pytest.mark.parametrize("name", ["sm80", "sm90", "sm100", "sm120"])
def test_dependent_launches(name, compiled):
    """Those behind prefills end after them; others wait for nothing."""
    waiting = []
    for kernel_name, found in compiled[name].items():
        case_name, kernel = kernel_name.split()
        case = CASES[case_name]
        is_behind = kernel in ("decode_kernel", "combine_kernel")
        if is_behind and (case.small or case.behind_prefills):
            assert found.launches == {"ACQBULK": 1}, (kernel_name, found)
            waiting.append(kernel)
        else:
            assert not found.launches, (kernel_name, found)
    are_behind = {"decode_kernel", "combine_kernel"} if name == "sm90" else set()
    assert set(waiting) == are_behind


@pytest.mark.parametrize("name", ["sm80", "sm90", "sm100", "sm120"])
def test_boxes_by_tma(name, compiled):
    """Pages of a tile or more are read without addresses, where that is planned."""
    for case_name, case, found in of_kernel(compiled[name], "prefill_kernel"):
        planned = name in ("sm90", "sm100") and case.kv_dtype == case.dtype
        boxes = planned and case.block_size == 128
        assert ("UTMALDG.4D" in found.loads) == boxes, (case_name, found)


@pytest.mark.parametrize("name", ["sm80", "sm89", "sm90", "sm100", "sm120"])
def test_loads_are_in_flight(name, compiled):
    """Keys of later tiles are on their way to shared memory under the products."""
    for kernel in ("decode_kernel", "prefill_kernel"):
        for case_name, case, found in of_kernel(compiled[name], kernel):
            in_one_stage = name == "sm90" and kernel == "prefill_kernel"
            if case.token_scales and in_one_stage:
                continue  # two programs take turns instead
            if case.dtype == BF16:
                copies = [load for load in found.loads if load.startswith("LDGSTS")]
                assert copies, (case_name, kernel, found)
