"""What is in a registry, read as a model: ModelPack, Docker's model-spec, Ollama's manifests, and a GGUF that somebody
pushed as it is.

Sources: CNCF model-spec v0.0.7 (docs/spec.md); docker/model-spec (spec.md, config.md; v0.1); Ollama's
``server/images.go`` for its layers' media types.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal

import msgspec

from edge.errors import InvalidModelFile, UnsupportedFormat

from ..details import Sampling
from ..manifest import ARTIFACT_TYPE, CONFIG_TYPE, INDEX_TYPE, WEIGHT_TYPE, Descriptor, decode
from .client import DOCKER_LIST_TYPE, Document

DOCKER_CONFIG_TYPE = "application/vnd.docker.ai.model.config.v0.1+json"
DOCKER_GGUF_TYPE = "application/vnd.docker.ai.gguf.v3"
DOCKER_PROJECTOR_TYPE = "application/vnd.docker.ai.mmproj"
DOCKER_LICENSE_TYPE = "application/vnd.docker.ai.license"
DOCKER_TEMPLATE_TYPE = "application/vnd.docker.ai.chat.template.jinja"
_OLLAMA = "application/vnd.ollama.image."
_ORAS_FILE = "application/vnd.oci.image.layer.v1.tar"
"""What the oras command calls a file, packed or not, unless it is told."""
_MAX_LAYERS = 256
_PACKED = re.compile(r"[.+](?:tar|gzip|zstd)\b")

Role = Literal["weights", "projector", "template", "system", "params", "license"]
_ROLES: dict[str, Role] = {
    WEIGHT_TYPE: "weights",
    DOCKER_GGUF_TYPE: "weights",
    DOCKER_PROJECTOR_TYPE: "projector",
    f"{DOCKER_GGUF_TYPE}.mmproj": "projector",
    DOCKER_LICENSE_TYPE: "license",
    DOCKER_TEMPLATE_TYPE: "template",
    f"{_OLLAMA}model": "weights",
    f"{_OLLAMA}projector": "projector",
    f"{_OLLAMA}system": "system",
    f"{_OLLAMA}params": "params",
    f"{_OLLAMA}license": "license",
}
_ADAPTERS = (f"{_OLLAMA}adapter", f"{DOCKER_GGUF_TYPE}.lora")


class Artifact(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A manifest of any kind, OCI's or Docker's."""

    schema_version: Literal[2]
    media_type: str = ""
    artifact_type: str = ""
    config: Descriptor
    layers: Annotated[list[Descriptor], msgspec.Meta(max_length=_MAX_LAYERS)]
    annotations: dict[str, str] = {}


class _List(msgspec.Struct, frozen=True):
    """An index of OCI's, or a list of Docker's."""

    manifests: list[Descriptor]


@dataclass(frozen=True, slots=True)
class Part:
    """One layer, and what it is to a model."""

    role: Role
    descriptor: Descriptor
    name: str
    """The file's own, where the layer says; else empty."""


def is_model_pack(document: Document) -> bool:
    """Whether the manifest is one that the store keeps as it came: a ModelPack with files as they are."""
    try:
        found = decode(document.data, Artifact, what="The manifest")
    except InvalidModelFile:
        return False
    named = all(layer.filepath for layer in found.layers)
    is_raw = not any(_PACKED.search(layer.media_type) for layer in found.layers)
    return found.artifact_type == ARTIFACT_TYPE and found.config.media_type == CONFIG_TYPE and named and is_raw


def parts_of(document: Document, *, what: str) -> Sequence[Part]:
    """The layers that make a model, weights first.

    Raises:
        InvalidModelFile: It is no manifest.
        UnsupportedFormat: It is one of something else, or of a model in a form that is not read.
    """
    found = decode(document.data, Artifact, what=what)
    if adapter := next((layer for layer in found.layers if layer.media_type in _ADAPTERS), None):
        raise UnsupportedFormat(
            f"{what} is a model with an adapter ({adapter.media_type}).",
            hint="Pull the model by itself, and the adapter as a file: edge pull ADAPTER.gguf.",
        )
    parts = [part for layer in found.layers if (part := _part(layer)) is not None]
    weights = [part for part in parts if part.role == "weights"]
    if len(weights) == 1:
        return sorted(parts, key=lambda part: part.role != "weights")
    kinds = ", ".join(sorted({layer.media_type for layer in found.layers})[:8]) or "none"
    packed = any(_PACKED.search(layer.media_type) for layer in found.layers)
    raise UnsupportedFormat(
        f"{what} holds {len(weights)} GGUF files as they are; one is wanted. Its layers: {kinds}.",
        hint="Package it with raw layers, one file each (modctl build --raw)." if packed and not weights else None,
    )


def _part(layer: Descriptor) -> Part | None:
    name = PurePosixPath(layer.filepath).name
    role = _ROLES.get(layer.media_type)
    is_packed = layer.media_type != _ORAS_FILE and _PACKED.search(layer.media_type)
    if name.lower().endswith(".gguf") and not is_packed and role in (None, "weights"):
        return Part("projector" if name.lower().startswith("mmproj") else "weights", layer, name)
    if role == "weights" and name:
        return None  # weights in another format
    return Part(role, layer, name) if role else None


def only_manifest(document: Document, fetch: Callable[[Descriptor], Document], *, what: str) -> Document:
    """The manifest itself, or the only one of an index.

    Raises:
        InvalidModelFile: It is neither.
        UnsupportedFormat: The index leads to several.
    """
    if document.media_type not in (INDEX_TYPE, DOCKER_LIST_TYPE):
        return document
    listed = decode(document.data, _List, what=what).manifests
    if len(listed) != 1:
        raise UnsupportedFormat(
            f"{what} is a list of {len(listed)} manifests.", hint="Name one by its digest: oci://HOST/NAME@sha256:…"
        )
    return fetch(listed[0])


class _Params(msgspec.Struct, frozen=True):
    """Ollama's, those that say how to sample."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: list[str] | None = None


def sampling_of(params: bytes) -> Sampling:
    """Ollama's parameters as a package's. Those that cannot be read are none: they are advice."""
    try:
        found = msgspec.structs.asdict(msgspec.json.decode(params, type=_Params))
        return msgspec.convert({name: value for name, value in found.items() if value is not None}, Sampling)
    except msgspec.MsgspecError:
        return Sampling()
