"""What an executor holds of each version of the weights, while threads add some and drop others."""

from collections.abc import Mapping, Set
from threading import Lock
from typing import Generic, TypeVar

M = TypeVar("M")


class Versions(Generic[M]):
    """By version. `held` is never changed, but replaced: whoever has read it goes on with it."""

    def __init__(self) -> None:
        self.held: Mapping[int, M] = {}
        self._lock = Lock()

    def add(self, version: int, one: M) -> None:
        """Beside those that are here."""
        with self._lock:
            self.held = {**self.held, version: one}

    def keep(self, versions: Set[int]) -> None:
        """Drop the others, but for newer ones, which may not be asked for yet."""
        newest = max(versions)
        with self._lock:
            self.held = {v: one for v, one in self.held.items() if v in versions or v > newest}
