# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine with a scale for every token and head generates what TRITON_ATTN's does."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.v1.e2e.general.conch_engine import (
    SHAPE,
    engine,
    generate,
    random_prompts,
    save,
)
from vllm.v1.attention.backends.conch_attn import ConchAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend


def test_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked prefills and decodes, few: TRITON_ATTN is slow to interpret."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    config = LlamaConfig(**SHAPE | {"head_dim": 32})
    save(LlamaForCausalLM, config, tmp_path)
    prompts = random_prompts(18, 3, shared=8)
    results = {}
    for backend in (ConchAttentionBackend, TritonAttentionBackend):
        with engine(
            str(tmp_path),
            backend=backend,
            kv_cache_dtype="int8_per_token_head",
            max_num_batched_tokens=16,
        ) as llm:
            results[backend.get_name()] = generate(llm, prompts, 5)
    assert results["CONCH"] == results["TRITON_ATTN"]
