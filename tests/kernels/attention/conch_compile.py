# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compiles kernels for GPUs that need not be there and says what came out.

Triton compiles for any target without its hardware, but not while it interprets, and
it keeps what the first target of a process can convert for all later ones.  So
`compile_on_all` calls a function of a module in one process for each target.
"""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import regex as re

from vllm.triton_utils import triton

GPUTarget = triton.backends.compiler.GPUTarget
JITFunction = triton.runtime.JITFunction
CompiledKernel = triton.compiler.CompiledKernel

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm89": GPUTarget("cuda", 89, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}


class Resources(NamedTuple):
    """What one thread of a compiled kernel takes, and how it reaches memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    loads: dict[str, int]
    """Instructions that read global memory, for example {"LDG.E.128": 4}."""
    stores: dict[str, int]
    instructions: int
    products: dict[str, int]
    """Matrix instructions, for example {"HMMA": 64}."""
    launches: dict[str, int] = {}
    """CUDA: PREEXIT lets a dependent launch begin, ACQBULK awaits the one before."""


def compile_for(
    target: GPUTarget, kernel: JITFunction, *args, **kwargs
) -> CompiledKernel:
    """Compiles the variant that `kernel[grid](*args, **kwargs)` would launch there.

    Args:
        target: One of `TARGETS`.
        kernel: The kernel.
        *args: Its arguments; tensors on the CPU or the meta device will do.
        **kwargs: Constants and options such as num_warps.

    """
    backend = triton.compiler.make_backend(target)
    kwargs = {"debug": False, "instrumentation_mode": ""} | kwargs
    bind = triton.runtime.jit.create_function_from_signature(
        kernel.signature, kernel.params, backend
    )
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = source_class(kernel)(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def source_class(kernel: JITFunction) -> type:
    """What a kernel's text is to the compiler, by the language that it is in."""
    if not kernel.is_gluon():
        return triton.compiler.ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def resources(compiled: CompiledKernel) -> Resources:
    """Reads the resources off the machine code."""
    if "amdgcn" in compiled.asm:
        return amd_resources(compiled)
    return nvidia_resources(compiled)


def amd_resources(compiled: CompiledKernel) -> Resources:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    return Resources(
        field("vgpr_count"),
        max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count")),
        max(field("group_segment_fixed_size"), compiled.metadata.shared),
        dict(Counter(re.findall(r"\b(?:global|buffer)_load\w*", code))),
        dict(Counter(re.findall(r"\b(?:global|buffer)_store\w*", code))),
        len(re.findall(r"^\t[vs]_\w+", code, re.MULTILINE)),
        dict(Counter(re.findall(r"^\t(v_w?mf?ma)", code, re.MULTILINE))),
    )


def nvidia_resources(compiled: CompiledKernel) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack, shared, local = map(
        int,
        re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage).groups(),
    )
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code)
    return Resources(
        registers,
        stack + local,
        max(shared, compiled.metadata.shared),
        dict(Counter(n for n in names if n.startswith(("LDG", "UTMALDG")))),
        dict(Counter(n for n in names if n.startswith("STG"))),
        len(names),
        dict(Counter(re.findall(r"\b(\w*MMA)\b", " ".join(names)))),
        dict(Counter(n for n in names if n in ("PREEXIT", "ACQBULK"))),
    )


def compile_on_all(compile_one: Callable[[str], object]) -> dict[str, object]:
    """What compile_one(target name) returns for each of `TARGETS`.

    It must be a function of a module and return what JSON can carry.
    """
    function = [compile_one.__code__.co_filename, compile_one.__name__]
    command = [sys.executable, "-m", __name__, *function]
    # An empty list of devices keeps vLLM from replacing triton where there is no GPU.
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as cache:
        env["TRITON_CACHE_DIR"] = cache
        result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def main(path: str, function: str) -> None:
    """The other side of `compile_on_all`: imports once and forks for each target."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(2, maxtasksperchild=1) as pool:
        results = pool.map(getattr(module, function), TARGETS, chunksize=1)
    print(json.dumps(dict(zip(TARGETS, results))))


if __name__ == "__main__":
    main(*sys.argv[1:])
