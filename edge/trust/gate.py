"""The gate before a worker: what is loaded was judged, and under `enforce` its bytes were read just before."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edge.config import Settings
from edge.errors import DigestMismatch
from edge.store.digest import Digest, digest_file
from edge.store.files import translated
from edge.store.models import ModelStore, StoredFile, StoredModel

from .keys import TrustFiles, stamp_of
from .policy import Verdict, admit, confirm

_MAX_REMEMBERED = 1000
_RETRY_S = 60.0
_K = TypeVar("_K")
_V = TypeVar("_V")


class LoadGate:
    """Judges what is about to be loaded; one for all models, safe in threads. What it found is remembered until the
    store, what is trusted, or the file changes."""

    def __init__(self, store: ModelStore, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._settings, self._clock = store, settings, clock
        self._trust = TrustFiles.of(settings)
        self._verdicts: dict[tuple[Digest, str], tuple[object, Verdict]] = {}
        self._read: dict[tuple[Path, Digest], object] = {}
        self._confirm_at: dict[Digest, float] = {}  # when to try again; infinity once it is done

    def check(self, model: StoredModel) -> Verdict:
        """Let a model pass, or an adapter. Blocks: call it from a thread.

        Raises:
            Untrusted: The policy is `enforce`, and the model is not trusted.
            DigestMismatch: The policy is `enforce`, and a file is not the one of the manifest.
            ConfigError, StoreError: The policy is `enforce`, and something cannot be read.
        """
        self._confirm_at.pop(model.digest, None)
        verdict = self._judged(model)
        if self._settings.trust == "enforce":
            for file in model.files:
                self._check_bytes(file, model)
        return verdict

    def _judged(self, model: StoredModel) -> Verdict:
        key = model.digest, str(model.ref)
        stamp = self._trust.stamp(), stamp_of(self._store.root / "index.json")
        known = self._verdicts.get(key)
        if known is not None and known[0] == stamp:
            return known[1]
        verdict = admit(self._store, model.digest, model.ref, self._settings)
        _remember(self._verdicts, key, (stamp, verdict))
        return verdict

    def _check_bytes(self, file: StoredFile, model: StoredModel) -> None:
        key, stamp = (file.path, file.digest), stamp_of(file.path)
        if stamp is not None and self._read.get(key) == stamp:
            return
        with translated(file.path, "Reading"):
            actual = digest_file(file.path)
        if actual != file.digest:
            raise DigestMismatch(
                f"The file {file.name} of {model.ref} is not the one of its manifest",
                expected=file.digest, actual=actual, hint=f"See what else is damaged: edge verify {model.ref}.",
            )  # fmt: skip
        _remember(self._read, key, stamp)

    def is_confirmed(self, model: StoredModel) -> bool:
        """Whether `confirm` has nothing to do, or nothing yet because it just failed. Looks at no file."""
        return self._settings.trust == "off" or self._clock() < self._confirm_at.get(model.digest, -math.inf)

    def confirm(self, model: StoredModel) -> None:
        """A model serves, outside of any trial: older releases of its name are refused from now on. Blocks; each time
        that the model is loaded, once.

        Raises:
            ConfigError, StoreError: What is trusted cannot be read or written.
        """
        self._confirm_at[model.digest] = self._clock() + _RETRY_S
        confirm(self._store, model.digest, self._settings)
        self._confirm_at[model.digest] = math.inf


def _remember(memory: dict[_K, _V], key: _K, value: _V) -> None:
    if len(memory) >= _MAX_REMEMBERED:
        memory.clear()
    memory[key] = value
