"""Beam search in plain lists, with every candidate sorted, by trying every sequence, and ours."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptmoe.generate.beams import Beams
from gptmoe.generate.output import TextStream
from gptmoe.generate.params import SamplingParams
from gptmoe.text import Tokenizer
from tests.gptmoe.generate.reference import changed, softmax

Ids = tuple[int, ...]
Model = Callable[[Ids], list[float]]
"""The scores behind some tokens (prompt not included)."""


def random_model(seed: int, vocab_size: int, sharpness: float = 2.0) -> Model:
    """Scores that are a function of the tokens before."""

    def scores(token_ids: Ids) -> list[float]:
        generator = torch.Generator().manual_seed(hash((seed, *token_ids)) % 2**63)
        drawn = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
        return (drawn * sharpness).tolist()

    return scores


def letters(token_ids: Sequence[int]) -> str:
    """The text of a test's tokens: one letter each."""
    return "".join(chr(ord("a") + token_id) for token_id in token_ids)


@dataclass(frozen=True)
class Search:
    """What is searched for, and where."""

    model: Model
    params: SamplingParams
    end_ids: frozenset[int]
    max_new_tokens: int
    prompt_ids: Ids = (0,)

    def logprobs(self, token_ids: Ids) -> list[float]:
        """After bias and penalties."""
        new, prompt = list(token_ids), list(self.prompt_ids)
        parts = softmax(changed(self.model(token_ids), self.params, prompt, new))
        return [math.log(part) for part in parts]

    def total(self, token_ids: Ids) -> float:
        return sum(self.logprobs(token_ids[:at])[token] for at, token in enumerate(token_ids))

    def score(self, token_ids: Ids) -> float:
        return self.total(token_ids) / len(token_ids) ** self.params.length_penalty

    def reason(self, token_ids: Ids) -> str:
        stopped = any(stop in letters(token_ids) for stop in self.params.stop)
        if stopped or token_ids[-1] in self.end_ids:
            return "stop"
        return "length" if len(token_ids) == self.max_new_tokens else ""


def every_answer(search: Search, vocab_size: int) -> list[Ids]:
    """All complete answers there are, best first."""
    found = [
        token_ids
        for length in range(1, search.max_new_tokens + 1)
        for token_ids in itertools.product(range(vocab_size), repeat=length)
        if search.reason(token_ids)
        and not any(search.reason(token_ids[:shorter]) for shorter in range(1, length))
    ]
    return sorted(found, key=search.score, reverse=True)


def naive(search: Search, *, stops_early: bool) -> list[Ids]:
    """The finished answers of all groups, best first."""
    params = search.params
    size = params.num_beams // params.num_beam_groups
    groups: list[tuple[list[Ids], list[Ids]]] = [([()], []) for _ in range(params.num_beam_groups)]
    for length in range(1, search.max_new_tokens + 1):
        taken: list[int] = []
        for living, finished in groups:
            ranked = _ranked(search, living, taken)
            ends = [ids for ids in ranked[:size] if search.reason(ids)]
            living[:] = [ids for ids in ranked if not search.reason(ids)][:size]
            finished[:] = sorted(finished + ends, key=search.score, reverse=True)[:size]
            taken = taken + [ids[-1] for ids in living + ends]
            if stops_early and len(finished) == size:
                least = search.score(finished[-1])
                lengths = range(length + 1, search.max_new_tokens + 1)
                if not any(
                    search.total(ids) / later**params.length_penalty > least
                    for ids in living
                    for later in lengths
                ):
                    living.clear()
    answers = [ids for _, finished in groups for ids in finished]
    return sorted(answers, key=search.score, reverse=True)


def _ranked(search: Search, living: list[Ids], taken: list[int]) -> list[Ids]:
    """Every child of every living beam, best first."""
    children = [(*ids, token) for ids in living for token in range(len(search.model(())))]

    def rank(ids: Ids) -> float:
        return search.total(ids) - search.params.diversity_penalty * taken.count(ids[-1])

    return sorted(children, key=rank, reverse=True)


class Letters:
    """One letter a token."""

    def token_bytes(self, token_id: int) -> bytes:
        return letters([token_id]).encode()


def start(search: Search) -> Beams:
    tokenizer: Tokenizer = Letters()  # type: ignore[assignment]
    return Beams(
        search.params,
        search.prompt_ids,
        end_ids=search.end_ids,
        stream=TextStream(tokenizer, search.params.stop),
        max_new_tokens=search.max_new_tokens,
    )


def rows(model: Model, living: Sequence[Ids]) -> Tensor:
    return torch.tensor([model(token_ids) for token_ids in living], dtype=torch.float64)


def run(search: Search) -> Beams:
    """To its end; what a step says of parents and tokens is what the living beams hold."""
    beams = start(search)
    living: list[Ids] = [()]
    done = False
    while not done:
        step = beams.advance(rows(search.model, living))
        pairs = zip(step.parents, step.tokens, strict=True)
        living, done = [(*living[parent], token) for parent, token in pairs], step.done
        assert beams.living == tuple(living)
    return beams
