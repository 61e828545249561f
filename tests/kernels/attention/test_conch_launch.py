# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Launches without Triton's lookup: which variant, when it is compiled, how it runs.

A kernel, its variants and a driver stand in for Triton's, so no GPU is needed.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm.attention.ops.conch import launch
from vllm.attention.ops.conch.launch import (
    Described,
    Launch,
    compile_together,
)
from vllm.attention.ops.conch.launch import (
    Variant as LaunchVariant,
)
from vllm.triton_utils import triton

ARGUMENTS, CONSTANTS = (7, (1, 2)), {"TILE": 64, "num_warps": 4}


class Variant:
    """A compiled kernel; keeps what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple] = []
        self.hooked: list[tuple] = []

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)

    def __getitem__(self, grid: tuple) -> Any:
        return lambda *arguments, stream: self.hooked.append((grid, stream, *arguments))


class Kernel:
    """A function under `triton.jit`; keeps what it is asked for."""

    arg_names = ("count", "x", "y", "size", "strides", "TILE")

    def __init__(self) -> None:
        self.launched: list[tuple] = []
        self.compiled: list[tuple] = []
        self.variants: list[Variant] = []

    def __getitem__(self, grid: tuple) -> Any:
        def launched(*arguments: Any, **constants: Any) -> Variant:
            assert constants == CONSTANTS
            self.launched.append((grid, *arguments))
            self.variants.append(Variant())
            return self.variants[-1]

        return launched

    def warmup(self, *arguments: Any, grid: tuple, **constants: Any) -> None:
        assert constants == CONSTANTS
        self.compiled.append(arguments)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    driver = SimpleNamespace(device=0)
    driver.get_current_device = lambda: driver.device
    driver.get_current_stream = lambda device: 100 + device
    monkeypatch.setattr(launch, "current_device", driver.get_current_device)
    monkeypatch.setattr(launch, "current_stream", driver.get_current_stream)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return driver


def make_launch() -> tuple[Launch, Kernel]:
    kernel = Kernel()
    described = Launch(kernel, (5,), ARGUMENTS, CONSTANTS)
    described.is_cacheable = True  # as a compiled kernel's
    return described, kernel


def aligned(count: int = 1) -> torch.Tensor:
    return torch.empty(16 * count + 16, dtype=torch.uint8)[:count]


def test_triton_looks_once_for_each_variant(driver: SimpleNamespace) -> None:
    described, kernel = make_launch()
    bound = described.bind(None)
    x = aligned()
    bound(x, varying=(3,))
    assert kernel.launched == [((5, 1, 1), 3, x, None, *ARGUMENTS)]
    other = aligned()
    bound(other, varying=(4,), grid=(2, 9))
    described(other, None, varying=(4,))
    (variant,) = kernel.variants
    rest = ("function", "metadata", None, None, None)
    arguments = (4, other.data_ptr(), None, *ARGUMENTS, 64)
    assert variant.runs == [
        (2, 9, 1, 100, *rest, *arguments),
        (5, 1, 1, 100, *rest, *arguments),
    ]
    # Addresses that are not multiples of 16, by tensor; and devices.
    bound(aligned(2)[1:], varying=(3,))
    described(x, aligned(2)[1:], varying=(3,))
    driver.device = 1
    bound(x, varying=(3,))
    assert len(kernel.launched) == 4
    for device in (0, 1):
        driver.device = device
        bound(x, varying=(3,))
    bound(aligned(9)[8:], varying=(3,))
    assert len(kernel.launched) == 5
    assert [len(v.runs) for v in kernel.variants] == [3, 0, 0, 1, 0]


def test_bound_tensors_count_for_alignment(driver: SimpleNamespace) -> None:
    described, kernel = make_launch()
    for y in (aligned(), aligned(2)[1:], aligned()):
        described.bind(y)(aligned(), varying=(3,))
    assert len(kernel.launched) == 2


def test_profilers_see_every_launch(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, kernel = make_launch()
    x = aligned()
    described(x, None, varying=(3,))
    hook = triton.knobs.runtime.launch_exit_hook
    monkeypatch.setattr(hook, "calls", [lambda metadata: None])
    described(x, None, varying=(3,))
    (variant,) = kernel.variants
    arguments = (3, x.data_ptr(), None, *ARGUMENTS, 64)
    assert variant.hooked == [((5, 1, 1), 100, *arguments)]
    assert not variant.runs


def test_nothing_is_launched_while_variants_compile(driver: SimpleNamespace) -> None:
    described, kernel = make_launch()
    x, odd = aligned(), aligned(2)[1:]
    with compile_together(2):
        for tensor in (x, odd, x, odd):
            described(tensor, None, varying=(3,))
    expected = [(3, tensor, None, *ARGUMENTS) for tensor in (x, odd)]
    assert kernel.compiled == expected
    assert not kernel.launched
    described(x, None, varying=(3,))
    with compile_together(2):  # what has been launched is compiled
        described(x, None, varying=(3,))
    assert len(kernel.launched) == 1 and len(kernel.compiled) == 2
    assert not kernel.variants[0].runs


def test_errors_leave_no_trace(driver: SimpleNamespace) -> None:
    described, kernel = make_launch()
    with pytest.raises(RuntimeError, match="of the body"), compile_together(2):
        raise RuntimeError("of the body")
    described(aligned(), None, varying=(3,))
    assert len(kernel.launched) == 1


@pytest.mark.parametrize("lack", ["threads", "triton", "cuda"])
def test_where_nothing_compiles_side_by_side_launches_are_as_ever(
    lack: str, driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lack == "triton":
        monkeypatch.delattr(triton, "AsyncCompileMode", raising=False)
    if lack == "cuda":
        monkeypatch.setattr(torch.version, "cuda", None)
    described, kernel = make_launch()
    with compile_together(1 if lack == "threads" else 2):
        described(aligned(), None, varying=(3,))
    assert len(kernel.launched) == 1 and not kernel.compiled
    assert not launch.compiles_only


def encode_by(launcher: Callable, tensordesc_meta: list) -> Callable:
    """As Triton 3.6's `wrap_handle_tensordesc`: encodes, then calls that in C."""

    def inner(*arguments: Any) -> None:
        raise AssertionError(launcher, tensordesc_meta)

    return inner


