"""Push and pull against a real docker-registry; skopeo and oras read what we push, and we read what they push."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge.errors import (
    Cancelled,
    DigestMismatch,
    EdgeError,
    SourceUnavailable,
)
from edge.formats.gguf import read_gguf
from edge.store import http
from edge.store.delta import DELTA_TYPE, attach_delta
from edge.store.details import details_of
from edge.store.digest import Digest
from edge.store.fetch import plan, pull
from edge.store.manifest import MANIFEST_TYPE, SIGNATURE_TYPE, ModelRef
from edge.store.models import ModelStore, PackageFile, StoredModel
from edge.store.network import Network, parse_mirrors
from edge.store.registry import client as client_module
from edge.store.registry.client import RegistryClient, fallback_tag
from edge.store.registry.push import Pushed, push
from edge.store.sources import RegistrySource
from edge.store.transfer import Control
from tests.edge.gguf_files import sized_gguf
from tests.edge.registries import Registry, Wire, asked, docker_registry, wire_to
from tests.edge.store_support import assert_sound

MODEL = sized_gguf(12_000)
"""3 MB."""
REPO = "models/tiny"
IDLE = Control(lambda _: None, lambda: False)


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_BACKOFF_S", 0.001)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Generator[Registry]:
    with docker_registry(tmp_path_factory.mktemp("registry") / "data") as found:
        yield found


@pytest.fixture
def registry(running: Registry) -> Registry:
    """An empty one."""
    shutil.rmtree(running.root, ignore_errors=True)
    return running


@pytest.fixture
def wire(registry: Registry) -> Generator[Wire]:
    with wire_to(registry.port) as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """With the model ``tiny:q8`` and a licence."""
    found = ModelStore(tmp_path / "store")
    path, text = tmp_path / "tiny.gguf", tmp_path / "LICENSE"
    path.write_bytes(MODEL)
    text.write_text("Do what you want.")
    files = [PackageFile(path, "tiny.gguf"), PackageFile(text, "LICENSE")]
    found.add("tiny:q8", files, details_of(read_gguf(path)))
    return found


@pytest.fixture
def other(tmp_path: Path) -> ModelStore:
    """Another device's, empty."""
    return ModelStore(tmp_path / "other")


def pushed(store: ModelStore, host: str, *, docker_tag: str = "", repo: str = REPO) -> Pushed:
    target = RegistrySource(host, repo)
    return push(store, "tiny:q8", target, docker_tag=docker_tag, network=Network(), control=IDLE)


def is_there(wire: Wire) -> bool:
    return asked("GET", f"http://{wire.host}/v2/{REPO}/manifests/q8", {"Accept": MANIFEST_TYPE})[0] == 200


def weights_of(model: StoredModel) -> Digest:
    return next(file.digest for file in model.files if file.name.endswith(".gguf"))


def test_what_was_pushed_is_pulled_byte_for_byte(store: ModelStore, other: ModelStore, wire: Wire) -> None:
    done = pushed(store, wire.host)
    mine = store.get("tiny:q8")
    assert str(done.target) == f"oci://{wire.host}/{REPO}:q8@{mine.digest}"
    assert done.sent_bytes == wire.up_bytes == mine.size_bytes + mine.manifest.config.size
    theirs = pull(other, f"oci://{wire.host}/{REPO}:q8")
    assert (str(theirs.ref), theirs.digest, theirs.manifest) == ("tiny:q8", mine.digest, mine.manifest)
    assert wire.down_bytes == done.sent_bytes
    assert len(assert_sound(other.root)) == 1


def test_what_is_there_is_neither_sent_nor_fetched_again(store: ModelStore, other: ModelStore, wire: Wire) -> None:
    first = pushed(store, wire.host)
    again = pushed(store, wire.host)
    assert (again.sent_bytes, again.present_bytes) == (0, first.sent_bytes)
    source = f"oci://{wire.host}/{REPO}:q8"
    assert not plan(other, source).is_present
    pull(other, source)
    before = wire.down_bytes
    assert plan(other, source).is_present
    pull(other, f"{source}@{first.target.digest}", name="mine:v1")
    assert wire.down_bytes == before
    assert [str(model.ref) for model in assert_sound(other.root)] == ["mine:v1", "tiny:q8"]


def test_two_pulls_at_once_fetch_it_once(store: ModelStore, wire: Wire, tmp_path: Path) -> None:
    sent_bytes = pushed(store, wire.host).sent_bytes

    def fetch(name: str) -> StoredModel:
        return pull(ModelStore(tmp_path / "other"), f"oci://{wire.host}/{REPO}:q8", name=name)

    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(fetch, ("a", "b")))) == 2
    assert wire.down_bytes == sent_bytes
    assert [str(model.ref) for model in assert_sound(tmp_path / "other")] == ["a:latest", "b:latest"]


def test_a_damaged_blob_of_the_store_is_mended_by_a_pull(store: ModelStore, wire: Wire) -> None:
    pushed(store, wire.host)
    path = store.get("tiny:q8").weights
    path.write_bytes(MODEL[:-1] + b"\xff")
    pull(store, f"oci://{wire.host}/{REPO}:q8")
    assert_sound(store.root)


