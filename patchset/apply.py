# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Puts CONCH into a vLLM tree and takes it out again.

Everything is computed and checked in memory first; then all files are staged and
renamed into place, and any failure puts the old ones back; one that cannot be put
back is named, and the record stays, for `revert` to finish it. A record
in the tree (`.conch/`, or `conch/` inside an installed package's dist-info) holds
upstream's originals and the hashes of what was written. So a second run finds nothing
to do, a run after the overlay changed updates, and `revert` gives back every byte.

A file that somebody changed after it was patched is never overwritten unasked. One that
upstream changed since, by a checkout of something newer, is the new original.
"""

import base64
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from patchset.errors import PatchError
from patchset.overlay import added_files, edited_files
from patchset.releases import Release
from patchset.trees import Tree
from patchset.version import conch_version

_FORMAT = 1


@dataclasses.dataclass
class _Entry:
    """What the record knows of one file.

    Attributes:
        original: sha256 as upstream ships it; None when upstream has no such file.
        patched: sha256 of what was written.
        previous: sha256s that an interrupted run may have left.

    """

    original: str | None
    patched: str
    previous: list[str | None] = dataclasses.field(default_factory=list)

    def explains(self, digest: str | None) -> bool:
        """Whether the tool itself can have left the file in this state."""
        return digest in (self.original, self.patched, *self.previous)


@dataclasses.dataclass
class _Record:
    """The state folder of a tree."""

    directory: Path
    files: dict[str, _Entry]
    created: list[str]
    release: str

    @classmethod
    def load(cls, tree: Tree) -> "_Record":
        path = tree.state_dir / "manifest.json"
        if not path.exists():
            return cls(tree.state_dir, {}, [], "")
        try:
            data = json.loads(path.read_bytes())
            if data["format"] != _FORMAT:
                raise PatchError(
                    f"{path}: written by another version of the tool (format "
                    f"{data['format']}, this one knows {_FORMAT}); revert with that one"
                )
            files = {name: _Entry(**entry) for name, entry in data["files"].items()}
            release = str(data["release"])
            return cls(tree.state_dir, files, data["created"], release)
        except (KeyError, TypeError, ValueError) as error:
            raise PatchError(f"{path}: not a record of this tool ({error})") from error

    def dump(self, pending: bool) -> bytes:
        data: dict[str, Any] = {
            "format": _FORMAT,
            "release": self.release,
            "conch": conch_version(),
            "created": sorted(self.created),
            "files": {
                name: dataclasses.asdict(
                    entry if pending else dataclasses.replace(entry, previous=[])
                )
                for name, entry in sorted(self.files.items())
            },
        }
        return (json.dumps(data, indent=1) + "\n").encode()

    def original_path(self, name: str) -> Path:
        return self.directory / "originals" / name

    def original(self, name: str) -> bytes | None:
        """A file as upstream ships it, from the record."""
        entry = self.files[name]
        if entry.original is None:
            return None
        path = self.original_path(name)
        content = path.read_bytes() if path.exists() else b""
        if _sha256(content) != entry.original:
            raise PatchError(
                f"{path}: the stored original is damaged; take a fresh vLLM tree"
            )
        return content


@dataclasses.dataclass(frozen=True)
class Step:
    """One file to write or remove."""

    action: str
    path: str
    content: bytes | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an operation does to a tree; nothing has happened yet.

    Attributes:
        tree: the tree.
        release: what is applied; None when CONCH is taken out.
        steps: the files to write or remove.
        record: the record that the steps lead to; of a revert, the one they end.
        forgotten: files that are upstream's own again, newer than the record.
        notes: what the user should know of the tree.

    """

    tree: Tree
    release: Release | None
    steps: list[Step]
    record: _Record
    forgotten: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def pending(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.steps or self.notes) or self.release is None

    def unwritable(self) -> list[Path]:
        """The folders in which files have to be written and cannot be."""
        files = [self.tree.root / step.path for step in self.steps]
        folders = {_existing(path.parent) for path in files}
        folders.add(_existing(self.record.directory))
        return sorted(f for f in folders if not os.access(f, os.W_OK | os.X_OK))

    def execute(self) -> None:
        """Do it, wholly or not at all."""
        if not self.pending:
            return
        try:
            with _Transaction(self.record.directory / "staging") as transaction:
                _write(self, transaction)
        except OSError as error:
            name = error.filename2 or error.filename
            raise PatchError(
                f"{error.strerror or error}{f': {name}' if name else ''}. The tree is "
                "as it was before"
            ) from error
        if self.release is None:
            for name in self.record.created:
                _remove_empty(self.tree.root / name)
            # With what runs left there that were cut off.
            shutil.rmtree(self.record.directory / "originals", ignore_errors=True)
            _remove_empty(self.record.directory)


def plan_apply(tree: Tree, release: Release, *, overwrite: bool = False) -> Plan:
    """Work out what brings CONCH, as it is now, into a tree.

    Args:
        tree: the tree.
        release: its release.
        overwrite: also replace files that the tool does not own or that were changed
            after they were patched. What the tool did not own is kept as an original.

    Raises:
        PatchError: it cannot be applied; the tree is untouched.

    """
    if tree.version.local and tree.version.local.startswith("conch"):
        raise PatchError(
            f"{tree.root}: this vLLM was built with CONCH ({tree.version}); build and "
            "install a newer one instead of patching it"
        )
    record, forgotten, notes = _settle(tree, _Record.load(tree), overwrite)

    def read(path: str) -> bytes | None:
        """The file without CONCH."""
        return record.original(path) if path in record.files else _read(tree, path)

    changes = added_files(release, package_only=tree.installed)
    taken = [change.path for change in changes if read(change.path) is not None]
    if taken and not overwrite:
        raise PatchError(
            f"{tree.root}: these files exist and do not come from this tool: "
            f"{', '.join(taken)}. Remove them, or use --overwrite (a later --revert "
            "brings them back)"
        )
    changes += edited_files(release, read)
    target = {change.path: change.content for change in changes}
    originals = {path: read(path) for path in target}
    if tree.dist_info is not None:
        name = (tree.dist_info / "RECORD").relative_to(tree.root).as_posix()
        content = read(name)
        if content is None:
            raise PatchError(f"{tree.dist_info}: the installed package has no RECORD")
        originals[name] = content
        target[name] = _extend_record(tree, content, target, originals)

    entries = {}
    for path, content in target.items():
        old, original = record.files.get(path), originals[path]
        entries[path] = _Entry(
            original=None if original is None else _sha256(original),
            patched=_sha256(content),
            previous=[old.patched, *old.previous] if old else [],
        )
    steps = []
    for path, content in sorted(target.items()):
        if (current := _read(tree, path)) != content:
            action = "update" if path in record.files else "edit"
            steps.append(Step("add" if current is None else action, path, content))
    for path in sorted(set(record.files) - set(target)):
        if (current := _read(tree, path)) != (original := record.original(path)):
            action = "remove" if original is None else "restore"
            steps.append(Step(action, path, original))
    created = sorted({*record.created, *_missing_folders(tree, target)})
    record = _Record(tree.state_dir, entries, created, str(release.version))
    return Plan(tree, release, steps, record, forgotten, notes)


def plan_revert(tree: Tree, *, overwrite: bool = False) -> Plan:
    """Work out what takes CONCH out of a tree again.

    Args:
        tree: the tree.
        overwrite: also give back files that were changed after they were patched.

    Raises:
        PatchError: CONCH is not in the tree, or files were changed.

    """
    record = _Record.load(tree)
    if not record.files:
        raise PatchError(f"{tree.root}: nothing to revert: not patched by this tool")
    record, forgotten, notes = _settle(tree, record, overwrite)
    steps = []
    for path in sorted(record.files):
        if _read(tree, path) != (original := record.original(path)):
            action = "remove" if original is None else "restore"
            steps.append(Step(action, path, original))
    return Plan(tree, None, steps, record, forgotten, notes)


def _settle(
    tree: Tree, record: _Record, overwrite: bool
) -> tuple[_Record, frozenset[str], tuple[str, ...]]:
    """Find what changed in a tree since it was patched.

    Returns:
        The record without the files that are upstream's own again; those; what to tell
        the user.

    Raises:
        PatchError: the tree is of another release than the user says, a file was
            changed by somebody else, or its original is not known.

    """
    if tree.contradiction and record.release != tree.version.public:
        raise PatchError(
            f"{tree.root}: {tree.contradiction}, not {tree.version}. Run this without "
            "--release, which is for trees that cannot tell"
        )
    moved = bool(record.files) and record.release != tree.version.public
    found: dict[str, list[str]] = {state: [] for state in _STATES}
    edited = [path for path, entry in record.files.items() if entry.original]
    contents = {path: _read(tree, path) for path in record.files}
    has_edits = any(b"conch" in (contents[path] or b"").lower() for path in edited)
    committed = _committed(tree, edited)
    for path, entry in record.files.items():
        digest = _digest(contents[path])
        found[_state(entry, digest, committed.get(path), moved, has_edits)].append(path)
    changed, forgotten = found["changed"], found["forgotten"]
    if unclear := found["unclear"]:
        raise PatchError(
            f"{tree.root}: patched as vLLM {record.release}, {tree.version.public} "
            "now, with other files from upstream; these have CONCH's edits or yours in "
            f"them all the same: {', '.join(sorted(unclear))}. Bring upstream's own "
            "back (with git, or from a fresh tree), then run this again; if the tree "
            f"is {record.release} still, say so with --release"
        )
    if changed and not overwrite:
        raise PatchError(
            f"{tree.root}: changed since it was patched: {', '.join(sorted(changed))}. "
            "Undo those changes, or use --overwrite to drop them"
        )
    notes = []
    if moved:
        notes.append(
            f"patched as vLLM {record.release}, {tree.version.public} now: what CONCH "
            f"added for {record.release} goes"
        )
    if forgotten:
        notes.append(f"upstream's own, newer: {', '.join(sorted(forgotten))}")
    kept = {p: e for p, e in record.files.items() if p not in forgotten}
    record = dataclasses.replace(record, files=kept)
    return record, frozenset(forgotten), tuple(notes)


_STATES = ("known", "forgotten", "changed", "unclear")


def _state(
    entry: _Entry, digest: str | None, head: str | None, moved: bool, has_edits: bool
) -> str:
    """What became of a file of the record.

    Args:
        entry: the record's.
        digest: sha256 of the file; None if there is none.
        head: sha256 of upstream's file in git's HEAD, if that is known.
        moved: whether the tree is of another release than the record.
        has_edits: whether any of upstream's files has an edit of CONCH's.

    Returns:
        "known", as the tool left it or as it was before; "forgotten", upstream's own,
        newer; "changed" by somebody; "unclear", and its original is not known.

    """
    if entry.explains(digest):
        if entry.original is None or not moved:
            return "known"
        is_original = (head or digest) == entry.original
        return "known" if is_original else "unclear"
    if entry.original is None:
        return "changed"
    if head:
        if digest == head:
            return "forgotten"
        return "changed" if head == entry.original else "unclear"
    if not moved:
        return "changed"
    return "unclear" if digest and has_edits else "forgotten"


def _committed(tree: Tree, edited: list[str]) -> dict[str, str | None]:
    """The sha256 of upstream's files as git's HEAD has them.

    None are known without git, and where HEAD has CONCH's edits, too, of which several
    name it.
    """
    if tree.installed or not edited or not (tree.root / ".git").exists():
        return {}

    def git(*arguments: str) -> subprocess.CompletedProcess[bytes] | None:
        command = ["git", "-C", str(tree.root), *arguments]
        try:
            return subprocess.run(command, capture_output=True, check=False)
        except OSError:
            return None

    found = git("grep", "--quiet", "--ignore-case", "conch", "HEAD", "--", *edited)
    if found is None or found.returncode != 1:  # 0: found; more: no commit, no git
        return {}
    known: dict[str, str | None] = {}
    for path in edited:
        shown = git("show", f"HEAD:./{path}")
        if shown is not None and shown.returncode == 0:
            known[path] = _digest(shown.stdout)
    return known


def _write(plan: Plan, transaction: "_Transaction") -> None:
    """Write the record's originals, the record as pending, the files, the record.

    Whoever finds a pending record knows each file as it was before and after, and so
    can go on from wherever the run was cut off.
    """
    tree, record = plan.tree, plan.record
    manifest = record.directory / "manifest.json"
    ignore = record.directory / ".gitignore"
    old = _Record.load(tree)
    if plan.release is None:
        stale = list(old.files)
    else:
        stale = [path for path in old.files if path not in record.files]
        for path, entry in record.files.items():
            known = path in old.files and path not in plan.forgotten
            if entry.original is not None and not known:
                transaction.write(record.original_path(path), _read(tree, path))
        if not tree.installed:
            transaction.write(ignore, b"*\n")
        going = {path: old.files[path] for path in stale if path not in plan.forgotten}
        pending = dataclasses.replace(record, files=going | record.files)
        transaction.write(manifest, pending.dump(pending=True))
    for step in plan.steps:
        transaction.write(tree.root / step.path, step.content)
        if step.action == "remove":
            transaction.forget_bytecode(tree.root / step.path)
    if plan.release is None:
        transaction.write(ignore, None)
        transaction.write(manifest, None)
    else:
        transaction.write(manifest, record.dump(pending=False))
    for path in stale:
        transaction.write(record.original_path(path), None)
    transaction.commit()


def _extend_record(
    tree: Tree,
    content: bytes,
    target: dict[str, bytes],
    originals: dict[str, bytes | None],
) -> bytes:
    """RECORD with CONCH's files in it, so that pip's uninstall removes them too."""
    state = tree.state_dir.relative_to(tree.root).as_posix()
    files: dict[str, bytes | None] = {**target, f"{state}/manifest.json": None}
    for path, original in originals.items():
        if original is not None:
            files[f"{state}/originals/{path}"] = original
    return update_record(content, files)


def update_record(content: bytes, files: Mapping[str, bytes | None]) -> bytes:
    """A wheel's or an installed package's RECORD with lines replaced and added.

    Args:
        content: the RECORD.
        files: what each file to mention holds; None mentions it without a hash.

    """
    newline = "\r\n" if b"\r\n" in content else "\n"
    rows = [row for row in csv.reader(io.StringIO(content.decode(), newline="")) if row]
    known = {row[0] for row in rows}
    rows += [[path, "", ""] for path in sorted(set(files) - known)]
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=newline)
    for path, *rest in rows:
        data = files.get(path)
        if data is not None:
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
            rest = ["sha256=" + digest.rstrip(b"=").decode(), str(len(data))]
        writer.writerow([path, *rest])
    return out.getvalue().encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest(content: bytes | None) -> str | None:
    return None if content is None else _sha256(content)


