# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command line: arguments, tables and exit codes (0 done, 1 cannot, 2 usage)."""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from patchset.apply import Plan, plan_apply, plan_revert
from patchset.errors import PatchError
from patchset.export import export
from patchset.index import check_is_free, make_folder, unpack_sdist
from patchset.overlay import added_files, uncommitted
from patchset.releases import Release, get_release, supported
from patchset.trees import find_tree
from patchset.version import combined_version, conch_version
from patchset.wheels import TARGETS, build_wheel, detect_target

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line; None takes the process's own.

    Returns:
        The exit code. Wrong usage exits by itself, with 2.

    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except PatchError as error:
        _err.print(f"error: {error}", style="red", markup=False)
        return 1
    except OSError as error:  # a folder that cannot be written, a full disk
        names = [str(name) for name in (error.filename, error.filename2) if name]
        text = ": ".join([error.strerror or str(error), *names[-1:]])
        _err.print(f"error: {text}", style="red", markup=False)
        return 1
    return 0


def _say(text: str) -> None:
    _out.print(text, markup=False)


def _warn_of_untracked(release: Release) -> None:
    """Name the overlay files that git does not know; they are taken all the same."""
    _, untracked = uncommitted(release)
    if untracked:
        names = ", ".join(untracked)
        _err.print(f"warning: not in git, but taken: {names}", markup=False)


def _releases(options: argparse.Namespace) -> None:
    _say(f"CONCH {conch_version()} on vLLM")
    for release in supported():
        kernels = next(
            change.path.rpartition("/")[0]
            for change in added_files(release, package_only=True)
            if "/ops/conch/" in change.path
        )
        machines = [
            machine
            for machine in ("x86_64", "aarch64")
            if any(name.endswith(f"_{machine}.whl") for name in release.wheels)
        ]
        _say(f"\n{release.version}{' (default)' if release.default else ''}")
        table = Table.grid(padding=(0, 0, 0, 2))
        table.add_row("kernels in", kernels)
        table.add_row("edits", str(len(release.edits)))
        table.add_row("wheels", ", ".join(machines))
        table.add_row("verified", release.verified)
        Console(highlight=False).print(table)


def _apply(options: argparse.Namespace) -> None:
    tree = find_tree(options.tree, options.release)
    _say(f"vLLM {tree.version} ({tree.evidence}) in {tree.root}")
    if options.revert:
        plan = plan_revert(tree, overwrite=options.overwrite)
    else:
        release = get_release(tree.version)
        _warn_of_untracked(release)
        plan = plan_apply(tree, release, overwrite=options.overwrite)
    for note in plan.notes:
        _say(note)
    for step in plan.steps:
        _say(f"  {step.action:8}{step.path}")
    if not plan.pending:
        _say("nothing to do: CONCH is in it, as it is now")
    elif options.check:
        if unwritable := plan.unwritable():
            raise PatchError(
                f"these folders cannot be written: {', '.join(map(str, unwritable))}"
            )
        _say(f"{_files(plan)} would change; nothing was written")
    else:
        plan.execute()
        _say(f"{_files(plan)} changed")


def _files(plan: Plan) -> str:
    return f"{len(plan.steps)} file{'' if len(plan.steps) == 1 else 's'}"


def _tree(options: argparse.Namespace) -> None:
    release = get_release(options.version)
    _warn_of_untracked(release)
    destination = options.destination.absolute()
    check_is_free(destination)
    make_folder(destination.parent)
    # Made beside it and renamed: no plain vLLM is left where an edit fails.
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        made = Path(folder, "tree")
        unpack_sdist(release, made)
        plan = plan_apply(find_tree(made), release)
        plan.execute()
        made.replace(destination)
    _say(
        f"vLLM {combined_version(release.version)} in {options.destination} "
        f"({len(plan.steps)} files are CONCH's)"
    )


def _wheel(options: argparse.Namespace) -> None:
    start = time.monotonic()
    release = get_release(options.version)
    make_folder(options.out)
    target = detect_target() if options.target == "auto" else options.target
    _warn_of_untracked(release)
    wheel = build_wheel(
        release,
        options.out,
        target=target,
        machine=options.machine,
    )
    size = wheel.stat().st_size / 1e6
    seconds = time.monotonic() - start
    _say(f"{wheel} ({target}, {size:.0f} MB, {seconds:.0f} s)")


def _export(options: argparse.Namespace) -> None:
    release = get_release(options.version)
    made = export(release, options.out, options.signoff, dirty=options.dirty)
    for path in made:
        _say(str(path))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m patchset",
        description="Turns a vLLM release into a vLLM with CONCH.",
        epilog="Exit codes: 0 done, 1 cannot (the message says why), 2 wrong usage.",
    )
    parser.add_argument(
        "--version", action="version", version=f"CONCH {conch_version()}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, run, help, description=None):
        command = commands.add_parser(name, help=help, description=description or help)
        command.set_defaults(run=run)
        return command

    add("releases", _releases, "list the supported vLLM releases")

    command = add(
        "apply",
        _apply,
        "put CONCH into a vLLM tree, or take it out",
        "Puts CONCH into a vLLM tree: all of it or, on any error, nothing. A second "
        "run finds nothing to do; after CONCH changed, a run updates.",
    )
    command.add_argument(
        "tree",
        type=Path,
        metavar="TREE",
        help="a checkout, an unpacked sdist, or where vllm is installed (the "
        "site-packages folder or vllm inside it), which gets no tests",
    )
    command.add_argument(
        "--check",
        action="store_true",
        help="only say what would change; exits with 1 if it cannot be done",
    )
    command.add_argument(
        "--revert", action="store_true", help="take CONCH out again, byte for byte"
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files in CONCH's places that do not come from this tool (a "
        "revert brings them back), and drop changes made to files that do",
    )
    command.add_argument(
        "--release",
        metavar="VERSION",
        help="the tree's vLLM version, where it cannot be told from the tree",
    )

    command = add("tree", _tree, "download a vLLM sdist and put CONCH into it")
    command.add_argument("version", metavar="VERSION")
    command.add_argument("destination", type=Path, metavar="DEST")

    command = add(
        "wheel",
        _wheel,
        "make a wheel of vLLM with CONCH, without a compiler",
        "Makes a wheel of vLLM with CONCH: for NVIDIA GPUs from the official wheel, "
        "for machines without a GPU from the sdist's Python alone. For ROCm, which "
        "has no wheel on the package index, use `tree` and build that.",
    )
    command.add_argument("version", metavar="VERSION", nargs="?")
    command.add_argument("--out", type=Path, default=Path("dist"), metavar="FOLDER")
    command.add_argument(
        "--target",
        choices=("auto", *TARGETS),
        default="auto",
        help="auto: VLLM_TARGET_DEVICE if set, else cuda with an NVIDIA GPU in the "
        "machine, and empty (Python alone) without any GPU",
    )
    command.add_argument(
        "--machine",
        choices=("x86_64", "aarch64"),
        help="for cuda: the wheel's architecture (default: this machine's)",
    )

    command = add("export", _export, "write the change as patches for `git am`")
    command.add_argument("version", metavar="VERSION")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    command.add_argument(
        "--signoff",
        metavar="'NAME <MAIL>'",
        help="who signs off (default: git's user)",
    )
    command.add_argument(
        "--dirty",
        action="store_true",
        help="also export what is not committed in this repository",
    )
    return parser
