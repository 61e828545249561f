"""What vLLM's own hooks ask of a source file, for the files that go into vLLM.

    python tools/check_sources.py FILE...

A hook of .pre-commit-config.yaml. Checks Python files for the two SPDX lines, imports
that vLLM wraps, and torch.cuda calls that have a device-neutral form; Markdown files
for links to files, or to headings in them, that do not exist. Standard library only.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

SPDX = (
    "# SPDX-License-Identifier: Apache-2.0",
    "# SPDX-FileCopyrightText: Copyright contributors to the vLLM project",
)
# Folders whose files are copied into a vLLM tree.
OVERLAY = re.compile(r"^(releases/[^/]+/)?(vllm|tests|benchmarks)/")
NOT_OVERLAY = re.compile(r"^tests/patchset/")


@dataclass(frozen=True)
class Rule:
    """A pattern that must not occur, and what to write instead."""

    pattern: re.Pattern[str]
    instead: str
    folders: tuple[str, ...] = ("vllm", "tests", "benchmarks")


def rule(pattern: str, instead: str, *folders: str) -> Rule:
    """A Rule from a pattern whose ^ and $ are the ends of a line."""
    compiled = re.compile(pattern, re.MULTILINE)
    return Rule(compiled, instead, folders) if folders else Rule(compiled, instead)


# Files that need more of Triton than vllm.triton_utils has on every release: Gluon.
# Where a release's has it, release.toml maps the imports.
USES_TRITON_ITSELF = re.compile(r"/(hopper_\w+|\w*conch_gluon(/\w+)?)\.py$")
TRITON = rule(
    r"^(import|from)\s+triton(\s|\.|$)",
    "import it as `from vllm.triton_utils import tl, triton`",
)
RULES = (
    TRITON,
    rule(r"^\s*(import|from)\s+re\b", "use the regex package: `import regex as re`"),
    rule(r"^\s*(import|from)\s+(pickle|cloudpickle)\b", "do without pickle"),
    rule(
        r"\btorch\.cuda\.(empty_cache|synchronize|device_count|current_device"
        r"|set_device|mem_get_info|memory_\w+|max_memory_\w+|reset_peak_memory_stats"
        r"|device\b)",
        "use torch.accelerator",
    ),
    rule(
        r"\btorch\.cuda\.manual_seed(_all)?\b",
        "use set_random_seed of vLLM, or torch.manual_seed",
    ),
    rule(r"^\s*print\(", "log with vllm.logger.init_logger", "vllm"),
    rule(r"\btrust_remote_code\s*=\s*True\b", "pass the user's setting on", "vllm"),
)
LINK = re.compile(r"\]\(<?([^)>\s#]*)(?:#([^)>\s]+))?[^)]*\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def overlay_folder(path: str) -> str | None:
    """The top folder of the vLLM tree the file goes to; None if it does not."""
    found = OVERLAY.match(path)
    return found.group(2) if found and not NOT_OVERLAY.match(path) else None


def check_python(path: str, text: str) -> Iterator[str]:
    """Yields what is wrong with a Python file, as `path:line: what; remedy`."""
    folder = overlay_folder(path)
    if folder is None or not text:
        return
    lines = text.splitlines()
    first = 1 if lines[0].startswith("#!") else 0
    if tuple(lines[first : first + 2]) != SPDX:
        yield f"{path}:{first + 1}: begin with the two lines\n{SPDX[0]}\n{SPDX[1]}"
    for one in RULES:
        if folder not in one.folders:
            continue
        if one is TRITON and USES_TRITON_ITSELF.search(path):
            continue
        for match in one.pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{path}:{line}: {match.group().strip()}: {one.instead}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown file."""
    headings = HEADING.findall(FENCED.sub("", text))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def check_markdown(path: str, text: str) -> Iterator[str]:
    """Yields the links of a Markdown file that lead nowhere in this repository."""
    for match in LINK.finditer(text):
        target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            continue
        line = text.count("\n", 0, match.start()) + 1
        file = Path(path).parent / unquote(target) if target else Path(path)
        if not file.exists():
            yield f"{path}:{line}: {target}: no such file"
        elif (
            anchor
            and file.suffix == ".md"
            and anchor not in anchors(file.read_text(encoding="utf-8"))
        ):
            yield f"{path}:{line}: {target}#{anchor}: no such heading"


def main(paths: list[str]) -> int:
    """Checks the files and prints what is wrong; returns the exit status."""
    problems: list[str] = []
    for path in paths:
        check = check_markdown if path.endswith(".md") else check_python
        problems += check(path, Path(path).read_text(encoding="utf-8"))
    for problem in problems:
        sys.stderr.write(problem + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
