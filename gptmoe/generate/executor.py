"""Computes what a step plan says, in this process.

Letters: T flat tokens, D model width, S sampled rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptmoe.model.experts import MIN_ROWS
from gptmoe.model.transformer import GPT

from .attention import CachedAttend
from .cache import KVCache
from .scheduler import Span, StepPlan


class Executor(Protocol):
    """Runs step plans. It never decides; the engine never touches tensors of the model."""

    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """Scores for the last token of each span that samples, [S, V]; `tokens` by request id."""
        ...


class LocalExecutor:
    """The whole model and its KV cache in this process."""

    def __init__(self, model: GPT, slots: int, max_seq_len: int) -> None:
        self.model = model.eval()
        self.device = model.embed.tokens.weight.device
        self.cache = KVCache(model.spec, slots, max_seq_len, model.compute_dtype, self.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> Tensor:
        """See Executor.run."""
        hidden_TD = self.hidden(plan.spans, plan.num_decoding, tokens)
        ends = torch.tensor([span.count for span in plan.spans]).cumsum(0) - 1
        sampled = torch.tensor([span.samples for span in plan.spans])
        return head(self.model, hidden_TD[ends[sampled].to(self.device)])

    def hidden(
        self, spans: Sequence[Span], num_decoding: int, tokens: Mapping[str, Sequence[int]]
    ) -> Tensor:
        """Final hidden states of all tokens of the spans, [T, D]; row counts are padded."""
        token_ids: list[int] = []
        positions: list[int] = []
        for span in spans:
            token_ids += tokens[span.request_id][span.start : span.start + span.count]
            positions += range(span.start, span.start + span.count)
        count = len(token_ids)
        padding = max(0, MIN_ROWS.get(self.model.compute_dtype, 1) - count)
        token_1T = torch.tensor([token_ids + [0] * padding], device=self.device)
        position_1T = torch.tensor([positions + [0] * padding], device=self.device)
        valid_1T = None
        if padding:
            valid_1T = torch.arange(count + padding, device=self.device).unsqueeze(0) < count
        attend = CachedAttend(self.cache, spans, num_decoding)
        return self.model(token_1T, position_1T, valid_1T, attend).hidden_BTD[0, :count]


def head(model: GPT, hidden_SD: Tensor) -> Tensor:
    """Scores over the vocabulary, [S, V], with padded row counts."""
    padding = max(0, MIN_ROWS.get(hidden_SD.dtype, 1) - len(hidden_SD))
    return model.logits(F.pad(hidden_SD, (0, 0, 0, padding)))[: len(hidden_SD)]
