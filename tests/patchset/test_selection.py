# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Selecting CONCH in the real, patched vLLM, on CUDA and ROCm simulated.

vLLM's own dependencies are needed: the tests of a release run where that release is
installed, or with the Python that CONCH_PYTHON_0_33_0 (and so on) names.
"""

import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.version import Version

from patchset.apply import plan_apply
from patchset.releases import Release, get_release
from patchset.trees import find_tree

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "torch_dtype": "float32",
}
VARIABLE = "VLLM_ATTENTION_BACKEND"
CASES = [
    # name, environment, arguments
    ("nothing", {}, {}),
    ("flag", {}, {"attention_backend": "CONCH"}),
    ("variable", {VARIABLE: "CONCH"}, {}),
    ("unknown variable", {VARIABLE: "CONCHE"}, {}),
    ("unknown flag", {}, {"attention_backend": "CONCHE"}),
    ("both", {VARIABLE: "CONCH"}, {"attention_backend": "FLEX_ATTENTION"}),
    ("both, flag auto", {VARIABLE: "CONCH"}, {"attention_backend": "auto"}),
    (
        "variable and config",
        {VARIABLE: "CONCH"},
        {"attention_config": {"backend": "FLEX_ATTENTION"}},
    ),
    ("variable in small letters", {VARIABLE: "conch"}, {}),
    ("variable auto", {VARIABLE: "auto"}, {}),
]
CONCH = "vllm.v1.attention.backends.conch_attn.ConchAttentionBackend"


def python_with(release: Release) -> str | None:
    """A Python that has what this vLLM release imports."""
    name = f"CONCH_PYTHON_{str(release.version).replace('.', '_')}"
    if python := os.environ.get(name):
        return python
    try:
        installed = Version(importlib.metadata.version("vllm"))
    except importlib.metadata.PackageNotFoundError:
        return None
    return sys.executable if installed.public == str(release.version) else None


@pytest.fixture(scope="module")
def probe(
    pristine: Callable[[Release], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict]:
    """What the probe says inside a patched release; one run for each release."""

    @functools.cache
    def run(version: str) -> subprocess.CompletedProcess[str] | None:
        release = get_release(version)
        python = python_with(release)
        if python is None:
            return None
        folder = tmp_path_factory.mktemp("selection")
        tree, model = folder / "tree", folder / "model"
        shutil.copytree(pristine(release) / "vllm", tree / "vllm")
        for name in ("PKG-INFO", "pyproject.toml"):
            shutil.copy(pristine(release) / name, tree)
        plan_apply(find_tree(tree), release).execute()
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODEL))
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("VLLM_")},
            "PYTHONPATH": str(tree),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        script = Path(__file__).with_name("probe_selection.py")
        return subprocess.run(
            [python, script, model, json.dumps(CASES)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def answer(version: str) -> dict:
        result = run(version)
        if result is None:
            pytest.skip(f"vLLM {version}'s dependencies are not installed here")
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return answer


def test_conch_is_a_member_of_its_own(probe, release):
    found = probe(str(release.version))
    assert found["path"] == CONCH
    assert found["members"].count("CONCH") == 1


def test_the_flag_and_the_variable_select_conch(probe, release):
    found = probe(str(release.version))["configured"]
    assert found["nothing"] == "automatic"
    assert found["flag"] == "CONCH"
    assert found["variable"] == "CONCH"


@pytest.mark.parametrize("by", ["variable", "flag"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(probe, release, by):
    found = probe(str(release.version))
    message = found["configured"][f"unknown {by}"]
    assert "Error" in message.split(":")[0]
    assert "CONCHE" in message
    assert (VARIABLE in message) == (by == "variable")
    for name in found["members"]:
        assert name in message


def test_an_explicit_choice_wins_over_the_variable(probe):
    found = probe("0.33.0")["configured"]
    assert found["both"] == "FLEX_ATTENTION"
    assert found["both, flag auto"] == "automatic"
    assert found["variable and config"] == "FLEX_ATTENTION"
    assert found["variable in small letters"] == "CONCH"
    assert found["variable auto"] == "automatic"


def test_0_13_refuses_a_flag_beside_the_variable(probe):
    """Upstream's own rule there; on 0.33.0, without one, the flag wins."""
    assert "mutually exclusive" in probe("0.13.0")["configured"]["both"]


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_a_platform_gives_conch_or_every_reason_against_it(probe, release, platform):
    found = probe(str(release.version))[platform]
    assert found["usual"] == found["odd page"] == CONCH
    message = found["two reasons against it"]
    assert message.startswith("ValueError: Selected backend AttentionBackendEnum.CONCH")
    assert "head_size" in message
    assert "kv_cache_dtype fp8_inc" in message
