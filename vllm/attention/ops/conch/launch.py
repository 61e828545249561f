# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Launching the same kernel again without asking which variant it is.

At every launch Triton looks at every argument to find the compiled variant, which takes
longer than the launch itself.  A function that has already reduced its arguments to a
cached plan knows the variant: only the addresses are new.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from vllm.triton_utils import triton

# Triton compiles another variant where an address is not a multiple of this.
POINTER_ALIGNMENT = 16
# Of these the launcher in C is known, which takes encoded descriptors; before others,
# and these where they need scratch memory, stands Triton's own in Python.
DIRECT_VERSIONS = ("3.6.",)

# What the functions of torch.cuda call, which take four times as long.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", None) or (
    lambda: triton.runtime.driver.active.get_current_device()
)
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", None
) or (lambda device: triton.runtime.driver.active.get_current_stream(device))


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


class Described:
    """Descriptors of a launch, or None in the place of any; encoded once.

    Triton would encode them at every launch, which takes 2 us for each.
    """

    def __init__(self, *descriptors: Any) -> None:
        self.descriptors = descriptors
        self.encoded: dict[Variant, tuple] = {}


NOTHING = Described()


class Variant:
    """A compiled variant, and how it is launched without detours.

    `run` takes the grid, the stream, what is in `head`, and the kernel's arguments.
    """

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.run = run = compiled.run
        profilers = (None, None, None)  # what they hook in
        self.head: tuple = (compiled.function, compiled.packed_metadata, *profilers)
        self.layouts: list | None = None  # of descriptors; None: Triton encodes them
        if (
            not triton.__version__.startswith(DIRECT_VERSIONS)
            or type(run).__name__ != "CudaLauncher"
            or run.global_scratch_size
            or run.profile_scratch_size
        ):
            return
        launch, layouts = run.launch, []
        if hasattr(launch, "__closure__"):  # encodes, then calls that in C
            names, cells = launch.__code__.co_freevars, launch.__closure__
            closure = dict(zip(names, (cell.cell_contents for cell in cells)))
            if not closure.keys() >= {"launcher", "tensordesc_meta"}:
                return
            launch, layouts = closure["launcher"], closure["tensordesc_meta"]
        self.run, self.layouts = launch, layouts
        self.head = (
            compiled.function,
            run.launch_cooperative_grid,
            run.launch_pdl,
            *(None, None),  # scratch memory
            compiled.packed_metadata,
            *profilers,
        )

    def encode(self, described: Described, first: int) -> tuple:
        """The arguments that descriptors become.

        Args:
            described: the descriptors.
            first: number of descriptors before them.

        """
        known = described.encoded.get(self)
        if known is not None:
            return known
        arguments: tuple
        if self.layouts is None:
            arguments = described.descriptors
        else:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            expanded: list = []
            for descriptor in described.descriptors:
                if descriptor is None:
                    expanded.append(None)
                else:
                    layout = self.layouts[first]
                    expanded += make_tensordesc_arg(descriptor, layout)
                    first += 1
            arguments = tuple(expanded)
        described.encoded[self] = arguments
        return arguments


def dependent_options(overlaps: bool) -> dict[str, bool]:
    """Constant and option of a launch that may begin before the one before it ends.

    What its kernel reads must be complete when the one before begins, but for what it
    reads behind PTX's griddepcontrol.wait. All of its programs must wait so before they
    end, as what follows waits for this kernel alone. Only for CUDA, from Hopper on.
    """
    if not overlaps:
        return dict(OVERLAPS=False)
    return dict(OVERLAPS=True, launch_pdl=True)


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
                what varies, descriptors, tensors, then `arguments`, then constants.
            grid: Number of programs along up to three axes.
            arguments: Integers, floats and tuples of them.
            constants: Every constexpr parameter, and options such as num_warps.

        """
        self.kernel = kernel
        self.grid = grid + (1,) * (3 - len(grid))
        self.arguments = arguments
        self.constants = constants
        self.variants: dict[tuple, Variant] = {}
        self.submitted: set[tuple] = set()  # variants that `compile_together` compiles
        is_compiled = isinstance(kernel, triton.JITFunction)
        self.is_cacheable = is_compiled and torch.version.cuda is not None
        self.after_tensors = arguments + tuple(
            constants[name] for name in kernel.arg_names if name in constants
        )

    def __call__(
        self,
        *tensors: torch.Tensor | None,
        varying: tuple[int, ...] = (),
        described: Described = NOTHING,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Launches.

        Args:
            *tensors: of the kernel.
            varying: integers for which no variant is made.
            described: descriptors, each with the same dtype and box in all calls of one
                object.
            grid: replaces that of the constructor.

        """
        self.bind()(*tensors, varying=varying, described=described, grid=grid)

    def bind(
        self, *tensors: torch.Tensor | None, described: Described = NOTHING
    ) -> "BoundLaunch":
        """The launch with its last descriptors and tensors given.

        Calls give those before them.
        """
        return BoundLaunch(self, tensors, described)

    def launch(self, grid: tuple, arguments: tuple):
        """Launches through Triton's own lookup; returns the compiled variant.

        arguments: what varies, the descriptors and the tensors.
        """
        return self.kernel[grid](*arguments, *self.arguments, **self.constants)

    def compile(self, variant: tuple, arguments: tuple) -> None:
        """Has a variant compiled; arguments: as for `launch`."""
        if variant not in self.submitted and variant not in self.variants:
            self.submitted.add(variant)
            every = (*arguments, *self.arguments)
            self.kernel.warmup(*every, grid=self.grid, **self.constants)


