"""How many prompt tokens a step has beside decoding sequences. Pure."""

from __future__ import annotations

from collections.abc import Callable

from runtime.batch import TILE_TOKENS
from runtime.step_cost import StepCosts

MIN_PROMPT_TOKENS = 16
"""A step has at least so many, however slow the machine: prompts go on."""
PLAIN_STEPS = 8
"""Without a target, a step may last as long as so many without prompt tokens, or `DEFAULT_INTERVAL_S`: a small chunk
gives the weights' reading away, which is what a plain step mostly is (Agrawal et al. 2024, "Sarathi-Serve",
arXiv:2403.02310, picks chunks the same way)."""
DEFAULT_INTERVAL_S = 0.2
"""Five tokens a second are about as fast as people read."""
HEAD_START_S = 1.0
"""How much later than that an answer may be."""
MAX_PAUSE_S = 1.0
"""How much longer a step may last than `DEFAULT_INTERVAL_S`, where no reader would catch up with an answer meanwhile.
Few long steps beat many short ones: prompts are read in larger chunks, and who shares the machine goes on together
(four chats, without the limit: 15 % less time)."""


WORTHWHILE_TOKENS = 4 * TILE_TOKENS
"""Rather than fewer of a prompt's tokens at each step, steps without any come between, in which the answers get ahead
of their readers. Attention without whole tiles makes a token up to 50 % dearer."""
MAX_WAITS = 8
"""Then so many steps without come between at most."""


def ahead_s(num_output: int, since_first_s: float) -> float:
    """How long an answer may pause before a reader has caught up with it, who began at its first token."""
    return HEAD_START_S + num_output * DEFAULT_INTERVAL_S - since_first_s


class BudgetTuner:
    """Chooses the chunk of prompts with which a step keeps to the target interval between tokens.

    Args:
        interval_s: Longest wanted time between two tokens of a decoding sequence; 0 chooses from the plain step.
        ahead_s: Of the answer that is least ahead of its reader.
    """

    def __init__(
        self, costs: StepCosts, *, interval_s: float = 0.0, ahead_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._costs = costs
        self._interval_s = interval_s
        self.threads = 0
        self._ahead_s = ahead_s
        self._waits = 0
        self._fitted = -1
        """What fitted at the last step that was waited; it is to have grown since."""

    def prompt_tokens(self, num_decoding: int, room: int) -> int:
        """Prompt tokens, at most `room`, for a step that has `num_decoding` tokens of decoding sequences; 0 where a
        later step does better, which is said `MAX_WAITS` times in a row at most.

        Where nobody decodes, or nothing is known yet, all there is room for.
        """
        plain = self._costs.predict(num_decoding, threads=self.threads) if num_decoding else None
        if plain is None:
            return room
        tokens = self._fitting(num_decoding, room, self._interval_s or max(PLAIN_STEPS * plain, self._longest_s()))
        if self._fitted < tokens < min(room, WORTHWHILE_TOKENS) and self._waits < MAX_WAITS and self._gets_ahead(plain):
            self._waits, self._fitted = self._waits + 1, tokens
            return 0
        self._waits, self._fitted = 0, -1
        return room if tokens >= room else min(room, _whole_tiles(tokens))

    def _gets_ahead(self, plain_s: float) -> bool:
        """Whether answers get clearly ahead of their readers in steps without prompts, and that lets a later one last
        longer."""
        return not self._interval_s and plain_s < DEFAULT_INTERVAL_S / 2

    def _fitting(self, num_decoding: int, room: int, target_s: float) -> int:
        """The most prompt tokens with which a step takes no longer; `MIN_PROMPT_TOKENS` in any case."""
        low, high = min(MIN_PROMPT_TOKENS, room), room
        while low < high:
            middle = (low + high + 1) // 2
            seconds = self._costs.predict(num_decoding + middle, threads=self.threads)
            if seconds is not None and seconds <= target_s:
                low = middle
            else:
                high = middle - 1
        return low

    def _longest_s(self) -> float:
        """What a step may last without that a reader catches up, and `MAX_PAUSE_S` more than the interval at most."""
        return min(max(DEFAULT_INTERVAL_S, self._ahead_s()), DEFAULT_INTERVAL_S + MAX_PAUSE_S)


def _whole_tiles(num_tokens: int) -> int:
    """Nearly as many, so that attention computes no tile that is half empty: after 1,000 tokens one of 70 costs 14 %
    more than one of 128, and one of 63, without tiles, 39 %."""
    if num_tokens < TILE_TOKENS * 3 // 4:
        return num_tokens
    return max(1, num_tokens // TILE_TOKENS) * TILE_TOKENS
