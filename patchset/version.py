# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""CONCH's own version, from this repository's tags."""

import functools

from packaging.version import Version
from setuptools_scm import get_version

from patchset.releases import ROOT

# What a copy without git history calls itself, and the first version to be tagged.
FALLBACK = "0.1.dev0"


@functools.cache
def conch_version() -> str:
    """CONCH's version, such as `0.1.dev12+g1a2b3c4`."""
    return get_version(root=str(ROOT), fallback_version=FALLBACK)


def combined_version(base: Version) -> Version:
    """The version of a vLLM with CONCH: `0.33.0+conch0.1`.

    Args:
        base: the release's version.

    """
    return Version(f"{base.public}+conch{conch_version().replace('+', '.')}")
