# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The PEP 517 backend: `pip install .` installs a vLLM with CONCH.

It makes the wheel that `python -m patchset wheel` makes. VLLM_BASE picks the release,
the newest by default; VLLM_TARGET_DEVICE picks `cuda` or `empty`, by default what the
machine has.
"""

import os
from pathlib import Path
from typing import Any

from setuptools.build_meta import build_sdist as build_sdist
from setuptools.build_meta import get_requires_for_build_sdist as _sdist_requires

from patchset.errors import PatchError
from patchset.releases import Release, get_release


def _release() -> Release:
    return get_release(os.environ.get("VLLM_BASE") or None)


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """Nothing beyond setuptools."""
    return _sdist_requires(config_settings)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What pyproject.toml names is enough."""
    del config_settings
    return []


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None
) -> str:
    """Make the wheel of the chosen release for this machine.

    Args:
        wheel_directory: folder for the wheel.
        config_settings: unused.
        metadata_directory: unused.

    Returns:
        The wheel's file name.

    """
    del config_settings, metadata_directory
    from patchset.wheels import build_wheel, detect_target

    try:
        return build_wheel(
            _release(), Path(wheel_directory), target=detect_target()
        ).name
    except (PatchError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
