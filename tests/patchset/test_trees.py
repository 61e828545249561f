# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Recognising trees and their versions."""

import subprocess
from pathlib import Path

import pytest

from patchset.errors import PatchError
from patchset.releases import get_release
from patchset.trees import find_tree

VERSION_FILE = "__version__ = version = '0.33.0'\n__version_tuple__ = (0, 33, 0)\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The least that looks like vLLM's sources."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    """Run git as somebody."""
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True)


def test_a_checkout_has_the_version_of_its_newest_tag(source):
    git(source, "init", "-q")
    git(source, "commit", "-q", "--allow-empty", "-m", "release")
    git(source, "tag", "v0.33.0")
    git(source, "tag", "proto-v9.9.9")
    assert str(find_tree(source).version) == "0.33.0"
    git(source, "commit", "-q", "--allow-empty", "-m", "on top")
    found = find_tree(source / "vllm")
    assert str(found.version) == "0.33.0"
    assert found.evidence.startswith("git describe: v0.33.0-1-g")


def test_an_sdist_has_the_version_of_its_metadata(source):
    (source / "PKG-INFO").write_text("Metadata-Version: 2.4\nVersion: 0.13.0\n\nText")
    assert str(find_tree(source).version) == "0.13.0"


def test_a_built_tree_has_the_version_of_its_version_file(source):
    (source / "vllm/_version.py").write_text(VERSION_FILE)
    assert str(find_tree(source).version) == "0.33.0"


def test_the_user_has_the_last_word(source):
    (source / "vllm/_version.py").write_text(VERSION_FILE)
    assert str(find_tree(source, "0.13.0").version) == "0.13.0"
    assert not find_tree(source, "0.13.0").contradiction


@pytest.mark.parametrize(
    ("stated", "contradiction"),
    [
        ("0.13.0", "vLLM 0.13.0 by its PKG-INFO"),
        ("0.33.0", ""),
        ("0.33.0+cu130", ""),
        ("0.1.dev1+gabc", ""),
        ("unknown", ""),
    ],
)
def test_a_release_in_the_metadata_contradicts_the_user(source, stated, contradiction):
    (source / "PKG-INFO").write_text(f"Version: {stated}\n")
    assert find_tree(source, "0.33.0").contradiction == contradiction


def test_an_unknown_version_is_an_error_that_says_what_to_do(source):
    with pytest.raises(PatchError, match="cannot tell vLLM's version.*--release"):
        find_tree(source)


def test_what_git_says_is_told_where_it_refuses(source, monkeypatch):
    git(source, "init", "-q")
    git(source, "commit", "-q", "--allow-empty", "-m", "release")
    git(source, "tag", "v0.33.0")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(PatchError, match="dubious ownership.*safe.directory.*--rel"):
        find_tree(source)


def test_a_folder_without_vllm_is_an_error(tmp_path):
    with pytest.raises(PatchError, match="holds no vLLM: give a checkout"):
        find_tree(tmp_path)


def test_an_installed_package_needs_its_metadata(source):
    (source / "pyproject.toml").unlink()
    with pytest.raises(PatchError, match="one vllm-\\*.dist-info.*found 0"):
        find_tree(source)


@pytest.mark.parametrize("version", ["0.33.0", "0.33.0+empty", "0.33.0+cu130"])
def test_a_local_part_does_not_matter(version):
    assert str(get_release(version).version) == "0.33.0"


@pytest.mark.parametrize("version", ["0.12.0", "0.33.1", "0.33.0rc1", "0.33.0.dev1"])
def test_other_versions_are_refused_with_the_supported_ones(version):
    with pytest.raises(PatchError, match="not supported; supported: 0.33.0.*0.13.0"):
        get_release(version)
