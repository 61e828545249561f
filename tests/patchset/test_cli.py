# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command line, as a user runs it."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib

import pytest
from conftest import snapshot
from packaging.requirements import Requirement
from packaging.version import Version

from patchset import apply, cli, version, wheels
from patchset.releases import ROOT, supported


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m patchset` on a terminal of 80 columns."""
    return subprocess.run(
        [sys.executable, "-m", "patchset", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_releases_are_listed():
    result = run("releases")
    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    text = " ".join(result.stdout.split())
    for release in supported():
        assert str(release.version) in text
        assert release.verified in text, "whole words, in their order"
        assert "/ops/conch " in text


def test_a_tree_is_made_checked_patched_and_reverted(release, tmp_path):
    folder = tmp_path / "tree"
    made = run("tree", release.version, folder)
    assert made.returncode == 0, made.stderr
    assert (folder / "vllm/v1/attention/backends/conch_attn.py").exists()
    assert "nothing to do" in run("apply", folder).stdout
    reverted = run("apply", folder, "--revert")
    assert reverted.returncode == 0
    assert re.search(r"\n\d+ files changed\n", reverted.stdout)
    assert not (folder / ".conch").exists()
    checked = run("apply", folder, "--check")
    assert checked.returncode == 0
    assert "nothing was written" in checked.stdout
    assert not (folder / ".conch").exists()


def test_a_tree_whose_edit_fails_is_not_left_behind(tmp_path, monkeypatch, capsys):
    def unpack(release, destination):
        (destination / "vllm").mkdir(parents=True)
        (destination / "vllm/__init__.py").touch()
        (destination / "setup.py").touch()
        (destination / "PKG-INFO").write_text(f"Version: {release.version}\n")

    monkeypatch.setattr(cli, "unpack_sdist", unpack)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert cli.main(["tree", "0.33.0", str(tmp_path / name)]) == 1
        assert "the tree has no such file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_tree_goes_into_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["tree", "0.33.0", "."]) == 0
    assert (tmp_path / "here/vllm/v1/attention/backends/conch_attn.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_check_fails_where_apply_would(tree, release):
    (tree / "PKG-INFO").unlink()
    (tree / "PKG-INFO").write_text("Version: 0.12.0\n")
    for arguments in (["--check"], []):
        result = run("apply", tree, *arguments)
        assert result.returncode == 1
        assert "vLLM 0.12.0 is not supported; supported: " in result.stderr
    (tree / "PKG-INFO").unlink()
    other = next(r for r in supported() if r is not release)
    result = run("apply", tree, "--check", "--release", other.version)
    assert result.returncode == 1
    assert "edit '" in result.stderr


@pytest.mark.parametrize("operation", ["apply", "revert"])
def test_check_fails_where_a_folder_cannot_be_written(
    tree, release, monkeypatch, capsys, operation
):
    """The new folders' own, which is the tree's, one that is there, the record's."""
    options, places = ["--check"], [tree]
    if operation == "revert":
        assert cli.main(["apply", str(tree)]) == 0
        options.append("--revert")
        places = [tree / ".conch"]
    backends = tree / "vllm/v1/attention/backends"
    before = snapshot(tree)
    closed = []
    monkeypatch.setattr(apply.os, "access", lambda path, mode: path not in closed)
    assert cli.main(["apply", str(tree), *options]) == 0
    for closed in ([backends], places, [*places, backends]):
        capsys.readouterr()
        assert cli.main(["apply", str(tree), *options]) == 1
        printed = capsys.readouterr()
        folders = ", ".join(map(str, closed))
        assert printed.err == f"error: these folders cannot be written: {folders}\n"
        assert "would change" not in printed.out
    assert snapshot(tree) == before


@pytest.mark.parametrize(
    "arguments", [[], ["apply"], ["wheel", "--target", "tpu"], ["nonsense"]]
)
def test_wrong_usage_exits_with_2(arguments):
    assert run(*arguments).returncode == 2


def test_files_in_place_of_folders_are_errors_in_one_line(tmp_path):
    """No traceback: what is wrong and where."""
    file = tmp_path / "file"
    file.touch()
    export = ["export", "0.33.0", "--signoff", "A <a@b.org>", "--dirty", "--out"]
    for arguments in (
        ["wheel", "--out", file],
        ["wheel", "--target", "empty", "--out", file / "x"],
        ["tree", "0.33.0", file / "x"],
        ["tree", "0.33.0", file / "x/y"],
        [*export, file],
        [*export, file / "x"],
    ):
        result = run(*arguments)
        assert result.returncode == 1
        assert result.stderr == f"error: {file} is not a folder\n"


def test_an_unsupported_release_is_all_that_wheel_speaks_of(monkeypatch, capsys):
    """Nothing about the machine, which has no GPU here."""
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    assert cli.main(["wheel", "0.99"]) == 1
    assert re.fullmatch(
        r"error: vLLM 0\.99 is not supported; supported: .*\n", capsys.readouterr().err
    )


def test_what_pip_builds_with_is_what_the_tool_takes():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    lines = (ROOT / "requirements/tool.txt").read_text().splitlines()
    tool = {str(Requirement(line)) for line in lines if line and line[0] != "#"}
    assert {str(Requirement(line)) for line in build["requires"]} == tool


def test_the_version_is_that_of_the_repository(tmp_path):
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == version.conch_version()
    assert run("--version").stdout == f"CONCH {version.conch_version()}\n"
    assert (
        f'"fallback_version": "{version.FALLBACK}"' in (ROOT / "setup.py").read_text()
    )
    combined = version.combined_version(Version("0.33.0"))
    assert Version(str(combined)) > Version("0.33.0")
    assert str(combined).startswith("0.33.0+conch")


def test_a_copy_without_git_works(tmp_path):
    """An sdist of this repository holds all that the tool needs, version included.

    One test, as setuptools gathers the files in a folder of the repository.
    """
    from patchset import build

    script = "import sys, patchset.build as b; print(b.build_sdist(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert build.get_requires_for_build_wheel() == []
    with tarfile.open(tmp_path / result.stdout.splitlines()[-1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (copy,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for release in supported():
        assert (copy / "releases" / str(release.version) / "release.toml").exists()
    result = subprocess.run(
        [sys.executable, "-m", "patchset", "--version"],
        cwd=copy,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"CONCH {version.conch_version()}\n"
