"""What Ollama's requests mean."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import EdgeError, InvalidRequest
from runtime.api import ollama, ollama_models
from runtime.api.ollama_models import source_of
from runtime.api.ollama_schema import (
    FOREVER_S,
    WITHOUT_EFFECT,
    KeepAlive,
    OllamaChatRequest,
    OllamaCopyRequest,
    OllamaCreateRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaPullRequest,
    OllamaShowRequest,
    Options,
    kept_s,
    ollama_name,
    option_warnings,
)

REQUESTS = (
    OllamaChatRequest, OllamaCopyRequest, OllamaCreateRequest, OllamaEmbedRequest, OllamaEmbeddingsRequest,
    OllamaGenerateRequest, OllamaPullRequest, OllamaShowRequest, Options,
)  # fmt: skip


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [
        (None, None), ("", None), (0, 0), ("0", 0), ("0s", 0), (90, 90), (1.5, 1.5), ("90", 90), ("10m", 600),
        ("1h30m", 5400), ("1h1.5s", 3601.5), ("500ms", 0.5), ("1us", 1e-6), ("+5s", 5), (-1, FOREVER_S),
        ("-1", FOREVER_S), ("-5m", FOREVER_S), (1e300, FOREVER_S), ("999999999999h", FOREVER_S),
    ],
)  # fmt: skip
def test_how_long_a_model_is_kept(keep_alive: KeepAlive, seconds: float | None) -> None:
    found = kept_s(keep_alive)
    assert found == seconds or (found is not None and seconds is not None and abs(found - seconds) < 1e-9)


@pytest.mark.parametrize("text", ["long", "5 m", "m", "5m5", "--5m", "5m-5s", "1e3s", "٣s", "s5", "-", "5d", "1.2.3s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(InvalidRequest, match="keep_alive"):
        kept_s(text)


@given(st.text(max_size=64))
def test_any_text_is_a_duration_or_refused(text: str) -> None:
    try:
        seconds = kept_s(text)
    except InvalidRequest:
        return
    assert seconds is None or seconds == FOREVER_S or 0 <= seconds <= 1e9


@given(
    st.dictionaries(st.text(max_size=80), st.integers() | st.booleans() | st.none() | st.text(max_size=5), max_size=30)
)
def test_every_option_is_done_or_named(options: dict[str, object]) -> None:
    warnings = option_warnings(msgspec.json.encode({"options": options}))
    known = {f.encode_name for f in msgspec.structs.fields(Options)}
    named = {name for name, value in options.items() if value is not None and name not in known}
    assert len(warnings) == min(len(named), 20)


def test_names_are_of_one_case_before_the_tag() -> None:
    assert ollama_name("SmolLM2:135M-Instruct") == "smollm2:135M-Instruct"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("smollm2:135m-instruct", ("smollm2:135m-instruct", None)),
        ("smollm2", ("smollm2", None)),
        ("hf://Owner/Repo/a.gguf", ("hf://Owner/Repo/a.gguf", None)),
        ("https://host/a.gguf", ("https://host/a.gguf", None)),
        ("hf.co/Owner/Repo", ("hf://Owner/Repo", "hf.co/owner/repo")),
        ("hf.co/Owner/Repo:latest", ("hf://Owner/Repo", "hf.co/owner/repo:latest")),
        ("huggingface.co/Owner/Repo:A.gguf", ("hf://Owner/Repo/A.gguf", "huggingface.co/owner/repo:A.gguf")),
    ],
)
def test_what_can_be_pulled(name: str, source: tuple[str, str | None]) -> None:
    assert source_of(name) == source


@given(st.sampled_from(["/", "./", "../", "~/", "file://", "file:/", "FILE:///", ""]), st.text(max_size=40))
def test_no_file_of_this_machine_is_pulled(start: str, rest: str) -> None:
    try:
        source, _ = source_of(start + rest)
    except EdgeError:
        return
    assert source.partition("://")[0].lower() in ("hf", "pypi", "http", "https") or source in ("smollm2", "minilm")


def test_the_manual_has_every_route_field_and_option() -> None:
    manual = Path("docs/api.md").read_text("utf-8").partition("## Ollama's API")[2].partition("\n## ")[0]
    fields = {f.encode_name for kind in REQUESTS for f in msgspec.structs.fields(kind)}
    routes = {path.partition("/{")[0] for h in (*ollama.HANDLERS, *ollama_models.HANDLERS) for path in h.paths}
    assert all(route in manual for route in routes)
    words = set(re.findall(r"\w+", manual))
    assert (fields | set(WITHOUT_EFFECT)) - words - {"name", "source", "destination"} == set()
