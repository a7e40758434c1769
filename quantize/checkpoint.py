"""A Hugging Face checkpoint directory, read only: configuration, tokenizer files, tensors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.errors import InvalidModelFile, RecipeError, UnsupportedFormat
from edge.formats.safetensors import SafeTensor, read_safetensors

FAMILIES = {
    "llama": ("LlamaForCausalLM",),
    "mistral": ("MistralForCausalLM",),
    "bert": ("BertModel", "BertForMaskedLM", "BertForSequenceClassification"),
}
"""The model types that can be converted, with the classes their checkpoints may name; the first is the default."""

FAMILY_NAMES = "Llama (also SmolLM, TinyLlama and other models of type 'llama') and Mistral"
"""Families that generate text, and so can be quantized and judged by what they generate."""

_SMALL_JSON_BYTES = 16 << 20
_TOKENIZER_BYTES = 128 << 20  # The largest in the field, of 262,144 tokens, is 33 MB.
_COUNTERS = (".position_ids",)
"""Tensors that number their own places: integers that old versions of transformers stored beside the weights."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """`rope_scaling` of transformers 4, `rope_parameters` of 5."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: Count | None = None

    @property
    def kind(self) -> str:
        return (self.rope_type or self.type or "default").lower()


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What `config.json` says of a Llama-like model. Defaults are those of transformers' `LlamaConfig`."""

    model_type: str
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    num_attention_heads: Count
    vocab_size: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count = 2048
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-6
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    rope_parameters: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rope(self) -> RopeScaling:
        return self.rope_parameters or self.rope_scaling or RopeScaling()

    @property
    def rope_base(self) -> float:
        return self.rope.rope_theta or self.rope_theta or 10000.0


class BertSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What `config.json` says of a BERT encoder. Defaults are those of transformers' `BertConfig`."""

    model_type: str
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    num_attention_heads: Count
    vocab_size: Count
    max_position_embeddings: Count = 512
    type_vocab_size: Count = 2
    layer_norm_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"
    architectures: list[str] = []
    id2label: dict[str, str] | None = None

    @property
    def is_reranker(self) -> bool:
        """Whether it judges a pair of texts by one number."""
        return "BertForSequenceClassification" in self.architectures


Settings = ModelSettings | BertSettings


def read_json(path: Path, *, limit_bytes: int = _SMALL_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of bounded size.

    Raises:
        InvalidModelFile: Too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > limit_bytes:
            raise InvalidModelFile(path.name, f"it is larger than {limit_bytes:,} bytes")
        table: object = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise InvalidModelFile(path.name, f"it is not readable JSON ({e})") from e
    if not isinstance(table, dict):
        raise InvalidModelFile(path.name, "it is not a JSON object")
    return cast("dict[str, Any]", table)


def _check_family(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedFormat(
            f"Checkpoints of type {model_type!r} cannot be converted.",
            hint=f"Supported families: {FAMILY_NAMES}. A GGUF of the model can be quantized whatever its family.",
        )
    classes = cast("list[object]", config.get("architectures") or FAMILIES[model_type])
    if not set(FAMILIES[model_type]).intersection(map(str, classes)):
        supported = ", ".join(name for names in FAMILIES.values() for name in names)
        raise UnsupportedFormat(f"A checkpoint for {classes} cannot be converted.", hint=f"Supported: {supported}.")
    if config.get("quantization_config"):
        raise UnsupportedFormat(
            "The checkpoint is already quantized (quantization_config).", hint="Start from the original weights."
        )


def _settings_of(config: Mapping[str, Any]) -> Settings:
    _check_family(config)
    try:
        if config["model_type"] == "bert":
            return _checked_encoder(msgspec.convert(config, BertSettings))
        return _checked_decoder(msgspec.convert(config, ModelSettings))
    except msgspec.ValidationError as e:
        raise InvalidModelFile("config.json", str(e)) from e


def _checked_encoder(settings: BertSettings) -> BertSettings:
    if settings.hidden_size % settings.num_attention_heads:
        raise InvalidModelFile("config.json", "its heads do not divide evenly")
    if settings.position_embedding_type != "absolute":
        raise UnsupportedFormat(f"Positions of type '{settings.position_embedding_type}' cannot be converted.")
    if settings.hidden_act not in ("gelu", "gelu_new", "gelu_pytorch_tanh"):
        raise UnsupportedFormat(f"The activation '{settings.hidden_act}' does not belong to this family.")
    # Without id2label transformers makes a classifier of two classes.
    if settings.is_reranker and len(settings.id2label or ("0", "1")) != 1:
        raise UnsupportedFormat(
            "A classifier of several classes cannot be converted.", hint="A reranker has one label (num_labels = 1)."
        )
    return settings


def _checked_decoder(settings: ModelSettings) -> ModelSettings:
    if settings.num_attention_heads % settings.num_kv_heads or settings.head_size % 2:
        raise InvalidModelFile("config.json", "its heads do not divide evenly")
    if settings.rope.kind not in ("default", "linear", "llama3"):
        raise UnsupportedFormat(
            f"RoPE scaling '{settings.rope.kind}' cannot be converted.", hint="Supported: none, linear and llama3."
        )
    if settings.hidden_act != "silu":
        raise UnsupportedFormat(f"The activation '{settings.hidden_act}' does not belong to this family.")
    return settings


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor and the file it lies in."""

    path: Path
    stored: SafeTensor


DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def load_values(tensor: CheckpointTensor) -> NDArray[np.float16 | np.float32]:
    """The tensor's values, as float16 where stored so and else as float32; the bytes are mapped, not read.

    Raises:
        InvalidModelFile: A value is NaN or infinite.
    """
    stored = tensor.stored
    raw = np.memmap(tensor.path, DTYPES[stored.dtype], "r", offset=stored.offset, shape=stored.shape or (1,))
    widened = (raw.astype(np.uint32) << 16).view(np.float32) if stored.dtype == "BF16" else raw
    values = cast("NDArray[np.float16 | np.float32]", widened)
    if not np.isfinite(values).all():
        raise InvalidModelFile(
            tensor.path.name, f"tensor '{stored.name}' has values that are NaN or infinite, so the training went wrong"
        )
    return values


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory that can be converted.

    Attributes:
        config: `config.json` as it stands.
        tensors: By name; part files in the order of their names, names sorted within one.
    """

    directory: Path
    config: Mapping[str, Any]
    settings: Settings
    tensors: Mapping[str, CheckpointTensor]

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(t.stored.shape, dtype=np.int64)) for t in self.tensors.values())

    def files(self) -> list[Path]:
        """Everything a conversion reads, sorted by name."""
        texts = (
            "*.json",
            "1_Pooling/config.json",
            "*.jinja",
            "tokenizer.model",
            "README.md",
            "LICENSE*",
            "additional_chat_templates/*.jinja",
        )
        found = {path for pattern in texts for path in self.directory.glob(pattern) if path.is_file()}
        return sorted(found | {t.path for t in self.tensors.values()})

    def read_table(self, name: str) -> dict[str, Any]:
        """A JSON file of the directory; an absent one is empty.

        Raises:
            InvalidModelFile: It is no JSON object.
        """
        path = self.directory / name
        limit = _TOKENIZER_BYTES if name == "tokenizer.json" else _SMALL_JSON_BYTES
        return read_json(path, limit_bytes=limit) if path.is_file() else {}

    def read_text(self, name: str, *, limit_bytes: int = 1 << 20) -> str | None:
        """A UTF-8 text of the directory, or None where it has none.

        Raises:
            InvalidModelFile: Too large or not UTF-8.
        """
        path = self.directory / name
        if not path.is_file():
            return None
        with _refusing(path.name):
            if path.stat().st_size > limit_bytes:
                raise ValueError(f"it is larger than {limit_bytes:,} bytes")
            return path.read_text("utf-8")


