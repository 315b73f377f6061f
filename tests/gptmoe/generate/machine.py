"""A scheduler driven at random, against a cache that remembers tokens."""

from collections.abc import Sequence
from random import Random

from gptmoe.generate.gpu.pages import NOWHERE, PageTable
from gptmoe.generate.plan import StepPlan
from gptmoe.generate.scheduler import EngineConfig, Entry, Lane, Scheduler
from gptmoe.generate.slots import BLOCK, blocks_of

CONTEXT = 160


class Cache:
    """What is in each slot, as tokens and the weights that made them.

    A plan that relies on anything else is wrong.
    """

    def __init__(self, slots: int, banks: int) -> None:
        self.slots = [list[tuple[int, int]]() for _ in range(slots)]
        self.banks = banks

    def run(self, plan: StepPlan, tokens: dict[str, list[int]]) -> None:
        for copy in plan.copies:
            assert copy.source % self.banks == copy.target % self.banks
            assert copy.source != copy.target
            assert len(self.slots[copy.source]) >= copy.count
            self.slots[copy.target] = self.slots[copy.source][: copy.count]
        for trim in plan.trims:
            del self.slots[trim.slot][trim.count :]
        assert len({span.slot for span in plan.spans}) == len(plan.spans)
        for span in plan.spans:
            mine = [(token, plan.version) for token in tokens[span.key]]
            assert self.slots[span.slot][: span.start] == mine[: span.start]
            self.slots[span.slot] = mine[: span.start + span.count]


class PagedCache:
    """The same in pages: what is written to a page that another slot reads is wrong, too."""

    def __init__(self, slots: int, blocks: int) -> None:
        self.table = PageTable(slots, blocks)
        self.slots = slots
        self.page: list[list[tuple[int, int]]] = [[] for _ in range(self.table.num_pages)]

    def run(self, plan: StepPlan, tokens: dict[str, list[int]]) -> None:
        for source, target in self.table.begin(plan.copies, plan.trims, plan.spans):
            self.page[target] = list(self.page[source])
        for span in plan.spans:
            mine = [(token, plan.version) for token in tokens[span.key]]
            pages = [self.page[page] for page in self.table.pages(span.slot)]
            assert len(pages) == blocks_of(span.start + span.count)
            assert [token for page in pages for token in page][: span.start] == mine[: span.start]
            for place in range(span.start, span.start + span.count):
                page = pages[place // BLOCK]
                page[place % BLOCK :] = [mine[place]]
        held = [page for slot in range(self.slots) for page in self.table.pages(slot)]
        assert NOWHERE not in held
        assert len(set(held)) == self.table.num_pages - 1 - self.table.num_free


class Machine:
    """A scheduler, the cache that it believes in, and entries that grow at random."""

    def __init__(self, config: EngineConfig, banks: int, random: Random) -> None:
        self.scheduler = Scheduler(config, CONTEXT, banks)
        self.cache = Cache(config.max_batch_size, banks)
        self.paged = PagedCache(config.max_batch_size, self.scheduler.pool.blocks)
        self.random = random
        self.left = dict[str, int]()
        """Tokens to go, by lane."""
        self.count = 0
        self.finished = list[Entry]()
        self.entries = list[Entry]()
        self.versions = dict[str, int]()
        """Of the weights that each lane has begun with."""

    def arrive(self, prompt: Sequence[int], lanes: int, new: int, priority: int) -> None:
        self.count += 1
        keys = [f"{index}/{self.count}" for index in range(lanes)]
        made = [Lane(key, list(prompt), idle=index > 0) for index, key in enumerate(keys)]
        self.left |= {key: self.random.randint(1, new) if lanes > 1 else new for key in keys}
        entry = Entry((priority, self.count), made)
        self.entries.append(entry)
        self.scheduler.add(entry)

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        lanes = {lane.key: lane for entry in self.scheduler.running for lane in entry.live}
        tokens = {key: lane.tokens for key, lane in lanes.items()}
        self.cache.run(plan, tokens)
        self.paged.run(plan, tokens)
        for span in plan.spans:
            assert self.versions.setdefault(span.key, plan.version) == plan.version
        self.scheduler.computed(plan)
        for entry in list(self.scheduler.running):
            self._grow(entry)
        self.check(plan)
        return plan

    def refresh(self, *, restart: bool) -> None:
        """Newer weights; with `restart` all go on with them, as when the cache is lost."""
        self.scheduler.version += 1
        if restart:
            self.scheduler.compute_again()
            self.versions.clear()

    def lose(self) -> None:
        """All that the cache holds."""
        slots = self.scheduler.config.max_batch_size
        self.cache = Cache(slots, self.cache.banks)
        self.paged = PagedCache(slots, self.scheduler.pool.blocks)
        self.scheduler.compute_again()
        self.versions.clear()

    def _alive(self) -> list[Entry]:
        return self.scheduler.waiting + self.scheduler.running

    def _grow(self, entry: Entry) -> None:
        """Each lane whose tokens are computed gets another, or ends."""
        if len(entry.live) > 1 and entry.live[1].idle:
            first = entry.live[0]
            if first.computed == len(first.tokens):
                self.scheduler.branch(entry, [first] * len(entry.live))
        for lane in list(entry.live):
            if lane.idle or lane.computed != len(lane.tokens):
                continue
            self.left[lane.key] -= 1
            lane.tokens.append(self.random.randrange(3))
            if not self.left[lane.key] or len(lane.tokens) >= CONTEXT:
                self.scheduler.end(entry, lane)
        if not entry.live:
            self.finished.append(entry)

    def check(self, plan: StepPlan) -> None:
        scheduler, config = self.scheduler, self.scheduler.config
        left = [lane.key for entry in self._alive() for lane in entry.live or entry.lanes]
        assert {self.versions.get(key, scheduler.version) for key in left} <= scheduler.versions()
        assert sum(span.count for span in plan.spans) <= config.token_budget
        held = [lane.slot for entry in scheduler.running for lane in entry.live]
        assert len(set(held)) == len(held)
        assert scheduler.pool.num_free == config.max_batch_size - len(held)
        blocks = scheduler.pool.blocks
        assert scheduler.pool.used_blocks <= blocks
        assert [entry.rank for entry in scheduler.running] == sorted(
            entry.rank for entry in scheduler.running
        )


def arrive_somehow(machine: Machine, random: Random) -> None:
    """A prompt that shares its beginning with others, for one to four lanes."""
    length, new = random.randint(1, 120), random.randint(1, 40)
    blocks = -(-min(CONTEXT, length + new) // BLOCK)
    pool = machine.scheduler.pool
    most = min(machine.scheduler.most_lanes(), pool.blocks // blocks)
    lanes = min(random.choice((1, 1, 1, 2, 3, 4)), most)
    if not random.randrange(20):  # fills the context, as what is only scored may
        length, lanes, new = CONTEXT, 1, 1
    prompt = [random.randrange(2)] * random.randint(0, length) + [random.randrange(5, 9)] * length
    machine.arrive(prompt[:length], lanes, new, random.randint(-20, 20))
