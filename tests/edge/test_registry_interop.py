"""What other tools make of what we push, and we of what they push: skopeo, oras, Docker's model-spec, Ollama."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from edge.errors import InvalidModelFile, UnsupportedFormat
from edge.formats.gguf import read_gguf
from edge.store.blobs import BlobStore
from edge.store.details import Sampling, details_of
from edge.store.digest import Digest, digest_bytes
from edge.store.fetch import plan, pull
from edge.store.manifest import ARTIFACT_TYPE, CONFIG_TYPE, MANIFEST_TYPE, WEIGHT_TYPE
from edge.store.models import ModelStore, PackageFile
from edge.store.network import Network
from edge.store.registry.artifacts import DOCKER_CONFIG_TYPE, DOCKER_GGUF_TYPE
from edge.store.registry.client import DOCKER_MANIFEST_TYPE, RegistryClient
from edge.store.registry.push import push
from edge.store.sources import RegistrySource
from edge.store.transfer import Control
from tests.edge.gguf_files import sized_gguf
from tests.edge.registries import Registry, docker_registry
from tests.edge.store_support import assert_sound

MODEL = sized_gguf(4_000)
"""1 MB."""
REPO = "models/tiny"
IDLE = Control(lambda _: None, lambda: False)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Generator[Registry]:
    with docker_registry(tmp_path_factory.mktemp("registry") / "data") as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    found = ModelStore(tmp_path / "store")
    path, text = tmp_path / "tiny.gguf", tmp_path / "LICENSE"
    path.write_bytes(MODEL)
    text.write_text("Do what you want.")
    found.add("tiny:q8", [PackageFile(path, "tiny.gguf"), PackageFile(text, "LICENSE")], details_of(read_gguf(path)))
    return found


@pytest.fixture
def other(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "other")


def run(command: Sequence[str], *, cwd: Path | None = None) -> str:
    """A tool's output; one that is missing skips the test by name."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def give(store: ModelStore, registry: Registry, tag: str = "q8", docker_tag: str = "") -> Digest:
    target = RegistrySource(registry.host, REPO, tag)
    done = push(store, "tiny:q8", target, docker_tag=docker_tag, network=Network(), control=IDLE)
    assert done.target.digest
    return done.target.digest


def test_skopeo_copies_what_we_push_and_we_read_what_it_pushes(
    store: ModelStore, other: ModelStore, registry: Registry, tmp_path: Path
) -> None:
    digest = give(store, registry)
    copy = tmp_path / "copy"
    skopeo = ["skopeo", "copy", "--quiet"]
    run([*skopeo, "--src-tls-verify=false", f"docker://{registry.host}/{REPO}:q8", f"oci:{copy}:tiny:copied"])
    copied = BlobStore(copy)
    model = store.get("tiny:q8")
    assert all(
        copied.has_sound(blob) for blob in (digest, model.manifest.config.digest, *(f.digest for f in model.files))
    )
    run([*skopeo, "--dest-tls-verify=false", f"oci:{copy}:tiny:copied", f"docker://{registry.host}/by/skopeo:v1"])
    model = pull(other, f"oci://{registry.host}/by/skopeo:v1")
    assert (str(model.ref), model.digest) == ("skopeo:v1", digest)
    assert_sound(other.root)


