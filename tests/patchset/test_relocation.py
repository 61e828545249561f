# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Overlay files follow the modules of a release, and only where they must."""

import pytest

from patchset.relocation import Relocation

MOVED = Relocation({"vllm/attention/ops/conch": "vllm/v1/attention/ops/conch"}, {})


def moved(text: str, relocation: Relocation = MOVED) -> str:
    """What a Python file with this text becomes."""
    return relocation.texts({"vllm/x.py": text})["vllm/x.py"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "import vllm.attention.ops.conch.plan as plan\n",
            "import vllm.v1.attention.ops.conch.plan as plan\n",
        ),
        (
            "from vllm.attention.ops import conch\n",
            "from vllm.v1.attention.ops import conch\n",
        ),
        (
            "from vllm.attention.ops.conch import (\n    plan,\n    softmax,\n)\n",
            "from vllm.v1.attention.ops.conch import (\n    plan,\n    softmax,\n)\n",
        ),
        (
            'name = "vllm.attention.ops.conch.plan.sm_count"\n',
            'name = "vllm.v1.attention.ops.conch.plan.sm_count"\n',
        ),
        (
            "# see vllm/attention/ops/conch/plan.py\n",
            "# see vllm/v1/attention/ops/conch/plan.py\n",
        ),
    ],
)
def test_mentions_of_a_moved_folder_follow_it(before, after):
    assert moved(before) == after


@pytest.mark.parametrize(
    "text",
    [
        "from vllm.attention.ops.conchiolin import x\n",
        "from vllm.attention.ops import paged_attn\n",
        "from myvllm.attention.ops.conch import x\n",
        "from .plan import make_plan\n",
        "x   =  1  # not formatted, and not ours to format\n",
    ],
)
def test_everything_else_stays_byte_for_byte(text):
    assert moved(text) == text


def test_imports_are_sorted_and_formatted_again():
    before = (
        "from vllm.attention.ops.conch import varlen_attention\n"
        "from vllm.platforms import current_platform\n\n"
        "use(varlen_attention, current_platform)\n"
    )
    after = (
        "from vllm.platforms import current_platform\n"
        "from vllm.v1.attention.ops.conch import varlen_attention\n\n"
        "use(varlen_attention, current_platform)\n"
    )
    assert moved(before) == after


def test_names_are_imported_from_the_modules_that_have_them():
    relocation = Relocation(
        {}, {"vllm.a:One": "vllm.b", "vllm.a:Two": "vllm.b", "vllm.c:*": "vllm.d"}
    )
    before = (
        "from vllm.a import One, Three, Two as Zwei\n"
        "from vllm.c import Four\n\n"
        "use(One, Three, Zwei, Four)\n"
    )
    after = (
        "from vllm.a import Three\n"
        "from vllm.b import One\n"
        "from vllm.b import Two as Zwei\n"
        "from vllm.d import Four\n\n"
        "use(One, Three, Zwei, Four)\n"
    )
    assert moved(before, relocation) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("import language as gl", "import gl"),
        ("import language", "import gl as language"),
        ("import language as lang", "import gl as lang"),
    ],
)
def test_names_may_be_others_where_they_come_from(before, after):
    relocation = Relocation({}, {"triton.gluon:language": "vllm.triton_utils:gl"})
    text = moved(f"from triton.gluon {before}\n", relocation)
    assert text == f"from vllm.triton_utils {after}\n"


def test_files_land_in_the_moved_folder():
    assert MOVED.path("vllm/attention/ops/conch/plan.py") == (
        "vllm/v1/attention/ops/conch/plan.py"
    )
    assert MOVED.path("vllm/attention/ops/conchiolin.py") == (
        "vllm/attention/ops/conchiolin.py"
    )
