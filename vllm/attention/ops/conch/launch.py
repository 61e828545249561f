# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Launching the same kernel again without asking which variant it is.

At every launch Triton looks at every argument to find the compiled variant, which takes
longer than the launch itself.  A function that has already reduced its arguments to a
cached plan knows the variant: only the addresses are new.
"""

from typing import Any

import torch

from vllm.triton_utils import triton

# Triton compiles another variant where an address is not a multiple of this.
POINTER_ALIGNMENT = 16


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
                tensors, then `arguments`, then constants.
            grid: Number of programs along up to three axes.
            arguments: Integers, floats and tuples of them.
            constants: Every constexpr parameter, and options such as num_warps.
        """
        self.kernel = kernel
        self.grid = grid + (1,) * (3 - len(grid))
        self.arguments = arguments
        self.constants = constants
        self.variants: dict[tuple, Any] = {}
        is_compiled = isinstance(kernel, triton.JITFunction)
        self.is_cacheable = is_compiled and torch.version.cuda is not None
        self.after_tensors = arguments + tuple(
            constants[name] for name in kernel.arg_names if name in constants
        )

    def __call__(
        self, *tensors: torch.Tensor | None, grid: tuple[int, int] | None = None
    ) -> None:
        """Launches; grid replaces that of the constructor."""
        programs = self.grid if grid is None else (*grid, 1)
        if not self.is_cacheable:
            self.launch(programs, tensors)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        bits = 0
        for address in addresses:
            bits |= address or 0
        alignment = None  # all aligned
        if bits % POINTER_ALIGNMENT:
            alignment = tuple((a or 0) % POINTER_ALIGNMENT == 0 for a in addresses)
        compiled = self.variants.get((device, alignment))
        if compiled is None:
            self.variants[device, alignment] = self.launch(programs, tensors)
        else:
            stream = driver.get_current_stream(device)
            compiled[programs](*addresses, *self.after_tensors, stream=stream)

    def launch(self, grid: tuple, tensors: tuple[torch.Tensor | None, ...]):
        """Launches through Triton's own lookup; returns the compiled variant."""
        return self.kernel[grid](*tensors, *self.arguments, **self.constants)
