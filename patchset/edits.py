# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Edits of upstream's Python files, on the syntax tree.

An edit inserts code beside an anchor, or puts it in its place. The anchor is itself
Python, in which `...` stands for anything: `CUSTOM = ...` is that assignment whatever
its value, and `if selected is None: ...` that branch whatever its body. Formatting and
comments do not matter to the match; everything else stays byte for byte.

An anchor must match as often as the edit says (once, unless it says otherwise). Any
other count means that upstream changed under the edit, and is an error.
"""

import ast
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import libcst as cst

from patchset.errors import PatchError


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change of one file.

    Attributes:
        name: short, for messages: what the edit does.
        file: path inside the vLLM tree.
        reason: why upstream's file has to change at all.
        anchor: statement pattern, or for `kind="key"` a key of a dict display.
        insert: the code to insert: statements, or for `kind="key"` dict entries.
        scope: dotted path of the class, function or (for keys) variable that holds
            the anchor; empty for the whole module.
        where: the side of the anchor on which the code goes; `instead`: the anchor
            makes way for it.
        kind: what the anchor is.
        count: how often the anchor has to match; the code goes to every match.

    """

    name: str
    file: str
    reason: str
    anchor: str
    insert: str
    scope: str = ""
    where: Literal["before", "after", "instead"] = "after"
    kind: Literal["statement", "key"] = "statement"
    count: int = 1


class EditError(PatchError):
    """An edit whose premise does not hold in the given file."""

    def __init__(self, edit: Edit, problem: str):
        """Name the edit before the problem."""
        super().__init__(f"{edit.file}: edit '{edit.name}': {problem}")


def apply_edits(source: str, edits: Sequence[Edit]) -> str:
    """Apply edits to the text of one file.

    Args:
        source: the file as upstream ships it.
        edits: the edits of this file, in order.

    Returns:
        The edited text.

    Raises:
        EditError: the text is no Python, an anchor matches another number of times
            than the edit expects, or the code is there already.

    """
    try:
        module = cst.parse_module(source)
    except cst.ParserSyntaxError as error:
        raise EditError(edits[0], f"the file is no valid Python: {error}") from error
    for edit in edits:
        module = _apply(module, edit)
    return module.code


def _apply(module: cst.Module, edit: Edit) -> cst.Module:
    scopes = list(_find_scopes(module, edit.scope.split(".") if edit.scope else []))
    if len(scopes) != 1:
        raise EditError(
            edit, f"scope `{edit.scope}` was found {len(scopes)} times, expected 1"
        )
    insert = _insert_entry if edit.kind == "key" else _insert_statements
    return insert(module, scopes[0], edit)


def _count_error(edit: Edit, found: int) -> EditError:
    place = f"`{edit.scope}`" if edit.scope else "the module"
    return EditError(
        edit,
        f"anchor `{edit.anchor.strip()}` in {place} matched {found} times, "
        f"expected {edit.count}",
    )


def _already_there(edit: Edit, what: str) -> EditError:
    return EditError(
        edit,
        f"`{what}` is there already: the tree was given CONCH by other means, "
        "start from the release's own files",
    )


# What libcst calls the compound statements of `ast`; all others are simple.
_KINDS = {
    ast.AsyncFor: "For",
    ast.AsyncFunctionDef: "FunctionDef",
    ast.AsyncWith: "With",
    ast.ClassDef: "ClassDef",
    ast.For: "For",
    ast.FunctionDef: "FunctionDef",
    ast.If: "If",
    ast.Match: "Match",
    ast.Try: "Try",
    ast.TryStar: "TryStar",
    ast.While: "While",
    ast.With: "With",
}

# Statements ---------------------------------------------------------------------


def _insert_statements(module: cst.Module, scope: cst.CSTNode, edit: Edit):
    anchor = _parse_one(edit.anchor)
    added = cst.parse_module(edit.insert, module.config_for_parsing)
    statements = [
        _with_lead_in(statement, statement.leading_lines) for statement in added.body
    ]
    # What is above the first one is the module's, to libcst.
    lead_in = [*added.header, *added.body[0].leading_lines]
    statements[0] = first = _with_lead_in(added.body[0], lead_in)
    new = _parse_one(module.code_for_node(first))
    if isinstance(new, ast.Assign | ast.AnnAssign):
        new.value = ast.Constant(...)  # there already, whatever its value
    targets = []
    for statement in _statements(scope, (anchor, new)):
        tree = _parse_one(module.code_for_node(statement))
        if _matches(anchor, tree):
            targets.append(statement)
        if edit.where != "instead" and _matches(new, tree):
            raise _already_there(edit, ast.unparse(tree).splitlines()[0])
    if len(targets) != edit.count:
        raise _count_error(edit, len(targets))

    class Insert(cst.CSTTransformer):
        def on_leave(self, original_node, updated_node):
            updated_node = super().on_leave(original_node, updated_node)
            if not any(original_node is target for target in targets):
                return updated_node
            if edit.where == "before":
                return cst.FlattenSentinel([*statements, updated_node])
            if edit.where == "instead":
                lines = [*updated_node.leading_lines, *first.leading_lines]
                head = first.with_changes(leading_lines=lines)
                return cst.FlattenSentinel([head, *statements[1:]])
            return cst.FlattenSentinel([updated_node, *statements])

    return module.visit(Insert())


