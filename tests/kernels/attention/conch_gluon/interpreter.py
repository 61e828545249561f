# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""From a Gluon kernel to Python functions that run on a CPU."""

import random
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from vllm.triton_utils import triton

from .language import LANGUAGE, hopper, kernel_range, to_tensor
from .memory import Descriptor, Pointer
from .program import Program, running

JITFunction = triton.JITFunction
ConstexprFunction = triton.runtime.jit.ConstexprFunction

# What kernels may hold of Gluon, and what stands in for it.
REPLACED: list[tuple[object, object]] = [
    (gl, LANGUAGE),
    *((getattr(gl.nvidia.hopper, name), fake) for name, fake in vars(hopper).items()),
]


class Translation:
    """Functions with other globals, each module's once.

    In kernels a constexpr is its value; in functions of constexprs, which ask for that
    themselves, it is one.
    """

    def __init__(self, is_kernel: bool, others: "Translation | None" = None) -> None:
        self.is_kernel = is_kernel
        self.others = others or self  # of functions of constexprs
        self.modules: dict[int, dict[str, Any]] = {}

    def globals_of(self, names: dict[str, Any]) -> dict[str, Any]:
        known = self.modules.get(id(names))
        if known is None:
            known = self.modules[id(names)] = {"range": kernel_range}
            for name, value in names.items():
                if not name.startswith("__"):
                    known[name] = self.translate(value)
        return known

    def translate(self, value: Any) -> Any:
        for real, fake in REPLACED:
            if value is real:
                return fake
        if isinstance(value, gl.constexpr) and self.is_kernel:
            return value.value
        if isinstance(value, JITFunction):
            return self.function(value.fn)
        if isinstance(value, ConstexprFunction):
            return self.others.function(value.fn)
        if getattr(value, "__triton_aggregate__", False):
            init = self.others.function(value.hash_attrs[0].fn)
            return type(value.__name__, (), {"__init__": init})
        return value

    def function(self, function: FunctionType) -> FunctionType:
        return FunctionType(
            function.__code__,
            self.globals_of(function.__globals__),
            function.__name__,
            function.__defaults__,
        )


KERNELS = Translation(True, Translation(False))


def argument(value: Any) -> Any:
    """What a kernel gets for what its launch is given."""
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return Pointer.to_tensor(value)
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return to_tensor(value)


def run_kernel(
    kernel: JITFunction,
    num_programs: int,
    arguments: tuple,
    constants: dict[str, Any],
    seed: int = 0,
) -> None:
    """Runs a kernel as a launch would; what chance decides depends on the seed.

    Args:
        kernel: under gluon.jit, with a grid of one dimension.
        num_programs: of the grid; they run one after the other.
        arguments: tensors on the CPU, descriptors, numbers or None, in their order.
        constants: constexprs, and options that have no effect here.
        seed: of `program.Program`.

    Raises:
        RuntimeError, IndexError, OverflowError, TypeError: for what would be undefined
            or never end on a GPU; what it was is said.

    """
    function: Callable = KERNELS.translate(kernel)
    named = dict(zip(kernel.arg_names, arguments))
    named |= {name: c for name, c in constants.items() if name in kernel.arg_names}
    is_constant = {
        parameter.name: parameter.is_constexpr for parameter in kernel.params
    }
    named = {n: v if is_constant[n] else argument(v) for n, v in named.items()}
    indices = list(range(num_programs))
    random.Random(seed).shuffle(indices)
    for index in indices:
        with running(Program(index, num_programs, seed)):
            function(**named)
