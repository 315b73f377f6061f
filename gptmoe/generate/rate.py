"""How many tokens a second an engine computes while it works. No clock of its own."""

import math

TAU_S = 10.0
"""Work that is longer ago than this counts little."""

LEAST_S, MOST_S = 0.1, 60.0


class Rate:
    """Tokens a second, smoothed over the last seconds of work."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    @property
    def per_s(self) -> float:
        """0 before anything was computed."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """A step took so long."""
        fades = math.exp(-seconds / TAU_S)
        self._tokens = self._tokens * fades + tokens
        self._seconds = self._seconds * fades + seconds

    def seconds_for(self, tokens: float) -> float:
        """How long so many tokens will take: between a tenth of a second and a minute."""
        if not self.per_s:
            return 1.0
        return min(MOST_S, max(LEAST_S, tokens / self.per_s))