class CudaLauncher:
    """As Triton 3.6's."""

    launch_cooperative_grid, launch_pdl = False, True

    def __init__(self, launch: Callable, scratch: int = 0) -> None:
        self.launch = launch
        self.global_scratch_size, self.profile_scratch_size = scratch, 0


def test_descriptors_are_encoded_once(
    driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, _ = make_launch()
    runs, encoded = [], []

    def make(descriptor: str, layout: str) -> list:
        encoded.append((descriptor, layout))
        return [f"{descriptor} {layout}", 5]

    module = pytest.importorskip("triton.backends.nvidia.driver")
    monkeypatch.setattr(module, "make_tensordesc_arg", make)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    variant = Variant()
    launched = encode_by(lambda *arguments: runs.append(arguments), ["q", "k", "v"])
    monkeypatch.setattr(variant, "run", CudaLauncher(launched))
    described.variants[0, None] = LaunchVariant(variant)
    x, queries, none = aligned(), Described("Q"), Described(None, None)
    bound = described.bind(described=Described("K", "V"))
    for count in range(3):
        bound(x, varying=(count,), described=queries)
    head = ("function", False, True, None, None, "metadata", None, None, None)
    boxes = ("Q q", 5, "K k", 5, "V v", 5)
    rest = (x.data_ptr(), *ARGUMENTS, 64)
    assert runs == [(5, 1, 1, 100, *head, n, *boxes, *rest) for n in range(3)]
    assert encoded == [("Q", "q"), ("K", "k"), ("V", "v")]
    bound(x, varying=(3,), described=Described("R"))
    assert encoded[3:] == [("R", "q")]
    described.bind(described=none)(x, varying=(4,))
    assert runs[-1] == (5, 1, 1, 100, *head, 4, None, None, *rest)


@pytest.mark.parametrize("reason", ["version", "scratch", "closure"])
def test_other_launchers_encode_for_themselves(
    reason: str, driver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = "3.7.0" if reason == "version" else "3.6.0"
    monkeypatch.setattr(triton, "__version__", version)
    closure = encode_by(print, [])
    if reason == "closure":
        closure = lambda *arguments: reason
    launcher = CudaLauncher(closure, scratch=reason == "scratch")
    compiled = Variant()
    monkeypatch.setattr(compiled, "run", launcher)
    variant = LaunchVariant(compiled)
    assert variant.run is launcher
    assert variant.head == ("function", "metadata", None, None, None)
    assert variant.encode(Described("K", None), 1) == ("K", None)
