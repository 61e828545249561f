# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`apply` on the real sources: all or nothing, once, and back again byte for byte."""

import base64
import csv
import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import rewrite, snapshot

from patchset import apply, overlay
from patchset.apply import plan_apply, plan_revert
from patchset.errors import PatchError
from patchset.releases import ROOT, Release, supported, supported_names
from patchset.trees import find_tree


def run_apply(folder: Path, release: Release, **options) -> list[str]:
    """Apply CONCH; returns what was done to which file."""
    plan = plan_apply(find_tree(folder), release, **options)
    plan.execute()
    return [f"{step.action} {step.path}" for step in plan.steps]


def run_revert(folder: Path, **options) -> None:
    """Take CONCH out."""
    plan_revert(find_tree(folder), **options).execute()


def registry(folder: Path, release: Release) -> Path:
    """The file that has the enum of the backends."""
    (path,) = {e.file for e in release.edits if e.file.endswith("registry.py")}
    return folder / path


@pytest.fixture
def own_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the overlay, for tests that change it."""
    folder = tmp_path / "repository"
    for top in overlay.OVERLAY:
        if (ROOT / top).exists():
            shutil.copytree(ROOT / top, folder / top)
    monkeypatch.setattr(overlay, "ROOT", folder)
    return folder


def test_round_trip_gives_back_every_byte(full_tree, release):
    tree = full_tree
    before = snapshot(tree)
    run_apply(tree, release)
    between = snapshot(tree)
    edited = {edit.file for edit in release.edits}
    changed = {name for name in before if between[name] != before[name]}
    assert {name for name in changed if (tree / name).is_file()} == edited
    assert set(between) - set(before) >= {
        change.path for change in overlay.added_files(release)
    }
    assert all(between[name][1] == before[name][1] for name in edited), "file modes"
    run_revert(tree)
    assert snapshot(tree) == before


def test_patched_files_compile(tree, release):
    run_apply(tree, release)
    for name in json.loads((tree / ".conch/manifest.json").read_text())["files"]:
        if name.endswith(".py"):
            compile((tree / name).read_bytes(), name, "exec")


def test_a_second_run_does_nothing(tree, release):
    assert run_apply(tree, release)
    before = snapshot(tree)
    assert run_apply(tree, release) == []
    assert snapshot(tree) == before


def test_check_writes_nothing(tree, release):
    before = snapshot(tree)
    assert plan_apply(find_tree(tree), release).steps
    assert snapshot(tree) == before


def test_git_does_not_see_the_record(tree, release):
    run_apply(tree, release)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    command = ["git", "status", "--porcelain", "--untracked-files=all", ".conch"]
    result = subprocess.run(command, cwd=tree, check=True, capture_output=True)
    assert result.stdout == b""


def test_a_changed_overlay_updates_and_still_reverts(tree, release, own_overlay):
    before = snapshot(tree)
    run_apply(tree, release)
    kernels = own_overlay / "vllm/attention/ops/conch"
    (kernels / "plan.py").write_text("# changed\n")
    (kernels / "new.py").write_text("# new\n")
    (kernels / "softmax.py").unlink()
    landed = release.relocate.get(
        "vllm/attention/ops/conch", "vllm/attention/ops/conch"
    )
    (tree / landed / "__pycache__").mkdir()
    (tree / landed / "__pycache__/softmax.cpython-311.pyc").write_bytes(b"stale")
    assert run_apply(tree, release) == [
        f"add {landed}/new.py",
        f"update {landed}/plan.py",
        f"remove {landed}/softmax.py",
    ]
    assert not list((tree / landed).rglob("softmax*"))
    assert run_apply(tree, release) == []
    run_revert(tree)
    assert snapshot(tree) == before


def test_a_changed_anchor_leaves_the_tree_alone(tree, release):
    path = registry(tree, release)
    rewrite(path, lambda text: text.replace("    CUSTOM = ", "    TAILORED = "))
    before = snapshot(tree)
    with pytest.raises(PatchError) as caught:
        plan_apply(find_tree(tree), release)
    message = str(caught.value)
    for part in (
        path.relative_to(tree).as_posix(),
        "edit 'register the backend'",
        "anchor `CUSTOM = ...` in `AttentionBackendEnum`",
        "matched 0 times, expected 1",
        f"vLLM {release.version} found",
        f"supported: {supported_names()}",
    ):
        assert part in message
    assert snapshot(tree) == before


def test_a_missing_file_leaves_the_tree_alone(tree, release):
    registry(tree, release).unlink()
    before = snapshot(tree)
    with pytest.raises(PatchError, match="registry.py.*the tree has no such file"):
        plan_apply(find_tree(tree), release)
    assert snapshot(tree) == before


@pytest.mark.parametrize("operation", ["apply", "update", "revert"])
def test_a_failing_write_is_rolled_back(
    tree, release, own_overlay, monkeypatch, operation
):
    if operation != "apply":
        run_apply(tree, release)
    if operation == "update":
        for path in (own_overlay / "vllm/attention/ops/conch").glob("*.py"):
            path.write_text("# changed\n")
    found = find_tree(tree)
    plan = plan_revert(found) if operation == "revert" else plan_apply(found, release)
    before = snapshot(tree)
    real, refuse = apply.os.replace, tree

    def replace(source, target):
        if target == refuse:
            raise OSError("busy")
        real(source, target)

    monkeypatch.setattr(apply.os, "replace", replace)
    writes = [step.path for step in plan.steps if step.content is not None]
    for path in (writes[0], writes[len(writes) // 2], writes[-1]):
        refuse = found.root / path  # whenever it is tried
        with pytest.raises(PatchError, match="busy. The tree is as it was before"):
            plan.execute()
        assert snapshot(tree) == before


@pytest.mark.parametrize("operation", ["apply", "revert"])
def test_what_cannot_be_put_back_is_named_and_can_be_reverted(
    tree, release, monkeypatch, operation
):
    before = snapshot(tree)
    if operation == "revert":
        run_apply(tree, release)
    found = find_tree(tree)
    plan = plan_revert(found) if operation == "revert" else plan_apply(found, release)
    writes = [step.path for step in plan.steps if step.content is not None]
    first, last = found.root / writes[0], found.root / writes[-1]
    real, done = apply._Transaction._put, []

    def put(self, path, staged):
        if path == last or path in done:
            raise OSError("busy")
        real(self, path, staged)
        if path == first:
            done.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(apply._Transaction, "_put", put)
        with pytest.raises(PatchError) as caught:
            plan.execute()
    message = str(caught.value)
    assert "busy" in message and "apply --revert" in message
    assert str(first) in message and str(found.root / writes[1]) not in message
    run_revert(tree)
    assert snapshot(tree) == before


@pytest.mark.parametrize("killed_at", [1, 12])
def test_a_killed_run_can_be_finished_and_reverted(tree, release, killed_at):
    before = snapshot(tree)
    script = f"""
