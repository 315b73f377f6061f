"""Validation: loss, perplexity and bits per character over every weighted label once.

Letters: B sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gptmoe.data import Samples
from gptmoe.model.expert_choice import acausal_routing
from gptmoe.model.transformer import GPT
from gptmoe.parallel.mesh import Mesh, single
from gptmoe.parallel.pipeline import Pipeline
from gptmoe.parallel.schedules import Action
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
    mesh: Mesh | None = None,
    acausal: bool = False,
) -> Evaluation:
    """Evaluate the first `limit` samples (default: all) with drop-free routing.

    `share=(index, of)` takes every of-th batch: the sums of all shares add up. Every share makes
    the same number of calls of the model, as shared experts demand. `progress(samples done)` is
    called after each batch. On a pipeline of several stages (`mesh`) the last one has the sums, the
    others zeros.

    `acausal` is for comparison only: experts that choose (router.kind=expert_choice) do so among a
    whole batch, which is then a routing group as in training, whatever `batch_size`. They see later
    tokens, so that loss is one that the model cannot have when it writes.
    """
    if acausal:
        batch_size = model.spec.router.group_sequences
    end = samples.num_samples if limit is None else min(limit, samples.num_samples)
    index, of = share
    starts = [first + index * batch_size for first in range(0, end, batch_size * of)]
    passes = _Passes(model, samples, characters_per_token, starts, end, batch_size)
    was_training = model.training
    model.eval()
    mesh = mesh or single()
    pipeline = Pipeline(model, mesh)
    with torch.no_grad(), acausal_routing(model) if acausal else nullcontext():
        for number, start in enumerate(starts):
            actions = [Action(True, chunk, number) for chunk in range(mesh.layout.chunks)]
            pipeline.run(actions, passes)
            if progress is not None:
                progress(min(start + batch_size * (of - index), end))
    model.train(was_training)
    total = passes.total
    return Evaluation(float(total[0]), int(total[1]), int(total[2]))


class _Passes:
    """Forward passes that add up losses."""

    def __init__(
        self,
        model: GPT,
        samples: Samples,
        characters_per_token: Sequence[int],
        starts: Sequence[int],
        end: int,
        batch_size: int,
    ) -> None:
        self.total = torch.zeros(3, dtype=torch.float64)
        self._model = model
        self._samples = samples
        self._device = next(model.parameters()).device
        self._characters_V = torch.tensor(characters_per_token, device=self._device)
        self._starts, self._end, self._size = starts, end, batch_size
        self._loaded: tuple[int, TensorBatch] | None = None

    def shape(self, microbatch: int) -> tuple[int, int]:
        """Sequences and tokens of each."""
        sequences, length = self._batch(microbatch).token_BT.shape
        return sequences, length

    def forward(
        self, microbatch: int, layers: range, x_BTD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One pass; behind the last layer its losses are added to the total."""
        batch = self._batch(microbatch)
        hidden_BTD = self._model(
            batch.token_BT, valid_BT=batch.valid_BT, layers=layers, x_BTD=x_BTD
        ).hidden_BTD
        loss = torch.zeros(())
        if layers.stop == self._model.spec.num_layers:
            loss = self._model.loss_sum(hidden_BTD, batch.label_BT, batch.weight_BT)
            if self._starts[microbatch] < self._end:  # else a call for the others' sake
                self._add(loss, batch)
        return hidden_BTD, loss

    def _add(self, loss: Tensor, batch: TensorBatch) -> None:
        labels = batch.label_BT[batch.weight_BT]
        counts = [batch.weight_BT.sum(), self._characters_V[labels].sum()]
        self.total += torch.stack([loss.double(), *(count.double() for count in counts)]).cpu()

    def _batch(self, microbatch: int) -> TensorBatch:
        if self._loaded is None or self._loaded[0] != microbatch:
            first = self._starts[microbatch]
            count = min(self._size, self._end - first)
            batch = self._samples.batch(first if count > 0 else 0, max(1, count))
            self._loaded = microbatch, TensorBatch.of(batch, self._device)
        return self._loaded[1]
