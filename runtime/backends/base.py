"""What computes: the seam between the engine and an inference library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError
from runtime.batch import Batch
from runtime.images import Tile
from runtime.request import Adapter, TokenId
from runtime.states import NO_STATES, StateId, StateLimits
from runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can hold and do; the scheduler plans within it.

    Attributes:
        num_slots: Sequences it computes at once.
        num_cells: KV cells that the slots share.
        context_tokens: Longest single sequence.
        max_step_tokens: Most tokens of one decode.
        states: What saved states may take outside the cache, and whether cells can be cut and shared at any length.
        adapter_bytes: What loaded adapters may take together; 0 where it can load none.
    """

    num_slots: int
    num_cells: int
    context_tokens: int
    max_step_tokens: int
    states: StateLimits = NO_STATES
    adapter_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a loaded model says of itself."""

    description: str
    architecture: str
    num_parameters: int
    size_bytes: int
    vocab_size: int
    trained_context_tokens: int
    chat_template: str | None
    bos: str
    eos: str
    control_texts: Sequence[str]
    """Texts of the control tokens."""


class StateRefused(BackendError):
    """The library does not take a saved state back."""

    def __init__(self, state: StateId) -> None:
        super().__init__(f"The saved state {state} cannot be put back.")
        self.state = state


class Vision(Protocol):
    """The encoder of images that a model came with."""

    def read(self, data: bytes) -> list[list[TokenId] | Tile]:
        """What stands for an image in a prompt: tokens of the model, and tiles. Any thread.

        Raises:
            InvalidImage: The file cannot be decoded.
        """
        ...

    def encode(self, tile: Tile) -> None:
        """Set a tile's rows. The backend's thread.

        Raises:
            BackendError: The encoder failed; nothing else did.
        """
        ...


class Backend(Protocol):
    """One loaded model. All methods belong to one thread, but for `tokenizer`, which any may use."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def vision(self) -> Vision | None:
        """What encodes images; None where the model has nothing for that."""
        ...

    def load_adapter(self, adapter: Adapter) -> None:
        """Load an adapter, so that steps may name it.

        Raises:
            InvalidModelFile: The library refuses the file.
        """
        ...

    def free_adapter(self, digest: str) -> None:
        """Give a loaded adapter's memory back; no step names it any more."""
        ...

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Run one step: the cache changes in order, then the chunks, where there are any, with the batch's adapters,
        which are loaded. Tiles in the chunks are encoded.

        Returns:
            Scores after the tokens whose scores are wanted, in order, shape ``(num_logits, vocab)``. Valid until the
            next call, and the caller's to write into.

        Raises:
            StateRefused: A saved state cannot be put back; as with any other error.
            BackendError: The step failed; the cache is then undefined and must be cleared.
        """
        ...

    def state(self, state: StateId) -> memoryview:
        """The bytes of a saved state; they never change, and stay valid while they are referred to."""
        ...

    def take_unsaved(self) -> list[StateId]:
        """States that the last steps were to save and did not, since memory lacks."""
        ...

    def has_room(self, size_bytes: int) -> bool:
        """Whether memory suffices for a state of so many bytes."""
        ...

    def put_state(self, state: StateId, data: memoryview) -> None:
        """Take back the bytes of a state that this backend, of this build with this model, has saved."""
        ...

    def settle(self) -> Iterator[object]:
        """Work that makes later steps faster, a few milliseconds at a time; stops of itself when done."""
        ...

    def set_threads(self, threads: int) -> None:
        """Use this many threads from the next step on."""
        ...

    def clear(self) -> None:
        """Empty the cache, and forget the saved states."""
        ...

    def close(self) -> None:
        """Free everything. Further calls do nothing."""
        ...
