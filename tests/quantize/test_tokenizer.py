"""The GGUF's tokenizer, asked through the library itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge.formats.gguf import read_gguf
from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert
from quantize.gguf.llama import ScoringModel
from quantize.report import report_text
from tests.quantize.checkpoints import make_smollm
from tests.quantize.stories import make_stories


def gguf_of(source: Path, target: Path) -> Path:
    convert(open_checkpoint(source), target, use_f16=True)
    return target


@pytest.fixture(scope="module")
def model(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_of(stories, tmp_path_factory.mktemp("tokenizer") / "stories.gguf")


def test_known_ids(model: Path) -> None:
    """Llama 2's tokenizer, whose ids for this text are known (llama2.c's README run)."""
    with ScoringModel(model, window_tokens=64, num_threads=1) as loaded:
        assert loaded.tokenize("Once upon a time") == [1, 9038, 2501, 263, 931]
        assert loaded.first_token == 1
        # A letter that has no token of its own: byte fallback, offset by the three special tokens.
        assert loaded.tokenize("🦙")[-4:] == [3 + b for b in "🦙".encode()]


def test_tokenizer_json_alone_gives_the_same_ids(model: Path, tmp_path: Path) -> None:
    alone = gguf_of(make_stories(tmp_path / "stories15M", with_pieces=False), tmp_path / "alone.gguf")
    ids: list[list[int]] = []
    for path in (model, alone):
        with ScoringModel(path, window_tokens=64, num_threads=1) as loaded:
            ids.append(loaded.tokenize(report_text()))
    assert ids[0] == ids[1]


def test_the_story_is_the_one_llama2c_tells(model: Path) -> None:
    """Greedy from "Once upon a time": the permutation of Q and K and the tokenizer are both right, or this is noise."""
    with ScoringModel(model, window_tokens=64, num_threads=1) as loaded:
        tokens = loaded.tokenize("Once upon a time")
        for _ in range(20):
            tokens.append(int(np.argmax(loaded.logits(tokens, scored_from=len(tokens) - 1)[0])))
    pieces = read_gguf(model).metadata["tokenizer.ggml.tokens"]
    assert isinstance(pieces, list)
    text = "".join(str(pieces[token]) for token in tokens[1:]).replace("▁", " ").strip()
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")


def test_byte_level_tokens_are_those_of_the_merges(tmp_path: Path) -> None:
    source = make_smollm(tmp_path / "tiny")
    vocab: dict[str, int] = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    with ScoringModel(gguf_of(source, tmp_path / "tiny.gguf"), window_tokens=64, num_threads=1) as loaded:
        assert loaded.first_token is None
        assert loaded.tokenize(" the little dog") == [vocab["Ġthe"], vocab["Ġlittle"], vocab["Ġdog"]]
        assert loaded.tokenize("42") == [vocab["4"], vocab["2"]]
        # Text never becomes a control token.
        assert vocab["<|im_end|>"] not in loaded.tokenize("<|im_end|>")
