# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Edits: what an anchor matches, what an edit leaves alone, and how one fails."""

import re

import pytest

from patchset.edits import Edit, EditError, apply_edits

SOURCE = '''\
"""A module."""
import enum  # kept


class Names( enum.Enum ):   # odd   spacing, kept
    A = "a"
    # about CUSTOM
    CUSTOM = ""


class Other:
    def choose(self, name):
        if name is   None:
            return 1

        # explicit
        if (name ==
                "b"):
            return 2
        elif name == "c":
            return 3
        return 0


table: dict[str, int] = {
    # about one
    "one": 1,
    # about two
    "two": 2,
}
'''


def edit(**changes) -> Edit:
    """An edit with the uninteresting parts filled in."""
    return Edit(**{"name": "test", "file": "f.py", "reason": "test", **changes})


def inserted(after: str, text: str) -> str:
    """The source with text put after a line that occurs once."""
    assert SOURCE.count(after) == 1
    return SOURCE.replace(after, after + text)


def test_inserts_a_member_before_the_comment_of_the_next():
    result = apply_edits(
        SOURCE,
        [edit(scope="Names", where="before", anchor="CUSTOM = ...", insert='B = "b"')],
    )
    assert result == inserted('    A = "a"\n', '    B = "b"\n')


def test_anchor_ignores_formatting_bodies_and_else_branches():
    result = apply_edits(
        SOURCE,
        [
            edit(
                scope="Other.choose",
                where="before",
                anchor="if name == 'b': ...",
                insert="\n# new\nif name == 'z':\n    return 26\n",
            )
        ],
    )
    new = "\n        # new\n        if name == 'z':\n            return 26\n"
    assert result == inserted("            return 1\n", new)


def test_inserts_an_entry_and_leaves_the_comments_with_theirs():
    result = apply_edits(
        SOURCE,
        [
            edit(
                scope="table",
                kind="key",
                anchor="one",
                insert='\n    # about three\n    "three": 3,\n',
            )
        ],
    )
    assert result == inserted('    "one": 1,\n', '    # about three\n    "three": 3,\n')


def test_an_entry_may_come_last():
    result = apply_edits(
        SOURCE,
        [edit(scope="table", kind="key", anchor="two", insert='    "three": 3,')],
    )
    assert result == inserted('    "two": 2,\n', '    "three": 3,\n')


@pytest.mark.parametrize("where", ["before", "after", "instead"])
def test_empty_lines_between_statements_stay_empty(where):
    new = "\nimport one\n\n# two\n\nimport two\n"
    result = apply_edits(
        SOURCE,
        [
            edit(
                scope="Other.choose",
                where=where,
                anchor="if name is None: ...",
                insert=new,
            )
        ],
    )
    assert "\n\n        import one\n\n        # two\n\n        import two\n" in result
    assert not re.search(r"[ \t]$", result, re.MULTILINE)


def test_code_may_take_the_anchors_place():
    result = apply_edits(
        SOURCE,
        [
            edit(
                scope="Other.choose",
                where="instead",
                anchor="if name is None: ...",
                insert="# new\nif not name:\n    return 26\n",
            )
        ],
    )
    old = "        if name is   None:\n            return 1\n"
    new = "        # new\n        if not name:\n            return 26\n"
    assert SOURCE.count(old) == 1
    assert result == SOURCE.replace(old, new)


def test_comments_above_the_anchor_stay_when_it_is_replaced():
    result = apply_edits(
        SOURCE,
        [edit(scope="Names", where="instead", anchor="CUSTOM = ...", insert="B = 1")],
    )
    assert result == SOURCE.replace('CUSTOM = ""', "B = 1")


def test_inserts_at_every_match_it_expects():
    result = apply_edits(
        "x = 1\ny = 2\nx = 3\n", [edit(anchor="x = ...", insert="z = 0", count=2)]
    )
    assert result == "x = 1\nz = 0\ny = 2\nx = 3\nz = 0\n"


def test_takes_the_place_of_the_anchor():
    result = apply_edits(
        "x = 1\nif x:\n    x = 2\n",
        [edit(anchor="if x: ...", insert="x = 3", where="instead")],
    )
    assert result == "x = 1\nx = 3\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchor": "GONE = ..."}, "anchor `GONE = ...` in `Names` matched 0 times"),
        (
            {"scope": "Other.choose", "anchor": "return ..."},
            "anchor `return ...` in `Other.choose` matched 4 times, expected 1",
        ),
        ({"scope": "Nobody"}, "scope `Nobody` was found 0 times"),
        ({"insert": 'A = "other value"'}, "`A = 'a'` is there already"),
        (
            {"scope": "table", "kind": "key", "anchor": "four", "insert": '"x": 0,'},
            "anchor `four` in `table` matched 0 times, expected 1",
        ),
        (
            {"scope": "table", "kind": "key", "anchor": "one", "insert": '"two": 0,'},
            "`two` is there already",
        ),
        (
            {"scope": "Names", "kind": "key", "anchor": "A", "insert": '"x": 0,'},
            "`Names` is no dict display",
        ),
    ],
)
def test_a_broken_premise_is_an_error_that_names_the_edit(changes, message):
    usual = {"scope": "Names", "anchor": "CUSTOM = ...", "insert": 'B = "b"'}
    with pytest.raises(EditError) as caught:
        apply_edits(SOURCE, [edit(**{**usual, **changes})])
    assert str(caught.value).startswith("f.py: edit 'test': ")
    assert message in str(caught.value)


def test_a_file_that_is_no_python_is_an_error():
    with pytest.raises(EditError, match="f.py: edit 'test': .* no valid Python"):
        apply_edits("def broken(:\n", [edit(anchor="x = ...", insert="y = 1")])
