"""From a recipe to packages: convert, quantize, measure, report, package.

`plan` names every step by a key of its inputs; `run` does what is not there yet. A result appears under its key only
when its bytes are on the disk, so a run killed at any moment is taken up by the next where it was. When all is
packaged, the work directory is emptied: what was measured stays in the packages' reports, and a package that was made
from the same inputs is recognized and kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from edge.errors import DiskFull, RecipeError
from edge.formats.gguf import GgufFile, read_gguf
from edge.store.digest import Digest, digest_file
from edge.store.goldens import GOLDEN_NAME, Goldens
from edge.store.manifest import ModelRef
from edge.store.models import ModelStore, PackageFile, StoredModel

from . import evaluate
from .cache import StepCache, step_key
from .checkpoint import Checkpoint, lossless_precision
from .child import GoldenJob, QualityJob, QuantizeJob, SpeedJob, run_job
from .evaluate import Quality, Speed
from .gguf import convert
from .package import matching_package, package_variant, report_in, variant_in, write_documents
from .plot import draw_plot, require_plotting
from .recipe import QuantType, Recipe
from .report import (
    Report,
    SourceInfo,
    Variant,
    describe_machine,
    notes_on,
    report_text,
    tensors_of,
    text_info,
    tool_versions,
)
from .sbom import attach_sbom
from .source import Source, is_quantized, source_digest, tensor_types

Kind = Literal["convert", "quantize", "quality", "speed", "golden"]
Moment = Literal["cached", "started", "progress", "built", "done"]
T = TypeVar("T")

_MODEL = "model.gguf"
_SMALL_BYTES = 1 << 20
_ROOM_BYTES = 64 << 20
"""Left free beside what is foreseen: headers, reports, the file system's own."""


@dataclass(frozen=True, slots=True)
class Step:
    """One result to be had.

    Attributes:
        key: Of everything it is made from.
        output: Its file's name.
        size_bytes: Foreseen, and rather too large.
        is_done: It was there when the plan was made.
    """

    kind: Kind
    label: str
    key: str
    output: str
    size_bytes: int
    is_done: bool


@dataclass(frozen=True, slots=True)
class VariantPlan:
    """What one package takes.

    Attributes:
        stored: A package of that name made from the same inputs, which stays as it is; then `quantize` and the other
            steps are not run.
    """

    type: QuantType
    ref: ModelRef
    quantize: Step
    quality: Step
    speed: Step
    golden: Step
    stored: StoredModel | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run will do.

    Attributes:
        convert: None where the source is a GGUF already.
        source_speed: Timing of the source.
        is_forced: What is there already is made again and replaced.
        required_bytes: Disk space it takes at most, work and packages together.
    """

    source: Source
    digest: Digest
    recipe: Recipe
    use_f16: bool
    convert: Step | None
    source_speed: Step
    variants: tuple[VariantPlan, ...]
    is_forced: bool
    required_bytes: int = 0

    @property
    def steps(self) -> list[Step]:
        """The steps in the order they run; those of packages that stay are left out."""
        steps = [] if self.convert is None else [self.convert]
        steps.append(self.source_speed)
        for variant in self.missing:
            steps += [variant.quantize, variant.quality, variant.speed, variant.golden]
        return steps if self.missing else []

    @property
    def missing(self) -> list[VariantPlan]:
        """The packages that are still to be made."""
        return [variant for variant in self.variants if variant.stored is None]


@dataclass(frozen=True, slots=True)
class Event:
    """What happens to a step: it is there already, starts, gets on, is built, has its name."""

    step: Step
    moment: Moment
    share: float = 0.0


def _ignore(_: Event) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Workshop:
    """What a run acts on.

    Attributes:
        on_event: Called in the run's own thread at each moment of each step.
        on_hashed: Called with the size of each piece of the source that was hashed.
        clock: Gives Unix time, for the report.
    """

    cache: StepCache
    store: ModelStore
    on_event: Callable[[Event], None] = _ignore
    on_hashed: Callable[[int], None] = lambda _: None
    clock: Callable[[], float] = time.time


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left behind: the run's report, its plot, the packages."""

    report: Report
    models: tuple[StoredModel, ...]
    svg: bytes
    png: bytes


