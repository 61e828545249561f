# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tests of kernels run in the faster interpreter, with vLLM's engine and without."""

import os


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from vllm_interpreter import faster  # imports Triton

        faster.install()
