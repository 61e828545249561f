# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Downloads, from a small package index on this machine."""

import functools
import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

from patchset.errors import PatchError
from patchset.index import fetch, unpack_sdist
from patchset.releases import Release

CONTENT = b"not really a wheel"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = "vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An index with one file, as pip's configuration names it, and an empty cache."""
    folder = tmp_path / "index"
    (folder / "simple/vllm").mkdir(parents=True)
    (folder / NAME).write_bytes(CONTENT)
    page = f'<html><body><a href="/{NAME}#sha256={DIGEST}">{NAME}</a></body></html>'
    (folder / "simple/vllm/index.html").write_text(page)
    handler = functools.partial(_Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(
        "PIP_INDEX_URL", f"http://localhost:{server.server_port}/simple/"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


def make_release(digest: str = DIGEST, name: str = NAME) -> Release:
    """A release with one file."""
    return Release(Version("0.33.0"), Path("releases/0.33.0"), {name: digest}, ())


def test_pips_files_count_where_pip_cannot_be_imported(index, tmp_path, monkeypatch):
    """As in the environment in which `pip install .` builds."""
    url = os.environ["PIP_INDEX_URL"]
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {url}\n")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/pip.py").write_text("raise ImportError('no pip here')\n")
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    assert fetch(make_release(), NAME).read_bytes() == CONTENT


def test_a_file_is_fetched_once(index):
    path = fetch(make_release(), NAME)
    assert path.read_bytes() == CONTENT
    assert DIGEST in path.parts
    (index / NAME).unlink()
    assert fetch(make_release(), NAME) == path


def test_a_damaged_copy_in_the_cache_is_replaced(index):
    path = fetch(make_release(), NAME)
    path.write_bytes(b"damaged")
    assert fetch(make_release(), NAME).read_bytes() == CONTENT


def test_an_index_that_states_another_hash_is_refused(index):
    with pytest.raises(PatchError, match=f"states sha256 {DIGEST}, release.toml 0000"):
        fetch(make_release("0" * 64), NAME)


def test_content_with_another_hash_is_refused_and_not_kept(index):
    (index / NAME).write_bytes(b"something else")
    with pytest.raises(PatchError, match=f"release.toml says {DIGEST}"):
        fetch(make_release(), NAME)
    (index / NAME).write_bytes(CONTENT)
    assert fetch(make_release(), NAME).read_bytes() == CONTENT


def test_a_file_that_the_index_lacks_is_an_error(index):
    name = NAME.replace("x86_64", "aarch64")
    with pytest.raises(PatchError, match="the package index does not have it"):
        fetch(make_release(name=name), name)


def test_without_a_network_the_message_says_where_to_put_the_file(
    index, tmp_path, monkeypatch
):
    monkeypatch.setenv("PIP_INDEX_URL", "http://localhost:1/simple/")
    with pytest.raises(PatchError) as caught:
        fetch(make_release(), NAME)
    message = str(caught.value)
    assert "PIP_INDEX_URL" in message and "PIP_CERT" in message
    place = Path(message.rpartition("put the file there yourself: ")[2])
    assert place.is_relative_to(tmp_path / "cache")
    place.write_bytes(CONTENT)
    assert fetch(make_release(), NAME) == place


def test_an_index_that_is_none_is_an_error(index):
    (index / "simple/vllm/index.html").rename(index / "simple/vllm/page.txt")
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(PatchError, match="unsupported Content-Type 'text/plain'"),
    ):
        patch.setattr(
            _Handler, "translate_path", lambda *_: str(index / "simple/vllm/page.txt")
        )
        fetch(make_release(), NAME)


def test_a_cache_that_cannot_be_made_is_an_error(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(PatchError, match="Not a directory: .*XDG_CACHE_HOME"):
        fetch(make_release(), NAME)


def test_an_sdist_goes_into_an_empty_folder_only(release, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(PatchError, match="is not an empty folder"):
        unpack_sdist(release, tmp_path)
    unpack_sdist(release, tmp_path / "new/tree")
    assert (tmp_path / "new/tree/vllm/__init__.py").is_file()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tree"]


def test_the_real_sdist_is_the_one_that_is_pinned(release):
    content = fetch(release, release.sdist).read_bytes()
    assert hashlib.sha256(content).hexdigest() == release.files[release.sdist]