class _Planner:
    """Names steps; knows what is on the disk."""

    def __init__(self, source: Source, recipe: Recipe, shop: Workshop, *, force: bool) -> None:
        self.source, self.recipe, self.shop, self.force = source, recipe, shop, force
        self.tools = tool_versions()
        self.text = text_info(report_text()).sha256

    def step(self, kind: Kind, label: str, output: str, size_bytes: int, *inputs: object) -> Step:
        key = step_key(kind, *inputs)
        is_done = not self.force and self.shop.cache.find(key, output) is not None
        return Step(kind, label, key, output, size_bytes, is_done)

    def convert(self, digest: Digest, *, use_f16: bool) -> Step | None:
        if isinstance(self.source.model, GgufFile):
            return None
        size = self.source.num_parameters * (2 if use_f16 else 4) + _SMALL_BYTES
        inputs = (convert.VERSION, self.tools["gguf"], digest.hex, use_f16)
        return self.step("convert", f"convert to {'F16' if use_f16 else 'F32'}", _MODEL, size, *inputs)

    def speed(self, label: str, model_key: str) -> Step:
        inputs = (evaluate.VERSION, self.tools["llama-cpp-python"], model_key, self.recipe.num_threads)
        return self.step("speed", label, "speed.json", _SMALL_BYTES, *inputs)

    def variant(self, kind: QuantType, model_key: str) -> VariantPlan:
        llama = self.tools["llama-cpp-python"]
        # Small models fall back to larger types for many tensors: four bits more are foreseen.
        size = int(self.source.num_parameters * min(kind.bits_per_weight + 4, 32) / 8) + 8 * _SMALL_BYTES
        made = self.step("quantize", f"quantize to {kind.name}", _MODEL, size, llama, model_key, kind.name)
        inputs = (evaluate.VERSION, llama, model_key, made.key, self.text, self.recipe.num_tokens)
        quality = self.step("quality", f"judge {kind.name}", "quality.json", _SMALL_BYTES, *inputs)
        ref = ModelRef(self.recipe.name, kind.tag)
        stored = matching_package(self.shop.store, ref, quality.key, draft=self.recipe.draft, force=self.force)
        golden = self.step(
            "golden", f"record {kind.name}", GOLDEN_NAME, _SMALL_BYTES, evaluate.VERSION, llama, made.key, self.text
        )
        return VariantPlan(kind, ref, made, quality, self.speed(f"time {kind.name}", made.key), golden, stored)


def _required_bytes(steps: Sequence[Step]) -> int:
    """Work that is still to be written, and the packages, which are copies for a moment."""
    todo = sum(step.size_bytes for step in steps if not step.is_done)
    return todo + sum(step.size_bytes for step in steps if step.kind == "quantize")


def plan(source: Source, recipe: Recipe, shop: Workshop, *, force: bool = False) -> Plan:
    """Name every step of a run and find what is done already. Reads the source once, for its digest; writes nothing.

    Args:
        force: Replace packages of the same names, and do every step again.

    Raises:
        RecipeError: The store has a model of one of the names, made from something else.
        OSError: The source cannot be read.
    """
    digest = source_digest(source, shop.on_hashed)
    use_f16 = recipe.precision == "f16"
    if recipe.precision == "auto" and isinstance(source.model, Checkpoint):
        use_f16 = lossless_precision(source.model) == "f16"
    planner = _Planner(source, recipe, shop, force=force)
    converted = planner.convert(digest, use_f16=use_f16)
    model_key = converted.key if converted else digest.hex
    speed = planner.speed("time the source", model_key)
    variants = tuple(planner.variant(kind, model_key) for kind in recipe.types)
    made = Plan(source, digest, recipe, use_f16, converted, speed, variants, force)
    return replace(made, required_bytes=_required_bytes(made.steps))


