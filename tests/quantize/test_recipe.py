"""Names of types and of models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import RecipeError
from edge.formats.gguf import FILE_TYPES
from edge.native import llama
from edge.store.manifest import ModelRef
from quantize.recipe import QUANT_TYPES, Recipe, model_name, parse_type, parse_types, usable_types


def test_the_types_are_those_of_the_library() -> None:
    lib = llama.bindings()
    prefix = re.compile(r"LLAMA_FTYPE_(?:MOSTLY|ALL)_(\w+)")
    theirs = {m[1]: getattr(lib, name) for name in dir(lib) if (m := prefix.fullmatch(name))}
    assert {name: t.ftype for name, t in QUANT_TYPES.items()} == theirs
    assert {t.ftype: name for name, t in QUANT_TYPES.items()} == dict(FILE_TYPES)


@pytest.mark.parametrize("text", ["q4_k_m", "Q4-K-M", " Q4_K_M "])
def test_spelling_does_not_matter(text: str) -> None:
    assert parse_type(text).name == "Q4_K_M"


def test_an_unknown_type_lists_the_known() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_type("Q4")
    assert all(name in str(caught.value) for name in usable_types())


@pytest.mark.parametrize(
    "name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"]
)
def test_types_that_need_an_importance_matrix_say_so(name: str) -> None:
    with pytest.raises(RecipeError, match="importance matrix"):
        parse_type(name)


def test_types_are_taken_once_and_in_order() -> None:
    assert [t.name for t in parse_types(["Q4_0", "q8_0", "Q4_0"])] == ["Q4_0", "Q8_0"]
    with pytest.raises(RecipeError, match="at least one"):
        parse_types([])


@given(st.text(max_size=150))
def test_a_made_name_names_a_model(text: str) -> None:
    try:
        name = model_name(text)
    except RecipeError:
        return
    assert model_name(name) == name
    assert str(ModelRef.parse(f"{name}:q8_0")) == f"{name}:q8_0"
    Recipe(name=name, types=parse_types(["Q8_0"]))


@pytest.mark.parametrize(("text", "name"), [
    ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"), ("My Model (v1.5)", "my-model-v1.5"), ("a__b--c", "a-b-c"),
])  # fmt: skip
def test_names_of_directories(text: str, name: str) -> None:
    assert model_name(text) == name


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot name"):
        Recipe(name="Über/Model", types=parse_types(["Q8_0"]))
    with pytest.raises(RecipeError, match="--name"):
        model_name("…")


def test_the_texts_licence_stands_beside_it() -> None:
    texts = Path(__file__).parents[2] / "quantize" / "texts"
    assert "Public domain" in (texts / "README.md").read_text()
