"""Computes what a step plan says, in this process.

Letters: T flat tokens, D model width, S sampled rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from gptmoe.model.transformer import GPT

from .attention import CachedAttend
from .cache import KVCache
from .kernels.row_attention import RowAttend, row_kernels
from .plan import SlotSpan, Span, StepPlan
from .versions import Versions

ROW_MULTIPLE = 4
"""Products run over multiples of this many rows, so that a row's bits do not depend on the others
(float32 routers included, whatever the model's type). Four rows are about as fast as one."""


class CacheLost(Exception):
    """The step was not run and what was computed before is gone: tokens enter anew.

    `version` is that of the newest weights that are there.
    """

    def __init__(self, version: int = 0) -> None:
        super().__init__(version)
        self.version = version


class Executor(Protocol):
    """Runs step plans. It never decides; the engine never touches tensors of the model."""

    @property
    def banks(self) -> int:
        """Slots s and t can be copied into each other if s % banks == t % banks."""
        ...

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """Scores for the last tokens of each span, [S, V], span.outputs of them; `tokens` by key.

        Raises CacheLost if all sequences are to be computed again, Unavailable if not even that is
        possible for now.
        """
        ...

    def keep(self, versions: Set[int]) -> None:
        """Weights of other versions are not asked for any more, but for newer ones to come."""
        ...


class WholeModel(Executor, Protocol):
    """An executor that has all of a model in this process."""

    def add(self, version: int, model: GPT) -> None:
        """Weights of another version, beside those that are here; from any thread."""
        ...

    def held(self) -> Set[int]:
        """Versions whose weights are here; from any thread."""
        ...

    def warm_up(self) -> None:
        """Do now what the first steps would have to wait for, here and whenever weights come."""
        ...

    def hidden(
        self, spans: Sequence[Span], num_decoding: int, tokens: Mapping[str, Sequence[int]]
    ) -> Tensor:
        """Final hidden states of all tokens of the spans, [T, D]."""
        ...

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores over the vocabulary, [S, V]."""
        ...


MakeExecutor = Callable[[GPT, int, int], WholeModel]
"""Of a model, for so many slots that together hold so many blocks of the KV cache."""


class LocalExecutor:
    """The whole model and its KV cache in this process; each slot has room for its context."""

    banks = 1

    def __init__(self, model: GPT, slots: int, blocks: int = 0) -> None:
        """`blocks` are not counted here: memory is taken as sequences grow."""
        self.model = model.eval()
        device = model.embed.tokens.weight.device
        self.cache = KVCache(model.spec, slots, model.compute_dtype, device)
        self._models = Versions[GPT]()
        self._models.add(0, self.model)

    def add(self, version: int, model: GPT) -> None:
        """See WholeModel.add."""
        self._models.add(version, model.eval())

    def held(self) -> Set[int]:
        """See WholeModel.held."""
        return self._models.held.keys()

    def warm_up(self) -> None:
        """See WholeModel.warm_up: nothing."""

    def keep(self, versions: Set[int]) -> None:
        """See Executor.keep."""
        self._models.keep(versions)

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """See Executor.run."""
        self.model = self._models.held[plan.version]
        self.cache.copy(plan.copies)
        hidden_TD = self.hidden(plan.spans, plan.num_decoding, tokens)
        return self.logits(output_rows(hidden_TD, plan.spans))

    def hidden(
        self, spans: Sequence[Span], num_decoding: int, tokens: Mapping[str, Sequence[int]]
    ) -> Tensor:
        """See WholeModel.hidden."""
        return hidden_states(self.model, self.cache, spans, num_decoding, tokens_of(spans, tokens))

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """See WholeModel.logits."""
        return scores(self.model, hidden_SD)


def tokens_of(spans: Sequence[Span], tokens: Mapping[str, Sequence[int]]) -> list[int]:
    """The token ids of the spans, one after the other."""
    ids: list[int] = []
    for span in spans:
        ids += tokens[span.key][span.start : span.start + span.count]
    return ids


def output_rows(hidden_TD: Tensor, spans: Sequence[SlotSpan]) -> Tensor:
    """The states of the tokens whose scores are wanted: the last ones of each span. [S, D]"""
    if all(span.count == span.outputs for span in spans):
        return hidden_TD
    ends = accumulate(span.count for span in spans)
    return hidden_TD[
        [
            row
            for span, end in zip(spans, ends, strict=True)
            for row in range(end - span.outputs, end)
        ]
    ]


@torch.inference_mode()
def hidden_states(
    model: GPT,
    cache: KVCache,
    spans: Sequence[SlotSpan],
    num_decoding: int,
    token_ids: Sequence[int],
    x_TD: Tensor | None = None,
) -> Tensor:
    """Hidden states [T, D] behind the layers of the cache, which a stage may have few of.

    `x_TD` are those before them, unless they begin with layer 0. Padding repeats
    the last row: it asks for no expert that nobody asks for.
    """
    positions = [place for span in spans for place in range(span.start, span.start + span.count)]
    count = len(token_ids)
    padding = -count % _multiple(model)
    ids = [*token_ids, *[token_ids[-1]] * padding]
    token_1T = torch.tensor([ids], device=cache.device)
    position_1T = torch.tensor([positions + positions[-1:] * padding], device=cache.device)
    compiled = row_kernels(cache)
    attend = (
        RowAttend(cache, spans, compiled) if compiled else CachedAttend(cache, spans, num_decoding)
    )
    x_1TD = None if x_TD is None else _padded(x_TD, padding).unsqueeze(0)
    output = model(token_1T, position_1T, attend=attend, layers=cache.layers, x_BTD=x_1TD)
    return output.hidden_BTD[0, :count]


@torch.inference_mode()
def scores(model: GPT, hidden_SD: Tensor) -> Tensor:
    """Scores over the vocabulary, [S, V]."""
    count = len(hidden_SD)
    if not count:
        return hidden_SD.new_empty(0, model.spec.vocab_size)
    return model.logits(_padded(hidden_SD, -count % _multiple(model)))[:count]


def _multiple(model: GPT) -> int:
    return ROW_MULTIPLE if model.fixed_rows else 1


def _padded(rows_TD: Tensor, padding: int) -> Tensor:
    if not padding:
        return rows_TD
    return torch.cat((rows_TD, rows_TD[-1:].expand(padding, -1)))
