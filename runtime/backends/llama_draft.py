"""A second, smaller model in the same process, which guesses for the first."""

from __future__ import annotations

from pathlib import Path

from edge.errors import UnsupportedFormat
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.drafter import MAX_WINDOW, ModelDrafter
from runtime.speculate import MOST_SEQUENCES

STEP_TOKENS = 64
"""Tokens of a text that it reads at once: more need a larger compute buffer and are hardly faster."""


def open_drafter(path: Path, model: LlamaBackend, *, threads: int, available_bytes: int) -> ModelDrafter:
    """Open a draft model for another one.

    Raises:
        InvalidModelFile: The library refuses the file.
        DoesNotFit: Weights and cells need more memory than `available_bytes`.
        UnsupportedFormat: It has another vocabulary, or cannot take tokens back.
        BackendError: The context cannot be made.
    """
    cells = MOST_SEQUENCES * MAX_WINDOW
    options = LlamaOptions(threads, MOST_SEQUENCES, STEP_TOKENS, cells, available_bytes)
    backend = LlamaBackend(path, options)
    try:
        if (why := model.tokenizer.difference(backend.tokenizer)) is not None:
            raise UnsupportedFormat(f"Its vocabulary is not that of the model: {why}.")
        if not backend.capabilities.states.partial_reuse:
            raise UnsupportedFormat("It is a recurrent model, which cannot take a guess back.")
        sizes = backend.facts.size_bytes, model.facts.size_bytes
        model.share_memory_with(backend)
        return ModelDrafter(backend, vocab_size=model.tokenizer.vocab_size, relative_cost=sizes[0] / sizes[1])
    except BaseException:
        backend.close()
        raise
