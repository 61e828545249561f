# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Turns a vLLM release into a vLLM with CONCH.

The repository holds only what CONCH adds. This package puts it into a tree that the
user has or that it downloads, and takes it out again. `python -m patchset --help`.

    releases    which vLLM releases are supported, and the data of each
    edits       syntax-tree edits on upstream's files
    relocation  overlay files rewritten for a release's module paths
    overlay     everything one release needs, computed in memory
    trees       what the user pointed at: checkout, sdist or installed package
    apply       writing an overlay into a tree, and taking it out again
    index       sdists and wheels from the package index, checked against their hashes
    wheels      the official wheel with CONCH in it, or a pure-Python one
    export      the same change as a series of mail patches
    build       the PEP 517 backend behind `pip install .`
"""

from patchset.errors import PatchError

__all__ = ["PatchError"]
