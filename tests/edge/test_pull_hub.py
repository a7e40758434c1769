"""Pulling from a hub: huggingface-hub against a fake that speaks the hub's protocol (api/models tree, resolve with
X-Repo-Commit, X-Linked-Size and X-Linked-Etag, a redirect to another host for large files)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.edge.edge_command import Edge, edge_at
from tests.edge.file_server import FileServer, ServedFile, serve
from tests.edge.gguf_files import sized_gguf
from tests.edge.store_support import assert_sound

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = sized_gguf(4000)


@dataclass(frozen=True)
class Hub:
    """A hub, and the other host that large files come from."""

    api: FileServer
    cdn: FileServer

    def add(self, repo: str, files: Mapping[str, bytes], *, digest: str = "") -> None:
        tree = [{"type": "file", "oid": "0" * 40, "size": len(data), "path": path} for path, data in files.items()]
        for revision in ("main", "v1", COMMIT):
            self.api.files[f"/api/models/{repo}/tree/{revision}"] = ServedFile(json.dumps(tree).encode(), etag="")
            for path, data in files.items():
                sha256 = digest or hashlib.sha256(data).hexdigest()
                headers = {
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Size": str(len(data)),
                    "X-Linked-Etag": f'"{sha256}"',
                }
                large = ServedFile(b"", headers=headers, redirect=f"{self.cdn.url}/{repo}/{path}?signature=x")
                self.api.files[f"/{repo}/resolve/{revision}/{path}"] = large
                self.cdn.files[f"/{repo}/{path}"] = ServedFile(data)

    def refuse(self, repo: str, status: int, **headers: str) -> None:
        text = {name.replace("_", "-"): value for name, value in headers.items()}
        for path in (f"/api/models/{repo}/tree/main", f"/{repo}/resolve/main/m.gguf"):
            self.api.files[path] = ServedFile(b"", status=status, headers=text)


@pytest.fixture
def hub() -> Generator[Hub]:
    with serve() as api, serve() as cdn:
        cdn.url = cdn.url.replace("127.0.0.1", "localhost")
        yield Hub(api, cdn)


@pytest.fixture
def edge(hub: Hub, tmp_path: Path) -> Edge:
    return edge_at(tmp_path, HF_ENDPOINT=hub.api.url, HF_TOKEN="hf_secret")  # no real one


def test_the_only_gguf_of_a_repository_is_pulled(hub: Hub, edge: Edge) -> None:
    hub.add("Org/Tiny-GGUF", {"README.md": b"hello", "tiny-q8_0.gguf": MODEL})
    done = edge.run("pull", "hf://Org/Tiny-GGUF", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ref"] == "tiny:q8_0"
    assert found["source"] == f"hf://Org/Tiny-GGUF/tiny-q8_0.gguf@{COMMIT}"
    assert found["files"][0]["digest"] == f"sha256:{hashlib.sha256(MODEL).hexdigest()}"
    assert len(assert_sound(edge.store)) == 1
    assert all(request.headers["Authorization"] == "Bearer hf_secret" for request in hub.api.requests("HEAD"))
    assert all("Authorization" not in request.headers for request in hub.cdn.asked), "the token stays at the hub"
    assert hub.cdn.total_sent() == len(MODEL)
    again = edge.run("pull", found["source"])
    assert again.returncode == 0
    assert hub.cdn.total_sent() == len(MODEL), "its digest is known beforehand, so nothing is fetched"
    assert not list(edge.home.glob("hf/hub/*")), "no second copy in the library's cache"


def test_a_dropped_connection_is_taken_up_again(hub: Hub, edge: Edge) -> None:
    hub.add("org/tiny", {"m.gguf": MODEL})
    hub.cdn.files["/org/tiny/m.gguf"].drop_after = [500_000]
    assert edge.run("pull", "hf://org/tiny/m.gguf@v1", "--name", "a").returncode == 0
    assert hub.cdn.total_sent() == len(MODEL)


def test_several_files_are_listed(hub: Hub, edge: Edge) -> None:
    hub.add("org/many", {"a-q4_0.gguf": MODEL, "sub/b-q8_0.gguf": MODEL})
    done = edge.run("pull", "hf://org/many", "--dry-run")
    assert done.returncode == 2
    assert "holds 2 GGUF files" in done.stderr
    assert "hf://org/many/sub/b-q8_0.gguf" in done.stderr
    plan = edge.run("pull", "hf://org/many/sub/b-q8_0.gguf", "--dry-run", "--json")
    assert json.loads(plan.stdout)["size_bytes"] == len(MODEL)
    assert hub.cdn.asked == []


def test_bytes_other_than_the_hub_stated_are_refused(hub: Hub, edge: Edge) -> None:
    hub.add("org/tiny", {"m.gguf": MODEL}, digest="0" * 64)
    done = edge.run("pull", "hf://org/tiny")
    assert done.returncode == 1
    assert f"expected sha256:{'0' * 64}" in done.stderr
    assert assert_sound(edge.store) == []
    assert list(edge.store.glob("ingest/*")) == []


def test_a_hub_that_refuses_is_explained(hub: Hub, edge: Edge) -> None:
    hub.add("org/empty", {"README.md": b""})
    hub.api.files["/api/models/org/odd/tree/main"] = ServedFile(b'[{"type": "file"}]', etag="")
    hub.api.files["/api/models/org/html/tree/main"] = ServedFile(b"<html>", etag="")
    hub.refuse("org/gated", 403, X_Error_Code="GatedRepo")
    hub.refuse("org/gone", 404, X_Error_Code="RepoNotFound")
    hub.refuse("org/file", 404, X_Error_Code="EntryNotFound")
    for source, code, message in (
        ("hf://org/empty", 1, "holds no GGUF file"),
        ("hf://org/gated/m.gguf", 4, "is gated"),
        ("hf://org/odd", 4, "makes no sense"),
        ("hf://org/html", 4, "hub"),
        ("hf://org/gone", 4, "The hub has no org/gone"),
        ("hf://org/file/m.gguf", 4, "has no file 'm.gguf'"),
    ):
        done = edge.run("pull", source)
        assert (done.returncode, message in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr


def test_without_a_hub_in_reach_cause_and_way_out_are_told_and_nothing_else(tmp_path: Path) -> None:
    with serve() as gone:
        pass
    for environ, cause in (
        ({"HF_ENDPOINT": gone.url}, f"for hf://org/tiny/m.gguf: {urlsplit(gone.url).netloc}: Connection refused."),
        ({"HF_ENDPOINT": "http://hub.invalid"}, "for hf://org/tiny/m.gguf: hub.invalid: "),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps hf://org/tiny/m.gguf out of reach."),
    ):
        begun = time.monotonic()
        done = edge_at(tmp_path, **environ).run("pull", "hf://org/tiny/m.gguf")
        assert done.returncode == 4, done.stderr
        assert cause in done.stderr
        assert "edge pull smollm2:135m-instruct" in done.stderr
        assert len(done.stderr.splitlines()) == 2, done.stderr
        assert time.monotonic() - begun < 15, "the library alone tries for 23 s"


def test_a_hub_in_trouble_is_asked_again_a_few_times(hub: Hub, edge: Edge) -> None:
    hub.refuse("org/ill", 503)
    done = edge.run("pull", "hf://org/ill/m.gguf")
    assert (done.returncode, len(hub.api.requests("HEAD"))) == (4, 3)
    assert "it answered 503" in done.stderr
