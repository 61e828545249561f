# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CONCH is chosen by the environment and by the configuration, on CUDA and on ROCm.

Neither platform has to be there: their classes are put in the current platform's
place, as far as choosing a backend goes.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.v1.attention.conch_release import AttentionBackendEnum, get_attn_backend
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends import conch_attn
from vllm.v1.attention.backends.conch_attn import ConchAttentionBackend

# Compiled extensions that the platform modules import, unused here.
EXTENSIONS = ("vllm._C", "vllm._C_stable_libtorch", "vllm._rocm_C")
PLATFORMS = {
    "cuda": ("CudaPlatform", DeviceCapability(9, 0)),
    "rocm": ("RocmPlatform", DeviceCapability(9, 4)),
}

# Ways to ask for a backend: environment and engine arguments.
WAYS = {
    "environment": ({"VLLM_ATTENTION_BACKEND": "CONCH"}, {}),
    "--attention-backend": ({}, {"attention_backend": "CONCH"}),
    "--attention-config": ({}, {"attention_config": {"backend": "CONCH"}}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose configuration an engine can be made for."""
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def configure(model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VllmConfig]:
    """Makes the configuration as an engine does, under an environment."""

    def create(environment: dict[str, str], arguments: dict[str, Any]) -> VllmConfig:
        monkeypatch.delenv("VLLM_ATTENTION_BACKEND", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        engine_args = EngineArgs(
            model=model, skip_tokenizer_init=True, dtype="float32", **arguments
        )
        return engine_args.create_engine_config()

    return create


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a platform in the current one's place, once the configuration is made."""

    def put(name: str) -> None:
        class_name, capability = PLATFORMS[name]
        for extension in EXTENSIONS:
            try:
                importlib.import_module(extension)
            except ImportError:
                monkeypatch.setitem(sys.modules, extension, ModuleType(extension))
        # vLLM's ROCm module asks for the architecture when it is imported.
        properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
        with monkeypatch.context() as importing:
            importing.setattr(
                torch.cuda, "get_device_properties", lambda device: properties
            )
            module = importlib.import_module(f"vllm.platforms.{name}")
        cls = getattr(module, class_name)
        monkeypatch.setattr(
            cls,
            "get_device_capability",
            classmethod(lambda cls, device_id=0: capability),
        )
        for user in ("vllm.platforms", conch_attn.__name__):
            monkeypatch.setattr(f"{user}.current_platform", cls())

    return put


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("way", WAYS)
def test_selected(
    way: str, platform: str, configure: Callable, simulate: Callable
) -> None:
    config = configure(*WAYS[way])
    assert config.attention_config.backend is AttentionBackendEnum.CONCH
    simulate(platform)
    with set_current_vllm_config(config):
        assert get_attn_backend(64, torch.float16) is ConchAttentionBackend


def test_environment_of_aiter_does_not_win(
    configure: Callable, simulate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(*WAYS["environment"])
    simulate("rocm")
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "1")
    monkeypatch.setenv("VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION", "1")
    with set_current_vllm_config(config):
        assert get_attn_backend(64, torch.float16) is ConchAttentionBackend


@pytest.mark.parametrize("platform", PLATFORMS)
def test_refused_with_every_reason(
    platform: str, configure: Callable, simulate: Callable
) -> None:
    config = configure(*WAYS["environment"])
    simulate(platform)
    with set_current_vllm_config(config), pytest.raises(ValueError) as error:
        get_attn_backend(8, torch.float64, kv_cache_dtype="fp8_inc")
    for reason in (
        "head_size 8 not supported: it must be from 16 to 512",
        "dtype torch.float64 not supported",
        "kv_cache_dtype fp8_inc not supported",
    ):
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({"VLLM_ATTENTION_BACKEND": "CONK"}, {}),
        ({}, {"attention_backend": "CONK"}),
    ],
)
def test_unknown_name_lists_the_known_ones(
    environment: dict[str, str], arguments: dict[str, Any], configure: Callable
) -> None:
    with pytest.raises(ValueError) as error:
        configure(environment, arguments)
    for name in ("CONK", "CONCH", "FLASH_ATTN", "TRITON_ATTN"):
        assert name in str(error.value)


def test_name_is_a_member_of_the_registry() -> None:
    member = AttentionBackendEnum[ConchAttentionBackend.get_name()]
    assert member is AttentionBackendEnum.CONCH
    assert member.get_class() is ConchAttentionBackend
    assert list(AttentionBackendEnum).count(member) == 1
    path = member.get_path()
    assert [each for each in AttentionBackendEnum if each.value == path] == [member]
