# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Makes a folder with upstream's own tests in it, and CONCH among what they test.

    python tools/upstream_tests.py VERSION TREE FOLDER --device cpu|gpu

TREE is what `python -m patchset tree VERSION TREE` makes. The folder gets those of its
tests that releases/VERSION/upstream.toml names, with its edits in them, what they
import, the sizes of the models that they name, and a plugin for pytest. In the folder,

    while read -r tests; do python -m pytest -c pytest.ini $tests; done < tests.txt

runs them. upstream.toml holds

    watched             paths of upstream's tests that are about attention
    mentions            pattern: so are all tests in whose text it is found
    [models]            config.json of models that tests name; no weights
    read_text           those of them with a tokenizer: a token is a byte
    [[files]]           a test file that runs: path
        edits           as in release.toml; device = "cpu" or "gpu": only there
        unchanged       true: it runs as it is, whether or not it reaches CONCH
        alone           true: in a process of its own, for what it changes there
        conch           tests that reach CONCH; true, or a pattern of cases: a CPU runs
                        all or these; false: only a GPU does
        [[left_out]]    patterns of test and case that do not run, with the reason
    [[left_out]]        files that do not run, with the reason

Every watched file is in one of the two lists, every test of a file that runs as well:
what a new release adds has to be looked at.
"""

import argparse
import ast
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "tools" / "upstream"
sys.path.insert(0, str(ROOT))

from patchset.edits import Edit, apply_edits  # noqa: E402
from patchset.errors import PatchError  # noqa: E402
from patchset.releases import Release, get_release  # noqa: E402
from patchset.relocation import Relocation  # noqa: E402


def load(release: Release) -> dict[str, Any]:
    return tomllib.loads((release.directory / "upstream.toml").read_text())


def watched_files(tree: Path, data: dict[str, Any]) -> set[str]:
    """Upstream's test files that are about attention; a patched tree has ours too."""
    mentions = re.compile(data["mentions"])
    found = {path for pattern in data["watched"] for path in tree.glob(pattern)} | {
        path
        for path in tree.glob("tests/**/test_*.py")
        if mentions.search(path.read_text())
    }
    return {
        path.relative_to(tree).as_posix()
        for path in found
        if not path.name.startswith("test_conch")
    }


def check_lists(tree: Path, data: dict[str, Any]) -> None:
    """Every watched file runs or is left out; nothing is left out that is not there."""
    watched = watched_files(tree, data)
    running = [file["path"] for file in data["files"]]
    unknown = watched - set(running)
    for entry in data["left_out"]:
        for pattern in entry["files"]:
            names = {path.relative_to(tree).as_posix() for path in tree.glob(pattern)}
            if not names & watched:
                raise PatchError(f"left out, but there is no such test: {pattern}")
            if names & set(running):
                raise PatchError(f"left out, but it runs: {pattern}")
            unknown -= names
    if unknown:
        raise PatchError(
            "upstream has tests about attention that upstream.toml does not know: "
            + ", ".join(sorted(unknown))
        )


def edited(tree: Path, file: dict[str, Any], device: str) -> str:
    """The text of a test file with the edits for a device in it."""
    edits = []
    for entry in file.get("edits", []):
        if entry.get("device", device) == device:
            fields = {key: value for key, value in entry.items() if key != "device"}
            edits.append(Edit(**{"file": file["path"], "name": "CONCH"} | fields))
    text = (tree / file["path"]).read_text()
    return apply_edits(text, edits) if edits else text


def imported(path: str, text: str) -> Iterator[str]:
    """Modules that a test imports, as paths without suffix; some are not there.

    pytest imports a test from its folder, whose modules it can name by that alone.
    """
    package = Path(path).parent
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = package.parents[node.level - 2] if node.level > 1 else package
                module = ".".join([*base.parts, *filter(None, [module])])
            modules = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "tests":
                yield module.replace(".", "/")
            elif "." not in module:
                yield (package / module).as_posix()


def with_imports(tree: Path, texts: dict[str, str]) -> dict[str, str]:
    """The files, and of the tree's tests all that they import."""
    texts = dict(texts)
    todo = list(texts)
    while todo:
        path = todo.pop()
        names = [name + ".py" for name in imported(path, texts[path])]
        for folder in [Path(path).parent, *Path(path).parents[1:-1]]:
            names += [f"{folder.as_posix()}/{n}.py" for n in ("__init__", "conftest")]
        for name in names:
            for found in (name, name.removesuffix(".py") + "/__init__.py"):
                if found not in texts and (tree / found).is_file():
                    texts[found] = (tree / found).read_text()
                    todo.append(found)
    return texts


def runs_of(paths: list[str], data: dict[str, Any]) -> list[str]:
    """The paths of each run of pytest: those that need no process alone, then each."""
    alone = [file["path"] for file in data["files"] if file.get("alone")]
    together = [path for path in paths if path not in alone]
    return [" ".join(together), *(path for path in paths if path in alone)]


def byte_tokenizer() -> dict[str, Any]:
    """tokenizer.json of a tokenizer without merges, over the alphabet of GPT-2's.

    There a byte is the character of the same number if that can be printed, else one
    from 256 on.
    """
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    names = [chr(byte if byte in printed else next(others)) for byte in range(256)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level | {"use_regex": False},
        "decoder": level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {name: byte for byte, name in enumerate(names)},
            "merges": [],
        },
    }


def prepare(version: str, tree: Path, folder: Path, device: str) -> None:
    """Makes the folder.

    Raises:
        PatchError: upstream's tests are not those that upstream.toml is for.

    """
    release = get_release(version)
    data = load(release)
    check_lists(tree, data)
    texts = {file["path"]: edited(tree, file, device) for file in data["files"]}
    texts = with_imports(tree, texts)
    parts = {path.name: path.read_text() for path in PARTS.glob("*.py")}
    texts |= Relocation(release.relocate, release.imports).texts(parts)
    for model, config in data["models"].items():
        texts[f"{model}/config.json"] = json.dumps(config)
    for model in data.get("read_text", []):
        texts[f"{model}/tokenizer.json"] = json.dumps(byte_tokenizer())
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        texts[f"{model}/tokenizer_config.json"] = json.dumps(kind)
    selection = {
        file["path"]: {
            "conch": file.get("conch", {}),
            "left_out": file.get("left_out", []),
            "unchanged": file.get("unchanged", False),
        }
        for file in data["files"]
    }
    texts["selection.json"] = json.dumps({"device": device, "files": selection})
    running = [
        path
        for path, chosen in selection.items()
        if device == "gpu" or chosen["unchanged"] or any(chosen["conch"].values())
    ]
    texts["tests.txt"] = "".join(f"{run}\n" for run in runs_of(running, data))
    # Marks that upstream registers, and its deprecations, are upstream's.
    texts["pytest.ini"] = "[pytest]\naddopts = -p conch_plugin --disable-warnings\n"
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Makes a folder with upstream's own tests, CONCH among what they "
        "test."
    )
    parser.add_argument("version")
    parser.add_argument("tree", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "gpu"), required=True)
    options = parser.parse_args()
    try:
        prepare(options.version, options.tree, options.folder, options.device)
    except PatchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
