# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command line: arguments, tables and exit codes (0 done, 1 cannot, 2 usage)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from patchset.apply import plan_apply, plan_revert
from patchset.errors import PatchError
from patchset.releases import get_release
from patchset.trees import find_tree

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except PatchError as error:
        err.print(f"error: {error}", style="red", markup=False)
        return 1
    return 0


def _apply(options: argparse.Namespace) -> None:
    tree = find_tree(options.tree, options.release)
    release = get_release(tree.version)
    make_plan = plan_revert if options.revert else plan_apply
    plan = make_plan(tree, release, overwrite=options.overwrite)
    out.print(f"vLLM {tree.version} ({tree.evidence}) in {tree.root}", markup=False)
    for step in plan.steps:
        out.print(f"  {step.action:8}{step.path}", markup=False)
    if not plan.steps:
        out.print("nothing to do: CONCH is in it as it is now")
    elif options.check:
        out.print(f"{len(plan.steps)} files would change; nothing was written")
    else:
        plan.execute()
        out.print(f"{len(plan.steps)} files changed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m patchset")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("apply", help="put CONCH into a vLLM tree")
    command.add_argument("tree", type=Path, metavar="TREE")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true")
    how.add_argument("--revert", action="store_true")
    command.add_argument("--overwrite", action="store_true")
    command.add_argument("--release", metavar="VERSION")
    command.set_defaults(run=_apply)
    return parser
