"""Bills of materials."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from edge.formats.gguf import read_gguf
from edge.store.details import QUANTIZED_FROM, AdapterDetails, ModelDetails, details_of
from edge.store.models import ModelStore, PackageFile, StoredModel
from edge.trust.policy import SBOM_TYPE
from quantize.sbom import attach_sbom
from tests.edge.store_support import write_gguf
from tests.quantize.boms import checked_sbom

PLAIN = ModelDetails()
FULL = ModelDetails(
    architecture="llama", quantization="Q4_0", num_parameters=10**9, context_tokens=4096, license="apache-2.0",
    source="hf://somebody/some model/file.gguf@main", title="Tiny \N{SNOWMAN}", system="Be kind.\n",
    annotations={QUANTIZED_FROM: "the original", "dev.slm-edge.quantized-from-digest": f"sha256:{'ab' * 32}"},
)  # fmt: skip
KINDS = {
    "plain": PLAIN,
    "full": FULL,
    "embeddings": replace(FULL, pooling="mean", license="CC-BY-4.0"),
    "reranker": replace(FULL, pooling="rank", license="llama3.2 (community)"),
    "sees": replace(FULL, projector="more.gguf"),
    "adapter": replace(FULL, adapter=AdapterDetails(rank=8, base="tiny")),
    "from nowhere": replace(PLAIN, annotations={QUANTIZED_FROM: "a label"}),
}


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def add(store: ModelStore, details: ModelDetails) -> StoredModel:
    gguf = write_gguf(store.root.parent / "m.gguf")
    files = [PackageFile(gguf, "m.gguf"), PackageFile(gguf, "more.gguf"), PackageFile(gguf, "docs/LICENSE")]
    return store.add("plant/tiny:q4", files, details)


@pytest.mark.parametrize("details", KINDS.values(), ids=KINDS.keys())
def test_a_bill_is_valid_for_every_kind_of_model(store: ModelStore, details: ModelDetails) -> None:
    model = add(store, details)
    attach_sbom(store, model)
    document = checked_sbom(store, model)
    assert document["metadata"]["component"]["type"] == "machine-learning-model"
    files = {part["name"]: part["hashes"][0]["content"] for part in document["components"] if part["type"] == "file"}
    assert files == {file.name: file.digest.hex for file in model.files}


def test_the_card_says_what_the_package_says(store: ModelStore) -> None:
    model = add(store, FULL)
    attach_sbom(store, model)
    subject = checked_sbom(store, model)["metadata"]["component"]
    assert (subject["name"], subject["version"]) == ("plant/tiny", "q4")
    assert subject["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert subject["modelCard"]["modelParameters"]["task"] == "text-generation"
    notes = {p["name"]: p["value"] for p in subject["properties"]}
    assert notes["dev.slm-edge.manifest"] == model.digest
    assert (notes["dev.slm-edge.quantization"], notes["dev.slm-edge.context-tokens"]) == ("Q4_0", "4096")


def test_the_same_package_gives_the_same_bytes_and_one_bill(store: ModelStore, tmp_path: Path) -> None:
    model, other = add(store, FULL), ModelStore(tmp_path / "other" / "store")
    first = attach_sbom(store, model)
    assert attach_sbom(store, model) == first
    assert len(store.referrers(model.digest, SBOM_TYPE)) == 1
    assert attach_sbom(other, add(other, FULL)).digest == first.digest


def test_the_default_model_has_a_valid_bill(tmp_path: Path) -> None:
    from tests.support import DEFAULT_MODEL, SEED

    store = ModelStore(tmp_path / "store", seed=SEED)
    model = store.get(DEFAULT_MODEL)
    attach_sbom(store, model)
    assert checked_sbom(store, model)["metadata"]["component"]["name"] == "smollm2"


def test_the_check_finds_what_breaks_the_schema(store: ModelStore) -> None:
    model = add(store, FULL)
    attach_sbom(store, model)
    document = checked_sbom(store, model)
    document["metadata"]["component"]["modelCard"]["invented"] = 1
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document)) is not None
    assert details_of(read_gguf(model.files[0].path)).architecture
