# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the release data promises, checked against each release's own sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

from patchset.apply import plan_apply
from patchset.overlay import added_files
from patchset.releases import ROOT, supported
from patchset.trees import find_tree


def test_one_release_is_the_default_and_it_is_the_newest():
    assert [release.default for release in supported()].count(True) == 1
    assert supported()[0].default


def test_every_file_is_pinned(release):
    assert release.sdist == f"vllm-{release.version}.tar.gz"
    machines = {name.rpartition("_")[2] for name in release.wheels}
    assert len(release.wheels) == len(machines) == 2
    assert all(len(digest) == 64 for digest in release.files.values())


def test_every_edit_says_why(release):
    assert all(len(edit.reason) > 20 for edit in release.edits)


def test_moved_modules_are_not_mentioned_by_their_old_names(release):
    for old in release.relocate:
        assert any(
            c.path.startswith(f"{release.relocate[old]}/")
            for c in (added_files(release))
        )
        for change in added_files(release):
            text = change.content.decode()
            assert not change.path.startswith(old)
            assert old not in text, change.path
            assert old.replace("/", ".") not in text, change.path


def test_the_tools_own_tests_stay_here(release):
    assert (ROOT / "tests/patchset/conftest.py").exists()
    assert not [c for c in added_files(release) if "patchset" in c.path]


PROPOSERS = {
    "0.13.0": "vllm/v1/spec_decode/eagle.py",
    "0.33.0": "vllm/v1/spec_decode/llm_base_proposer.py",
}


def test_draft_models_on_rocm_know_conchs_metadata(full_tree, release):
    """It is on the list of types before the list is turned into a tuple."""
    plan_apply(find_tree(full_tree), release).execute()
    module = ast.parse((full_tree / PROPOSERS[str(release.version)]).read_text())
    (branch,) = (
        node
        for node in ast.walk(module)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "current_platform.is_rocm()"
        and "rocm_types" in ast.unparse(node)
    )
    *_, imported, appended, made = map(ast.unparse, branch.body)
    backend = "vllm.v1.attention.backends.conch_attn"
    assert imported == f"from {backend} import ConchAttentionMetadata"
    assert appended == "rocm_types.append(ConchAttentionMetadata)"
    assert made == "self.allowed_attn_types = tuple(rocm_types)"


def test_added_files_import_what_the_release_has(full_tree, release):
    """Every `from vllm... import name` of the overlay finds its name."""
    plan_apply(find_tree(full_tree), release).execute()
    missing = []
    for change in added_files(release):
        # Benchmarks ask for other backends too, and do without those a release lacks.
        if not change.path.endswith(".py") or change.path.startswith("benchmarks/"):
            continue
        for module, name in imported_names(change.content.decode()):
            if not provides(full_tree, module, name):
                missing.append(f"{change.path}: from {module} import {name}")
    assert missing == []


def imported_names(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of the absolute imports from vllm."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            if module.split(".")[0] == "vllm":
                yield from ((module, alias.name) for alias in node.names)


def provides(tree: Path, module: str, name: str) -> bool:
    """Whether a module of the tree has a name, as far as its text tells."""
    base = tree / module.replace(".", "/")
    if (base / f"{name}.py").exists() or (base / name).is_dir():
        return True
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.exists():
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = {n for node in nodes for n in defined_names(node)}
            if name in names or "__getattr__" in names:
                return True
            package = module if path.stem == "__init__" else module.rpartition(".")[0]
            return any(
                provides(tree, f"{package}.{node.module}", name)
                for node in nodes
                if isinstance(node, ast.ImportFrom)
                and node.level == 1
                and node.names[0].name == "*"
            )
    return False


def defined_names(node: ast.AST) -> Iterator[str]:
    """The names that a statement may define."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            yield from ((alias.asname or alias.name) for alias in names)
        case ast.Name(id=name, ctx=ast.Store()):
            yield name


def test_the_search_for_imports_tells_the_difference(pristine, release):
    tree = pristine(release)
    assert provides(tree, "vllm.logger", "init_logger")
    assert not provides(tree, "vllm.logger", "no_such_name")
    assert not provides(tree, "vllm.no_such_module", "init_logger")