def test_a_damaged_blob_of_the_store_is_not_pushed(store: ModelStore, wire: Wire) -> None:
    model = store.get("tiny:q8")
    model.weights.write_bytes(MODEL[:-1] + b"\xff")
    with pytest.raises(DigestMismatch, match="of this store") as caught:
        pushed(store, wire.host)
    assert caught.value.expected == weights_of(model)
    assert not is_there(wire)


# ---------------------------------------------------------------------- bad bytes


def test_a_bit_flipped_on_the_wire_is_refused(store: ModelStore, other: ModelStore, wire: Wire) -> None:
    pushed(store, wire.host)
    wire.flip_at = 1_234_567
    with pytest.raises(DigestMismatch) as caught:
        pull(other, f"oci://{wire.host}/{REPO}:q8")
    assert caught.value.expected == weights_of(store.get("tiny:q8"))
    assert other.list() == []
    assert not other.blobs.has(weights_of(store.get("tiny:q8")))
    wire.flip_at = -1
    pull(other, f"oci://{wire.host}/{REPO}:q8")
    assert_sound(other.root)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["wire", "registry"])
def test_bad_bytes_are_healed_from_the_mirror(
    where: str, store: ModelStore, other: ModelStore, wire: Wire, registry: Registry, tmp_path: Path
) -> None:
    pushed(store, wire.host)
    digest = weights_of(store.get("tiny:q8"))
    with docker_registry(tmp_path / "mirror") as mirror, wire_to(mirror.port) as beside:
        pushed(store, mirror.host, repo=f"cache/{REPO}")
        if where == "wire":
            wire.flip_at = 2_000_000
        else:
            flip(registry.blob(digest), 2_000_000)
        network = Network(mirrors=parse_mirrors(f"{wire.host}={beside.host}/cache"))
        pull(other, f"oci://{wire.host}/{REPO}:q8", network=network)
        assert beside.down_bytes == len(MODEL)
    assert_sound(other.root)


def test_a_manifest_that_was_swapped_is_refused(store: ModelStore, other: ModelStore, registry: Registry) -> None:
    done = pushed(store, registry.host)
    assert done.target.digest
    flip(registry.blob(done.target.digest), 100)
    with pytest.raises((DigestMismatch, SourceUnavailable)):
        pull(other, f"oci://{registry.host}/{REPO}@{done.target.digest}")
    assert other.list() == []


def test_another_model_under_the_digest_is_refused(store: ModelStore, other: ModelStore, wire: Wire) -> None:
    pushed(store, wire.host)
    wrong = Digest(f"sha256:{'0' * 64}")
    with pytest.raises(SourceUnavailable, match="has no"):
        pull(other, f"oci://{wire.host}/{REPO}:q8@{wrong}")


# ---------------------------------------------------------------------- bad links


def test_a_download_goes_on_where_it_stopped_and_at_the_mirror(
    store: ModelStore, other: ModelStore, wire: Wire, registry: Registry
) -> None:
    pushed(store, wire.host)
    wire.drop_after = [1 << 30, 1_500_000, 0, 0]  # of the config, then of the weights
    with wire_to(registry.port) as mirror:
        network = Network(mirrors=parse_mirrors(f"{wire.host}={mirror.host}"))
        pull(other, f"oci://{wire.host}/{REPO}:q8", network=network)
        assert 0 < mirror.down_bytes <= len(MODEL) - 1_400_000
        total = store.get("tiny:q8").size_bytes + store.get("tiny:q8").manifest.config.size
        assert wire.down_bytes + mirror.down_bytes == total
    assert_sound(other.root)


def test_an_upload_goes_on_where_it_stopped(store: ModelStore, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "UPLOAD_BYTES", 1 << 18)
    reports: list[str] = []

    def cancelled() -> bool:
        return wire.up_bytes > 1_000_000 and len(reports) < 10**9

    with pytest.raises(Cancelled):
        push(
            store, "tiny:q8", RegistrySource(wire.host, REPO), network=Network(),
            control=Control(lambda p: reports.append(p.message), cancelled, "push"),
        )  # fmt: skip
    before = wire.up_bytes
    assert 1_000_000 < before < len(MODEL)
    done = pushed(store, wire.host)
    assert wire.up_bytes == store.get("tiny:q8").size_bytes + store.get("tiny:q8").manifest.config.size
    assert done.sent_bytes == wire.up_bytes - before


def test_an_upload_that_the_registry_forgot_begins_again(
    store: ModelStore, wire: Wire, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "UPLOAD_BYTES", 1 << 18)
    with pytest.raises(Cancelled):
        push(
            store, "tiny:q8", RegistrySource(wire.host, REPO), network=Network(),
            control=Control(lambda _: None, lambda: wire.up_bytes > 1_000_000, "push"),
        )  # fmt: skip
    shutil.rmtree(registry.root / "docker/registry/v2/repositories")
    pushed(store, wire.host)
    assert is_there(wire)


