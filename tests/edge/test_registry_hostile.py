"""Registries that lie: whatever they answer, there is an error that says so, soon, and nothing in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from edge.errors import (
    DigestMismatch,
    DiskFull,
    EdgeError,
    InvalidModelFile,
    SourceUnavailable,
    UnsupportedFormat,
)
from edge.formats.gguf import read_gguf
from edge.store import blobs as blob_module
from edge.store import http
from edge.store.blobs import BlobStore
from edge.store.details import details_of
from edge.store.digest import digest_bytes
from edge.store.fetch import pull
from edge.store.manifest import (
    ARTIFACT_TYPE,
    CONFIG_TYPE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    SIGNATURE_TYPE,
    WEIGHT_TYPE,
    Descriptor,
)
from edge.store.models import ModelStore, PackageFile
from edge.store.network import Network
from edge.store.registry.artifacts import is_model_pack, only_manifest, parts_of, sampling_of
from edge.store.registry.client import Document, RegistryClient
from edge.store.transfer import RESERVE_BYTES
from tests.edge.gguf_files import sized_gguf
from tests.edge.store_support import NoSync, write_gguf

HOST, REPO = "registry.example.org", "models/tiny"
Answers = Callable[[httpx.Request], httpx.Response]


@dataclass(frozen=True)
class Fake(Network):
    """Leads every request to a function."""

    answer: Answers = field(default=lambda _: httpx.Response(404))

    @override
    def client(self, headers: Mapping[str, str], *, auth: httpx.Auth | None = None) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self.answer), auth=auth, follow_redirects=True)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_BACKOFF_S", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def manifest(**changed: object) -> bytes:
    blob = {"digest": f"sha256:{'1' * 64}", "size": 10}
    document: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, **blob},
        "layers": [{"mediaType": WEIGHT_TYPE, **blob, "annotations": {"org.cncf.model.filepath": "m.gguf"}}],
    }
    return json.dumps({**document, **changed}).encode()


class Bytes(httpx.SyncByteStream):
    """A body as it comes, not decoded."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @override
    def __iter__(self) -> Iterator[bytes]:
        yield self._data


def served(data: bytes, media_type: str = MANIFEST_TYPE, *, digest: str = "") -> Answers:
    def answer(request: httpx.Request) -> httpx.Response:
        if "/manifests/v1" not in request.url.path:
            return httpx.Response(404)
        stated = {"Docker-Content-Digest": digest} if digest else {}
        return httpx.Response(200, content=data, headers={"Content-Type": media_type, **stated})

    return answer


CONFIG = {"mediaType": CONFIG_TYPE, "digest": f"sha256:{'1' * 64}", "size": 10}
ESCAPE = {"errors": [{"code": "X", "message": "a\x1b[2Jb"}]}


def away(request: httpx.Request) -> httpx.Response:
    """Leads to a place without TLS."""
    if request.url.scheme == "http":
        return httpx.Response(200, content=manifest())
    return httpx.Response(302, headers={"Location": "http://elsewhere.example.org/"})


