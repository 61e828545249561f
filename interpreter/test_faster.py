# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is faster in the interpreter computes, checks and undoes what Triton's does."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from vllm_interpreter import faster

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith(faster.TRITON),
    reason="another Triton's interpreter stays as it is",
)
LARGEST = 2**31 - 1


@triton.jit
def outer_sums(x, y):
    return x[:, None] + y[None, :]


@triton.jit
def kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    pointers = out_ptr + offsets[:, None] * BLOCK + offsets[None, :]
    tl.store(pointers, outer_sums(x, y))


def run(x: list[int], y: list[int], dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(len(x), len(y), dtype=dtype)
    values = torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)
    kernel[(1,)](*values, out, BLOCK=len(x))
    return out


def test_it_is_installed() -> None:
    assert faster.is_installed()


@pytest.fixture
def debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    options = interpreter.interpreter_builder.options
    monkeypatch.setitem(options.__dict__, "debug", True)  # the object is frozen


def test_functions_that_kernels_call(debug_mode: None) -> None:
    names = ("load", "store", "arange", "reduce", "range")
    triton_s_own = [getattr(tl, name) for name in names]
    assert run([1, 2], [10, 20], torch.int32).tolist() == [[11, 21], [12, 22]]
    with pytest.raises(InterpreterError):
        run([1, LARGEST], [0, 1], torch.int32)
    assert [getattr(tl, name) for name in names] == triton_s_own
    assert run([3, 4], [10, 20], torch.int64).tolist() == [[13, 23], [14, 24]]


def test_overflow_wraps() -> None:
    assert run([LARGEST], [1], torch.int32).tolist() == [[-LARGEST - 1]]


@pytest.mark.parametrize("x, y", [([0, LARGEST], [0, 1]), ([-2, 0], [0, -LARGEST])])
def test_overflow_is_found(debug_mode: None, x: list[int], y: list[int]) -> None:
    with pytest.raises(InterpreterError, match="int32 overflow detected .* add"):
        run(x, y, torch.int32)
    expected = [[a + b for b in y] for a in x]
    assert run(x, y, torch.int64).tolist() == expected


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (tl.int1, np.bool_),
        (tl.int32, np.int32),
        (tl.float16, np.float16),
        (tl.bfloat16, np.uint16),
        (tl.float8e4nv, np.uint8),
        (tl.pointer_type(tl.float32), np.uint64),
    ],
    ids=str,
)
def test_dtypes_of_blocks(dtype: tl.dtype, expected: type) -> None:
    for wrapped in (dtype, tl.block_type(dtype, [2, 4])):
        assert interpreter._get_np_dtype(wrapped) == np.dtype(expected)


def test_block_types() -> None:
    get = interpreter.interpreter_builder.get_block_ty
    block = get(tl.int32, [2, 4])
    assert get(tl.int32, [2, 4]) is block == tl.block_type(tl.int32, [2, 4])
    assert get(tl.int32, [4, 2]) != block
    assert block.with_element_ty(tl.float16) == tl.block_type(tl.float16, [2, 4])
    pointers = get(tl.pointer_type(tl.int8), [8])
    assert pointers.scalar == tl.pointer_type(tl.int8)


def test_types_of_tuples() -> None:
    values = [1, tl.constexpr(2)]
    asked = tl.core.tuple(values).type
    assert asked == tl.core._type_for_tuple_values(values)
    assert tl.core.tuple(values, asked).type is asked
    assert tl.core.tuple([], [tl.int32]).type == tl.core.tuple_type([tl.int32])
