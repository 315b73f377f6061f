"""Computes what a step plan says, in this process.

Letters: T flat tokens, D model width, S sampled rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptmoe.model.transformer import GPT

from .attention import CachedAttend
from .cache import KVCache
from .scheduler import Span, StepPlan

ROW_MULTIPLE = 4
"""Products run over multiples of this many rows, so that a row's bits do not depend on the others
(float32 routers included, whatever the model's type). Four rows are about as fast as one."""


class Executor(Protocol):
    """Runs step plans. It never decides; the engine never touches tensors of the model."""

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """Scores for the last token of each span that samples, [S, V]; `tokens` by request id."""
        ...


class LocalExecutor:
    """The whole model and its KV cache in this process.

    Padding to ROW_MULTIPLE repeats the last row: it asks for no expert that nobody asks for.
    """

    def __init__(self, model: GPT, slots: int) -> None:
        self.model = model.eval()
        self.device = model.embed.tokens.weight.device
        self.cache = KVCache(model.spec, slots, model.compute_dtype, self.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """See Executor.run."""
        hidden_TD = self.hidden(plan.spans, plan.num_decoding, tokens)
        row, sampled = -1, []
        for span in plan.spans:
            row += span.count
            if span.samples:
                sampled.append(row)
        if not sampled:
            return hidden_TD.new_empty(0, self.model.spec.vocab_size)
        return self.logits(hidden_TD[torch.tensor(sampled, device=self.device)])

    @torch.inference_mode()
    def hidden(
        self, spans: Sequence[Span], num_decoding: int, tokens: Mapping[str, Sequence[int]]
    ) -> Tensor:
        """Final hidden states of all tokens of the spans, [T, D]."""
        token_ids: list[int] = []
        positions: list[int] = []
        for span in spans:
            token_ids += tokens[span.request_id][span.start : span.start + span.count]
            positions += range(span.start, span.start + span.count)
        count = len(token_ids)
        padding = -count % ROW_MULTIPLE
        token_1T = torch.tensor([token_ids + token_ids[-1:] * padding], device=self.device)
        position_1T = torch.tensor([positions + positions[-1:] * padding], device=self.device)
        attend = CachedAttend(self.cache, spans, num_decoding)
        return self.model(token_1T, position_1T, attend=attend).hidden_BTD[0, :count]

    @torch.inference_mode()
    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Scores over the vocabulary, [S, V]."""
        count = len(hidden_SD)
        padding = -count % ROW_MULTIPLE
        if padding:
            hidden_SD = torch.cat((hidden_SD, hidden_SD[-1:].expand(padding, -1)))
        return self.model.logits(hidden_SD)[:count]