class BoundLaunch:
    """A launch whose last descriptors and tensors are the same in all calls."""

    def __init__(
        self,
        launch: Launch,
        tensors: tuple[torch.Tensor | None, ...],
        described: Described,
    ) -> None:
        self.launch = launch
        self.tensors = tensors
        self.described = described
        self.addresses = [None if t is None else t.data_ptr() for t in tensors]
        self.bits = 0  # that any of the addresses has
        for address in self.addresses:
            self.bits |= address or 0
        self.tail = (*self.addresses, *launch.after_tensors)
        # What launches where all addresses are aligned, by device.
        self.ready: dict[int, tuple[Variant, Callable, tuple, tuple]] = {}

    def __call__(
        self,
        *tensors: torch.Tensor | None,
        varying: tuple = (),
        described: Described = NOTHING,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Launches; arguments as those of `Launch.__call__`, without what is bound."""
        bits = self.bits
        addresses: list[int | None] = []
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
            else:
                address = tensor.data_ptr()
                bits |= address
                addresses.append(address)
        if self.ready and not (bits % POINTER_ALIGNMENT or compiles_only):
            device = current_device()
            ready = self.ready.get(device)
            if ready is not None and not is_profiled():
                variant, run, head, pages = ready
                if described is not NOTHING:
                    queries = described.encoded.get(variant)
                    varying += queries or variant.encode(described, 0)
                run(
                    *(self.launch.grid if grid is None else (*grid, 1)),
                    current_stream(device),
                    *head,
                    *varying,
                    *pages,
                    *addresses,
                    *self.tail,
                )
                return
        self.look_up(tensors, addresses, varying, described, grid)

    def alignment(self, addresses: list[int | None]) -> tuple[bool, ...] | None:
        """Whether each address of a call, and each that is bound, is aligned.

        None: all are.
        """
        every = [(a or 0) % POINTER_ALIGNMENT == 0 for a in addresses + self.addresses]
        return None if all(every) else tuple(every)

    def look_up(
        self,
        tensors: tuple[torch.Tensor | None, ...],
        addresses: list[int | None],
        varying: tuple[int, ...],
        described: Described,
        grid: tuple[int, int] | None,
    ) -> None:
        """Launches what is new to this object, not aligned, or seen by profilers.

        Args:
            tensors: as for a call, like those after the next.
            addresses: of the tensors.
            varying: likewise.
            described: likewise.
            grid: likewise.

        """
        launch = self.launch
        programs = launch.grid if grid is None else (*grid, 1)
        descriptors = described.descriptors + self.described.descriptors
        every_argument = (*varying, *descriptors, *tensors, *self.tensors)
        if not launch.is_cacheable:
            launch.launch(programs, every_argument)
            return
        device = current_device()
        key = (device, self.alignment(addresses))
        variant = launch.variants.get(key)
        if compiles_only:
            launch.compile(key, every_argument)
            return
        if variant is None:
            variant = Variant(launch.launch(programs, every_argument))
            launch.variants[key] = variant
            return
        stream = current_stream(device)
        if is_profiled():
            arguments = (*varying, *descriptors, *addresses, *self.tail)
            variant.compiled[programs](*arguments, stream=stream)
            return
        queries = variant.encode(described, 0)
        pages = variant.encode(self.described, len(described.descriptors))
        arguments = (*varying, *queries, *pages, *addresses, *self.tail)
        variant.run(*programs, stream, *variant.head, *arguments)
        if key[1] is None:
            self.ready[device] = variant, variant.run, variant.head, pages


def is_profiled() -> bool:
    """Whether a profiler wants to see launches: Triton's own way shows them."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)
