# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs inside a patched vLLM and says, as JSON, which attention backend it selects.

    python probe_selection.py MODEL CASES

CASES is a JSON list of [name, environment, arguments of EngineArgs].
"""

import importlib
import importlib.util
import json
import os
import sys
import types

import torch

import vllm.platforms as platforms
from vllm.platforms.interface import DeviceCapability

NEW_LAYOUT = importlib.util.find_spec("vllm.attention") is None
BASE = "vllm.v1.attention" if NEW_LAYOUT else "vllm.attention"
Backend = importlib.import_module(f"{BASE}.backends.registry").AttentionBackendEnum
SelectorConfig = importlib.import_module(f"{BASE}.selector").AttentionSelectorConfig

# A layer that CONCH takes, and changes to it.
LAYER = {
    "head_size": 128,
    "dtype": torch.float16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
}
LAYERS = {
    "usual": {},
    "odd page": {"block_size": 528},
    "two reasons against it": {"head_size": 8, "kv_cache_dtype": "fp8_inc"},
}


def outcome(function) -> str:
    """What a function returns, or the error it raises."""
    try:
        return str(function())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def configured(model: str, environment: dict, arguments: dict) -> str:
    """The backend that the engine's configuration ends up with."""
    from vllm.engine.arg_utils import EngineArgs

    os.environ.update(environment)
    try:
        engine = EngineArgs(
            model=model, skip_tokenizer_init=True, dtype="float32", **arguments
        )
        if NEW_LAYOUT:  # strict mode: no variable that vLLM does not know
            platforms.current_platform.validate_environ(hard_fail=True)
        backend = engine.create_engine_config().attention_config.backend
        return backend.name if backend else "automatic"
    finally:
        for name in environment:
            del os.environ[name]


def selected(platform) -> dict[str, str]:
    """What a platform makes of an explicit choice of CONCH."""
    platforms._current_platform = platform
    return {
        name: outcome(
            lambda changes=changes: platform.get_attn_backend_cls(
                Backend.CONCH, attn_selector_config=SelectorConfig(**LAYER | changes)
            )
        )
        for name, changes in LAYERS.items()
    }


def simulated_cuda():
    """An H200, for a process that has none."""
    for name in ("_C", "_C_stable_libtorch"):  # the compiled parts, not used here
        sys.modules.setdefault(f"vllm.{name}", types.ModuleType(name))
    from vllm.platforms.cuda import CudaPlatform

    capability = DeviceCapability(9, 0)
    CudaPlatform.get_device_capability = classmethod(lambda *_, **__: capability)
    return CudaPlatform()


def simulated_rocm():
    """An MI300X, for a process that has none."""
    properties = types.SimpleNamespace(
        gcnArchName="gfx942:sramecc+:xnack-",
        name="AMD Instinct MI300X",
        multi_processor_count=304,
        major=9,
        minor=4,
    )
    torch.cuda.get_device_properties = lambda device=0: properties
    from vllm.platforms.rocm import RocmPlatform

    capability = DeviceCapability(9, 4)
    RocmPlatform.get_device_capability = classmethod(lambda *_, **__: capability)
    return RocmPlatform()


def main() -> None:
    from vllm.platforms.cpu import CpuPlatform

    model, cases = sys.argv[1], json.loads(sys.argv[2])
    platforms._current_platform = CpuPlatform()
    result = {
        "path": Backend.CONCH.get_path(),
        "members": list(Backend.__members__),
        "configured": {
            name: outcome(lambda e=env, a=arguments: configured(model, e, a))
            for name, env, arguments in cases
        },
        "cuda": selected(simulated_cuda()),
    }
    # They select another backend where nobody chose one.
    for name in ("", "_MHA", "_UNIFIED_ATTENTION"):
        os.environ[f"VLLM_ROCM_USE_AITER{name}"] = "1"
    result["rocm"] = selected(simulated_rocm())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
