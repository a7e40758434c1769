"""Adapter files: sound ones are understood, hostile ones refused before anything native reads them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.errors import AdapterMismatch, EdgeError, InvalidModelFile, UnsupportedFormat
from edge.formats.gguf import GgufFile, read_gguf
from edge.formats.lora import MAX_RANK, check_finite, check_fits, is_adapter, read_lora
from edge.store.fetch import pull
from edge.store.models import ModelStore
from tests.adapters import Change, make_lora
from tests.edge.gguf_files import Tensor, gguf_bytes

Floats = NDArray[np.float32]
NO_KEYS: Mapping[str, str] = MappingProxyType({})


@pytest.fixture
def base(tmp_path: Path) -> GgufFile:
    path = tmp_path / "base.gguf"
    shapes = {"blk.0.attn_q.weight": (64, 64), "blk.0.attn_v.weight": (64, 32), "blk.0.ffn_down.weight": (96, 64)}
    tensors = [Tensor(name, shape, 0, 4 * shape[0] * shape[1]) for name, shape in shapes.items()]
    path.write_bytes(gguf_bytes({"general.architecture": "llama"}, tensors))
    return read_gguf(path)


def adapter(base: GgufFile, change: Change | None = None, *, keys: Mapping[str, str] = NO_KEYS, rank: int = 4) -> Path:
    return make_lora(base.path.with_name("a.gguf"), base, seed=1, rank=rank, change=change, keys=keys)


def whole_check(path: Path, base: GgufFile) -> None:
    lora = read_lora(read_gguf(path))
    check_fits(lora, base, what="a", base_name="b")
    check_finite(lora)


def test_a_sound_adapter_is_understood_and_stored(base: GgufFile, tmp_path: Path) -> None:
    path = adapter(base, keys={"general.base_model.0.name": "Tiny"})
    lora = read_lora(read_gguf(path))
    whole_check(path, base)
    assert is_adapter(lora.file)
    assert not is_adapter(base)
    assert (lora.architecture, lora.rank, lora.alpha, lora.base) == ("llama", 4, 4.0, "Tiny")
    assert sorted(lora.pairs) == sorted(t.name for t in base.tensors)
    stored = pull(ModelStore(tmp_path / "store"), str(path), name="polite")
    assert stored.is_adapter
    assert stored.details.adapter is not None
    assert (stored.details.adapter.rank, stored.details.adapter.base) == (4, "Tiny")
    assert stored.architecture == "llama"
    assert not pull(ModelStore(tmp_path / "store"), str(base.path), name="base").is_adapter


def as_type(kind: type[Any]) -> Change:
    def change(_: str, values: Floats) -> NDArray[Any]:
        return values.astype(kind)

    return change


def doubled(_: str, values: Floats) -> Floats:
    return np.stack([values, values])


def cut(side: str) -> Change:
    def change(name: str, values: Floats) -> Floats:
        return values[:-1] if name == f"blk.0.attn_v.weight.{side}" else values

    return change


def deepened(name: str, values: Floats) -> Floats:
    return values[None] if name == "blk.0.attn_v.weight.lora_a" else values


def poisoned(value: float, kind: type[Any]) -> Change:
    def change(name: str, values: Floats) -> NDArray[Any]:
        found: NDArray[Any] = values.astype(kind)
        if name == "blk.0.ffn_down.weight.lora_b":
            found[-1, -1] = value
        return found

    return change


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_other_floats_do(base: GgufFile, kind: type[Any]) -> None:
    whole_check(adapter(base, as_type(kind)), base)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused(base: GgufFile, tmp_path: Path, value: float, kind: type[Any]) -> None:
    path = adapter(base, poisoned(value, kind))
    with pytest.raises(InvalidModelFile, match="not finite"):
        check_finite(read_lora(read_gguf(path)))
    with pytest.raises(InvalidModelFile, match="not finite"):
        pull(ModelStore(tmp_path / "store"), str(path), name="bad")


@pytest.mark.parametrize(
    ("change", "keys", "kind", "says"),
    [
        (cut("lora_a"), {}, InvalidModelFile, "make no pair"),
        (cut("lora_b"), {}, AdapterMismatch, r"is \(64, 32\) in the model, \(64, 31\) in the adapter"),
        (deepened, {}, InvalidModelFile, "make no pair"),
        (doubled, {}, AdapterMismatch, "in the adapter"),
        (as_type(np.float64), {}, UnsupportedFormat, "F64"),
        (as_type(np.int32), {}, UnsupportedFormat, "I32"),
        (None, {"adapter.type": "control_vector"}, UnsupportedFormat, "control_vector"),
        (None, {"adapter.alora.invocation_tokens": "1"}, UnsupportedFormat, "activated"),
    ],
)
def test_what_llama_cpp_would_abort_at_or_leave_out_is_refused(
    base: GgufFile, change: Change | None, keys: dict[str, str], kind: type[EdgeError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        whole_check(adapter(base, change, keys=keys), base)


def test_an_adapter_of_another_architecture_is_refused(base: GgufFile) -> None:
    path = make_lora(base.path.with_name("a.gguf"), base, seed=1, architecture="bert")
    with pytest.raises(AdapterMismatch, match="'bert'"):
        whole_check(path, base)


def test_a_huge_rank_is_refused(base: GgufFile) -> None:
    with pytest.raises(InvalidModelFile, match="rank"):
        whole_check(adapter(base, rank=MAX_RANK + 1), base)


PAIR = (Tensor("blk.0.attn_q.weight.lora_a", (64, 4), 0, 1024), Tensor("blk.0.attn_q.weight.lora_b", (4, 64), 0, 1024))
KEYS = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}


@pytest.mark.parametrize(
    ("keys", "tensors", "says"),
    [
        ({"adapter.lora.alpha": "8"}, PAIR, "instead of 6"),
        ({"adapter.lora.alpha": 8}, PAIR, "instead of 6"),
        ({"adapter.lora.alpha": -1.0}, PAIR, "alpha"),
        ({"adapter.lora.alpha": float("nan")}, PAIR, "alpha"),
        ({}, (), "changes no weight"),
        ({}, PAIR[:1], "counterpart"),
        ({}, (*PAIR, Tensor("blk.0.attn_norm.weight", (64,), 0, 256)), "no part of a LoRA"),
        ({}, (*PAIR, Tensor("blk.0.lora_a.lora_b", (4, 64), 0, 1024)), "no part of a LoRA"),
        (
            {},
            (
                Tensor("token_embd.weight.lora_a", (4, 99), 0, 1584),
                Tensor("token_embd.weight.lora_b", (4, 64), 0, 1024),
            ),
            "embedding",
        ),
        ({}, tuple(Tensor(t.name.replace("_q", "_x"), t.shape, 0, 1024) for t in PAIR), "no tensor"),
    ],
)
def test_odd_headers_are_refused(
    base: GgufFile, keys: dict[str, object], tensors: tuple[Tensor, ...], says: str
) -> None:
    path = base.path.with_name("odd.gguf")
    path.write_bytes(gguf_bytes({**KEYS, **keys}, tensors))
    with pytest.raises(EdgeError, match=says):
        whole_check(path, base)


def test_alpha_of_eight_bytes_is_refused(base: GgufFile) -> None:
    """llama.cpp would abort at it, and Python shows no difference."""
    path = base.path.with_name("wide.gguf")
    data = gguf_bytes({**KEYS, "adapter.lora.alpha": 8.0}, PAIR)
    narrow, wide = struct.pack("<If", 6, 8.0), struct.pack("<Id", 12, 8.0)
    assert data.count(narrow) == 1
    path.write_bytes(data.replace(narrow, wide))
    with pytest.raises(InvalidModelFile, match="instead of 6"):
        read_gguf(path)
