# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs Gluon kernels for Hopper on a CPU, for tests: Triton interprets none.

A kernel's functions are plain Python, which `interpreter` runs with other globals:
`language` stands in for Gluon, on `values` and `memory` of torch's, and `program` for
the hardware's asynchrony. It finds wrong results, deadlocks, barriers with too many
arrivals, memory that is read before it is filled or filled before it is read, missing
fences, overflow of integers and accesses outside tensors. It knows nothing of layouts,
registers or threads, which the compiler checks, nor of the precision of the tensor
cores, and has only what our kernels use.
"""

from .interpreter import run_kernel
from .values import dtype_of

__all__ = ["dtype_of", "run_kernel"]
