# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton's interpreter with less to do around each operation of a kernel.

What a kernel computes stays the same. Of the time that Triton 3.6's
interpreter needs for kernels of small tiles, more than half goes into

- putting its own functions in place of triton.language's again whenever a kernel calls
  a function, though the launch has done that;
- looking for integer overflow, then saying nothing of it outside of debug mode;
- dtypes and types of shapes that are made anew for every tensor.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

TRITON = "3.6."  # whose internals these are


def patch_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Puts the interpreter's functions in place once for each launch.

    Args:
        patch: Triton's function that does so for the modules that a function names,
            and returns what undoes it. A launch calls it and undoes it at its end;
            each function that a kernel calls does the former alone.

    """
    patched: list[Any] = []  # modules, in the launch under way
    scopes: list[Any] = []

    def undo() -> None:
        patched.clear()
        while scopes:
            scopes.pop().restore()

    def patch_lang(function: Any) -> SimpleNamespace | None:
        names = function.__globals__.values()
        modules = [name for name in names if name is tl or name is tl.core]
        if all(any(module is done for done in patched) for module in modules):
            return None  # no launch comes here: its modules are not patched yet
        patched.extend(modules)
        scopes.append(patch(function))
        return SimpleNamespace(restore=undo)

    return patch_lang


def keep_dtypes(np_dtype: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """NumPy's dtype of Triton's scalars, pointers and blocks, looked up once each."""
    kept: dict[tl.dtype, np.dtype] = {}

    def get_np_dtype(dtype: Any) -> np.dtype:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return np_dtype(scalar)
        found = kept.get(scalar)
        if found is None:
            found = kept[scalar] = np_dtype(scalar)
        return found

    return get_np_dtype


def in_debug_mode(check: Callable[..., None]) -> Callable[..., None]:
    """Looks for integer overflow where something is said of it."""

    def check_overflow(self: TritonSemantic, *operands_and_operation: Any) -> None:
        if self.builder.options.debug:
            check(self, *operands_and_operation)

    return check_overflow


def keep_block_types() -> None:
    """One object for all blocks of a shape and dtype."""
    kept: dict[tuple[Any, ...], tl.block_type] = {}

    def get(element: tl.dtype, shape: Any) -> tl.block_type:
        if isinstance(element, tl.pointer_type):  # has no hash
            return tl.block_type(element, shape)
        key = (element, *shape)
        found = kept.get(key)
        if found is None:
            found = kept[key] = tl.block_type(element, shape)
        return found

    interpreter.InterpreterBuilder.get_block_ty = lambda _, *block: get(*block)
    tl.block_type.with_element_ty = lambda self, element: get(element, self.shape)


def type_tuples_when_asked() -> None:
    """A shape is a tuple whose type nothing but a compiler asks for."""
    type_of = tl.core._type_for_tuple_values
    typed = tl.core.tuple.__init__

    def init(self: Any, args: Any, type: Any = None) -> None:
        self.__dict__["given"] = None
        if type is None:
            self.values = list(args)
        else:
            typed(self, args, type)

    def get_type(self: Any) -> Any:
        if self.given is None:
            self.given = type_of(self.values)
        return self.given

    def set_type(self: Any, given: Any) -> None:
        self.given = given

    tl.core.tuple.__init__ = init
    tl.core.tuple.type = property(get_type, set_type)


def install() -> None:
    """Replaces the interpreter's functions, once; those of another Triton stay."""
    if is_installed() or not triton.__version__.startswith(TRITON):
        return
    check = TritonSemantic.binary_op_sanitize_overflow_impl
    TritonSemantic.binary_op_sanitize_overflow_impl = in_debug_mode(check)
    interpreter._patch_lang = patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = keep_dtypes(interpreter._get_np_dtype)
    keep_block_types()
    type_tuples_when_asked()


def is_installed() -> bool:
    """Whether the interpreter's functions are those of this module."""
    return bool(interpreter._patch_lang.__module__ == __name__)
