"""Checkpoint to GGUF: the same bytes as llama.cpp's own converter, and clear errors for what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.errors import EdgeError, InvalidModelFile, RecipeError, UnsupportedFormat
from edge.formats.gguf import read_gguf
from quantize.checkpoint import ModelSettings, lossless_precision, open_checkpoint
from quantize.gguf.convert import convert
from quantize.gguf.sentencepiece import read_pieces
from tests.quantize.checkpoints import (
    bfloat16,
    config,
    make_llama3,
    make_mistral,
    make_smollm,
    weights,
    write_json,
    write_safetensors,
)
from tests.quantize.goldens import GOLDENS, describe_gguf
from tests.quantize.stories import make_stories

MAKERS = {"Tiny-SmolLM-1M-Instruct": make_smollm, "tiny-llama3": make_llama3, "tiny-mistral": make_mistral}


def golden(name: str, precision: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((GOLDENS / f"convert-{name}.json").read_text())
    return table[precision]


def converted(source: Path, target: Path, precision: str = "f16") -> dict[str, Any]:
    convert(open_checkpoint(source), target, use_f16=precision == "f16")
    return json.loads(json.dumps(describe_gguf(target)))


@pytest.mark.parametrize("precision", ["f16", "f32"])
@pytest.mark.parametrize("name", ["Tiny-SmolLM-1M-Instruct", "tiny-llama3"])
def test_the_file_is_the_converters_own(name: str, precision: str, tmp_path: Path) -> None:
    ours = converted(MAKERS[name](tmp_path / name), tmp_path / "out.gguf", precision)
    assert ours == golden(name, precision)


@pytest.mark.parametrize("precision", ["f16", "f32"])
def test_stories_is_the_converters_own(stories: Path, precision: str, tmp_path: Path) -> None:
    assert converted(stories, tmp_path / "out.gguf", precision) == golden("stories15M", precision)


@pytest.mark.parametrize("precision", ["f16", "f32"])
def test_only_the_placeholder_scores_differ(precision: str, tmp_path: Path) -> None:
    """From tokenizer.json alone the converter writes -1000 for every token; see quantize.gguf.vocabulary."""
    ours = converted(make_mistral(tmp_path / "tiny-mistral"), tmp_path / "out.gguf", precision)
    theirs = golden("tiny-mistral", precision)
    assert ours["tensors"] == theirs["tensors"]
    ours["metadata"].pop("tokenizer.ggml.scores")
    theirs["metadata"].pop("tokenizer.ggml.scores")
    assert ours["metadata"] == theirs["metadata"]


def test_scores_from_merges_order_tokens_as_sentencepiece_scores_do(stories: Path, tmp_path: Path) -> None:
    """tokenizer.json alone must give the tokenizer that tokenizer.model gives: ranks stand in for scores."""
    alone = make_stories(tmp_path / "stories15M", with_pieces=False)
    orders: list[list[int]] = []
    merged: list[int] = []
    for source in (stories, alone):
        target = tmp_path / "out.gguf"
        convert(open_checkpoint(source), target, use_f16=True)
        scores = np.array(read_gguf(target).metadata["tokenizer.ggml.scores"])
        texts = read_gguf(target).metadata["tokenizer.ggml.tokens"]
        assert isinstance(texts, list)
        if not orders:  # Runs of spaces share one score of minus a billion: among them there is no order to keep.
            merged = [i for i in range(259, len(texts)) if len(str(texts[i])) > 1 and scores[i] > -1e8]
        orders.append(sorted(merged, key=lambda i: -scores[i]))
    assert orders[0] == orders[1]


def test_precision_that_loses_nothing(tmp_path: Path) -> None:
    assert lossless_precision(open_checkpoint(make_smollm(tmp_path / "a"))) == "f32"
    assert lossless_precision(open_checkpoint(make_llama3(tmp_path / "b"))) == "f16"
    assert lossless_precision(open_checkpoint(make_mistral(tmp_path / "c"))) == "f32"


def test_progress_ends_at_one(tmp_path: Path) -> None:
    shares: list[float] = []
    convert(open_checkpoint(make_smollm(tmp_path / "a")), tmp_path / "o", use_f16=True, on_progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        table = json.loads((directory / name).read_text())
        write_json(directory / name, {k: v for k, v in (table | changes).items() if v != "absent"})

    return edit


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _lie_about_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(b"\xff" * 7 + path.read_bytes()[7:])


def _spoil(value: float, *, as_bf16: bool = False) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = weights(json.loads((directory / "config.json").read_text()), 1)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        stored = {k: bfloat16(v) for k, v in tensors.items()} if as_bf16 else tensors
        write_safetensors(directory / "model.safetensors", stored)

    return spoil


def _without_tensor(directory: Path) -> None:
    tensors = weights(json.loads((directory / "config.json").read_text()), 1)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    write_safetensors(directory / "model.safetensors", tensors)


def _with_tensor(directory: Path) -> None:
    tensors = weights(json.loads((directory / "config.json").read_text()), 1)
    tensors["model.layers.0.mlp.gate.weight"] = np.zeros((4, 4), np.float32)
    write_safetensors(directory / "model.safetensors", tensors)


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _index_with_missing_part(directory: Path) -> None:
    table = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    write_json(directory / "model.safetensors.index.json", {"weight_map": table})


def _index_outside(directory: Path) -> None:
    write_json(directory / "model.safetensors.index.json", {"weight_map": {"a": "../other.safetensors"}})


def _remove(*names: str) -> Callable[[Path], None]:
    def remove(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return remove


def _config_is_a_list(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def _front_matter(directory: Path) -> None:
    (directory / "README.md").write_text("---\na: [\n---\n")


def _pieces_cut(directory: Path) -> None:
    (directory / "tokenizer.model").write_bytes(b"\x0a\xff\x01abc")


WORDPIECE: dict[str, Any] = {"type": "WordPiece", "vocab": {}, "merges": []}

BROKEN: list[tuple[str, Callable[[Path], None], type[EdgeError], str]] = [
    ("no config", _remove("config.json"), RecipeError, "config.json"),
    ("config is a list", _config_is_a_list, InvalidModelFile, "JSON object"),
    ("another family", _edit("config.json", model_type="qwen2"), UnsupportedFormat, "Llama"),
    ("another class", _edit("config.json", architectures=["LlamaForTokens"]), UnsupportedFormat, "LlamaForCausalLM"),
    ("already quantized", _edit("config.json", quantization_config={"a": 1}), UnsupportedFormat, "already quantized"),
    ("a size is text", _edit("config.json", hidden_size="big"), InvalidModelFile, "hidden_size"),
    ("a size is absurd", _edit("config.json", vocab_size=1 << 40), InvalidModelFile, "vocab_size"),
    ("heads do not divide", _edit("config.json", num_key_value_heads=3), InvalidModelFile, "heads"),
    ("odd rope", _edit("config.json", rope_scaling={"rope_type": "yarn"}), UnsupportedFormat, "yarn"),
    ("wrong shape", _edit("config.json", intermediate_size=96), InvalidModelFile, "shape"),
    ("file cut short", _cut, InvalidModelFile, "cut short"),
    ("header lies", _lie_about_header, InvalidModelFile, "header"),
    ("NaN", _spoil(float("nan")), InvalidModelFile, "up_proj"),
    ("infinite bfloat16", _spoil(float("inf"), as_bf16=True), InvalidModelFile, "up_proj"),
    ("beyond float16", _spoil(1e5), RecipeError, "--precision f32"),
    ("tensor missing", _without_tensor, InvalidModelFile, "model.layers.0.mlp.up_proj.weight"),
    ("tensor unknown", _with_tensor, InvalidModelFile, "model.layers.0.mlp.gate.weight"),
    ("pickle", _pickle, UnsupportedFormat, "pickle"),
    ("no weights", _remove("model.safetensors"), RecipeError, "model.safetensors"),
    ("part missing", _index_with_missing_part, RecipeError, "model-00001-of-00002.safetensors"),
    ("part elsewhere", _index_outside, InvalidModelFile, "other.safetensors"),
    ("no tokenizer", _remove("tokenizer.json"), RecipeError, "tokenizer.json"),
    ("tokenizer of another kind", _edit("tokenizer.json", model=WORDPIECE), UnsupportedFormat, "WordPiece"),
    ("tokenizer of no kind", _edit("tokenizer.json", model={"type": "BPE"}), InvalidModelFile, "vocab"),
    ("pre-tokenizer", _edit("tokenizer.json", pre_tokenizer={"type": "Whitespace"}), UnsupportedFormat, "smollm"),
    ("more tokens than rows", _edit("config.json", vocab_size=200), InvalidModelFile, "beyond"),
    ("special token beyond", _edit("config.json", sep_token_id=9999), InvalidModelFile, "9999"),
    ("chat template of no kind", _edit("tokenizer_config.json", chat_template=7), InvalidModelFile, "template"),
    ("front matter", _front_matter, InvalidModelFile, "README.md"),
    ("pieces cut", _pieces_cut, InvalidModelFile, "sentencepiece"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "words"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_checkpoints_are_refused(
    spoil: Callable[[Path], None], error: type[EdgeError], words: str, tmp_path: Path
) -> None:
    directory = make_smollm(tmp_path / "broken")
    spoil(directory)
    with pytest.raises(error) as caught:
        convert(open_checkpoint(directory), tmp_path / "out.gguf", use_f16=True)
    assert words in str(caught.value)


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    directory = make_smollm(tmp_path / "twice")
    shutil.copy(directory / "model.safetensors", directory / "model-2.safetensors")
    with pytest.raises(InvalidModelFile, match="also in"):
        open_checkpoint(directory)


def test_biases_are_carried(tmp_path: Path) -> None:
    directory = make_smollm(tmp_path / "biased")
    _edit("config.json", attention_bias=True)(directory)
    settings = json.loads((directory / "config.json").read_text())
    tensors = weights(settings, 1)
    for layer in range(2):
        for name, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = np.arange(rows, dtype=np.float32)
    write_safetensors(directory / "model.safetensors", tensors)
    convert(open_checkpoint(directory), tmp_path / "out.gguf", use_f16=True)
    by_name = {t.name: t for t in read_gguf(tmp_path / "out.gguf").tensors}
    stored = by_name["blk.0.attn_q.bias"]
    values = np.frombuffer((tmp_path / "out.gguf").read_bytes(), np.float32, 64, stored.offset)
    assert values[:4].tolist() == [0, 8, 1, 9]  # The two halves of a head of 16 side by side.


def test_sentencepiece_reader_takes_what_it_knows() -> None:
    assert [p.text for p in read_pieces(b"\x0a\x05\x0a\x03abc")] == ["abc"]


def test_config_defaults_follow_transformers(tmp_path: Path) -> None:
    directory = make_smollm(tmp_path / "a")
    write_json(directory / "config.json", {k: v for k, v in config(vocab_size=300).items() if k != "rope_theta"})
    settings = open_checkpoint(directory).settings
    assert isinstance(settings, ModelSettings)
    assert (settings.rope_base, settings.head_size, settings.num_kv_heads) == (10000.0, 16, 2)