CASES: dict[str, tuple[Answers, type[EdgeError], str]] = {
    "too long": (served(b" " * (5 << 20)), SourceUnavailable, "more than 4,194,304 bytes"),
    "web page": (served(b"<html>"), InvalidModelFile, "refused"),
    "nested": (served(b"[" * 100_000), InvalidModelFile, "refused"),
    "other digest": (served(manifest(), digest=f"sha256:{'2' * 64}"), DigestMismatch, "2222"),
    "no layers": (served(manifest(layers=[])), InvalidModelFile, "length"),
    "md5": (served(manifest(config={**CONFIG, "digest": "md5:1"})), InvalidModelFile, "digest"),
    "negative": (served(manifest(config={**CONFIG, "size": -1})), InvalidModelFile, "size"),
    "empty list": (served(b'{"manifests": []}', INDEX_TYPE), UnsupportedFormat, "list of 0 manifests"),
    "no blobs": (served(manifest()), SourceUnavailable, "404"),
    "loop": (lambda asked: httpx.Response(302, headers={"Location": str(asked.url)}), SourceUnavailable, "redirects"),
    "away": (away, SourceUnavailable, "TLS"),
    "teapot": (lambda _: httpx.Response(418, content=b"\x1b[2J" * 99), SourceUnavailable, "418"),
    "escape": (lambda _: httpx.Response(400, json=ESCAPE), SourceUnavailable, r"a\?\[2Jb"),
    "gzip": (
        lambda _: httpx.Response(200, stream=Bytes(b"{}"), headers={"Content-Encoding": "gzip"}), SourceUnavailable,
        "cannot be used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_what_registries_answer(store: ModelStore, case: str) -> None:
    answer, error, reason = CASES[case]
    with pytest.raises(error, match=reason) as caught:
        pull(store, f"oci://{HOST}/{REPO}:v1", network=Fake(answer=answer))
    assert "\x1b" not in str(caught.value)
    assert store.list() == []


def uploading(tmp_path: Path, answer: Answers, data: bytes = b"x" * 100) -> None:
    path, blobs = tmp_path / "blob", BlobStore(tmp_path / "store")
    path.write_bytes(data)
    blobs.create()
    blob = Descriptor(media_type=WEIGHT_TYPE, digest=digest_bytes(data), size=len(data))
    with RegistryClient(HOST, Fake(answer=answer)) as client, blobs.ingest("push") as partial:
        client.upload(REPO, blob, path, partial, "m.gguf")


def test_an_upload_that_is_forgotten_each_time_comes_to_an_end(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.method)
        status = {"POST": 202, "PATCH": 202}.get(request.method, 404)
        return httpx.Response(status, headers={"Location": "/v2/u/1"})

    with pytest.raises(SourceUnavailable, match="did not arrive"):
        uploading(tmp_path, answer)
    assert seen.count("POST") == http.MAX_TRIES


@pytest.mark.parametrize("location", ["", "http://elsewhere.example.org/u", "ftp://x/u"])
def test_an_upload_is_not_led_away_from_tls(tmp_path: Path, location: str) -> None:
    headers = {"Location": location} if location else {}
    with pytest.raises(SourceUnavailable, match="TLS"):
        uploading(tmp_path, lambda _: httpx.Response(202, headers=headers))


def test_an_upload_at_another_host_is_not_told_who_asks(tmp_path: Path) -> None:
    seen: list[tuple[str, str, bool]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, request.url.host, "Authorization" in request.headers))
        status = {"POST": 202, "PATCH": 202, "PUT": 201}[request.method]
        return httpx.Response(status, headers={"Location": "https://storage.example.net/u?state=1"})

    uploading(tmp_path, answer)
    assert [(method, host) for method, host, _ in seen] == [
        ("POST", HOST), ("PATCH", "storage.example.net"), ("PUT", "storage.example.net"),
    ]  # fmt: skip
    assert not any(told for _, _, told in seen)


def test_a_registry_behind_a_proxy_that_ends_tls(tmp_path: Path) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.scheme)
        status = {"POST": 202, "PATCH": 202, "PUT": 201}[request.method]
        return httpx.Response(status, headers={"Location": f"http://{HOST}/v2/u/1"})

    uploading(tmp_path, answer)
    assert set(seen) == {"https"}


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, content=b"x" * 100),
        httpx.Response(206, content=b"x" * 10, headers={"Content-Range": "bytes 1-10/100"}),
        httpx.Response(206, content=b"x" * 9, headers={"Content-Range": "bytes 0-9/100"}),
        httpx.Response(206, content=b"x" * 11, headers={"Content-Range": "bytes 0-9/100"}),
        httpx.Response(206, content=b"x" * 10),
    ],
)
def test_another_part_than_was_asked_for_is_refused(answer: httpx.Response) -> None:
    with RegistryClient(HOST, Fake(answer=lambda _: answer)) as client, pytest.raises(SourceUnavailable):
        client.fetch_range(REPO, digest_bytes(b""), 0, 10)


NAMES = ["schemaVersion", "mediaType", "config", "layers", "digest", "size", "annotations", "manifests"]
SCALARS = st.none() | st.integers() | st.text(max_size=8) | st.sampled_from([ARTIFACT_TYPE, CONFIG_TYPE, WEIGHT_TYPE])
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)


@given(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
def test_no_document_of_a_registry_is_more_than_refused(data: bytes) -> None:
    for media_type in (MANIFEST_TYPE, INDEX_TYPE):
        document = Document(data, media_type, digest_bytes(data))
        try:
            is_model_pack(document)
            parts_of(only_manifest(document, lambda _, d=document: d, what="x"), what="x")
        except EdgeError:
            pass
    sampling_of(data)


def ollama(*layers: tuple[str, bytes]) -> bytes:
    named = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest_bytes(data), "size": len(data)}
        for kind, data in layers
    ]
    return manifest(artifactType="", layers=named)


