"""How much a key may still use. Pure: seconds come in from outside."""

from __future__ import annotations

from collections import deque

WINDOW_S = 60.0
DAY_S = 86_400.0


class RequestWindow:
    """At most `limit` requests in any minute."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._times: deque[float] = deque()

    def take(self, now_s: float, *, spared: int = 0) -> float | None:
        """Count a request; the seconds to wait where there is no room for one, which is then not counted.

        Args:
            spared: Room that is left for others.
        """
        if (lacking := 1 + min(spared, self.limit - 1) - self.left(now_s)) > 0:
            return min(max(0.0, self._times[lacking - 1] + WINDOW_S - now_s), WINDOW_S)
        self._times.append(now_s)
        return None

    def left(self, now_s: float) -> int:
        """Requests that could come now."""
        while self._times and self._times[0] + WINDOW_S <= now_s:
            self._times.popleft()
        return self.limit - len(self._times)

    def reset_s(self, now_s: float) -> float:
        """Until all of them could come."""
        return max(0.0, self._times[-1] + WINDOW_S - now_s) if self._times else 0.0


class TokenDay:
    """At most `limit` tokens in 24 hours, which begin with the first request.

    A request's tokens are known when it ends. Until then it holds what it may take, and others beside it are let in as
    far as that leaves room; the first is, while any are left. So a day has at most one request too much, and that
    counts against nobody's next day. The 24 hours are those that the device ran, or those that its clock saw pass,
    whichever are more: a board that boots in 1970 locks nobody out for ever.

    Args:
        used_tokens: Of the day that is under way.
        elapsed_s: Of that day, so far.
    """

    def __init__(self, limit: int, *, now_s: float, used_tokens: int = 0, elapsed_s: float = 0.0) -> None:
        self.limit = limit
        self._used = used_tokens
        self._began_s = now_s - elapsed_s
        self._held = 0

    def hold(self, tokens: int, own: int, now_s: float) -> bool:
        """Set aside what a request may take, beside its `own` that it holds already; False if others hold too much."""
        others = self._held - own
        if others and self._held + tokens > self.left(now_s):
            return False
        self._held += tokens
        return True

    def release(self, tokens: int) -> None:
        """Give back what a request held."""
        self._held -= tokens

    def left(self, now_s: float) -> int:
        """Tokens that are left of this day."""
        self._turn(now_s)
        return max(0, self.limit - self._used)

    def take(self, tokens: int, now_s: float) -> None:
        """Count what a request took."""
        self._turn(now_s)
        self._used += tokens

    def reset_s(self, now_s: float) -> float:
        """Until the next day begins."""
        return max(0.0, self._began_s + DAY_S - now_s) if self._used else 0.0

    def state(self, now_s: float) -> tuple[int, float]:
        """Used tokens and elapsed seconds, to go on from."""
        self._turn(now_s)
        return self._used, now_s - self._began_s

    def _turn(self, now_s: float) -> None:
        if not self._used or now_s - self._began_s >= DAY_S:
            self._used, self._began_s = 0, now_s
