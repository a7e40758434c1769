"""The whole way on real weights: convert, quantize, judge, report, package; and what stops it."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from typing_extensions import override

from edge.errors import (
    DiskFull,
    EdgeError,
    InvalidModelFile,
    MissingExtra,
    ModelNotFound,
    RecipeError,
    UnsupportedFormat,
)
from edge.formats.gguf import GgufFile, read_gguf
from edge.store.fetch import pull
from edge.store.files import FileOps
from edge.store.goldens import GOLDEN_NAME, goldens_of
from edge.store.models import ModelStore
from quantize.cache import StepCache
from quantize.checkpoint import open_checkpoint
from quantize.evaluate import Speed
from quantize.gguf.convert import convert
from quantize.pipeline import Event, Outcome, Workshop, plan, run
from quantize.recipe import Recipe, parse_types
from quantize.report import Report, notes_on
from quantize.source import open_source
from tests.quantize.boms import checked_sbom
from tests.quantize.checkpoints import make_smollm
from tests.quantize.killed_run import recipe as tiny_recipe
from tests.vision import VisionFiles


def workshop(home: Path, files: FileOps | None = None, events: list[Event] | None = None) -> Workshop:
    sink = [] if events is None else events
    return Workshop(StepCache(home / "work", files), ModelStore(home / "store"), on_event=sink.append)


def quantized(source: str, home: Path, recipe: Recipe, *, force: bool = False) -> Outcome:
    shop = workshop(home)
    return run(plan(open_source(source, shop.store), recipe, shop, force=force), shop)


@dataclass(frozen=True, slots=True)
class Finished:
    """A run on stories15M and where it happened."""

    home: Path
    outcome: Outcome


@pytest.fixture(scope="module")
def finished(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    home = tmp_path_factory.mktemp("pipeline")
    recipe = Recipe(name="stories15m", types=parse_types(["F32", "Q8_0", "Q4_0"]), num_tokens=2048, num_threads=1)
    return Finished(home, quantized(str(stories), home, recipe))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_smollm(tmp_path_factory.mktemp("tiny") / "tiny")


def test_the_source_does_not_differ_from_itself(finished: Finished) -> None:
    same = finished.outcome.report.variants[0].quality
    assert same.kld_mean.value < 1e-6
    assert same.top1_agreement.value == 1
    assert same.perplexity == same.source_perplexity


def test_more_bits_are_better_and_larger(finished: Finished) -> None:
    exact, eight, four = finished.outcome.report.variants
    assert exact.size_bytes > eight.size_bytes > four.size_bytes
    assert exact.quality.kld_mean.value < eight.quality.kld_mean.value < four.quality.kld_mean.value / 10
    assert eight.quality.top1_agreement.value > four.quality.top1_agreement.value
    assert eight.quality.kld_median < eight.quality.kld_p99 < eight.quality.kld_max
    assert 8 < eight.bits_per_weight < 9.5


def test_figures_are_those_seen_before(finished: Finished) -> None:
    """A change of the method shows here; machines differ by less than the given room."""
    _, eight, four = finished.outcome.report.variants
    assert 0.004 < eight.quality.kld_mean.value < 0.02
    assert 0.25 < four.quality.kld_mean.value < 0.55
    assert eight.quality.num_tokens_scored == 8 * 127
    assert eight.quality.kld_mean.error is not None


def test_types_are_those_that_tensors_got(finished: Finished) -> None:
    for variant, model in zip(finished.outcome.report.variants, finished.outcome.models, strict=True):
        tensors = read_gguf(model.weights).tensors
        assert {t.name: t.type for t in variant.tensors} == {t.name: t.type for t in tensors}
        assert sum(variant.tensor_types.values()) == len(tensors)
    assert finished.outcome.report.variants[1].tensor_types == {"Q8_0": 43, "F32": 13}


def test_packages_carry_weights_report_and_plot(finished: Finished) -> None:
    store = ModelStore(finished.home / "store")
    assert [str(m.ref) for m in store.list()] == ["stories15m:f32", "stories15m:q4_0", "stories15m:q8_0"]
    for model in store.list():
        assert all(check.is_good for check in store.verify(model.ref))
        names = [file.name for file in model.files]
        assert names == [
            f"stories15m-{model.ref.tag.upper()}.gguf", "report.json", "quality.svg", "quality.png", GOLDEN_NAME
        ]  # fmt: skip
        goldens = goldens_of(model)
        assert goldens is not None
        assert [len(g.tokens) for g in goldens.texts] == [24, 24]
        assert all(-30 < p < 0 for g in goldens.texts for p in g.logprobs)
        report = msgspec.convert(model.report, Report)
        own = [v for v in report.variants if v.tensors]
        assert [v.type for v in own] == [report.subject] == [model.ref.tag.upper()]
        assert own[0].digest == next(f.digest for f in model.files if f.path == model.weights)
        assert model.license == "mit"


def test_packages_carry_their_bill_of_materials_with_the_figures(finished: Finished) -> None:
    store = ModelStore(finished.home / "store")
    document = checked_sbom(store, store.get("stories15m:q4_0"))
    card = document["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["modelArchitecture"] == "llama"
    assert {m["type"] for m in card["quantitativeAnalysis"]["performanceMetrics"]} >= {"perplexity, ratio"}
    assert any(part["name"] == finished.outcome.report.source.label for part in document["components"])
    assert document["metadata"]["timestamp"]


def test_the_report_says_where_it_comes_from(finished: Finished) -> None:
    report = finished.outcome.report
    assert report.source.precision == "F32"
    assert not report.source.is_quantized
    assert report.source.num_parameters == 15_191_712
    assert report.text.sha256 in (Path(__file__).parents[2] / "quantize" / "texts" / "README.md").read_text()
    assert report.tools["llama-cpp-python"] == "0.3.36"
    assert msgspec.json.decode(report.encode(), type=Report) == report
    assert all(v.speed.prefill_tok_s > 0 and v.speed.decode_tok_s > 0 for v in report.variants)


def test_disturbed_timing_is_told() -> None:
    calm = Speed(prefill_tok_s=1, decode_tok_s=1, prefill_tokens=1, decode_tokens=1, num_threads=1, cpu_share=0.99)
    reference = GgufFile(Path("x"), 3, 32, {"general.architecture": "llama"}, (), 0, 0)
    assert notes_on(reference, calm, []) == []
    assert "Other work" in notes_on(reference, msgspec.structs.replace(calm, cpu_share=0.4), [])[0]


def test_the_plot_is_drawn(finished: Finished) -> None:
    assert finished.outcome.svg.startswith(b"<?xml")
    assert finished.outcome.png.startswith(b"\x89PNG")


def test_nothing_is_left_in_the_work_directory(finished: Finished) -> None:
    assert [path.name for path in (finished.home / "work").iterdir()] == ["lock"]


def test_a_model_of_the_store_is_a_source(finished: Finished) -> None:
    """And what was quantized before is said to be so."""
    recipe = Recipe(name="again", types=parse_types(["Q4_0"]), num_tokens=256, num_threads=1)
    outcome = quantized("stories15m:q8_0", finished.home, recipe)
    assert outcome.report.source.is_quantized
    assert any("itself quantized (Q8_0)" in note for note in outcome.report.notes)
    assert outcome.report.source.digest == finished.outcome.report.variants[1].digest
    ModelStore(finished.home / "store").remove("again:q4_0")


def test_a_second_run_finds_all_done(tiny: Path, tmp_path: Path) -> None:
    first = quantized(str(tiny), tmp_path, tiny_recipe())
    events: list[Event] = []
    shop = workshop(tmp_path, events=events)
    planned = plan(open_source(str(tiny), shop.store), tiny_recipe(), shop)
    assert planned.steps == []
    second = run(planned, shop)
    assert events == []
    assert [m.digest for m in second.models] == [m.digest for m in first.models]
    assert [v.quality for v in second.report.variants] == [v.quality for v in first.report.variants]


def test_a_further_type_joins_those_there(tiny: Path, tmp_path: Path) -> None:
    quantized(str(tiny), tmp_path, tiny_recipe())
    more = Recipe(name="tiny", types=parse_types(["Q8_0", "Q5_0"]), num_tokens=1024, num_threads=1)
    shop = workshop(tmp_path)
    planned = plan(open_source(str(tiny), shop.store), more, shop)
    assert [v.ref.tag for v in planned.missing] == ["q5_0"]
    assert [v.type for v in run(planned, shop).report.variants] == ["Q8_0", "Q5_0"]
    assert len(shop.store.list()) == 3


def test_another_model_of_that_name_is_not_replaced_unasked(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="tiny", types=parse_types(["Q8_0"]), num_tokens=512, num_threads=1)
    before = quantized(str(tiny), tmp_path, recipe).models[0]
    other = tmp_path / "tiny"
    shutil.copytree(tiny, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    with pytest.raises(RecipeError, match="--force"):
        quantized(str(other), tmp_path, recipe)
    assert ModelStore(tmp_path / "store").get("tiny:q8_0").digest == before.digest
    shop = workshop(tmp_path)
    assert len(plan(open_source(str(other), shop.store), recipe, shop, force=True).missing) == 1
    assert ModelStore(tmp_path / "store").get("tiny:q8_0").digest == before.digest
    assert quantized(str(other), tmp_path, recipe, force=True).models[0].digest != before.digest


def test_two_runs_give_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    one, two = (quantized(str(tiny), tmp_path / name, tiny_recipe()).report.variants for name in ("one", "two"))
    assert [v.digest for v in one] == [v.digest for v in two]
    assert [v.quality for v in one] == [v.quality for v in two]


def test_a_second_run_at_once_is_refused(tiny: Path, tmp_path: Path) -> None:
    shop = workshop(tmp_path)
    planned = plan(open_source(str(tiny), shop.store), tiny_recipe(), shop)
    with shop.cache.held(), pytest.raises(RecipeError, match="Another quantization"):
        run(planned, workshop(tmp_path))


def test_without_the_extra_nothing_is_begun(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="slm-edge\\[quantize\\]"):
        quantized(str(tiny), tmp_path, tiny_recipe())
    assert not (tmp_path / "work").exists()


class CrampedFiles(FileOps):
    """A disk with little room."""

    @override
    def free_bytes(self, path: Path) -> int:
        return 1000


def test_too_small_a_disk_is_found_before_the_work(tiny: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    shop = workshop(tmp_path, CrampedFiles(), events)
    planned = plan(open_source(str(tiny), shop.store), tiny_recipe(), shop)
    with pytest.raises(DiskFull) as caught:
        run(planned, shop)
    assert caught.value.required_bytes > caught.value.available_bytes == 1000
    assert events == []


def run_with_small_files(source: Path, home: Path, limit_bytes: int) -> str:
    """Run where no file may grow beyond a limit, which stands for the full disk; what it said at its end."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "-m", "tests.quantize.killed_run", str(source), str(home), "event", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=limit)
    assert done.returncode == 1
    assert ModelStore(home / "store").list() == []
    assert not list((home / "work").glob("**/*.partial"))
    return done.stderr.splitlines()[-1]


