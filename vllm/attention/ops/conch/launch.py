# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Launching the same kernel again without asking which variant it is.

At every launch Triton looks at every argument to find the compiled variant, which takes
longer than the launch itself.  A function that has already reduced its arguments to a
cached plan knows the variant: only the addresses are new.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from vllm.triton_utils import triton

# Triton compiles another variant where an address is not a multiple of this.
POINTER_ALIGNMENT = 16


@lru_cache(maxsize=4096)
def describe(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
):
    """Descriptor of a strided tensor; holds the address, not the memory."""
    base = SimpleNamespace(dtype=dtype, data_ptr=lambda: address)
    return tensor_descriptor(base, shape, strides, box)


def tensor_descriptor(base, *layout: tuple[int, ...]):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(base, *map(list, layout))


def describe_pages(cache: torch.Tensor, slots: int, head_padded: int):
    """Descriptor of a paged cache in boxes [1, 1, slots, head_padded].

    Its dimensions are num_blocks, num_kv_heads, block_size and head_size. A descriptor
    is made on the host, once for an address, as the caches of a model never move.
    """
    num_blocks, block_size, num_kv_heads, head_size = cache.shape
    page, slot, head, element = cache.stride()
    layout = (
        (num_blocks, num_kv_heads, block_size, head_size),
        (page, head, slot, element),
        (1, 1, slots, head_padded),
    )
    if not cache.is_cuda:
        return tensor_descriptor(cache, *layout)  # the interpreter looks for its memory
    return describe(cache.data_ptr(), cache.dtype, *layout)


# Whether launches only have their variants compiled; see `compile_together`.
compiles_only = False


@contextmanager
def compile_together(num_threads: int) -> Iterator[None]:
    """Within it no `Launch` launches anything: variants are compiled, in parallel.

    At the end all are in Triton's cache. An error of the compiler is left to the
    launch that needs the variant. Where Triton cannot compile in parallel (before 3.5,
    in the interpreter, and on AMD GPUs, where LLVM may abort) launches are as ever.
    """
    global compiles_only
    in_parallel = (
        num_threads > 1
        and torch.version.cuda is not None
        and hasattr(triton, "AsyncCompileMode")
    )
    if not in_parallel or compiles_only:
        yield
        return
    with (
        ThreadPoolExecutor(num_threads) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        compiles_only = True
        try:
            yield
        finally:
            compiles_only = False


class Launch:
    """A launch with everything fixed but the contents and addresses of its tensors.

    A compiled variant depends on dtypes, constants, integers, on which tensors are
    None, on the device and on the alignment of addresses.  The last two are looked at
    in each call; the rest must be the same for all calls of one object, so make one
    per combination and keep it, for example under `functools.lru_cache`.

    On AMD GPUs a variant also depends on the size of the memory behind a tensor, and
    the interpreter has no variants: there Triton looks for itself.
    """

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        arguments: tuple,
        constants: dict[str, object],
    ):
        """Describes the launch.

        Args:
            kernel: Function under `triton.jit` whose parameters are, in this order,
                what varies, then tensors, then `arguments`, then constants.
            grid: Number of programs along up to three axes.
            arguments: Integers, floats and tuples of them.
            constants: Every constexpr parameter, and options such as num_warps.
        """
        self.kernel = kernel
        self.grid = grid + (1,) * (3 - len(grid))
        self.arguments = arguments
        self.constants = constants
        self.variants: dict[tuple, Any] = {}
        self.submitted: set[tuple] = set()  # variants that `compile_together` compiles
        is_compiled = isinstance(kernel, triton.JITFunction)
        self.is_cacheable = is_compiled and torch.version.cuda is not None
        self.after_tensors = arguments + tuple(
            constants[name] for name in kernel.arg_names if name in constants
        )

    def __call__(
        self,
        *tensors: torch.Tensor | None,
        varying: tuple = (),
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Launches.

        Args:
            *tensors: of the kernel.
            varying: descriptors, each with the same dtype and box in all calls of one
                object, or None; and integers for which no variant is made.
            grid: replaces that of the constructor.
        """
        self.bind()(*tensors, varying=varying, grid=grid)

    def bind(self, *tensors: torch.Tensor | None) -> "BoundLaunch":
        """The launch with its last tensors given; calls give those before them."""
        return BoundLaunch(self, tensors)

    def launch(self, grid: tuple, arguments: tuple):
        """Launches through Triton's own lookup; returns the compiled variant.

        arguments: what varies, and the tensors.
        """
        return self.kernel[grid](*arguments, *self.arguments, **self.constants)

    def compile(self, variant: tuple, arguments: tuple) -> None:
        """Has a variant compiled; arguments: what varies, and the tensors."""
        if variant not in self.submitted and variant not in self.variants:
            self.submitted.add(variant)
            every = (*arguments, *self.arguments)
            self.kernel.warmup(*every, grid=self.grid, **self.constants)


class BoundLaunch:
    """A launch whose last tensors are the same in all calls."""

    def __init__(self, launch: Launch, tensors: tuple[torch.Tensor | None, ...]):
        self.launch = launch
        self.tensors = tensors
        self.addresses = [None if t is None else t.data_ptr() for t in tensors]
        self.bits = 0  # that any of the addresses has
        for address in self.addresses:
            self.bits |= address or 0
        self.tail = (*self.addresses, *launch.after_tensors)

    def __call__(
        self,
        *tensors: torch.Tensor | None,
        varying: tuple = (),
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Launches; arguments as those of `Launch.__call__`, without what is bound."""
        launch = self.launch
        programs = launch.grid if grid is None else (*grid, 1)
        if not launch.is_cacheable:
            launch.launch(programs, varying + tensors + self.tensors)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        bits = self.bits
        for address in addresses:
            if address is not None:
                bits |= address
        alignment = None  # all aligned
        if bits % POINTER_ALIGNMENT:
            every = addresses + self.addresses
            alignment = tuple((a or 0) % POINTER_ALIGNMENT == 0 for a in every)
        variant = (device, alignment)
        compiled = launch.variants.get(variant)
        if compiles_only:
            launch.compile(variant, varying + tensors + self.tensors)
        elif compiled is None:
            every_argument = varying + tensors + self.tensors
            launch.variants[variant] = launch.launch(programs, every_argument)
        elif is_profiled():
            stream = driver.get_current_stream(device)
            compiled[programs](*varying, *addresses, *self.tail, stream=stream)
        else:
            compiled.run(
                *programs,
                driver.get_current_stream(device),
                compiled.function,
                compiled.packed_metadata,
                *(None, None, None),  # what profilers hook in
                *varying,
                *addresses,
                *self.tail,
            )


def is_profiled() -> bool:
    """Whether a profiler wants to see launches: Triton's own way shows them."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)
