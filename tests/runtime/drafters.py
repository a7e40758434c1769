"""Draft models whose guesses and costs are scripted."""

from __future__ import annotations

from typing_extensions import override

from runtime.backends.base import Capabilities
from runtime.drafter import ModelDrafter
from runtime.request import TokenId
from runtime.states import StateLimits
from tests.support import ScriptedBackend


class NearlyBackend(ScriptedBackend):
    """Says what the model says, but for every so many texts something else."""

    def __init__(self, capabilities: Capabilities, *, errs_each: int) -> None:
        super().__init__(capabilities)
        self._errs_each = errs_each

    @override
    def next_token(self, cells: list[TokenId]) -> TokenId:
        token = super().next_token(cells)
        return (token + 1) % 97 if (sum(cells) + len(cells)) % self._errs_each == 0 else token


def scripted_drafter(model: Capabilities, *, errs_each: int = 5, share: float = 0.1) -> ModelDrafter:
    """A draft model for a `ScriptedBackend` of these capabilities, `share` of whose time it takes.

    It sees 128 tokens of a text: longer ones it guesses wrong, for its script depends on all of them.
    """
    can = Capabilities(4, 512, model.context_tokens, 16, StateLimits(partial_reuse=True))
    backend = NearlyBackend(can, errs_each=errs_each)
    return ModelDrafter(backend, vocab_size=97, relative_cost=share, clock=lambda: share * backend.clock())
