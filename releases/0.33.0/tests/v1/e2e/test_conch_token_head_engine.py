# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine with a scale for every token and head generates what TRITON_ATTN's does."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.v1.e2e.conch_engine import (
    SHAPE,
    engine,
    expected_tokens,
    generate,
    random_prompts,
    save,
)
from vllm.v1.attention.backends.conch_attn import ConchAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend


def test_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked prefills and decodes; the format is coarse enough to change a token."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    config = LlamaConfig(**SHAPE | {"head_dim": 32})
    model = save(LlamaForCausalLM, config, tmp_path)
    prompts = random_prompts(50, 3, 21, 40, shared=20)
    results = {}
    for backend in (ConchAttentionBackend, TritonAttentionBackend):
        with engine(
            str(tmp_path),
            backend=backend,
            kv_cache_dtype="int8_per_token_head",
            max_num_batched_tokens=32,
        ) as llm:
            results[backend.get_name()] = generate(llm, prompts, 12)
    assert results["CONCH"] == results["TRITON_ATTN"]
    exact = expected_tokens(model, prompts, 12)
    pairs = zip(sum(results["CONCH"], []), sum(exact, []))
    print("tokens unlike those without quantisation:", sum(a != b for a, b in pairs))
