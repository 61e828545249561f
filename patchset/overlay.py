# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What one release gets, computed in memory before anything is written."""

import dataclasses
import subprocess
from collections.abc import Callable, Iterable, Iterator
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
# What editors, patch and merges leave behind.
_LEFTOVERS = (".orig", ".rej", "~")


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
    tops = OVERLAY[:1] if package_only else OVERLAY
    common = {relocation.path(path): text for path, text in _files(ROOT, tops)}
    # The release's own files are written for it and stay as they are.
    own = dict(_files(release.directory, tops))
    if both := sorted(set(common) & set(own)):
        raise PatchError(
            f"releases/{release.directory.name} has files that the overlay has too: "
            f"{', '.join(both)}"
        )
    files = relocation.texts(common) | own
    return [Change(path, files[path].encode(), added=True) for path in sorted(files)]


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
            try:
                source = content.decode()
            except UnicodeDecodeError as error:
                raise EditError(group[0], f"the file is not UTF-8: {error}") from error
            edited = apply_edits(source, group).encode()
        except EditError as error:
            raise PatchError(
                f"{error} (vLLM {release.version} found; "
                f"supported: {supported_names()})"
            ) from error
        changes.append(Change(path, edited, added=False))
    return changes


def uncommitted(release: Release) -> tuple[list[str], list[str]]:
    """What of a release's overlay is not as in the last commit.

    Args:
        release: the release.

    Returns:
        Files that were changed, and files that git does not know; without git none.

    """
    own = f"releases/{release.directory.name}"
    command = ["status", "--porcelain", "--no-renames", "--untracked-files=all", "-z"]
    changed, untracked = [], []
    for line in _git(ROOT, *command, "--", *OVERLAY, own) or ():
        state, path = line[:2], line[3:]
        if path.startswith(EXCLUDED):
            continue
        if state != "??":
            changed.append(path)
        elif not path.endswith(_LEFTOVERS):
            untracked.append(path)
    return changed, untracked


def _git(folder: Path, *arguments: str) -> list[str] | None:
    """The NUL-separated answer of git; None where this is no repository of ours."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return None
    if result.returncode:
        return None
    return result.stdout.decode(errors="surrogateescape").split("\0")[:-1]


def _files(base: Path, tops: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The texts below some folders, but for what git ignores, where there is git."""
    tops = [top for top in tops if (base / top).is_dir()]
    listed = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    names = _git(base, *listed, *tops) if tops else []
    if names is None:
        found = (path for top in tops for path in (base / top).rglob("*"))
        names = [path.relative_to(base).as_posix() for path in found]
    for name in names:
        path = base / name
        if (
            path.is_file()
            and not _IGNORED.intersection(path.parts)
            and not name.startswith(EXCLUDED)
            and not name.endswith(_LEFTOVERS)
        ):
            try:
                yield name, path.read_bytes().decode()
            except UnicodeDecodeError as error:
                raise PatchError(f"{path}: the overlay holds text only") from error
