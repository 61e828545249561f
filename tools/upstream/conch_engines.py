# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's LLM for upstream's tests: models of random weights, in this process.

Goes into the folder that tools/upstream_tests.py makes. Calls of CONCH are counted in
the process that runs the tests.
"""

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import vllm  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

WEIGHTS = "model.safetensors"
engines: list[vllm.LLM] = []  # the one that was made last


def make_weights(folder: Path) -> None:
    """Makes random weights where there is only a config.json."""
    if (folder / WEIGHTS).exists():
        return
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with tempfile.TemporaryDirectory(dir=folder) as part:
        model.float().save_pretrained(part)
        os.replace(Path(part, WEIGHTS), folder / WEIGHTS)


def LLM(model: str, **options: Any) -> vllm.LLM:
    """An engine; the one before it makes room."""
    make_weights(Path(model))
    while engines:
        engines.pop().llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()
    if not torch.cuda.is_available():
        # vLLM chooses cuBLASLt, which a torch without CUDA does not have.
        torch.backends.cuda.preferred_blas_library = lambda backend=None: None
        options |= {
            "dtype": "float32",  # the interpreter's bfloat16 is unsound
            "enforce_eager": True,
            "block_size": 16,
            "num_gpu_blocks_override": 1024,
            "max_num_batched_tokens": 512,
        }
    engines.append(vllm.LLM(model, **options))
    return engines[-1]
