"""The seam through which texts are judged: what a classifier gives, and how the configured one is found.

A classifier is a package of its own, installed beside the appliance, that names a function in the entry point group
``slm_edge.moderation``; the setting `moderation` says which. The function is called once, with no arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from edge.errors import ModerationUnavailable

GROUP = "slm_edge.moderation"
Category = Literal[
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
]  # fmt: skip
"""OpenAI's."""
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a classifier thinks of one text.

    Attributes:
        scores: 0 to 1, of the categories that it knows; the others are told as not looked at.
        flagged: Those that it holds the text to be of.
    """

    scores: Mapping[Category, float]
    flagged: frozenset[Category] = frozenset()


class Classifier(Protocol):
    """Judges texts, on any thread, several calls at once."""

    @property
    def name(self) -> str:
        """What answers call it."""
        ...

    def judge(self, texts: Sequence[str]) -> Sequence[Judgement]:
        """One judgement for each text, in order. What it raises fails the request: no text passes unjudged."""
        ...


def load_classifier(name: str) -> Classifier:
    """The classifier that the settings name.

    Raises:
        ModerationUnavailable: They name none, or none that is installed and can be loaded.
    """
    if not name:
        raise ModerationUnavailable(
            "No classifier is configured, so no text is judged here.",
            hint=f"Install one (entry point group {GROUP}), and name it in the setting 'moderation'.",
        )
    import importlib.metadata  # most appliances judge nothing

    found = [*importlib.metadata.entry_points(group=GROUP, name=name)]
    if not found:
        raise ModerationUnavailable(
            f"No classifier {name!r} is installed.", hint=f"One names itself in the group {GROUP}."
        )
    try:
        classifier: Classifier = found[0].load()()
    except Exception as e:  # whatever somebody else's code raises
        raise ModerationUnavailable(f"The classifier {name!r} cannot be loaded: {type(e).__name__}: {e}.") from e
    return classifier
