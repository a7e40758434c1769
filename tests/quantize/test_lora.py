"""PEFT directories to adapter GGUFs: as llama.cpp's converter makes them, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.errors import AdapterMismatch, EdgeError, InvalidModelFile, UnsupportedFormat
from edge.formats.gguf import GgufFile, read_gguf
from edge.formats.lora import check_finite, check_fits, read_lora
from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert
from quantize.gguf.lora import convert_lora, is_peft_directory

from .checkpoints import Stored, make_peft, make_smollm, write_safetensors
from .goldens import GOLDENS, describe_gguf


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    work = tmp_path_factory.mktemp("base")
    convert(open_checkpoint(make_smollm(work / "Tiny-SmolLM-1M-Instruct")), work / "base.gguf", use_f16=False)
    return read_gguf(work / "base.gguf")


def test_the_tensors_are_the_converters_own(base: GgufFile, tmp_path: Path) -> None:
    directory = make_peft(tmp_path / "lora")
    assert is_peft_directory(directory)
    convert_lora(directory, base, tmp_path / "out.gguf", base_name="tiny:1m")
    ours: dict[str, Any] = json.loads(json.dumps(describe_gguf(tmp_path / "out.gguf")))
    theirs: dict[str, Any] = json.loads((GOLDENS / "convert-lora.json").read_text())
    assert ours["tensors"] == theirs["tensors"]
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours["metadata"][key] == theirs["metadata"][key]
    lora = read_lora(read_gguf(tmp_path / "out.gguf"))
    check_fits(lora, base, what="lora", base_name="tiny")
    check_finite(lora)
    assert (lora.rank, lora.base) == (4, "tiny:1m")


def test_rank_stabilised_scaling_goes_into_alpha(base: GgufFile, tmp_path: Path) -> None:
    directory = make_peft(tmp_path / "lora", changes={"use_rslora": True, "r": 16})
    convert_lora(directory, base, tmp_path / "out.gguf", base_name="tiny:1m")
    lora = read_lora(read_gguf(tmp_path / "out.gguf"))
    assert lora.alpha / lora.rank == 8 / 16**0.5


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"peft_type": "LOHA"}, UnsupportedFormat, "LOHA"),
        ({"use_dora": True}, UnsupportedFormat, "DoRA"),
        ({"bias": "all"}, UnsupportedFormat, "biases"),
        ({"fan_in_fan_out": True}, UnsupportedFormat, "transposed"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedFormat, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, UnsupportedFormat, "alpha_pattern"),
        ({"alora_invocation_tokens": [1, 2]}, UnsupportedFormat, "activation"),
        ({"lora_alpha": "much"}, InvalidModelFile, "lora_alpha"),
        ({"lora_alpha": 1e300}, InvalidModelFile, "lora_alpha"),
    ],
)
def test_what_a_gguf_cannot_say_is_refused(
    base: GgufFile, tmp_path: Path, changes: Mapping[str, Any], kind: type[EdgeError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        convert_lora(make_peft(tmp_path / "lora", changes=changes), base, tmp_path / "out.gguf", base_name="tiny:1m")


Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = np.ones((4, 64), np.float32), np.ones((64, 4), np.float32)


@pytest.mark.parametrize(
    ("tensors", "kind", "says"),
    [
        ({f"{Q}.lora_A.weight": A}, InvalidModelFile, "lacks a factor"),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B[:-2]}, AdapterMismatch, "attn_q"),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B * np.float32("nan")}, InvalidModelFile, "NaN"),
        ({f"{Q}.lora_A.weight": A[0], f"{Q}.lora_B.weight": B}, UnsupportedFormat, "shape"),
        ({f"{Q}.lora_magnitude_vector": A}, UnsupportedFormat, "no part of a LoRA"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": A}, UnsupportedFormat, "no part of a LoRA"),
        (
            {f"base_model.model.lm_head.lora_{s}.weight": v for s, v in (("A", A), ("B", B))},
            AdapterMismatch,
            "'output.weight' is None there",
        ),
        ({}, InvalidModelFile, "changes no weight"),
    ],
)
def test_odd_tensors_are_refused(
    base: GgufFile, tmp_path: Path, tensors: Mapping[str, Stored], kind: type[EdgeError], says: str
) -> None:
    directory = make_peft(tmp_path / "lora")
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    with pytest.raises(kind, match=says):
        convert_lora(directory, base, tmp_path / "out.gguf", base_name="tiny:1m")


def test_a_base_of_another_family_is_refused(base: GgufFile, tmp_path: Path) -> None:
    other = replace(base, metadata={**base.metadata, "general.architecture": "qwen2"})
    with pytest.raises(UnsupportedFormat, match="'qwen2'"):
        convert_lora(make_peft(tmp_path / "lora"), other, tmp_path / "out.gguf", base_name="tiny:3")
