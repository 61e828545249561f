# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rewrites overlay files for a release in which modules lie elsewhere.

Two maps, both from `release.toml`:

    relocate  "vllm/attention/ops/conch" = "vllm/v1/attention/ops/conch"
              a folder of the overlay lands there, and every mention of it follows:
              imports, dotted strings (monkeypatch targets), comments, paths.
    imports   "vllm.attention.layer:Attention" = "vllm.model_executor.layers.attention"
              one name is imported from another module; `module:*` maps the rest. To a
              `module:name` it is imported by that name.

A rewritten file has its imports sorted and is formatted again, as upstream's hooks
want it.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import libcst as cst
from libcst.helpers import get_full_name_for_node_or_raise
from ruff.__main__ import find_ruff_bin

from patchset.errors import PatchError

_RUFF_OPTIONS = (
    "--isolated",
    "--no-cache",
    "--quiet",
    "--config=line-length=88",
    '--config=lint.isort.known-first-party=["vllm", "tests"]',
)


class Relocation:
    """The module moves of one release."""

    def __init__(self, relocate: Mapping[str, str], imports: Mapping[str, str]):
        """Take the two maps of `release.toml`."""
        self.paths = dict(relocate)
        self.imports = dict(imports)
        self._mentions = [
            (re.compile(rf"(?<!\w){re.escape(old)}(?!\w)"), new)
            for path, target in relocate.items()
            for old, new in (
                (path, target),
                (path.replace("/", "."), target.replace("/", ".")),
            )
        ]

    def path(self, path: str) -> str:
        """Where a file of the overlay lands."""
        for old, new in self.paths.items():
            if path.startswith(old + "/"):
                return new + path[len(old) :]
        return path

    def texts(self, files: Mapping[str, str]) -> dict[str, str]:
        """What the files of the overlay become.

        Args:
            files: text of each file, by the path where it lands.

        """
        moved = {path: self._move(path, text) for path, text in files.items()}
        python = {
            path: text
            for path, text in moved.items()
            if path.endswith(".py") and text != files[path]
        }
        return moved | _tidy(python)

    def _move(self, path: str, text: str) -> str:
        for pattern, new in self._mentions:
            text = pattern.sub(new, text)
        if path.endswith(".py") and self._splits_imports(text):
            text = cst.parse_module(text).visit(_ImportRewriter(self)).code
        return text

    def _splits_imports(self, text: str) -> bool:
        """Whether single names of some import may come from elsewhere."""
        modules = {name.partition(":")[0] for name in self.imports}
        modules |= {path.rpartition("/")[0].replace("/", ".") for path in self.paths}
        return any(re.search(rf"\bfrom\s+{re.escape(m)}\s", text) for m in modules)

    def _source_of(self, module: str, name: str) -> tuple[str, str]:
        """Where a name imported from `module` comes from, and its name there."""
        for old, new in self.paths.items():
            if f"{module}.{name}".replace(".", "/") == old:
                return new.replace("/", ".").removesuffix(f".{name}"), name
        target = self.imports.get(
            f"{module}:{name}", self.imports.get(f"{module}:*", module)
        )
        source, _, new_name = target.partition(":")
        return source, new_name or name


class _ImportRewriter(cst.CSTTransformer):
    """Sends each imported name to its module, splitting statements if it must."""

    def __init__(self, relocation: Relocation):
        super().__init__()
        self.relocation = relocation

    def leave_SimpleStatementLine(self, original_node, updated_node):
        if len(updated_node.body) != 1:
            return updated_node
        statement = updated_node.body[0]
        if (
            not isinstance(statement, cst.ImportFrom)
            or statement.relative
            or statement.module is None
            or isinstance(statement.names, cst.ImportStar)
        ):
            return updated_node
        module = get_full_name_for_node_or_raise(statement.module)
        groups: dict[str, list[cst.ImportAlias]] = {}
        for alias in statement.names:
            name = get_full_name_for_node_or_raise(alias.name)
            target, new_name = self.relocation._source_of(module, name)
            if new_name != name:
                alias = _renamed(alias, new_name)
            groups.setdefault(target, []).append(alias)
        if list(groups) == [module]:
            return updated_node
        lines: list[cst.SimpleStatementLine] = []
        for target, names in groups.items():
            names[-1] = names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
            line = updated_node.with_changes(
                body=[
                    statement.with_changes(
                        module=cst.parse_expression(target), names=names
                    )
                ]
            )
            lines.append(line if not lines else line.with_changes(leading_lines=[]))
        return cst.FlattenSentinel(lines)


def _renamed(alias: cst.ImportAlias, name: str) -> cst.ImportAlias:
    """The same import where the name is another; what it is called here stays."""
    local = alias.evaluated_alias or alias.evaluated_name
    if local == name:
        return alias.with_changes(name=cst.Name(name), asname=None)
    asname = alias.asname or cst.AsName(cst.Name(local))
    return alias.with_changes(name=cst.Name(name), asname=asname)


def _tidy(files: Mapping[str, str]) -> dict[str, str]:
    """Sort the imports and format, as upstream's hooks do."""
    if not files:
        return {}
    with tempfile.TemporaryDirectory(prefix="conch-") as folder:
        for path, text in files.items():
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        for arguments in (["check", "--select=I", "--fix"], ["format"]):
            result = subprocess.run(
                [find_ruff_bin(), *arguments, *_RUFF_OPTIONS, "."],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            if result.returncode:
                raise PatchError(
                    f"ruff {arguments[0]} failed after the imports were rewritten:\n"
                    + (result.stderr.strip() or result.stdout.strip())
                )
        return {path: Path(folder, path).read_text() for path in files}
