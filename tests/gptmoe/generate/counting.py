"""An engine over a model that always counts on: token n is followed by n + 1."""

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from gptmoe.generate.delta import Delta
from gptmoe.generate.engine import Engine
from gptmoe.generate.executor import CacheLost
from gptmoe.generate.params import SamplingParams
from gptmoe.generate.plan import StepPlan
from gptmoe.generate.request import Request
from gptmoe.generate.scheduler import EngineConfig
from gptmoe.text import Tokenizer

FIRST = 400
"""Counting starts where the tokenizer has words."""


class Counting:
    """A model that says n + 1 after n, and 0 after the last; a slot must serve one request."""

    banks = 1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.steps: list[StepPlan] = []
        self.kept: list[set[int]] = []
        self.loses = False
        self.spoilt: int | None = None
        """The token after which all scores are no numbers."""
        self.strides = dict[int, int]()
        """What weights of a version add to a token, where that is not 1."""

    def keep(self, versions: Set[int]) -> None:
        self.kept.append(set(versions))

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        assert len({span.slot for span in plan.spans}) == len(plan.spans)
        self.steps.append(plan)
        if self.loses:
            self.loses = False
            raise CacheLost(7)
        last = [
            tokens[span.key][place]
            for span in plan.spans
            for place in range(span.start + span.count - span.outputs, span.start + span.count)
        ]
        logits_SV = torch.zeros(len(last), self.vocab_size + 7)
        logits_SV[:, self.vocab_size :] = 9.0  # padding of the vocabulary must never be chosen
        stride = self.strides.get(plan.version, 1)
        for row, token in enumerate(last):
            logits_SV[row, (token + stride) % self.vocab_size] = 5.0
            if token == self.spoilt:
                logits_SV[row] = torch.nan
        return logits_SV


def request(name: str, prompt: Sequence[int] = (FIRST,), **sampling: object) -> Request:
    keys = {"temperature": 0.0, "max_new_tokens": 3, **sampling}
    return Request(name, tuple(prompt), SamplingParams(**keys))  # type: ignore[arg-type]


def engine(tokenizer: Tokenizer, max_seq_len: int = 64, **config: int) -> Engine:
    return Engine(Counting(tokenizer.vocab_size), tokenizer, max_seq_len, EngineConfig(**config))


def run_out(running: Engine) -> list[Delta]:
    deltas = []
    while running.has_work:
        deltas += running.step()
    return deltas


class Clock:
    """Time as a test sets it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s