import os
from pathlib import Path
from patchset.apply import plan_apply
from patchset.releases import get_release
from patchset.trees import find_tree
real, calls = os.replace, []
def replace(source, target):
    calls.append(target)
    if len(calls) == {killed_at}:
        os._exit(9)
    real(source, target)
plan = plan_apply(find_tree(Path({str(tree)!r})), get_release("{release.version}"))
os.replace = replace
plan.execute()
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert result.returncode == 9
    run_apply(tree, release)
    assert run_apply(tree, release) == []
    run_revert(tree)
    assert snapshot(tree) == before


def test_changes_made_after_patching_are_not_lost(tree, release):
    before = snapshot(tree)
    run_apply(tree, release)
    path = registry(tree, release)
    rewrite(path, lambda text: text + "# mine\n")
    between = snapshot(tree)
    for operation in (lambda: run_apply(tree, release), lambda: run_revert(tree)):
        with pytest.raises(
            PatchError, match="changed since it was patched: .*registry"
        ):
            operation()
    assert snapshot(tree) == between
    run_revert(tree, overwrite=True)
    assert snapshot(tree) == before


def git(folder: Path, *arguments: str) -> None:
    """Run git as somebody."""
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True)


def commit(folder: Path, tag: str) -> None:
    """Commit a tree as it is, as a release."""
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "-q", "-m", tag)
    git(folder, "tag", tag)


