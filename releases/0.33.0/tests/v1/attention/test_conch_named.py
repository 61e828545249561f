# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models of this release that choose among attention backends by name."""

from types import SimpleNamespace

import pytest

from vllm.config import AttentionConfig, VllmConfig
from vllm.model_executor.models.config import UnlimitedOCRForCausalLMConfig
from vllm.model_executor.models.mimo_v2 import MiMoV2Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def unlimited_ocr(backend: AttentionBackendEnum) -> AttentionBackendEnum:
    """The backend with which the model with R-SWA starts."""
    config = VllmConfig(attention_config=AttentionConfig(backend=backend))
    config.model_config = SimpleNamespace()
    UnlimitedOCRForCausalLMConfig.verify_and_update_config(config)
    return config.attention_config.backend


def test_unlimited_ocr_runs_on_conch() -> None:
    conch = AttentionBackendEnum.CONCH
    assert unlimited_ocr(conch) == conch


def test_unlimited_ocr_refuses_others_and_names_conch() -> None:
    with pytest.raises(ValueError, match="or CONCH"):
        unlimited_ocr(AttentionBackendEnum.FLASHINFER)


def test_mimo_v2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys and values have two sizes, and it would choose another backend."""
    module = "vllm.model_executor.models.mimo_v2."
    config = VllmConfig(
        attention_config=AttentionConfig(backend=AttentionBackendEnum.CONCH)
    )
    monkeypatch.setattr(module + "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(module + "get_tensor_model_parallel_world_size", lambda: 1)
    for name in ("QKVParallelLinear", "RowParallelLinear", "get_rope"):
        monkeypatch.setattr(module + name, lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="head size 32 with values of 16"):
        MiMoV2Attention(64, 4, 2, 32, v_head_dim=16)
