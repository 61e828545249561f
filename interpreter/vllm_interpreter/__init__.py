# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's engine on a CPU with any Triton attention backend, in Triton's interpreter.

For tests and demonstrations: the whole engine, scheduler, paged KV cache and sampler
are vLLM's own and the attention kernels are the ones that run on a GPU, executed by
NumPy, some thousand times slower. Small models answer in seconds.

    pip install ./interpreter            beside a vLLM built for the "empty" device
    TRITON_INTERPRET=1 python ...

    llm = vllm.LLM(model, attention_backend="CONCH", dtype="float32",
                   enforce_eager=True, max_model_len=256)

With tensor_parallel_size=2 vLLM starts a worker process for each rank, and they speak
through gloo.

The plugin stays out of the way unless TRITON_INTERPRET=1. Use float32 or float16: the
interpreter's bfloat16 is not reliable. Triton reads the variable when kernels are
defined, so set it before vLLM is imported.
"""

import os

# What vLLM's CPU worker and Triton need to hear; what the user says goes first.
DEFAULTS = {
    # Otherwise vLLM replaces a Triton that has no active driver by a placeholder.
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # One process: kernels and breakpoints are where the caller is.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def register() -> str | None:
    """Entry point of group vllm.platform_plugins: the platform's class path."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from vllm_interpreter import faster  # imports Triton, which reads the variables

    faster.install()
    return "vllm_interpreter.platform.InterpreterPlatform"