@pytest.fixture
def checkout(tree: Path, release: Release, pristine) -> Path:
    """A repository with two releases, of which `release` is checked out."""
    (other,) = (r for r in supported() if r is not release)
    git(tree, "init", "-q")
    (tree / "PKG-INFO").unlink()
    commit(tree, f"v{release.version}")
    for edit in release.edits:
        (tree / edit.file).unlink(missing_ok=True)
    for edit in other.edits:
        (tree / edit.file).parent.mkdir(parents=True, exist_ok=True)
        (tree / edit.file).unlink(missing_ok=True)
        shutil.copy(pristine(other) / edit.file, tree / edit.file)
    commit(tree, f"v{other.version}")
    git(tree, "checkout", "-q", f"v{release.version}")
    return tree


def files(folder: Path, folders: bool = True) -> dict[str, tuple[str, int]]:
    """What a folder holds, but for git's own; without folders, and the record too."""
    return {
        name: state
        for name, state in snapshot(folder).items()
        if not name.startswith(".git/")
        and (folders or (state[0] and name != ".conch/manifest.json"))
    }


def assert_original_is_asked_for(folder: Path, release: Release) -> None:
    """Neither operation goes on, even told to overwrite, and nothing changes."""
    before = files(folder)
    for operation in (
        lambda: run_apply(folder, release, overwrite=True),
        lambda: run_revert(folder, overwrite=True),
    ):
        with pytest.raises(
            PatchError, match="with other files from upstream.*registry"
        ):
            operation()
        assert files(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_release_checked_out_since_is_patched_as_such(
    checkout, release, overwrite
):
    (other,) = (r for r in supported() if r is not release)
    git(checkout, "checkout", "-q", f"v{other.version}")
    before = files(checkout)
    run_apply(checkout, other)
    expected = files(checkout, folders=False)
    run_revert(checkout)
    git(checkout, "checkout", "-q", f"v{release.version}")
    run_apply(checkout, release)
    git(checkout, "checkout", "-q", "-f", f"v{other.version}")

    plan = plan_apply(find_tree(checkout), other, overwrite=overwrite)
    assert f"patched as vLLM {release.version}, {other.version} now" in plan.notes[0]
    plan.execute()
    assert files(checkout, folders=False) == expected
    assert run_apply(checkout, other) == []
    run_revert(checkout)
    assert files(checkout) == before


def test_another_release_checked_out_since_is_not_reverted_to_the_old_one(
    checkout, release
):
    (other,) = (r for r in supported() if r is not release)
    git(checkout, "checkout", "-q", f"v{other.version}")
    before = files(checkout)
    git(checkout, "checkout", "-q", f"v{release.version}")
    run_apply(checkout, release)
    git(checkout, "checkout", "-q", "-f", f"v{other.version}")
    run_revert(checkout, overwrite=True)
    assert files(checkout) == before


def test_another_release_in_files_that_are_patched_is_refused(tree, release):
    (other,) = (r for r in supported() if r is not release)
    original = registry(tree, release).read_bytes()
    run_apply(tree, release)
    (tree / "PKG-INFO").unlink()
    (tree / "PKG-INFO").write_text(f"Version: {other.version}\n")
    assert_original_is_asked_for(tree, other)
    plan_revert(find_tree(tree, str(release.version))).execute()  # the user knows
    assert registry(tree, release).read_bytes() == original


def test_changes_in_a_tree_of_another_version_are_not_taken_for_upstreams(
    checkout, release
):
    """It is tagged anew, or was patched with --release: the files are the same."""
    (other,) = (r for r in supported() if r is not release)
    before = files(checkout)
    run_apply(checkout, release)
    rewrite(registry(checkout, release), lambda text: text + "# mine\n")
    git(checkout, "tag", "-d", f"v{other.version}", f"v{release.version}")
    git(checkout, "tag", f"v{other.version}")
    patched = files(checkout)
    with pytest.raises(PatchError, match="changed since it was patched: .*registry"):
        run_revert(checkout)
    assert files(checkout) == patched
    run_revert(checkout, overwrite=True)
    assert files(checkout) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_upstream_changed_since_is_the_new_original(checkout, release, overwrite):
    path = registry(checkout, release)
    old = path.read_text()
    rewrite(path, lambda text: text + "# upstream's\n")
    git(checkout, "commit", "-q", "-a", "-m", "upstream goes on")
    before = files(checkout)
    git(checkout, "checkout", "-q", "HEAD~")
    run_apply(checkout, release)
    git(checkout, "checkout", "-q", "-f", "-")
    assert path.read_text() == old + "# upstream's\n"
    run_apply(checkout, release, overwrite=overwrite)
    assert path.read_text().endswith("# upstream's\n")
    assert "CONCH" in path.read_text()
    assert run_apply(checkout, release) == []
    run_revert(checkout)
    assert files(checkout) == before

    run_apply(checkout, release)
    git(checkout, "checkout", "-q", "-f", "HEAD~")
    run_revert(checkout, overwrite=overwrite)
    assert path.read_text() == old


def test_changes_of_upstreams_and_somebodys_are_never_dropped(checkout, release):
    path = registry(checkout, release)
    run_apply(checkout, release)
    patched = path.read_text()
    git(checkout, "checkout", "-q", "HEAD", "--", ".")
    rewrite(path, lambda text: text + "# upstream's\n")
    git(checkout, "commit", "-q", "-a", "-m", "upstream goes on")
    rewrite(path, lambda text: patched + "# upstream's\n# mine\n")
    assert_original_is_asked_for(checkout, release)


def test_conch_in_a_commit_is_not_taken_for_upstreams(checkout, release):
    before = files(checkout)
    run_apply(checkout, release)
    rewrite(registry(checkout, release), lambda text: text + "# mine\n")
    git(checkout, "add", "--all")
    git(checkout, "commit", "-q", "-m", "CONCH")
    with pytest.raises(PatchError, match="changed since it was patched: .*registry"):
        run_revert(checkout)
    run_revert(checkout, overwrite=True)
    assert files(checkout) == before


def test_edits_in_a_commit_are_not_taken_for_upstreams(checkout, release):
    """`git commit -a` has the edits, without the files that were added."""
    before = files(checkout)
    run_apply(checkout, release)
    git(checkout, "commit", "-q", "-a", "-m", "CONCH")
    rewrite(registry(checkout, release), lambda text: text + "# mine\n")
    git(checkout, "commit", "-q", "-a", "-m", "more")
    with pytest.raises(PatchError, match="changed since it was patched: .*registry"):
        run_revert(checkout)
    run_revert(checkout, overwrite=True)
    assert files(checkout) == before


def test_files_in_the_way_are_refused_or_kept_as_originals(tree, release):
    change = next(
        c for c in overlay.added_files(release) if c.path.endswith("conch_attn.py")
    )
    (tree / change.path).write_text("# somebody's own\n")
    before = snapshot(tree)
    with pytest.raises(PatchError, match="exist and do not come.*conch_attn.py"):
        plan_apply(find_tree(tree), release)
    assert snapshot(tree) == before
    run_apply(tree, release, overwrite=True)
    assert (tree / change.path).read_bytes() == change.content
    run_revert(tree)
    assert snapshot(tree) == before


def test_a_tree_patched_by_other_means_is_refused(tree, release):
    rewrite(
        registry(tree, release),
        lambda text: text.replace("    CUSTOM = ", '    CONCH = "x.Y"\n    CUSTOM = '),
    )
    with pytest.raises(PatchError, match="`CONCH = 'x.Y'` is there already"):
        plan_apply(find_tree(tree), release)


def test_a_tree_that_cannot_be_written_is_an_error(tree, release, monkeypatch):
    before = snapshot(tree)
    plan = plan_apply(find_tree(tree), release)

    def mkdir(path, *_):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(apply.Path, "mkdir", mkdir)
    with pytest.raises(PatchError) as caught:
        plan.execute()
    assert str(caught.value) == (
        f"Read-only file system: {tree / '.conch'}. The tree is as it was before"
    )
    assert snapshot(tree) == before


def test_folders_and_files_in_each_others_places_are_errors(tree, release):
    paths = [change.path for change in overlay.added_files(release)]
    kernel = tree / next(path for path in paths if "/ops/conch/" in path)
    kernel.mkdir(parents=True)
    with pytest.raises(PatchError, match=f"{kernel}: CONCH has a file there"):
        plan_apply(find_tree(tree), release)
    kernel.rmdir()
    kernel.parent.rmdir()
    kernel.parent.touch()
    with pytest.raises(PatchError, match=f"{kernel.parent}/.*: CONCH has a file there"):
        plan_apply(find_tree(tree), release)


def test_a_file_that_is_not_utf_8_is_an_error(tree, release):
    path = registry(tree, release)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b"# \xe9\n")
    with pytest.raises(PatchError, match="registry.py: edit '.*the file is not UTF-8"):
        plan_apply(find_tree(tree), release)


