# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`scaled_fp8_quant` against its definition, bit by bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.attention.conch_harness import (  # noqa: F401
    DEVICE,
    DTYPES,
    ON_GPU,
    gpu_only,
    poisoned_scratch,
)
from tests.kernels.attention.conch_reference import FP8_DTYPES, nan_filled
from vllm.attention.ops.conch.fp8 import converts_in_hardware
from vllm.attention.ops.conch.plan import Device
from vllm.attention.ops.conch.scaled_fp8_quant import scaled_fp8_quant
from vllm.platforms import current_platform

FP8_MAX = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e4m3fnuz: 224.0,  # vLLM's choice, not the format's 240
    torch.float8_e5m2: 57344.0,
}
E4M3 = torch.float8_e4m3fn
MODES = ["static", "per_tensor", "per_token", "per_token_bounded"]
UPPER_BOUND = 0.7


def definition(
    x: torch.Tensor, mode: str, dtype: torch.dtype, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and scale, computed on the CPU; NaN does not count for the scale."""
    limit = FP8_MAX[dtype]
    x = x.cpu().float()
    magnitude = torch.where(x.isnan(), 0, x.abs())
    magnitude = torch.cat([torch.zeros(len(x), 1), magnitude], 1)  # for empty rows
    if mode.startswith("per_token"):
        largest = magnitude.amax(1, keepdim=True)
        if mode == "per_token_bounded":
            largest = largest.clamp(max=UPPER_BOUND)
        scales = (largest / limit).clamp(min=1 / (512 * limit))
        return (x / scales).clamp(-limit, limit).to(dtype), scales
    if mode == "per_tensor":
        largest = max(magnitude.flatten().tolist(), default=0.0)
        scales = (torch.tensor([largest]) / limit).clamp(min=2.0**-126)
    else:
        scales = torch.tensor([scale])
    return (x * (1 / scales)).clamp(-limit, limit).to(dtype), scales


def quantize(
    x: torch.Tensor, mode: str, scale: float = 0.3, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    if mode == "static":
        return scaled_fp8_quant(x, torch.tensor([scale], device=DEVICE), **options)
    if mode == "per_token_bounded":
        options["scale_ub"] = torch.tensor(UPPER_BOUND, device=DEVICE)
    return scaled_fp8_quant(x, per_token=mode.startswith("per_token"), **options)


def bits(quantized: torch.Tensor) -> torch.Tensor:
    """The bytes, with one pattern for NaN."""
    quantized = quantized.cpu()
    return torch.where(
        quantized.float().isnan(), 0x7F, quantized.contiguous().view(torch.uint8)
    )


def check(
    x: torch.Tensor, mode: str, dtype: torch.dtype = E4M3, scale: float = 0.3
) -> None:
    output, scales = quantize(x, mode, scale, dtype=dtype)
    expected, expected_scales = definition(x, mode, dtype, scale)
    assert output.dtype == dtype
    assert scales.dtype == torch.float32
    assert scales.shape == expected_scales.shape
    assert torch.equal(scales.cpu(), expected_scales)
    wrong = bits(output) != bits(expected)
    x, output = x.cpu(), output.cpu().float()
    assert not bool(wrong.any()), (
        f"{int(wrong.sum())} of {wrong.numel()} bytes differ: "
        f"{x[wrong][:8].tolist()} became {output[wrong][:8].tolist()}, "
        f"not {expected.float()[wrong][:8].tolist()}"
    )


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(mode: str, input_dtype: torch.dtype, dtype: torch.dtype) -> None:
    check(random(13, 96, dtype=input_dtype), mode, dtype)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (1, 17),
        (7, 128),
        (5, 1026),
        (3, 5137),
        (2, 8192),
        (2, 16384),
        (3, 16400),  # longer than the registers of one program
        (2, 53248),
        (300, 16),
        (0, 64),
        (0, 17),
        (3, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_shapes(mode: str, shape: tuple[int, int]) -> None:
    check(random(*shape, dtype=torch.float16), mode)


@pytest.mark.parametrize("shape", [(64, 4096), (1024, 256)])
@pytest.mark.parametrize("mode", MODES)
def test_many_elements(mode: str, shape: tuple[int, int]) -> None:
    """More tiles than programs, and the large tile in the interpreter."""
    check(random(*shape), mode)


@gpu_only
@pytest.mark.parametrize("mode", MODES)
def test_very_many_elements(mode: str) -> None:
    check(random(4099, 4096, dtype=torch.bfloat16), mode)


@pytest.mark.parametrize(("extra", "hidden_size"), [(16, 64), (8, 4096), (3, 129)])
@pytest.mark.parametrize("mode", MODES)
def test_row_strides(mode: str, hidden_size: int, extra: int) -> None:
    """Rows with gaps, of input and of output: the gaps are neither read nor written."""
    wide = nan_filled(6, hidden_size + extra, dtype=torch.float16, device=DEVICE)
    x = wide[:, extra:]
    x.copy_(random(6, hidden_size))
    check(x, mode)

    buffer = torch.full((6, hidden_size + 2 * extra), 99, device=DEVICE).byte()
    output = buffer.view(E4M3)[:, extra:-extra]
    returned, _ = quantize(x, mode, output=output)
    assert returned is output
    assert torch.equal(bits(output), bits(definition(x, mode, E4M3, 0.3)[0]))
    assert bool((buffer[:, :extra] == 99).all())
    assert bool((buffer[:, -extra:] == 99).all())


@pytest.mark.parametrize("mode", MODES)
def test_transposed_memory_is_rejected(mode: str) -> None:
    with pytest.raises(ValueError, match=r"^input: got strides .*allowed: "):
        quantize(random(32, 6).T, mode)


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_special_values(mode: str, dtype: torch.dtype) -> None:
    """Saturation and NaN; rows of zeros, of NaN, of tiny and of huge numbers."""
    x = random(10, 64)
    x[0] = 0
    x[1] = math.nan
    x[2, 5] = math.nan
    x[3, 7] = 1e4
    x[4, 9] = -1e4
    x[5] *= 1e-6
    x[6] *= 1e-30
    x[7, 3] = -0.0
    check(x, mode, dtype)
    check(x[:1], mode, dtype)
    check(x[1:2], mode, dtype)
    check(x[6:7], mode, dtype)
    for scale in (0.5, 2.0, 1e-3):
        check(x, "static", dtype, scale)


def test_infinity_saturates_under_a_given_scale() -> None:
    x = torch.tensor([[math.inf, -math.inf, 1.0]], device=DEVICE)
    check(x, "static")
    check(x, "per_token_bounded")


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["static", "per_token"])
def test_ties(mode: str, dtype: torch.dtype) -> None:
    """Halfway between two values, times a scale that is no power of two."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.abs() <= FP8_MAX[dtype]].sort().values
    ties = (values[1:] + values[:-1]) / 2
    scales = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    rows = torch.cat([ties.expand(500, -1), torch.full((500, 1), FP8_MAX[dtype])], 1)
    x = (rows * scales).to(DEVICE)
    if mode == "per_token":
        check(x, mode, dtype)
    else:
        for row, scale in zip(x[:20, None], scales.flatten().tolist()):
            check(row, mode, dtype, scale)


@pytest.mark.parametrize("mode", MODES)
def test_scales_find_the_maximum_anywhere(mode: str) -> None:
    """One large element at a time, first, last and on either side of tile borders."""
    for hidden_size in (300, 20000):
        for column in (0, 127, 128, 255, 256, 1023, 1024, 4095, 4096, 16383, 16384, -1):
            if column < hidden_size:
                x = random(2, hidden_size, seed=column + 1)
                x[1, column] = -30.0
                check(x, mode)


@pytest.mark.parametrize("mode", MODES)
def test_results_repeat(mode: str) -> None:
    x = random(200, 512)
    first = quantize(x, mode)
    for _ in range(50 if ON_GPU else 2):
        again = quantize(x, mode)
        assert torch.equal(first[1], again[1])
        assert torch.equal(bits(first[0]), bits(again[0]))


@pytest.mark.parametrize("mode", MODES)
def test_scratch_may_hold_anything(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maxima pass over NaN, the usual poison, but not over a large number."""
    allocate = torch.empty

    def full_of_large_numbers(*args, **kwargs) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(1e30) if tensor.dtype == torch.float32 else tensor

    x = random(5, 300)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full_of_large_numbers)
        output, scales = quantize(x, mode)
    expected, expected_scales = definition(x, mode, E4M3, 0.3)
    assert torch.equal(scales.cpu(), expected_scales)
    assert torch.equal(bits(output), bits(expected))


@pytest.mark.parametrize("mode", MODES)
def test_padding(mode: str) -> None:
    """More rows than tokens, as vLLM's scaled_mm asks for."""
    x = random(5, 64)
    output, scales = quantize(x, mode, num_token_padding=17)
    expected, expected_scales = definition(x, mode, E4M3, 0.3)
    assert output.shape == (17, 64)
    assert torch.equal(bits(output[:5]), bits(expected))
    assert scales.shape == ((17, 1) if mode.startswith("per_token") else (1,))
    assert torch.equal(scales.cpu()[:5], expected_scales)
    output, _ = quantize(x, mode, num_token_padding=np.int32(3))
    assert output.shape == (5, 64)


def test_defaults() -> None:
    x = random(2, 64)
    given = torch.tensor(0.5, device=DEVICE)  # no dimensions
    output, scale = scaled_fp8_quant(x, given)
    assert output.dtype == current_platform.fp8_dtype()
    assert scale is given


@pytest.mark.parametrize(
    ("backend", "arch", "native"),
    [
        ("cuda", 80, ()),
        ("cuda", 89, (torch.float8_e4m3fn, torch.float8_e5m2)),
        ("cuda", 90, (torch.float8_e4m3fn, torch.float8_e5m2)),
        ("hip", "gfx90a", ()),
        ("hip", "gfx942", (torch.float8_e4m3fnuz,)),
        ("hip", "gfx950", (torch.float8_e4m3fn, torch.float8_e5m2)),
        ("interpreter", 0, ()),
    ],
)
def test_who_converts_in_hardware(backend: str, arch: int | str, native: tuple) -> None:
    device = Device(backend, arch, num_units=1, shared_memory=0)
    found = tuple(t for t in FP8_DTYPES if converts_in_hardware(t, device))
    assert set(found) == set(native)


@settings(max_examples=80 if ON_GPU else 40, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 20), "num_tokens")
    columns = data.draw(st.integers(1, 3000), "hidden_size")
    extra = data.draw(st.sampled_from([0, 1, 16]), "extra")
    input_dtype = data.draw(st.sampled_from(DTYPES), "input_dtype")
    x = random(rows, columns + extra, dtype=input_dtype)[:, :columns]
    check(
        x * data.draw(st.sampled_from([1e-3, 1.0, 3e3]), "factor"),
        data.draw(st.sampled_from(MODES), "mode"),
        data.draw(st.sampled_from(FP8_DTYPES), "dtype"),
        data.draw(st.sampled_from([0.01, 1.0, 77.7]), "scale"),
    )


ONE = torch.ones(1, device=DEVICE)
ERRORS = [
    ("input", {"input": [1.0]}, "list"),
    ("input", {"input": ONE}, "shape"),
    ("input", {"input": ONE[0]}, "shape"),
    ("scale", {"scale": 2.0}, "float"),
    ("scale_ub", {"scale_ub": 2.0, "per_token": True}, "float"),
    ("output", {"output": [1.0]}, "list"),
    ("input", {"input": torch.ones(2, 3, 4, device=DEVICE)}, "flatten"),
    ("input", {"input": torch.ones(2, 16, device=DEVICE).int()}, "int32"),
    ("scale", {"scale": torch.ones(2, device=DEVICE)}, "shape"),
    ("scale", {"scale": ONE.half()}, "float16"),
    ("scale", {"scale": ONE.to("meta")}, "device meta"),
    ("scale", {"scale": ONE, "per_token": True}, "per_token"),
    ("scale_ub", {"scale_ub": ONE}, "per_token"),
    ("scale_ub", {"scale_ub": ONE, "scale": ONE}, "per_token"),
    ("scale_ub", {"scale_ub": ONE.double(), "per_token": True}, "float64"),
    ("dtype", {"dtype": torch.int8}, "int8"),
    ("dtype", {"dtype": torch.float16}, "float16"),
    ("dtype", {"dtype": "fp8"}, "fp8"),
    ("num_token_padding", {"num_token_padding": "a"}, "str"),
    ("num_token_padding", {"num_token_padding": -1}, "-1"),
    ("num_token_padding", {"num_token_padding": torch.tensor(4)}, "Tensor"),
    ("output", {"output": torch.ones(2, 16, device=DEVICE)}, "float32"),
    ("output", {"output": nan_filled(2, 8, dtype=E4M3, device=DEVICE)}, "shape"),
    ("output", {"output": nan_filled(1, 16, dtype=E4M3, device=DEVICE)}, "rows"),
    ("output", {"output": nan_filled(16, 2, dtype=E4M3, device=DEVICE).T}, "strides"),
    ("output", {"output": nan_filled(2, 16, dtype=E4M3, device="meta")}, "meta"),
    (
        "dtype",
        {"output": nan_filled(2, 16, dtype=E4M3, device=DEVICE), "dtype": E4M3},
        "output",
    ),
    (
        "num_token_padding",
        {
            "output": nan_filled(2, 16, dtype=E4M3, device=DEVICE),
            "num_token_padding": 4,
        },
        "output",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "detail"), ERRORS)
def test_errors(name: str, arguments: dict, detail: str) -> None:
    """The message begins with the argument and says what came and what is allowed."""
    call = {"input": torch.ones(2, 16, device=DEVICE)} | arguments
    with pytest.raises(ValueError, match=rf"^{name}: got (?=.*{detail}).*allowed: "):
        scaled_fp8_quant(**call)


@pytest.mark.parametrize("name", ["scale", "scale_ub"])
def test_errors_of_scales_speak_of_no_cache(name: str) -> None:
    call = {name: torch.ones(2, device=DEVICE), "per_token": name == "scale_ub"}
    with pytest.raises(ValueError, match="allowed: a .* of one element.$"):
        scaled_fp8_quant(torch.ones(2, 16, device=DEVICE), **call)


@gpu_only
@pytest.mark.parametrize("mode", MODES)
def test_graph_replay(mode: str) -> None:
    """Captured once, it quantises what the input holds later; no synchronisation."""
    x = random(37, 512, dtype=torch.bfloat16)
    quantize(x, mode)
    scale = torch.tensor([0.3], device=DEVICE)
    bound = torch.tensor(UPPER_BOUND, device=DEVICE)
    options = {
        "static": {"scale": scale},
        "per_tensor": {},
        "per_token": {"per_token": True},
        "per_token_bounded": {"per_token": True, "scale_ub": bound},
    }[mode]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, scales = scaled_fp8_quant(x, **options)
    for seed in (1, 2):
        x.copy_(random(37, 512, seed=seed) * seed)
        graph.replay()
        expected, expected_scales = definition(x, mode, E4M3, 0.3)
        assert torch.equal(scales.cpu(), expected_scales)
        assert torch.equal(bits(output), bits(expected))


@gpu_only
@pytest.mark.parametrize("shape", [(1, 4096), (7, 1025), (300, 5120), (2048, 14336)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
def test_like_the_cuda_kernels(
    input_dtype: torch.dtype, mode: str, shape: tuple[int, int]
) -> None:
    """The same bits as vLLM's own kernels, where they are compiled."""
    ops = pytest.importorskip("vllm._custom_ops")
    if not hasattr(torch.ops._C, "static_scaled_fp8_quant"):
        pytest.skip("vLLM's CUDA kernels are not compiled")
    x = random(*shape, dtype=input_dtype)
    options = {
        "static": {"scale": torch.tensor([0.3], device=DEVICE)},
        "per_tensor": {},
        "per_token": {"use_per_token_if_dynamic": True},
        "per_token_bounded": {
            "use_per_token_if_dynamic": True,
            "scale_ub": torch.tensor(UPPER_BOUND, device=DEVICE),
        },
    }[mode]
    theirs, their_scales = ops.scaled_fp8_quant(x, **options)
    ours, our_scales = quantize(x, mode)
    assert our_scales.shape == their_scales.shape
    assert torch.equal(our_scales, their_scales)
    assert torch.equal(bits(ours), bits(theirs))