def _read(tree: Tree, path: str) -> bytes | None:
    try:
        return (tree.root / path).read_bytes()
    except FileNotFoundError:
        return None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise PatchError(
            f"{tree.root / path}: CONCH has a file there, and the tree a folder, or a "
            "file where its folder is to be. Move that away, or take a fresh tree"
        ) from error


def _missing_folders(tree: Tree, paths: Iterable[str]) -> set[str]:
    """The topmost folders that have to be made for these files."""
    missing = set()
    for path in paths:
        for folder in reversed(Path(path).parents):
            if not (tree.root / folder).exists():
                missing.add(folder.as_posix())
                break
    return missing


def _existing(folder: Path) -> Path:
    """The folder itself, or the one above it in which it has to be made."""
    return folder if folder.exists() else _existing(folder.parent)


def _remove_empty(folder: Path) -> None:
    """Remove a folder and its subfolders, as far as they are empty."""
    if not folder.is_dir() or folder.is_symlink():
        return
    for child in list(folder.iterdir()):
        if child.is_dir():
            _remove_empty(child)
    if not any(folder.iterdir()):
        folder.rmdir()


class _Transaction:
    """Writes and removals that all happen or none.

    `write` only notes; `commit` stages every file, then renames one after the other
    into place. Leaving the `with` block by an exception undoes what was done; if a file
    cannot be put back, the record stays as it is, so that a revert can finish it.
    """

    def __init__(self, staging: Path):
        """Take a folder of its own, on the file system of the targets."""
        self._staging = staging
        self._steps: list[tuple[Path, bytes | None]] = []
        self._undo: list[tuple[Path, Path | None]] = []
        self._made: list[Path] = []

    def __enter__(self) -> "_Transaction":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        lost: list[str] = []
        if kind is not None:
            for path, backup in reversed(self._undo):
                if lost and path.is_relative_to(self._staging.parent):
                    continue
                try:
                    self._put(path, backup)
                except OSError:
                    lost.append(str(path))
        shutil.rmtree(self._staging, ignore_errors=True)
        if kind is not None:
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):  # not empty, or not to be removed
                    folder.rmdir()
        if lost:
            raise PatchError(
                f"{error}. These files could not be put back as they were: "
                f"{', '.join(lost)}. Clear the cause, then `apply --revert` takes the "
                "rest of CONCH out"
            ) from error

    def write(self, path: Path, content: bytes | None) -> None:
        """Note a file's new content; None removes it."""
        self._steps.append((path, content))

    def forget_bytecode(self, path: Path) -> None:
        """Note the removal of what Python compiled from a file."""
        for cached in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            self.write(cached, None)

    def commit(self) -> None:
        """Do everything that was noted."""
        shutil.rmtree(self._staging, ignore_errors=True)  # of a run that was cut off
        self._make(self._staging)
        staged = [
            None if content is None else self._stage(content, _mode(path))
            for path, content in self._steps
        ]
        # Each file's state before its own step, which may be the second for that file.
        contents: dict[Path, tuple[bytes | None, int]] = {}
        backups = []
        for path, content in self._steps:
            if path not in contents:
                old = path.read_bytes() if path.exists() else None
                contents[path] = old, _mode(path)
            old, mode = contents[path]
            backups.append(None if old is None else self._stage(old, mode))
            contents[path] = content, mode
        for (path, _), file, backup in zip(self._steps, staged, backups):
            if file is not None:
                self._make(path.parent)
            self._put(path, file)
            self._undo.append((path, backup))

    def _make(self, folder: Path) -> None:
        for parent in (*reversed(folder.parents), folder):
            if not parent.exists():
                parent.mkdir()
                self._made.append(parent)

    def _stage(self, content: bytes, mode: int) -> Path:
        handle, name = tempfile.mkstemp(dir=self._staging)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, mode)
        return Path(name)

    def _put(self, path: Path, staged: Path | None) -> None:
        if staged is None:
            path.unlink(missing_ok=True)
        else:
            os.replace(staged, path)


def _mode(path: Path) -> int:
    """The permissions of a file, or those of a new one."""
    return path.stat().st_mode & 0o777 if path.exists() else 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