class _Run:
    """One run of a plan, the cache being held."""

    def __init__(self, planned: Plan, shop: Workshop) -> None:
        self.plan, self.shop = planned, shop
        self.text = report_text()

    def _result(self, step: Step, build: Callable[[Path, Callable[[float], None]], None]) -> Path:
        """The step's file, built if it is not there."""
        tell = self.shop.on_event
        found = self.shop.cache.find(step.key, step.output)
        if found is not None:
            tell(Event(step, "cached", 1.0))
            return found
        tell(Event(step, "started"))
        with self.shop.cache.making(step.key, step.output, needed_bytes=step.size_bytes) as path:
            build(path, lambda share: tell(Event(step, "progress", share)))
            tell(Event(step, "built", 1.0))
        tell(Event(step, "done", 1.0))
        return path.with_name(step.output)

    def _measured(self, step: Step, kind: type[T], measure: Callable[[Callable[[float], None]], T]) -> T:
        """A step's figures."""

        def build(path: Path, on_progress: Callable[[float], None]) -> None:
            path.write_bytes(msgspec.json.encode(measure(on_progress)))

        return msgspec.json.decode(self._result(step, build).read_bytes(), type=kind)

    def source_model(self) -> Path:
        model, step = self.plan.source.model, self.plan.convert
        if isinstance(model, GgufFile) or step is None:
            assert isinstance(model, GgufFile)
            return model.path

        def build(path: Path, on_progress: Callable[[float], None]) -> None:
            convert.convert(model, path, use_f16=self.plan.use_f16, on_progress=on_progress)

        return self._result(step, build)

    def speed(self, step: Step, model: Path) -> Speed:
        job = SpeedJob(str(model), self.text, self.plan.recipe.num_threads)
        return self._measured(step, Speed, lambda on_progress: run_job(job, Speed, on_progress=on_progress))

    def quantized(self, variant: VariantPlan, source: Path) -> Path:
        def build(path: Path, on_progress: Callable[[float], None]) -> None:
            job = QuantizeJob(str(source), str(path), variant.type.ftype, self.plan.recipe.num_threads)
            run_job(job, type(None), on_progress=on_progress)
            read_gguf(path, what=f"The {variant.type.name} that llama.cpp wrote")

        return self._result(variant.quantize, build)

    def quality(self, variant: VariantPlan, source: Path, model: Path) -> Quality:
        recipe = self.plan.recipe
        job = QualityJob(str(source), str(model), self.text, recipe.num_tokens, recipe.num_threads)
        return self._measured(variant.quality, Quality, lambda tell: _finite(run_job(job, Quality, on_progress=tell)))

    def row(self, variant: VariantPlan, source: Path) -> tuple[Variant, Path | None]:
        """The variant's line in the report, and its file where it was made now."""
        kept = variant_in(variant.stored) if variant.stored else None
        if kept is not None:
            return kept, None
        path = self.quantized(variant, source)
        quality = self.quality(variant, source, path)
        speed = self.speed(variant.speed, path)
        self.goldens(variant, path)
        return _row(variant, read_gguf(path), quality, speed), path

    def goldens(self, variant: VariantPlan, model: Path) -> Goldens:
        """What the device shall compare with."""
        job = GoldenJob(str(model), self.text, self.plan.recipe.num_threads)
        return self._measured(variant.golden, Goldens, lambda tell: run_job(job, Goldens, on_progress=tell))

    def report(self, source: Path, speed: Speed, rows: list[Variant]) -> Report:
        recipe, reference = self.plan.recipe, read_gguf(source)
        return Report(
            name=recipe.name,
            created=self.shop.clock(),
            source=_source_info(self.plan, reference, speed),
            variants=rows,
            text=text_info(self.text),
            machine=describe_machine(recipe.num_threads),
            tools=tool_versions(),
            recipe={
                "types": [t.name for t in recipe.types],
                "precision": recipe.precision,
                "num_tokens": recipe.num_tokens,
                "num_threads": recipe.num_threads,
            },
            notes=notes_on(reference, speed, rows),
        )


def _finite(quality: Quality) -> Quality:
    """Refuse a model that computes nothing.

    Raises:
        RecipeError: Its figures are not numbers.
    """
    if not math.isfinite(quality.kld_mean.value):
        raise RecipeError("The model computes values that are not numbers.", hint="Its source may be damaged.")
    return quality


