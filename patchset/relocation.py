# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rewrites overlay files for a release in which modules lie elsewhere.

Two maps, both from `release.toml`:

    relocate  "vllm/attention/ops/conch" = "vllm/v1/attention/ops/conch"
              a folder of the overlay lands there, and every mention of it follows:
              imports, dotted strings (monkeypatch targets), comments, paths.
    imports   "vllm.attention.layer:Attention" = "vllm.model_executor.layers.attention"
              one name is imported from another module; `module:*` maps the rest.

A rewritten file has its imports sorted and is formatted again, as upstream's hooks
want it.
"""

import re
import subprocess
import sys
from collections.abc import Mapping

import libcst as cst
from libcst.helpers import get_full_name_for_node_or_raise

from patchset.errors import PatchError

_RUFF_OPTIONS = ("--isolated", "--line-length=88", "--quiet")
_RUFF_FIRST_PARTY = ("--config", 'lint.isort.known-first-party=["vllm","tests"]')


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

    def text(self, path: str, text: str) -> str:
        """What a file of the overlay becomes."""
        result = text
        for pattern, new in self._mentions:
            result = pattern.sub(new, result)
        if path.endswith(".py"):
            result = self._rewrite_imports(result)
            if result != text:
                result = _tidy(path, result)
        return result

    def _rewrite_imports(self, text: str) -> str:
        module = cst.parse_module(text)
        return module.visit(_ImportRewriter(self)).code

    def _module_of(self, module: str, name: str) -> str:
        """The module that a name imported from `module` comes from."""
        for old, new in self.paths.items():
            if f"{module}.{name}".replace(".", "/") == old:
                return new.replace("/", ".").removesuffix(f".{name}")
        return self.imports.get(
            f"{module}:{name}", self.imports.get(f"{module}:*", module)
        )


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
            target = self.relocation._module_of(module, name)
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


def _tidy(path: str, text: str) -> str:
    """Sort the imports and format, as upstream's hooks do."""
    commands = (
        ["check", "--select=I", "--fix", *_RUFF_FIRST_PARTY],
        ["format"],
    )
    for command in commands:
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *_RUFF_OPTIONS]
            + [f"--stdin-filename={path}", "-"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise PatchError(
                f"{path}: ruff {command[0]} failed after the imports were rewritten: "
                f"{result.stderr.strip() or result.stdout.strip()}"
            )
        text = result.stdout
    return text
