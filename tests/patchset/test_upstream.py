# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""tools/upstream_tests.py: what runs is complete, and a run cannot pass unproven."""

import json
import shutil
import subprocess
import sys

import pytest

from patchset.edits import EditError
from patchset.errors import PatchError
from patchset.releases import ROOT, supported
from tools.upstream_tests import (
    byte_tokenizer,
    check_lists,
    edited,
    load,
    runs_of,
    with_imports,
)

TEST = "import pytest\n\nBACKENDS = ['TRITON_ATTN']\n"


@pytest.fixture
def tree(tmp_path):
    files = {
        "tests/attention/test_a.py": TEST + "from ..tools import one\n",
        "tests/attention/__init__.py": "",
        "tests/conftest.py": "from tests.tools.two import fixture\n",
        "tests/tools/one.py": "",
        "tests/tools/two.py": "",
        "tests/tools/three.py": "",
        "tests/other/test_b.py": "TRITON_ATTN = 1\n",
        "tests/other/test_c.py": "from beside import one\nimport beneath, three\n",
        "tests/other/beside.py": "",
        "tests/other/beneath.py": "",
    }
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def lists(running=("tests/attention/test_a.py",), left_out=("tests/other/*_b.py",)):
    return {
        "watched": ["tests/attention/test_*.py"],
        "mentions": "TRITON_ATTN",
        "files": [{"path": path} for path in running],
        "left_out": [{"files": list(left_out), "reason": "none"}],
    }


def test_complete_lists(tree):
    check_lists(tree, lists())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left_out": ()}, "does not know: tests/other/test_b.py"),
        ({"running": ()}, "does not know: tests/attention/test_a.py"),
        ({"left_out": ("tests/other/*",)}, None),
        ({"left_out": ("tests/*/test_b.py", "tests/gone.py")}, "no such test"),
        ({"left_out": ("tests/*/test_[ab].py",)}, "left out, but it runs"),
    ],
)
def test_incomplete_lists(tree, changes, message):
    if message is None:
        check_lists(tree, lists(**changes))
        return
    with pytest.raises(PatchError, match=message):
        check_lists(tree, lists(**changes))


def test_edits_are_for_a_device_and_have_to_match(tree):
    edit = {
        "reason": "none",
        "device": "cpu",
        "where": "instead",
        "anchor": "BACKENDS = ...",
        "insert": "BACKENDS = ['CONCH']",
    }
    file = {"path": "tests/attention/test_a.py", "edits": [edit]}
    assert "TRITON_ATTN" in edited(tree, file, "gpu")
    assert "TRITON_ATTN" not in edited(tree, file, "cpu")
    edit["anchor"] = "GONE = ..."
    with pytest.raises(EditError, match="test_a.py.*`GONE = ...`.* matched 0 times"):
        edited(tree, file, "cpu")


def test_what_a_test_imports_comes_with_it(tree):
    path = "tests/attention/test_a.py"
    texts = with_imports(tree, {path: (tree / path).read_text()})
    assert sorted(texts) == [
        "tests/attention/__init__.py",
        path,
        "tests/conftest.py",
        "tests/tools/one.py",
        "tests/tools/two.py",
    ]


def test_a_test_outside_a_package_imports_what_is_beside_it(tree):
    path = "tests/other/test_c.py"
    texts = with_imports(tree, {path: (tree / path).read_text()})
    found = [text for text in sorted(texts) if text.startswith("tests/other/")]
    assert found == ["tests/other/beneath.py", "tests/other/beside.py", path]


def test_a_file_can_have_a_process_alone():
    data = {"files": [{"path": "a"}, {"path": "b", "alone": True}, {"path": "c"}]}
    assert runs_of(["a", "b", "c"], data) == ["a c", "b"]
    assert runs_of(["a", "c"], data) == ["a c"]


def test_the_tokenizer_has_a_token_for_every_byte():
    vocabulary = byte_tokenizer()["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
    known = {"a": 97, "Ġ": 32, "Ċ": 10, "é": 233}  # GPT-2's for b"a", b" ", b"\n"
    assert vocabulary | known == vocabulary


@pytest.mark.parametrize("release", supported(), ids=lambda r: str(r.version))
def test_every_edit_and_every_file_left_out_has_its_reason(release):
    data = load(release)
    entries = list(data["left_out"])
    for file in data["files"]:
        entries += file.get("edits", []) + file.get("left_out", [])
        assert file.get("unchanged") or file["conch"], file["path"]
    assert all(entry["reason"].strip() for entry in entries)


STUBS = {
    "torch/__init__.py": "float32 = 0\n"
    "set_default_device = set_default_dtype = print\n",
    "torch/overrides.py": "class TorchFunctionMode:\n"
    "    __enter__ = __exit__ = lambda *_: None\n",
    "vllm/attention/ops/conch/launch.py": "class BoundLaunch:\n"
    "    def __call__(self): ...\n",
    "vllm/v1/attention/backends/conch_attn.py": "class ConchBackendBase: ...\n"
    "class ConchAttentionBackend:\n"
    "    get_name = staticmethod(lambda: 'CONCH')\n"
    "class ConchAttentionMetadataBuilder:\n"
    "    def build(self): ...\n",
    "test_a.py": "import pytest\n"
    "from vllm.attention.ops.conch.launch import BoundLaunch\n"
    "@pytest.mark.parametrize('reaches', [False, True])\n"
    "def test_conch(reaches):\n"
    "    if reaches: BoundLaunch()()\n",
}


@pytest.mark.parametrize("workers", ["0", "1"])  # 1: of pytest-xdist
@pytest.mark.parametrize(
    ("cases", "left_out", "message"),
    [
        ("True", [], None),
        ("False", [], "CONCH was not reached: test_a.py::test_conch"),
        ("neither", [], "CONCH was not reached: test_a.py::test_conch"),
        (None, [], "neither among the tests that run nor left out"),
        (True, [{"test": "test_conch", "case": "True"}], "CONCH was not reached"),
        (True, [{"test": "test_gone"}], "no case matches"),
    ],
)
def test_a_run_without_conch_fails(tmp_path, cases, left_out, message, workers):
    shutil.copy(ROOT / "tools" / "upstream" / "conch_plugin.py", tmp_path)
    for path, text in STUBS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    chosen = {
        "conch": {} if cases is None else {"test_conch": cases},
        "left_out": [entry | {"reason": "none"} for entry in left_out],
        "unchanged": False,
    }
    selection = {"device": "cpu", "files": {"test_a.py": chosen}}
    (tmp_path / "selection.json").write_text(json.dumps(selection))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p conch_plugin\n")
    command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "test_a.py"]
    command += ["-n", workers]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    output = run.stdout + run.stderr
    assert (run.returncode == 0) == (message is None), output
    assert message is None or message in output