@contextlib.contextmanager
def _refusing(name: str) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError) as e:
        raise InvalidModelFile(name, str(e)) from e


def _indexed_parts(directory: Path, index: Path) -> tuple[list[Path], set[str]]:
    weight_map = read_json(index, limit_bytes=_SMALL_JSON_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidModelFile(index.name, "it has no weight_map")
    table = cast("dict[str, object]", weight_map)
    names = sorted({str(part) for part in table.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InvalidModelFile(index.name, f"it names the part {name!r}, which is no safetensors file beside it")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise RecipeError(
            f"The checkpoint is incomplete: {len(missing)} of its {len(names)} parts are missing ({missing[0]}, …).",
            hint="Fetch them again from where the checkpoint came from.",
        )
    return [directory / name for name in names], set(table)


def _parts(directory: Path) -> tuple[list[Path], set[str] | None]:
    """The weight files, and the tensor names an index promises."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_parts(directory, index)
    parts = sorted(directory.glob("model*.safetensors"))
    if parts:
        return parts, None
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise UnsupportedFormat(
            f"{pickles[0]} is a pickle: loading one runs whatever code it holds, so it is refused.",
            hint="Use the safetensors version of the checkpoint, or convert it on a machine you can throw away.",
        )
    raise RecipeError(
        f"{directory} holds no model.safetensors.",
        hint="SOURCE is a checkpoint directory, a GGUF file or a model in the store.",
    )


def _tensors(directory: Path) -> dict[str, CheckpointTensor]:
    parts, promised = _parts(directory)
    tensors: dict[str, CheckpointTensor] = {}
    for path in parts:
        for stored in sorted(read_safetensors(path).tensors, key=lambda t: t.name):
            if stored.name in tensors:
                raise InvalidModelFile(path.name, f"tensor '{stored.name}' is also in {tensors[stored.name].path.name}")
            if stored.name.endswith(_COUNTERS):
                continue
            if stored.dtype not in DTYPES:
                raise UnsupportedFormat(
                    f"Tensor '{stored.name}' is stored as {stored.dtype}.", hint="Supported: F32, F16 and BF16."
                )
            tensors[stored.name] = CheckpointTensor(path, stored)
    if promised is not None and (lost := sorted(promised - set(tensors))):
        raise InvalidModelFile("model.safetensors.index.json", f"no part has the tensor '{lost[0]}' it lists")
    return tensors


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read a directory's configuration and the places of its tensors; no tensor is read.

    Raises:
        UnsupportedFormat: Another model family, an unsupported storage type, or a pickle.
        RecipeError: A file is missing.
        InvalidModelFile: A file breaks its format.
    """
    if not (directory / "config.json").is_file():
        raise RecipeError(
            f"{directory} has no config.json, so it is no checkpoint directory.",
            hint="SOURCE is a checkpoint directory, a GGUF file or a model in the store.",
        )
    config = read_json(directory / "config.json")
    settings = _settings_of(config)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise RecipeError(
            f"{directory} has no tokenizer.json, so the model could not read text.",
            hint="Copy the tokenizer files of the model into it.",
        )
    return Checkpoint(directory, config, settings, _tensors(directory))


def lossless_precision(checkpoint: Checkpoint) -> str:
    """`f16` where every matrix is stored so, else `f32`: float16 has neither bfloat16's range nor float32's digits."""
    kinds = {t.stored.dtype for t in checkpoint.tensors.values() if len(t.stored.shape) > 1}
    return "f16" if kinds <= {"F16"} else "f32"
