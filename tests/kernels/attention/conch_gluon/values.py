# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Scalars and tensors of a Gluon kernel, with its types and its arithmetic.

Integers are held in 64 bits and checked against the bounds of their type after every
operation: kernels are not meant to overflow. Division is C's, rounded towards zero.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class DType:
    """An element type of Gluon's."""

    name: str
    torch: torch.dtype
    bits: int
    kind: str  # "bool", "int", "uint" or "float"

    @property
    def value(self) -> "DType":  # of a constexpr
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and largest integer."""
        if self.kind == "uint":
            return 0, 2**self.bits - 1
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def held(self) -> torch.dtype:
        """What elements are held in."""
        return torch.int64 if self.kind in ("int", "uint") else self.torch

    def __repr__(self) -> str:
        return self.name


int1 = DType("int1", torch.bool, 1, "bool")
int8 = DType("int8", torch.int8, 8, "int")
int16 = DType("int16", torch.int16, 16, "int")
int32 = DType("int32", torch.int32, 32, "int")
int64 = DType("int64", torch.int64, 64, "int")
uint32 = DType("uint32", torch.uint32, 32, "uint")
float8e4nv = DType("float8e4nv", torch.float8_e4m3fn, 8, "float")
float16 = DType("float16", torch.float16, 16, "float")
bfloat16 = DType("bfloat16", torch.bfloat16, 16, "float")
float32 = DType("float32", torch.float32, 32, "float")
DTYPES = (
    int1, int8, int16, int32, int64, uint32, float8e4nv, float16, bfloat16, float32
)  # fmt: skip


def dtype_of(dtype: torch.dtype) -> DType:
    return next(d for d in DTYPES if d.torch == dtype)


def common_dtype(a: Any, b: Any) -> DType:
    """Of an operation on two values; a Python number takes the other's where it can."""
    if not isinstance(b, Tensor):
        a, b = b, a
    if not isinstance(b, Tensor):
        return float32 if isinstance(a, float) or isinstance(b, float) else int32
    if not isinstance(a, Tensor):
        if isinstance(a, float) and b.dtype.kind != "float":
            return float32
        if isinstance(a, int) and b.dtype.kind == "bool" and not isinstance(a, bool):
            return int32
        return b.dtype
    kinds = ("bool", "int", "uint", "float")
    low, high = sorted((a.dtype, b.dtype), key=lambda d: (kinds.index(d.kind), d.bits))
    if high.kind == "uint" and low.bits > high.bits:
        return low
    return high


class Tensor:
    """A tensor of Gluon's, or a scalar, whose data is a Python number.

    The result of a matrix product that nobody has awaited has no data for threads.
    """

    def __init__(self, data: Any, dtype: DType) -> None:
        self.dtype = dtype
        self.pending = False
        self.set(data)

    def set(self, data: Any) -> None:
        """Gives it data; rounds it and checks bounds."""
        dtype = self.dtype
        if isinstance(data, torch.Tensor):
            data = data.to(dtype.held)
            if dtype.held == torch.int64 and dtype.bits < 64 and data.numel():
                self.check(int(data.min()), int(data.max()))
        elif dtype.kind == "float":
            data = float(np.float32(data))
        elif dtype.kind == "bool":
            data = bool(data)
        else:
            data = int(data)
            self.check(data, data)
        self.known = data

    def check(self, least: int, largest: int) -> None:
        low, high = self.dtype.bounds
        if not low <= least <= largest <= high:
            raise OverflowError(f"{least} to {largest} as {self.dtype}")

    @property
    def data(self) -> Any:
        if self.pending:
            raise RuntimeError("a matrix product's result is used before it is awaited")
        return self.known

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.known.shape) if isinstance(self.known, torch.Tensor) else ()

    @property
    def type(self) -> "Tensor":
        return self

    @property
    def layout(self) -> None:
        """Which thread holds what: nothing depends on it here."""
        return None

    def to(self, dtype: DType) -> "Tensor":
        data = self.data
        if isinstance(data, torch.Tensor) and dtype is float8e4nv:
            data = data.clamp(-448, 448)
        return Tensor(data, dtype)

    def reshape(self, shape: Sequence[int]) -> "Tensor":
        return Tensor(self.data.reshape(*shape), self.dtype)

    def permute(self, order: Sequence[int]) -> "Tensor":
        return Tensor(self.data.permute(*order), self.dtype)

    def __bool__(self) -> bool:
        if self.shape:
            raise TypeError("a tensor decides no branch")
        return bool(self.data)

    def __index__(self) -> int:
        if self.shape or self.dtype.kind == "float":
            raise TypeError(f"{self.dtype}{list(self.shape)} is no index")
        return int(self.data)

    def __neg__(self) -> "Tensor":
        return Tensor(-self.data, self.dtype)

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)}({self.known})"


