"""Which pages of the KV cache hold the tokens of each slot. Pure: no torch.

    table.begin(plan.copies, plan.trims, plan.spans)  -> pages to copy, before the step
    table.pages(slot)                                 -> where its tokens are, in order

Sequences that begin alike share whole pages, which nobody writes any more; of a page that is not
whole each has its own. Page 0 belongs to nobody: padding writes there.
"""

from collections.abc import Iterable, Sequence

from gptmoe.generate.plan import SlotCopy, SlotSpan, SlotTrim
from gptmoe.generate.slots import BLOCK, blocks_of

NOWHERE = 0
"""The page for what nobody reads."""


class PageTable:
    """Pages of `blocks` blocks and of what copies may need on their way.

    The scheduler's account (slots.py) counts a shared block once for each slot that has it, so what
    it lets in always fits. Invariant: a page is free, or held by as many slots as it counts.
    """

    def __init__(self, slots: int, blocks: int) -> None:
        self.num_pages = 1 + blocks + slots
        """With one more for each slot: copies take pages before trims give theirs back."""
        self._free = list(range(self.num_pages - 1, NOWHERE, -1))
        self._holders = [0] * self.num_pages
        self._pages: list[list[int]] = [[] for _ in range(slots)]

    def pages(self, slot: int) -> Sequence[int]:
        """The pages of a slot, BLOCK tokens each."""
        return self._pages[slot]

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def begin(
        self, copies: Iterable[SlotCopy], trims: Iterable[SlotTrim], spans: Iterable[SlotSpan]
    ) -> list[tuple[int, int]]:
        """Make room for a step: (from, to) of pages to copy the content of, in this order."""
        moved: list[tuple[int, int]] = []
        for copy in copies:
            moved += self._branch(copy)
        for trim in trims:
            self._shorten(trim.slot, blocks_of(trim.count))
        for span in spans:
            self._extend(span.slot, span.start, span.start + span.count)
        return moved

    def _branch(self, copy: SlotCopy) -> list[tuple[int, int]]:
        """The target holds the source's first tokens: whole pages are shared."""
        whole, rest = divmod(copy.count, BLOCK)
        kept = self._pages[copy.source][: blocks_of(copy.count)]
        for page in kept[:whole]:
            self._holders[page] += 1
        self._shorten(copy.target, 0)
        self._pages[copy.target] = kept[:whole]
        return [(kept[whole], self._take(copy.target))] if rest else []

    def _extend(self, slot: int, start: int, end: int) -> None:
        """Room for tokens start .. end - 1 behind those that are there, in pages of its own."""
        self._shorten(slot, blocks_of(start))
        held = self._pages[slot]
        assert not start % BLOCK or self._holders[held[-1]] == 1
        while len(held) < blocks_of(end):
            self._take(slot)

    def _shorten(self, slot: int, count: int) -> None:
        held = self._pages[slot]
        while len(held) > count:
            page = held.pop()
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def _take(self, slot: int) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        self._pages[slot].append(page)
        return page
