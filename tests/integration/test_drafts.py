"""Draft models on real weights: the answers are those of plain decoding, and what cannot guess is told."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge.errors import DoesNotFit, UnsupportedFormat
from edge.formats.gguf import read_gguf
from edge.store.details import DRAFT, details_of
from edge.store.models import ModelStore, PackageFile
from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert
from quantize.gguf.llama import quantize_file
from runtime.backends.llama_draft import open_drafter
from runtime.engine import Engine
from runtime.request import Request, RequestId, SamplingParams, TokenId
from runtime.speculate import AdaptiveSpeculator, SpeculationStats
from tests.quantize.stories import Unavailable, make_stories
from tests.support import (
    DEFAULT_MODEL,
    SEED,
    CollectingSink,
    GreedyLaw,
    RunningAppliance,
    model_info,
    run_edge,
    running_appliance,
)

Q4_0 = 2  # LLAMA_FTYPE_MOSTLY_Q4_0 of llama.h
OPENINGS = (
    "Once upon a time, there was a little", "The dog and the cat were", "Tom had a red ball. One day", "Lily went to",
    "In a big forest lived a bear who", "The rain did not stop, so Ben and Mia", '"Can I have it?" asked', "One two",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """stories15M in float16, and what guesses for it: the same in four bits."""

    model: Path
    draft: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    home = tmp_path_factory.mktemp("stories")
    try:
        checkpoint = make_stories(home / "checkpoint")
    except Unavailable as e:
        pytest.skip(f"stories15M: {e}")
    found = Pair(home / "f16.gguf", home / "q4_0.gguf")
    convert(open_checkpoint(checkpoint), found.model, use_f16=True)
    quantize_file(found.model, found.draft, ftype=Q4_0, num_threads=1, on_progress=lambda _: None)
    return found


@pytest.fixture(scope="module")
def law(pair: Pair) -> Iterator[GreedyLaw]:
    law = GreedyLaw(pair.model)
    yield law
    law.close()


def answers(law: GreedyLaw, draft: Path | None, params: SamplingParams) -> tuple[list[list[TokenId]], SpeculationStats]:
    """Answers to each opening, two at a time. The clock says that all steps take equally long: so guesses pay."""
    law.backend.clear()
    ticks, sink = itertools.count(), CollectingSink()
    drafter = None if draft is None else open_drafter(draft, law.backend, threads=1, available_bytes=1 << 30)
    speculator = None if drafter is None else AdaptiveSpeculator(drafter)
    engine = Engine(law.backend, sink, max_queue=20, speculator=speculator, clock=lambda: float(next(ticks)))
    encode = law.backend.tokenizer.encode
    prompts = [tuple(encode(t, add_special=True, parse_special=False)) for t in OPENINGS]
    for i, prompt in enumerate(prompts):
        engine.submit(Request(RequestId(i), prompt, 60, params, ignore_eos=True, return_tokens=True))
        while i % 2 and engine.advance():
            pass
    stats = engine.stats().speculation
    if drafter is not None:
        drafter.close()
    tokens = [sink.last[RequestId(i)].tokens or () for i in range(len(prompts))]
    return [list(t[len(p) :]) for t, p in zip(tokens, prompts, strict=True)], stats


def test_a_draft_model_does_not_change_greedy_answers(law: GreedyLaw, pair: Pair) -> None:
    greedy = SamplingParams(temperature=0)
    plain, _ = answers(law, None, greedy)
    guessed, stats = answers(law, pair.draft, greedy)
    print(f"draft model: {sum(a == b for a, b in zip(plain, guessed, strict=True))} of {len(plain)} equal, {stats}")
    assert stats.num_accepted_by_model > 100, "it was guessed at all"
    assert stats.num_drafted_by_model > stats.num_accepted_by_model, "and wrongly too"
    encode = law.backend.tokenizer.encode
    for opening, answer, reference in zip(OPENINGS, guessed, plain, strict=True):
        assert law.obeys(encode(opening, add_special=True, parse_special=False), answer, reference)


def test_draws_with_a_seed_are_those_without_guesses(law: GreedyLaw, pair: Pair) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=11)
    plain, _ = answers(law, None, params)
    guessed, stats = answers(law, pair.draft, params)
    assert stats.num_accepted_by_model > 50
    equal = sum(a == b for a, b in zip(plain, guessed, strict=True))
    assert equal >= len(plain) - 2, "but for rounding, which follows the shape of a step"


def test_another_vocabulary_and_lack_of_memory_are_told(law: GreedyLaw, pair: Pair) -> None:
    other = ModelStore(SEED).get(DEFAULT_MODEL).weights
    with pytest.raises(UnsupportedFormat, match="vocabulary"):
        open_drafter(other, law.backend, threads=1, available_bytes=4 << 30)
    with pytest.raises(DoesNotFit):
        open_drafter(pair.draft, law.backend, threads=1, available_bytes=20 << 20)


def put(store: ModelStore, ref: str, path: Path, *, draft: str | None = None) -> None:
    store.add(ref, [PackageFile(path, f"{path.stem}.gguf")], details_of(read_gguf(path), draft=draft))


@pytest.fixture(scope="module")
def served(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """An appliance with the pair, whose package names the draft model."""
    home = tmp_path_factory.mktemp("home")
    store = ModelStore(home / "store", seed=SEED)
    put(store, "stories:15m", pair.model, draft="stories:15m-q4_0")
    put(store, "stories:15m-q4_0", pair.draft)
    with running_appliance(home) as running:
        yield running


def ask(appliance: RunningAppliance, prompt: str = OPENINGS[0]) -> str:
    body = {"model": "stories:15m", "prompt": prompt, "max_tokens": 120, "temperature": 0}
    with appliance.client() as http:
        return str(http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"])


def test_the_package_names_the_draft_model_and_the_operator_has_the_last_word(served: RunningAppliance) -> None:
    with served.client() as http:
        text = ask(served)
        assert "girl" in text
        loaded = model_info(http, "stories:15m")
        assert (loaded["draft"], loaded["draft_problem"]) == ("stories:15m-q4_0", None)
        shown = json.loads(run_edge("show", "stories:15m", "--json", home=served.home).stdout)
        assert shown["draft"] == shown["annotations"][DRAFT] == "stories:15m-q4_0"

        def reload() -> dict[str, object]:
            http.post("/edge/v1/models/unload", json={"model": "stories:15m"}).raise_for_status()
            assert ask(served) == text
            return model_info(http, "stories:15m")

        chosen = run_edge("draft", "stories:15m", "--off", home=served.home)
        assert "no draft model" in chosen.stdout, chosen.stderr
        assert (reload()["draft"], reload()["draft_problem"]) == (None, None)
        assert run_edge("draft", "stories:15m", DEFAULT_MODEL, home=served.home).returncode == 0
        refused = reload()
        assert refused["draft"] is None
        assert "vocabulary" in str(refused["draft_problem"])
        alerts = http.get("/edge/v1/status").json()["alerts"]
        assert any("stories:15m has no draft model" in a["what"] for a in alerts)
        assert run_edge("draft", "stories:15m", "nobody:1b", home=served.home).returncode == 3
        back = json.loads(run_edge("draft", "stories:15m", "--reset", "--json", home=served.home).stdout)
        assert back["drafts"] == [{"model": "stories:15m", "draft": "stories:15m-q4_0", "problem": None}]
        assert reload()["draft"] == "stories:15m-q4_0"


def test_a_draft_model_that_left_the_store_is_missed_and_nothing_else(served: RunningAppliance) -> None:
    with served.client() as http:
        http.post("/edge/v1/models/unload", json={"model": "stories:15m"}).raise_for_status()
        assert run_edge("rm", "stories:15m-q4_0", "--yes", home=served.home).returncode == 0
        assert "girl" in ask(served)
        assert "stories:15m-q4_0" in model_info(http, "stories:15m")["draft_problem"]
