"""The store as a registry: manifests and blobs, read only, for whoever has a key for it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge.access.keys import ROLES, Keys, Limits, Scope
from edge.errors import BlobNotFound, ModelNotFound
from edge.store.manifest import MANIFEST_TYPE
from edge.store.models import ModelStore, PackageFile, StoredModel
from runtime.api.registry import lookup, part_of
from tests.described import Described
from tests.support import DEFAULT_MODEL, SEED, RunningAppliance, running_appliance

NAME, _, TAG = DEFAULT_MODEL.partition(":")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    with running_appliance(tmp_path_factory.mktemp("door"), "--require-keys", "on") as running:
        yield running


@pytest.fixture(scope="module")
def model(guarded: RunningAppliance) -> StoredModel:
    return ModelStore(guarded.home / "store", seed=SEED).get(DEFAULT_MODEL)


def key_of(guarded: RunningAppliance, *scopes: Scope, models: tuple[str, ...] = ()) -> str:
    _, key = Keys(guarded.home / "state.db", actor="test").create(Limits(scopes=frozenset(scopes), models=models))
    return key


@pytest.fixture(scope="module")
def http(guarded: RunningAppliance) -> Iterator[httpx.Client]:
    key = key_of(guarded, "fetch")
    with guarded.client(headers={"authorization": f"Bearer {key}"}) as client:
        yield client


@pytest.fixture(scope="module")
def described(http: httpx.Client) -> Described:
    return Described(http.get("/docs/openapi.json").json())


def test_names_tags_and_manifests(http: httpx.Client, model: StoredModel, described: Described) -> None:
    for path in ("/v2", "/v2/"):
        assert http.get(path).json() == {}
        assert http.head(path).status_code == 200
    assert NAME in http.get("/v2/_catalog").json()["repositories"]
    assert http.get(f"/v2/{NAME}/tags/list").json() == {"name": NAME, "tags": [TAG]}
    by_tag = http.get(f"/v2/{NAME}/manifests/{TAG}")
    assert by_tag.headers["content-type"] == MANIFEST_TYPE
    assert by_tag.headers["docker-content-digest"] == model.digest
    assert f"sha256:{hashlib.sha256(by_tag.content).hexdigest()}" == model.digest
    assert http.get(f"/v2/{NAME}/manifests/{model.digest}").content == by_tag.content
    head = http.head(f"/v2/{NAME}/manifests/{TAG}")
    assert (head.content, head.headers["content-length"]) == (b"", str(len(by_tag.content)))
    for reply in (by_tag, head, http.get("/v2/_catalog")):
        described.check(reply)


def test_blobs_whole_and_in_parts(http: httpx.Client, model: StoredModel, described: Described) -> None:
    data, digest = model.weights.read_bytes(), model.files[0].digest
    path = f"/v2/{NAME}/blobs/{digest}"
    head = http.head(path)
    assert (head.headers["content-length"], head.headers["accept-ranges"]) == (str(len(data)), "bytes")
    assert hashlib.sha256(http.get(path).content).hexdigest() == digest.hex
    for header, start, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=4194304-8388607", 4 << 20, 8 << 20),
        ("bytes=-7", -7, None),
    ):
        part = http.get(path, headers={"range": header})
        assert part.status_code == 206
        assert part.content == data[start:stop]
        described.check(part)
    assert http.get(path, headers={"range": f"bytes={len(data)}-"}).status_code == 416
    assert http.get(path, headers={"if-none-match": f'"{digest}"'}).status_code == 304
    config = model.manifest.config
    assert len(http.get(f"/v2/another/name/blobs/{config.digest}").content) == config.size


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("", None), ("bytes=0-9", (0, 10)), ("bytes=5-", (5, 100)), ("bytes=-5", (95, 100)), ("bytes=-500", (0, 100)),
        ("bytes=90-500", (90, 100)), ("bytes=100-", (100, 100)), ("bytes=-0", (100, 100)), ("bytes=9-5", None),
        ("bytes=-", None), ("bytes=0-1,5-6", None), ("items=0-5", None), ("bytes=٣-", None),
    ],
)  # fmt: skip
def test_ranges_are_read_as_the_standard_has_them(header: str, part: tuple[int, int] | None) -> None:
    assert part_of(header, 100) == part


def test_what_is_attached_is_listed_and_sent(guarded: RunningAppliance, http: httpx.Client, model: StoredModel) -> None:
    store, note = ModelStore(guarded.home / "store"), guarded.home / "note.txt"
    assert http.get(f"/v2/{NAME}/referrers/{model.digest}").json()["manifests"] == []
    note.write_text("hello")
    attached = store.attach(model.digest, "application/vnd.example.note", [PackageFile(note, "note.txt")])
    (listed,) = http.get(f"/v2/{NAME}/referrers/{model.digest}").json()["manifests"]
    assert (listed["digest"], listed["artifactType"]) == (attached.digest, "application/vnd.example.note")
    manifest = http.get(f"/v2/{NAME}/manifests/{attached.digest}").json()
    assert http.get(f"/v2/{NAME}/blobs/{manifest['layers'][0]['digest']}").text == "hello"


def test_keys_need_the_scope_and_reach_as_far_as_their_models(
    guarded: RunningAppliance, model: StoredModel, http: httpx.Client
) -> None:
    blob, manifest = f"/v2/{NAME}/blobs/{model.files[0].digest}", f"/v2/{NAME}/manifests/{TAG}"
    with guarded.client() as nobody:
        reply = nobody.get("/v2/")
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, 'Basic realm="slm-edge"')
        assert reply.json()["errors"][0]["code"] == "UNAUTHORIZED"
    others: list[Scope] = ["chat", "embed", "view", "operate"]
    for key, status in ((key_of(guarded, *others), 403), (key_of(guarded, *ROLES["admin"]), 200)):
        with guarded.client(headers={"x-api-key": key}) as client:
            assert client.get(manifest).status_code == client.head(blob).status_code == status
    with guarded.client(headers={"x-api-key": key_of(guarded, "fetch", models=("minilm:*",))}) as limited:
        assert limited.get("/v2/_catalog").json() == {"repositories": ["minilm"]}
        for path in (blob, manifest, f"/v2/{NAME}/tags/list", f"/v2/minilm/blobs/{model.files[0].digest}"):
            assert limited.get(path).status_code == 404, path
            assert NAME not in limited.get(path).text.replace(f"'{NAME}", ""), "no other name is told"
    secret = base64.b64encode(f"anybody:{key_of(guarded, 'fetch')}".encode()).decode()
    with guarded.client(headers={"authorization": f"Basic {secret}"}) as basic:
        assert basic.get(manifest).status_code == 200
        assert basic.get("/edge/v1/status").status_code == 403
    with guarded.client(headers={"authorization": "Basic !"}) as wrong:
        assert wrong.get(manifest).status_code == 401


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v2/nothing", 400, "NAME_INVALID"),
        ("/v2/a/b/c/d", 400, "NAME_INVALID"),
        (f"/v2/{NAME}/manifests/none", 404, "MANIFEST_UNKNOWN"),
        ("/v2/none/manifests/latest", 404, "MANIFEST_UNKNOWN"),
        ("/v2/none/tags/list", 404, "MANIFEST_UNKNOWN"),
        (f"/v2/{NAME}/manifests/sha256:abc", 400, "NAME_INVALID"),
        (f"/v2/{NAME}/blobs/sha256:{'0' * 64}", 404, "BLOB_UNKNOWN"),
        (f"/v2/{NAME}/blobs/../../etc/passwd", 400, "NAME_INVALID"),
        (f"/v2/UPPER/blobs/sha256:{'0' * 64}", 400, "NAME_INVALID"),
        (f"/v2/{NAME}/referrers/x", 400, "NAME_INVALID"),
    ],
)
def test_what_is_not_there(http: httpx.Client, described: Described, path: str, status: int, code: str) -> None:
    reply = http.get(path)
    assert (reply.status_code, reply.json()["errors"][0]["code"]) == (status, code)
    described.check(reply)
    assert http.head(path).status_code == status


def test_nothing_is_written(http: httpx.Client) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert http.request(method, f"/v2/{NAME}/manifests/{TAG}", content=b"{}").status_code in (403, 405)
    assert http.post(f"/v2/{NAME}/blobs/uploads/").status_code in (403, 405)


def test_a_quarantined_file_is_not_given(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store", seed=SEED)
    digest = store.get(DEFAULT_MODEL).manifest.config.digest
    assert lookup(store, Limits(), f"{NAME}/blobs/{digest}").path == store.blobs.path(digest)
    store.quarantine(digest, "a test said so")
    with pytest.raises(BlobNotFound):
        lookup(store, Limits(), f"{NAME}/blobs/{digest}")
    with pytest.raises(ModelNotFound):
        lookup(store, Limits(), f"{NAME}/manifests/{TAG}")


def test_the_bytes_are_counted(guarded: RunningAppliance, http: httpx.Client, model: StoredModel) -> None:
    with guarded.client(headers={"x-api-key": key_of(guarded, "view")}) as viewer:

        def sent() -> float:
            lines = viewer.get("/metrics").text.splitlines()
            return next(float(line.split()[1]) for line in lines if line.startswith("edge_store_sent"))

        before = sent()
        http.get(f"/v2/{NAME}/blobs/{model.files[0].digest}", headers={"range": "bytes=0-99999"})
        assert sent() - before == 100_000


def test_errors_are_a_registrys(http: httpx.Client) -> None:
    assert json.loads(http.get("/v2/x").text).keys() == {"errors"}