def test_nothing_to_revert_is_an_error(tree):
    with pytest.raises(PatchError, match="nothing to revert"):
        plan_revert(find_tree(tree))


def test_an_installed_package_keeps_a_true_record(site_packages, release):
    before = snapshot(site_packages)
    run_apply(site_packages, release)
    assert not (site_packages / "tests").exists()
    (info,) = site_packages.glob("*.dist-info")
    with (info / "RECORD").open(newline="") as file:
        rows = {name: (digest, size) for name, digest, size in csv.reader(file)}
    on_disk = {
        p.relative_to(site_packages).as_posix()
        for p in site_packages.rglob("*")
        if p.is_file()
    }
    assert set(rows) == on_disk
    hashed = {name: row for name, row in rows.items() if row[0]}
    assert {edit.file for edit in release.edits} <= set(hashed)
    for name, (digest, size) in hashed.items():
        content = (site_packages / name).read_bytes()
        raw = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
        assert (digest, size) == (
            f"sha256={raw.decode().rstrip('=')}",
            str(len(content)),
        )
    assert run_apply(site_packages / "vllm", release) == []
    run_revert(site_packages)
    assert snapshot(site_packages) == before


def test_pip_uninstalls_a_patched_package_wholly(site_packages, release, tmp_path):
    pytest.importorskip("pip")
    environment = tmp_path / "environment"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True
    )
    (target,) = environment.glob("lib/python*/site-packages")
    empty = snapshot(target)
    shutil.copytree(site_packages, target, dirs_exist_ok=True)
    run_apply(target, release)
    python = environment / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", python, "uninstall", "-y"]
    subprocess.run([*command, "vllm"], check=True, capture_output=True)
    assert set(snapshot(target)) == set(empty)


