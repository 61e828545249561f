"""The demo, run as a user runs it, and its verdict on tokens."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from demo import PROMPTS, Result  # noqa: E402


def test_demo_generates_with_conch_what_hugging_face_generates():
    run = subprocess.run(
        [sys.executable, str(HERE / "demo.py"), "--max-tokens", "24"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "CONCH in 3 layers" in run.stdout
    assert f"{len(PROMPTS)} of {len(PROMPTS)} continuations equal" in run.stdout
    words = "river lamp owl harbour kite forest ring."
    assert f"Say it again: {words} {words}" in run.stdout
    assert "What is 17 plus 8? 17 plus 8 is 25." in run.stdout


@pytest.mark.parametrize(
    "got, expected, agreeing, equal",
    [
        ([1, 2, 3], [1, 2, 3], 3, True),
        ([1, 2, 3], [1, 9, 3], 1, False),
        ([1, 2], [1, 2, 3], 2, False),
        ([], [4], 0, False),
    ],
)
def test_result_compares_token_by_token(got, expected, agreeing, equal):
    result = Result("prompt", "text", got, expected)
    assert result.agreeing == agreeing
    assert result.equal is equal
