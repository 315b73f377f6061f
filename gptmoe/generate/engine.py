"""The generation engine: decide (scheduler), compute (executor), account (here)."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from gptmoe.errors import AlreadyRunning, CheckpointError, Overloaded
from gptmoe.text import Tokenizer

from .admission import check_fits, check_queue, cost
from .answers import Account, Answers, Drawn, Outcome, Scored, lanes_for, request_of
from .delta import Delta
from .executor import CacheLost, Executor
from .plan import StepPlan
from .rate import Rate
from .request import Request
from .scheduler import EngineConfig, Entry, Lane, Scheduler
from .searched import Searched
from .stats import EngineStats

PRIORITY_S = 10.0
"""A step of a request's priority is worth so many seconds of waiting."""


class Engine:
    """Continuous batching over one executor. Not thread safe: one thread owns it.

    Invariant: a finished or aborted request leaves nothing behind but what the prefix cache knows.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: Tokenizer,
        max_seq_len: int,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.executor = executor
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.config = config
        self._clock = clock
        self._scheduler = Scheduler(config, max_seq_len, executor.banks)
        self._accounts = dict[str, Account]()
        self._arrivals = 0
        self._rate = Rate()
        self._counts = Counter[str]()

    @property
    def version(self) -> int:
        """Of the weights that new requests get."""
        return self._scheduler.version

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return bool(self._accounts)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._scheduler.running)

    @property
    def stats(self) -> EngineStats:
        """What it does, in numbers."""
        scheduler, counts = self._scheduler, self._counts
        return EngineStats(
            running=self.num_running,
            waiting=self.num_waiting,
            running_tokens=sum(map(self._left, scheduler.running)),
            waiting_tokens=sum(map(self._left, scheduler.waiting)),
            kv_blocks=scheduler.pool.blocks,
            kv_used_blocks=scheduler.pool.used_blocks,
            steps=counts["steps"],
            prompt_tokens=counts["prompt"],
            generated_tokens=counts["generated"],
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            refused=counts["refused"],
            tokens_per_s=self._rate.per_s,
        )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises AlreadyRunning for an id in use, RequestError for a prompt that does not fit the
        context or more answers than there is room for, Overloaded for a full queue.
        """
        if request.request_id in self._accounts:
            raise AlreadyRunning(
                f"request_id {request.request_id!r} is running; wait for it, or use another id"
            )
        self._check(request)
        now_s = self._clock()
        self._arrivals += 1
        rank = (now_s + PRIORITY_S * request.priority, self._arrivals)
        entry = Entry(rank, lanes_for(request))
        self._accounts[request.request_id] = Account(request, entry, self._answers(request), now_s)
        self._scheduler.add(entry)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its slots at once; False if it is not known (any more)."""
        return self._forget(request_id)

    def end(self, request_id: str, reason: str = "abort") -> list[Delta]:
        """The same, with the last delta of each of its answers."""
        account = self._accounts.get(request_id)
        if account is None:
            return []
        deltas = self._finished(account, account.answers.close(reason))
        self._forget(request_id, damaged=reason == "error")
        return deltas

    def refresh(self, version: int, *, restart: bool = False) -> None:
        """Use these weights from the next request on; the executor has them already.

        Running requests finish on theirs; with `restart` they go on with the new ones from what
        they have said so far. Older weights are let go of when nobody uses them any more.
        """
        self._scheduler.version = version
        if restart:
            self._scheduler.compute_again()
        self.executor.keep(self._scheduler.versions())

    def step(self) -> list[Delta]:
        """Run one step; what is new for each request that got a token, or whose time is up.

        Scores that are no numbers end their request alone: its last deltas have the error. Where
        the executor has lost its cache nothing is new: the next steps compute all tokens again, and
        go on with the same. Raises Unavailable if it cannot for now; who is not late is still here.
        """
        began_s = self._clock()
        late = self._end_late(began_s)
        plan = self._scheduler.plan()
        self._note_begun(began_s)
        if not plan.spans:
            return late
        lanes = self._lanes()
        tokens = {span.key: lanes[span.key][1].tokens for span in plan.spans}
        try:
            logits_SV = self.executor.run(plan, tokens)
        except CacheLost as lost:
            self._scheduler.version = max(self.version, lost.version)
            self._scheduler.compute_again()
            return late
        self._scheduler.computed(plan)
        deltas = self._account(plan, lanes, logits_SV)
        self._rate.note(sum(span.count for span in plan.spans), self._clock() - began_s)
        return late + deltas

    def _check(self, request: Request) -> None:
        scheduler, most = self._scheduler, self.max_seq_len
        check_fits(request, most, scheduler.most_lanes(), scheduler.pool.blocks)
        waiting = len(scheduler.waiting)
        tokens = sum(map(self._left, scheduler.waiting)) + cost(request, most)
        ahead = tokens + sum(map(self._left, scheduler.running))
        try:
            check_queue(
                self.config,
                waiting=waiting,
                free=scheduler.pool.num_free,
                tokens=tokens,
                retry_after_s=self._rate.seconds_for(ahead / (waiting + self.num_running + 1)),
            )
        except Overloaded:
            self._counts["refused"] += 1
            raise

    def _answers(self, request: Request) -> Answers:
        if request.score_only:
            return Scored(request)
        if request.sampling.num_beams > 1:
            return Searched(request, self.tokenizer, self.max_seq_len)
        return Drawn(request, self.tokenizer, self.max_seq_len)

    def _left(self, entry: Entry) -> int:
        """Tokens that an entry may still compute."""
        account = self._accounts[request_of(entry.lanes[0].key)]
        lanes = entry.live or entry.lanes
        done = sum(lane.computed for lane in lanes)
        return max(1, cost(account.request, self.max_seq_len) - done)

    def _end_late(self, now_s: float) -> list[Delta]:
        late = [
            request_id
            for request_id, account in self._accounts.items()
            if account.request.deadline_s is not None and account.request.deadline_s <= now_s
        ]
        return [delta for request_id in late for delta in self.end(request_id, "deadline")]

    def _note_begun(self, now_s: float) -> None:
        for entry in self._scheduler.running:
            account = self._accounts[request_of(entry.lanes[0].key)]
            if account.begun_s is None:
                account.begun_s = now_s

    def _lanes(self) -> dict[str, tuple[Account, Lane]]:
        found = {}
        for entry in self._scheduler.running:
            account = self._accounts[request_of(entry.lanes[0].key)]
            for lane in entry.live:
                found[lane.key] = (account, lane)
        return found

    def _account(
        self, plan: StepPlan, lanes: dict[str, tuple[Account, Lane]], logits_SV: Tensor
    ) -> list[Delta]:
        # The model's vocabulary may be padded beyond the tokenizer's.
        logits_SV = logits_SV[:, : self.tokenizer.vocab_size]
        self._counts["steps"] += 1
        drawn, wrong = dict[str, Account](), dict[str, CheckpointError]()
        row = 0
        for span in plan.spans:
            account, lane = lanes[span.key]
            rows_NV = logits_SV[row : row + span.outputs]
            row += span.outputs
            draws = lane.computed == len(lane.tokens)
            try:
                account.note_scores(lane, rows_NV[: span.outputs - draws])
            except CheckpointError as error:
                wrong[request_of(span.key)] = error
            if draws:
                lane.score_from = 0
                account.pending[lane.key] = rows_NV[-1]
                drawn[request_of(span.key)] = account
            prompt = len(account.request.prompt_ids)
            self._counts["prompt"] += max(0, min(prompt, lane.computed) - span.start)
        deltas = []
        for request_id, account in drawn.items():
            try:
                deltas += [] if request_id in wrong else self._drawn(account)
            except CheckpointError as error:
                wrong[request_id] = error
        for request_id, why in wrong.items():
            deltas += [replace(delta, error=why) for delta in self.end(request_id, "error")]
        return deltas

    def _drawn(self, account: Account) -> list[Delta]:
        entry, logits = account.entry, account.pending
        # What was kept before the cache was lost does not count: such a lane is not computed.
        complete = all(lane.idle or lane.computed == len(lane.tokens) for lane in entry.live)
        if not complete and account.answers.together:
            return []
        account.pending = {}
        return self._carry_out(account, account.answers.step(entry, logits))

    def _carry_out(self, account: Account, outcome: Outcome) -> list[Delta]:
        scheduler, entry = self._scheduler, account.entry
        if account.first_token_s is None:
            account.first_token_s = self._clock()
        if outcome.parents:
            scheduler.branch(entry, outcome.parents)
        for lane in entry.live:
            if lane.key in outcome.tokens:
                lane.tokens.append(outcome.tokens[lane.key])
        for lane in outcome.resting:
            lane.idle = True
        self._counts["generated"] += len(outcome.tokens)
        version = entry.version
        for lane in outcome.ended:
            scheduler.end(entry, lane)
        deltas = self._finished(account, outcome.deltas)
        if not entry.live:
            del self._accounts[account.request.request_id]
            if version != self.version:
                self.executor.keep(scheduler.versions())
        return deltas

    def _finished(self, account: Account, deltas: Sequence[Delta]) -> list[Delta]:
        """With what only the account knows: the weights' version, prompt scores, timings."""
        result = []
        for delta in deltas:
            delta = replace(delta, version=max(0, account.entry.version))
            if account.scores and delta.index == 0:
                delta = replace(delta, prompt_scores=tuple(account.scores))
                account.scores.clear()
            if delta.finish_reason:
                delta = account.closed(delta, self._clock())
            result.append(delta)
        return result

    def _forget(self, request_id: str, *, damaged: bool = False) -> bool:
        account = self._accounts.pop(request_id, None)
        if account is None:
            return False
        self._scheduler.remove(account.entry, damaged=damaged)
        if account.entry.version not in (-1, self.version):
            self.executor.keep(self._scheduler.versions())
        return True
