"""What a microbatch goes through in training, and the books that are kept of it."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptmoe.model.dropout import SampleDropout
from gptmoe.model.jitter import Jitter
from gptmoe.model.routing import Statistics
from gptmoe.model.transformer import GPT, Output
from gptmoe.model.turns import in_turns
from gptmoe.parallel.layout import Layout
from gptmoe.parallel.schedules import Kind
from gptmoe.tensors import TensorBatch

from .schedule import ScheduleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """The numbers that shape one optimizer step. Sequences are counted over the global batch."""

    seed: int
    seq_len: int
    batch_sequences: int
    microbatch_size: int
    first_sequence: int
    """Of the batch's sequences, this rank takes num_sequences from here on."""
    num_sequences: int
    schedule: ScheduleSpec
    pipeline: Kind = "1f1b"
    """The pipeline's schedule."""
    copies: int = 1
    """Parts of a microbatch that take turns, so that one computes while the other's rows travel."""


LOSSES = ("aux_loss", "z_loss", "margin_loss")
"""What routers add to the loss, each where its router has it."""


@dataclass(slots=True)
class Totals:
    """Sums over a step's microbatches on one rank."""

    losses: Tensor
    """[lm loss sum, then each of LOSSES]"""
    statistics: dict[int, Statistics]
    """By MoE layer, those of this stage."""


class TrainingPasses:
    """Forward passes that give each rank its share of the global loss; it keeps the books."""

    def __init__(
        self,
        model: GPT,
        settings: StepSettings,
        layout: Layout,
        microbatches: Sequence[TensorBatch],
        label_count: Tensor,
        dropout: SampleDropout,
        loss_scale: float = 1.0,
    ) -> None:
        self.totals = Totals(torch.zeros(1 + len(LOSSES), dtype=torch.float64), {})
        self._model = model
        self._settings = settings
        self._layout = layout
        self.microbatches = microbatches
        self.label_count = label_count
        self._dropout = dropout
        self._loss_scale = loss_scale

    def shape(self, microbatch: int) -> tuple[int, int]:
        """Sequences and tokens of each."""
        sequences, length = self.microbatches[microbatch].token_BT.shape
        return sequences, length

    def forward(
        self, microbatch: int, layers: range, x_BTD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states, and what these layers add to the global loss, times the loss scale."""
        batch = self.microbatches[microbatch]
        output = self._run(microbatch, batch, layers, x_BTD)
        lm_sum = torch.zeros((), device=output.hidden_BTD.device)
        if layers.stop == self._model.spec.num_layers:
            lm_sum = self._model.loss_sum(output.hidden_BTD, batch.label_BT, batch.weight_BT)
        balance = self._balance(output)
        self._keep_books([lm_sum, *balance], layers, output)
        # Each slice of a tensor group computes the balance losses of all rows: see updater.py.
        loss = lm_sum / self.label_count + _total(balance) / self._layout.tp
        return output.hidden_BTD, loss * self._loss_scale

    def _run(
        self, microbatch: int, batch: TensorBatch, layers: range, x_BTD: Tensor | None
    ) -> Output:
        """The copies of a microbatch in turns: while one's rows travel another computes."""
        copies = self._settings.copies
        size = self._settings.microbatch_size // copies
        first = self._dropout.first_sample + microbatch * self._settings.microbatch_size
        xs = x_BTD.chunk(copies) if x_BTD is not None else (None,) * copies
        valids = batch.valid_BT.chunk(copies) if batch.valid_BT is not None else (None,) * copies
        steps = [
            self._model.steps(
                token_BT,
                valid_BT=valid_BT,
                drop=dataclasses.replace(self._dropout, first_sample=first + index * size),
                jitter=self._jitter(first + index * size),
                layers=layers,
                x_BTD=x,
            )
            for index, (token_BT, valid_BT, x) in enumerate(
                zip(batch.token_BT.chunk(copies), valids, xs, strict=True)
            )
        ]
        return joined(in_turns(steps))

    def _jitter(self, first_sample: int) -> Jitter:
        """The noise of the routers, drawn like dropout's masks, but for whole sequences."""
        known = self._dropout
        return Jitter(
            seed=known.seed, step=known.step, first_sample=first_sample, length=known.length
        )

    def _balance(self, output: Output) -> list[Tensor]:
        """The mean over the batch's routing groups of each of LOSSES, times its coefficient."""
        spec = self._model.spec.router
        groups = self._settings.batch_sequences / spec.group_sequences
        return [
            _total(r.losses[name] for r in output.routings if name in r.losses)
            * (spec.loss_coefficients[name] / groups)
            for name in LOSSES
        ]

    def _keep_books(self, losses: Sequence[Tensor], layers: range, output: Output) -> None:
        self.totals.losses += torch.stack([loss.detach().double().cpu() for loss in losses])
        mine = self.totals.statistics
        moe_layers = [layer for layer in layers if self._model.spec.experts_in_layer(layer)]
        moe_layers *= self._settings.copies
        for layer, routing in zip(moe_layers, output.routings, strict=True):
            counted = routing.statistics
            mine[layer] = mine[layer] + counted if layer in mine else counted


def joined(outputs: Sequence[Output]) -> Output:
    """The outputs of a microbatch's copies as one; their routings copy by copy."""
    if len(outputs) == 1:
        return outputs[0]
    routings = tuple(routing for output in outputs for routing in output.routings)
    return Output(torch.cat([output.hidden_BTD for output in outputs]), routings)


def _total(losses: Iterable[Tensor]) -> Tensor:
    return sum(losses, torch.zeros(()))
