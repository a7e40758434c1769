"""A model as Docker's model-spec has it: another manifest and config over the same blobs.

Source: docker/model-spec, config.md and spec.md, v0.1. Docker's own code reads flat fields and ``rootfs`` where the
text has ``gguf`` and ``files`` (docker/model-runner, ``pkg/distribution/types/config.go``), so both are written.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from edge.errors import UnsupportedFormat

from ..details import short_count
from ..digest import Digest, digest_bytes
from ..manifest import MANIFEST_TYPE, WEIGHT_TYPE, Descriptor
from ..models import StoredModel
from .artifacts import (
    DOCKER_CONFIG_TYPE,
    DOCKER_GGUF_TYPE,
    DOCKER_LICENSE_TYPE,
    DOCKER_PROJECTOR_TYPE,
)


class _File(msgspec.Struct, frozen=True):
    diff_id: Digest = msgspec.field(name="diffID")
    type: str


class _RootFs(msgspec.Struct, frozen=True):
    type: str
    diff_ids: list[Digest]


class _Gguf(msgspec.Struct, frozen=True, omit_defaults=True):
    architecture: str = ""
    parameter_count: str = ""
    quantization: str = ""


class _Properties(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    format: str
    format_version: str
    size: str
    architecture: str = ""
    parameters: str = ""
    quantization: str = ""
    gguf: _Gguf
    context_size: int | None = None


class _Config(msgspec.Struct, frozen=True, kw_only=True):
    descriptor: dict[str, str]
    config: _Properties
    files: list[_File]
    rootfs: _RootFs


class _Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    schema_version: int
    media_type: str
    config: Descriptor
    layers: list[Descriptor]


@dataclass(frozen=True, slots=True)
class DockerModel:
    """The two documents; their layers are the stored model's."""

    manifest: bytes
    config: bytes


def docker_model(model: StoredModel) -> DockerModel:
    """The same model in Docker's form. Equal models give equal bytes.

    Raises:
        UnsupportedFormat: It is none that Docker's form has a place for.
    """
    weights = [file for file in model.files if file.media_type == WEIGHT_TYPE]
    if model.is_adapter or not weights or not all(file.name.lower().endswith(".gguf") for file in weights):
        raise UnsupportedFormat(f"'{model.ref}' is no GGUF model; Docker's form is for these.")
    layers = [
        Descriptor(media_type=_type(model, file.name, file.media_type), digest=file.digest, size=file.size_bytes)
        for file in model.files
    ]
    layers = [layer for layer in layers if layer.media_type]
    config = _encoded(_config(model, layers))
    manifest = _Manifest(
        schema_version=2,
        media_type=MANIFEST_TYPE,
        config=Descriptor(media_type=DOCKER_CONFIG_TYPE, digest=digest_bytes(config), size=len(config)),
        layers=layers,
    )
    return DockerModel(_encoded(manifest), config)


def _type(model: StoredModel, name: str, media_type: str) -> str:
    if media_type == WEIGHT_TYPE:
        return DOCKER_PROJECTOR_TYPE if name == model.details.projector else DOCKER_GGUF_TYPE
    return DOCKER_LICENSE_TYPE if name.upper().startswith("LICENSE") else ""


def _config(model: StoredModel, layers: list[Descriptor]) -> _Config:
    architecture, quantization = model.architecture or "", model.quantization or ""
    parameters = "" if model.num_parameters is None else short_count(model.num_parameters).upper()
    return _Config(
        descriptor={},
        config=_Properties(
            format="gguf",
            format_version="3",
            size=str(sum(layer.size for layer in layers)),
            architecture=architecture,
            parameters=parameters,
            quantization=quantization,
            gguf=_Gguf(architecture, parameters, quantization),
            context_size=model.context_tokens,
        ),
        files=[_File(layer.digest, layer.media_type) for layer in layers],
        rootfs=_RootFs("rootfs", [layer.digest for layer in layers]),
    )


def _encoded(document: msgspec.Struct) -> bytes:
    return msgspec.json.encode(document, order="deterministic", enc_hook=str)
