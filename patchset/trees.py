# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the user pointed at: a checkout, an unpacked sdist or an installed vLLM."""

import ast
import dataclasses
import email.parser
import re
import subprocess
from pathlib import Path

from packaging.version import InvalidVersion, Version

from patchset.errors import PatchError


@dataclasses.dataclass(frozen=True)
class Tree:
    """A vLLM on disk.

    Attributes:
        root: the folder that holds `vllm/`.
        dist_info: the installed package's metadata folder; None for a source tree.
        version: the version found, local part included.
        evidence: where the version was found, for messages.
        contradiction: what the tree's metadata says where that is another release
            than the user's; empty otherwise.

    """

    root: Path
    dist_info: Path | None
    version: Version
    evidence: str
    contradiction: str = ""

    @property
    def installed(self) -> bool:
        """Whether this is an installed package, not a source tree."""
        return self.dist_info is not None

    @property
    def state_dir(self) -> Path:
        """Where the record of what was applied lies."""
        return (self.dist_info or self.root) / ("conch" if self.installed else ".conch")


def find_tree(path: Path, version: str | None = None) -> Tree:
    """Recognise a vLLM tree.

    Args:
        path: a checkout, an unpacked sdist, a site-packages folder, or the package
            folder `vllm` inside any of them.
        version: what the user says the version is; None to find out.

    Raises:
        PatchError: there is no vLLM at `path`, or its version cannot be told.

    """
    path = path.expanduser().absolute()
    for root in (path, path.parent if path.name == "vllm" else path):
        if (root / "vllm" / "__init__.py").is_file():
            break
    else:
        raise PatchError(
            f"{path} holds no vLLM: give a checkout, an unpacked sdist, a "
            "site-packages folder with vllm in it, or the vllm package folder itself"
        )
    if (root / "pyproject.toml").is_file() or (root / "setup.py").is_file():
        found = [_from_pkg_info(root), _from_git(root), _from_version_file(root)]
        dist_info = None
    else:
        dist_info = _dist_info(root)
        found = [_from_metadata(dist_info / "METADATA", "installed metadata")]
    stated = found[0]
    if version is not None:
        found = [(version, "--release")]
    for text, evidence in filter(None, found):
        try:
            contradiction = _contradiction(stated, Version(text))
            return Tree(root, dist_info, Version(text), evidence, contradiction)
        except InvalidVersion as error:
            raise PatchError(f"{root}: '{text}' ({evidence}) is no version") from error
    # Such as who owns the checkout, and how git is told that this is fine.
    answer = _describe(root)
    told = f" (git: {' '.join(answer.stderr.split())})" if answer else ""
    raise PatchError(
        f"{root}: cannot tell vLLM's version: no PKG-INFO, no git tag v*{told}, no "
        "vllm/_version.py; name it with --release"
    )


def _contradiction(stated: tuple[str, str] | None, version: Version) -> str:
    """What the metadata says where it names another release.

    A development version names none: sources built without git's tags have one.
    """
    if stated is None:
        return ""
    text, evidence = stated
    try:
        found = Version(text)
    except InvalidVersion:
        return ""
    if found.is_devrelease or found.public == version.public:
        return ""
    return f"vLLM {found} by its {evidence}"


def _from_metadata(path: Path, evidence: str) -> tuple[str, str] | None:
    if not path.is_file():
        return None
    metadata = email.parser.HeaderParser().parsestr(path.read_text("utf-8"))
    return (metadata["Version"], evidence) if metadata["Version"] else None


def _from_pkg_info(root: Path) -> tuple[str, str] | None:
    return _from_metadata(root / "PKG-INFO", "PKG-INFO")


def _from_git(root: Path) -> tuple[str, str] | None:
    """The newest release tag that HEAD contains; commits on top do not matter."""
    if (result := _describe(root)) is None:
        return None
    match = re.fullmatch(r"v(.+?)(-\d+-g[0-9a-f]+)?", result.stdout.strip())
    if result.returncode or not match:
        return None
    return match[1], f"git describe: {result.stdout.strip()}"


def _describe(root: Path) -> subprocess.CompletedProcess[str] | None:
    """What git says of a checkout; None where there is no git."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--tags", "--match", "v[0-9]*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None


def _from_version_file(root: Path) -> tuple[str, str] | None:
    path = root / "vllm" / "_version.py"
    if not path.is_file():
        return None
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if (
            isinstance(node, ast.Assign)
            and any(ast.unparse(target) == "__version__" for target in node.targets)
            and isinstance(node.value, ast.Constant)
        ):
            return str(node.value.value), "vllm/_version.py"
    return None


def _dist_info(root: Path) -> Path:
    found = sorted(root.glob("vllm-*.dist-info"))
    if len(found) != 1:
        raise PatchError(
            f"{root}: an installed vLLM has one vllm-*.dist-info beside it, found "
            f"{len(found)}: {', '.join(path.name for path in found) or 'none'}"
        )
    return found[0]
