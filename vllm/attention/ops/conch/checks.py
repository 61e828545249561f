# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checks of arguments: a ValueError names the argument, what came and what may come.

The public functions run once per layer, so they must not check the same thing over
and over.  Everything here looks at a `TensorSpec`, which is hashable: a function puts
its checks, and what follows from them, into one helper under `functools.lru_cache`
and calls it with the `signature` of each tensor, which costs well under 1 us each.
"""

import math
import operator
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

# What to do about a scale of a cache that is not one element.
CACHE_SCALES = (
    "Scales per head or per channel are not supported; those of a cache may be per"
    " token and head."
)
# What may come as a length that the host must know.
LENGTH = "a length on the host, 0 or more"


class TensorSpec(NamedTuple):
    """All of a tensor but its contents: what a launch is planned from."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def signature(tensor: torch.Tensor) -> tuple:
    """The fields of `TensorSpec` as a plain tuple, which is quicker to make."""
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def signatures_of(
    tensors: dict[str, torch.Tensor | None], optional: Collection[str]
) -> list[tuple | None]:
    """The signature of each tensor, of the optional None for None; or a ValueError."""
    try:
        return [
            None if tensor is None and name in optional else signature(tensor)
            for name, tensor in tensors.items()
        ]
    except AttributeError:
        for name, tensor in tensors.items():
            if tensor is not None or name not in optional:
                check_tensor(name, tensor)
        raise


def specs_of(signatures: Sequence[tuple | None]) -> list[Any]:
    """A `TensorSpec` for each signature, None for None."""
    return [None if fields is None else TensorSpec(*fields) for fields in signatures]


def reject(name: str, got: object, allowed: object, advice: str = "") -> NoReturn:
    """Raises the ValueError that all checks share."""
    text = f"{name}: got {got}, allowed: {allowed}."
    raise ValueError(f"{text} {advice}" if advice else text)


def check_tensor(name: str, value: object) -> None:
    """Rejects what is no tensor; needed only where `signature` would fail."""
    if not isinstance(value, torch.Tensor):
        reject(name, type(value).__name__, "a torch.Tensor")


def check_number(name: str, value: object, allowed: str) -> None:
    """Rejects what is no number of Python's."""
    if not isinstance(value, (int, float)):
        advice = f"Pass float({name})." if hasattr(value, "__float__") else ""
        reject(name, type(value).__name__, allowed, advice)


def whole_number(name: str, value: Any, allowed: str, least: float = -math.inf) -> int:
    """The value, which may be of numpy, as an int; a ValueError for others.

    Tensors are others: to read one would wait for the device.
    """
    if isinstance(value, torch.Tensor):
        reject(name, type(value).__name__, allowed, f"Pass int({name}).")
    try:
        number = operator.index(value)
    except TypeError:
        reject(name, type(value).__name__, allowed)
    if number < least:
        reject(name, number, allowed)
    return number


def check_shape(
    name: str,
    spec: TensorSpec,
    dims: Sequence[str],
    expected: Sequence[int | None],
    advice: str = "",
) -> None:
    """Rejects a wrong number of dimensions or a wrong size.

    Args:
        name: Argument that is checked.
        spec: What came.
        dims: Names of the dimensions, for the message.
        expected: Size of each dimension; None allows any.
        advice: What to do about it.

    """
    sizes_match = len(spec.shape) == len(expected) and all(
        want is None or want == size for want, size in zip(expected, spec.shape)
    )
    if not sizes_match:
        allowed = ", ".join(
            dim if want is None else f"{dim}={want}"
            for dim, want in zip(dims, expected)
        )
        reject(name, f"shape {list(spec.shape)}", f"[{allowed}]", advice)


def check_dtype(
    name: str, spec: TensorSpec, allowed: Sequence[torch.dtype], advice: str = ""
) -> None:
    if spec.dtype not in allowed:
        reject(name, spec.dtype, ", ".join(map(str, allowed)), advice)


def check_device(
    name: str, spec: TensorSpec, reference_name: str, reference: TensorSpec
) -> None:
    if spec.device != reference.device:
        reject(
            name,
            f"device {spec.device}",
            f"{reference.device}, the device of {reference_name}",
            f"Move it with {name}.to({str(reference.device)!r}).",
        )


def check_last_stride(name: str, spec: TensorSpec) -> None:
    """Rejects a last dimension that is not contiguous."""
    if spec.shape[-1] > 1 and spec.strides[-1] != 1:
        reject(
            name,
            f"strides {list(spec.strides)}",
            "a stride of 1 in the last dimension",
            f"Pass {name}.contiguous(), or a view that keeps the last dimension.",
        )


def check_scale(
    name: str,
    spec: TensorSpec,
    reference_name: str,
    reference: TensorSpec,
    advice: str = "",
) -> None:
    """Rejects a scale that is not one fp32 element on the device."""
    if spec.dtype != torch.float32 or any(size != 1 for size in spec.shape):
        reject(
            name,
            f"{spec.dtype} of shape {list(spec.shape)}",
            "a torch.float32 tensor of one element",
            advice,
        )
    check_device(name, spec, reference_name, reference)


def free_strides(spec: TensorSpec) -> tuple[int, ...]:
    """Strides, with 0 where a dimension has size 1.

    Such a stride addresses nothing, and torch leaves anything there: kernels must
    neither depend on it nor be compiled for it.
    """
    return tuple(
        stride if size > 1 else 0 for size, stride in zip(spec.shape, spec.strides)
    )
