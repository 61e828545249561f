# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What one release gets, computed in memory before anything is written."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from patchset.edits import Edit, EditError, apply_edits
from patchset.errors import PatchError
from patchset.releases import ROOT, Release, supported_names
from patchset.relocation import Relocation

# Top-level folders of this repository that go into a vLLM tree.
OVERLAY = ("vllm", "tests", "benchmarks")
# The tool's own tests stay here.
EXCLUDED = ("tests/patchset/",)
_IGNORED = {"__pycache__", ".hypothesis", ".pytest_cache"}


@dataclasses.dataclass(frozen=True)
class Change:
    """One file of the patched tree.

    Attributes:
        path: inside the vLLM tree, with forward slashes.
        content: what the file is to hold.
        added: the release has no such file.

    """

    path: str
    content: bytes
    added: bool


def added_files(release: Release, *, package_only: bool = False) -> list[Change]:
    """The files that CONCH adds to a release.

    Args:
        release: the release.
        package_only: only `vllm/`, for an installed package.

    """
    relocation = Relocation(release.relocate, release.imports)
    found: dict[str, Change] = {}
    # The release's own files come last: they are written for this release and stay
    # as they are, and no two files may claim one path.
    for base, moved in ((ROOT, True), (release.directory, False)):
        for path in _files(base):
            if package_only and not path.startswith("vllm/"):
                continue
            content = (base / path).read_bytes()
            if moved:
                content = _relocated(relocation, path, content)
            target = relocation.path(path) if moved else path
            if target in found:
                raise PatchError(
                    f"{base / path}: another overlay file goes to {target} already"
                )
            found[target] = Change(target, content, added=True)
    return [found[path] for path in sorted(found)]


def edited_files(release: Release, read: Callable[[str], bytes | None]) -> list[Change]:
    """Upstream's files with the release's edits in them.

    Args:
        release: the release.
        read: gives the bytes of a file as upstream ships it, None if there is none.

    Raises:
        EditError: an edit's premise does not hold.

    """
    edits: dict[str, list[Edit]] = {}
    for edit in release.edits:
        edits.setdefault(edit.file, []).append(edit)
    changes = []
    for path, group in sorted(edits.items()):
        content = read(path)
        try:
            if content is None:
                raise EditError(group[0], "the tree has no such file")
            edited = apply_edits(content.decode(), group).encode()
        except EditError as error:
            raise PatchError(
                f"{error} (vLLM {release.version} found; "
                f"supported: {supported_names()})"
            ) from error
        changes.append(Change(path, edited, added=False))
    return changes


def _relocated(relocation: Relocation, path: str, content: bytes) -> bytes:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content
    return relocation.text(relocation.path(path), text).encode()


def _files(base: Path) -> Iterator[str]:
    for top in OVERLAY:
        for path in sorted((base / top).rglob("*")):
            name = path.relative_to(base).as_posix()
            if (
                path.is_file()
                and not _IGNORED.intersection(path.parts)
                and not name.endswith(".pyc")
                and not name.startswith(EXCLUDED)
            ):
                yield name