def test_a_release_that_the_tree_contradicts_is_refused(tree, site_packages, release):
    """Else upstream's own files are taken for somebody's in CONCH's places."""
    (other,) = (r for r in supported() if r is not release)
    for folder, where in (
        (tree, "PKG-INFO"),
        (site_packages, "installed metadata"),
    ):
        before = snapshot(folder)
        with pytest.raises(
            PatchError,
            match=f"vLLM {release.version} by its {where}, not {other.version}.*"
            "without --release",
        ):
            plan_apply(find_tree(folder, str(other.version)), other)
        assert snapshot(folder) == before
        plan_apply(find_tree(folder, str(release.version)), release).execute()
        between = snapshot(folder)
        with pytest.raises(PatchError, match=f"by its {where}, not"):
            plan_apply(find_tree(folder, str(other.version)), other)
        with pytest.raises(PatchError, match=f"by its {where}, not"):
            plan_revert(find_tree(folder, str(other.version)))
        assert snapshot(folder) == between


@pytest.mark.parametrize("version", ["0.1.dev1+gabc", "unknown"])
def test_a_tree_that_cannot_tell_is_what_the_user_says(tree, release, version):
    """Such as sources that were built without git's tags."""
    (tree / "PKG-INFO").unlink()
    (tree / "PKG-INFO").write_text(f"Version: {version}\n")
    assert plan_apply(find_tree(tree, str(release.version)), release).steps


def test_a_wheel_built_with_conch_is_not_patched_again(site_packages, release):
    (info,) = site_packages.glob("*.dist-info")
    rewrite(
        info / "METADATA",
        lambda text: text.replace(f"{release.version}", f"{release.version}+conch1"),
    )
    with pytest.raises(PatchError, match="was built with CONCH"):
        plan_apply(find_tree(site_packages), release)