def data_of(value: Any) -> Any:
    return value.data if isinstance(value, Tensor) else value


def binary(
    apply: Callable, a: Any, b: Any, result: DType | None = None, *, floats=False
) -> Any:
    """Applies a function to two values in their common type; numbers stay numbers.

    Args:
        apply: the function, of tensors or numbers.
        a: the first value.
        b: the second.
        result: type of the result; None: the common one.
        floats: integers become floats first.

    """
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return apply(a, b)
    dtype = common_dtype(a, b)
    if floats and dtype.kind != "float":
        dtype = float32
    check_shapes(a, b)
    x, y = (in_dtype(data_of(value), dtype) for value in (a, b))
    return Tensor(apply(x, y), result or dtype)


def in_dtype(data: Any, dtype: DType) -> Any:
    if isinstance(data, torch.Tensor):
        return data.to(dtype.held)
    return float(data) if dtype.kind == "float" else data


def check_shapes(*values: Any) -> None:
    """Tensors of an operation have the same rank, and are spread only from 1."""
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    shapes = [shape for shape in shapes if shape]
    if len({len(shape) for shape in shapes}) > 1:
        raise TypeError(f"an operation on shapes {shapes}")
    for sizes in zip(*shapes):
        if len(set(sizes) - {1}) > 1:
            raise TypeError(f"an operation on shapes {shapes}")


def divide(a: Any, b: Any) -> Any:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.div(a, b, rounding_mode="trunc")
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: Any, b: Any) -> Any:
    return a - divide(a, b) * b


def smaller(a: Any, b: Any) -> Any:
    return extreme(torch.minimum, min, a, b)


def larger(a: Any, b: Any) -> Any:
    return extreme(torch.maximum, max, a, b)


def extreme(of_tensors: Callable, of_numbers: Callable, a: Any, b: Any) -> Any:
    """As Gluon's: of a number and NaN the number."""
    tensors = [x for x in (a, b) if isinstance(x, torch.Tensor)]
    if not tensors:
        return of_numbers(a, b)
    dtype = tensors[0].dtype
    a, b = (torch.as_tensor(x, dtype=dtype) for x in (a, b))
    if dtype.is_floating_point:
        a, b = torch.where(a.isnan(), b, a), torch.where(b.isnan(), a, b)
    return of_tensors(a, b)


OPERATIONS: dict[str, tuple[Callable, DType | None, bool]] = {
    "add": (operator.add, None, False),
    "sub": (operator.sub, None, False),
    "mul": (operator.mul, None, False),
    "truediv": (operator.truediv, None, True),
    "floordiv": (divide, None, False),
    "mod": (remainder, None, False),
    "and": (operator.and_, None, False),
    "or": (operator.or_, None, False),
    "xor": (operator.xor, None, False),
}
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def give_operators() -> None:
    """Gives `Tensor` Python's operators."""

    def method(apply, result, floats, swapped):
        def forward(self, other):
            if not isinstance(other, (Tensor, int, float)):
                return NotImplemented
            pair = (other, self) if swapped else (self, other)
            return binary(apply, *pair, result, floats=floats)

        return forward

    for name, (apply, result, floats) in OPERATIONS.items():
        setattr(Tensor, f"__{name}__", method(apply, result, floats, False))
        setattr(Tensor, f"__r{name}__", method(apply, result, floats, True))
    for name in COMPARISONS:
        apply = getattr(operator, name)
        setattr(Tensor, f"__{name}__", method(apply, int1, False, False))
    Tensor.__hash__ = None  # type: ignore[assignment]


give_operators()
