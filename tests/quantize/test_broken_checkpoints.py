"""Checkpoints that are broken, or of a kind that is not converted: each is refused, and the error says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.errors import EdgeError, InvalidModelFile, RecipeError, UnsupportedFormat
from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert
from tests.quantize.checkpoints import bfloat16, edit, make_bert, make_smollm, weights, write_json, write_safetensors

Broken = tuple[str, Callable[[Path], None], type[EdgeError], str]


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

LLAMAS: list[Broken] = [
    ("no config", _remove("config.json"), RecipeError, "config.json"),
    ("config is a list", _config_is_a_list, InvalidModelFile, "JSON object"),
    ("another family", edit("config.json", model_type="qwen2"), UnsupportedFormat, "Llama"),
    ("another class", edit("config.json", architectures=["LlamaForTokens"]), UnsupportedFormat, "LlamaForCausalLM"),
    ("already quantized", edit("config.json", quantization_config={"a": 1}), UnsupportedFormat, "already quantized"),
    ("a size is text", edit("config.json", hidden_size="big"), InvalidModelFile, "hidden_size"),
    ("a size is absurd", edit("config.json", vocab_size=1 << 40), InvalidModelFile, "vocab_size"),
    ("heads do not divide", edit("config.json", num_key_value_heads=3), InvalidModelFile, "heads"),
    ("odd rope", edit("config.json", rope_scaling={"rope_type": "yarn"}), UnsupportedFormat, "yarn"),
    ("wrong shape", edit("config.json", intermediate_size=96), InvalidModelFile, "shape"),
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
    ("tokenizer of another kind", edit("tokenizer.json", model=WORDPIECE), UnsupportedFormat, "WordPiece"),
    ("tokenizer of no kind", edit("tokenizer.json", model={"type": "BPE"}), InvalidModelFile, "vocab"),
    ("pre-tokenizer", edit("tokenizer.json", pre_tokenizer={"type": "Whitespace"}), UnsupportedFormat, "smollm"),
    ("more tokens than rows", edit("config.json", vocab_size=200), InvalidModelFile, "beyond"),
    ("special token beyond", edit("config.json", sep_token_id=9999), InvalidModelFile, "9999"),
    ("chat template of no kind", edit("tokenizer_config.json", chat_template=7), InvalidModelFile, "template"),
    ("front matter", _front_matter, InvalidModelFile, "README.md"),
    ("pieces cut", _pieces_cut, InvalidModelFile, "sentencepiece"),
]  # fmt: skip
ENCODERS: list[Broken] = [
    ("activation", edit("config.json", hidden_act="relu"), UnsupportedFormat, "relu"),
    ("positions", edit("config.json", position_embedding_type="relative_key"), UnsupportedFormat, "relative_key"),
    ("heads", edit("config.json", num_attention_heads=5), InvalidModelFile, "heads"),
    ("another class", edit("config.json", architectures=["BertForQuestions"]), UnsupportedFormat, "BertModel"),
    ("a dense layer after it", _modules("Transformer", "Pooling", "Dense"), UnsupportedFormat, "Dense"),
    ("pooling elsewhere", _modules("Pooling", path="../x"), InvalidModelFile, "../x"),
    ("pooling of no kind", edit("1_Pooling/config.json", pooling_mode="max"), UnsupportedFormat, "mean, cls"),
    ("pooling is text", edit("1_Pooling/config.json", pooling_mode_mean_tokens="a"), InvalidModelFile, "1_Pooling"),
    ("modules are no list", _modules_are_an_object, InvalidModelFile, "modules.json"),
    ("tokenizer of another kind", edit("tokenizer.json", model={"type": "BPE"}), UnsupportedFormat, "WordPiece"),
    ("normalizer", edit("tokenizer.json", normalizer=CHINESE_IN_WORDS), UnsupportedFormat, "BertNormalizer"),
    ("pre-tokenizer", edit("tokenizer.json", pre_tokenizer=SPLIT), UnsupportedFormat, "Whitespace"),
    ("no words", _no_tokenizer, InvalidModelFile, "tokenizer.json"),
]  # fmt: skip
CASES = [
    pytest.param(make, *broken, id=f"{kind}: {name}")
    for kind, make, table in (("llama", make_smollm, LLAMAS), ("encoder", make_bert, ENCODERS))
    for name, *broken in table
]


@pytest.mark.parametrize(("make", "spoil", "error", "words"), CASES)
def test_broken_checkpoints_are_refused(
    make: Callable[[Path], Path], spoil: Callable[[Path], None], error: type[EdgeError], words: str, tmp_path: Path
) -> None:
    directory = make(tmp_path / "broken")
    spoil(directory)
    with pytest.raises(error) as caught:
        convert(open_checkpoint(directory), tmp_path / "out.gguf", use_f16=True)
    assert words in str(caught.value)
