"""What a request means by its model's name and its adapters. Reads the store: call it from a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge.errors import AdapterMismatch, EdgeError, InvalidRequest, ModelNotFound
from edge.formats.gguf import read_gguf
from edge.formats.lora import check_fits, read_lora
from edge.store.digest import Digest
from edge.store.models import ModelStore, StoredModel
from runtime.adapters import adapter_set
from runtime.request import Adapter, AdapterSet

SEPARATOR = "+"
"""Between a model and its adapters in one name; no part of either (see `ModelRef`)."""
MAX_VERDICTS = 1000


@dataclass(frozen=True, slots=True)
class Selection:
    """A model and the adapters to answer with."""

    model: str
    """The model's name, as it can be looked up."""
    adapters: AdapterSet = ()
    name: str = ""
    """Of both together, as a request can name them."""
    digest: Digest | None = None
    """Of the version that the adapters were held against, where the name is that of a slot."""


def short_name(adapter: StoredModel) -> str:
    """An adapter's name as people type it."""
    return str(adapter.ref).removesuffix(":latest")


def combined_name(model: StoredModel, adapters: Sequence[StoredModel]) -> str:
    """The name under which a model with adapters can be asked."""
    return SEPARATOR.join([str(model.ref), *map(short_name, adapters)])


class Selector:
    """Finds adapters in the store and knows which models they fit.

    Args:
        check: Looks at an adapter before it is used, and raises to refuse it.
    """

    def __init__(self, store: ModelStore, *, check: Callable[[StoredModel], object] = lambda _: None) -> None:
        self._store, self._check_trust = store, check
        self._verdicts: dict[tuple[str, str], str | None] = {}
        """Of an adapter's and a model's digest: why they do not go together, or None."""

    def select(self, name: str, asked: Sequence[tuple[str, float]], *, serving: StoredModel | None = None) -> Selection:
        """The model that `name` begins with, and the adapters it goes on with, after those that are `asked`.

        Args:
            asked: Names of adapters, with their scales.
            serving: What the name means, where it is that of a slot.

        Raises:
            ModelNotFound: The model or an adapter is not in the store.
            InvalidRequest: One is no adapter, stands there twice, or is for another model.
        """
        base, *named = name.split(SEPARATOR)
        wanted = [(self._adapter(n), scale) for n, scale in [*asked, *((n, 1.0) for n in named)]]
        model = serving or self._store.get(base)
        for adapter, _ in wanted:
            self._check(adapter, model)
        full = combined_name(model, [adapter for adapter, _ in wanted])
        adapters = adapter_set(_resident(a, scale) for a, scale in wanted)
        return Selection(base, adapters, full, serving.digest) if serving else Selection(str(model.ref), adapters, full)

    def combinations(self, models: Sequence[StoredModel]) -> list[tuple[StoredModel, StoredModel]]:
        """Each model with each adapter that fits it."""
        bases = [m for m in models if not m.is_adapter]
        return [(base, a) for base in bases for a in models if a.is_adapter and self._fits(a, base)]

    def _adapter(self, name: str) -> StoredModel:
        try:
            found = self._store.get(name)
        except ModelNotFound as e:
            known = ", ".join(short_name(m) for m in self._store.list() if m.is_adapter) or "none yet"
            hint = f"Adapters here: {known}. Get one with: edge pull ./adapter.gguf --name NAME."
            raise ModelNotFound(name, message=f"There is no adapter '{name[:200]}' in the store.", hint=hint) from e
        if not found.is_adapter:
            raise InvalidRequest(f"'{found.ref}' is a model and no adapter.", field="lora")
        self._check_trust(found)
        return found

    def _check(self, adapter: StoredModel, model: StoredModel) -> None:
        key = str(adapter.digest), str(model.digest)
        if key not in self._verdicts:
            if len(self._verdicts) >= MAX_VERDICTS:
                self._verdicts.clear()
            self._verdicts[key] = _verdict(adapter, model)
        if (reason := self._verdicts[key]) is not None:
            raise AdapterMismatch(short_name(adapter), str(model.ref), reason)

    def _fits(self, adapter: StoredModel, model: StoredModel) -> bool:
        try:
            self._check(adapter, model)
        except EdgeError:
            return False
        return True


def _verdict(adapter: StoredModel, model: StoredModel) -> str | None:
    if model.is_adapter:
        return "it is an adapter, too"
    name = short_name(adapter)
    lora = read_lora(read_gguf(adapter.weights, what=name), what=name)
    try:
        check_fits(lora, read_gguf(model.weights, what=str(model.ref)), what=name, base_name=str(model.ref))
    except AdapterMismatch as e:
        return e.reason
    return None


def _resident(adapter: StoredModel, scale: float) -> Adapter:
    file = next(file for file in adapter.files if file.path == adapter.weights)
    return Adapter(str(file.digest), scale, str(file.path), file.size_bytes)


def refuse_adapter(model: StoredModel, store: ModelStore) -> None:
    """An adapter cannot be asked by itself.

    Raises:
        InvalidRequest: It is one.
    """
    if not model.is_adapter:
        return
    fitting = [m for m in store.list() if not m.is_adapter and m.architecture == model.architecture]
    base = str(fitting[0].ref) if fitting else "MODEL"
    raise InvalidRequest(
        f"'{model.ref}' is a LoRA adapter: it changes a model and cannot answer by itself.",
        field="model",
        hint=f"Ask for a model with it, as in {base}{SEPARATOR}{short_name(model)}.",
    )
