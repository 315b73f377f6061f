"""The generation engine: decide (pure scheduler), compute (executor), account (here)."""

import time
from collections import deque
from dataclasses import replace

from torch import Tensor

from gptmoe.errors import AlreadyRunning, Overloaded, RequestError
from gptmoe.text import Tokenizer

from .delta import Delta, Timings
from .executor import CacheLost, Executor
from .output import TextStream
from .request import Request
from .sampling import choose, log_probability
from .scheduler import EngineConfig, Progress, StepPlan, plan_step
from .stats import EngineStats


class _Sequence:
    """The engine's account of one running request."""

    def __init__(self, request: Request, slot: int, stream: TextStream, version: int) -> None:
        self.request = request
        self.slot = slot
        self.stream = stream
        self.version = version
        self.tokens = list(request.prompt_ids)
        self.computed = 0
        self.arrived_s = self.began_s = self.first_s = 0.0

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    def progress(self) -> Progress:
        return Progress(self.request.request_id, self.slot, len(self.tokens), self.computed)


class Engine:
    """Continuous batching over one executor. Not thread safe: one thread owns it.

    Invariant: each running sequence has its own slot, and a finished or aborted one leaves nothing
    behind.
    """

    def __init__(
        self, executor: Executor, tokenizer: Tokenizer, max_seq_len: int, config: EngineConfig
    ) -> None:
        self.executor = executor
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.config = config
        self.waiting: deque[Request] = deque()
        self.running: dict[str, _Sequence] = {}
        self.free_slots = list(range(config.max_batch_size))
        self.version = 0
        """Of the weights that new requests get."""
        self._last_version = 0
        self._totals = EngineStats()
        self._arrived_s: dict[str, float] = {}

    @property
    def stats(self) -> EngineStats:
        """Numbers of now and since the start."""
        left = [s.request.sampling.max_new_tokens - s.new_tokens for s in self.running.values()]
        queued = [len(r.prompt_ids) + r.sampling.max_new_tokens for r in self.waiting]
        return replace(
            self._totals,
            running=len(self.running),
            waiting=len(self.waiting),
            running_tokens=sum(left),
            waiting_tokens=sum(queued),
            kv_blocks=self.config.max_batch_size,
            kv_used_blocks=len(self.running),
        )

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return bool(self.waiting or self.running)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises AlreadyRunning for an id in use, RequestError for a prompt that does not fit the
        context, Overloaded for a full queue.
        """
        known = request.request_id in self.running
        if known or any(r.request_id == request.request_id for r in self.waiting):
            raise AlreadyRunning(
                f"request_id {request.request_id!r} is running; wait for it, or use another id"
            )
        if not 0 < len(request.prompt_ids) < self.max_seq_len:
            raise RequestError(
                f"prompt must be 1 to {self.max_seq_len - 1} tokens; "
                f"found {len(request.prompt_ids)}",
                "prompt",
            )
        if len(self.waiting) >= self.config.max_queue + len(self.free_slots):
            self._totals = replace(self._totals, refused=self._totals.refused + 1)
            raise Overloaded(
                f"the queue of {self.config.max_queue} requests is full; try again later", 1.0
            )
        self.waiting.append(request)
        self._arrived_s[request.request_id] = time.monotonic()

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its slot at once; False if it is not known (any more)."""
        if request_id in self.running:
            self._release(request_id)
            return True
        before = len(self.waiting)
        self.waiting = deque(r for r in self.waiting if r.request_id != request_id)
        self._arrived_s.pop(request_id, None)
        return len(self.waiting) < before

    def refresh(self, version: int, *, restart: bool = False) -> None:
        """Use these weights from the next request on; the executor has them already.

        Running requests finish on theirs; with `restart` they go on with the new ones from what
        they have said so far. Older weights are let go of when nobody uses them any more.
        """
        self.version = version
        if restart:
            self._compute_again()
        self.executor.keep(self._versions())

    def step(self) -> list[Delta]:
        """Run one step; what is new for each request that got a token.

        Where the executor has lost its cache there is nothing new: the next steps compute prompts
        and what was generated again, and go on with the same tokens. Raises Unavailable if it
        cannot go on for now; all requests are still here.
        """
        self._admit()
        version = self._next_version()
        turn = [s.progress() for s in self.running.values() if s.version == version]
        plan = plan_step(turn, self.config.token_budget, version)
        if not plan.spans:
            return []
        tokens = {span.request_id: self.running[span.request_id].tokens for span in plan.spans}
        try:
            logits_SV = self.executor.run(plan, tokens)
        except CacheLost as lost:
            self.version = max(self.version, lost.version)
            self._compute_again()
            return []
        return self._account(plan, logits_SV)

    def _admit(self) -> None:
        while self.waiting and self.free_slots:
            request = self.waiting.popleft()
            slot = min(self.free_slots)  # low slots first keep the decoding block dense
            self.free_slots.remove(slot)
            stream = TextStream(self.tokenizer, request.sampling.stop)
            sequence = _Sequence(request, slot, stream, self.version)
            sequence.arrived_s = self._arrived_s.pop(request.request_id)
            sequence.began_s = time.monotonic()
            self.running[request.request_id] = sequence

    def _next_version(self) -> int:
        """While requests of several versions run, these take turns."""
        versions = sorted({sequence.version for sequence in self.running.values()})
        later = [version for version in versions if version > self._last_version]
        self._last_version = (later or versions or [self.version])[0]
        return self._last_version

    def _versions(self) -> set[int]:
        return {self.version, *(sequence.version for sequence in self.running.values())}

    def _compute_again(self) -> None:
        """Tokens enter anew, with the weights of now: others may be gone with the cache."""
        for sequence in self.running.values():
            sequence.computed, sequence.version = 0, self.version

    def _account(self, plan: StepPlan, logits_SV: Tensor) -> list[Delta]:
        prompts = sum(span.count for span in plan.spans[plan.num_decoding :])
        generated = sum(span.samples for span in plan.spans)
        self._totals = replace(
            self._totals,
            steps=self._totals.steps + 1,
            prompt_tokens=self._totals.prompt_tokens + prompts,
            generated_tokens=self._totals.generated_tokens + generated,
        )
        # The model's vocabulary may be padded beyond the tokenizer's.
        rows = iter(logits_SV[:, : self.tokenizer.vocab_size])
        deltas = []
        for span in plan.spans:
            sequence = self.running[span.request_id]
            sequence.computed += span.count
            if span.samples:
                logits_V = next(rows)
                token = choose(logits_V, sequence.request.sampling, sequence.tokens)
                deltas.append(self._append(sequence, token, logits_V))
        return deltas

    def _append(self, sequence: _Sequence, token: int, logits_V: Tensor) -> Delta:
        request = sequence.request
        logprobs = (log_probability(logits_V, token),) if request.sampling.logprobs else ()
        sequence.tokens.append(token)
        ended = not request.sampling.ignore_end and token in (
            self.tokenizer.end_id,
            self.tokenizer.sep_id,
        )
        text = "" if ended else sequence.stream.push(token)
        reason = self._finish_reason(sequence, ended)
        if reason:
            text += sequence.stream.finish()
            self._release(request.request_id)
        prompt_tokens = len(request.prompt_ids)
        now_s = time.monotonic()
        sequence.first_s = sequence.first_s or now_s
        moments = (sequence.began_s, sequence.first_s, now_s)
        timings = Timings(*(moment - sequence.arrived_s for moment in moments))
        return Delta(
            request_id=request.request_id,
            token_ids=(token,),
            text=text,
            finish_reason=reason,
            prompt_tokens=prompt_tokens,
            logprobs=logprobs,
            version=sequence.version,
            timings=timings if reason else None,
        )

    def _finish_reason(self, sequence: _Sequence, ended: bool) -> str:
        if ended or sequence.stream.stopped:
            return "stop"
        full = len(sequence.tokens) >= self.max_seq_len
        done = sequence.new_tokens >= sequence.request.sampling.max_new_tokens
        return "length" if full or done else ""

    def _release(self, request_id: str) -> None:
        ended = self.running.pop(request_id)
        self.free_slots.append(ended.slot)
        if ended.version != self.version:
            self.executor.keep(self._versions())
