"""Checkpoint to GGUF: the same bytes as llama.cpp's own converter, and clear errors for what is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edge.errors import InvalidModelFile
from edge.formats.gguf import read_gguf
from quantize.checkpoint import ModelSettings, lossless_precision, open_checkpoint
from quantize.gguf.convert import convert
from quantize.gguf.sentencepiece import read_pieces
from tests.quantize.checkpoints import (
    config,
    edit,
    make_llama3,
    make_mistral,
    make_smollm,
    weights,
    write_json,
    write_safetensors,
)
from tests.quantize.goldens import converted, golden
from tests.quantize.stories import make_stories

MAKERS = {"Tiny-SmolLM-1M-Instruct": make_smollm, "tiny-llama3": make_llama3, "tiny-mistral": make_mistral}


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


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    directory = make_smollm(tmp_path / "twice")
    shutil.copy(directory / "model.safetensors", directory / "model-2.safetensors")
    with pytest.raises(InvalidModelFile, match="also in"):
        open_checkpoint(directory)


def test_biases_are_carried(tmp_path: Path) -> None:
    directory = make_smollm(tmp_path / "biased")
    edit("config.json", attention_bias=True)(directory)
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
