"""Continuous batching as decisions over plain data: who runs, who waits, who is put off.

    scheduler.add(entry)
    plan = scheduler.plan()      # admits, puts off, copies, shares out the token budget
    ...                          # the plan is computed
    scheduler.computed(plan)     # then tokens are appended to the lanes
    scheduler.remove(entry)

Order is by `rank`, the lowest first: arrival, moved by priority. Nobody is passed over: if the
first in line finds no room, those behind it wait too. If running sequences need more blocks than
there are, the last in line is put off: its blocks are given back and it is computed again later.
No torch, no clock.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gptmoe.errors import ConfigError

from .plan import Progress, StepPlan, plan_step
from .slots import NOTHING, Content, Copy, Found, SlotPool, blocks_of, common

SCORED_CHUNK = 64
"""Tokens of a step whose scores over the whole vocabulary are wanted, for one sequence at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Bounds of one engine."""

    max_batch_size: int = 16
    """Sequences that run at once; each has one slot of the KV cache."""
    max_queue: int = 64
    """Requests that may wait for a slot; one more is refused."""
    max_queue_tokens: int = 131072
    """Tokens, of prompts and to be generated, that waiting requests may add up to."""
    token_budget: int = 512
    """Tokens of one step: decoding sequences first, then chunks of prompts. At least
    max_batch_size, so that a prompt gets on in every step, however many sequences decode."""
    kv_tokens: int = 0
    """Tokens that the KV cache holds, in blocks of 16; 0: as many as all sequences can have."""
    prefix_cache: bool = True
    """Begin with what other requests have computed of the same prompt."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_batch_size", 1),
            ("max_queue", 0),
            ("max_queue_tokens", 1),
            ("kv_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"engine.{name}={getattr(self, name)} must be at least {least}")
        if self.token_budget < self.max_batch_size:
            raise ConfigError(
                f"engine.token_budget={self.token_budget} must be at least "
                f"engine.max_batch_size={self.max_batch_size}: every sequence runs a token a step"
            )

    def blocks(self, max_seq_len: int) -> int:
        """Of the KV cache. Raises ConfigError if one sequence of full length does not fit."""
        if not self.kv_tokens:
            return self.max_batch_size * blocks_of(max_seq_len)
        if self.kv_tokens < max_seq_len:
            raise ConfigError(
                f"engine.kv_tokens={self.kv_tokens} must be at least the context of {max_seq_len} "
                "tokens, or 0"
            )
        return blocks_of(self.kv_tokens)


@dataclass(slots=True, eq=False)
class Lane:
    """One sequence: its tokens so far, and how many of them are in a slot of the cache."""

    key: str
    tokens: list[int]
    score_from: int = 0
    """Tokens from this place on are still to be scored; 0: none."""
    slot: int = -1
    computed: int = 0
    idle: bool = False
    """It has a slot and nothing to do yet: it will branch off another lane."""
    branch: Copy | None = None
    """To be copied before the next step."""


@dataclass(slots=True, eq=False)
class Entry:
    """A request: one lane, or several that share a prompt (answers, beams) and one bank."""

    rank: tuple[float, int]
    """Lower goes first."""
    lanes: list[Lane]
    version: int = -1
    """Of the weights it runs on, from when it is admitted first, put off or not; -1: not yet."""
    cached: int = 0
    """Tokens of its prompt that were found in the cache when it was last admitted."""
    live: list[Lane] = field(default_factory=list)
    """Lanes with a slot."""

    @property
    def length(self) -> int:
        """Of its longest lane."""
        return max(len(lane.tokens) for lane in self.lanes)


class Scheduler:
    """The engine's account of slots, blocks and order. Invariant: see SlotPool."""

    def __init__(self, config: EngineConfig, max_seq_len: int, banks: int = 1) -> None:
        self.config, self.max_seq_len = config, max_seq_len
        self.pool = SlotPool(config.max_batch_size, config.blocks(max_seq_len), banks)
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.version = 0
        """Of the weights that entries get when they are admitted first."""
        self.prefix_queries = self.prefix_hits = self.preemptions = 0
        self._last_version = 0

    def most_lanes(self) -> int:
        """Lanes that an entry may have."""
        return max(1, self.config.max_batch_size // self.pool.banks)

    def add(self, entry: Entry) -> None:
        """Put an entry in line."""
        insort(self.waiting, entry, key=lambda other: other.rank)

    def remove(self, entry: Entry, *, damaged: bool = False) -> None:
        """Forget an entry wherever it is; what it computed stays in the prefix cache, if sound."""
        if entry in self.waiting:
            self.waiting.remove(entry)
            return
        for lane in list(entry.live):
            self.end(entry, lane, damaged=damaged)

    def end(self, entry: Entry, lane: Lane, *, damaged: bool = False) -> None:
        """Free a lane's slot; with the last lane the entry is gone."""
        content = None
        if self.config.prefix_cache and not (lane.branch or lane.idle or damaged):
            content = Content(lane.tokens[: lane.computed], entry.version)
        self.pool.give_back(lane.slot, content)
        lane.slot, lane.branch = -1, None
        entry.live.remove(lane)
        if not entry.live:
            self.running.remove(entry)

    def plan(self) -> StepPlan:
        """The next step. Versions of weights that are in use take turns."""
        self._make_room()
        copies = [lane.branch for entry in self.running for lane in entry.live if lane.branch]
        copies += self._admit()
        version = self._next_version()
        turn = [
            _progress(lane)
            for entry in self.running
            if entry.version == version
            for lane in entry.live
            if not lane.idle
        ]
        plan = plan_step(turn, self.config.token_budget, version, tuple(copies))
        if plan.spans:
            targets = {copy.target for copy in copies}
            trims = [trim for trim in self.pool.trims() if trim.slot not in targets]
            plan = replace(plan, trims=tuple(trims))
            for entry in self.running:
                for lane in entry.live:
                    lane.branch = None
        return plan

    def computed(self, plan: StepPlan) -> None:
        """The step was run."""
        count = {span.key: span.count for span in plan.spans}
        for entry in self.running:
            for lane in entry.live:
                lane.computed += count.get(lane.key, 0)

    def branch(self, entry: Entry, parents: Sequence[Lane]) -> None:
        """Each live lane goes on as its parent, by place: tokens now, the cache in the next step.

        A lane that is its own parent stays where it is; each parent must have one such.
        """
        old = {id(lane): (list(lane.tokens), lane.computed, lane.slot) for lane in parents}
        for lane, parent in zip(entry.live, parents, strict=True):
            if lane is not parent:
                tokens, lane.computed, source = old[id(parent)]
                lane.tokens[:] = tokens
                lane.branch = Copy(source, lane.slot, lane.computed)
                lane.idle = False

    def compute_again(self) -> None:
        """The cache is gone, or what it holds is of no use: all go on with the newest weights.

        Running lanes begin anew; those put off do so anyway when they are admitted again.
        """
        self.pool.forget_contents()
        for entry in self._begun():
            entry.version = self.version
        for entry in self.running:
            for lane in entry.live:
                lane.computed, lane.branch = 0, None

    def versions(self) -> set[int]:
        """Of the weights that somebody needs."""
        return {self.version, *(entry.version for entry in self._begun())}

    def _begun(self) -> list[Entry]:
        """Entries that have weights: running ones, and those put off."""
        return [*self.running, *(entry for entry in self.waiting if entry.version >= 0)]

    def _make_room(self) -> None:
        """Blocks for the tokens of the next step, first come first served; else put off the last.

        Lanes that compute their prompt have had their blocks since they were admitted.
        """
        for entry in list(self.running):
            while entry in self.running and not self._grows(entry):
                self._put_off(self.running[-1])

    def _grows(self, entry: Entry) -> bool:
        return all(self.pool.grow(lane.slot, len(lane.tokens)) for lane in entry.live)

    def _put_off(self, entry: Entry) -> None:
        lanes = list(entry.live)
        for lane in lanes:
            self.pool.give_back(lane.slot, None)
            lane.slot, lane.computed, lane.branch = -1, 0, None
        entry.lanes, entry.live = lanes, []
        self.running.remove(entry)
        self.add(entry)
        self.preemptions += 1

    def _admit(self) -> list[Copy]:
        copies = []
        while self.waiting:
            entry = self.waiting[0]
            lanes, soon = len(entry.lanes), min(entry.length + 1, self.max_seq_len)
            bank = self.pool.room(lanes)
            if bank < 0 or not self.pool.could_hold(soon, lanes):
                break
            self.waiting.pop(0)
            if entry.version < 0:
                entry.version = self.version
            copies += self._start(entry, bank)
            insort(self.running, entry, key=lambda other: other.rank)
        return copies

    def _start(self, entry: Entry, bank: int) -> list[Copy]:
        """Give each lane a slot, with what is known of its beginning."""
        copies, entry.live = [], list(entry.lanes)
        for index, lane in enumerate(entry.live):
            free, held = self._known(lane, entry.version, bank)
            better = free if free.count >= held.count else held
            in_place = better is free and free.count > 0
            tokens = len(lane.tokens)
            lane.slot = self.pool.take(tokens, bank, free if in_place else NOTHING)
            lane.computed = 0 if lane.idle else better.count
            if lane.computed and not in_place:
                copies.append(Copy(better.slot, lane.slot, better.count))
            if index == 0:
                entry.cached = lane.computed
                self.prefix_queries += tokens
                self.prefix_hits += lane.computed
        return copies

    def _known(self, lane: Lane, version: int, bank: int) -> tuple[Found, Found]:
        """The longest beginnings of a lane's tokens in free slots of the bank, and in held ones.

        The last token is always computed: it gives the next one's scores. So is what is scored.
        """
        if not self.config.prefix_cache or lane.idle:
            return Found(), Found()
        most = min(len(lane.tokens) - 1, lane.score_from - 1 if lane.score_from else 1 << 40)
        wanted = lane.tokens[: max(0, most)]
        held = Found()
        for entry in self.running:
            for other in entry.live:
                usable = other.slot % self.pool.banks == bank and not (other.idle or other.branch)
                if usable and entry.version == version:
                    count = common(other.tokens[: other.computed], wanted)
                    held = max(held, Found(other.slot, count), key=lambda found: found.count)
        return self.pool.find(wanted, version, bank), held

    def _next_version(self) -> int:
        versions = sorted({entry.version for entry in self.running})
        later = [version for version in versions if version > self._last_version]
        self._last_version = (later or versions or [self.version])[0]
        return self._last_version


def _progress(lane: Lane) -> Progress:
    return Progress(
        lane.key,
        lane.slot,
        len(lane.tokens),
        lane.computed,
        lane.score_from,
        SCORED_CHUNK if lane.score_from else 0,
    )