def test_a_link_that_breaks_in_the_middle_of_a_chunk(store: ModelStore, other: ModelStore, wire: Wire) -> None:
    passed = iter(range(1 << 30))

    def breaking() -> None:
        if next(passed) == 20:
            raise ConnectionAbortedError

    wire.before_up = breaking
    pushed(store, wire.host)
    pull(other, f"oci://{wire.host}/{REPO}:q8")
    assert_sound(other.root)


def test_a_registry_that_is_busy_is_asked_again_and_one_that_is_gone_is_named(
    store: ModelStore, other: ModelStore, wire: Wire
) -> None:
    pushed(store, wire.host)
    wire.statuses["/manifests/q8"] = 503
    with pytest.raises(SourceUnavailable, match="503"):
        pull(other, f"oci://{wire.host}/{REPO}:q8")
    assert len(wire.requests("GET", "/manifests/q8")) == http.MAX_TRIES
    with wire_to(9) as gone:
        pass
    with pytest.raises(SourceUnavailable, match=f"{gone.host} cannot be reached"):
        pull(other, f"oci://{gone.host}/{REPO}:q8")


def test_a_part_of_a_blob(store: ModelStore, wire: Wire) -> None:
    pushed(store, wire.host)
    digest = weights_of(store.get("tiny:q8"))
    with RegistryClient(wire.host, Network()) as client:
        before = wire.down_bytes
        assert client.fetch_range(REPO, digest, 1 << 20, 2 << 20) == MODEL[1 << 20 : 2 << 20]
        assert wire.down_bytes - before == 1 << 20
        with pytest.raises(SourceUnavailable):
            client.fetch_range(REPO, digest, len(MODEL), len(MODEL) + 1)


# ---------------------------------------------------------------------- what is attached


def test_what_is_attached_travels_with_the_model(
    store: ModelStore, other: ModelStore, registry: Registry, tmp_path: Path
) -> None:
    model = store.get("tiny:q8")
    (tmp_path / "bom.json").write_text("{}")
    bom = store.attach(model.digest, "application/vnd.cyclonedx+json", [PackageFile(tmp_path / "bom.json", "bom.json")])
    (tmp_path / "model.sig").write_text("signature")
    store.attach(model.digest, SIGNATURE_TYPE, [PackageFile(tmp_path / "model.sig", "model.sig")])
    assert pushed(store, registry.host).num_attached == 2
    assert pushed(store, registry.host).num_attached == 2
    url = f"http://{registry.host}/v2/{REPO}/manifests/{fallback_tag(model.digest)}"
    listed = json.loads(asked("GET", url, {"Accept": "application/vnd.oci.image.index.v1+json"})[1])
    kinds = ["application/vnd.cyclonedx+json", SIGNATURE_TYPE]
    assert sorted(entry["artifactType"] for entry in listed["manifests"]) == kinds

    seen: list[int] = []
    pull(
        other, f"oci://{registry.host}/{REPO}:q8",
        admit=lambda digest, _: seen.append(len(other.referrers(digest)) if not other.list() else -1),
    )  # fmt: skip
    assert seen == [1], "its signature is looked at before it is visible, and before the rest comes"
    assert len(other.referrers(model.digest)) == 2
    assert bom in other.referrers(model.digest, kinds[0])
    assert_sound(other.root)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_a_delta_makes_is_not_fetched(
    store: ModelStore, other: ModelStore, wire: Wire, registry: Registry, tmp_path: Path, is_damaged: bool
) -> None:
    pushed(store, wire.host)
    pull(other, f"oci://{wire.host}/{REPO}:q8")
    path = tmp_path / "next.gguf"
    path.write_bytes(MODEL[:-3000] + bytes(3000))
    base = store.get("tiny:q8")
    new = store.add("tiny:next", [PackageFile(path, "tiny.gguf")], base.details)
    attach_delta(store, base, new, IDLE)
    (attached,) = store.referrers(new.digest, DELTA_TYPE)
    (layer,) = store.read_referrer(attached).layers
    push(store, "tiny:next", RegistrySource(wire.host, REPO), network=Network(), control=IDLE)
    if is_damaged:
        flip(registry.blob(layer.digest), layer.size // 2)
    before = wire.down_bytes
    model = pull(other, f"oci://{wire.host}/{REPO}:next")
    fetched_bytes = wire.down_bytes - before - model.manifest.config.size
    assert fetched_bytes == (layer.size + len(MODEL) if is_damaged else layer.size)
    assert model.weights.read_bytes() == path.read_bytes()
    assert len(assert_sound(other.root)) == 2


class Refused(EdgeError):
    code = "test"


def test_what_is_not_admitted_is_never_visible(store: ModelStore, other: ModelStore, registry: Registry) -> None:
    pushed(store, registry.host)

    def refuse(digest: Digest, ref: ModelRef) -> None:
        raise Refused(f"{ref} {digest}")

    with pytest.raises(Refused):
        pull(other, f"oci://{registry.host}/{REPO}:q8", admit=refuse)
    assert other.list() == []
    other.collect()
    assert list(other.blobs.digests()) == []
