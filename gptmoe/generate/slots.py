"""Who holds which slot of the KV cache, how many blocks of it, and what free slots still know.

A slot holds one sequence, contiguously; memory is accounted in blocks of BLOCK tokens. A slot that
is given back keeps its content: that is the prefix cache. A new sequence that begins like the
content of some slot takes that slot over, or has its first blocks copied. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 16
"""Tokens of a block."""


@dataclass(frozen=True, slots=True)
class Content:
    """Tokens whose keys and values are in a slot, made by these weights."""

    tokens: Sequence[int]
    version: int


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `count` tokens' keys and values of one slot, into another."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Trim:
    """Of what is in a slot only the first `count` tokens are still wanted."""

    slot: int
    count: int


@dataclass(frozen=True, slots=True)
class Found:
    """The longest known beginning of a sequence."""

    slot: int = -1
    count: int = 0
    """Tokens: whole blocks."""


NOTHING = Found()


class SlotPool:
    """Slots and blocks of one engine.

    `banks`: slots s and t can be copied into each other if s % banks == t % banks. Invariant: each
    slot is either held or free, and the blocks of held slots and kept contents add up to at most
    the total.
    """

    def __init__(self, slots: int, blocks: int, banks: int = 1) -> None:
        self.blocks = blocks
        self.banks = banks
        self._held = dict[int, int]()
        self._free = set(range(slots))
        self._kept = dict[int, Content]()  # of free slots, the least recently used first
        self._trims = dict[int, int]()

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        """Blocks of held slots."""
        return sum(self._held.values())

    def room(self, lanes: int) -> int:
        """The bank with most free slots, or -1 if none has `lanes` of them."""
        free = [0] * self.banks
        for slot in self._free:
            free[slot % self.banks] += 1
        best = max(range(self.banks), key=lambda bank: (free[bank], -bank))
        return best if free[best] >= lanes else -1

    def could_hold(self, tokens: int, lanes: int = 1) -> bool:
        """Whether so many sequences of that length fit once all contents are dropped."""
        return self.used_blocks + lanes * blocks_of(tokens) <= self.blocks

    def take(self, tokens: int, bank: int, prefer: Found = NOTHING) -> int:
        """Hold a free slot of the bank with room for that many tokens; `could_hold` has said yes.

        `prefer` is a free slot whose beginning is wanted. Else a slot without content goes first,
        then the one used longest ago; low slots first keep the decoding block dense.
        """
        empty = sorted(s for s in self._free - self._kept.keys() if s % self.banks == bank)
        kept = [slot for slot in self._kept if slot % self.banks == bank]
        slot = prefer.slot if prefer.slot in self._free else [*empty, *kept][0]
        self._free.remove(slot)
        self._kept.pop(slot, None)
        self._trims[slot] = prefer.count if slot == prefer.slot else 0
        self._held[slot] = blocks_of(tokens)
        self._make_room()
        return slot

    def grow(self, slot: int, tokens: int) -> bool:
        """Let a held slot have that many tokens; False if there are no blocks for it."""
        wanted = blocks_of(tokens)
        if wanted <= self._held[slot]:
            return True
        if self.used_blocks - self._held[slot] + wanted > self.blocks:
            return False
        self._held[slot] = wanted
        self._make_room()
        return True

    def give_back(self, slot: int, content: Content | None) -> None:
        """Free a held slot, which keeps its content as long as nobody needs the blocks."""
        del self._held[slot]
        self._free.add(slot)
        if content and len(content.tokens) >= BLOCK:
            self._kept[slot] = content
            self._trims[slot] = len(content.tokens)
            self._make_room()
        else:
            self._trims[slot] = 0

    def forget_contents(self) -> None:
        """The cache is gone."""
        self._trims |= dict.fromkeys(self._kept, 0)
        self._kept.clear()

    def trims(self) -> tuple[Trim, ...]:
        """What is not wanted any more, of what was held when this was asked last."""
        found = tuple(Trim(slot, count) for slot, count in sorted(self._trims.items()))
        self._trims.clear()
        return found

    def find(self, tokens: Sequence[int], version: int, bank: int = -1) -> Found:
        """The free slot of the bank (-1: any) whose content begins most like `tokens`."""
        best = Found()
        for slot, content in self._kept.items():
            if content.version == version and bank in (-1, slot % self.banks):
                count = common(content.tokens, tokens)
                if count > best.count:
                    best = Found(slot, count)
        return best

    def _make_room(self) -> None:
        """Drop the contents that were used longest ago until the blocks suffice."""
        kept = sum(blocks_of(len(content.tokens)) for content in self._kept.values())
        spare = self.blocks - self.used_blocks
        for slot in list(self._kept):
            if kept <= spare:
                return
            kept -= blocks_of(len(self._kept.pop(slot).tokens))
            self._trims[slot] = 0


def blocks_of(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK)


def common(known: Sequence[int], wanted: Sequence[int]) -> int:
    """Tokens, in whole blocks, that both begin with."""
    low, high = 0, min(len(known), len(wanted)) // BLOCK
    while low < high:
        middle = (low + high + 1) // 2
        same = list(known[: middle * BLOCK]) == list(wanted[: middle * BLOCK])
        low, high = (middle, high) if same else (low, middle - 1)
    return low * BLOCK