def having(data: bytes, *others: bytes, attached: bytes = b"", seen: list[str] | None = None) -> Answers:
    """A registry with a manifest `v1` and blobs or manifests by their digests."""
    known = {str(digest_bytes(other)): other for other in others} | {"v1": data}

    def answer(request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        if seen is not None:
            seen.append(name)
        if "/referrers/" in request.url.path and attached:
            return httpx.Response(200, content=attached, headers={"Content-Type": INDEX_TYPE})
        if name not in known:
            return httpx.Response(404)
        return httpx.Response(200, stream=Bytes(known[name]), headers={"Content-Type": MANIFEST_TYPE})

    return answer


def test_a_file_that_is_named_twice_comes_once(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_module, "_LOCK_TIMEOUT_S", 0.1)
    weights, text = sized_gguf(100), b"as you like"
    document = ollama(("license", text), ("model", weights), ("license", text))
    model = pull(store, f"oci://{HOST}/{REPO}:v1", network=Fake(answer=having(document, weights, text)))
    assert [file.size_bytes for file in model.files] == [len(weights), len(text)]


def test_a_long_system_prompt_is_refused(store: ModelStore) -> None:
    weights, text = sized_gguf(100), b"x" * 300_000
    document = ollama(("model", weights), ("system", text))
    with pytest.raises(InvalidModelFile, match="300,000 bytes"):
        pull(store, f"oci://{HOST}/{REPO}:v1", network=Fake(answer=having(document, weights, text)))
    assert store.list() == []


@dataclass
class Flood(httpx.SyncByteStream):
    """A body of 64 MiB."""

    sent_bytes: int = 0

    @override
    def __iter__(self) -> Iterator[bytes]:
        for _ in range(64):
            self.sent_bytes += 1 << 20
            yield bytes(1 << 20)


@pytest.mark.parametrize("stated", [{}, {"Content-Length": str(64 << 20)}])
def test_no_more_of_a_blob_is_taken_than_it_has(store: ModelStore, stated: Mapping[str, str]) -> None:
    floods: list[Flood] = []
    weights = sized_gguf(100)

    def answer(request: httpx.Request) -> httpx.Response:
        if "/blobs/" not in request.url.path:
            return having(ollama(("model", weights)))(request)
        floods.append(Flood())
        return httpx.Response(200, headers=stated, stream=floods[-1])

    with pytest.raises(SourceUnavailable):
        pull(store, f"oci://{HOST}/{REPO}:v1", network=Fake(answer=answer))
    assert sum(flood.sent_bytes for flood in floods) <= http.MAX_TRIES << 20
    assert len(floods) == (1 if stated else http.MAX_TRIES)


class Full(NoSync):
    """A disk with a little room."""

    @override
    def free_bytes(self, path: Path) -> int:
        return RESERVE_BYTES + 1000


def test_a_file_without_a_length_looks_for_room_as_it_comes(tmp_path: Path) -> None:
    flood = Flood()
    network = Fake(answer=lambda asked: httpx.Response(200, stream=flood if asked.method == "GET" else Bytes(b"")))
    with pytest.raises(DiskFull):
        pull(ModelStore(tmp_path / "store", files=Full()), f"https://{HOST}/m.gguf", network=network)
    assert flood.sent_bytes == 1 << 20


def referrer(subject: bytes, kind: str) -> tuple[bytes, dict[str, object]]:
    about = {"mediaType": MANIFEST_TYPE, "digest": digest_bytes(subject), "size": len(subject)}
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_bytes(b"{}"), "size": 2}
    data = manifest(artifactType=kind, config=empty, layers=[empty], subject=about)
    return data, {"mediaType": MANIFEST_TYPE, "digest": digest_bytes(data), "size": len(data), "artifactType": kind}


def test_before_admission_only_signatures_of_this_very_model_come(store: ModelStore) -> None:
    mine = manifest()
    good, bill = referrer(mine, SIGNATURE_TYPE), referrer(mine, "application/vnd.cyclonedx+json")
    other = referrer(manifest(annotations={"x": "y"}), SIGNATURE_TYPE)
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [other[1], bill[1], good[1]]}
    seen: list[str] = []
    answer = having(
        mine, b"{}", good[0], bill[0], other[0], attached=json.dumps(index).encode(), seen=seen
    )  # fmt: skip

    def admit(digest: object, _: object) -> None:
        assert [found.digest for found in store.referrers(digest_bytes(mine))] == [digest_bytes(good[0])]
        raise InvalidModelFile(str(digest), "not let in")

    with pytest.raises(InvalidModelFile, match="not let in"):
        pull(store, f"oci://{HOST}/{REPO}:v1", network=Fake(answer=answer), admit=admit)
    assert str(digest_bytes(bill[0])) not in seen
    assert list(store.blobs.digests()) == []


def test_a_manifest_that_nobody_could_read_again_gets_no_name(store: ModelStore, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    details = replace(details_of(read_gguf(path)), system="x" * (5 << 20))
    with pytest.raises(InvalidModelFile, match="4,194,304 are allowed"):
        store.add("tiny:v1", [PackageFile(path, "m.gguf")], details)
    assert store.list() == []
    assert store.collect().blocked_by == ()
