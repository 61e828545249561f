# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""pytest plugin for upstream's tests: which cases run, and which reached CONCH.

Goes into the folder that tools/upstream_tests.py makes, with selection.json beside it.
A run fails where a test that is to reach CONCH did not, in no case that passed, and
where upstream has tests, or selection.json patterns, that the other does not know.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

SELECTION = json.loads(Path(__file__).with_name("selection.json").read_text())
DEVICE, FILES = SELECTION["device"], SELECTION["files"]
problems: list[str] = []  # between upstream's tests and selection.json
reached = 0  # calls of CONCH's functions, all tests of this process together


def count_calls(owner: Any, name: str) -> None:
    function = vars(owner)[name]
    called: Callable = getattr(function, "__func__", function)

    @wraps(called)
    def counting(*arguments: Any, **keywords: Any) -> Any:
        global reached
        reached += 1
        return called(*arguments, **keywords)

    is_method = isinstance(function, classmethod | staticmethod)
    setattr(owner, name, type(function)(counting) if is_method else counting)


def pytest_sessionstart() -> None:
    from vllm.attention.ops.conch.launch import BoundLaunch
    from vllm.v1.attention.backends import conch_attn

    count_calls(BoundLaunch, "__call__")
    count_calls(conch_attn.ConchAttentionMetadataBuilder, "build")
    for owner in (conch_attn.ConchAttentionBackend, conch_attn.ConchBackendBase):
        for name, value in list(vars(owner).items()):
            if isinstance(value, classmethod | staticmethod):
                count_calls(owner, name)


def test_of(nodeid: str) -> tuple[str, str, str]:
    """File, test and case of a node id."""
    path, _, name = nodeid.partition("::")
    test, _, case = name.partition("[")
    return path, test, case.removesuffix("]")


class OnCpu(TorchFunctionMode):
    """Makes tensors on the CPU that a test asks to be on a GPU."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Choice:
    """What of a file runs here."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.data = FILES[path]
        self.used: set[int] = set()

    def left_out(self, nodeid: str) -> str | None:
        """Why a case does not run; None: it does."""
        _, test, case = test_of(nodeid)
        for index, entry in enumerate(self.data["left_out"]):
            if re.fullmatch(entry["test"], test) and re.search(
                entry.get("case", ""), case
            ):
                self.used.add(index)
                return entry["reason"]
        if self.data["unchanged"]:
            return None
        on_cpu = self.data["conch"].get(test)
        if on_cpu is None:
            problems.append(
                f"{self.path}: upstream's {test} is neither among the tests that run "
                "nor left out: add it to upstream.toml"
            )
            return "unknown"
        if DEVICE == "cpu" and not (
            re.search(on_cpu, case) if isinstance(on_cpu, str) else on_cpu
        ):
            return "only on a GPU"
        return None

    def check(self) -> None:
        for index, entry in enumerate(self.data["left_out"]):
            if index not in self.used:
                problems.append(
                    f"{self.path}: no case matches what is left out as {entry}"
                )


def is_complete(config: pytest.Config) -> bool:
    """Whether whole files are run, not what the user picked."""
    return not config.option.keyword and not any("::" in arg for arg in config.args)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    choices: dict[str, Choice] = {}
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        path = test_of(item.nodeid)[0]
        choice = choices.setdefault(path, Choice(path))
        left_out = choice.left_out(item.nodeid)
        (kept if left_out is None else dropped).append(item)
    if is_complete(config):
        for choice in choices.values():
            choice.check()
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = reached
    try:
        with OnCpu() if DEVICE == "cpu" else nullcontext():
            return (yield)
    finally:
        item.user_properties.append(("conch", reached - before))
        # Tests set them and leave them.
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


class Summary:
    """Counts outcomes, in the process that the user started."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.outcomes: dict[str, Counter] = defaultdict(Counter)
        self.proven: set[tuple[str, str]] = set()
        self.problems: set[str] = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Hears from a process of pytest-xdist what it found when it collected."""
        self.problems.update(getattr(node, "workeroutput", {}).get("problems", ()))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path, test, _ = test_of(report.nodeid)
        calls = dict(report.user_properties).get("conch", 0)
        if report.failed:
            self.outcomes[path]["failed"] += 1
        elif report.skipped:
            self.outcomes[path]["skipped"] += 1
        elif report.when == "call":
            self.outcomes[path]["with CONCH" if calls else "without"] += 1
            if calls:
                self.proven.add((path, test))

    def unproven(self) -> list[str]:
        """Tests that were to reach CONCH and did not, in no case that passed."""
        if not is_complete(self.config):
            return [] if self.proven else ["every test that was picked"]
        given = {Path(arg).as_posix() for arg in self.config.args}
        return [
            f"{path}::{test}"
            for path, data in FILES.items()
            if path in given
            for test, on_cpu in data["conch"].items()
            if (DEVICE == "gpu" or on_cpu) and (path, test) not in self.proven
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.problems.update(problems)
        unproven = not self.config.option.collectonly and self.unproven()
        if self.problems or unproven:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for problem in sorted(self.problems):
            terminalreporter.line(problem, red=True)
        if self.config.option.collectonly:
            return
        columns = ("with CONCH", "without", "failed", "skipped")
        terminalreporter.section("cases of upstream's tests")
        terminalreporter.line("".join(f"{name:>11}" for name in columns))
        for path, counts in sorted(self.outcomes.items()):
            numbers = "".join(f"{counts[name]:11}" for name in columns)
            terminalreporter.line(f"{numbers}  {path}")
        for test in self.unproven():
            terminalreporter.line(f"CONCH was not reached: {test}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist
        config.pluginmanager.register(Summary(config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["problems"] = problems
