# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The patch set itself: its version, and its sdist.

`pip install .` does not come through here: it installs a vLLM with CONCH, made by
`patchset/build.py`.
"""

from setuptools import setup

setup(
    name="conch-vllm",
    description="The CONCH attention backend, as a patch set on vLLM",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["patchset"],
    use_scm_version={"fallback_version": "0.1.dev0"},
)
