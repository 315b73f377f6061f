"""Validation: loss, perplexity and bits per character over every weighted label once.

Letters: B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptmoe.data import Samples
from gptmoe.model.loss import weighted_loss
from gptmoe.model.transformer import GPT
from gptmoe.tensors import TensorBatch


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Sums over labels; they add up over ranks and batches."""

    loss_sum: float
    """Negative log-likelihood in nats."""
    tokens: int
    """Labels that count: padding does not."""
    characters: int
    """Characters that these labels complete; special tokens have none."""

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over non-padding tokens."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_char(self) -> float:
        """Bits to encode one character, end tokens included: comparable between tokenizers."""
        return self.loss_sum / math.log(2) / self.characters if self.characters else math.nan


def evaluate(
    model: GPT,
    samples: Samples,
    characters_per_token: Sequence[int],
    batch_size: int,
    *,
    limit: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate the first `limit` samples (default: all) with drop-free routing.

    `share=(index, of)` takes every of-th batch: the sums of all shares add up. Every share makes
    the same number of calls of the model, as shared experts demand. `progress(samples done)` is
    called after each batch.
    """
    end = samples.num_samples if limit is None else min(limit, samples.num_samples)
    index, of = share
    device = model.embed.tokens.weight.device
    characters_V = torch.tensor(characters_per_token, device=device)
    was_training = model.training
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, end, batch_size * of):
        first = start + index * batch_size
        count = min(batch_size, end - first)
        batch = TensorBatch.of(samples.batch(first if count > 0 else 0, max(1, count)), device)
        sums = _evaluate_batch(model, batch, characters_V)
        total += sums if count > 0 else 0  # past the end: a call for the others' sake
        if progress is not None:
            progress(min(start + batch_size * of, end))
    model.train(was_training)
    return Evaluation(float(total[0]), int(total[1]), int(total[2]))


@torch.no_grad()
def _evaluate_batch(model: GPT, batch: TensorBatch, characters_V: Tensor) -> Tensor:
    logits_BTV = model.logits(model(batch.token_BT, valid_BT=batch.valid_BT).hidden_BTD)
    loss = weighted_loss(logits_BTV, batch.label_BT, batch.weight_BT)
    labels = batch.label_BT[batch.weight_BT]
    return torch.stack(
        [loss.double(), batch.weight_BT.sum().double(), characters_V[labels].sum().double()]
    ).cpu()
