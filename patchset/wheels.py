# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Wheels of a vLLM with CONCH; neither kind needs a compiler.

`cuda`   the official wheel for NVIDIA GPUs with CONCH's files in it. The compiled parts
         are copied as they are, not even unpacked.
`empty`  vLLM's Python alone, built from the patched sdist (upstream calls that target
         `empty`): for machines without a GPU, where Triton's interpreter runs CONCH.

There is no official ROCm wheel on the package index: there, build a patched tree.
"""

import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.utils import parse_wheel_filename

from patchset.apply import plan_apply, update_record
from patchset.errors import PatchError
from patchset.index import fetch, unpack_sdist
from patchset.overlay import added_files, edited_files
from patchset.releases import Release
from patchset.trees import find_tree
from patchset.version import combined_version

TARGETS = ("cuda", "empty")


def detect_target() -> str:
    """What to build on this machine.

    VLLM_TARGET_DEVICE decides if it is set, as in vLLM's own build; otherwise an NVIDIA
    GPU means `cuda`, and a machine without any GPU `empty`, with a warning on stderr.

    Raises:
        PatchError: the machine takes neither.

    """
    target = os.environ.get("VLLM_TARGET_DEVICE", "").lower()
    if not target:
        if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
            target = "cuda"
        elif Path("/dev/kfd").exists() or shutil.which("rocminfo"):
            target = "rocm"
        else:
            target = "empty"
            print(
                "warning: no NVIDIA GPU is visible here: this wheel has Python alone, "
                "without vLLM's kernels, and does not run on a GPU. For NVIDIA GPUs "
                "give --target cuda, or VLLM_TARGET_DEVICE=cuda for `pip install .`; "
                "VLLM_TARGET_DEVICE=empty says that this is meant",
                file=sys.stderr,
            )
    if target == "rocm":
        raise PatchError(
            "vLLM has no ROCm wheel on the package index. Make a patched source tree "
            "with `python -m patchset tree VERSION DEST` and build it as vLLM's "
            "documentation says for ROCm"
        )
    if target not in TARGETS:
        raise PatchError(
            f"VLLM_TARGET_DEVICE={target}: wheels are made for "
            f"{' and '.join(TARGETS)}; for others build a tree made with "
            "`python -m patchset tree VERSION DEST`"
        )
    return target


def build_wheel(
    release: Release, out: Path, *, target: str, machine: str | None = None
) -> Path:
    """Make a wheel of vLLM with CONCH.

    Args:
        release: the vLLM release.
        out: folder for the wheel, which is there.
        target: one of `TARGETS`.
        machine: `x86_64` or `aarch64`, for `cuda`; None means this machine.

    Returns:
        The wheel.

    """
    if not sys.platform.startswith("linux"):
        raise PatchError(f"vLLM's wheels are for Linux, and this is {sys.platform}")
    if target == "empty":
        return build_empty(release, out)
    machine = machine or platform.machine()
    for name in release.wheels:
        if name.endswith(f"_{machine}.whl"):
            return patch_wheel(release, fetch(release, name), out)
    raise PatchError(
        f"vLLM {release.version} has no official wheel for {machine}, only "
        f"{', '.join(release.wheels)}; --target empty makes one without kernels"
    )


# The official wheel -------------------------------------------------------------


def patch_wheel(release: Release, source: Path, out: Path) -> Path:
    """Make a copy of an official wheel with CONCH in it.

    Args:
        release: the wheel's release.
        source: the wheel.
        out: folder for the new wheel.

    Returns:
        The new wheel: version `<release>+conch<ours>`, tags as before.

    """
    name, base, build, _ = parse_wheel_filename(source.name)
    if base != release.version or build:
        raise PatchError(f"{source.name} is no official vLLM {release.version} wheel")
    version = combined_version(base)
    old_info = f"{name}-{base}.dist-info"
    new_info = f"{name}-{version}.dist-info"
    target = out / source.name.replace(f"-{base}-", f"-{version}-", 1)
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(source) as old:
        members = {info.filename: info for info in old.infolist()}

        def read(path: str) -> bytes | None:
            return old.read(path) if path in members else None

        changes = added_files(release, package_only=True)
        if taken := [change.path for change in changes if change.path in members]:
            raise PatchError(f"{source.name} has {', '.join(taken)} already")
        changes += edited_files(release, read)
        content = {change.path: change.content for change in changes}
        content["vllm/_version.py"] = _replace_once(
            read("vllm/_version.py"), f"'{base}'", f"'{version}'", "vllm/_version.py"
        )
        metadata = f"{old_info}/METADATA"
        content[f"{new_info}/METADATA"] = _replace_once(
            read(metadata), f"\nVersion: {base}\n", f"\nVersion: {version}\n", metadata
        )
        record = (read(f"{old_info}/RECORD") or b"").decode()
        record = re.sub(rf"^{re.escape(old_info)}/", f"{new_info}/", record, flags=re.M)
        content[f"{new_info}/RECORD"] = update_record(record.encode(), content)
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as new:
                for info in old.infolist():
                    path = info.filename
                    if path.startswith(f"{old_info}/"):
                        path = new_info + path.removeprefix(old_info)
                    if path in content:
                        _add(new, path, content.pop(path), info)
                    else:
                        _copy_compressed(old, new, info, path)
                for path in sorted(content):
                    _add(new, path, content[path], None)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _replace_once(content: bytes | None, old: str, new: str, path: str) -> bytes:
    text = (content or b"").decode()
    if (count := text.count(old)) != 1:
        raise PatchError(f"{path}: {old.strip()!r} occurs {count} times, expected 1")
    return text.replace(old, new).encode()


def _add(
    new: zipfile.ZipFile, path: str, content: bytes, like: zipfile.ZipInfo | None
) -> None:
    """Add a file, with the time and mode of the one it replaces."""
    info = zipfile.ZipInfo(path, like.date_time if like else (1980, 1, 1, 0, 0, 0))
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = like.external_attr if like else (stat.S_IFREG | 0o644) << 16
    new.writestr(info, content)


def _copy_compressed(
    old: zipfile.ZipFile, new: zipfile.ZipFile, info: zipfile.ZipInfo, path: str
) -> None:
    """Copy a member without unpacking it, which a wheel of this size is slow to do.

    zipfile has no public way; this uses its file object and its list of members.
    """
    assert old.fp is not None and new.fp is not None
    old.fp.seek(info.header_offset)
    header = old.fp.read(30)
    # The local header's own name and extra field are what separates it from the data.
    start = 30 + int.from_bytes(header[26:28], "little")
    start += int.from_bytes(header[28:30], "little")
    old.fp.seek(info.header_offset + start)

    copy = zipfile.ZipInfo(path, info.date_time)
    copy.compress_type = info.compress_type
    copy.external_attr = info.external_attr
    copy.create_system = info.create_system
    copy.CRC = info.CRC
    copy.compress_size = info.compress_size
    copy.file_size = info.file_size
    copy.header_offset = new.fp.tell()
    new.fp.write(copy.FileHeader())
    remaining = info.compress_size
    while remaining:
        chunk = old.fp.read(min(remaining, 1 << 20))
        if not chunk:
            raise PatchError(f"{old.filename}: {info.filename} is cut short")
        new.fp.write(chunk)
        remaining -= len(chunk)
    new.filelist.append(copy)
    new.NameToInfo[path] = copy
    new.start_dir = new.fp.tell()
    new._didModify = True  # type: ignore[attr-defined]


# The pure-Python wheel ----------------------------------------------------------

# vLLM's setup.py imports torch, only to ask which device it was built for. This answers
# "none", so that building takes no torch.
_TORCH_STUB = {
    "torch/__init__.py": "from torch import version\n__version__ = '0'\n",
    "torch/version.py": "cuda = hip = xpu = None\n",
    "torch/utils/__init__.py": "",
    "torch/utils/cpp_extension.py": "CUDA_HOME = ROCM_HOME = None\n",
}


def build_empty(release: Release, out: Path) -> Path:
    """Build vLLM's Python, without kernels, from the patched sdist.

    Args:
        release: the vLLM release.
        out: folder for the wheel.

    Returns:
        The wheel: version `<release>+conch<ours>.empty`, for any machine.

    """
    with tempfile.TemporaryDirectory(prefix="conch-") as folder:
        work = Path(folder)
        tree, stub, built = work / "tree", work / "stub", work / "built"
        unpack_sdist(release, tree)
        plan_apply(find_tree(tree), release).execute()
        for name, text in _TORCH_STUB.items():
            (stub / name).parent.mkdir(parents=True, exist_ok=True)
            (stub / name).write_text(text)
        path = os.pathsep.join(filter(None, [str(stub), os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "VLLM_TARGET_DEVICE": "empty",
            "SETUPTOOLS_SCM_PRETEND_VERSION": str(combined_version(release.version)),
            "CARGO": "false",  # no Rust front end; vLLM does without
        }
        build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
        _run([sys.executable, "-P", "-c", build, str(built)], tree, environment)
        (wheel,) = built.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            if compiled := [n for n in archive.namelist() if n.endswith(".so")]:
                raise PatchError(f"{wheel.name} has compiled parts: {compiled}")
        # setup.py declares extensions that this target leaves out, and so names one
        # Python and machine; the content runs on any.
        tags = ["--python-tag=py3", "--abi-tag=none", "--platform-tag=any", "--remove"]
        _run([sys.executable, "-m", "wheel", "tags", *tags, wheel.name], built)
        (wheel,) = built.glob("*.whl")
        return Path(shutil.move(wheel, out / wheel.name))


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None):
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = result.stdout.strip().splitlines()[-15:]
        raise PatchError(
            "building the pure-Python wheel failed; it takes the packages in "
            "requirements/tool.txt. Its last lines:\n" + "\n".join(lines)
        )
