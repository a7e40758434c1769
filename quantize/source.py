"""What SOURCE on the command line is: a GGUF file, a checkpoint directory, or a model of the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edge.errors import InvalidReference, ModelNotFound, UnsupportedFormat
from edge.formats.gguf import GgufFile, read_gguf
from edge.formats.lora import is_adapter
from edge.store.details import Sampling
from edge.store.digest import Digest, StreamingHash, digest_bytes
from edge.store.models import ModelStore, StoredFile

from .checkpoint import FAMILY_NAMES, BertSettings, Checkpoint, open_checkpoint
from .recipe import model_name

FLOAT_TYPES = frozenset({"F32", "F16", "BF16", "F64"})
_CHUNK = 4 << 20
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


@dataclass(frozen=True, slots=True)
class Source:
    """A model to quantize, checked as far as its headers go.

    Attributes:
        label: As the user named it, without the directories before.
        model: Either of the two.
        known_digest: Where the store knows it already.
        license_file: A file beside the weights that says what may be done with them.
        origin: Where the model came from, if the store knows.
        sampling: How its makers sample from it, if the store knows.
        projector: What lets it see images, where the store has that; it goes with the quantized model as it is.
    """

    label: str
    name: str
    model: Checkpoint | GgufFile
    known_digest: Digest | None = None
    license: str | None = None
    license_file: Path | None = None
    origin: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    projector: StoredFile | None = None

    @property
    def num_parameters(self) -> int:
        return self.model.num_parameters

    @property
    def size_bytes(self) -> int:
        if isinstance(self.model, GgufFile):
            return self.model.size
        return sum(path.stat().st_size for path in {t.path for t in self.model.tensors.values()})


def tensor_types(file: GgufFile) -> dict[str, int]:
    """How many tensors have each type, most frequent first."""
    return dict(Counter(t.type for t in file.tensors).most_common())


def is_quantized(file: GgufFile) -> bool:
    """Whether any of its tensors is stored in less than float16."""
    return not FLOAT_TYPES.issuperset(t.type for t in file.tensors)


def _from_gguf(path: Path, label: str) -> Source:
    file = read_gguf(path)
    if isinstance(parts := file.metadata.get("split.count"), int) and parts > 1:
        raise UnsupportedFormat(
            f"{path.name} is one of {parts} parts of a model.", hint="Join them first: llama-gguf-split --merge."
        )
    _refuse_adapter(file, label)
    if file.is_projector:
        raise UnsupportedFormat(f"{label} is a projector and no model.", hint="Quantize the model; a projector stays.")
    return Source(label, model_name(path.stem), file, license=file.text("general.license"))


def _refuse_adapter(file: GgufFile, label: str) -> None:
    if is_adapter(file):
        raise UnsupportedFormat(
            f"{label} is an adapter, which changes a model and is none.", hint="Quantize the model; adapters stay."
        )


def _from_directory(path: Path) -> Source:
    checkpoint = open_checkpoint(path)
    licenses = sorted(p for p in path.glob("LICENSE*") if p.is_file())
    name = path.absolute().name
    return Source(name, model_name(name), checkpoint, license_file=licenses[0] if licenses else None)


def _from_store(ref: str, store: ModelStore) -> Source:
    stored = store.get(ref)
    weights = next(file for file in stored.files if file.path == stored.weights)
    file = read_gguf(stored.weights, what=str(stored.ref))
    _refuse_adapter(file, str(stored.ref))
    terms = next((file.path for file in stored.files if Path(file.name).name.startswith("LICENSE")), None)
    return Source(
        str(stored.ref),
        model_name(f"{stored.ref.name}-{stored.ref.tag}".removesuffix("-latest")),
        file,
        known_digest=weights.digest,
        license=stored.license,
        license_file=terms,
        origin=stored.source,
        sampling=stored.details.sampling,
        projector=next((file for file in stored.files if file.name == stored.details.projector), None),
    )


def _refuse_encoder(source: Source) -> Source:
    """A quantized model is judged by the text that it goes on with, and an encoder makes none."""
    model = source.model
    if isinstance(model.settings, BertSettings) if isinstance(model, Checkpoint) else model.pooling is not None:
        raise UnsupportedFormat(
            f"{source.label} makes embeddings or scores, and no text to judge its quality by.",
            hint="Take it as it is: edge pull. A checkpoint directory is converted to F16.",
        )
    return source


def open_source(text: str, store: ModelStore) -> Source:
    """Find and check what a user named. A path that exists wins over a reference of the store.

    Raises:
        ModelNotFound: It is neither a path nor a model of the store.
        UnsupportedFormat: A pickle, another kind of file, or a model family that is not supported.
        InvalidModelFile: A header breaks its format.
    """
    path = Path(text)
    if path.is_dir():
        return _refuse_encoder(_from_directory(path))
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise UnsupportedFormat(
            f"{path.name} is a pickle: loading one runs whatever code it holds, so it is refused.",
            hint="Name a checkpoint directory with safetensors, or a GGUF file.",
        )
    if path.suffix.lower() == ".safetensors":
        raise UnsupportedFormat(
            f"{path.name} holds tensors without the model's configuration.", hint="Name the directory it lies in."
        )
    if path.is_file():
        return _refuse_encoder(_from_gguf(path, path.name))
    try:
        return _refuse_encoder(_from_store(text, store))
    except (ModelNotFound, InvalidReference) as e:
        raise ModelNotFound(
            text,
            message=f"'{text}' is neither a file, a directory nor a model of the store.",
            hint=f"SOURCE is a GGUF file, a checkpoint directory ({FAMILY_NAMES}) or a name that `edge list` shows.",
        ) from e


def _digest_file(path: Path, on_bytes: Callable[[int], None]) -> Digest:
    running = StreamingHash()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            running.update(data)
            on_bytes(len(data))
    return running.digest()


def source_digest(source: Source, on_bytes: Callable[[int], None] = lambda _: None) -> Digest:
    """A digest of everything that goes into the result: the GGUF's own, or one over a checkpoint's files.

    Args:
        on_bytes: Called with the size of each piece read.

    Raises:
        OSError: A file cannot be read.
    """
    if source.known_digest is not None:
        return source.known_digest
    if isinstance(source.model, GgufFile):
        return _digest_file(source.model.path, on_bytes)
    root = source.model.directory
    listing = [(str(p.relative_to(root)), _digest_file(p, on_bytes).hex) for p in source.model.files()]
    # The directory's name becomes the model's title.
    return digest_bytes(msgspec.json.encode([root.absolute().name, *listing]))
