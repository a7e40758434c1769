"""What is known about a model, and how a manifest says it."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from edge.formats.gguf import GgufFile
from edge.formats.lora import is_adapter, read_lora
from edge.formats.template import digest_of
from edge.kinds import ModelKind

from .digest import Digest
from .manifest import OURS, Manifest, ModelConfig, ModelDescriptor, ModelFs, ModelProperties, ModelRef

ARCHITECTURE = f"{OURS}architecture"
PARAMETERS = f"{OURS}parameters"
CONTEXT = f"{OURS}context-tokens"
POOLING = f"{OURS}pooling"
PROJECTOR = f"{OURS}projector"
SOURCE = f"{OURS}source"
SAMPLING = f"{OURS}sampling"
SYSTEM = f"{OURS}system"
TEMPLATE = f"{OURS}chat-template"
TEMPLATE_DIGEST = f"{OURS}chat-template-digest"
DRAFT = f"{OURS}draft"
QUANTIZED_FROM = f"{OURS}quantized-from"
"""What the makers of a quantized model called its source; nothing that can be fetched."""
TENSOR_TYPES = f"{OURS}tensor-types"
MAX_SAMPLING_CHARS = 64 << 10
ADAPTER_TYPE = f"{OURS}adapter.type"
ADAPTER_RANK = f"{OURS}adapter.rank"
ADAPTER_BASE = f"{OURS}adapter.base"


StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the package would have its model asked, where a request does not say. None where it does not say either. What
    the fields mean is written at `runtime.request.SamplingParams`."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, msgspec.Meta(ge=-1, le=(1 << 31) - 1)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] | None = None
    """Of an answer, as far as the context goes."""
    stop: Annotated[tuple[StopString, ...], msgspec.Meta(max_length=16)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDetails:
    """What makes a package an adapter: it changes a model and is none."""

    type: str = "lora"
    rank: int | None = None
    """The largest of its tensors."""
    base: str | None = None
    """The model it was made for, in its makers' words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDetails:
    """What a package says about its model. None where it is not known."""

    architecture: str | None = None
    """The GGUF's own word, as ``llama``."""
    quantization: str | None = None
    """As ``Q4_K_M``."""
    num_parameters: int | None = None
    context_tokens: int | None = None
    pooling: str | None = None
    """As `GgufFile.pooling`: the model makes vectors (``mean``, ``cls``, ``last``) or ranks pairs (``rank``), and no
    text."""
    projector: str | None = None
    """The file of the package that makes images readable for the model (``mmproj``), a GGUF as well."""
    license: str | None = None
    """SPDX expression where possible."""
    source: str | None = None
    """Where it came from; `edge pull` accepts it."""
    title: str | None = None
    format: str = "gguf"
    created: float | None = None
    """Unix time at which the model was made; None keeps equal models' digests equal."""
    sampling: Sampling = field(default_factory=Sampling)
    system: str = ""
    """What conversations begin with that have no system message of their own."""
    template: str = ""
    """A chat template in the place of the weight file's own."""
    template_digest: str = ""
    """Of the weight file's own, where it has one: what a worker loads has to have the same."""
    draft: str | None = None
    """The name of a smaller model with the same vocabulary that guesses for it, where the store has that model."""
    adapter: AdapterDetails | None = None
    """Of an adapter; None of a model."""
    annotations: Mapping[str, str] = field(default_factory=dict[str, str])
    """More for the manifest; keys begin with ``dev.slm-edge.``."""

    @property
    def kind(self) -> ModelKind:
        if self.adapter is not None:
            return "adapter"
        match self.pooling:
            case None:
                return "text"
            case "rank":
                return "reranking"
            case _:
                return "embeddings"


def details_of(
    gguf: GgufFile, *, source: str | None = None, license: str | None = None, sampling: Sampling | None = None,
    draft: str | None = None,
) -> ModelDetails:  # fmt: skip
    """Fill the details from a GGUF's metadata; `license` overrides the file's own word."""
    types = Counter(tensor.type for tensor in gguf.tensors)
    listed = ", ".join(f"{name} {count}" for name, count in sorted(types.items()))
    return ModelDetails(
        architecture=gguf.architecture,
        quantization=gguf.quantization,
        num_parameters=gguf.num_parameters,
        context_tokens=gguf.context_tokens,
        pooling=gguf.pooling,
        license=_clean(license or gguf.text("general.license")),
        source=source,
        title=_clean(gguf.text("general.name")),
        sampling=sampling or Sampling(),
        draft=draft,
        adapter=_adapter_details(gguf),
        template_digest=digest_of(template) if (template := gguf.text("tokenizer.chat_template")) else "",
        annotations={TENSOR_TYPES: listed},
    )


