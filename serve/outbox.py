"""Where a caller, in its event loop, waits for what the engine's thread says to it."""

import asyncio
import contextlib
from dataclasses import dataclass, field

from gptmoe.errors import GptMoeError
from gptmoe.generate.delta import Delta, merge


@dataclass(frozen=True, slots=True)
class Outbox:
    """Where one caller waits for its deltas, or for the error that ends them."""

    loop: asyncio.AbstractEventLoop
    unfinished: set[int]
    """Indices of its answers; the engine's thread keeps them."""
    items: asyncio.Queue[Delta | GptMoeError] = field(default_factory=asyncio.Queue)
    complete: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing comes behind what is there."""

    def taken(self, first: Delta | GptMoeError) -> list[Delta | GptMoeError]:
        """All that is there: one delta for each answer, then an error if there is one."""
        by_index: dict[int, list[Delta]] = {}
        item: Delta | GptMoeError = first
        while isinstance(item, Delta):
            by_index.setdefault(item.index, []).append(item)
            if self.items.empty():
                break
            item = self.items.get_nowait()
        deltas = [merge(deltas) for _, deltas in sorted(by_index.items())]
        return [*deltas, item] if isinstance(item, GptMoeError) else [*deltas]

    async def completed(self, within_s: float) -> None:
        """Come back when it is complete, or in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.complete.wait()

    def put(self, item: Delta | GptMoeError) -> None:
        """Called by the engine's thread."""
        last = isinstance(item, GptMoeError) or not self.unfinished
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._receive, item, last)

    def _receive(self, item: Delta | GptMoeError, last: bool) -> None:
        self.items.put_nowait(item)
        if last:
            self.complete.set()