def test_a_write_of_ours_that_fails_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    assert "edge.errors.RecipeError: model.gguf.partial grew beyond" in run_with_small_files(tiny, tmp_path, 100_000)


def test_a_write_of_the_library_that_fails_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    convert(open_checkpoint(tiny), source, use_f16=True)
    words = run_with_small_files(source, tmp_path / "home", 100_000)
    assert "edge.errors.RecipeError: llama.cpp could not quantize tiny.gguf" in words


def _nothing(_: Path) -> None:
    return None


def _as_bin(directory: Path) -> None:
    (directory / "model.bin").write_bytes(b"\x80\x02")


def _as_safetensors(directory: Path) -> None:
    (directory / "loose.safetensors").write_bytes(b"")


def _as_gguf(directory: Path) -> None:
    (directory / "bad.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 16)


@pytest.mark.parametrize(("make", "source", "error", "words"), [
    (_nothing, "no-such-model", ModelNotFound, "edge list"),
    (_nothing, "no such model!", ModelNotFound, "neither a file"),
    (_as_bin, "model.bin", UnsupportedFormat, "pickle"),
    (_as_safetensors, "loose.safetensors", UnsupportedFormat, "directory it lies in"),
    (_as_gguf, "bad.gguf", InvalidModelFile, "bad.gguf"),
])  # fmt: skip
def test_sources_that_are_none(
    make: Callable[[Path], None], source: str, error: type[EdgeError], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        open_source(source, ModelStore(tmp_path / "store"))
    assert words in str(caught.value)


def test_a_failed_step_leaves_nothing_in_the_store(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # float32 NaN
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(InvalidModelFile, match="NaN"):
        quantized(str(broken), tmp_path, tiny_recipe())
    assert ModelStore(tmp_path / "store").list() == []
    assert not list((tmp_path / "work").glob("**/*.partial"))


def test_a_projector_goes_with_the_quantized_model(vision_files: VisionFiles, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store")
    pull(store, str(vision_files.model), name="tiny:f32", projector=str(vision_files.projector))
    quantized("tiny:f32", tmp_path, tiny_recipe())
    made = next(m for m in store.list() if m.ref.tag != "f32")
    assert made.projector == store.get("tiny:f32").projector
    assert made.capabilities == ["completion", "tools", "vision"]
