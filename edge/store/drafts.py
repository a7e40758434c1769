"""Which model guesses for another one: what the operator chose, else what the package names."""

from __future__ import annotations

from dataclasses import dataclass

from edge.errors import EdgeError

from .models import ModelStore, StoredModel


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """The draft model of a model.

    Attributes:
        name: As it was named.
        model: None where there is none to be had.
        problem: Why not.
    """

    name: str
    model: StoredModel | None
    problem: str = ""


def draft_for(model: StoredModel, store: ModelStore) -> DraftChoice | None:
    """The draft model of a model; None where it shall have none. Reads the store."""
    name = store.drafts().get(str(model.ref), model.details.draft or "")
    if not name:
        return None
    try:
        draft = store.get(name)
    except EdgeError as e:
        return DraftChoice(name, None, e.message)
    if draft.kind != "text":
        return DraftChoice(name, None, f"'{draft.ref}' makes no text")
    return DraftChoice(str(draft.ref), draft)
