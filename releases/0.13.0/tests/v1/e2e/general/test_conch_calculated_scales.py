# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Scales of an fp8 cache that the engine calculates from the first batch it runs."""

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


def test_calculated_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is given what another one has calculated generates the same."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    save(LlamaForCausalLM, LlamaConfig(**SHAPE), tmp_path)
    prompts = random_prompts(30, 9)
    options = {"kv_cache_dtype": "fp8", "enable_prefix_caching": False}
    results, scales = [], {}
    for calculate in (True, False):
        with engine(str(tmp_path), calculate_kv_scales=calculate, **options) as llm:
            config = llm.llm_engine.vllm_config.compilation_config
            layers = config.static_forward_context
            for name, found in scales.items():
                for scale, value in found.items():
                    getattr(layers[name], scale).fill_(value)
            results.append(generate(llm, prompts, 6))
            scales = {
                name: {
                    scale: float(getattr(layer, scale))
                    for scale in ("_k_scale", "_v_scale")
                }
                for name, layer in layers.items()
                if hasattr(layer, "_k_scale")
            }
    assert len(scales) == SHAPE["num_hidden_layers"]
    assert all(value not in (0.0, 1.0) for s in scales.values() for value in s.values())
    assert results[0] == results[1]