def _with_lead_in(statement, lines: Sequence[cst.EmptyLine]):
    """The statement below these lines, of which the empty ones get no indentation."""
    lines = [ln if ln.comment else ln.with_changes(indent=False) for ln in lines]
    return statement.with_changes(leading_lines=lines)


def _statements(
    node: cst.CSTNode, patterns: Sequence[ast.AST]
) -> Iterator[cst.CSTNode]:
    """The statements inside a node, at any depth, that may match a pattern."""
    kinds = {_KINDS.get(type(pattern), "SimpleStatementLine") for pattern in patterns}
    for child in node.children:
        if type(child).__name__ in kinds:
            yield child
        yield from _statements(child, patterns)


def _parse_one(code: str) -> ast.AST:
    return ast.parse(code.strip()).body[0]


def _is_wildcard(node: object) -> bool:
    if isinstance(node, ast.Expr):
        node = node.value
    return isinstance(node, ast.Constant) and node.value is ...


def _matches(pattern: object, node: object) -> bool:
    """Whether a syntax tree is the pattern, where `...` stands for anything."""
    if _is_wildcard(pattern):
        return True
    if isinstance(pattern, list):
        if len(pattern) == 1 and _is_wildcard(pattern[0]):
            return True
        return (
            isinstance(node, list)
            and len(pattern) == len(node)
            and all(map(_matches, pattern, node))
        )
    if isinstance(pattern, ast.AST):
        if type(pattern) is not type(node):
            return False
        return all(
            _matches(value, getattr(node, field, None))
            for field, value in ast.iter_fields(pattern)
            # A branch without `else` and a function without decorators stand for
            # those with them: the anchor names only what it needs.
            if not (field in ("orelse", "decorator_list") and not value)
        )
    return pattern == node


def _find_scopes(node: cst.CSTNode, path: Sequence[str]) -> Iterator[cst.CSTNode]:
    """The classes, functions or assignments of a dotted path, at any block depth."""
    if not path:
        yield node
        return
    for child in node.children:
        if isinstance(child, cst.ClassDef | cst.FunctionDef):
            if child.name.value == path[0]:
                yield from _find_scopes(child, path[1:])
        elif len(path) == 1 and _assigned_name(child) == path[0]:
            yield child
        else:
            yield from _find_scopes(child, path)


def _assigned_name(node: cst.CSTNode) -> str | None:
    match node:
        case cst.AnnAssign(target=cst.Name(value=name), value=cst.BaseExpression()):
            return name
        case cst.Assign(targets=[cst.AssignTarget(target=cst.Name(value=name))]):
            return name
    return None


# Entries of a dict display ------------------------------------------------------


def _insert_entry(module: cst.Module, scope: cst.CSTNode, edit: Edit):
    if edit.where != "after":
        raise ValueError(f"edit '{edit.name}': entries are inserted after a key only")
    display = getattr(scope, "value", None)
    if not isinstance(display, cst.Dict):
        raise EditError(edit, f"`{edit.scope}` is no dict display")
    keys = [
        element.key.evaluated_value
        if isinstance(element, cst.DictElement)
        and isinstance(element.key, cst.SimpleString)
        else None
        for element in display.elements
    ]
    if keys.count(edit.anchor) != edit.count or edit.count != 1:
        raise _count_error(edit, keys.count(edit.anchor))
    # The comments above an entry belong, in libcst, to the comma before it. So the
    # new entry takes over the anchor's comma, and the anchor the new one's.
    added = cst.parse_expression(
        "{\n" + edit.insert.strip("\n") + "\n}", module.config_for_parsing
    )
    assert isinstance(added, cst.Dict)
    (entry,) = added.elements
    assert isinstance(entry, cst.DictElement)
    assert isinstance(entry.key, cst.SimpleString)
    if entry.key.evaluated_value in keys:
        raise _already_there(edit, str(entry.key.evaluated_value))
    index = keys.index(edit.anchor)
    anchor = display.elements[index]
    lead_in = added.lbrace.whitespace_after
    elements = [
        *display.elements[:index],
        anchor.with_changes(comma=cst.Comma(whitespace_after=lead_in)),
        entry.with_changes(comma=anchor.comma),
        *display.elements[index + 1 :],
    ]
    result = module.deep_replace(display, display.with_changes(elements=elements))
    assert isinstance(result, cst.Module)
    return result
