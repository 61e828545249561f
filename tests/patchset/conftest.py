# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Real vLLM sources to work on: each release's sdist, downloaded once to the cache."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from patchset.index import unpack_sdist
from patchset.releases import Release, supported

Snapshot = dict[str, tuple[str, int]]


@pytest.fixture(params=supported(), ids=lambda release: str(release.version))
def release(request: pytest.FixtureRequest) -> Release:
    """Each supported release in turn."""
    return request.param


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Release], Path]:
    """The unpacked sdist of a release; not to be changed."""
    folders: dict[str, Path] = {}

    def get(release: Release) -> Path:
        name = str(release.version)
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("sdist") / f"vllm-{name}"
            unpack_sdist(release, folders[name])
        return folders[name]

    return get


@pytest.fixture
def full_tree(
    release: Release, pristine: Callable[[Release], Path], tmp_path: Path
) -> Path:
    """A release's sources to patch.

    Hard links: quick to make, and a tool that wrote into a file instead of replacing
    it would spoil the original for every other test.
    """
    folder = tmp_path / "full"
    shutil.copytree(pristine(release), folder, copy_function=os.link, symlinks=True)
    return folder


@pytest.fixture
def tree(release: Release, pristine: Callable[[Release], Path], tmp_path: Path) -> Path:
    """A release's sources, but only its packages and the files that get edited."""
    source, folder = pristine(release), tmp_path / "tree"
    files = {path for path in source.iterdir() if path.is_file()}
    files |= {source / edit.file for edit in release.edits}
    for path in files.union(source.glob("vllm/**/__init__.py")):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    return folder


@pytest.fixture
def site_packages(release: Release, tree: Path, tmp_path: Path) -> Path:
    """A release as pip would have installed it: package, metadata and RECORD."""
    folder = tmp_path / "site-packages"
    shutil.copytree(tree / "vllm", folder / "vllm", copy_function=os.link)
    info = folder / f"vllm-{release.version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {release.version}\n"
    (info / "METADATA").write_text(metadata)
    (info / "INSTALLER").write_text("pip\n")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    record = info / "RECORD"
    names = [p.relative_to(folder).as_posix() for p in [*files, record]]
    record.write_text("".join(f"{name},,\r\n" for name in names), newline="")
    return folder


def snapshot(folder: Path) -> Snapshot:
    """Every file and folder below a folder: content hash and mode."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mode,
        )
        for path in folder.rglob("*")
    }


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Change a file of a tree without touching what it is linked to."""
    text = path.read_text()
    changed = change(text)
    assert changed != text
    path.unlink()
    path.write_text(changed)