def _adapter_details(gguf: GgufFile) -> AdapterDetails | None:
    if not is_adapter(gguf):
        return None
    lora = read_lora(gguf)
    return AdapterDetails(rank=lora.rank, base=_clean(lora.base))


def config_of(ref: ModelRef, details: ModelDetails, layers: list[Digest]) -> ModelConfig:
    """The ModelPack config of a model."""
    created = details.created
    return ModelConfig(
        descriptor=ModelDescriptor(
            created_at=None if created is None else rfc3339(created),
            family=details.architecture,
            name=ref.name,
            title=details.title,
            licenses=[details.license] if details.license else [],
            source_url=details.source,
        ),
        config=ModelProperties(
            architecture="transformer",
            format=details.format,
            param_size=None if details.num_parameters is None else short_count(details.num_parameters),
            quantization=details.quantization,
        ),
        modelfs=ModelFs(type="layers", diff_ids=layers),
    )


def annotations_of(details: ModelDetails) -> dict[str, str]:
    """The manifest's annotations: exact numbers, which ModelPack's config has no place for."""
    known = {
        ARCHITECTURE: details.architecture,
        PARAMETERS: details.num_parameters,
        CONTEXT: details.context_tokens,
        POOLING: details.pooling,
        PROJECTOR: details.projector,
        SOURCE: details.source,
        DRAFT: details.draft,
        ADAPTER_TYPE: details.adapter and details.adapter.type,
        ADAPTER_RANK: details.adapter and details.adapter.rank,
        ADAPTER_BASE: details.adapter and details.adapter.base,
        SYSTEM: details.system or None,
        TEMPLATE: details.template or None,
        TEMPLATE_DIGEST: details.template_digest or None,
        SAMPLING: None if details.sampling == Sampling() else msgspec.json.encode(details.sampling).decode(),
    }
    return {key: str(value) for key, value in known.items() if value is not None} | dict(details.annotations)


def details_from(manifest: Manifest, config: ModelConfig) -> ModelDetails:
    """Read the details back; a package made by others has fewer."""
    notes = manifest.annotations
    return ModelDetails(
        architecture=_clean(notes.get(ARCHITECTURE) or config.descriptor.family),
        quantization=_clean(config.config.quantization),
        num_parameters=_whole_number(notes.get(PARAMETERS)),
        context_tokens=_whole_number(notes.get(CONTEXT)),
        pooling=_clean(notes.get(POOLING)),
        projector=notes.get(PROJECTOR),
        license=_clean(" AND ".join(config.descriptor.licenses) or None),
        source=_clean(notes.get(SOURCE) or config.descriptor.source_url),
        title=_clean(config.descriptor.title),
        format=config.config.format or "gguf",
        sampling=_sampling(notes.get(SAMPLING)),
        system=notes.get(SYSTEM, ""),
        template=notes.get(TEMPLATE, ""),
        template_digest=notes.get(TEMPLATE_DIGEST, ""),
        draft=_clean(notes.get(DRAFT)),
        adapter=_adapter_from(notes),
    )


def _adapter_from(notes: Mapping[str, str]) -> AdapterDetails | None:
    if not (kind := _clean(notes.get(ADAPTER_TYPE))):
        return None
    return AdapterDetails(type=kind, rank=_whole_number(notes.get(ADAPTER_RANK)), base=_clean(notes.get(ADAPTER_BASE)))


def _sampling(text: str | None) -> Sampling:
    """Defaults that cannot be read are none: they are advice, and no reason to refuse the model."""
    try:
        return msgspec.json.decode(text, type=Sampling) if text and len(text) <= MAX_SAMPLING_CHARS else Sampling()
    except msgspec.MsgspecError:
        return Sampling()


def _clean(text: str | None) -> str | None:
    """A text out of a model's file, fit for a terminal and a log: no control characters, no end."""
    return "".join(c if c.isprintable() else "?" for c in text[:500]) if text is not None else None


def _whole_number(text: str | None) -> int | None:
    return int(text) if text and len(text) <= 18 and text.isascii() and text.isdigit() else None


def short_count(count: int) -> str:
    """ModelPack's ``paramSize``: ``134515008`` is ``135m``."""
    for unit, size in (("t", 10**12), ("b", 10**9), ("m", 10**6), ("k", 10**3)):
        if count >= size:
            value = count / size
            return f"{value:.0f}{unit}" if value >= 10 else f"{value:.1f}".removesuffix(".0") + unit
    return str(count)


def rfc3339(unix_time: float) -> str:
    """A time as OCI documents write it, in UTC."""
    return datetime.datetime.fromtimestamp(unix_time, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
