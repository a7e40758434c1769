"""What Ollama's clients read about a model, out of its package and its weight file. `shown`, `template_of` and `thinks`
read files: call them from a thread."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import msgspec

from edge.errors import EdgeError
from edge.formats.gguf import GgufValue, read_gguf
from edge.store.details import Sampling
from edge.store.models import StoredModel
from runtime.api.ollama_schema import Listed, OllamaDetails, Shown, rfc3339

_TEMPLATE = "tokenizer.chat_template"
THINKING_ENDS = ("</think", "</seed:think>", "</mm:think>", "[/THINK]", "<|END_THINKING|>", "<channel|>")
_NAMES = {"max_tokens": "num_predict"}


@lru_cache(maxsize=64)
def _header(weights: Path) -> Mapping[str, GgufValue | None]:
    """A weight file's metadata without its lists, which may be long. The path holds a digest: what is there stays."""
    metadata = read_gguf(weights).metadata
    return {k: None if isinstance(v, list) or (isinstance(v, float) and not math.isfinite(v)) else v
            for k, v in metadata.items()}  # fmt: skip


def template_of(model: StoredModel) -> str:
    """The chat template, in Jinja; empty where there is none."""
    found = model.details.template or _header(model.weights).get(_TEMPLATE)
    return found if isinstance(found, str) else ""


def capabilities(model: StoredModel) -> list[str]:
    """What a model does. Every model that makes text calls tools: where its template knows none, we tell it."""
    found = [*model.capabilities]
    try:
        return [*found, "thinking"] if "completion" in found and thinks(model) else found
    except (EdgeError, OSError):  # a list names damaged models, too
        return found


def thinks(model: StoredModel) -> bool:
    """Whether the model was made to think before it answers, as far as its template shows."""
    template = template_of(model)
    return any(marker in template for marker in THINKING_ENDS)


def details(model: StoredModel) -> OllamaDetails:
    """The short form."""
    family = model.architecture or ""
    return OllamaDetails(
        format=model.details.format, family=family, families=[family] if family else [],
        parameter_size=_short(model.num_parameters), quantization_level=model.quantization or "unknown",
    )  # fmt: skip


def _short(count: int | None) -> str:
    """A number as Ollama writes it: ``134.52M``."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count is not None and count >= size:
            return f"{count / size:.4g}{unit}" if count < 1000 * size else f"{count // size}{unit}"
    return "" if count is None else str(count)


def listed(model: StoredModel) -> Listed:
    """A line of `GET /api/tags`."""
    name = str(model.ref)
    return Listed(
        name=name, model=name, modified_at=_modified(model), size=model.size_bytes, digest=model.digest.hex,
        details=details(model), capabilities=capabilities(model),
    )  # fmt: skip


def _modified(model: StoredModel) -> str:
    return rfc3339(datetime.datetime.fromtimestamp(model.created, datetime.UTC))


def shown(model: StoredModel) -> Shown:
    """`POST /api/show`.

    Raises:
        EdgeError: The weight file cannot be read.
    """
    info: dict[str, object] = {k: v for k, v in _header(model.weights).items() if k != _TEMPLATE}
    if model.num_parameters is not None:
        info["general.parameter_count"] = model.num_parameters
    template, system = template_of(model), model.details.system
    parameters = _parameters(model.details.sampling)
    return Shown(
        license=model.license or "",
        modelfile=_modelfile(model, template, parameters),
        parameters="\n".join(parameters),
        template=template,
        system=system,
        details=details(model),
        model_info=info,
        capabilities=capabilities(model),
        modified_at=_modified(model),
    )


def _parameters(sampling: Sampling) -> list[str]:
    lines: list[str] = []
    for field, value in msgspec.structs.asdict(sampling).items():
        values: list[object] = [*(sampling.stop or ())] if field == "stop" else [value]
        texts = [msgspec.json.encode(v).decode() for v in values if v is not None]
        lines += [f"{_NAMES.get(field, field):<30} {text}" for text in texts]
    return lines


def _modelfile(model: StoredModel, template: str, parameters: list[str]) -> str:
    """The model as Ollama's CLI prints it. It is written for people: quotes inside are as they are."""
    parts = [f"FROM {model.ref}"]
    parts += [f'TEMPLATE """{template}"""'] if template else []
    parts += [f'SYSTEM """{model.details.system}"""'] if model.details.system else []
    return "\n".join([*parts, *(f"PARAMETER {line}" for line in parameters)]) + "\n"
