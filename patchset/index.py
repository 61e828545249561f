# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A release's sdist and wheels, from the package index that pip is set up for.

Every file is checked against the sha256 in `release.toml`, whichever index it came
from, and kept in the user's cache folder under that hash.
"""

import functools
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import platformdirs
import requests
import rich.progress
from pypi_simple import (
    PYPI_SIMPLE_ENDPOINT,
    NoSuchProjectError,
    PyPISimple,
    UnsupportedRepoVersionError,
)

from patchset.errors import PatchError
from patchset.releases import Release

# What an index that is away or is none leads to: requests' are OSErrors; ValueErrors
# come from another content type, from bad JSON and from addresses.
_INDEX_ERRORS = (
    OSError,
    NoSuchProjectError,
    UnsupportedRepoVersionError,
    ValueError,
)
_TIMEOUT = (20.0, 60.0)  # seconds: to connect, and between two chunks


def fetch(release: Release, filename: str) -> Path:
    """Get one of a release's files, from the cache or from the index.

    Args:
        release: the release.
        filename: one of `release.files`.

    Returns:
        The file in the cache; do not change it.

    Raises:
        PatchError: the index does not have the file or cannot be reached, or what it
            gave is not the file that `release.toml` names.

    """
    expected = release.files[filename]
    target = platformdirs.user_cache_path("conch-vllm") / expected / filename
    if target.is_file():
        if _sha256(target) == expected:
            return target
        target.unlink()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as error:
        raise PatchError(
            f"{error.strerror}: {error.filename}. Downloads are kept there; name "
            "another cache folder with XDG_CACHE_HOME"
        ) from error
    with scratch as folder:
        partial = Path(folder) / filename
        try:
            _download(filename, expected, partial)
        except _INDEX_ERRORS as error:
            raise PatchError(
                f"{filename}: {error}. PIP_INDEX_URL names another package index, "
                "PIP_CERT the certificates to trust. Without a network, put the file "
                f"there yourself: {target}"
            ) from error
        if (found := _sha256(partial)) != expected:
            raise PatchError(
                f"{filename}: the index gave a file with sha256 {found}, but "
                f"{release.directory.name}/release.toml says {expected}"
            )
        partial.replace(target)
    return target


def check_is_free(destination: Path) -> None:
    """Refuse a folder that has something in it already."""
    if destination.exists() and (
        not destination.is_dir() or any(destination.iterdir())
    ):
        raise PatchError(f"{destination} exists and is not an empty folder")


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        found = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        raise PatchError(f"{found} is not a folder") from error


def unpack_sdist(release: Release, destination: Path) -> None:
    """Unpack a release's sdist into a folder that does not exist yet or is empty."""
    check_is_free(destination)
    archive = fetch(release, release.sdist)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=destination.parent) as folder,
        tarfile.open(archive) as tar,
    ):
        tar.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        unpacked.replace(destination)


def _download(filename: str, expected: str, path: Path) -> None:
    session = requests.Session()
    if bundle := _pip_setting("cert"):
        session.verify = bundle
    with PyPISimple(
        _pip_setting("index-url") or PYPI_SIMPLE_ENDPOINT, session=session
    ) as index:
        page = index.get_project_page("vllm", timeout=_TIMEOUT)
        for package in page.packages:
            if package.filename == filename:
                break
        else:
            raise PatchError(
                f"{filename}: the package index does not have it; name one that does "
                "with PIP_INDEX_URL"
            )
        stated = package.digests.get("sha256", expected)
        if stated != expected:
            raise PatchError(
                f"{filename}: the index states sha256 {stated}, release.toml {expected}"
            )
        index.download_package(
            package,
            path,
            verify=False,  # `fetch` does, against release.toml
            progress=functools.partial(_Progress, filename),
            timeout=_TIMEOUT,
        )


def _pip_setting(name: str) -> str | None:
    """An option of pip's configuration, from its environment variable or its files."""
    if value := os.environ.get(f"PIP_{name.upper().replace('-', '_')}"):
        return value
    # Isolated (-I): where pip builds us, PYTHONPATH hides the pip that is installed.
    for options in (["-m"], ["-I", "-m"]):
        command = [sys.executable, *options, "pip", "config", "get", f"global.{name}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return result.stdout.strip() or None
    return None


class _Progress:
    """A progress bar in the form that pypi-simple drives."""

    def __init__(self, description: str, total: int | None):
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn(description),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            console=rich.console.Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(description, total=total)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, increment: int) -> None:
        self._bar.advance(self._task, increment)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
