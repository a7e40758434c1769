"""How often guesses are right. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

NUM_BUCKETS = 7


@dataclass(slots=True)
class Acceptance:
    """The share of right guesses, by how sure each was; old outcomes fade.

    Attributes:
        memory: Outcomes after which one counts a third.
    """

    memory: float
    hits: list[float] = field(default_factory=lambda: [0.0] * NUM_BUCKETS)
    tries: list[float] = field(default_factory=lambda: [0.0] * NUM_BUCKETS)

    def add(self, bucket: int, *, hit: bool) -> None:
        """Learn from one token."""
        fade = 1 - 1 / self.memory
        self.hits[bucket] = self.hits[bucket] * fade + hit
        self.tries[bucket] = self.tries[bucket] * fade + 1

    def rates(self, prior: list[float], *, weight: float) -> list[float]:
        """The share of right guesses in each bucket; `prior` counts as `weight` outcomes."""
        return [(h + weight * p) / (t + weight) for h, t, p in zip(self.hits, self.tries, prior, strict=True)]

    def rate(self, prior: float, *, weight: float) -> float:
        """The share of right guesses in all of them."""
        return (sum(self.hits) + weight * prior) / (sum(self.tries) + weight)

    @property
    def num_tries(self) -> float:
        """Outcomes, the faded ones in part."""
        return sum(self.tries)


def bucket_of_match(matched: int) -> int:
    """By how many tokens a text has in common with the place it is guessed from: 0, 1, 2-3, 4-7, 8-15, 16-31, more."""
    return min(matched.bit_length(), NUM_BUCKETS - 1)


_CONFIDENCES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)


def bucket_of_confidence(confidence: float) -> int:
    """By the probability that a draft model gives its guess."""
    return sum(confidence >= border for border in _CONFIDENCES)
