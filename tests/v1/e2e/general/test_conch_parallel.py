# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Two workers generate with CONCH what one does, token by token.

Workers are processes that vLLM starts. On a machine without GPUs they speak through
gloo and interpret the kernels; with GPUs each has one, so that two are needed.

    pytest tests/v1/e2e/general/test_conch_parallel.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.v1.e2e.general.conch_engine import (
    ON_GPU,
    SHAPE,
    VOCABULARY,
    engine,
    expected_tokens,
    generate,
    random_prompts,
    save,
)
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import EngineArgs

if ON_GPU and torch.accelerator.device_count() < 2:
    pytest.skip("needs two GPUs, or none", allow_module_level=True)

TWO_RANKS = {"tensor_parallel_size": 2}
# Ranks share keys where there are fewer KV heads than ranks.
SHARED_KEYS = TWO_RANKS | {"decode_context_parallel_size": 2}
HAS_ALL_TO_ALL = hasattr(ParallelConfig, "dcp_comm_backend")
# An error where Triton compiles what no warm-up has.
MONITOR = {"jit_monitor_mode": "error"}
if "jit_monitor_mode" not in EngineArgs.__dataclass_fields__:  # not in this release
    MONITOR = {}


@pytest.fixture(autouse=True)
def new_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of their own: a fork of this process, which has looked at the GPUs, could
    not use them."""
    if ON_GPU:
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # For the function that asks the workers for their layers.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


def check(folder: Path, num_kv_heads: int, **options: Any) -> None:
    """Long prompts in chunks, beside decodes, and again with a cached beginning."""
    config = LlamaConfig(**SHAPE | {"num_key_value_heads": num_kv_heads})
    model = save(LlamaForCausalLM, config, folder)
    prompts = random_prompts(9, 3, shared=34)
    expected = expected_tokens(model, prompts, 4)
    with engine(str(folder), max_num_batched_tokens=32, **options) as llm:
        assert generate(llm, prompts, 4) == expected
        assert generate(llm, prompts[:1], 4) == expected[:1]


@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_tensor_parallelism(num_kv_heads: int, tmp_path: Path) -> None:
    check(tmp_path, num_kv_heads, **TWO_RANKS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"cp_kv_cache_interleave_size": 16, "dcp_comm_backend": "a2a"},
            marks=pytest.mark.skipif(
                not HAS_ALL_TO_ALL, reason="this release has one way of exchange"
            ),
        ),
    ],
    ids=str,
)
def test_decode_context_parallelism(options: dict[str, Any], tmp_path: Path) -> None:
    check(tmp_path, 1, **SHARED_KEYS | options)


# The attention of an 8B Llama, in few layers: fp32, so that tokens can be compared.
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "initializer_range": 0.05,
}


@pytest.mark.skipif(not ON_GPU, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("num_kv_heads", "ranks"),
    [(8, TWO_RANKS), (1, SHARED_KEYS)],
    ids=["tensor", "decode context"],
)
def test_attention_of_an_8b_model(
    num_kv_heads: int, ranks: dict[str, int], tmp_path: Path
) -> None:
    """With CUDA graphs, after long prompts; nothing is compiled while serving."""
    shape = SHAPE | LARGE | {"num_key_value_heads": num_kv_heads}
    model = save(LlamaForCausalLM, LlamaConfig(**shape), tmp_path)
    del model
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        for length in (3000, 17, 1200, 600)
    ]
    sizes = dict(
        max_model_len=4096,
        max_num_batched_tokens=2048,
        num_gpu_blocks_override=1024,
        gpu_memory_utilization=0.6,
    )
    layers = LARGE["num_hidden_layers"]
    with engine(str(tmp_path), layers, **sizes) as llm:
        expected = generate(llm, prompts, 32)
    options = sizes | ranks | MONITOR | {"enforce_eager": False}
    with engine(str(tmp_path), layers, **options) as llm:
        assert generate(llm, prompts, 32) == expected