def _row(variant: VariantPlan, file: GgufFile, quality: Quality, speed: Speed) -> Variant:
    return Variant(
        type=variant.type.name,
        ref=str(variant.ref),
        key=variant.quality.key,
        digest=str(digest_file(file.path)),
        size_bytes=file.size,
        bits_per_weight=round(file.size * 8 / file.num_parameters, 3),
        tensor_types=tensor_types(file),
        quality=quality,
        speed=speed,
        tensors=tensors_of(file),
    )


def _source_info(planned: Plan, reference: GgufFile, speed: Speed) -> SourceInfo:
    return SourceInfo(
        label=planned.source.label,
        kind="checkpoint" if planned.convert else "gguf",
        digest=str(planned.digest),
        architecture=reference.architecture,
        precision=reference.quantization or "unknown",
        is_quantized=is_quantized(reference),
        num_parameters=reference.num_parameters,
        size_bytes=reference.size,
        tensor_types=tensor_types(reference),
        license=planned.source.license or reference.text("general.license"),
        speed=speed,
    )


def _check_disk(planned: Plan, shop: Workshop) -> None:
    free = shop.cache.free_bytes()
    if planned.missing and free < planned.required_bytes + _ROOM_BYTES:
        raise DiskFull(required_bytes=planned.required_bytes + _ROOM_BYTES, available_bytes=free)


def _plots(report: Report, shop: Workshop) -> tuple[bytes, bytes]:
    key = step_key("plot", report.name)
    with shop.cache.making(key, "quality.svg") as svg, shop.cache.making(key, "quality.png") as png:
        draw_plot(report, svg, png)
    directory = shop.cache.root / key
    return (directory / "quality.svg").read_bytes(), (directory / "quality.png").read_bytes()


def _package_all(planned: Plan, made: list[Path | None], report: Report, shop: Workshop) -> Outcome:
    svg, png = _plots(report, shop)
    models: list[StoredModel] = []
    for variant, path in zip(planned.variants, made, strict=True):
        if path is None:
            assert variant.stored is not None
            models.append(variant.stored)
            continue
        documents = write_documents(report, variant.type.name, svg, png, path.parent)
        if (golden := shop.cache.find(variant.golden.key, GOLDEN_NAME)) is not None:
            documents.append(PackageFile(golden, GOLDEN_NAME))
        model = package_variant(
            shop.store,
            variant.ref,
            path,
            source=planned.source,
            digest=planned.digest,
            documents=documents,
            draft=planned.recipe.draft,
        )
        attach_sbom(shop.store, model)
        models.append(model)
    return Outcome(report, tuple(models), svg, png)


def _make(planned: Plan, shop: Workshop) -> Outcome:
    running = _Run(planned, shop)
    source = running.source_model()
    speed = running.speed(planned.source_speed, source)
    rows = [running.row(variant, source) for variant in planned.variants]
    report = running.report(source, speed, [row for row, _ in rows])
    return _package_all(planned, [path for _, path in rows], report, shop)


def _kept(planned: Plan, shop: Workshop) -> Outcome:
    """All packages are there: their own reports, put together."""
    models = [variant.stored for variant in planned.variants if variant.stored is not None]
    reports = [report for model in models if (report := report_in(model)) is not None]
    rows = [row for model in models if (row := variant_in(model)) is not None]
    report = msgspec.structs.replace(reports[0], subject=None, variants=rows)
    return _package_all(planned, [None] * len(models), report, shop)


def run(planned: Plan, shop: Workshop) -> Outcome:
    """Do what a plan names and is not done yet; then empty the work directory.

    Raises:
        DiskFull: There is no room for what would be made; nothing was begun, or nothing half-made is left.
        RecipeError: A step failed, with the reason; or another run has the work directory.
        InvalidModelFile: The source is damaged.
        MissingExtra: The extra `quantize` is not installed.
    """
    require_plotting()
    _check_disk(planned, shop)
    with shop.cache.held():
        if planned.is_forced:
            shop.cache.clear()
        outcome = _make(planned, shop) if planned.missing else _kept(planned, shop)
        shop.cache.clear()
        return outcome
