# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Wheels: one like the official one but small, the pure-Python one, the real one."""

import base64
import csv
import errno
import hashlib
import io
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

from patchset import build, wheels
from patchset.errors import PatchError
from patchset.overlay import added_files
from patchset.releases import Release, supported
from patchset.version import combined_version

EXECUTABLE = (stat.S_IFREG | 0o755) << 16


class _Pipe(io.BytesIO):
    """A target that cannot seek: zipfile then puts sizes behind the data."""

    def seekable(self) -> bool:
        return False

    def tell(self):
        raise OSError("not seekable")

    def seek(self, *_):
        raise OSError("not seekable")


def small_wheel(release: Release, source: Path, folder: Path) -> Path:
    """An official wheel of a release, less most of its files."""
    info = f"vllm-{release.version}.dist-info"
    files = {
        "vllm/__init__.py": (source / "vllm/__init__.py").read_bytes(),
        "vllm/_C.abi3.so": bytes(range(256)) * 20_000,
        "vllm/_version.py": f"__version__ = version = '{release.version}'\n".encode(),
        **{edit.file: (source / edit.file).read_bytes() for edit in release.edits},
        f"{info}/METADATA": f"Metadata-Version: 2.4\nName: vllm\n"
        f"Version: {release.version}\nRequires-Dist: numpy\n\nVersion: text\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\n"
        b"Tag: cp38-abi3-manylinux_2_28_x86_64\n",
        f"{info}/entry_points.txt": b"[console_scripts]\nvllm = vllm:main\n",
    }
    rows = [f"{name},{digest(data)},{len(data)}\n" for name, data in files.items()]
    files[f"{info}/RECORD"] = "".join([*rows, f"{info}/RECORD,,\n"]).encode()
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo(name, (2026, 11, 2, 8, 7, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            if name.endswith("__init__.py"):
                member.compress_type = zipfile.ZIP_STORED
            member.external_attr = (stat.S_IFREG | 0o644) << 16
            if name.endswith(".so"):
                member.external_attr = EXECUTABLE
            archive.writestr(member, data)
    name = f"vllm-{release.version}-cp38-abi3-manylinux_2_28_x86_64.whl"
    (folder / name).write_bytes(pipe.getvalue())
    return folder / name


def digest(data: bytes) -> str:
    """A hash as RECORD has it."""
    raw = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return f"sha256={raw.decode().rstrip('=')}"


def read_wheel(path: Path) -> dict[str, bytes]:
    """The files of a wheel, after a look at its checksums and its RECORD."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert len(names) == len(set(names))
        files = {name: archive.read(name) for name in names if not name.endswith("/")}
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(files[record].decode()))}
    assert set(rows) == set(files)
    for name, data in files.items():
        expected = ["", ""] if name == record else [digest(data), str(len(data))]
        assert rows[name] == expected, name
    return files


def metadata(files: dict[str, bytes]) -> str:
    """METADATA of a wheel."""
    (name,) = (name for name in files if name.endswith(".dist-info/METADATA"))
    return files[name].decode()


def test_conch_goes_into_the_official_wheel(release, tree, tmp_path):
    source = small_wheel(release, tree, tmp_path)
    before = read_wheel(source)
    result = wheels.patch_wheel(release, source, tmp_path)
    after = read_wheel(result)
    version = combined_version(release.version)
    assert parse_wheel_filename(result.name)[1] == version
    assert version.public == str(release.version)
    assert parse_wheel_filename(result.name)[3] == parse_wheel_filename(source.name)[3]

    assert metadata(after) == metadata(before).replace(
        f"\nVersion: {release.version}\n", f"\nVersion: {version}\n"
    )
    assert f"version = '{version}'" in after["vllm/_version.py"].decode()
    info = f"vllm-{version}.dist-info/"
    assert {n.split("/")[0] + "/" for n in after if ".dist-info/" in n} == {info}
    added = {c.path: c.content for c in added_files(release, package_only=True)}
    assert added.items() <= after.items()
    edited = {edit.file for edit in release.edits}
    for name, data in before.items():
        if name in edited:
            edited_text = after[name].upper()
            assert b"CONCH" in edited_text or b"VLLM_ATTENTION_BACKEND" in edited_text
        elif "dist-info/" not in name and name != "vllm/_version.py":
            assert after[name] == data
    with zipfile.ZipFile(result) as archive:
        assert archive.getinfo("vllm/_C.abi3.so").external_attr == EXECUTABLE
        for name in added:
            assert archive.getinfo(name).external_attr >> 16 == stat.S_IFREG | 0o644
    assert sorted(p.name for p in tmp_path.glob("*.partial")) == []


def test_pip_installs_and_uninstalls_the_result(release, tree, tmp_path):
    pytest.importorskip("pip")
    wheel = wheels.patch_wheel(
        release, small_wheel(release, tree, tmp_path), tmp_path / "."
    )
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python"]
    # The small wheel says it is for x86_64; what is tested here is not.
    any_name = wheel.name.replace("cp38-abi3-manylinux_2_28_x86_64", "py3-none-any")
    wheel = wheel.rename(tmp_path / any_name)
    (site,) = folder.glob("lib/python*/site-packages")
    before = set(site.rglob("*"))
    subprocess.run([*pip, "install", "--no-deps", wheel], check=True)
    assert list(site.glob("vllm/v1/attention/backends/conch_attn.py"))
    subprocess.run([*pip, "uninstall", "-y", "vllm"], check=True)
    assert set(site.rglob("*")) == before


def test_a_wheel_of_another_release_is_refused(tmp_path):
    name = "vllm-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    with pytest.raises(PatchError, match=f"{name} is no official vLLM 0.33.0 wheel"):
        wheels.patch_wheel(supported()[0], tmp_path / name, tmp_path)


def test_a_wheel_whose_files_changed_is_refused_and_leaves_nothing(
    release, tree, tmp_path
):
    registry = next(e.file for e in release.edits if e.file.endswith("registry.py"))
    (tree / registry).unlink()
    (tree / registry).write_text("class AttentionBackendEnum:\n    OTHER = 1\n")
    source = small_wheel(release, tree, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(PatchError, match="anchor `CUSTOM = ...`.*matched 0 times"):
        wheels.patch_wheel(release, source, out)
    assert list(out.iterdir()) == []


def test_the_pure_python_wheel(release, tmp_path):
    wheel = wheels.build_wheel(release, tmp_path, target="empty")
    _, version, _, tags = parse_wheel_filename(wheel.name)
    assert str(version) == f"{combined_version(release.version)}.empty"
    assert {str(tag) for tag in tags} == {"py3-none-any"}
    files = read_wheel(wheel)
    for change in added_files(release, package_only=True):
        assert files[change.path] == change.content
    assert f"\nVersion: {version}\n" in metadata(files)
    assert "Requires-Dist: transformers" in metadata(files)
    assert not [name for name in files if name.startswith("tests/")]


@pytest.mark.network_large
def test_the_real_official_wheel(release, tmp_path):
    wheel = wheels.build_wheel(release, tmp_path, target="cuda", machine="x86_64")
    files = read_wheel(wheel)
    assert any(name.endswith(".so") for name in files)
    for change in added_files(release, package_only=True):
        assert files[change.path] == change.content


@pytest.mark.parametrize("machine", ["riscv64", "arm64"])
def test_a_machine_without_a_wheel_is_refused(release, tmp_path, machine):
    with pytest.raises(PatchError, match=f"no official wheel for {machine}.*aarch64"):
        wheels.build_wheel(release, tmp_path, target="cuda", machine=machine)


@pytest.mark.parametrize(
    ("device", "files", "programs", "expected"),
    [
        (None, (), (), "empty"),
        (None, ("/proc/driver/nvidia/version",), (), "cuda"),
        (None, (), ("nvidia-smi",), "cuda"),
        ("empty", (), ("nvidia-smi",), "empty"),
        ("cuda", (), (), "cuda"),
        (None, ("/dev/kfd",), (), "no ROCm wheel"),
        (None, (), ("rocminfo",), "no ROCm wheel"),
        ("rocm", (), (), "no ROCm wheel"),
        ("tpu", (), (), "VLLM_TARGET_DEVICE=tpu"),
    ],
)
def test_the_machine_picks_the_kind_of_wheel(
    monkeypatch, capsys, device, files, programs, expected
):
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    if device:
        monkeypatch.setenv("VLLM_TARGET_DEVICE", device)
    monkeypatch.setattr(wheels.Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: name in programs or None)
    if expected in wheels.TARGETS:
        assert wheels.detect_target() == expected
        guessed = expected == "empty" and device is None
        hint = "--target cuda, or VLLM_TARGET_DEVICE=cuda"
        assert (hint in capsys.readouterr().err) == guessed
    else:
        with pytest.raises(PatchError, match=expected):
            wheels.detect_target()


def test_pip_install_makes_the_wheel_of_the_chosen_release(
    release, tmp_path, monkeypatch
):
    made = []

    def fake(release, out, *, target):
        made.append((release.version, target))
        return out / "made.whl"

    monkeypatch.setattr(wheels, "build_wheel", fake)
    monkeypatch.setenv("VLLM_BASE", str(release.version))
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "empty")
    assert build.build_wheel(str(tmp_path)) == "made.whl"
    assert made == [(release.version, "empty")]


def test_pip_install_on_a_full_disk_says_so(tmp_path, monkeypatch):
    def fake(release, out, *, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(out))

    monkeypatch.setattr(wheels, "build_wheel", fake)
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "empty")
    with pytest.raises(SystemExit, match="error: .*No space left on device: "):
        build.build_wheel(str(tmp_path))


def test_pip_install_of_an_unsupported_release_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_BASE", "0.12.0")
    with pytest.raises(SystemExit, match="vLLM 0.12.0 is not supported; supported: "):
        build.build_wheel(str(tmp_path))
