# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The change as a series of mail patches, for review upstream.

`git am` accepts the series on the release's own tree and gives just what `apply` gives.
"""

import dataclasses
import datetime
import os
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

from patchset.errors import PatchError
from patchset.index import make_folder, unpack_sdist
from patchset.overlay import Change, added_files, edited_files, uncommitted
from patchset.releases import ROOT, Release
from patchset.version import conch_version

COVER_LETTER = "cover-letter.txt"


@dataclasses.dataclass(frozen=True)
class _Commit:
    """One patch of the series: the changes it wants, but for those taken before."""

    title: str
    body: str
    wants: Callable[[Change], bool]


_SERIES = (
    _Commit(
        "[Kernel][Attention] Add the CONCH Triton kernels",
        "Paged, variable-length attention with kernels of their own for prefill and "
        "decode, the KV-cache write for every cache layout, and fp8 quantisation. "
        "Nothing uses them yet.",
        lambda change: "/ops/conch/" in change.path,
    ),
    _Commit(
        "[Attention] Add the CONCH attention backend",
        "vLLM's attention interface on one side, the CONCH kernels on the other. "
        "Nothing selects it yet.",
        lambda change: change.added and change.path.startswith("vllm/"),
    ),
    _Commit(
        "[Attention] Make CONCH selectable",
        "",  # the edits' own reasons
        lambda change: not change.added,
    ),
    _Commit(
        "[Test][Attention] Test CONCH",
        "Kernels against references in fp32 and fp64, backend, selection and engine. "
        "Without a GPU they run in Triton's interpreter.",
        lambda change: change.path.startswith("tests/"),
    ),
    _Commit(
        "[Benchmark][Attention] Benchmark CONCH",
        "The kernels and serving, beside vLLM's other backends.",
        lambda change: change.path.startswith("benchmarks/"),
    ),
)

_COVER = """\
{title}

CONCH is a portable attention backend written wholly in Triton. This series adds it to
vLLM {release}. `python -m patchset export {release}` made it from CONCH {version}.

Nothing changes for anybody who does not select it with `--attention-backend CONCH`
or `VLLM_ATTENTION_BACKEND=CONCH`.

`git am --keep-non-patch *.patch` applies it; without that option git drops the tags
in brackets from the titles.

{stat}
Before sending this to vLLM
  - A person submits it, has read every line and answers for it: vLLM takes no series
    from an agent alone.
  - AI assistance was used in writing it; vLLM asks that the pull request says so.
  - More than 500 lines: vLLM asks for an RFC issue first.
  - Say what was tested and measured, on which device, with the commands.
"""


def export(
    release: Release, out: Path, signoff: str | None = None, *, dirty: bool = False
) -> list[Path]:
    """Write the series of one release.

    Args:
        release: the vLLM release that the series is for.
        out: folder for the patches and the cover letter.
        signoff: `Name <mail>` of who signs off; None takes git's user.
        dirty: also take what is not committed in this repository.

    Returns:
        The files written, in order, the cover letter last.

    """
    name, mail = _identity(signoff)
    changed, untracked = uncommitted(release)
    if not dirty and (loose := sorted(changed + untracked)):
        raise PatchError(
            f"not committed: {', '.join(loose)}. Commit or remove them, or export them "
            "too with --dirty"
        )
    make_folder(out)
    if old := sorted(path.name for path in out.glob("*.patch")):
        raise PatchError(
            f"{out} has patches already: {', '.join(old)}. Remove them, or give "
            "another folder with --out"
        )
    with tempfile.TemporaryDirectory(prefix="conch-") as folder:
        sdist, repository = Path(folder, "sdist"), Path(folder, "repository")
        unpack_sdist(release, sdist)

        def read(path: str) -> bytes | None:
            file = sdist / path
            return file.read_bytes() if file.exists() else None

        edited = edited_files(release, read)
        rest = [*added_files(release), *edited]
        git = _Git(repository, name, mail)
        for change in edited:
            mode = (sdist / change.path).stat().st_mode
            git.write(change.path, read(change.path) or b"", mode)
        git.commit(f"vLLM {release.version}", "")
        base = git("rev-parse", "HEAD").strip()
        for commit in _SERIES:
            taken = [change for change in rest if commit.wants(change)]
            rest = [change for change in rest if not commit.wants(change)]
            for change in taken:
                git.write(change.path, change.content)
            if taken:
                git.commit(commit.title, commit.body or _reasons(release))
        if rest:
            raise PatchError(f"no patch of the series takes {rest[0].path}")
        patches = git("format-patch", "--zero-commit", f"-o{out.absolute()}", base)
        cover = out / COVER_LETTER
        cover.write_text(
            _COVER.format(
                title="[Attention] CONCH, a portable Triton attention backend",
                release=release.version,
                version=conch_version(),
                stat=git("diff", "--stat", base, "HEAD"),
            )
        )
    return [*(out / Path(path).name for path in patches.splitlines()), cover]


def _reasons(release: Release) -> str:
    return "\n\n".join(
        f"{edit.file}: {edit.name}. {edit.reason}" for edit in release.edits
    )


def _identity(signoff: str | None) -> tuple[str, str]:
    if signoff is None:
        name, mail = (_git_config(f"user.{key}") for key in ("name", "email"))
        if name and mail:
            return name, mail
        raise PatchError(
            "who signs off? Give --signoff 'Name <mail>', or set git's user.name and "
            "user.email"
        )
    if match := re.fullmatch(r"\s*([^<>]+?)\s*<([^<>@\s]+@[^<>@\s]+)>\s*", signoff):
        return match[1], match[2]
    raise PatchError(f"--signoff {signoff!r}: give it as 'Name <mail>'")


def _git_config(key: str) -> str:
    command = ["git", "-C", str(ROOT), "config", key]
    return subprocess.run(
        command, capture_output=True, text=True, check=False
    ).stdout.strip()


class _Git:
    """A scratch repository, deaf to the user's configuration."""

    def __init__(self, folder: Path, name: str, mail: str):
        self.folder = folder
        folder.mkdir()
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_SYSTEM": os.devnull,
        }
        date = self("-C", str(ROOT), "log", "-1", "--format=%cI", check=False).strip()
        date = date or datetime.datetime.now(datetime.UTC).isoformat()
        for role in ("AUTHOR", "COMMITTER"):
            self._environment[f"GIT_{role}_NAME"] = name
            self._environment[f"GIT_{role}_EMAIL"] = mail
            self._environment[f"GIT_{role}_DATE"] = date
        self("init", "--quiet")

    def __call__(self, *arguments: str, check: bool = True) -> str:
        try:
            result = subprocess.run(
                ["git", *arguments],
                cwd=self.folder,
                env=self._environment,
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise PatchError(f"export takes git: {error}") from error
        if check and result.returncode:
            raise PatchError(f"git {arguments[0]} failed: {result.stderr.strip()}")
        return result.stdout

    def write(self, path: str, content: bytes, mode: int | None = None) -> None:
        """Write a file and stage it; without a mode, one that exists keeps its own."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        if mode is not None:
            target.chmod(mode)
        self("add", "--", path)

    def commit(self, title: str, body: str) -> None:
        """Commit what is staged, signed off."""
        self("commit", "--quiet", "--signoff", "-m", title, "-m", _fill(body))


def _fill(text: str) -> str:
    """Wrap paragraphs at the width git messages have."""
    return "\n\n".join(
        textwrap.fill(paragraph, 72, break_long_words=False, break_on_hyphens=False)
        for paragraph in text.split("\n\n")
    )
