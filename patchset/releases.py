# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The supported vLLM releases: one folder each under `releases/`.

`releases/<version>/release.toml` says all that the tool has to know:

    version, default            the release; one of them is the default
    verified                    how it was verified, for `patchset releases`
    [files]                     sdist and official wheels, with their sha256
    [relocate]                  overlay folders that lie elsewhere in this release
    [imports]                   "module:name" = "module": names imported from elsewhere;
                                = "module:name" if they have other names there
    [[edits]]                   see `patchset.edits.Edit`

`releases/<version>/vllm/...` are files that only this release gets. Another release is
another such folder; no code changes.
"""

import dataclasses
import functools
import tomllib
from pathlib import Path
from typing import Any

from packaging.version import Version

from patchset.edits import Edit
from patchset.errors import PatchError

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Release:
    """What one vLLM release needs."""

    version: Version
    directory: Path
    files: dict[str, str]
    edits: tuple[Edit, ...]
    relocate: dict[str, str] = dataclasses.field(default_factory=dict)
    imports: dict[str, str] = dataclasses.field(default_factory=dict)
    default: bool = False
    verified: str = ""

    @property
    def sdist(self) -> str:
        """File name of the source distribution."""
        return next(name for name in self.files if name.endswith(".tar.gz"))

    @property
    def wheels(self) -> list[str]:
        """File names of the official wheels."""
        return [name for name in self.files if name.endswith(".whl")]


def _load(directory: Path) -> Release:
    path = directory / "release.toml"
    with path.open("rb") as file:
        data: dict[str, Any] = tomllib.load(file)
    edits = tuple(
        Edit(**entry | {"reason": " ".join(entry["reason"].split())})
        for entry in data.get("edits", [])
    )
    return Release(
        version=Version(data["version"]),
        directory=directory,
        files=data["files"],
        edits=edits,
        relocate=data.get("relocate", {}),
        imports=data.get("imports", {}),
        default=data.get("default", False),
        verified=" ".join(data.get("verified", "").split()),
    )


@functools.cache
def supported() -> tuple[Release, ...]:
    """All supported releases, newest first."""
    found = [_load(path.parent) for path in ROOT.glob("releases/*/release.toml")]
    return tuple(sorted(found, key=lambda release: release.version, reverse=True))


def supported_names() -> str:
    """The supported versions, for messages."""
    return ", ".join(str(release.version) for release in supported())


def get_release(version: str | Version | None = None) -> Release:
    """The data of one release.

    Args:
        version: a vLLM version; its local part (`+empty`, `+cu130`) is ignored.
            None stands for the default release.

    Raises:
        PatchError: the version is not supported.

    """
    if version is None:
        return next(release for release in supported() if release.default)
    try:
        wanted = Version(str(version)).public
    except ValueError as error:
        raise PatchError(
            f"'{version}' is no version; supported: {supported_names()}"
        ) from error
    for release in supported():
        if str(release.version) == wanted:
            return release
    raise PatchError(f"vLLM {version} is not supported; supported: {supported_names()}")
