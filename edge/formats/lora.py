"""LoRA adapters in GGUF: which weights of a model they change, and whether they fit one.

Format: what llama.cpp loads (src/llama-adapter.cpp as vendored by llama-cpp-python 0.3.36): ``general.type`` is
``adapter``, ``adapter.type`` is ``lora``, and each changed weight ``W`` has a pair ``W.lora_a`` (rank rows) and
``W.lora_b``. What it takes and then leaves out of account (norms, invocation tokens), or aborts at (odd types, shapes
it does not compare), is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from edge.errors import AdapterMismatch, InvalidModelFile, UnsupportedFormat

from .gguf import GgufFile, GgufTensor

MAX_RANK = 1024
"""Four times what people train; the buffers of every step grow with it."""
_MASKS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "Q8_0": ("<u2", 0x7C00)}
"""Types an adapter may have, each with the exponent bits that are all set in NaN and infinity; of Q8_0, in its
scales."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two factors of one weight's change."""

    a: GgufTensor
    b: GgufTensor

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A checked adapter."""

    file: GgufFile
    alpha: float
    """Over the rank it scales the change; 0 leaves the change as it is."""
    pairs: Mapping[str, LoraPair]
    """By the name of the weight that is changed."""

    @property
    def architecture(self) -> str:
        return self.file.architecture

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def base(self) -> str | None:
        """The model it was trained for, as its makers wrote it."""
        key = "general.base_model.0"
        return self.file.text(f"{key}.repo_url") or self.file.text(f"{key}.name")


def is_adapter(file: GgufFile) -> bool:
    """Whether a file changes a model instead of being one."""
    return file.metadata.get("general.type") == "adapter"


def read_lora(file: GgufFile, *, what: str | None = None) -> LoraAdapter:
    """Take an adapter's header apart.

    Raises:
        InvalidModelFile: It breaks the format.
        UnsupportedFormat: It is another kind of adapter, or changes what llama.cpp would silently leave as it is.
    """
    what = what or file.path.name
    kind = file.metadata.get("adapter.type")
    if kind != "lora":
        raise UnsupportedFormat(f"{what} is an adapter of the type {str(kind)[:40]!r}; LoRA is supported.")
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise UnsupportedFormat(f"{what} is an activated LoRA, which works from a certain token on; none is supported.")
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not 0 <= alpha <= 1e6:
        raise InvalidModelFile(what, f"'adapter.lora.alpha' is {str(alpha)[:40]}, not a number from 0 to a million")
    return LoraAdapter(file, alpha, dict(_pairs(file, what)))


def _pairs(file: GgufFile, what: str) -> Iterator[tuple[str, LoraPair]]:
    found = {tensor.name: tensor for tensor in file.tensors}
    if not found:
        raise InvalidModelFile(what, "it changes no weight")
    for name, tensor in found.items():
        target, dot, side = name.rpartition(".")
        if side not in ("lora_a", "lora_b") or not dot or "lora_" in target:
            raise UnsupportedFormat(f"{what} holds the tensor '{name}', which is no part of a LoRA; merge it instead.")
        if target == "token_embd.weight":  # its factors lie the other way round; with tied weights llama.cpp aborts
            raise UnsupportedFormat(f"{what} changes the token embedding, which is not supported; merge it instead.")
        other = found.get(f"{target}.{'lora_b' if side == 'lora_a' else 'lora_a'}")
        if other is None:
            raise InvalidModelFile(what, f"'{name}' lacks its counterpart")
        if side == "lora_a":
            yield target, _checked(LoraPair(tensor, other), what)


def _checked(pair: LoraPair, what: str) -> LoraPair:
    a, b = pair.a, pair.b
    if not 2 <= len(a.shape) == len(b.shape) or a.shape[1] != b.shape[0] or a.shape[2:] != b.shape[2:]:
        raise InvalidModelFile(what, f"the shapes of '{a.name}' {a.shape} and '{b.name}' {b.shape} make no pair")
    if not pair.rank <= MAX_RANK:
        raise InvalidModelFile(what, f"'{a.name}' has the rank {pair.rank:,}, more than {MAX_RANK:,}")
    for tensor in (a, b):
        if tensor.type not in _MASKS:
            raise UnsupportedFormat(f"{what}: '{tensor.name}' is of type {tensor.type}; {', '.join(_MASKS)} can be.")
    return pair


def check_fits(adapter: LoraAdapter, base: GgufFile, *, what: str, base_name: str) -> None:
    """Refuse an adapter of another model.

    Raises:
        AdapterMismatch: Another architecture, or a weight that the model lacks or has in another shape.
    """
    if adapter.architecture != base.architecture:
        raise AdapterMismatch(
            what, base_name, f"it is for '{adapter.architecture}', the model is '{base.architecture}'"
        )
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    for name, pair in adapter.pairs.items():
        if name not in shapes:
            raise AdapterMismatch(what, base_name, f"the model has no tensor '{name}'")
        changes = (pair.a.shape[0], *pair.b.shape[1:])
        if changes != shapes[name]:
            raise AdapterMismatch(what, base_name, f"'{name}' is {shapes[name]} in the model, {changes} in the adapter")


def check_finite(adapter: LoraAdapter, *, what: str | None = None) -> None:
    """Read every weight of an adapter and refuse NaN and infinity: they would spoil the answers without a word.

    Raises:
        InvalidModelFile: One is not finite.
    """
    import numpy as np  # here, because who only reads headers is spared it

    data = np.memmap(adapter.file.path, np.uint8, "r")
    for tensor in (side for pair in adapter.pairs.values() for side in (pair.a, pair.b)):
        word, mask = _MASKS[tensor.type]
        raw = data[tensor.offset : tensor.offset + tensor.size_bytes]
        if tensor.type == "Q8_0":  # blocks of a float16 scale and 32 bytes
            raw = np.ascontiguousarray(raw.reshape(math.prod(tensor.shape) // 32, 34)[:, :2])
        if bool(((raw.view(word) & mask) == mask).any()):
            raise InvalidModelFile(what or adapter.file.path.name, f"'{tensor.name}' has values that are not finite")
