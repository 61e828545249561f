# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The exported series, taken in by git as a reviewer would."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Snapshot, snapshot
from ruff.__main__ import find_ruff_bin

from patchset import overlay
from patchset.apply import plan_apply
from patchset.cli import main
from patchset.errors import PatchError
from patchset.export import COVER_LETTER, export
from patchset.overlay import added_files, uncommitted
from patchset.releases import Release
from patchset.trees import find_tree

SIGNOFF = "Ada Example <ada@example.org>"


def git(folder: Path, *arguments: str) -> str:
    """Run git as a reviewer."""
    who = ["-c", "user.name=Reviewer", "-c", "user.email=reviewer@example.org"]
    result = subprocess.run(
        ["git", *who, *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout


def content(folder: Path) -> Snapshot:
    """Every file of a tree, but git's and the tool's own."""
    return {
        name: state
        for name, state in snapshot(folder).items()
        if name.split("/")[0] not in (".git", ".conch")
    }


def check_concerns(release: Release, patches: list[Path]) -> None:
    """Each patch has one: kernels first, and upstream's files in one of their own."""
    files = [
        {
            line.removeprefix("+++ b/")
            for line in patch.read_text().splitlines()
            if line.startswith("+++ b/")
        }
        for patch in patches
    ]
    assert sum(map(len, files)) == len(set().union(*files))
    assert all("/ops/conch/" in name for name in files[0])
    assert {edit.file for edit in release.edits} in files


def test_git_am_gives_what_apply_gives(full_tree, release, tmp_path):
    *patches, cover = export(release, tmp_path / "patches", SIGNOFF, dirty=True)
    assert [path.name[:4] for path in patches] == [
        f"{number:04}" for number in range(1, len(patches) + 1)
    ]
    assert cover.name == COVER_LETTER
    assert str(release.version) in cover.read_text()
    check_concerns(release, patches)

    reviewed = tmp_path / "reviewed"
    full_tree.rename(reviewed)
    git(reviewed, "init", "-q")
    # .gitignore is upstream's, for a working copy; the release has ignored files too.
    git(reviewed, "add", "--all", "--force")
    git(reviewed, "commit", "-q", "-m", "the release")
    git(reviewed, "am", "-q", "--keep-non-patch", *map(str, patches))
    log = git(reviewed, "log", "--format=%an <%ae>%n%s%n%b", f"-{len(patches)}")
    assert log.count(f"Signed-off-by: {SIGNOFF}") == len(patches)
    assert "[Attention] Make CONCH selectable" in log

    by_am = content(reviewed)
    git(reviewed, "reset", "-q", "--hard", f"HEAD~{len(patches)}")
    plan_apply(find_tree(reviewed), release).execute()
    assert content(reviewed) == by_am


# The first: 0.13.0's wants Gluon from vllm.triton_utils, which has none there. The
# second: whether a job of upstream's CI runs each test.
HOOKS = ("check_forbidden_imports", "check_test_tethering")


@pytest.mark.parametrize("hook", HOOKS)
def test_upstreams_hooks_have_nothing_to_say(full_tree, release, hook):
    """What `git am` gives is what `apply` gives, see above."""
    script = f"tools/pre_commit/{hook}.py"
    if not (full_tree / script).exists():
        pytest.skip("this release has no such hook")
    plan_apply(find_tree(full_tree), release).execute()
    files = [c.path for c in added_files(release) if c.path.endswith(".py")]
    files += sorted({edit.file for edit in release.edits})
    command = [sys.executable, script, *files]
    result = subprocess.run(
        command, cwd=full_tree, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_upstreams_ruff_has_nothing_to_say(full_tree, release):
    """As upstream's hooks run it: its version, with the tree's own settings."""
    plan_apply(find_tree(full_tree), release).execute()
    files = [c.path for c in added_files(release) if c.path.endswith(".py")]
    files += sorted({edit.file for edit in release.edits})

    def ruff(*arguments: str) -> str:
        command = [find_ruff_bin(), *arguments]
        return subprocess.run(
            command, cwd=full_tree, capture_output=True, text=True, check=False
        ).stdout

    hooks = (full_tree / ".pre-commit-config.yaml").read_text()
    pinned = ruff("--version").strip().replace("ruff ", "v")
    assert f"/ruff-pre-commit\n  rev: {pinned}\n" in hooks
    concise = ("--force-exclude", "--no-cache", "--output-format=concise")
    assert ruff("check", *concise, *files) == "All checks passed!\n"
    formatted = ruff("format", "--check", "--force-exclude", "--no-cache", *files)
    assert formatted == f"{len(files)} files already formatted\n"


def test_all_files_are_named_in_one_form(release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = export(release, Path("patches"), SIGNOFF, dirty=True)
    assert made == [
        *sorted(Path("patches").glob("*.patch")),
        Path("patches", COVER_LETTER),
    ]


def test_older_patches_are_not_mixed_with_new_ones(release, tmp_path):
    (tmp_path / "0007-old.patch").touch()
    with pytest.raises(
        PatchError, match="has patches already: 0007-old.patch. Remove .* --out"
    ):
        export(release, tmp_path, SIGNOFF, dirty=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with an overlay of one file, in place of this one."""
    folder = tmp_path / "repository"
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm/mine.py").write_text("x = 1\n")
    (folder / ".gitignore").write_text("*.log\n")
    git(folder, "init", "-q")
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "overlay")
    monkeypatch.setattr(overlay, "ROOT", folder)
    return folder


def test_what_git_ignores_and_leftovers_are_no_overlay(repository, release):
    for name in ("run.log", "mine.py.orig", "mine.py.rej", "mine.py~", "new.py"):
        (repository / "vllm" / name).write_text("x = 2\n")
    own = {c.path for c in added_files(release, package_only=True)}
    assert {"vllm/mine.py", "vllm/new.py"} <= own
    assert not [name for name in own if not name.endswith(".py")]
    assert uncommitted(release) == ([], ["vllm/new.py"])
    shutil.rmtree(repository / ".git")  # an archive of the repository
    assert {"vllm/mine.py", "vllm/new.py", "vllm/run.log"} <= {
        c.path for c in added_files(release, package_only=True)
    }
    assert uncommitted(release) == ([], [])


@pytest.mark.parametrize("name", ["mine.py", "new.py"])
def test_what_is_not_committed_is_not_exported_unasked(
    repository, release, tmp_path, name
):
    (repository / "vllm" / name).write_text("x = 2\n")
    with pytest.raises(PatchError, match=f"not committed: vllm/{name}.*--dirty"):
        export(release, tmp_path / "patches", SIGNOFF)
    assert not (tmp_path / "patches").exists()


def test_untracked_files_are_taken_into_a_tree_with_a_warning(
    repository, release, tree, capsys
):
    (repository / "vllm/new.py").write_text("x = 2\n")
    assert main(["apply", str(tree)]) == 0
    assert (tree / "vllm/new.py").exists()
    assert "not in git, but taken: vllm/new.py" in capsys.readouterr().err


@pytest.mark.parametrize("signoff", ["Ada", "Ada <ada>", "<ada@example.org>"])
def test_a_signoff_without_name_and_mail_is_refused(release, tmp_path, signoff):
    assert (
        main(
            [
                "export",
                str(release.version),
                "--out",
                str(tmp_path),
                "--signoff",
                (signoff),
            ]
        )
        == 1
    )