def test_oras_pulls_what_we_push(store: ModelStore, registry: Registry, tmp_path: Path) -> None:
    model = store.get("tiny:q8")
    (tmp_path / "bom.json").write_text("{}")
    store.attach(model.digest, "application/vnd.cyclonedx+json", [PackageFile(tmp_path / "bom.json", "bom.json")])
    give(store, registry)
    there = f"{registry.host}/{REPO}:q8"
    run(["oras", "pull", "--plain-http", there, "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "tiny.gguf").read_bytes() == MODEL
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do what you want."
    found = json.loads(run(["oras", "discover", "--plain-http", "--format", "json", there]))
    assert [entry["artifactType"] for entry in found["referrers"]] == ["application/vnd.cyclonedx+json"]


def test_we_pull_what_oras_pushes_and_attaches(
    store: ModelStore, other: ModelStore, registry: Registry, tmp_path: Path
) -> None:
    model = store.get("tiny:q8")
    (tmp_path / "config.json").write_bytes(store.blobs.path(model.manifest.config.digest).read_bytes())
    (tmp_path / "model.sig").write_text("signature")
    there = f"{registry.host}/by/oras:v1"
    run(
        ["oras", "push", "--plain-http", "--artifact-type", ARTIFACT_TYPE, "--config", f"config.json:{CONFIG_TYPE}",
         there, f"tiny.gguf:{WEIGHT_TYPE}"],
        cwd=tmp_path,
    )  # fmt: skip
    run(
        ["oras", "attach", "--plain-http", "--artifact-type", "application/x.signature", there, "model.sig"],
        cwd=tmp_path,
    )
    pulled = pull(other, f"oci://{there}")
    assert pulled.weights.read_bytes() == MODEL
    assert pulled.quantization == model.quantization
    (attached,) = other.referrers(pulled.digest, "application/x.signature")
    (layer,) = other.read_referrer(attached).layers
    assert other.blobs.path(layer.digest).read_text() == "signature"
    assert_sound(other.root)


def test_we_pull_a_gguf_that_oras_pushed_as_it_is(other: ModelStore, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "Tiny-Q8_0.gguf").write_bytes(MODEL)
    (tmp_path / "README.md").write_text("A model.")
    there = f"{registry.host}/plain/tiny:v2"
    run(["oras", "push", "--plain-http", there, "Tiny-Q8_0.gguf", "README.md:text/markdown"], cwd=tmp_path)
    model = pull(other, f"oci://{there}")
    assert (str(model.ref), model.weights.read_bytes()) == ("tiny:v2", MODEL)
    assert model.source is not None
    assert model.source.startswith(f"oci://{there}@sha256:")
    assert [file.name for file in model.files] == ["Tiny-Q8_0.gguf"]


def test_dockers_form_is_a_second_manifest_over_the_same_bytes(
    store: ModelStore, other: ModelStore, registry: Registry
) -> None:
    give(store, registry, docker_tag="docker")
    with RegistryClient(registry.host, Network()) as client:
        document = json.loads(client.manifest(REPO, "docker").data)
    assert document["mediaType"] == MANIFEST_TYPE
    assert document["config"]["mediaType"] == DOCKER_CONFIG_TYPE
    assert document["layers"][0] == {"mediaType": DOCKER_GGUF_TYPE, "digest": digest_bytes(MODEL), "size": len(MODEL)}
    data = registry.blob(Digest(document["config"]["digest"])).read_bytes()
    config = json.loads(data)
    assert config["config"]["gguf"]["quantization"] == config["config"]["quantization"] == "F32"
    assert [file["diffID"] for file in config["files"]] == config["rootfs"]["diff_ids"]
    assert [file["diffID"] for file in config["files"]] == [layer["digest"] for layer in document["layers"]]
    model = pull(other, f"oci://{registry.host}/{REPO}:docker")
    assert model.weights.read_bytes() == MODEL
    assert "Do what you want." in [file.path.read_text("utf-8") for file in model.files if file.name != "tiny.gguf"][-1]
    assert_sound(other.root)


class Foreign:
    """Puts manifests of others into a registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def blob(self, data: bytes, media_type: str, name: str = "") -> dict[str, object]:
        with RegistryClient(self.registry.host, Network()) as client:
            client.put_blob("foreign/model", data)
        named: dict[str, object] = {"annotations": {"org.opencontainers.image.title": name}} if name else {}
        return {"mediaType": media_type, "digest": digest_bytes(data), "size": len(data), **named}

    def put(self, document: object, media_type: str) -> str:
        with RegistryClient(self.registry.host, Network()) as client:
            client.put_manifest("foreign/model", "v1", json.dumps(document).encode(), media_type)
        return f"oci://{self.registry.host}/foreign/model:v1"


@pytest.fixture
def foreign(registry: Registry) -> Foreign:
    return Foreign(registry)


def test_an_ollama_model_with_its_defaults(other: ModelStore, foreign: Foreign) -> None:
    params = b'{"temperature":0.2,"top_p":0.9,"stop":["<|im_end|>"],"num_ctx":4096}'
    layers = [
        foreign.blob(MODEL, "application/vnd.ollama.image.model"),
        foreign.blob(b"{{ .Prompt }}", "application/vnd.ollama.image.template"),
        foreign.blob(b"Be brief.", "application/vnd.ollama.image.system"),
        foreign.blob(b"MIT", "application/vnd.ollama.image.license"),
        foreign.blob(params, "application/vnd.ollama.image.params"),
    ]
    config = foreign.blob(b'{"model_format":"gguf"}', "application/vnd.docker.container.image.v1+json")
    document = {"schemaVersion": 2, "mediaType": DOCKER_MANIFEST_TYPE, "config": config, "layers": layers}
    source = foreign.put(document, DOCKER_MANIFEST_TYPE)
    assert plan(other, source).size_bytes == len(MODEL) + len(b"Be brief.MIT") + len(params)
    model = pull(other, source)
    assert model.details.sampling == Sampling(temperature=0.2, top_p=0.9, stop=("<|im_end|>",))
    assert (model.details.system, model.details.template) == ("Be brief.", "")
    assert model.weights.read_bytes() == MODEL
    assert_sound(other.root)


@pytest.mark.parametrize(
    ("kind", "data", "error", "reason"),
    [
        ("application/vnd.ollama.image.adapter", MODEL, UnsupportedFormat, "adapter"),
        ("application/vnd.cncf.model.weight.v1.tar+gzip", b"x", UnsupportedFormat, "0 GGUF files"),
        ("application/vnd.oci.image.layer.v1.tar+gzip", b"x", UnsupportedFormat, "0 GGUF files"),
        ("application/vnd.docker.ai.safetensors", b"x", UnsupportedFormat, "0 GGUF files"),
        ("application/vnd.docker.ai.gguf.v3", b"PK\x03\x04" + bytes(100), InvalidModelFile, "pickle"),
        ("application/vnd.docker.ai.gguf.v3", MODEL[:-1], InvalidModelFile, "cut short"),
    ],
)
def test_what_is_no_model_of_ours_is_refused_with_the_reason(
    other: ModelStore, foreign: Foreign, kind: str, data: bytes, error: type[Exception], reason: str
) -> None:
    config = foreign.blob(b"{}", "application/vnd.oci.empty.v1+json")
    layers = [foreign.blob(data, kind)]
    document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": layers}
    with pytest.raises(error, match=reason):
        pull(other, foreign.put(document, MANIFEST_TYPE))
    assert other.list() == []


def test_a_modelpack_whose_paths_lead_out_is_refused(
    other: ModelStore, foreign: Foreign, store: ModelStore, registry: Registry
) -> None:
    config = store.blobs.path(store.get("tiny:q8").manifest.config.digest).read_bytes()
    layers = [foreign.blob(MODEL, WEIGHT_TYPE, "../../etc/passwd")]
    document = {
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": ARTIFACT_TYPE,
        "config": foreign.blob(config, CONFIG_TYPE), "layers": layers,
    }  # fmt: skip
    with pytest.raises(InvalidModelFile, match="not allowed"):
        pull(other, foreign.put(document, MANIFEST_TYPE))
    assert other.list() == []
    assert not list(other.root.glob("ingest/*"))
